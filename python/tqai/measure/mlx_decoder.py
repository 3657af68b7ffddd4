"""Decodes with a model of mlx-lm's and one kind of cache, for ``time_model``."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache

from tqai import _core, api
from tqai.measure.decoder import (
    COMPRESSED,
    FIRST_STEPS,
    MLX_QUANTIZED,
    WARM_UP_TOKENS,
    Variant,
    short_bits,
)
from tqai.measure.resident import peak_resident_bytes, reset_peak, resident_bytes
from tqai.measure.text import prose
from tqai.mlx.cache.base import Compressed
from tqai.mlx.loading import load
from tqai.mlx.model.probe import is_replaced, parts_of

States = tuple[mx.array, mx.array]


class MlxDecoder:
    """See ``tqai.measure.decoder.Decoder``."""

    def __init__(
        self,
        variant: Variant,
        model: str | None,
        prefill: int,
        longest: int,
        threads: int | None,
        device: str | None = None,
    ) -> None:
        """`threads`: set before this process began, by OMP_NUM_THREADS; mlx has none to set."""
        if device is not None:
            raise ValueError(f"--device {device} goes with --framework transformers")
        self._variant = variant
        self._name = str(model)
        self._model, tokenizer = load(model, variant.dtype)
        ids = tokenizer.encode(prose())
        if not prefill < len(ids):
            raise ValueError(f"prefill={prefill}: expected at most {len(ids) - 1}")
        self._next = ids[prefill:]
        self._read = self._prefill(ids[:prefill])
        if variant.kind == COMPRESSED:
            api.patch(self._model, **variant.options)
        self.fill(min(WARM_UP_TOKENS, prefill))
        # What goes must not count as the model's own.
        del tokenizer, ids
        self._cache: list[Any] = []
        mx.clear_cache()
        self._base = resident_bytes()

    def _prefill(self, ids: list[int]) -> list[list[States | None]]:
        """Keys and values of each layer's caches; None of those that hold something else."""
        cache = make_prompt_cache(self._model)
        # At once: a sliding window's cache keeps all that comes first.
        mx.eval(self._model(mx.array([ids]), cache=cache)[:, -1:])
        read: list[list[States | None]] = []
        for layer in cache:
            own: list[States | None] = []
            for part in parts_of(layer):
                states = None
                if is_replaced(part) and part.keys is not None:
                    states = tuple(each[:, :, : len(ids)] + 0 for each in (part.keys, part.values))
                    mx.eval(states)
                own.append(states)
            read.append(own)
        return read

    def fill(self, context: int) -> None:
        """See ``Decoder``."""
        self._cache = []
        mx.clear_cache()
        self._cache = make_prompt_cache(self._model)
        self._context = context
        self._at = 0
        for layer, read in zip(self._cache, self._read, strict=True):
            for part, states in zip(parts_of(layer), read, strict=True):
                if states is not None:
                    self._fill_part(part, states)
        if self._variant.kind == MLX_QUANTIZED:
            self._quantize()
        mx.clear_cache()
        resident_bytes()  # gives back what filling has freed
        self._sees_peak = reset_peak()
        self.decode(FIRST_STEPS)

    def _fill_part(self, part: Any, states: States) -> None:
        read = min(states[0].shape[2], self._context)
        more = self._context - read
        copies = -(-more // read)
        # First what has been read, and alone: it decides how keys are centred.
        for tokens, repeats in ((read, 1), (more, copies)):
            if tokens == 0:
                continue
            part.update_and_fetch(
                *(mx.tile(each[:, :, :read], (1, 1, repeats, 1))[:, :, :tokens] for each in states)
            )
            if isinstance(part, Compressed):
                part.settle()
            else:
                mx.eval(part.state)

    def _quantize(self) -> None:
        try:
            group = quantised_together(self._cache)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{error}: leave its quantised cache out with --caches dynamic tqai"
            ) from None
        for index, layer in enumerate(self._cache):
            self._cache[index] = layer.to_quantized(group, self._variant.options["nbits"])
            mx.eval(self._cache[index].state)

    def decode(self, steps: int) -> list[float]:
        """See ``Decoder``."""
        times = []
        for _ in range(steps):
            token = mx.array([[self._next[self._at % len(self._next)]]])
            self._at += 1
            start = time.perf_counter()
            mx.eval(self._model(token, cache=self._cache))
            times.append(time.perf_counter() - start)
        return times

    def look_at(self) -> dict[str, Any]:
        """See ``Decoder``."""
        peak = peak_resident_bytes() if self._sees_peak else None
        mx.clear_cache()
        now = resident_bytes()
        bits = level = packed = None
        if self._variant.kind == COMPRESSED:
            report = self._cache.memory_report()  # type: ignore[attr-defined]
            settings = report["settings"]
            bits = f"k{short_bits(settings['bits_k'])}v{short_bits(settings['bits_v'])}"
            level = self._cache.settings.arithmetic  # type: ignore[attr-defined]
            packed, size = report["packed_tokens"], report["total_bytes"]
        else:
            size = sum(layer.nbytes for layer in self._cache)
            if self._variant.kind == MLX_QUANTIZED:
                bits = str(self._variant.options["nbits"])

        def over_base(count: int | None) -> int | None:
            return None if count is None or self._base is None else count - self._base

        found = (states for own in self._read for states in own if states is not None)
        read = max((states[0].shape[2] for states in found), default=0)
        return {
            "bits": bits,
            "level": level,
            "model": self._name,
            "threads": _core.openmp_threads() or 1,
            "repeated": max(self._context - read, 0),
            "cache_bytes": size,
            "packed_tokens": packed,
            "growth_bytes": over_base(now),
            "peak_bytes": over_base(peak),
        }


def quantised_together(cache: list[Any]) -> int:
    """How many coordinates mlx-lm's QuantizedKVCache quantises together, in the place of each layer
    of a cache that holds tokens.

    Raises:
        NotImplementedError: for layers whose caches mlx-lm cannot quantise.
    """
    sizes = (64, 32)
    dims: set[int] = set()
    for index, layer in enumerate(cache):
        if type(layer) is not KVCache:
            raise NotImplementedError(
                f"layer {index} has a {type(layer).__name__}, which mlx-lm does not quantise"
            )
        dims |= {layer.keys.shape[3], layer.values.shape[3]}
    for size in sizes:
        if not any(dim % size for dim in dims):
            return size
    raise NotImplementedError(
        f"the model has heads of {sorted(dims)}, and mlx-lm quantises 64 or 32 coordinates together"
    )
