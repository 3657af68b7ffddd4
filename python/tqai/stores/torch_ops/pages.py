"""Sealed tokens: tiles of 64 in pages of up to 64 tiles, which copies of a cache share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from tqai.stores.torch_ops.packing import TILE_TOKENS
from tqai.stores.torch_ops.positions import Positions

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
        positions = self.positions.part(0, count * TILE_TOKENS)
        return replace(self, tiles=tiles, tokens=tokens, positions=positions)

    def drop(self, tiles: int) -> Page:
        """Without the first `tiles` tiles, fewer than there are."""
        tokens = tiles * TILE_TOKENS
        rest = self.tiles[:, :, tiles:].clone()
        return replace(
            self,
            tiles=rest,
            first=self.first + tokens,
            tokens=self.tokens - tokens,
            positions=self.positions.part(tokens, self.count * TILE_TOKENS),
        )


def extend(
    pages: tuple[Page, ...], tiles: torch.Tensor, first: int, positions: Positions, centre_set: int
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
        joined = torch.cat([last.read(0, last.count), more], dim=2)
        new = positions.part(0, start * TILE_TOKENS)
        whole = Page(
            joined,
            last.first,
            last.tokens + start * TILE_TOKENS,
            tuple(range(len(joined))),
            last.positions.joined(new),
            centre_set,
        )
        pages = (*pages[:-1], whole)
    for at in range(start, tiles.shape[2], PAGE_TILES):
        part = tiles[:, :, at : at + PAGE_TILES].clone(memory_format=torch.contiguous_format)
        tokens = part.shape[2] * TILE_TOKENS
        token = at * TILE_TOKENS
        rows = tuple(range(len(part)))
        new = positions.part(token, token + tokens)
        pages = (*pages, Page(part, first + token, tokens, rows, new, centre_set))
    return pages
