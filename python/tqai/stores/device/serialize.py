"""Stores as the bytes that ``_core.KvCache.serialize`` writes, so that each reads the other's.

docs/format.md is the format's description.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from tqai import _core
from tqai.settings import CENTERINGS, DTYPES, ROTATIONS
from tqai.shapes.rope import LAYOUTS
from tqai.stores.device.centres import RowCentres, stacked
from tqai.stores.device.codec import ITEM_BYTES, Options, codec_of
from tqai.stores.device.operations import Operations
from tqai.stores.device.packing import TILE_TOKENS
from tqai.stores.device.pages import PAGE_TILES, Page
from tqai.stores.device.positions import Positions
from tqai.stores.device.rows import Exact, Rows

_MAGIC, _NOTHING = 0x49415154, 0xFFFFFFFF
_VERSION, _WITH_GAPS, _WITH_BASIS, _WITH_TRELLIS, _WITH_KEY_TRELLIS = 3, 4, 5, 6, 7
_CODES = ("scalar", "trellis")
_BASIS_ID, _BASIS_MATRICES = 0, 1
_LINE = 64
"""Tiles begin at a multiple of so many bytes."""


def write(
    ops: Operations,
    options: Options,
    tokens: int,
    batch: int,
    held: Sequence[Rows],
    with_basis: bool = False,
) -> bytes:
    """The bytes of a store with these rows; of a basis its id, or all of it."""
    writer = _Writer()
    exact, blocks, centres = _Numbered(), _Numbered(), _Numbered()
    rows_of = {place: (rows, at) for rows in held for at, place in enumerate(rows.places)}
    version, sections = _version(options, held), _sections(options)
    for place in range(batch):
        rows, at = rows_of[place]
        writer.put("<i8", rows.first)
        if version >= _WITH_GAPS:
            writer.put("<u4", len(rows.gaps))
            for gap in rows.gaps:
                writer.put("<i8", *gap)
        for part in (rows.sinks, rows.tail):
            writer.put("<u4", exact.add((id(part), at), (part, at)) if part.tokens else _NOTHING)
        writer.put("<i8", rows.next_position)
        _write_positions(rows.sink_positions, sections, writer)
        _write_positions(rows.tail_positions, sections, writer)
        writer.put("<u4", len(rows.centre_sets))
        for held_set in rows.centre_sets:
            writer.put("<u4", centres.add((id(held_set), at), (held_set, at)))
        tiles = [(page, tile) for page in rows.pages for tile in range(page.count)]
        writer.put("<u4", len(tiles))
        for page, tile in tiles:
            row = page.rows[at]
            writer.put("<u4", blocks.add((id(page), row, tile), (page, row, tile)))
            writer.put("<i4", min(TILE_TOKENS, page.tokens - tile * TILE_TOKENS), page.set)
    listed = writer.take()

    _write_options(options, version, with_basis, writer)
    for dim, bits, codes in _codebooks(options):
        levels, step = _mark(dim, bits, codes)
        writer.put("<u4", levels)
        writer.put("<f4", step)
    writer.put("<i8", tokens)
    writer.put("<u4", len(exact.objects))
    for part, at in exact.objects:
        writer.put("<i8", part.tokens)
        for each in part.part(0, part.tokens):
            writer.append(ops.to_bytes(each[at]))
    writer.put("<u4", len(blocks.objects))
    for page, _, tile in blocks.objects:
        positions = page.positions.part(tile * TILE_TOKENS, (tile + 1) * TILE_TOKENS)
        writer.put("<i8", page.first + tile * TILE_TOKENS, positions.first)
        places = positions.places()
        writer.put("<u4", 0 if places is None else len(places))
        if places is not None:
            writer.put("<i4", *places.flatten())
    writer.put("<u4", len(centres.objects))
    for centre, at in centres.objects:
        writer.append(ops.to_bytes(centre.constant[at]))
        writer.append(ops.to_bytes(centre.means[at]))
        writer.put("<f4", *centre.left[at])
        for kind in centre.kinds[at]:
            writer.put("<u1", CENTERINGS.index(kind))
    writer.put("<u4", batch)
    writer.append(listed)
    writer.align(_LINE)
    for page, row, tile in blocks.objects:
        writer.append(ops.to_bytes(page.tiles[row, :, tile]))
    return writer.take()


def read(
    data: bytes, ops: Operations, key_bases: Sequence[_core.KeyBasis] = ()
) -> tuple[Options, int, list[Rows]]:
    """What ``write`` or ``_core.KvCache.serialize`` wrote: options, tokens, rows on a device.

    key_bases: those that keys may be in.

    Raises:
        ValueError: for bytes that neither wrote.
    """
    checked = _core.KvCache.deserialize(data, key_bases=key_bases)  # every length and number
    if data[4] < _VERSION:  # C++ brings it up to date
        data = checked.serialize()
    reader = _Reader(data)
    options = replace(_read_options(reader), key_basis=checked.key_basis)
    for _ in _codebooks(options):
        reader.get("<u4"), reader.get("<f4")  # C++ has compared them
    tokens = reader.get("<i8")
    dims = options.head_dim, options.value_head_dim
    exact = []
    for _ in range(reader.get("<u4")):
        count = reader.get("<i8")
        shapes = ((options.kv_heads, count, dim) for dim in dims)
        exact.append(tuple(reader.exact(options.dtype, *shape) for shape in shapes))
    stands = []
    for _ in range(reader.get("<u4")):
        first, position, sections = reader.get("<i8"), reader.get("<i8"), reader.get("<u4")
        positions = Positions(position, TILE_TOKENS)
        if sections:
            each = reader.numbers("<i4", sections, TILE_TOKENS).T
            positions = Positions.of(_widened(each, options))
        stands.append((first, positions))
    pairs = 0 if options.rope is None else len(options.rope[0])
    centres = []
    for _ in range(reader.get("<u4")):
        constant = reader.numbers("<f4", options.kv_heads, options.head_dim)
        means = reader.numbers("<f4", options.kv_heads, 2, pairs)
        left = reader.numbers("<f4", options.kv_heads)
        kinds = tuple(CENTERINGS[reader.get("<u1")] for _ in range(options.kv_heads))
        centres.append(RowCentres(constant, means, left, kinds))
    has_gaps = data[4] >= _WITH_GAPS
    rows = [_Row.read(reader, options, exact, stands, has_gaps) for _ in range(reader.get("<u4"))]
    reader.align(_LINE)
    tile_bytes = codec_of(options, ops).tile_bytes
    blocks = [
        (first, reader.numbers("<u1", options.kv_heads, tile_bytes), positions)
        for first, positions in stands
    ]

    groups: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row.history, []).append(place)
    held = []
    for places in groups.values():
        some = [rows[place] for place in places]
        sinks, tail = (
            _exact(ops, options, [exact[i] if i != _NOTHING else None for i in indices])
            for indices in zip(*((row.sinks, row.tail) for row in some), strict=True)
        )
        one = some[0]
        sets = tuple(
            stacked([centres[row.centres[i]] for row in some], ops) for i in range(len(one.centres))
        )
        pages = tuple(_pages(ops, [row.tiles for row in some], blocks))
        stand = one.sink_positions, one.tail_positions, one.next_position, one.gaps
        held.append(Rows(tuple(places), sinks, tail, one.first, pages, sets, *stand))
    return options, tokens, held


def options_in(data: bytes) -> Options:
    """What a store was made with, as its bytes say, but for its basis; they are ones that ``read``
    reads."""
    return _read_options(_Reader(data))


def _write_positions(positions: Positions, sections: int, writer: _Writer) -> None:
    each = () if positions.each is None else positions.table(sections).flatten()
    writer.put("<i8", positions.first)
    writer.put("<u8", len(each))
    writer.put("<i4", *each)


def _read_positions(count: int, options: Options, reader: _Reader) -> Positions:
    first, numbers = reader.get("<i8"), reader.get("<u8")
    if numbers == 0:
        return Positions(first, count)
    return Positions.of(reader.numbers("<i4", count, _sections(options)))


def _sections(options: Options) -> int:
    sections = () if options.rope is None or len(options.rope) < 4 else options.rope[3]
    return 1 + max(sections, default=0)


def _widened(each: np.ndarray, options: Options) -> np.ndarray:
    """[tokens, sections], where all sections may have been written as one."""
    return np.broadcast_to(each, (len(each), _sections(options)))


def _version(options: Options, held: Sequence[Rows]) -> int:
    """The oldest that can say it all."""
    if options.key_codes != "scalar":
        return _WITH_KEY_TRELLIS
    if options.value_codes != "scalar":
        return _WITH_TRELLIS
    if options.key_basis is not None:
        return _WITH_BASIS
    return _WITH_GAPS if any(rows.gaps for rows in held) else _VERSION


def _codebooks(options: Options) -> tuple[tuple[int, int, str], tuple[int, int, str]]:
    """Dimension, bits and kind of each side's codes."""
    return (
        (options.head_dim, options.bits_k, f"key {options.key_codes}"),
        (options.value_head_dim, options.bits_v, options.value_codes),
    )


