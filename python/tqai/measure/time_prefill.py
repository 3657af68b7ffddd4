"""Prefills timed with and without compression, and what sealing takes of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from tqai import api
from tqai.measure.text import prose
from tqai.measure.timing import ratio, wait_for
from tqai.settings import Dtype
from tqai.transformers.cache.layer import TqaiLayer
from tqai.transformers.loading import load
from tqai.transformers.model.names import cache_argument


@dataclass(frozen=True)
class PrefillTime:
    """What reading a prompt took; medians."""

    tokens: int
    dtype: str
    threads: int
    bits: str
    dynamic_milliseconds: float
    """With transformers' DynamicCache, the model unpatched."""
    tqai_milliseconds: float
    """With tqai's cache: the same attention over the new tokens, then sealing."""
    times_dynamic: float
    """The second over the first; the median of the rounds' ratios."""
    sealing_milliseconds: float
    """Of that: handing the prompt's keys and values to the caches and sealing them, all layers."""
    sealing_share: float
    """Of the uncompressed prefill; the median of the rounds' ratios."""
    packed_tokens: int
    rounds: int


def time_prefill(
    model: str | None = None,
    dtype: Dtype = "float32",
    tokens: Iterable[int] = (1024, 2048),
    options: dict[str, Any] | None = None,
    *,
    rounds: int = 5,
    device: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Iterator[PrefillTime]:
    """Times prompts of real text of each length, with torch's threads.

    Args:
        model, dtype, device: as for ``tqai.transformers.loading.load``.
        options: arguments of ``tqai.patch``.
        rounds: each has one prefill with each cache, and one sealing alone; a first is not
            counted.
        progress: called after each round with rounds done, all rounds, and the length.

    Raises:
        ValueError: for lengths or rounds below 1, and for more tokens than the text has.
    """
    lengths = list(tokens)
    for name, numbers in (("tokens", lengths), ("rounds", [rounds])):
        if any(number < 1 for number in numbers):
            raise ValueError(f"{name}={numbers}: expected at least 1")
    loaded, tokenizer = load(model, dtype, device)
    ids = torch.tensor([tokenizer(prose(), verbose=False).input_ids], device=loaded.device)
    if max(lengths, default=1) > ids.shape[1]:
        raise ValueError(f"tokens={max(lengths)}: expected at most {ids.shape[1]}, the text's")
    for length in lengths:
        yield _time_length(loaded, ids[:, :length], dtype, options or {}, rounds, progress)


@torch.inference_mode()
def _time_length(
    model: Any,
    ids: torch.Tensor,
    dtype: str,
    options: dict[str, Any],
    rounds: int,
    progress: Callable[[int, int, str], None] | None,
) -> PrefillTime:
    plain_times: list[float] = []
    packed_times: list[float] = []
    sealing_times: list[float] = []
    report: dict[str, Any] = {}

    def read_plain() -> float:
        cache = DynamicCache()
        seconds = _seconds(lambda: _read(model, ids, cache), ids.device)
        states = [(layer.keys, layer.values) for layer in cache.layers]
        api.patch(model, **options)
        try:
            sealing_times.append(_seconds(lambda: _seal(api.new_cache(model), states), ids.device))
        finally:
            api.unpatch(model)
        return seconds

    def read_packed() -> float:
        api.patch(model, **options)
        try:
            _read(model, ids[:, :1], api.new_cache(model))  # finds the rotary embedding, once
            cache = api.new_cache(model)
            seconds = _seconds(lambda: _read(model, ids, cache), ids.device)
            report.update(cache.memory_report())
        finally:
            api.unpatch(model)
        return seconds

    for done in range(rounds + 1):
        # Each with the memory that the other has given back, and first as often as second: fresh
        # pages cost a tenth of a small model's prefill.
        if done % 2:
            packed, plain = read_packed(), read_plain()
        else:
            plain, packed = read_plain(), read_packed()
        if done > 0:  # the first warms up
            plain_times.append(plain)
            packed_times.append(packed)
        else:
            sealing_times.clear()
        if progress is not None:
            progress(done + 1, rounds + 1, f"{ids.shape[1]} tokens")
    settings = report["settings"]
    return PrefillTime(
        tokens=ids.shape[1],
        dtype=dtype,
        threads=torch.get_num_threads(),
        bits=f"k{settings['bits_k']}v{settings['bits_v']}",
        dynamic_milliseconds=statistics.median(plain_times) * 1e3,
        tqai_milliseconds=statistics.median(packed_times) * 1e3,
        times_dynamic=ratio(packed_times, plain_times),
        sealing_milliseconds=statistics.median(sealing_times) * 1e3,
        sealing_share=ratio(sealing_times, plain_times),
        packed_tokens=max(layer["packed_tokens"] for layer in report["layers"]),
        rounds=rounds,
    )


def _read(model: Any, ids: torch.Tensor, cache: Any) -> None:
    model(ids, use_cache=True, logits_to_keep=1, **cache_argument(model, cache))


def _seal(cache: Any, states: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """What a prefill does beside the model's own work."""
    for index, (keys, values) in enumerate(states):
        cache.update(keys, values, index)
        layer = cache.layers[index]
        if isinstance(layer, TqaiLayer):
            layer.settle(True)


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - start
