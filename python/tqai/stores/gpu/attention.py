"""Attention over a page of packed tiles in two launches of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tqai.stores.device.attend import FEW_QUERIES, State
from tqai.stores.device.codec import Codec
from tqai.stores.device.operations import Array
from tqai.stores.device.packing import TILE_TOKENS
from tqai.stores.device.phasors import Steps
from tqai.stores.gpu.kernels import (
    SIMD,
    SIMDS,
    Kernel,
    attend_kernel,
    centre_kernel,
    centre_rows_at_once,
    merge_kernel,
    rows_at_once,
)

# Tiles that a simdgroup goes through at most. Fewer make more simdgroups, and more sums of theirs
# to write and to merge; so no fewer than make enough to keep a GPU busy.
_MOST_SPLIT_TILES = 4

Numbers = tuple[int, ...] | tuple[float, ...]
Grid = tuple[int, int, int]


class Run(Protocol):
    """Launches a kernel in a framework."""

    def __call__(
        self,
        kernel: Kernel,
        inputs: Sequence[Any],
        shapes: Sequence[tuple[int, ...]],
        grid: Grid,
        group: Grid,
    ) -> Sequence[Any]:
        """float32 arrays of these shapes, the kernel's outputs.

        inputs: arrays and numbers of the kernel's element types, in its order. grid: threads;
        group: how many of them make a threadgroup.
        """
        ...


@dataclass(frozen=True)
class GpuAttention:
    """See ``tqai.stores.device.attend.TileKernel``."""

    run: Run
    enough_simdgroups: int = 256
    """Simdgroups that keep the GPU busy; what is best for Apple's is not known."""

    def takes(self, queries: int) -> bool:
        return 0 < queries <= FEW_QUERIES

    def __call__(
        self,
        codec: Codec,
        state: State | None,
        rotated: Array,
        tiles: Array,
        held: Array,
        tokens: int,
        centre: Array,
        bias: Array | None,
        soft_cap: float,
    ) -> State:
        rows, heads, group, n, dim = rotated.shape
        key, value = codec.key, codec.value
        queries, count = group * n, tiles.shape[2]
        at_once = rows_at_once(queries, dim, value.dim)
        chunks = -(-queries // at_once)
        simdgroups = rows * heads * chunks * count  # of a tile each
        split_tiles = max(1, min(_MOST_SPLIT_TILES, simdgroups // self.enough_simdgroups))
        splits = -(-count // split_tiles)
        sizes = (
            *(heads, count, tokens, queries, n, split_tiles, splits, centre.shape[-1]),
            *_strides(bias),
        )
        parts = rows, heads, queries, splits
        each = self.run(
            attend_kernel(key.bits, value.bits, dim, value.dim, at_once),
            (
                rotated,
                tiles,
                held,
                centre,
                centre if bias is None else bias,
                key.centroids,
                value.centroids,
                sizes,
                (float(soft_cap),),
            ),
            (parts, parts, (*parts, value.dim)),
            (-(-splits // SIMDS) * SIMDS * SIMD, rows * heads, chunks),
            (SIMDS * SIMD, 1, 1),
        )
        shape = rows, heads, group, n
        merged = self.run(
            merge_kernel(value.dim),
            (*each, *(each if state is None else state), (splits, int(state is not None))),
            (shape, shape, (*shape, value.dim)),
            (value.dim, rows * heads * queries, 1),
            (min(value.dim, 256), 1, 1),
        )
        return State(*merged)

    def centre_scores(self, fixed: Array, factors: Array, steps: Steps, tiles: int) -> Array:
        rows, heads, queries, numbers = factors.shape
        asked, pairs = rows * heads * queries, numbers // 2
        at_once = centre_rows_at_once(asked, pairs)
        (scores,) = self.run(
            centre_kernel(pairs, at_once),
            (
                *(factors, fixed, *steps.places, *steps.distances),
                (asked, tiles, steps.place, steps.distance),
            ),
            ((rows, heads, queries, tiles * TILE_TOKENS),),
            (tiles * TILE_TOKENS, -(-asked // at_once), 1),
            (TILE_TOKENS, 1, 1),
        )
        return scores


def _strides(bias: Array | None) -> tuple[int, ...]:
    """From one to the next in each axis of [rows, kv_heads, group, n, tokens], 0 where it is one
    for all."""
    if bias is None:
        return (0,) * 5
    shape = (*(1,) * (5 - bias.ndim), *bias.shape)
    strides, step = [], 1
    for size in reversed(shape[:-1]):
        strides.append(0 if size == 1 else step * shape[-1])
        step *= size
    return (*reversed(strides), 1)
