"""Decoding of a whole model against the context's length, with several kinds of caches."""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from tqai import api
from tqai.measure.resident import peak_resident_bytes, reset_peak, resident_bytes
from tqai.measure.text import prose
from tqai.measure.timing import ratio, wait_for
from tqai.transformers.cache.layer import TqaiLayer
from tqai.transformers.loading import default_model, load
from tqai.transformers.model.names import cache_argument

DYNAMIC = "DynamicCache"
QUANTIZED = "QuantizedCache"
COMPRESSED = "tqai"
KINDS = (DYNAMIC, QUANTIZED, COMPRESSED)

# transformers' name of a back end, and the module that it needs.
_BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}
# More than sinks, window and a tile hold by default, so that nothing runs for the first time later.
_WARM_UP_TOKENS = 320
# Decoded before the steps that count, at each context.
_FIRST_STEPS = 2
_ROUND_STEPS = 4


@dataclass(frozen=True)
class Variant:
    """A kind of cache, of a model in one dtype."""

    kind: str
    """One of ``KINDS``."""
    dtype: str
    options: dict[str, Any] = field(default_factory=dict)
    """Of ``tqai.patch``, or the back end of a QuantizedCache."""


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
    context: int
    """Tokens in the cache before the steps."""
    repeated: int
    """Those of them whose keys and values are copies of those that the model has computed."""
    steps: int
    milliseconds: float
    """Of a token, median."""
    times_dynamic: float | None
    """How many times as fast as DynamicCache of the same dtype: the median of the rounds' ratios.
    """
    cache_bytes: int | None
    """Of keys and values by the cache's own account, after the steps; None: it gives none."""
    packed_tokens: int | None
    growth_bytes: int | None
    """Of the process, over the model's own; None where the system does not tell."""
    peak_bytes: int | None
    """As ``growth_bytes``, the most while tokens were decoded."""


def quantized_backend() -> str | None:
    """The back end that transformers' QuantizedCache finds here."""
    for backend, module in _BACKENDS.items():
        try:
            if importlib.util.find_spec(module) is not None:
                return backend
        except ModuleNotFoundError:  # of the package that the module is in
            pass
    return None


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
        model, device: as for ``tqai.transformers.loading.load``.
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
        longest = max(contexts, default=0) + tokens + _FIRST_STEPS
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
                if variant.kind == DYNAMIC
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
_decoders: dict[int, _Decoder] = {}


def _open(index: int, *arguments: Any) -> None:
    _decoders.pop(index, None)
    _decoders[index] = _Decoder(*arguments)


def _fill(index: int, context: int) -> None:
    _decoders[index].fill(context)


def _decode(index: int, steps: int) -> list[float]:
    return _decoders[index].decode(steps)


def _look_at(index: int) -> dict[str, Any]:
    return _decoders[index].look_at()


