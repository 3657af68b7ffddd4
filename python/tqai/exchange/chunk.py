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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from tqai import _core
from tqai.exchange import envelope
from tqai.exchange.cache_bytes import (
    TILE_TOKENS,
    Block,
    CacheBytes,
    Row,
    Tile,
    set_size,
    taken_apart,
)
from tqai.exchange.envelope import NotUsable
from tqai.settings import CENTERINGS, Settings
from tqai.shapes.heads import MAX_HEAD_DIM, MIN_HEAD_DIM
from tqai.shapes.rope import LAYOUTS
from tqai.stores.for_torch.tensor_refs import DTYPES, ref

KIND = "lmcache chunk"
_NORM_BYTES = 2 * 2 * TILE_TOKENS
"""Of a tile: the keys' norms, then the values', in FP16, at its end."""
_CODECS = "scalar", "trellis"
"""Those whose tables are everybody's; bases are a model's own."""
_SPARE = 16
"""For so many layers there is room for one more set of centres."""


@dataclass(frozen=True)
class ChunkOptions:
    """How chunks are written; the options of the serde.

    Raises:
        ValueError: for a value out of range.
    """

    head_dim: int
    """Coordinates of a head; LMCache does not say."""
    bits_k: Any = 4
    """Bits a key coordinate: of all layers, a list, or {layer: bits}, as for ``tqai.patch``."""
    bits_v: Any = 2
    codec: str = "scalar"
    """"trellis": values of up to 4 bits in trellis codes, with two thirds of the squared error in
    the same bytes, for more time to write them."""
    model: str = ""
    """Tells the model from others of the same name: entries of another one are not used."""
    rope: Mapping[str, Any] | None = field(default=None, hash=False)
    """The rotary embedding, {"inv_freq": […], "layout": "half_split" or "interleaved"}, by which
    keys are centred before it; None: on their mean."""
    exact_first: int = 1
    """First tokens of each chunk that are kept exact."""
    exact_last: int = 0
    """Last tokens of each chunk that are kept exact."""
    norm_bits: int = 8
    """8, and 4 beside codes of 1 or 2 bits; or 16 of all, as in a cache."""
    seed: int | None = None

    def __post_init__(self) -> None:
        checked = {
            "head_dim": _integer("head_dim", self.head_dim, MIN_HEAD_DIM, MAX_HEAD_DIM),
            "exact_first": _integer("exact_first", self.exact_first, 0, 1 << 20),
            "exact_last": _integer("exact_last", self.exact_last, 0, 1 << 20),
            "norm_bits": _integer("norm_bits", self.norm_bits, 8, 16),
        }
        if self.norm_bits not in (8, 16):
            raise ValueError(f"norm_bits={self.norm_bits}: expected 8 or 16")
        if self.codec not in _CODECS:
            raise ValueError(f"codec={self.codec!r}: expected one of {', '.join(_CODECS)}")
        if not isinstance(self.model, str):
            raise ValueError(f"model={self.model!r}: expected a string")
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        for name in ("bits_k", "bits_v"):
            given = getattr(self, name)
            if isinstance(given, Mapping):  # JSON's keys are strings
                given = {int(layer): bits for layer, bits in given.items()}
                object.__setattr__(self, name, given)
        self.settings()
        if self.rope is not None:
            self._check_rope(self.rope)

    def settings(self) -> Settings:
        return Settings(
            bits_k=self.bits_k,
            bits_v=self.bits_v,
            codec="trellis" if self.codec == "trellis" else "scalar",
            sink_tokens=0,
            residual_window=0,
            centering="mean" if self.rope is None else "auto",
            seed=self.seed,
        )

    def _check_rope(self, rope: Mapping[str, Any]) -> None:
        frequencies, layout = rope.get("inv_freq"), rope.get("layout", "half_split")
        if layout not in LAYOUTS:
            raise ValueError(f"rope has layout={layout!r}: expected one of {', '.join(LAYOUTS)}")
        fits = isinstance(frequencies, Sequence) and 0 < 2 * len(frequencies) <= self.head_dim
        if not fits or not all(isinstance(each, (int, float)) for each in frequencies or ()):
            raise ValueError(
                "rope needs inv_freq, a list of radians a token for half as many pairs of "
                f"coordinates as head_dim={self.head_dim} at most"
            )


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: expected an integer from {low} to {high}")
    return value


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
        """A set's kind and centre of each head; the energy that it left is not needed again."""
        return plan.shape.heads * (1 + 2 * self.options.head_dim)

    def _norm_widths(self, group: _Group) -> tuple[int, int]:
        """Bits of a norm of the keys, and of the values."""
        if self.options.norm_bits == 16:
            return 16, 16
        coarse = [int(bits) <= 2 for bits in (group.settings.bits_k, group.settings.bits_v)]  # type: ignore[arg-type]
        return 4 if coarse[0] else 8, 4 if coarse[1] else 8

    def _norms_bytes(self, plan: _Plan, group: _Group) -> int:
        widths, rows = self._norm_widths(group), len(group.layers)
        norms = rows * plan.shape.heads * plan.sealed * sum(widths) // 8
        return norms if widths[0] == 16 else norms + rows * plan.shape.heads * _BOUNDS_BYTES

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
        tiles, own, held = self._sealed(plan, group, keys, values, group.settings)
        sets[:rows] = own[:rows]
        if held is not None:  # some row has several
            self._spread(rows, held, which, sets)
            crowded = [row for row in range(rows) if which[row].max() == 255]
            if crowded:  # there is no room for their sets: they get along without
                again = torch.tensor(crowded)
                plain = replace(group.settings, centering="none")
                tiles = tiles.copy()
                tiles[crowded], sets[crowded], _ = self._sealed(
                    plan, group, keys[again], values[again], plain
                )
                which[crowded] = 0
        norms = np.ascontiguousarray(tiles[..., -_NORM_BYTES:]).view("<u2")
        codes = np.ascontiguousarray(tiles[..., :-_NORM_BYTES])
        arrays = [which, self._dense(plan, sets), *self._short(group, norms), codes]
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

    def _spread(self, rows: int, held: CacheBytes, which: np.ndarray, sets: np.ndarray) -> None:
        """Puts further sets of rows into the room that there is; 255 where there is none."""
        spare = rows
        for row, own in enumerate(held.rows):
            numbers = {0: 0}
            sets[row] = np.frombuffer(held.sets[own.sets[0]], np.uint8)
            for local, number in enumerate(own.sets[1:], 1):
                if spare == len(sets):
                    numbers[local] = 255
                    continue
                sets[spare] = np.frombuffer(held.sets[number], np.uint8)
                numbers[local] = spare - rows + 1
                spare += 1
            which[row] = [numbers[tile.set] for tile in own.tiles]

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
        which, dense, norms, codes = np.split(whole, ends)
        tiles = np.empty((rows, blocks, heads, self._code_bytes(group) + _NORM_BYTES), np.uint8)
        tiles[..., :-_NORM_BYTES] = codes.reshape(rows, blocks, heads, -1)
        tiles[..., -_NORM_BYTES:] = self._long(group, norms, (rows, blocks, heads)).view(np.uint8)
        sets = self._wide(plan, dense)
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

    # Norms in 8 bits, and centres without what is not needed.

    def _short(self, group: _Group, norms: np.ndarray) -> list[np.ndarray]:
        """Norms [rows, blocks, heads, 2 · 64] FP16 as bits, as they are written.

        The bits of numbers that are not negative are as good as their logarithm, and exact on every
        machine. 0 stays 0.
        """
        widths = self._norm_widths(group)
        if widths[0] == 16:
            return [norms]
        rows, blocks, heads, _ = norms.shape
        numbers = norms.reshape(rows, blocks, heads, 2, TILE_TOKENS).astype(np.int32)
        most = numbers.max((1, 4), keepdims=True)
        least = np.where(numbers == 0, most, numbers).min((1, 4), keepdims=True)
        most_steps = np.array([_steps(width) for width in widths], np.float32)[:, None]
        steps = most_steps / np.maximum(most - least, 1).astype(np.float32)
        short = np.rint((numbers - least).astype(np.float32) * steps) + 1
        short[numbers == 0] = 0
        short = short.astype(np.uint8)
        bounds = np.concatenate([least, most], 1).astype("<u2")
        sides = (_packed(short[:, :, :, side], width) for side, width in enumerate(widths))
        return [bounds, *sides]

    def _long(self, group: _Group, data: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
        """Norms [rows, blocks, heads, 2 · 64] FP16 as bits, from what ``_short`` gave."""
        rows, blocks, heads = shape
        widths = self._norm_widths(group)
        if widths[0] == 16:
            return data.view("<u2").reshape(*shape, 2 * TILE_TOKENS)
        at = rows * heads * _BOUNDS_BYTES
        bounds = data[:at].view("<u2").reshape(rows, 2, heads, 2, 1).astype(np.int32)
        norms = np.empty((*shape, 2, TILE_TOKENS), "<u2")
        for side, width in enumerate(widths):
            end = at + rows * blocks * heads * TILE_TOKENS * width // 8
            short = _unpacked(data[at:end], width).reshape(*shape, TILE_TOKENS).astype(np.int32)
            at = end
            least, most = bounds[:, None, 0, :, side], bounds[:, None, 1, :, side]
            steps = _steps(width)
            numbers = least + ((short - 1) * (most - least) + steps // 2) // steps
            norms[:, :, :, side] = np.where(short == 0, 0, numbers)
        return norms.reshape(*shape, 2 * TILE_TOKENS)

    def _dense(self, plan: _Plan, sets: np.ndarray) -> np.ndarray:
        """Centre sets as they are written: of each head its kind and head_dim numbers."""
        heads, dim, pairs = plan.shape.heads, self.options.head_dim, self._pairs
        ends = np.cumsum([heads * 4 * dim, heads * 8 * pairs, heads * 4])
        constant, means, _, kinds = np.split(np.ascontiguousarray(sets), ends, axis=1)
        centres = np.ascontiguousarray(constant).view("<f4").reshape(len(sets), heads, dim).copy()
        turned = np.ascontiguousarray(means).view("<f4").reshape(len(sets), heads, 2 * pairs)
        # What is turned is in no constant.
        centres[..., : 2 * pairs] += turned
        written = np.empty((len(sets), heads, 1 + 2 * dim), np.uint8)
        written[..., 0] = kinds
        written[..., 1:] = centres.astype("<f2").view(np.uint8)
        return written

    def _wide(self, plan: _Plan, dense: np.ndarray) -> np.ndarray:
        """Centre sets as a cache has them."""
        heads, dim, pairs = plan.shape.heads, self.options.head_dim, self._pairs
        dense = dense.reshape(-1, heads, 1 + 2 * dim)
        kinds = dense[..., 0]
        centres = np.ascontiguousarray(dense[..., 1:]).view("<f2").astype("<f4")
        turned = np.where((kinds == _ROPE)[..., None], centres[..., : 2 * pairs], 0)
        constant = centres.copy()
        constant[..., : 2 * pairs] -= turned
        parts = [constant, turned.astype("<f4"), np.zeros((len(dense), heads), "<f4"), kinds]
        flat = [np.ascontiguousarray(p).reshape(len(dense), -1).view(np.uint8) for p in parts]
        return np.concatenate(flat, 1)


_COUNTS = 8 + 4 + 4 + 4
"""Bytes between a preamble and the centre sets, beside the blocks': tokens, and three counts."""
_BLOCK_BYTES = 8 + 8 + 4
_BOUNDS_BYTES = 2 * 2 * 2
"""Of a head: the least and the largest norm of its keys, and of its values, in FP16."""
_ROPE = CENTERINGS.index("rope")


def _steps(width: int) -> int:
    """Steps between the least and the largest norm that bits have numbers for; 0 is a norm of 0."""
    return (1 << width) - 2


def _packed(numbers: np.ndarray, width: int) -> np.ndarray:
    """Numbers of `width` bits, 4 or 8, of an even count in the last axis."""
    return numbers if width == 8 else numbers[..., ::2] | numbers[..., 1::2] << 4


def _unpacked(data: np.ndarray, width: int) -> np.ndarray:
    """What was packed, in one row."""
    return data if width == 8 else np.stack([data & 15, data >> 4], -1).reshape(-1)


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
