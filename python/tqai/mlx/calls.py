"""What a patched model does around each call: it begins and ends a forward pass over its cache."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from tqai.mlx.cache.passes import Pass
from tqai.mlx.model.probe import parts_of
from tqai.remarks import remark_on

_PLAIN = "_tqai_plain_class"


def watch(model: nn.Module) -> None:
    """Has `model` tell its caches of its calls: it gets a class of its own, derived from the one
    that it had. May be called again."""
    if not is_watched(model):
        object.__setattr__(model, "__class__", _derived(type(model)))


def unwatch(model: nn.Module) -> None:
    """Gives `model` its class back."""
    if is_watched(model):
        object.__setattr__(model, "__class__", vars(type(model))[_PLAIN])


def is_watched(model: nn.Module) -> bool:
    """Whether `model` tells its caches of its calls."""
    return _PLAIN in vars(type(model))


@functools.cache
def _derived(plain: type) -> type:
    original: Callable[..., Any] = plain.__call__  # type: ignore[operator]
    names = list(inspect.signature(original).parameters)
    place = names.index("cache") - 1 if "cache" in names else None

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache")
        if cache is None and place is not None and place < len(args):
            cache = args[place]
        if cache is None:
            return original(self, *args, **kwargs)
        current = Pass(self, cache)
        if not current.compresses():
            _remark(self, cache)
        try:
            output = original(self, *args, **kwargs)
            current.end()
        except BaseException:
            current.undo()
            raise
        return output

    # Known by the same names, in reports and in pickles, though these do not find it.
    return type(
        plain.__name__,
        (plain,),
        {
            _PLAIN: plain,
            "__call__": call,
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
        },
    )


def _remark(model: nn.Module, cache: Any) -> None:
    """Says that nothing in `cache` is compressed, where something would be in the model's own."""
    maker = vars(model).get("make_cache")
    if not cache or maker is None or not maker.compresses():
        return
    parts = [part for layer in cache for part in parts_of(layer)]
    first = next((part for part in parts if not isinstance(part, ArraysCache)), parts[0])
    remark_on(
        first,
        f"{type(model).__module__}.{type(model).__name__} was given a {type(first).__name__}",
        "Leave prompt_cache out, or pass tqai.new_cache(model).",
    )
