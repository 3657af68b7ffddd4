"""Prompts that other processes have read: a store of prefixes, 64 tokens at a time.

- ``store``: what users have, and what it does around ``generate``;
- ``chains``: the names of prefixes, and what they go with;
- ``blocks``: a cache as entries of a store, and back.
"""
