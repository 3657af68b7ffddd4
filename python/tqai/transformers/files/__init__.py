"""Caches in files: ``save_load``, with the ``checks`` of what was read."""
