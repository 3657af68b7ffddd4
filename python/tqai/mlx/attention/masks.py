"""What the masks that compressed caches made say, so that nobody need read them.

A mask of a cache's own making is causal, with or without a window; attention over packed tokens
does both by numbers. Such a mask is never evaluated then. What else a model makes is read.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import ref

import mlx.core as mx


class Meaning(NamedTuple):
    """What a mask says of the tokens that a query sees."""

    causal: bool
    window: int = 0
    """> 0: of the last tokens, its own among them, so many."""


_made: dict[int, tuple[ref[mx.array], Meaning]] = {}


def remember(mask: mx.array, meaning: Meaning) -> mx.array:
    """`mask`, known from now on as long as it lives."""
    key = id(mask)
    _made[key] = ref(mask, lambda _: _made.pop(key, None)), meaning
    return mask


def meaning_of(mask: mx.array | str | None) -> Meaning | None:
    """What mlx-lm's masks say; None of an array that has to be read."""
    if mask is None:
        return Meaning(causal=False)
    if isinstance(mask, str):
        return Meaning(causal=True)
    known = _made.get(id(mask))
    return known[1] if known is not None and known[0]() is mask else None
