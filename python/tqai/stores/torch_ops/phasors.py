"""Rotary position embedding: e^(i p ω) of consecutive positions p, on a device."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from tqai.stores.torch_ops.packing import TILE_TOKENS

RopeOptions = tuple[tuple[float, ...], str, int]


class Phasors:
    """cos(p ω) and sin(p ω) of a rotary embedding's frequencies ω.

    Angles of far positions have no accurate float32: the products of those of a tile and of a
    distance within it, made in double precision, have.
    """

    def __init__(self, rope: RopeOptions, device: torch.device) -> None:
        self._frequencies = np.asarray(rope[0], dtype=np.float32).astype(np.float64)
        self._half_split = rope[1] == "half_split"
        self.rotary_dim = rope[2]
        self._device = device
        self._distances = self._table(np.arange(TILE_TOKENS))
        self._tiles = self._table(np.arange(64) * TILE_TOKENS)

    @property
    def pairs(self) -> int:
        return len(self._frequencies)

    def of(self, first: int, tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of positions first…first + 64 · tiles − 1, each [64 · tiles, pairs] float32."""
        start, rest = divmod(first, TILE_TOKENS)
        while len(self._tiles[0]) < start + tiles:
            self._tiles = self._table(np.arange(2 * len(self._tiles[0])) * TILE_TOKENS)
        cos, sin = (table[start : start + tiles] for table in self._tiles)
        if rest:
            cos, sin = turn(cos, sin, *(table[rest] for table in self._distances))
        cos, sin = turn(cos[:, None], sin[:, None], *self._distances)
        return cos.flatten(0, 1), sin.flatten(0, 1)

    def split(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both coordinates of each pair, [..., pairs], of vectors [..., head_dim]."""
        turning = vectors[..., : self.rotary_dim]
        if self._half_split:
            return turning[..., : self.pairs], turning[..., self.pairs :]
        return turning[..., 0::2], turning[..., 1::2]

    def join(self, a: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
        """The inverse: [..., dim], zeros where nothing turns."""
        joined = torch.cat([a, b], -1) if self._half_split else torch.stack([a, b], -1).flatten(-2)
        return torch.nn.functional.pad(joined, (0, dim - self.rotary_dim))

    def _table(self, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[:, None] * self._frequencies
        cos, sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
        return torch.from_numpy(cos).to(self._device), torch.from_numpy(sin).to(self._device)


def turn(
    a: torch.Tensor, b: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and imaginary part of (a + i b) · (cos + i sin)."""
    return a * cos - b * sin, a * sin + b * cos


@lru_cache(maxsize=64)
def phasors_of(rope: RopeOptions, device: torch.device) -> Phasors:
    """Shared by all caches of the same embedding and device."""
    return Phasors(rope, device)