class _Decoder:
    """A model with one kind of cache, which is filled and decoded from."""

    def __init__(
        self,
        variant: Variant,
        model: str | None,
        prefill: int,
        longest: int,
        threads: int | None,
        device: str | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._variant = variant
        self._name = default_model().name if model is None else model
        self._model, tokenizer = load(model, variant.dtype, device)
        _check_length(self._model.config, longest)
        ids = tokenizer(prose(), verbose=False).input_ids
        if not prefill < len(ids):
            raise ValueError(f"prefill={prefill}: expected at most {len(ids) - 1}")
        where = self._model.device
        self._next = torch.tensor([ids[prefill:]], device=where)
        self._read = self._prefill(torch.tensor([ids[:prefill]], device=where))
        if variant.kind == COMPRESSED:
            api.patch(self._model, **variant.options)
        self.fill(min(_WARM_UP_TOKENS, prefill))
        # What goes must not count as the model's own.
        del tokenizer, ids
        self._cache = None
        self._base = resident_bytes()

    @torch.inference_mode()
    def _prefill(self, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
        """Keys and values of each layer; None of layers without."""
        # Without a configuration sliding layers, too, keep all tokens.
        cache = DynamicCache()
        self._model(ids, use_cache=True, logits_to_keep=1, **cache_argument(self._model, cache))
        return [
            (layer.keys, layer.values) if getattr(layer, "keys", None) is not None else None
            for layer in cache.layers
        ]

    def fill(self, context: int) -> None:
        """Makes a cache of `context` tokens, and decodes the first steps."""
        self._cache = None
        self._cache = self._fresh_cache()
        self._context = context
        self._at = 0
        with torch.inference_mode():
            for index, states in enumerate(self._read):
                if states is not None:
                    self._fill_layer(index, *states)
        resident_bytes()  # gives back what filling has freed
        self._sees_peak = reset_peak()
        self.decode(_FIRST_STEPS)

    def _fresh_cache(self) -> Any:
        config = self._model.config
        if self._variant.kind == COMPRESSED:
            return api.new_cache(self._model)
        if self._variant.kind == DYNAMIC:
            return DynamicCache(config=config)
        from transformers import QuantizedCache

        return QuantizedCache(config=config, **self._variant.options)

    def _fill_layer(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        read = min(keys.shape[2], self._context)
        more = self._context - read
        copies = -(-more // read)
        # First what has been read, and alone: it decides how keys are centred.
        for tokens, repeats in ((read, 1), (more, copies)):
            if tokens == 0:
                continue
            states = (each[:, :, :read].repeat(1, 1, repeats, 1) for each in (keys, values))
            was_empty = self._cache.get_seq_length(index) == 0
            self._cache.update(*(each[:, :, :tokens] for each in states), index)
            layer = self._cache.layers[index]
            if isinstance(layer, TqaiLayer):  # attention would have it done
                layer.settle(was_empty)

    @torch.inference_mode()
    def decode(self, steps: int) -> list[float]:
        """Seconds of each step."""
        times = []
        for _ in range(steps):
            at = self._at % self._next.shape[1]
            token = self._next[:, at : at + 1]
            self._at += 1
            given = cache_argument(self._model, self._cache)
            wait_for(token.device)
            start = time.perf_counter()
            self._model(token, use_cache=True, logits_to_keep=1, **given)
            wait_for(token.device)
            times.append(time.perf_counter() - start)
        return times

    def look_at(self) -> dict[str, Any]:
        """The part of a ``ModelTime`` that this process knows."""
        peak = peak_resident_bytes() if self._sees_peak else None
        now = resident_bytes()
        bits = level = packed = size = None
        kind, options = self._variant.kind, self._variant.options
        if kind == COMPRESSED:
            report = self._cache.memory_report()
            settings = report["settings"]
            bits = f"k{_short(settings['bits_k'])}v{_short(settings['bits_v'])}"
            level = self._cache.settings.arithmetic
            packed, size = report["packed_tokens"], report["total_bytes"]
        elif kind == DYNAMIC:
            layers = [layer for layer in self._cache.layers if layer.keys is not None]
            size = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        else:
            bits = f"{options['backend']} {options['nbits']}"

        def over_base(count: int | None) -> int | None:
            return None if count is None or self._base is None else count - self._base

        read = max((each[0].shape[2] for each in self._read if each is not None), default=0)
        return {
            "bits": bits,
            "level": level,
            "model": self._name,
            "threads": torch.get_num_threads(),
            "repeated": max(self._context - read, 0),
            "cache_bytes": size,
            "packed_tokens": packed,
            "growth_bytes": over_base(now),
            "peak_bytes": over_base(peak),
        }


def _short(bits: Any) -> str:
    return str(bits) if isinstance(bits, int) else "*"


def _check_length(config: Any, longest: int) -> None:
    """Rotary embeddings have no last position; learned ones have."""
    limit = getattr(config, "max_position_embeddings", None)
    rotary = any(
        getattr(config.get_text_config(), name, None) is not None
        for name in ("rope_parameters", "rope_theta", "rope_scaling")
    )
    if limit is not None and longest > limit and not rotary:
        raise ValueError(f"contexts: {longest} tokens with the steps; the model takes {limit}")
