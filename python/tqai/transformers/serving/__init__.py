"""Continuous batching: many requests in one pass, each with a compressed cache of its own."""
