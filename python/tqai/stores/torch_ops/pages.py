"""Sealed tokens: tiles of 64 in pages of up to 64 tiles, which copies of a cache share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from tqai.stores.torch_ops.packing import TILE_TOKENS

PAGE_TILES = 64


@lru_cache(maxsize=256)
def index_of(rows: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """`rows` on the device; kept, as copying them there makes the device wait."""
    return torch.tensor(rows, device=device)


@dataclass(frozen=True)
class Page:
    """Consecutive tiles of some rows with the same history. Immutable, tensors included."""

    tiles: torch.Tensor
    """[held rows, kv_heads, tiles, tile_bytes] uint8."""
    first: int
    """The token that the first tile begins with."""
    tokens: int
    """Tokens that count; fewer than 64 of the last tile after a crop."""
    rows: tuple[int, ...]
    """[rows]: the held row that each row is; beams that were the same share it."""

    @property
    def count(self) -> int:
        return self.tiles.shape[2]

    @property
    def end(self) -> int:
        return self.first + self.tokens

    def read(self, start: int, count: int) -> torch.Tensor:
        """Tiles start…start + count − 1, [rows, kv_heads, count, tile_bytes]."""
        tiles = self.tiles[:, :, start : start + count]
        if self.rows == tuple(range(len(tiles))):
            return tiles
        return tiles[index_of(self.rows, tiles.device)]

    def select(self, rows: list[int]) -> Page:
        """Row i becomes row rows[i]; held rows that none is any more are freed."""
        chosen = [self.rows[row] for row in rows]
        held = list(dict.fromkeys(chosen))
        tiles = self.tiles
        if held != list(range(len(tiles))):
            tiles = tiles[torch.tensor(held, device=tiles.device)]
        return replace(self, tiles=tiles, rows=tuple(held.index(row) for row in chosen))

    def crop(self, tokens: int) -> Page:
        """The first `tokens` > 0 tokens."""
        count = -(-tokens // TILE_TOKENS)
        tiles = self.tiles if count == self.count else self.tiles[:, :, :count].clone()
        return replace(self, tiles=tiles, tokens=tokens)

    def drop(self, tiles: int) -> Page:
        """Without the first `tiles` tiles, fewer than there are."""
        tokens = tiles * TILE_TOKENS
        rest = self.tiles[:, :, tiles:].clone()
        return replace(self, tiles=rest, first=self.first + tokens, tokens=self.tokens - tokens)


def extend(pages: tuple[Page, ...], tiles: torch.Tensor, first: int) -> tuple[Page, ...]:
    """`pages` and the new tiles [rows, kv_heads, tiles, tile_bytes] of tokens from `first` on.

    A page that is not full is replaced by one that has the new tiles as well, or attention would go
    through as many pages as tiles.
    """
    if pages and pages[-1].tokens == pages[-1].count * TILE_TOKENS and tiles.shape[2]:
        last, room = pages[-1], PAGE_TILES - pages[-1].count
        if room > 0:
            more = tiles[:, :, :room]
            joined = torch.cat([last.read(0, last.count), more], dim=2)
            tokens = last.tokens + more.shape[2] * TILE_TOKENS
            whole = Page(joined, last.first, tokens, tuple(range(len(joined))))
            pages, tiles = (*pages[:-1], whole), tiles[:, :, room:]
            first += more.shape[2] * TILE_TOKENS
    for start in range(0, tiles.shape[2], PAGE_TILES):
        part = tiles[:, :, start : start + PAGE_TILES].clone(memory_format=torch.contiguous_format)
        at = first + start * TILE_TOKENS
        rows = tuple(range(len(part)))
        pages = (*pages, Page(part, at, part.shape[2] * TILE_TOKENS, rows))
    return pages
