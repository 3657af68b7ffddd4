"""A store's bytes taken apart and put together: what travels is tiles, not whole caches.

The bytes are those of ``KvCache.serialize`` (docs/format.md); what is put together here is read by
``KvCache.deserialize``, which looks at every length and number.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

TILE_TOKENS = 64
MOST_SETS = 32
"""Centre sets that a row may have."""
_NOTHING = 0xFFFFFFFF
_TILES_LAST, _WITH_GAPS, _WITH_BASIS, _WITH_TRELLIS, _WITH_KEY_TRELLIS = 3, 4, 5, 6, 7
_LINE = 64
_ITEM_BYTES = (4, 2, 2)


class Exact(NamedTuple):
    """Tokens as they are: keys [kv_heads, tokens, head_dim], then values, of the store's dtype."""

    tokens: int
    data: memoryview


class Block(NamedTuple):
    """64 sealed tokens of all heads."""

    first: int
    """Token, counted as the row's."""
    position: int
    plain: bool
    """Whether its tokens stand at positions that follow by ones."""
    tiles: memoryview


class Tile(NamedTuple):
    """A block as a row has it."""

    block: int
    tokens: int
    set: int
    """Which of the row's centre sets."""


class Row(NamedTuple):
    """A row: indices into the exact parts, the sets and the blocks; None: no exact part."""

    first: int
    has_gaps: bool
    sinks: int | None
    tail: int | None
    next_position: int
    plain: bool
    """Whether its exact tokens stand at positions that follow by ones."""
    positions: tuple[int, int]
    """Of the first of the sinks, and of the tail."""
    sets: tuple[int, ...]
    tiles: tuple[Tile, ...]


class CacheBytes(NamedTuple):
    """What a store's bytes say."""

    preamble: bytes
    """Options and codebooks: up to the number of tokens."""
    tokens: int
    exact: list[Exact]
    blocks: list[Block]
    sets: list[bytes]
    rows: list[Row]

    def joined(self) -> bytearray:
        """The bytes of a store that holds this, in rows without gaps and at plain positions."""
        writer = _Writer()
        writer.put("q", self.tokens)
        writer.put("I", len(self.exact))
        for exact in self.exact:
            writer.put("q", exact.tokens)
            writer.add(exact.data)
        writer.put("I", len(self.blocks))
        for block in self.blocks:
            writer.put("qqI", block.first, block.position, 0)
        writer.put("I", len(self.sets))
        for each in self.sets:
            writer.add(each)
        writer.put("I", len(self.rows))
        for row in self.rows:
            writer.put("q", row.first)
            if _version(self.preamble) >= _WITH_GAPS:
                writer.put("I", 0)
            for part in (row.sinks, row.tail):
                writer.put("I", _NOTHING if part is None else part)
            writer.put("q", row.next_position)
            for position in row.positions:
                writer.put("qQ", position, 0)
            writer.put(f"I{len(row.sets)}I", len(row.sets), *row.sets)
            writer.put("I", len(row.tiles))
            for tile in row.tiles:
                writer.put("Iii", *tile)
        return writer.whole(self.preamble, [block.tiles for block in self.blocks])


def taken_apart(data: bytes) -> CacheBytes:
    """What the bytes of ``KvCache.serialize``, or of a device's store, say; views of them.

    data: of this version's serialize(), which nobody has touched: nothing is checked.
    """
    reader = _Reader(data)
    magic, version, heads, dim, value_dim = reader.get("IIiii")
    assert magic == 0x49415154 and _TILES_LAST <= version <= _WITH_KEY_TRELLIS
    reader.get("iiii")
    dtype, _, _, has_rope = reader.get("BBBB")
    reader.get("Q")
    pairs = 0
    if has_rope:
        _, _, pairs = reader.get("iBI")
        reader.skip(4 * pairs)
        reader.skip(reader.one("I"))
    has_basis = version == _WITH_BASIS
    if version >= _WITH_TRELLIS:
        _, has_basis = reader.get("BB")
    if version >= _WITH_KEY_TRELLIS:
        reader.get("B")
    if has_basis:
        _, carried = reader.get("QB")
        if carried:
            reader.skip(reader.one("Q"))
    reader.skip(16)  # what tells codebooks apart
    preamble = bytes(data[: reader.at])
    tokens = reader.one("q")
    exact = []
    for _ in range(reader.one("I")):
        count = reader.one("q")
        taken = reader.take(count * heads * (dim + value_dim) * _ITEM_BYTES[dtype])
        exact.append(Exact(count, taken))
    stands = []
    for _ in range(reader.one("I")):
        first, position, sections = reader.get("qqI")
        reader.skip(4 * TILE_TOKENS * sections)
        stands.append((first, position, sections == 0))
    set_bytes = set_size(heads, dim, pairs)
    sets = [bytes(reader.take(set_bytes)) for _ in range(reader.one("I"))]
    rows = [_row(reader, version) for _ in range(reader.one("I"))]
    reader.align()
    block_bytes = (len(data) - reader.at) // max(len(stands), 1)
    blocks = [
        Block(first, position, plain, reader.take(block_bytes)) for first, position, plain in stands
    ]
    return CacheBytes(preamble, tokens, exact, blocks, sets, rows)


def set_size(heads: int, dim: int, pairs: int) -> int:
    """Bytes of a centre set."""
    return heads * (4 * dim + 8 * pairs + 4 + 1)


def _row(reader: _Reader, version: int) -> Row:
    first = reader.one("q")
    gaps = reader.one("I") if version >= _WITH_GAPS else 0
    reader.skip(16 * gaps)
    sinks, tail, next_position = reader.get("IIq")
    stands = []
    for _ in range(2):
        position, numbers = reader.get("qQ")
        reader.skip(4 * numbers)
        stands.append((position, numbers == 0))
    sets = reader.get(f"{reader.one('I')}I")
    tiles = tuple(Tile(*reader.get("Iii")) for _ in range(reader.one("I")))
    return Row(
        first,
        gaps > 0,
        None if sinks == _NOTHING else sinks,
        None if tail == _NOTHING else tail,
        next_position,
        all(plain for _, plain in stands),
        (stands[0][0], stands[1][0]),
        sets,
        tiles,
    )


def _version(preamble: bytes) -> int:
    return struct.unpack_from("<I", preamble, 4)[0]


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self.at = 0

    def get(self, kinds: str) -> tuple[int, ...]:
        numbers = struct.unpack_from(f"<{kinds}", self._data, self.at)
        self.at += struct.calcsize(f"<{kinds}")
        return numbers

    def one(self, kind: str) -> int:
        return self.get(kind)[0]

    def skip(self, count: int) -> None:
        self.at += count

    def take(self, count: int) -> memoryview:
        self.at += count
        return self._data[self.at - count : self.at]

    def align(self) -> None:
        self.at += -self.at % _LINE


class _Writer:
    def __init__(self) -> None:
        self._parts: list[bytes | memoryview] = []

    def put(self, kinds: str, *numbers: int) -> None:
        self._parts.append(struct.pack(f"<{kinds}", *numbers))

    def add(self, data: bytes | memoryview) -> None:
        self._parts.append(data)

    def whole(self, before: bytes, aligned: Sequence[memoryview]) -> bytearray:
        """All that was put, after `before`; `aligned` from the next multiple of 64 bytes on."""
        length = len(before) + sum(map(len, self._parts))
        return bytearray().join([before, *self._parts, bytes(-length % _LINE), *aligned])
