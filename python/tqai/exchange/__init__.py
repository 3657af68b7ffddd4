"""Packed caches between processes and machines: what they travel in, and where they are kept.

- ``envelope``: bytes that say what they are and what they go with, checked before they are used;
- ``cache_bytes``: a store's bytes taken apart into tiles, centres and exact tokens, and back;
- ``shelf``: where envelopes lie, by name, for several processes; ``folder_shelf``, ``redis_shelf``.
- ``chunk``: keys and values of some tokens of all layers, in torch's tensors, as tiles and back;
  ``chunk_options``: how; ``short_forms``: norms and centres in fewer bytes than a cache's.

But for ``chunk`` it knows no framework.
"""
