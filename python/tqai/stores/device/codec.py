"""Vectors to tiles and back: the same bytes as the C++ library's, in operations on arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from tqai import _core
from tqai.stores.device import native_codes
from tqai.stores.device.operations import Array, Operations
from tqai.stores.device.packing import (
    TILE_TOKENS,
    pack_keys,
    pack_values,
    padded_dim,
    unpack_key_paths,
    unpack_keys,
    unpack_values,
)
from tqai.stores.device.phasors import RopeOptions

MAX_NORM: float = _core.KvCache.max_norm
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number of each of ``tqai.settings.DTYPES``."""
_MAX_HALF = 65504.0
_LEAST_NORMAL_HALF = 2.0**-14
_LEAST_HALF = 2.0**-24


@dataclass(frozen=True)
class Options:
    """What a cache is made with; the arguments of ``_core.KvCache`` but for the batch."""

    kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: str
    """Of the exact tokens, one of ``tqai.settings.DTYPES``."""
    bits_k: int
    bits_v: int
    sink_tokens: int
    residual_window: int
    rotation: str
    centering: str
    rope: RopeOptions | None
    seed: int = 0x74616971  # tqai::CacheOptions::seed
    value_codes: str = "scalar"
    """Or "trellis"."""
    key_basis: _core.KeyBasis | None = None
    """What keys are quantised in; None: a rotation."""
    key_codes: str = "scalar"
    """Or "trellis", of keys in a basis."""

    @property
    def of_codes(self) -> dict[str, Any]:
        """Those arguments of ``_core.KvCache`` that decide what codes are."""
        return {
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "value_head_dim": self.value_head_dim,
            "bits_k": self.bits_k,
            "bits_v": self.bits_v,
            "rotation": self.rotation,
            "seed": self.seed,
            "value_codes": self.value_codes,
            "key_basis": self.key_basis,
            "key_codes": self.key_codes,
        }


class Side(NamedTuple):
    """How the keys or the values of a cache are coded."""

    ops: Operations
    dim: int
    bits: int
    keys: bool
    rotation: Array
    """R [dim, dim], of y = R x; of keys in a basis Fᵀ [kv_heads, dim, dim]. What codes stand for is
    y R, and q Rᵀ is what a query is multiplied with them by."""
    boundaries: Array
    """[2^bits − 1]: code i is nearest from boundary i − 1 up to boundary i."""
    centroids: Array
    """[2^bits]; of a trellis [256], by window, and of keys' [64]."""
    step: float
    longest: float
    """Length up to which FP16 holds the stored norm of any vector (src/cache/codec.cpp)."""
    shifts: Array
    """0…7 in uint8."""
    trellis: bool
    """Whether a code's level goes by those before it too."""
    start: int
    """Of keys in trellis codes: what stands below the first code's bits."""
    packed_bytes: int
    """Of a tile's codes. No property: torch 2.6 traces none of a tuple's."""

    def encode(self, vectors: Array) -> tuple[Array, Array]:
        """[..., 64, dim] float32 to codes [..., packed_bytes] uint8 and norms [..., 64] float16."""
        ops = self.ops
        lengths = ops.vector_norm(vectors)
        inverse = ops.where(lengths > 0, 1.0 / lengths, 0.0)
        turned = (vectors * inverse[..., None]) @ self.rotation.mT
        codes = self._nearest(turned)
        # Norm correction: the reconstruction gets the length of the original.
        unit = self._length(codes)
        norms = ops.clip(ops.where(unit > 0, lengths / unit, 0.0), None, _MAX_HALF)
        small = (norms > 0) & (norms < _LEAST_NORMAL_HALF)
        if bool(small.any()):
            codes, norms = self._small(turned, lengths, codes, norms, small)
        codes = ops.pad(codes, 0, padded_dim(self.dim) - self.dim)
        pack = pack_keys if self.keys else pack_values
        return pack(ops, codes, self.bits), ops.astype(norms, ops.float16)

    def _small(
        self, turned: Array, lengths: Array, codes: Array, norms: Array, small: Array
    ) -> tuple[Array, Array]:
        """Codes and norms where FP16 has few bits for a norm.

        It is rounded down, up, or to 0, and the codes make up for it, whichever is nearest
        (src/kernels/encode-inl.hpp).
        """
        ops = self.ops
        least, steps = ops.astype(small, ops.float32), ops.floor(norms / _LEAST_HALF)
        best_codes, best_norms = codes, ops.where(small, 0.0, norms)
        for rounded in (steps * _LEAST_HALF, (steps + 1) * _LEAST_HALF):
            factor = ops.where(rounded > 0, norms / rounded, 0.0)
            tried = self._nearest(turned * factor[..., None])
            share = rounded / lengths
            rest = turned - self._centroids_of(tried) * share[..., None]
            distance = rest.square().sum(-1)
            nearer = small & (rounded > 0) & (distance < least)
            least = ops.where(nearer, distance, least)
            best_codes = ops.where(nearer[..., None], tried, best_codes)
            best_norms = ops.where(nearer, rounded, best_norms)
        return best_codes, best_norms

    def _nearest(self, coordinates: Array) -> Array:
        """Codes uint8 of rotated coordinates of unit vectors."""
        if self.bits == 8:  # uniform: level i is i − 128
            levels = self.ops.clip(coordinates * (1.0 / self.step) + 128.5, 0.0, 255.0)
            return self.ops.astype(levels, self.ops.uint8)
        return self.ops.searchsorted(self.boundaries, coordinates)

    def _length(self, codes: Array) -> Array:
        """Length of what codes [..., dim] stand for."""
        return self.ops.vector_norm(self._centroids_of(codes))

    def _centroids_of(self, codes: Array) -> Array:
        return self.ops.take(self.centroids, codes)

    def look_up(self, packed: Array) -> Array:
        """Codes [..., tiles, packed_bytes] to rotated unit vectors [..., tiles · 64, dim]."""
        if self.keys and self.trellis:
            codes = unpack_key_paths(self.ops, packed, self.bits, self.shifts, self.start)
        elif self.keys:
            codes = unpack_keys(self.ops, packed, self.bits, self.shifts)
        else:
            codes = unpack_values(self.ops, packed, self.bits, self.shifts, self.trellis)
        codes = codes[..., : self.dim]
        *lead, tiles, tokens, dim = codes.shape
        return self._centroids_of(codes.reshape(*lead, tiles * tokens, dim))


