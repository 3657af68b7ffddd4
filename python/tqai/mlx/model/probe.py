"""Runs a model on four tokens, and notes what it does with each layer's cache.

Nothing here trusts names. A layer is read packed where what its cache hands out reaches mlx-lm's
attention function, every time that it is tried: on two tokens at once, on one more, and on one that
stands far away. mlx is lazy: what is run is the Python of the model, and next to nothing is
computed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache

from tqai.mlx.attention import patching, soft_cap
from tqai.mlx.model.find_rope import Call, Watch, rope_of
from tqai.shapes.rope import Rope
from tqai.signals import is_of_a_handler

FAR = 1_000_000
"""A position at which frequencies that depend on the length of the text would be others."""


@dataclass
class Use:
    """What a model has done with a layer's cache."""

    keys: tuple[int, ...] | None = None
    """Shape of the keys that it brought last; None: none."""
    values: tuple[int, ...] | None = None
    reads: int = 0
    """How often attention has read an update, 0 where it was not read that way every time."""
    touched: str | None = None
    """An attribute that a compressed cache does not have, and the model has taken."""
    rope: Rope | None = None
    """What the keys have gone through, where it was recognised."""
    turns_values: bool = False
    """Whether the values have gone through rotary embedding: they are keys then, beside latents in
    the keys' place."""


class _Watched:
    """A plain cache that notes what is done with it."""

    takes_soft_cap = True

    def __init__(self, cache: Any, ropes: Watch) -> None:
        self._cache = cache
        self._ropes = ropes
        self._calls: list[tuple[Call | None, int]] = []
        self.shift = 0
        """How much further than they do, the model is told that its tokens stand."""
        self.use = Use()
        self.handed: list[tuple[mx.array, mx.array]] = []
        """What updates have returned; kept, so that no other array takes an address of theirs."""
        self.counts: list[int] = []
        """How often attention has read each."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.use.keys, self.use.values = tuple(keys.shape), tuple(values.shape)
        self._calls.append((self._ropes.call_of(keys), self.offset))
        self.use.turns_values = self._ropes.call_of(values) is not None
        handed = self._cache.update_and_fetch(keys, values)
        self.handed.append(handed)
        self.counts.append(0)
        return handed

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        return self.handed[-1]

    @property
    def offset(self) -> int:
        return self._cache.offset + self.shift

    @property
    def keys(self) -> Any:
        self.use.touched = "keys"
        return self._cache.keys

    @property
    def values(self) -> Any:
        self.use.touched = "values"
        return self._cache.values

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def read(self, keys: Any, values: Any) -> None:
        """Called when attention reads these."""
        for at, handed in enumerate(self.handed):
            if keys is handed[0] and values is handed[1]:
                self.counts[at] += 1

    def seen(self) -> Use:
        """What was seen."""
        self.use.reads = max(self.counts, default=0) if min(self.counts, default=0) > 0 else 0
        if self.use.keys is not None:
            self.use.rope = rope_of(self._calls, self.use.keys[3])
        return self.use


def parts_of(cache: Any) -> list[Any]:
    """The caches that a layer's is a list of, or the one that it is."""
    return list(cache.caches) if type(cache) is CacheList else [cache]


def together(template: Any, parts: list[Any]) -> Any:
    """What ``parts_of`` has taken apart, of other parts."""
    return CacheList(*parts) if type(template) is CacheList else parts[0]


def is_replaced(template: Any) -> bool:
    """Whether a cache is one of the kinds that are compressed."""
    return type(template) in (KVCache, RotatingKVCache)


def uses_of(model: nn.Module, templates: list[Any]) -> list[list[Use | None]]:
    """What `model` does with the parts of each layer's cache; None for those that stay as they are.

    templates: an empty cache of the model's own for each layer.

    Raises:
        NotImplementedError: where the model cannot be run on tokens and a cache alone.
    """
    ropes = Watch()
    parts = [
        [
            _Watched(part, ropes) if is_replaced(part) else part
            for part in parts_of(copy.deepcopy(template))
        ]
        for template in templates
    ]
    watched = [part for own in parts for part in own if isinstance(part, _Watched)]
    caches = [together(template, own) for template, own in zip(templates, parts, strict=True)]
    before = base.scaled_dot_product_attention

    def attention(
        queries: Any, keys: Any, values: Any, cache: Any, *args: Any, **kwargs: Any
    ) -> Any:
        for each in watched:
            each.read(keys, values)
        return before(queries, keys, values, cache, *args, **kwargs)

    with patching.standing_in(attention, before), soft_cap.standing_in(), ropes.looking():
        try:
            model(mx.array([[1, 0]]), cache=caches)
            model(mx.array([[1]]), cache=caches)
            for each in watched:
                each.shift = FAR
            model(mx.array([[1]]), cache=caches)
        except Exception as error:
            if is_of_a_handler(error):
                raise
            if not any(each.use.touched for each in watched):
                raise NotImplementedError(
                    f"{type(model).__module__}.{type(model).__name__} could not be tried on tokens "
                    f"and a cache alone, so tqai cannot tell how it reads its cache: {error!r}"
                ) from error
    return [[part.seen() if isinstance(part, _Watched) else None for part in own] for own in parts]
