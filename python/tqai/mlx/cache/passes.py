"""Forward passes over a prompt cache: what is undone of one that does not end.

Ctrl-C, NaN, or any error may come between two layers. Some of them hold tokens then that others do
not, and whatever is read next would be silently wrong. So each layer notes how it was before a
pass, and goes back to that.

Few tokens are sealed when the pass has ended, so that to go back is to forget them. With many, each
layer is sealed when it has been read, and what it was before is kept beside: tiles are shared, the
window is copied.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from tqai.mlx.cache.base import Compressed
from tqai.mlx.cache.weights import Weights
from tqai.mlx.model.probe import parts_of


class Pass:
    """A forward pass over the caches of all layers."""

    def __init__(self, model: nn.Module, cache: Any) -> None:
        """Begins one of `model` over a prompt cache, a sequence with one cache a layer.

        An earlier one that was neither ended nor undone is undone first.

        Raises:
            ValueError: for a cache that another model's weights have filled.
            RuntimeError: for layers of different lengths, or where an earlier pass could not be
                undone.
        """
        parts = [part for layer in cache for part in parts_of(layer)]
        self._layers = [part for part in parts if isinstance(part, Compressed)]
        for layer in self._layers:
            if isinstance(layer.passing, Pass):
                layer.passing.undo()
        for layer in self._layers:
            if layer.broken is not None:
                raise RuntimeError(layer.broken)
            layer.settle()
        lengths = {layer.lengths() for layer in self._layers}
        if len(lengths) > 1:
            raise RuntimeError(
                f"the layers of this cache hold different numbers of tokens, {_said(lengths)}: a "
                "forward pass over it was interrupted, or single layers were trimmed. Make another "
                "with make_prompt_cache(model)"
            )
        own = Weights(model)
        filled = [layer for layer in self._layers if any(layer.lengths())]
        for known in {id(layer.weights): layer.weights for layer in filled}.values():
            if known is not None and not known.is_of(model):
                raise ValueError(
                    f"this cache was filled by a model with other weights than this "
                    f"{type(model).__module__}.{type(model).__name__} has: make another with "
                    "make_prompt_cache(model)"
                )
        for layer in filled:
            layer.weights = own
        self._weights = own
        self._others = [
            (part, _Before(part))
            for part in parts
            if not isinstance(part, Compressed) and part is not None
        ]
        for layer in self._layers:
            layer.passing = self

    def compresses(self) -> bool:
        """Whether any layer is a compressed one."""
        return bool(self._layers)

    def end(self) -> None:
        """Makes what the pass has added lasting.

        Raises:
            ValueError: for NaN or infinity in a layer that nothing has read yet.
        """
        for layer in self._layers:
            layer.flush()
        for layer in self._layers:
            layer.weights = self._weights
            layer.end_pass()

    def undo(self) -> None:
        """Makes all layers as they were. May be called again where it was interrupted."""
        stuck = [type(part).__name__ for part, before in self._others if not before.restore()]
        if stuck:
            for layer in self._layers:
                layer.broken = (
                    f"a forward pass over this cache was interrupted, and its {stuck[0]}, which is "
                    "not tqai's, cannot go back: make another with make_prompt_cache(model)"
                )
        for layer in self._layers:
            layer.undo_pass()


class _Before:
    """How one of mlx-lm's own caches was."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._length = _length(cache)
        self._state: dict[str, Any] | None = None
        if isinstance(cache, ArraysCache):
            # Models put other arrays in the places of these; numbers are counted up in place.
            self._state = {
                name: list(value) if isinstance(value, list) else _copied(value)
                for name, value in vars(cache).items()
            }

    def restore(self) -> bool:
        """Makes it so again; whether that was possible."""
        if self._state is not None:
            vars(self._cache).update(self._state)
            return True
        more = _length(self._cache) - self._length
        return more == 0 or (self._cache.is_trimmable() and self._cache.trim(more) == more)


def _said(lengths: set[tuple[int, ...]]) -> str:
    """As in "29 and 30", or, of two rows, "[29, 5] and [30, 5]"."""
    return " and ".join(str(each[0] if len(each) == 1 else list(each)) for each in sorted(lengths))


def _copied(value: Any) -> Any:
    return mx.array(value) if isinstance(value, mx.array) else value


def _length(cache: Any) -> int:
    """Tokens that a cache has been given; columns, where rows have lengths of their own."""
    offset = getattr(cache, "offset", 0)
    return offset if isinstance(offset, int) else cache._idx
