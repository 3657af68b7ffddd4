"""Which rotary position embedding keys have gone through, from calls of mlx's own function.

All of mlx-lm's rotary modules call ``mx.fast.rope`` with numbers that say everything. What such a
call does is tried before it is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from tqai.shapes.rope import Rope

POSITIONS = (0, 1, 5, 29, 300)
TOLERANCE = 1e-3
"""Largest error of a turned coordinate; mlx computes angles in float32."""


@dataclass(frozen=True)
class Call:
    """A call of ``mx.fast.rope``, but for what was turned."""

    dims: int
    traditional: bool
    base: float | None
    scale: float
    offset: Any
    freqs: mx.array | None

    def turn(self, vectors: mx.array, offset: int) -> mx.array:
        return _rope(
            vectors,
            self.dims,
            traditional=self.traditional,
            base=self.base,
            scale=self.scale,
            offset=offset,
            freqs=self.freqs,
        )


_rope = mx.fast.rope


class Watch:
    """Notes which arrays have come out of ``mx.fast.rope``."""

    def __init__(self) -> None:
        # The arrays are kept, so that no other takes an address of theirs.
        self._made: dict[int, tuple[mx.array, Call]] = {}

    def call_of(self, array: mx.array) -> Call | None:
        """The call that has made an array; None where none has."""
        known = self._made.get(id(array))
        return None if known is None else known[1]

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Notes calls inside."""
        before = mx.fast.rope

        def rope(
            array: mx.array,
            dims: int,
            *,
            traditional: bool,
            base: float | None = None,
            scale: float,
            offset: Any,
            freqs: mx.array | None = None,
            stream: Any = None,
        ) -> mx.array:
            made = before(
                array,
                dims,
                traditional=traditional,
                base=base,
                scale=scale,
                offset=offset,
                freqs=freqs,
                stream=stream,
            )
            call = Call(dims, traditional, base, scale, offset, freqs)
            self._made[id(made)] = made, call
            return made

        function: Callable[..., Any] = rope
        mx.fast.rope = function
        try:
            yield
        finally:
            mx.fast.rope = before


def rope_of(calls: list[tuple[Call | None, int]], head_dim: int) -> Rope | None:
    """The embedding of a layer's keys, from the calls that have made them and the positions that
    these should have been for; None where one is not recognised, or they are not all the same.
    """
    found = {_rope_of(call, at, head_dim) for call, at in calls}
    rope = found.pop() if len(found) == 1 else None
    call = calls[0][0] if calls else None
    return rope if rope is not None and call is not None and _fits(rope, call, head_dim) else None


def _rope_of(call: Call | None, at: int, head_dim: int) -> Rope | None:
    if call is None or not 0 < call.dims <= head_dim or call.dims % 2:
        return None
    if np.any(np.array(call.offset) != at):
        return None
    if call.freqs is not None:
        frequencies = 1 / np.array(call.freqs, np.float64)
    elif call.base is not None:
        frequencies = float(call.base) ** -(np.arange(0, call.dims, 2) / call.dims)
    else:
        return None
    frequencies = frequencies * call.scale
    if not np.isfinite(frequencies).all():
        return None
    layout = "interleaved" if call.traditional else "half_split"
    return Rope(tuple(np.float32(frequencies).tolist()), layout)


def _fits(rope: Rope, call: Call, head_dim: int) -> bool:
    """Whether the call does what the embedding says."""
    vector = np.random.default_rng(0).standard_normal(head_dim)
    for position in POSITIONS:
        turned = call.turn(mx.array(vector, mx.float32).reshape(1, 1, 1, head_dim), position)
        if np.abs(np.array(turned).reshape(-1) - _turned(rope, vector, position)).max() > TOLERANCE:
            return False
    return True


def _turned(rope: Rope, vector: np.ndarray, position: int) -> np.ndarray:
    angles = np.array(rope.inv_freq) * position
    pairs = np.arange(len(angles))
    split = rope.layout == "half_split"
    one, other = (pairs, pairs + len(angles)) if split else (2 * pairs, 2 * pairs + 1)
    turned = vector.copy()
    turned[one] = vector[one] * np.cos(angles) - vector[other] * np.sin(angles)
    turned[other] = vector[other] * np.cos(angles) + vector[one] * np.sin(angles)
    return turned
