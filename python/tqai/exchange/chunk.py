"""A chunk of keys and values as bytes, and back.

A chunk is [2, layers, tokens, heads · head_dim], keys and then values, or [1, layers, tokens,
heads · 2 · head_dim], each head's key before its value. All layers of the same bits are rows of one
``KvCache``, without sinks and window; what is written is, of each,

- the centres of its keys in FP16, which need no position: a chunk's own first token stands at 0,
  and a centre before rotary embedding is as good in any frame;
- norms in 8 bits between the least and the largest of a head, and in 4 beside codes of 1 or 2 bits,
  whose error is ten times that: the 16 that tiles have would be a third of the bytes beside 2-bit
  values of 64 coordinates (``norm_bits=16`` keeps them);
- codes, as tiles have them.

Then tokens that are kept exact: a chunk's first one, as it may be the text's first, which all
others look at. All of it has as many bytes as is known beforehand: LMCache asks for that many when
it reads.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from tqai import _core
from tqai.exchange import envelope, short_forms
from tqai.exchange.cache_bytes import (
    TILE_TOKENS,
    Block,
    CacheBytes,
    Row,
    Tile,
    set_size,
    taken_apart,
)
from tqai.exchange.chunk_options import ChunkOptions
from tqai.exchange.envelope import NotUsable
from tqai.settings import Settings
from tqai.stores.for_torch.tensor_refs import DTYPES, ref

KIND = "lmcache chunk"
_NORM_BYTES = 2 * 2 * TILE_TOKENS
"""Of a tile: the keys' norms, then the values', in FP16, at its end."""
_STAGED_BYTES = 1 << 21
"""Of keys and values that a cache holds at once while they are encoded, about: so many stay in a
core's cache, and an allocator keeps them."""
_SPARE = 16
"""For so many layers there is room for one more set of centres."""


class Shape(NamedTuple):
    """What a chunk is."""

    planes: int
    """2: keys and values apart; 1: each head's key before its value."""
    layers: int
    tokens: int
    heads: int
    dtype: torch.dtype


class _Group(NamedTuple):
    """Layers of the same bits, which are rows of one cache."""

    layers: tuple[int, ...]
    settings: Settings


class _Plan(NamedTuple):
    """All that is known of chunks of a shape."""

    shape: Shape
    groups: tuple[_Group, ...]
    facts: dict[str, Any]
    sealed: int
    first: int
    last: int
    payload: int


