"""How much memory requests' compressed caches will take, for transformers' scheduler to go by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqai.settings import Settings
from tqai.stores.device import TILE_TOKENS
from tqai.transformers.cache.layer import TqaiLayer

_BLOCK = 16
"""Coordinates are packed in multiples of this."""


class LayerBytes:
    """What a layer of one request takes."""

    def __init__(self, layer: Any, kv_heads: int, head_dim: int, itemsize: int) -> None:
        """`layer`: one of a cache that is empty; heads and dtype: as the paged cache has them."""
        self.exact = 2 * kv_heads * head_dim * itemsize
        self.packed = self.exact
        self._kept = self._first = 0
        self._window: int | None = None
        if isinstance(layer, TqaiLayer):
            settings: Settings = layer.settings
            padded = -(-head_dim // _BLOCK) * _BLOCK
            self.packed = kv_heads * (padded * (settings.bits_k + settings.bits_v) // 8 + 4)
            self._first = 0 if layer.is_sliding else settings.sink_tokens
            self._kept = settings.residual_window + TILE_TOKENS
            self._window = layer.sliding_window

    def of(self, tokens: int) -> int:
        """Bytes of so many tokens, at most: none of what waits for sealing counts as sealed."""
        if self._window is not None:
            tokens = min(tokens, self._window + TILE_TOKENS)
        exact = min(tokens, self._first + self._kept)
        return exact * self.exact + (tokens - exact) * self.packed


class Capacity:
    """A number of bytes, and which requests have how many of them."""

    def __init__(self, layers: Iterable[LayerBytes]) -> None:
        self._layers = list(layers)
        self.budget = 0
        self._held: dict[str, int] = {}
        self._refused: dict[str, int] = {}
        exact = sum(layer.exact for layer in self._layers)
        self.most = -(-exact // max(sum(layer.packed for layer in self._layers), 1))
        """How many times as many tokens fit as uncompressed ones, at most."""

    def bytes_of(self, tokens: int) -> int:
        """Of a request of so many tokens."""
        return sum(layer.of(tokens) for layer in self._layers)

    def fits(self, request: str, tokens: int) -> bool:
        """Whether a request may have so many tokens in all."""
        others = self.used - self._held.get(request, 0)
        return others + self.bytes_of(tokens) <= self.budget

    def hold(self, request: str, tokens: int) -> None:
        """A request has so many tokens from now on."""
        self._held[request] = self.bytes_of(tokens)
        self._refused.pop(request, None)

    def refuse(self, request: str, tokens: int) -> None:
        """A request that has some tokens cannot have so many; one that has none just waits."""
        self._refused.pop(request, None)  # the last one refused comes last
        if request in self._held:
            self._refused[request] = self.bytes_of(tokens)

    def count_storable(self) -> int:
        """How many of those that were refused could have what they asked for, in that order."""
        room = self.budget - self.used
        for count, (request, wanted) in enumerate(self._refused.items()):
            room -= wanted - self._held[request]
            if room < 0:
                return count
        return len(self._refused)

    def free(self, request: str) -> None:
        """Lets go of what a request has; one that is not there is let be."""
        self._held.pop(request, None)
        self._refused.pop(request, None)

    def free_all(self) -> None:
        """Lets go of all."""
        self._held.clear()
        self._refused.clear()

    @property
    def used(self) -> int:
        """Bytes of all requests."""
        return sum(self._held.values())

    @property
    def free_share(self) -> float:
        """Of the budget, what nobody has."""
        return max(1 - self.used / self.budget, 0.0) if self.budget > 0 else 0.0
