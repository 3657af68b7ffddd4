"""Decodes with a transformers model and one kind of cache, for ``time_model``."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import torch
from transformers import DynamicCache

from tqai import api
from tqai.measure.decoder import (
    COMPRESSED,
    DYNAMIC,
    FIRST_STEPS,
    WARM_UP_TOKENS,
    Variant,
    short_bits,
)
from tqai.measure.resident import peak_resident_bytes, reset_peak, resident_bytes
from tqai.measure.text import prose
from tqai.measure.timing import wait_for
from tqai.transformers.cache.layer import TqaiLayer
from tqai.transformers.loading import default_model, load
from tqai.transformers.model.names import cache_argument

# transformers' name of a back end, and the module that it needs.
_BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}


def quantized_backend() -> str | None:
    """The back end that transformers' QuantizedCache finds here."""
    for backend, module in _BACKENDS.items():
        try:
            if importlib.util.find_spec(module) is not None:
                return backend
        except ModuleNotFoundError:  # of the package that the module is in
            pass
    return None


class TorchDecoder:
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
        self.fill(min(WARM_UP_TOKENS, prefill))
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
        self.decode(FIRST_STEPS)

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
            bits = f"k{short_bits(settings['bits_k'])}v{short_bits(settings['bits_v'])}"
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


def _check_length(config: Any, longest: int) -> None:
    """Rotary embeddings have no last position; learned ones have."""
    limit = getattr(config, "max_position_embeddings", None)
    rotary = any(
        getattr(config.get_text_config(), name, None) is not None
        for name in ("rope_parameters", "rope_theta", "rope_scaling")
    )
    if limit is not None and longest > limit and not rotary:
        raise ValueError(f"contexts: {longest} tokens with the steps; the model takes {limit}")
