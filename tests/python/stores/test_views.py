"""Views of a cache's tiles, and memory that is set aside for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tqai import _core
from tqai.stores.for_torch.tensor_refs import ref

HEADS, DIM = 2, 32


def filled() -> _core.KvCache:
    cache = _core.KvCache(
        batch=1, kv_heads=HEADS, head_dim=DIM, residual_window=16, bits_v=4, centering="mean"
    )
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(1, HEADS, 220, DIM, generator=generator) for _ in range(2))
    cache.append(ref(keys), ref(values))
    cache.seal()
    return cache


def test_tiles_are_what_the_cache_reads_and_outlive_it() -> None:
    cache = filled()
    layout = cache.tile_layout
    blocks = cache.sealed_blocks(0)
    kind, constant, real, imaginary = cache.centre(0, blocks[0]["centre_set"], 1)
    assert kind == "mean" and constant.shape == (DIM,) and real.size == imaginary.size == 0
    keys, values = (torch.empty(1, HEADS, 192, DIM) for _ in range(2))
    cache.gather(4, ref(keys), ref(values))
    rotation = cache.rotations[1]
    centroids = _core.Codebook(DIM, 4, "int8").centroids
    packed = cache.memory()["packed_bytes"]
    before = _core.allocated_bytes()
    del cache
    assert _core.allocated_bytes() > before - packed  # the arrays keep them
    assert [block["first_token"] for block in blocks] == [4, 68, 132]
    for block in blocks:
        tiles = block["tiles"]
        assert tiles.shape == (HEADS, layout["bytes"]) and tiles.dtype == np.uint8
        assert block["tokens"] == 64 and block["positions"] is None
        with pytest.raises(ValueError, match="read-only"):
            tiles[0, 0] = 1
        for head in range(HEADS):
            tile = tiles[head]
            norms = tile[layout["value_norms"] :].view(np.float16).astype(np.float32)
            codes = value_codes(tile[layout["value_codes"] : layout["key_norms"]])
            decoded = norms[:, None] * centroids[codes] @ rotation
            at = block["first_token"] - 4
            expected = values[0, head, at : at + 64].numpy()
            np.testing.assert_allclose(decoded, expected, atol=1e-5)
    del blocks, block, tiles, tile, codes, norms
    assert _core.allocated_bytes() <= before - packed


def value_codes(packed: np.ndarray) -> np.ndarray:
    """[64, DIM] of four bits each, as include/tqai/packing.hpp says."""
    codes = np.empty((64, DIM), int)
    groups = packed.reshape(DIM // 16, 2, 4, 64)  # coordinates, halves of the tokens, lines
    for block in range(DIM // 16):
        for half in range(2):
            lines = np.empty((8, 64), int)
            lines[0::2], lines[1::2] = groups[block, half] & 15, groups[block, half] >> 4
            tokens = lines.reshape(8, 16, 4)  # line i: byte 4c + t is coordinate c of token 4i + t
            codes[32 * half : 32 * half + 32, 16 * block : 16 * block + 16] = tokens.transpose(
                0, 2, 1
            ).reshape(32, 16)
    return codes


def test_what_does_not_exist_is_refused() -> None:
    cache = filled()
    with pytest.raises(IndexError, match="row 1 of a batch of 1"):
        cache.sealed_blocks(1)
    with pytest.raises(IndexError, match="centre set 1, head 0"):
        cache.centre(0, 1, 0)


def test_reserving_takes_memory_at_once_or_none() -> None:
    cache = filled()
    before, held = cache.serialize(), _core.allocated_bytes()
    _core.limit_memory(held + 1000)
    try:
        with pytest.raises(MemoryError, match="limit_memory allows"):
            cache.reserve(10000)
    finally:
        _core.limit_memory(0)
    assert _core.allocated_bytes() == held and cache.serialize() == before
    cache.reserve(10000)
    assert _core.allocated_bytes() > held + 100 * 64 * cache.tile_layout["bytes"] // 64
    assert cache.memory()["total_bytes"] == filled().memory()["total_bytes"] + (
        _core.allocated_bytes() - held
    )
    cache.reserve(0)
    assert _core.allocated_bytes() == held
