"""A cache that one thread changes while others read it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from tqai import _core
from tqai.stores.for_torch.tensor_refs import ref

STEP = 64
LENGTHS = range(0, 641, STEP)
"""Tokens that the cache can have between two calls of ``write``'s."""


@pytest.fixture(autouse=True)
def busy_threads() -> Iterator[None]:
    """Threads take turns a hundred times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(usual)


def run_beside(write: Callable[[], None], *reads: Callable[[], object], rounds: int) -> None:
    """Calls `write` that often, while a thread for each of `reads` calls that again and again.

    Goes on until each thread has come round. Raises what a thread raised.
    """
    done, errors = threading.Event(), list[BaseException]()
    counts = [0] * len(reads)

    def repeat(which: int) -> None:
        try:
            while not done.is_set():
                reads[which]()
                counts[which] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(which,)) for which in range(len(reads))]
    for thread in threads:
        thread.start()
    try:
        while (rounds > 0 or min(counts) == 0) and not errors:
            write()
            rounds -= 1
    finally:
        done.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def test_a_cache_may_be_read_while_another_thread_changes_it() -> None:
    """Each answer is one that the cache could give between two changes."""
    cache = _core.KvCache(batch=2, kv_heads=2, head_dim=64, residual_window=16, sink_tokens=2)
    states = torch.randn(2, 2, STEP, 64)
    queries = torch.randn(2, 4, 1, 64)

    def write() -> None:
        for _ in range(10):
            cache.append(ref(states), ref(states))
            cache.seal()
        cache.select([1, 0])
        cache.crop(320)
        cache.crop(0)
        cache.append(ref(states), ref(states))
        cache.set_padding([10, 20])
        cache.discard_before(STEP)
        cache.crop(0)

    def measure() -> None:
        memory = cache.memory()
        assert memory["packed_tokens"] <= memory["tokens"] <= 2 * LENGTHS[-1]
        assert memory["uncompressed_bytes"] == memory["tokens"] * 2 * 2 * 64 * 4
        assert cache.packed_tokens(0) <= LENGTHS[-1]
        assert cache.centering(0, 0) in (None, "none", "mean")
        assert cache.tokens in LENGTHS and cache.first_token in (*range(21), *LENGTHS)

    def copy() -> None:
        for held in (cache.copy(), _core.KvCache.deserialize(cache.serialize())):
            memory = held.memory()
            assert held.tokens in LENGTHS
            assert memory["packed_tokens"] == held.packed_tokens(0) + held.packed_tokens(1)
            held.append(ref(states), ref(states))
            held.seal()

    def attend() -> None:
        held = cache.copy()
        if held.tokens > 0:
            output = torch.full((2, 1, 4, 64), torch.nan)
            held.attend(ref(queries), ref(output))
            assert output.isfinite().all()

    run_beside(write, measure, measure, copy, attend, rounds=200)


def test_who_waits_for_a_cache_lets_others_run() -> None:
    """A change that waits for readers must keep neither them nor other threads waiting."""
    cache = _core.KvCache(batch=1, kv_heads=1, head_dim=64)
    states = torch.randn(1, 1, 4096, 64)
    cache.append(ref(states), ref(states))

    run_beside(cache.seal, cache.serialize, cache.copy, cache.memory, cache.serialize, rounds=20)
