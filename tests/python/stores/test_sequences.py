"""Calls on lists of caches: to the bit what each gets alone, and all or nothing."""

from __future__ import annotations

import threading

import pytest
import torch
from tqai import _core
from tqai.stores.for_torch.tensor_refs import ref

HEADS, DIM = 2, 32


def make_cache(**more: object) -> _core.KvCache:
    options = {"batch": 1, "residual_window": 16, "bits_v": 4, **more}
    return _core.KvCache(kv_heads=HEADS, head_dim=DIM, **options)


def numbers(heads: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, heads, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def test_each_gets_what_it_gets_alone() -> None:
    together = [make_cache() for _ in range(3)]
    alone = [make_cache() for _ in range(3)]
    for step, counts in enumerate([[200, 5, 90], [1, 1, 1], [1, 0, 3], [2, 120, 1]]):
        total = sum(counts)
        keys, values = numbers(HEADS, total, step), numbers(HEADS, total, 100 + step)
        queries = numbers(2 * HEADS, total, 200 + step)
        output, logs = torch.empty(1, total, 2 * HEADS, DIM), torch.empty(1, total, 2 * HEADS, 1)
        _core.append_sequences(together, counts, ref(keys), ref(values))
        _core.attend_sequences(
            together, counts, ref(queries), ref(output), window=70, log_sum_exp=ref(logs)
        )
        first = 0
        for cache, count in zip(alone, counts, strict=True):
            own = slice(first, first + count)
            first += count
            if count == 0:
                continue
            cache.append(ref(keys[:, :, own]), ref(values[:, :, own]))
            expected = torch.empty(1, count, 2 * HEADS, DIM)
            cache.attend(ref(queries[:, :, own]), ref(expected), window=70)
            assert torch.equal(output[:, own], expected)
        assert logs.isfinite().all()
    assert _core.seal_sequences(together, threads=1) == 0
    _core.crop_sequences(together, [150, 100, 60])
    for cache, tokens in zip(alone, [150, 100, 60], strict=True):
        cache.seal()
        cache.crop(tokens)
    assert [cache.serialize() for cache in together] == [cache.serialize() for cache in alone]


def test_one_that_is_refused_changes_none() -> None:
    caches = [make_cache(), make_cache(), make_cache(batch=2)]
    keys = numbers(HEADS, 4)
    _core.append_sequences(caches[:2], [3, 1], ref(keys), ref(keys))
    before = [cache.serialize() for cache in caches]
    wrong = keys.clone()
    wrong[0, 0, 3, 0] = float("nan")
    for lists, counts, given, message in (
        (caches[:2], [3, 1], wrong, "sequence 1 of 2: keys.*NaN"),
        (caches[:2], [3, 2], keys, "sum of the counts"),
        (caches[:2], [4], keys, "1 counts for 2 caches"),
        ([caches[0], caches[0]], [3, 1], keys, "comes twice"),
        ([caches[0], caches[2]], [3, 1], keys, "sequence 1 of 2: its cache has 2 rows"),
        ([caches[0], None], [3, 1], keys, "one of the caches is None"),
    ):
        with pytest.raises(ValueError, match=message):
            _core.append_sequences(lists, counts, ref(given), ref(keys))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sequence 1 of 2: crop to 2 tokens"):
        _core.crop_sequences(caches[:2], [1, 2])
    with pytest.raises(ValueError, match="1 lengths for 2 caches"):
        _core.crop_sequences(caches[:2], [1])
    assert [cache.serialize() for cache in caches] == before


def test_lists_that_overlap_wait_for_each_other() -> None:
    """In whatever order they name the caches that they share, and beside calls on one."""
    caches = [make_cache() for _ in range(4)]
    keys = numbers(HEADS, 4)
    output = torch.empty(4, 1, 4, HEADS, DIM)
    errors: list[BaseException] = []

    def work(which: int) -> None:
        order = caches[which:] + caches[:which]
        if which % 2:
            order.reverse()
        try:
            for _ in range(60):
                _core.append_sequences(order, [1] * 4, ref(keys), ref(keys), threads=1)
                twice = [*order[:2], *order[:2]]
                _core.attend_sequences(twice, [1] * 4, ref(keys), ref(output[which]), threads=1)
                caches[which].seal(1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(which,), daemon=True) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors and not any(thread.is_alive() for thread in threads)
    assert [cache.tokens for cache in caches] == [240] * 4
