"""What a patched model says where less is compressed than its user may expect."""

from __future__ import annotations

import sys
import warnings
from typing import Any
from weakref import WeakSet

_known: WeakSet[Any] = WeakSet()
"""Caches that have been remarked on."""
_OTHERS = ("tqai", "transformers", "torch", "peft", "accelerate", "mlx_lm", "mlx")


def remark_on(cache: Any, what: str, advice: str, said: set[str] | None = None) -> None:
    """Warns, once a cache, that nothing in `cache` is compressed.

    what: how it came into use. advice: how to have a compressed one. said: kinds of caches that
    were remarked on, where each is to be once; this one is added.
    """
    try:
        if cache in _known:
            return
        _known.add(cache)
    except TypeError:  # a tuple, as old versions take: Python warns once a line
        pass
    if said is not None:
        kind = type(cache).__name__
        if kind in said:
            return
        said.add(kind)
    warnings.warn(
        f"{what}, which is used as it is: nothing in it is compressed. {advice}",
        stacklevel=level_of_the_caller(),
    )


def remark_on_long_vector(layer: int, sink_tokens: int) -> None:
    """Warns that `layer` stays exact from a vector on whose norm FP16 does not hold."""
    warnings.warn(
        f"layer {layer} has a key or value longer than FP16 norms of codes can hold, beyond its "
        f"{sink_tokens} sink tokens: from there on all tokens stay exact and take their full "
        f"memory. Give it more sink_tokens, or leave it exact with skip_layers=[{layer}]",
        stacklevel=level_of_the_caller(),
    )


def level_of_the_caller() -> int:
    """The stack level, for ``warnings.warn``, of the first code that is nobody's library."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _OTHERS:
            return level
        frame, level = frame.f_back, level + 1
    return level