class ChunkCodec:
    """Chunks as bytes, and back. Thread-safe; the GIL is released while numbers are moved."""

    def __init__(self, options: ChunkOptions) -> None:
        self.options = options
        self._plan_of = lru_cache(maxsize=64)(self._planned)
        self._templates: dict[Any, tuple[bytes, bytes]] = {}
        self._empty: dict[Any, tuple[_core.KvCache, bytes]] = {}

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes of a chunk of this shape, exactly.

        Raises:
            ValueError: for a shape or dtype that is none of a chunk's.
        """
        plan = self._plan(shape, dtype)
        return envelope.size(KIND, {**plan.facts, "of": _name("")}, plan.payload)

    def encode(self, chunk: torch.Tensor, to: memoryview, of: str = "") -> int:
        """Writes a chunk on the CPU to the start of `to`, and returns how many bytes it took.

        of: what the chunk is, which ``decode`` must be given too.

        Raises:
            ValueError: for another shape or dtype, NaN, infinity, vectors whose norm FP16 does not
                hold, and too little room.
        """
        plan = self._plan(chunk.shape, chunk.dtype)
        keys, values = _sides(chunk, plan.shape, self.options.head_dim)
        parts: list[Any] = []
        for group in plan.groups:
            if plan.sealed:
                parts += self._encoded(plan, group, keys, values)
        for start, end in self._exact(plan):
            part = chunk[:, :, start:end].contiguous()
            parts.append(part.view(torch.uint8).numpy().reshape(-1).data)
        return envelope.seal_into(to, KIND, {**plan.facts, "of": _name(of)}, parts)

    def decode(self, data: memoryview, chunk: torch.Tensor, of: str = "") -> None:
        """Fills a chunk on the CPU with what ``encode`` wrote.

        Raises:
            NotUsable: for anything else; the chunk may have been written to.
            ValueError: for a shape or dtype that is none of a chunk's.
        """
        plan = self._plan(chunk.shape, chunk.dtype)
        payload = envelope.opened(data, KIND, {**plan.facts, "of": _name(of)})
        if len(payload) != plan.payload:
            raise NotUsable(f"a chunk of {len(payload)} bytes, not {plan.payload}")
        keys, values = _sides(chunk, plan.shape, self.options.head_dim)
        at = 0
        for group in plan.groups:
            if plan.sealed:
                size = self._group_bytes(plan, group)
                self._decoded(plan, group, payload[at : at + size], keys, values)
                at += size
        for start, end in self._exact(plan):
            part = chunk[:, :, start:end]
            size = part.numel() * part.element_size()
            held = torch.frombuffer(bytearray(payload[at : at + size]), dtype=chunk.dtype)
            part.copy_(held.view(part.shape))
            at += size

    def _plan(self, shape: Sequence[int], dtype: torch.dtype) -> _Plan:
        return self._plan_of(tuple(map(int, shape)), dtype)

    def _planned(self, shape: tuple[int, ...], dtype: torch.dtype) -> _Plan:
        options = self.options
        if len(shape) != 4 or shape[0] not in (1, 2) or min(shape) < 1:
            raise ValueError(
                f"a chunk of shape {shape}; expected [2, layers, tokens, heads · head_dim] or "
                "[1, layers, tokens, heads · 2 · head_dim]"
            )
        if dtype not in DTYPES:
            raise ValueError(f"a chunk of {dtype}; expected {', '.join(map(str, DTYPES))}")
        wide = options.head_dim * (3 - shape[0])
        if shape[3] % wide:
            raise ValueError(
                f"a chunk of shape {shape} has no whole heads of {wide} coordinates "
                f"(head_dim={options.head_dim})"
            )
        found = Shape(shape[0], shape[1], shape[2], shape[3] // wide, dtype)
        settings = options.settings()
        groups: dict[tuple[Any, Any], list[int]] = {}
        for layer in range(found.layers):
            own = settings.of_layer(layer, found.layers)
            groups.setdefault((own.bits_k, own.bits_v), []).append(layer)
        made = tuple(
            _Group(tuple(layers), settings.of_layer(layers[0], found.layers))
            for layers in groups.values()
        )
        sealed = found.tokens // TILE_TOKENS * TILE_TOKENS
        first = min(options.exact_first, sealed)
        last = min(max(options.exact_last, found.tokens - sealed), found.tokens - first)
        facts = {
            "model": options.model,
            "layers": [found.planes, found.layers, found.tokens],
            "heads": [found.heads, options.head_dim],
            "dtype": str(dtype),
            "bits": [[len(group.layers), *bits] for group, bits in zip(made, groups, strict=True)],
            "which": zlib.crc32(repr(made).encode()),
            "norms": [list(self._norm_widths(group)) for group in made],
            "centres": 16,
            "codec": options.codec,
            "exact": [first, last],
            "seed": -1 if options.seed is None else options.seed,
            "rotary": None if options.rope is None else zlib.crc32(repr(self._rope()).encode()),
            "codebooks": envelope.codebooks(
                [(options.head_dim, b) for pair in groups for b in pair]
            ),
        }
        plan = _Plan(found, made, facts, sealed, first, last, 0)
        exact = shape[0] * shape[1] * (first + last) * shape[3] * dtype.itemsize
        coded = sum(self._group_bytes(plan, group) for group in made) if sealed else 0
        return plan._replace(payload=coded + exact)

    def _rope(self) -> tuple[list[float], str, int] | None:
        rope = self.options.rope
        if rope is None:
            return None
        frequencies = [float(each) for each in rope["inv_freq"]]
        return frequencies, rope.get("layout", "half_split"), 2 * len(frequencies)

    def _exact(self, plan: _Plan) -> list[tuple[int, int]]:
        tokens = plan.shape.tokens
        spans = [(0, plan.first), (tokens - plan.last, tokens)]
        return [span for span in spans if span[0] < span[1]]

    def _cache(self, plan: _Plan, settings: Settings, batch: int) -> _core.KvCache:
        return _core.KvCache(
            batch=batch,
            kv_heads=plan.shape.heads,
            head_dim=self.options.head_dim,
            dtype=DTYPES[plan.shape.dtype],
            rope=self._rope(),
            **settings.core_options(),
        )

    # The layout of a group: per layer, which set each tile has; the sets; norms; codes.

    def _sets(self, group: _Group) -> int:
        return len(group.layers) + len(group.layers) // _SPARE + 1

    def _set_bytes(self, plan: _Plan) -> int:
        return short_forms.centres_bytes(plan.shape.heads, self.options.head_dim)

    def _norm_widths(self, group: _Group) -> tuple[int, int]:
        """Bits of a norm of the keys, and of the values."""
        if self.options.norm_bits == 16:
            return 16, 16
        coarse = [int(bits) <= 2 for bits in (group.settings.bits_k, group.settings.bits_v)]  # type: ignore[arg-type]
        return 4 if coarse[0] else 8, 4 if coarse[1] else 8

    def _norms_bytes(self, plan: _Plan, group: _Group) -> int:
        return short_forms.norms_bytes(
            len(group.layers), plan.shape.heads, plan.sealed, self._norm_widths(group)
        )

    def _code_bytes(self, group: _Group) -> int:
        bits = int(group.settings.bits_k) + int(group.settings.bits_v)  # type: ignore[arg-type]
        return 8 * bits * (-(-self.options.head_dim // 16) * 16)

    def _group_bytes(self, plan: _Plan, group: _Group) -> int:
        blocks = len(group.layers) * plan.sealed // TILE_TOKENS
        codes = blocks * plan.shape.heads * self._code_bytes(group)
        sets = self._sets(group) * self._set_bytes(plan)
        return blocks + sets + self._norms_bytes(plan, group) + codes

    def _encoded(
        self, plan: _Plan, group: _Group, keys: torch.Tensor, values: torch.Tensor
    ) -> list[Any]:
        heads, rows = plan.shape.heads, len(group.layers)
        if rows < plan.shape.layers:
            at = torch.tensor(group.layers)
            keys, values = keys[at], values[at]
        which = np.zeros((rows, plan.sealed // TILE_TOKENS), np.uint8)
        sets = np.zeros(
            (self._sets(group), set_size(heads, self.options.head_dim, self._pairs)), "u1"
        )
        shape = rows, plan.sealed // TILE_TOKENS, heads
        norms = np.empty((*shape, _NORM_BYTES), np.uint8)
        codes = np.empty((*shape, self._code_bytes(group)), np.uint8)
        spare, at_once = rows, self._rows_at_once(plan)
        for first in range(0, rows, at_once):
            part = slice(first, min(first + at_once, rows))
            tiles, own, held = self._sealed(plan, group, keys[part], values[part], group.settings)
            if held is None:
                sets[part] = own
            else:  # some row has several
                spare = self._spread(group, held, first, spare, which, sets)
            norms[part], codes[part] = tiles[..., -_NORM_BYTES:], tiles[..., :-_NORM_BYTES]
        crowded = [row for row in range(rows) if which[row].max() == 255]
        if crowded:  # there is no room for their sets: they get along without
            again = torch.tensor(crowded)
            plain = replace(group.settings, centering="none")
            tiles, own, _ = self._sealed(plan, group, keys[again], values[again], plain)
            norms[crowded], codes[crowded] = tiles[..., -_NORM_BYTES:], tiles[..., :-_NORM_BYTES]
            sets[crowded], which[crowded] = own, 0
        norms = norms.view("<u2")
        centres = short_forms.short_centres(sets, heads, self.options.head_dim, self._pairs)
        short = short_forms.short_norms(norms, self._norm_widths(group))
        arrays = [which, centres, *short, codes]
        return [array.reshape(-1).view(np.uint8).data for array in arrays]

    def _sealed(
        self,
        plan: _Plan,
        group: _Group,
        keys: torch.Tensor,
        values: torch.Tensor,
        settings: Settings,
    ) -> tuple[np.ndarray, np.ndarray, CacheBytes | None]:
        """Tiles [rows, blocks, heads, bytes], centre sets [sets, bytes], and, where a row has
        several of these, which has which."""
        rows, heads = keys.shape[0], plan.shape.heads
        cache = self._cache(plan, settings, rows)
        start = min(plan.first, plan.sealed - 1)
        if start:  # what is exact anyway has no say in the centres
            again = [
                side[:, :, start : start + 1].expand(-1, -1, start, -1) for side in (keys, values)
            ]
            cache.append(ref(again[0]), ref(again[1]))
        cache.append(ref(keys[:, :, start : plan.sealed]), ref(values[:, :, start : plan.sealed]))
        if cache.seal() > 0:
            raise ValueError("a key or value is longer than the FP16 norms of codes can hold")
        data = cache.serialize()
        blocks = rows * plan.sealed // TILE_TOKENS
        tile_bytes = self._code_bytes(group) + _NORM_BYTES
        whole = np.frombuffer(data, np.uint8)
        tiles = whole[len(data) - blocks * heads * tile_bytes :]
        tiles = tiles.reshape(rows, blocks // rows, heads, tile_bytes)
        at = self._sets_at(plan, settings, blocks)
        count = int.from_bytes(data[at - 4 : at], "little")
        each = set_size(heads, self.options.head_dim, self._pairs)
        sets = whole[at : at + count * each].reshape(count, each)
        return tiles, sets, None if count == rows else taken_apart(data)

    def _spread(
        self,
        group: _Group,
        held: CacheBytes,
        first: int,
        spare: int,
        which: np.ndarray,
        sets: np.ndarray,
    ) -> int:
        """Puts the sets of rows from `first` on into the room that there is from set `spare` on,
        255 where there is none; returns the first that is free then."""
        for row, own in enumerate(held.rows, first):
            numbers = {0: 0}
            sets[row] = np.frombuffer(held.sets[own.sets[0]], np.uint8)
            for local, number in enumerate(own.sets[1:], 1):
                if spare == len(sets):
                    numbers[local] = 255
                    continue
                sets[spare] = np.frombuffer(held.sets[number], np.uint8)
                numbers[local] = spare - len(group.layers) + 1
                spare += 1
            which[row] = [numbers[tile.set] for tile in own.tiles]
        return spare

    def _rows_at_once(self, plan: _Plan) -> int:
        shape = plan.shape
        staged = 2 * shape.heads * shape.tokens * self.options.head_dim * shape.dtype.itemsize
        return max(_STAGED_BYTES // staged, torch.get_num_threads(), 1)

    def _decoded(
        self,
        plan: _Plan,
        group: _Group,
        payload: memoryview,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        heads, rows, blocks = plan.shape.heads, len(group.layers), plan.sealed // TILE_TOKENS
        whole = np.frombuffer(payload, np.uint8)
        ends = np.cumsum(
            [
                rows * blocks,
                self._sets(group) * self._set_bytes(plan),
                self._norms_bytes(plan, group),
            ]
        )
        which, centres, norms, codes = np.split(whole, ends)
        tiles = np.empty((rows, blocks, heads, self._code_bytes(group) + _NORM_BYTES), np.uint8)
        tiles[..., :-_NORM_BYTES] = codes.reshape(rows, blocks, heads, -1)
        widths = self._norm_widths(group)
        long = short_forms.long_norms(norms, (rows, blocks, heads), widths)
        tiles[..., -_NORM_BYTES:] = long.view(np.uint8)
        sets = short_forms.long_centres(centres, heads, self.options.head_dim, self._pairs)
        if which.any():
            data = self._several(plan, group, which.reshape(rows, blocks), sets, tiles)
        else:
            before, after = self._template(plan, group)
            parts = [before, sets[:rows].reshape(-1).data, after, tiles.reshape(-1).data]
            data = bytearray().join(parts)
        try:
            cache = _core.KvCache.deserialize(data)
        except ValueError as error:
            raise NotUsable(f"the bytes of a chunk are no tiles: {error}") from error
        if rows == plan.shape.layers:
            cache.gather(0, *(ref(side[:, :, : plan.sealed]) for side in (keys, values)))
            return
        shape = rows, heads, plan.sealed, self.options.head_dim
        found = [torch.empty(shape, dtype=keys.dtype) for _ in range(2)]
        cache.gather(0, *map(ref, found))
        at = torch.tensor(group.layers)
        keys[at, :, : plan.sealed], values[at, :, : plan.sealed] = found

    def _several(
        self, plan: _Plan, group: _Group, which: np.ndarray, sets: np.ndarray, tiles: np.ndarray
    ) -> bytearray:
        """The bytes of a cache whose rows have several sets."""
        rows, blocks = which.shape
        if int(which.max()) > len(sets) - rows:
            raise NotUsable("a chunk's tiles name centres that are not there")
        made = []
        for row in range(rows):
            numbers = [row, *sorted({rows + int(k) - 1 for k in which[row] if k})]
            own = [numbers.index(row if k == 0 else rows + int(k) - 1) for k in which[row]]
            of_row = tuple(Tile(row * blocks + b, TILE_TOKENS, s) for b, s in enumerate(own))
            after = plan.sealed
            made.append(Row(0, False, None, None, after, True, (0, after), tuple(numbers), of_row))
        held = [
            Block(TILE_TOKENS * b, TILE_TOKENS * b, True, memoryview(tiles[row, b].reshape(-1)))
            for row in range(rows)
            for b in range(blocks)
        ]
        preamble = self._preamble(plan, group.settings)
        written = [each.tobytes() for each in sets]
        return CacheBytes(preamble, plan.sealed, [], held, written, made).joined()

    def _template(self, plan: _Plan, group: _Group) -> tuple[bytes, bytes]:
        """What is before the sets and after them, up to the tiles, where each row has one."""
        key = plan.shape, group.layers
        if key not in self._templates:
            rows, blocks = len(group.layers), plan.sealed // TILE_TOKENS
            each = set_size(plan.shape.heads, self.options.head_dim, self._pairs)
            which, tiles = np.zeros((rows, blocks), np.uint8), np.zeros((rows, blocks, 0), np.uint8)
            sets = np.zeros((rows, each), np.uint8)
            whole = bytes(self._several(plan, group, which, sets, tiles))
            at = self._sets_at(plan, group.settings, rows * blocks)
            self._templates[key] = whole[:at], whole[at + sets.size :]
        return self._templates[key]

    def _sets_at(self, plan: _Plan, settings: Settings, blocks: int) -> int:
        """Where the centre sets begin in the bytes of a cache without exact tokens."""
        return len(self._preamble(plan, settings)) + _COUNTS + _BLOCK_BYTES * blocks

    def _preamble(self, plan: _Plan, settings: Settings) -> bytes:
        key = plan.shape, settings
        if key not in self._empty:
            # Kept, and with it the tables that all caches of these settings share.
            empty = self._cache(plan, settings, 1)
            self._empty[key] = empty, taken_apart(empty.serialize()).preamble
        return self._empty[key][1]

    @property
    def _pairs(self) -> int:
        return 0 if self.options.rope is None else len(self.options.rope["inv_freq"])


_COUNTS = 8 + 4 + 4 + 4
"""Bytes between a preamble and the centre sets, beside the blocks': tokens, and three counts."""
_BLOCK_BYTES = 8 + 8 + 4


def _sides(chunk: torch.Tensor, shape: Shape, dim: int) -> list[torch.Tensor]:
    """Views of a chunk's keys and values, [layers, heads, tokens, head_dim]."""
    if shape.planes == 2:
        both = chunk.view(2, shape.layers, shape.tokens, shape.heads, dim)
        return [side.transpose(1, 2) for side in both]
    both = chunk.view(shape.layers, shape.tokens, shape.heads, 2, dim)
    return [both[:, :, :, side].transpose(1, 2) for side in range(2)]


def _name(of: str) -> str:
    """What a chunk is, in as many letters whatever it is."""
    return hashlib.blake2b(of.encode(), digest_size=16).hexdigest()