@lru_cache(maxsize=64)
def _mark(dim: int, bits: int, codes: str) -> tuple[int, float]:
    """What tells a codebook from others: the checksum of its levels, and its step."""
    if codes == "key trellis":
        paths = _core.KeyTrellis(bits)
        return zlib.crc32(paths.levels.tobytes() + bytes([paths.start])), paths.step(dim)
    if codes == "trellis":
        tables = _core.Trellis(bits)
        return zlib.crc32(tables.levels.tobytes()), tables.step(dim)
    book = _core.Codebook(dim, bits, "int8")
    return zlib.crc32(book.levels.tobytes()), book.step


def _write_options(options: Options, version: int, with_basis: bool, writer: _Writer) -> None:
    writer.put("<u4", _MAGIC, version)
    writer.put("<i4", options.kv_heads, options.head_dim, options.value_head_dim)
    writer.put("<i4", options.bits_k, options.bits_v, options.sink_tokens, options.residual_window)
    writer.put("<u1", DTYPES.index(options.dtype), ROTATIONS.index(options.rotation))
    writer.put("<u1", CENTERINGS.index(options.centering), int(options.rope is not None))
    writer.put("<u8", options.seed)
    if options.rope is not None:
        inv_freq, layout, rotary_dim = options.rope[:3]
        sections = options.rope[3] if len(options.rope) > 3 else ()
        writer.put("<i4", rotary_dim)
        writer.put("<u1", LAYOUTS.index(layout))
        writer.put("<u4", len(inv_freq))
        writer.put("<f4", *inv_freq)
        writer.put("<u4", len(sections))
        writer.put("<u1", *sections)
    basis = options.key_basis
    if version >= _WITH_TRELLIS:
        writer.put("<u1", _CODES.index(options.value_codes), int(basis is not None))
    if version >= _WITH_KEY_TRELLIS:
        writer.put("<u1", _CODES.index(options.key_codes))
    if basis is not None:
        writer.put("<u8", basis.id)
        writer.put("<u1", _BASIS_MATRICES if with_basis else _BASIS_ID)
        if with_basis:
            matrices = basis.serialize()
            writer.put("<u8", len(matrices))
            writer.append(matrices)