class Codec(NamedTuple):
    """Both sides, and where a tile's parts lie: key codes, value codes, key and value norms."""

    key: Side
    value: Side
    native: dict[str, Any] | None
    """Arguments of ``native_codes.encode``, where the C++ library finds the codes."""

    @property
    def tile_bytes(self) -> int:
        return self.key.packed_bytes + self.value.packed_bytes + 4 * TILE_TOKENS

    def encode(self, keys: Array, values: Array) -> Array:
        """[rows, kv_heads, tiles · 64, dim] float32, keys less their centre, to [rows, kv_heads,
        tiles, tile_bytes]."""
        if self.native is not None:
            return native_codes.encode(self.key.ops, self.native, keys, values, self.tile_bytes)
        parts, norms = [], []
        for side, vectors in ((self.key, keys), (self.value, values)):
            *lead, tokens, dim = vectors.shape
            tiles = vectors.reshape(*lead, tokens // TILE_TOKENS, TILE_TOKENS, dim)
            codes, lengths = side.encode(tiles)
            parts.append(codes)
            norms.append(side.ops.view(lengths, side.ops.uint8))
        return self.key.ops.concat([*parts, *norms], -1)

    def longest(self, centering: str) -> tuple[float, float]:
        """Norms of keys and of values up to which they are compressed.

        Less its centre, which is no longer than such keys, a key may be twice as long.
        """
        key = self.key.longest * (1.0 if centering == "none" else 0.5)
        return min(MAX_NORM, key), min(MAX_NORM, self.value.longest)

    def split(self, tiles: Array) -> tuple[Array, ...]:
        """Key codes, value codes [..., tiles, bytes], key norms, value norms [..., tiles · 64]."""
        ops, keys = self.key.ops, self.key.packed_bytes
        values = keys + self.value.packed_bytes
        *lead, count, _ = tiles.shape
        lengths = ops.astype(ops.view(tiles[..., values:], ops.float16), ops.float32)
        norms = (
            part.reshape(*lead, count * TILE_TOKENS)
            for part in (lengths[..., :TILE_TOKENS], lengths[..., TILE_TOKENS:])
        )
        return (tiles[..., :keys], tiles[..., keys:values], *norms)


@lru_cache(maxsize=256)
def codec_of(options: Options, ops: Operations) -> Codec:
    """The codec of caches with these options, its tables on the operations' device.

    Raises:
        ValueError: for options out of range.
    """
    template = _core.KvCache(
        batch=1,
        sink_tokens=options.sink_tokens,
        residual_window=options.residual_window,
        centering=options.centering,
        rope=options.rope,
        **{**options.of_codes, "key_basis": None, "key_codes": "scalar"},
    )
    key_rotation, value_rotation = template.rotations
    basis, trellis = options.key_basis, options.value_codes == "trellis"
    if basis is not None:
        _core.KvCache(batch=1, **options.of_codes)  # which is checked
        synthesis = [basis.matrices(head)[2] for head in range(options.kv_heads)]
        key_rotation = np.stack(synthesis).swapaxes(1, 2)
    key = _side(ops, options.head_dim, options.bits_k, True, key_rotation)
    if basis is not None:
        key = key._replace(longest=_longest_in_basis(key, basis))
        if options.key_codes == "trellis":
            key = _in_paths(key, basis)
    value = _side(ops, options.value_head_dim, options.bits_v, False, value_rotation)
    if trellis:
        value = _in_trellis(value)
    return Codec(key, value, options.of_codes if trellis or basis is not None else None)


def _side(ops: Operations, dim: int, bits: int, keys: bool, rotation: np.ndarray) -> Side:
    book = _core.Codebook(dim, bits, "int8")
    arrays = rotation, book.boundaries, book.centroids, np.arange(8, dtype=np.uint8)
    *tables, shifts = map(ops.asarray, map(np.ascontiguousarray, arrays))
    # Of a vector along one rotated axis: the outermost level once, else the innermost.
    outermost = min(-float(book.centroids[0]), float(book.centroids[-1]))
    innermost = float(np.abs(book.centroids).min())
    longest = 0.999 * _MAX_HALF * math.sqrt(outermost**2 + (dim - 1) * innermost**2)
    packed = padded_dim(dim) * bits * (TILE_TOKENS // 8)
    return Side(ops, dim, bits, keys, *tables, book.step, longest, shifts, False, 0, packed)


def _in_trellis(side: Side) -> Side:
    tables = _core.Trellis(side.bits)
    step = np.float32(tables.step(side.dim))
    levels = tables.levels.astype(np.float32) * step
    # The other coordinates may all be 0 (src/cache/codec.cpp).
    longest = 0.999 * _MAX_HALF * float(levels.max())
    return side._replace(
        centroids=side.ops.asarray(levels), step=float(step), longest=longest, trellis=True
    )


def _in_paths(side: Side, basis: _core.KeyBasis) -> Side:
    tables = _core.KeyTrellis(side.bits)
    step = np.float32(tables.step(side.dim))
    # Of the shortest path (src/cache/codec.cpp), found as Viterbi does.
    levels, states = tables.levels.astype(np.int64), len(tables.levels) >> side.bits
    squares = np.where(np.arange(states) == tables.start, 0, np.iinfo(np.int64).max // 2)
    for _ in range(side.dim):
        ends = np.tile(squares, len(levels) // states) + levels**2
        squares = ends.reshape(states, -1).min(axis=1)
    shortest = float(step) * math.sqrt(max(int(squares.min()), 1))
    longest = _MAX_HALF * shortest / basis.largest_ratio
    return side._replace(
        centroids=side.ops.asarray(tables.levels.astype(np.float32) * step),
        step=float(step),
        longest=longest,
        trellis=True,
        start=tables.start,
    )


def _longest_in_basis(side: Side, basis: _core.KeyBasis) -> float:
    """As src/cache/context.hpp has it."""
    levels = np.abs(_core.Codebook(side.dim, side.bits, "int8").levels.astype(np.int64))
    innermost = int(levels.min())
    shortest = side.step * (1.0 if innermost == 0 else innermost * math.sqrt(side.dim))
    return _MAX_HALF * shortest / basis.largest_ratio
