"""Tiles that the C++ library encodes, for a store on any device.

Codes in trellises and in learnt bases are found one coordinate after the other, in many short
steps, between which a device would mostly wait. They are found on the CPU when tokens are sealed,
64 or more at a time, and are the C++ cache's to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tqai import _core
from tqai.stores.device.operations import Array, Operations
from tqai.stores.device.packing import TILE_TOKENS


def encode(
    ops: Operations, options: dict[str, Any], keys: Array, values: Array, tile_bytes: int
) -> Array:
    """[rows, kv_heads, tiles · 64, dim] float32, keys less their centre, to [rows, kv_heads, tiles,
    tile_bytes] uint8.

    options: those of ``_core.KvCache`` that decide what codes are. Waits for the device. No vector
    is longer than such a cache compresses.
    """
    vectors = [np.ascontiguousarray(ops.to_numpy(each)) for each in (keys, values)]
    rows, heads, tokens, _ = vectors[0].shape
    cache = _core.KvCache(
        batch=rows, sink_tokens=0, residual_window=0, centering="none", rope=None, **options
    )
    cache.append(*(_core.borrowed(each) for each in vectors))
    held = cache.seal()
    assert held == 0, "a vector that is too long"
    tiles, size = tokens // TILE_TOKENS, rows * heads * tokens // TILE_TOKENS * tile_bytes
    # They are the last of the bytes, those of a row's heads side by side.
    data = np.frombuffer(cache.serialize(), np.uint8)[-size:]
    return ops.asarray(data.reshape(rows, tiles, heads, tile_bytes).swapaxes(1, 2))
