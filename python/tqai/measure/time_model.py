"""Decoding of a whole model against the context's length, with several kinds of caches."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from tqai.measure.decoder import DYNAMIC, FIRST_STEPS, MLX_PLAIN, Decoder, Variant
from tqai.measure.timing import ratio

_ROUND_STEPS = 4


@dataclass(frozen=True)
class ModelTime:
    """What one kind of cache takes at one context."""

    cache: str
    dtype: str
    bits: str | None
    """As k4v2, or the back end's name and bits; None: uncompressed."""
    level: str | None
    model: str
    """As it was named; a file's name for the default one."""
    threads: int
    """Of torch; with mlx those of tqai's kernels, as mlx does not tell its own."""
    context: int
    """Tokens in the cache before the steps."""
    repeated: int
    """Those of them whose keys and values are copies of those that the model has computed."""
    steps: int
    milliseconds: float
    """Of a token, median."""
    times_dynamic: float | None
    """How many times as fast as DynamicCache, or mlx-lm's KVCache, of the same dtype: the median of
    the rounds' ratios."""
    cache_bytes: int | None
    """Of keys and values by the cache's own account, after the steps; None: it gives none."""
    packed_tokens: int | None
    growth_bytes: int | None
    """Of the process, over the model's own; None where the system does not tell."""
    peak_bytes: int | None
    """As ``growth_bytes``, the most while tokens were decoded."""


def time_model(
    variants: Sequence[Variant],
    contexts: Sequence[int],
    start: Callable[[], AbstractContextManager[Callable[..., Any]]],
    *,
    model: str | None = None,
    prefill: int = 1024,
    tokens: int = 16,
    threads: int | None = None,
    device: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Iterator[list[ModelTime]]:
    """Times the decoding of `tokens` tokens at each context: one result per variant.

    Each variant lives in a process of its own, all at once; they take turns of a few tokens, so
    that what disturbs the machine disturbs all alike. The model reads `prefill` tokens of prose;
    the context is filled with their keys and values, over and over if need be.

    Args:
        model, device: as for ``tqai.transformers.loading.load``; mlx-lm takes no device.
        start: a process as a context manager; it gives a function that calls functions there.
        progress: called after every turn with tokens decoded, all that will be, and by what.

    Raises:
        ValueError: for numbers out of range, or as ``tqai.patch``.
        NotImplementedError: as ``tqai.patch``.
    """
    for name, values in (("contexts", contexts), ("prefill", [prefill]), ("tokens", [tokens])):
        for value in values:
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
    rounds = -(-tokens // _ROUND_STEPS)
    total = len(variants) * len(contexts) * tokens
    done = 0

    def count(steps: int, what: str) -> None:
        nonlocal done
        done += steps
        if progress is not None:
            progress(done, total, what)

    with ExitStack() as stack:
        calls = [stack.enter_context(start()) for _ in variants]
        longest = max(contexts, default=0) + tokens + FIRST_STEPS
        count(0, "loading")
        # Nothing is timed yet, so as many at once as there are processors.
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for opening in [
                pool.submit(call, _open, index, variant, model, prefill, longest, threads, device)
                for index, (variant, call) in enumerate(zip(variants, calls, strict=True))
            ]:
                opening.result()
        for context in contexts:
            for index, call in enumerate(calls):
                call(_fill, index, context)
            times: list[list[list[float]]] = [[] for _ in variants]
            for at in range(rounds):
                size = min(_ROUND_STEPS, tokens - at * _ROUND_STEPS)
                for index, (variant, call) in enumerate(zip(variants, calls, strict=True)):
                    times[index].append(call(_decode, index, size))
                    count(size, f"{variant.kind} {variant.dtype}, {context} tokens")
            medians = [[statistics.median(each) for each in turns] for turns in times]
            plain = {
                variant.dtype: medians[index]
                for index, variant in enumerate(variants)
                if variant.kind in (DYNAMIC, MLX_PLAIN)
            }
            yield [
                ModelTime(
                    cache=variant.kind,
                    dtype=variant.dtype,
                    context=context,
                    steps=tokens,
                    milliseconds=1e3 * statistics.median(sum(times[index], [])),
                    times_dynamic=(
                        ratio(plain[variant.dtype], medians[index])
                        if variant.dtype in plain
                        else None
                    ),
                    **call(_look_at, index),
                )
                for index, (variant, call) in enumerate(zip(variants, calls, strict=True))
            ]


# What runs in a variant's process. Several may live in one process, for tests.
_decoders: dict[int, Decoder] = {}


def _open(index: int, variant: Variant, *arguments: Any) -> None:
    _decoders.pop(index, None)
    if variant.framework == "mlx":
        from tqai.measure.mlx_decoder import MlxDecoder as Kind
    else:
        from tqai.measure.torch_decoder import TorchDecoder as Kind
    _decoders[index] = Kind(variant, *arguments)


def _fill(index: int, context: int) -> None:
    _decoders[index].fill(context)


def _decode(index: int, steps: int) -> list[float]:
    return _decoders[index].decode(steps)


def _look_at(index: int) -> dict[str, Any]:
    return _decoders[index].look_at()
