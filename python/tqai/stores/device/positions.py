"""Where tokens stand, as src/cache/positions.hpp has it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tqai.stores.device.packing import TILE_TOKENS

MAX_POSITION = (1 << 30) - 1


@dataclass(frozen=True)
class Positions:
    """Of tokens that follow one another: the first one's, where each next is one further in all
    sections of the rotary embedding, else every token's. Immutable."""

    first: int = 0
    count: int = 0
    each: np.ndarray | None = None
    """[count, sections] int32, or [count, 1] where all sections stand alike; None: consecutive."""

    @classmethod
    def of(cls, each: np.ndarray) -> Positions:
        """Those of [count, sections]."""
        count = len(each)
        if count == 0:
            return cls()
        first = int(each[0, 0])
        if (each == first + np.arange(count)[:, None]).all():
            return cls(first, count)
        return cls(first, count, np.ascontiguousarray(each, dtype=np.int32))

    @property
    def next(self) -> int:
        """One further than the last token in the section where that is furthest."""
        return self.first + self.count if self.each is None else int(self.each[-1].max()) + 1

    def part(self, start: int, end: int) -> Positions:
        """Those of tokens start…end − 1."""
        if self.each is None:
            return Positions(self.first + start, end - start)
        return Positions.of(self.each[start:end])

    def joined(self, more: Positions) -> Positions:
        """Those of these tokens and then `more`."""
        if self.count == 0 or more.count == 0:
            return more if self.count == 0 else self
        if self.each is None and more.each is None and self.first + self.count == more.first:
            return Positions(self.first, self.count + more.count)
        sections = max(1 if part.each is None else part.each.shape[1] for part in (self, more))
        parts = [part.table(sections) for part in (self, more)]
        return Positions.of(np.concatenate(parts))

    def table(self, sections: int) -> np.ndarray:
        """[count, sections] int32."""
        table = self.each
        if table is None:
            table = np.arange(self.first, self.first + self.count, dtype=np.int32)[:, None]
        return np.broadcast_to(table, (self.count, sections))

    def places(self) -> np.ndarray | None:
        """[sections, 64] of a tile's tokens, one where all stand alike; None: consecutive."""
        assert self.count == TILE_TOKENS
        if self.each is None:
            return None
        alike = (self.each == self.each[:, :1]).all()
        return (self.each[:, :1] if alike else self.each).T

    def same(self, other: Positions) -> bool:
        """Whether the other's tokens stand at the same places."""
        if (self.first, self.count) != (other.first, other.count):
            return False
        if self.each is None or other.each is None:
            return self.each is other.each
        sections = max(self.each.shape[1], other.each.shape[1])
        return np.array_equal(self.table(sections), other.table(sections))


def check_positions(positions: np.ndarray, batch: int, tokens: int, sections: int) -> None:
    """Raises ValueError for positions that are not [batch or 1, sections or 1, tokens] int64."""
    given = positions.shape
    fits = len(given) == 3 and given[2] == tokens
    if not fits or given[0] not in (1, batch) or given[1] not in (1, sections):
        raise ValueError(
            f"positions have shape {list(given)}; needed: [1 or {batch}, 1 or {sections}, {tokens}]"
            " = [batch, sections, tokens]"
        )
    if tokens > 0 and not (-MAX_POSITION <= positions.min() <= positions.max() <= MAX_POSITION):
        raise ValueError(
            f"a token's position = {positions.max()} or {positions.min()}; allowed: "
            f"{-MAX_POSITION}…{MAX_POSITION}"
        )
