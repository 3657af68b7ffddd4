"""Rotary position embedding: e^(i p ω) of positions p, on a device."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from tqai.stores.device.operations import Array, Operations
from tqai.stores.device.packing import TILE_TOKENS
from tqai.stores.device.positions import Positions

RopeOptions = tuple[Any, ...]
"""inv_freq, "half_split" or "interleaved", rotary_dim, and the section of each frequency where
there are several."""

# Positions from 0 below this many are looked up; others are turned there by multiples of it.
_NEAR = 1 << 20


class Steps(NamedTuple):
    """Consecutive tiles' positions, for kernels: e^(i p ω) of the first token of tile t is that of
    place + t times that of the distance."""

    places: tuple[Array, Array]
    """cos and sin, [places, pairs] float32, of places 64 tokens apart."""
    distances: tuple[Array, Array]
    """cos and sin, [pairs, 64] float32, of 0…63 tokens."""
    place: int
    distance: int


class Phasors:
    """cos(p ω) and sin(p ω) of a rotary embedding's frequencies ω.

    Angles of far positions have no accurate float32: the products of those of a tile and of a
    distance within it, made in double precision, have.
    """

    def __init__(self, rope: RopeOptions, ops: Operations) -> None:
        self._frequencies = np.asarray(rope[0], dtype=np.float32).astype(np.float64)
        self._half_split = rope[1] == "half_split"
        self.rotary_dim: int = rope[2]
        sections = rope[3] if len(rope) > 3 and len(rope[3]) > 0 else (0,) * len(rope[0])
        self.sections = 1 + max(sections)
        self._ops = ops
        self._section_of = ops.asarray(np.array(sections, np.int64))
        self._distances = self._table(np.arange(TILE_TOKENS))
        self._by_pair: tuple[Array, Array] | None = None
        self._tiles = self._table(np.arange(64) * TILE_TOKENS)

    @property
    def pairs(self) -> int:
        return len(self._frequencies)

    def steps(self, positions: Positions) -> Steps | None:
        """Those of a multiple of 64 tokens, where they are consecutive and looked up."""
        first = positions.first
        if positions.each is not None or first < 0 or first + positions.count >= _NEAR:
            return None
        place, distance = divmod(first, TILE_TOKENS)
        self._grow(place + positions.count // TILE_TOKENS)
        if self._by_pair is None:
            self._by_pair = self._table(np.arange(TILE_TOKENS), by_pair=True)
        return Steps(self._tiles, self._by_pair, place, distance)

    def of(self, positions: Positions) -> tuple[Array, Array]:
        """Those of a multiple of 64 tokens, each [tokens, pairs] float32."""
        first, tiles = positions.first, positions.count // TILE_TOKENS
        if positions.each is None and 0 <= first and first + positions.count < _NEAR:
            return self._of_consecutive(first, tiles)
        table = positions.table(self.sections)
        cos, sin = self._of_each(table[:, 0])
        for section in range(1, table.shape[1]):
            its = self._section_of == section
            parts = self._of_each(table[:, section])
            cos, sin = (self._ops.where(its, *pair) for pair in zip(parts, (cos, sin), strict=True))
        return cos, sin

    def _of_consecutive(self, first: int, tiles: int) -> tuple[Array, Array]:
        start, rest = divmod(first, TILE_TOKENS)
        self._grow(start + tiles)
        cos, sin = (table[start : start + tiles] for table in self._tiles)
        if rest:
            cos, sin = turn(cos, sin, *(table[rest] for table in self._distances))
        cos, sin = turn(cos[:, None], sin[:, None], *self._distances)
        shape = tiles * TILE_TOKENS, self.pairs
        return cos.reshape(*shape), sin.reshape(*shape)

    def _of_each(self, positions: np.ndarray) -> tuple[Array, Array]:
        """Of [tokens] positions of any kind."""
        steps, near = np.divmod(positions.astype(np.int64), _NEAR)
        self._grow(int(near.max()) // TILE_TOKENS + 1)
        tile, distance = map(self._ops.asarray, np.divmod(near, TILE_TOKENS))
        cos, sin = turn(
            *(table[tile] for table in self._tiles), *(table[distance] for table in self._distances)
        )
        if steps.any():
            cos, sin = turn(cos, sin, *self._table(steps * _NEAR))
        return cos, sin

    def _grow(self, tiles: int) -> None:
        while len(self._tiles[0]) < tiles:
            self._tiles = self._table(np.arange(2 * len(self._tiles[0])) * TILE_TOKENS)

    def split(self, vectors: Array) -> tuple[Array, Array]:
        """Both coordinates of each pair, [..., pairs], of vectors [..., head_dim]."""
        turning = vectors[..., : self.rotary_dim]
        if self._half_split:
            return turning[..., : self.pairs], turning[..., self.pairs :]
        return turning[..., 0::2], turning[..., 1::2]

    def join(self, a: Array, b: Array, dim: int) -> Array:
        """The inverse: [..., dim], zeros where nothing turns."""
        if self._half_split:
            joined = self._ops.concat([a, b], -1)
        else:
            joined = self._ops.stack([a, b], -1).reshape(*a.shape[:-1], self.rotary_dim)
        return self._ops.pad(joined, 0, dim - self.rotary_dim)

    def _table(self, positions: np.ndarray, by_pair: bool = False) -> tuple[Array, Array]:
        """[positions, pairs], or [pairs, positions]."""
        angles = positions[:, None] * self._frequencies
        if by_pair:
            angles = np.ascontiguousarray(angles.T)
        cos, sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
        return self._ops.asarray(cos), self._ops.asarray(sin)


def turn(a: Array, b: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """Real and imaginary part of (a + i b) · (cos + i sin)."""
    return a * cos - b * sin, a * sin + b * cos


@lru_cache(maxsize=64)
def phasors_of(rope: RopeOptions, ops: Operations) -> Phasors:
    """Shared by all caches of the same embedding and device."""
    return Phasors(rope, ops)