def _read_options(reader: _Reader) -> Options:
    _, version = reader.get("<u4"), reader.get("<u4")
    heads, dim, value_dim, bits_k, bits_v, sinks, window = (reader.get("<i4") for _ in range(7))
    dtype, rotation = DTYPES[reader.get("<u1")], ROTATIONS[reader.get("<u1")]
    centering, has_rope = CENTERINGS[reader.get("<u1")], reader.get("<u1")
    seed, rope = reader.get("<u8"), None
    if has_rope:
        rotary_dim, layout = reader.get("<i4"), LAYOUTS[reader.get("<u1")]
        inv_freq = tuple(reader.get("<f4") for _ in range(reader.get("<u4")))
        count = reader.get("<u4") if version > 1 else 0
        sections = tuple(reader.get("<u1") for _ in range(count))
        rope = (inv_freq, layout, rotary_dim) + ((sections,) if sections else ())
    codes, key_codes, has_basis = 0, 0, int(version == _WITH_BASIS)
    if version >= _WITH_TRELLIS:
        codes, has_basis = reader.get("<u1"), reader.get("<u1")
    if version >= _WITH_KEY_TRELLIS:
        key_codes = reader.get("<u1")
    if has_basis:  # C++ has read it
        reader.get("<u8")
        if reader.get("<u1") == _BASIS_MATRICES:
            reader.skip(reader.get("<u8"))
    numbers = heads, dim, value_dim, dtype, bits_k, bits_v, sinks, window
    kinds = {"value_codes": _CODES[codes], "key_codes": _CODES[key_codes]}
    return Options(*numbers, rotation, centering, rope, seed, **kinds)


def _exact(ops: Operations, options: Options, parts: list[Any]) -> Exact:
    """Exact tokens of some rows, (keys, values) as bits or None each; all of them have as many."""
    tokens = 0 if parts[0] is None else parts[0][0].shape[1]  # of a part that has become empty: 0
    dtype = ops.dtype(options.dtype)
    both = []
    for which, dim in enumerate((options.head_dim, options.value_head_dim)):
        shape = len(parts), options.kv_heads, tokens, dim
        bits = b"" if tokens == 0 else b"".join(part[which].tobytes() for part in parts)
        both.append(ops.from_bytes(bits, dtype, shape))
    return Exact(ops, *both, tokens)


