"""Key bases by way of the compiled module: learning, caches whose keys are in one, their bytes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from tqai import _core
from tqai.stores.for_torch.tensor_refs import ref

HEADS, DIM, TOKENS = 2, 32, 300


def structured(seed: int, tokens: int = TOKENS) -> np.ndarray:
    """[HEADS, tokens, DIM] float32 whose energy lies mostly in a few directions."""
    generator = np.random.default_rng(seed)
    mixture = np.random.default_rng(7).standard_normal((HEADS, DIM, DIM)) * np.exp(
        -0.2 * np.arange(DIM)
    )
    drawn = generator.standard_normal((HEADS, tokens, DIM))
    return np.einsum("hij,htj->hti", mixture, drawn).astype(np.float32)


def moments() -> _core.KeyMoments:
    gathered = _core.KeyMoments(HEADS, DIM)
    for head, (keys, queries) in enumerate(zip(structured(1), structured(2), strict=True)):
        gathered.add_keys(head, keys)
        gathered.add_queries(head, queries)
    return gathered


def filled(basis: _core.KeyBasis | None, bits: int = 2) -> tuple[_core.KvCache, torch.Tensor]:
    """A cache with tokens, and its keys [1, HEADS, TOKENS, DIM]."""
    keys = torch.from_numpy(structured(3))[None].contiguous()
    cache = _core.KvCache(
        batch=1, kv_heads=HEADS, head_dim=DIM, bits_k=bits, residual_window=0, key_basis=basis
    )
    cache.append(ref(keys), ref(keys))
    cache.seal()
    return cache, keys


def gathered_keys(cache: _core.KvCache) -> torch.Tensor:
    keys, values = torch.empty(1, HEADS, TOKENS, DIM), torch.empty(1, HEADS, TOKENS, DIM)
    cache.gather(0, ref(keys), ref(values))
    return keys


def test_moments_are_those_of_numpy():
    keys, queries = structured(1)[0].astype(float), structured(2)[0].astype(float)
    found = moments()
    assert found.tokens(0) == TOKENS
    np.testing.assert_allclose(
        found.keys_until(0, 0), np.cov(keys.T, bias=True), rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(
        found.queries_until(0, 0), queries.T @ queries / TOKENS, rtol=1e-9, atol=1e-9
    )


def test_matrices_fit_each_other():
    basis = _core.KeyBasis.learn(moments(), 4)
    assert (basis.kv_heads, basis.head_dim, basis.bits) == (HEADS, DIM, 4)
    assert basis.nbytes == _core.KeyBasis.bytes_of(HEADS, DIM) > HEADS * (5 * DIM * DIM - DIM)
    for head in range(HEADS):
        analysis, lower, synthesis = basis.matrices(head)
        assert np.array_equal(np.tril(lower, -1) + np.eye(DIM, dtype=np.float32), lower)
        assert np.abs(analysis @ synthesis - lower).max() < 2e-3 * np.abs(lower).max()


def test_keys_with_a_structure_are_held_better():
    basis = _core.KeyBasis.learn(moments(), 2)
    queries = torch.from_numpy(structured(4, 50))[None]
    errors = []
    for each in (basis, None):
        cache, keys = filled(each)
        missed = queries @ (gathered_keys(cache) - keys).transpose(-1, -2)
        errors.append((missed - missed.mean(-1, keepdim=True)).square().mean().item())
    assert errors[0] < 0.3 * errors[1]


def test_caches_say_what_they_are_in():
    basis = _core.KeyBasis.learn(moments(), 2)
    cache, _ = filled(basis)
    assert cache.key_basis is basis
    assert cache.memory()["basis_bytes"] == basis.nbytes
    with pytest.raises(ValueError, match="not rotated"):
        _ = cache.rotations
    plain, _ = filled(None)
    assert plain.key_basis is None
    assert plain.memory()["basis_bytes"] == 0


def test_bytes_name_the_basis_or_have_it():
    basis = _core.KeyBasis.learn(moments(), 2)
    cache, _ = filled(basis)
    expected = gathered_keys(cache)
    named, whole = cache.serialize(), cache.serialize(with_basis=True)
    assert len(whole) > len(named)
    assert torch.equal(gathered_keys(_core.KvCache.deserialize(whole)), expected)
    back = _core.KvCache.deserialize(named, key_bases=[basis])
    assert back.key_basis is basis
    assert torch.equal(gathered_keys(back), expected)
    with pytest.raises(ValueError, match=f"{basis.id:016x}"):
        _core.KvCache.deserialize(named)
    with pytest.raises(ValueError, match=f"{basis.id:016x}"):
        _core.KvCache.deserialize(named, key_bases=[_core.KeyBasis.learn(moments(), 3)])
    pickled = pickle.loads(pickle.dumps(cache))
    assert torch.equal(gathered_keys(pickled), expected)


def test_files_name_the_basis(tmp_path):
    basis = _core.KeyBasis.learn(moments(), 2)
    cache, _ = filled(basis)
    path = tmp_path / "cache.safetensors"
    _core.write_file(path, [("layers.0.packed", "U8", None, cache)])
    file = _core.CacheFile(path)
    with pytest.raises(ValueError, match="key basis"):
        file.load("layers.0.packed")
    back = file.load("layers.0.packed", key_bases=[basis])
    assert torch.equal(gathered_keys(back), gathered_keys(cache))


def test_bases_come_back_from_bytes():
    basis = _core.KeyBasis.learn(moments(), 4)
    for back in (
        _core.KeyBasis.deserialize(basis.serialize()),
        pickle.loads(pickle.dumps(basis)),
    ):
        assert back.id == basis.id
        assert back.serialize() == basis.serialize()
    with pytest.raises(ValueError, match="not the bytes of a key basis"):
        _core.KeyBasis.deserialize(basis.serialize()[:-1])


def test_mistakes_are_said():
    gathered = moments()
    with pytest.raises(ValueError, match=r"\(300, 31\); needed: \(tokens, 32\)"):
        gathered.add_keys(0, np.zeros((TOKENS, 31)))
    with pytest.raises(IndexError, match="kv head 2 of 2"):
        gathered.add_queries(2, np.zeros((TOKENS, DIM)))
    with pytest.raises(ValueError, match="bits = 9"):
        _core.KeyBasis.learn(gathered, 9)
    with pytest.raises(ValueError, match="at 4 bits"):
        filled(_core.KeyBasis.learn(gathered, 4), bits=2)
