"""Trellis codes by way of the compiled module: tables, single vectors, caches and their bytes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from tqai import _core
from tqai.stores.for_torch.tensor_refs import ref

HEADS, DIM, TOKENS = 2, 64, 300


def unit_vectors(rows: int, dim: int) -> np.ndarray:
    drawn = np.random.default_rng(5).standard_normal((rows, dim))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def filled(value_codes: str, bits_v: int) -> tuple[_core.KvCache, torch.Tensor]:
    """A cache with tokens, and their values [1, HEADS, TOKENS, DIM]."""
    keys, values = torch.randn(2, 1, HEADS, TOKENS, DIM, generator=torch.Generator().manual_seed(2))
    cache = _core.KvCache(
        batch=1,
        kv_heads=HEADS,
        head_dim=DIM,
        bits_v=bits_v,
        residual_window=0,
        value_codes=value_codes,
    )
    cache.append(ref(keys), ref(values))
    cache.seal()
    return cache, values


def gathered_values(cache: _core.KvCache) -> torch.Tensor:
    keys, values = torch.empty(2, 1, HEADS, TOKENS, DIM)
    cache.gather(0, ref(keys), ref(values))
    return values


def test_vectors_decode_to_the_levels_of_their_windows():
    for bits in (1, 2, 3, 4):
        quantizer = _core.Quantizer(DIM, bits, codes="trellis", rotation="hadamard")
        codes, norms = quantizer.encode(unit_vectors(20, DIM))
        stream = np.unpackbits(codes, axis=1, bitorder="little")
        ends = (np.arange(DIM)[:, None] + 1) * bits
        window = stream[:, (ends - 8 + np.arange(8)) % (DIM * bits)] @ (1 << np.arange(8))
        table = _core.Trellis(bits)
        assert table.levels.shape == (256,) and np.abs(table.levels.astype(int)).max() <= 63
        unit = table.levels[window] * table.step(DIM)
        decoded = quantizer.decode(codes, np.ones_like(norms))
        np.testing.assert_allclose(
            np.linalg.norm(decoded, axis=1), np.linalg.norm(unit, axis=1), rtol=1e-5
        )


def test_values_are_nearer_in_the_same_bytes():
    for bits in (1, 2, 3, 4):
        errors, sizes = [], []
        for value_codes in ("trellis", "scalar"):
            cache, values = filled(value_codes, bits)
            assert cache.value_codes == value_codes
            errors.append((gathered_values(cache) - values).square().mean())
            sizes.append(cache.memory())
        assert errors[0] < (0.87 if bits == 1 else 0.75) * errors[1]
        assert sizes[0] == sizes[1]


def test_bytes_and_copies_keep_them():
    cache, _ = filled("trellis", 2)
    for same in (
        pickle.loads(pickle.dumps(cache)),
        _core.KvCache.deserialize(cache.serialize()),
        cache.copy(),
    ):
        assert same.value_codes == "trellis"
        assert torch.equal(gathered_values(same), gathered_values(cache))


def test_what_there_is_not_is_refused():
    with pytest.raises(ValueError, match="bits of trellis codes = 5; allowed: 1…4"):
        _core.Trellis(5)
    with pytest.raises(ValueError, match="bits of trellis codes = 8"):
        _core.Quantizer(DIM, 8, codes="trellis")
    with pytest.raises(ValueError, match='codes = "lattice"; allowed: scalar, trellis'):
        _core.Quantizer(DIM, 2, codes="lattice")
    with pytest.raises(ValueError, match="bits_v = 6 where value_codes is trellis"):
        filled("trellis", 6)
    with pytest.raises(ValueError, match='value_codes = "adaptive"; allowed: scalar, trellis'):
        filled("adaptive", 2)