def _pages(
    ops: Operations,
    tiles: list[list[tuple[int, int, int]]],
    blocks: list[tuple[int, np.ndarray, Positions]],
) -> Iterator[Page]:
    """tiles: of each row, the block, the tokens and the set of each of its tiles, in order."""
    start, count = 0, len(tiles[0])
    while start < count:
        end, tokens = start, 0
        positions, centre_set = Positions(), tiles[0][start][2]
        while (
            end < count
            and end - start < PAGE_TILES
            and tokens == (end - start) * TILE_TOKENS
            and tiles[0][end][2] == centre_set
        ):
            tokens += tiles[0][end][1]
            positions = positions.joined(blocks[tiles[0][end][0]][2])
            end += 1
        wanted = [tuple(block for block, _, _ in row[start:end]) for row in tiles]
        held = list(dict.fromkeys(wanted))
        parts = [np.stack([blocks[block][1] for block in row], 1) for row in held]
        rows = tuple(held.index(row) for row in wanted)
        first = blocks[wanted[0][0]][0]
        yield Page(ops, ops.asarray(np.stack(parts)), first, tokens, rows, positions, centre_set)
        start = end


class _Row(NamedTuple):
    """A row as it is written; sinks, tail and centres are indices."""

    first: int
    sinks: int
    tail: int
    centres: list[int]
    tiles: list[tuple[int, int, int]]
    next_position: int
    sink_positions: Positions
    tail_positions: Positions
    gaps: tuple[tuple[int, int], ...]
    history: Any
    """Equal for rows that can be held together."""

    @classmethod
    def read(
        cls,
        reader: _Reader,
        options: Options,
        exact: list[tuple[np.ndarray, ...]],
        blocks: list[tuple[int, Positions]],
        has_gaps: bool,
    ) -> _Row:
        first = reader.get("<i8")
        count = reader.get("<u4") if has_gaps else 0
        gaps = tuple((reader.get("<i8"), reader.get("<i8")) for _ in range(count))
        sinks, tail = reader.get("<u4"), reader.get("<u4")
        next_position = reader.get("<i8")
        lengths = [0 if i == _NOTHING else exact[i][0].shape[1] for i in (sinks, tail)]
        stands = [_read_positions(length, options, reader) for length in lengths]
        centres = [reader.get("<u4") for _ in range(reader.get("<u4"))]
        tiles = [
            (reader.get("<u4"), reader.get("<i4"), reader.get("<i4"))
            for _ in range(reader.get("<u4"))
        ]
        spans = tuple(part[1:] for part in tiles)
        all_stands = [*stands, *(blocks[block][1] for block, _, _ in tiles)]
        places = tuple(
            (stand.first, b"" if stand.each is None else stand.each.tobytes())
            for stand in all_stands
        )
        history = first, *lengths, len(centres), spans, places, next_position, gaps
        return cls(first, sinks, tail, centres, tiles, next_position, *stands, gaps, history)


class _Numbered:
    """Objects that several rows may share, numbered in the order of their first use."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def add(self, key: Any, value: Any) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self.objects)
            self.objects.append(value)
        return self._numbers[key]


class _Writer:
    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def put(self, kind: str, *numbers: float) -> None:
        self._parts.append(np.array(numbers, dtype=kind).tobytes())

    def append(self, data: bytes) -> None:
        self._parts.append(data)

    def align(self, unit: int) -> None:
        self._parts.append(bytes(-sum(map(len, self._parts)) % unit))

    def take(self) -> bytes:
        data, self._parts = b"".join(self._parts), []
        return data


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def get(self, kind: str) -> Any:
        number = np.frombuffer(self._data, dtype=kind, count=1, offset=self._at)[0]
        self._at += number.itemsize
        return number.item()

    def align(self, unit: int) -> None:
        self._at += -self._at % unit

    def skip(self, count: int) -> None:
        self._at += count

    def numbers(self, kind: str, *shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        if count == 0:
            return np.empty(shape, kind)
        numbers = np.frombuffer(self._data, dtype=kind, count=count, offset=self._at)
        self._at += numbers.nbytes
        return numbers.reshape(shape).copy()

    def exact(self, dtype: str, *shape: int) -> np.ndarray:
        """The bits of numbers of a dtype that numpy may not have."""
        return self.numbers(f"<u{ITEM_BYTES[dtype]}", *shape)
