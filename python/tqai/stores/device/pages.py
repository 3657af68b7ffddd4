"""Sealed tokens: tiles of 64 in pages of up to 64 tiles, which copies of a cache share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from tqai.stores.device.operations import Array, Operations
from tqai.stores.device.packing import TILE_TOKENS
from tqai.stores.device.positions import Positions

PAGE_TILES = 64


@lru_cache(maxsize=256)
def index_of(rows: tuple[int, ...], ops: Operations) -> Array:
    """`rows` on the device; kept, as copying them there makes the device wait."""
    return ops.asarray(np.array(rows, np.int64))


@dataclass(frozen=True)
class Page:
    """Consecutive tiles of some rows with the same history. Immutable, arrays included."""

    ops: Operations
    tiles: Array
    """[held rows, kv_heads, tiles, tile_bytes] uint8."""
    first: int
    """The token that the first tile begins with."""
    tokens: int
    """Tokens that count; fewer than 64 of the last tile after a crop."""
    rows: tuple[int, ...]
    """[rows]: the held row that each row is; beams that were the same share it."""
    positions: Positions
    """Of all tokens of the tiles, also those that do not count."""
    set: int
    """Which of the rows' centre sets the keys are centred on."""

    @property
    def count(self) -> int:
        return self.tiles.shape[2]

    @property
    def end(self) -> int:
        return self.first + self.tokens

    def read(self, start: int, count: int) -> Array:
        """Tiles start…start + count − 1, [rows, kv_heads, count, tile_bytes]."""
        tiles = self.tiles[:, :, start : start + count]
        if self.rows == tuple(range(len(tiles))):
            return tiles
        return tiles[index_of(self.rows, self.ops)]

    def select(self, rows: list[int]) -> Page:
        """Row i becomes row rows[i]; held rows that none is any more are freed."""
        chosen = [self.rows[row] for row in rows]
        held = list(dict.fromkeys(chosen))
        tiles = self.tiles
        if held != list(range(len(tiles))):
            tiles = tiles[index_of(tuple(held), self.ops)]
        return replace(self, tiles=tiles, rows=tuple(held.index(row) for row in chosen))

    def crop(self, tokens: int) -> Page:
        """The first `tokens` > 0 tokens."""
        count = -(-tokens // TILE_TOKENS)
        tiles = self.tiles if count == self.count else self.ops.copy(self.tiles[:, :, :count])
        positions = self.positions.part(0, count * TILE_TOKENS)
        return replace(self, tiles=tiles, tokens=tokens, positions=positions)

    def drop(self, tiles: int) -> Page:
        """Without the first `tiles` tiles, fewer than there are."""
        tokens = tiles * TILE_TOKENS
        rest = self.ops.copy(self.tiles[:, :, tiles:])
        return replace(
            self,
            tiles=rest,
            first=self.first + tokens,
            tokens=self.tokens - tokens,
            positions=self.positions.part(tokens, self.count * TILE_TOKENS),
        )


def extend(
    ops: Operations,
    pages: tuple[Page, ...],
    tiles: Array,
    first: int,
    positions: Positions,
    centre_set: int,
) -> tuple[Page, ...]:
    """`pages` and the new tiles [rows, kv_heads, tiles, tile_bytes] of tokens from `first` on.

    A page that is not full is replaced by one that has the new tiles as well, or attention would go
    through as many pages as tiles.
    """
    start = 0
    last = pages[-1] if pages else None
    if (
        last is not None
        and last.set == centre_set
        and last.tokens == last.count * TILE_TOKENS
        and last.count < PAGE_TILES
        and tiles.shape[2]
    ):
        more = tiles[:, :, : PAGE_TILES - last.count]
        start = more.shape[2]
        joined = ops.concat([last.read(0, last.count), more], 2)
        new = positions.part(0, start * TILE_TOKENS)
        whole = Page(
            ops,
            joined,
            last.first,
            last.tokens + start * TILE_TOKENS,
            tuple(range(len(joined))),
            last.positions.joined(new),
            centre_set,
        )
        pages = (*pages[:-1], whole)
    for at in range(start, tiles.shape[2], PAGE_TILES):
        part = ops.copy(tiles[:, :, at : at + PAGE_TILES])
        tokens = part.shape[2] * TILE_TOKENS
        token = at * TILE_TOKENS
        rows = tuple(range(len(part)))
        new = positions.part(token, token + tokens)
        pages = (*pages, Page(ops, part, first + token, tokens, rows, new, centre_set))
    return pages
