"""A cache that one thread generates with, while others look at it, copy it and save it."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tqai
from caches import SEALING
from conftest import Models, make_ids

PROMPT, STEPS = 90, 40


@pytest.fixture(autouse=True)
def busy_threads() -> Iterator[None]:
    """Threads take turns a hundred times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.parametrize("settings", [{}, {"backend": "torch-ops"}, {"skip_layers": [1]}])
def test_a_cache_may_be_looked_at_copied_and_saved_while_a_thread_generates(
    settings: dict[str, Any], models: Models, tmp_path: Path
) -> None:
    """What others see is whole passes, and what is generated is the same."""
    model, ids = models(num_hidden_layers=3), make_ids(1, PROMPT)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": 999, "pad_token_id": 0}
    cache = tqai.patch(model, **SEALING, **settings)
    text = model.generate(ids, past_key_values=cache, max_new_tokens=STEPS, **options)
    expected = [(layer.keys, layer.values) for layer in cache.layers]
    done, errors, counts = threading.Event(), list[BaseException](), [0, 0, 0]
    shared = [tqai.new_cache(model)]

    def look() -> None:
        report = shared[0].memory_report()
        assert report["packed_tokens"] <= report["tokens"] <= PROMPT + STEPS
        assert "tokens in" in repr(shared[0])

    def duplicate() -> None:
        copied = copy.deepcopy(shared[0])
        lengths = {int(layer.get_seq_length()) for layer in copied.layers}
        assert len(lengths) == 1 and lengths <= {0, *range(PROMPT, PROMPT + STEPS)}

    def save() -> None:
        tqai.save_cache(shared[0], tmp_path / "cache")
        loaded = tqai.load_cache(tmp_path / "cache", model)
        assert len({int(layer.get_seq_length()) for layer in loaded.layers}) == 1

    def repeat(which: int, work: Callable[[], None]) -> None:
        try:
            while not done.is_set():
                work()
                counts[which] += 1
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=repeat, args=(which, work))
        for which, work in enumerate((look, duplicate, save))
    ]
    for thread in threads:
        thread.start()
    rounds = 0
    try:
        while (rounds < 2 or min(counts) < 3) and not errors:
            shared[0] = tqai.new_cache(model)
            again = model.generate(ids, past_key_values=shared[0], max_new_tokens=STEPS, **options)
            assert torch.equal(again, text)
            rounds += 1
    finally:
        done.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    for layer, (keys, values) in zip(shared[0].layers, expected, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
