"""Stores as the bytes that ``_core.KvCache.serialize`` writes, so that each reads the other's.

src/cache/serialize.cpp is the format's description.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from tqai import _core
from tqai.settings import CENTERINGS, ROTATIONS
from tqai.stores.rope import LAYOUTS
from tqai.stores.tensor_refs import DTYPES
from tqai.stores.torch_ops.centres import Centres
from tqai.stores.torch_ops.codec import Options, codec_of
from tqai.stores.torch_ops.packing import TILE_TOKENS
from tqai.stores.torch_ops.pages import PAGE_TILES, Page
from tqai.stores.torch_ops.rows import Exact, Rows

_MAGIC, _VERSION, _NOTHING = 0x49415154, 1, 0xFFFFFFFF
_DTYPES = tuple(DTYPES)


def write(options: Options, tokens: int, batch: int, held: list[Rows]) -> bytes:
    """The bytes of a store with these rows."""
    writer = _Writer()
    exact, blocks, centres = _Numbered(), _Numbered(), _Numbered()
    rows_of = {place: (rows, at) for rows in held for at, place in enumerate(rows.places)}
    for place in range(batch):
        rows, at = rows_of[place]
        writer.put("<i8", rows.first)
        for part in (rows.sinks, rows.tail):
            writer.put("<u4", exact.add((id(part), at), (part, at)) if part.tokens else _NOTHING)
        centre = None if rows.centres is None else (id(rows.centres), at)
        writer.put("<u4", _NOTHING if centre is None else centres.add(centre, (rows.centres, at)))
        tiles = [(page, tile) for page in rows.pages for tile in range(page.count)]
        writer.put("<u4", len(tiles))
        for page, tile in tiles:
            row = page.rows[at]
            writer.put("<u4", blocks.add((id(page), row, tile), (page, row, tile)))
            writer.put("<i4", min(TILE_TOKENS, page.tokens - tile * TILE_TOKENS))
    listed = writer.take()

    _write_options(options, writer)
    writer.put("<i8", tokens)
    writer.put("<u4", len(exact.objects))
    for part, at in exact.objects:
        writer.put("<i8", part.tokens)
        for tensor in part.part(0, part.tokens):
            writer.tensor(tensor[at])
    writer.put("<u4", len(blocks.objects))
    for page, row, tile in blocks.objects:
        writer.put("<i8", page.first + tile * TILE_TOKENS)
        writer.tensor(page.tiles[row, :, tile])
    writer.put("<u4", len(centres.objects))
    for centre, at in centres.objects:
        writer.tensor(centre.constant[at])
        writer.tensor(centre.means[at])
        for kind in centre.kinds[at]:
            writer.put("<u1", CENTERINGS.index(kind))
    writer.put("<u4", batch)
    return writer.take() + listed


def read(data: bytes, device: torch.device) -> tuple[Options, int, list[Rows]]:
    """What ``write`` or ``_core.KvCache.serialize`` wrote: options, tokens, rows on `device`.

    Raises:
        ValueError: for bytes that neither wrote.
    """
    _core.KvCache.deserialize(data)  # checks every length and number
    reader = _Reader(data)
    options = _read_options(reader)
    tokens = reader.get("<i8")
    dims = options.head_dim, options.value_head_dim
    exact = []
    for _ in range(reader.get("<u4")):
        count = reader.get("<i8")
        shapes = ((options.kv_heads, count, dim) for dim in dims)
        exact.append(tuple(reader.tensor(options.dtype, *shape) for shape in shapes))
    blocks = []
    tile_bytes = codec_of(options, torch.device("cpu")).tile_bytes
    for _ in range(reader.get("<u4")):
        first = reader.get("<i8")
        blocks.append((first, reader.tensor(torch.uint8, options.kv_heads, tile_bytes)))
    pairs = 0 if options.rope is None else len(options.rope[0])
    centres = []
    for _ in range(reader.get("<u4")):
        constant = reader.tensor(torch.float32, options.kv_heads, options.head_dim)
        means = reader.tensor(torch.float32, options.kv_heads, 2, pairs)
        kinds = tuple(CENTERINGS[reader.get("<u1")] for _ in range(options.kv_heads))
        centres.append((constant, means, kinds))
    rows = [_Row.read(reader, exact) for _ in range(reader.get("<u4"))]

    groups: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row.history, []).append(place)
    held = []
    for places in groups.values():
        some = [rows[place] for place in places]
        sinks, tail = (
            _exact(options, [exact[i] if i != _NOTHING else None for i in indices], device)
            for indices in zip(*((row.sinks, row.tail) for row in some), strict=True)
        )
        centre = None
        if some[0].centres != _NOTHING:
            parts = [centres[row.centres] for row in some]
            stacked = (torch.stack([part[i] for part in parts]).to(device) for i in (0, 1))
            centre = Centres(*stacked, tuple(part[2] for part in parts))
        pages = tuple(_pages([row.tiles for row in some], blocks, device))
        held.append(Rows(tuple(places), sinks, tail, some[0].first, pages, centre))
    return options, tokens, held


def options_in(data: bytes) -> Options:
    """What a store was made with, as its bytes say; they are ones that ``read`` reads."""
    return _read_options(_Reader(data))


def _write_options(options: Options, writer: _Writer) -> None:
    writer.put("<u4", _MAGIC, _VERSION)
    writer.put("<i4", options.kv_heads, options.head_dim, options.value_head_dim)
    writer.put("<i4", options.bits_k, options.bits_v, options.sink_tokens, options.residual_window)
    writer.put("<u1", _DTYPES.index(options.dtype), ROTATIONS.index(options.rotation))
    writer.put("<u1", CENTERINGS.index(options.centering), int(options.rope is not None))
    writer.put("<u8", options.seed)
    if options.rope is not None:
        inv_freq, layout, rotary_dim = options.rope
        writer.put("<i4", rotary_dim)
        writer.put("<u1", LAYOUTS.index(layout))
        writer.put("<u4", len(inv_freq))
        writer.put("<f4", *inv_freq)


def _read_options(reader: _Reader) -> Options:
    reader.get("<u4"), reader.get("<u4")
    heads, dim, value_dim, bits_k, bits_v, sinks, window = (reader.get("<i4") for _ in range(7))
    dtype, rotation = _DTYPES[reader.get("<u1")], ROTATIONS[reader.get("<u1")]
    centering, has_rope = CENTERINGS[reader.get("<u1")], reader.get("<u1")
    seed, rope = reader.get("<u8"), None
    if has_rope:
        rotary_dim, layout = reader.get("<i4"), LAYOUTS[reader.get("<u1")]
        inv_freq = tuple(reader.get("<f4") for _ in range(reader.get("<u4")))
        rope = inv_freq, layout, rotary_dim
    return Options(
        heads, dim, value_dim, dtype, bits_k, bits_v, sinks, window, rotation, centering, rope, seed
    )


def _exact(options: Options, parts: list[Any], device: torch.device) -> Exact:
    """Exact tokens of some rows, (keys, values) or None each; all of them have as many."""
    if parts[0] is None:
        shape = len(parts), options.kv_heads, 0
        dims = options.head_dim, options.value_head_dim
        empty = (torch.empty(*shape, dim, dtype=options.dtype, device=device) for dim in dims)
        return Exact(*empty, 0)
    keys, values = (torch.stack([part[i] for part in parts]).to(device) for i in (0, 1))
    return Exact(keys, values, keys.shape[2])


def _pages(
    tiles: list[list[tuple[int, int]]], blocks: list[tuple[int, torch.Tensor]], device: torch.device
) -> Iterator[Page]:
    """tiles: of each row, the block and the tokens of each of its tiles, in order."""
    start, count = 0, len(tiles[0])
    while start < count:
        end, tokens = start, 0
        while end < count and end - start < PAGE_TILES and tokens == (end - start) * TILE_TOKENS:
            tokens += tiles[0][end][1]
            end += 1
        wanted = [tuple(block for block, _ in row[start:end]) for row in tiles]
        held = list(dict.fromkeys(wanted))
        parts = [torch.stack([blocks[block][1] for block in row], dim=1) for row in held]
        rows = tuple(held.index(row) for row in wanted)
        yield Page(torch.stack(parts).to(device), blocks[wanted[0][0]][0], tokens, rows)
        start = end


class _Row(NamedTuple):
    """A row as it is written; sinks, tail and centres are indices."""

    first: int
    sinks: int
    tail: int
    centres: int
    tiles: list[tuple[int, int]]
    history: Any
    """Equal for rows that can be held together."""

    @classmethod
    def read(cls, reader: _Reader, exact: list[Any]) -> _Row:
        first = reader.get("<i8")
        sinks, tail, centres, count = (reader.get("<u4") for _ in range(4))
        tiles = [(reader.get("<u4"), reader.get("<i4")) for _ in range(count)]
        lengths = [0 if i == _NOTHING else exact[i][0].shape[1] for i in (sinks, tail)]
        spans = tuple(tokens for _, tokens in tiles)
        history = first, *lengths, centres == _NOTHING, spans
        return cls(first, sinks, tail, centres, tiles, history)


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

    def tensor(self, tensor: torch.Tensor) -> None:
        if tensor.numel() > 0:
            flat = tensor.contiguous().view(-1).view(torch.uint8).cpu()
            self._parts.append(flat.numpy().tobytes())

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

    def tensor(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        size = int(np.prod(shape)) * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        flat = np.frombuffer(self._data, dtype=np.uint8, count=size, offset=self._at).copy()
        self._at += size
        return torch.from_numpy(flat).view(dtype).view(shape)
