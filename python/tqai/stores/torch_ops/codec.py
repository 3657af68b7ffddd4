"""Vectors to tiles and back: the same bytes as the C++ library's, in torch operations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from tqai import _core
from tqai.stores.torch_ops.packing import (
    TILE_TOKENS,
    pack_keys,
    pack_values,
    padded_dim,
    unpack_keys,
    unpack_values,
)
from tqai.stores.torch_ops.phasors import RopeOptions

MAX_NORM: float = _core.KvCache.max_norm
_MAX_HALF = 65504.0
_LEAST_NORMAL_HALF = 2.0**-14
_LEAST_HALF = 2.0**-24


@dataclass(frozen=True)
class Options:
    """What a cache is made with; the arguments of ``_core.KvCache`` but for the batch."""

    kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: torch.dtype
    bits_k: int
    bits_v: int
    sink_tokens: int
    residual_window: int
    rotation: str
    centering: str
    rope: RopeOptions | None
    seed: int = 0x74616971  # tqai::CacheOptions::seed


class Side(NamedTuple):
    """How the keys or the values of a cache are coded."""

    dim: int
    bits: int
    keys: bool
    rotation: torch.Tensor
    """R [dim, dim], of y = R x."""
    boundaries: torch.Tensor
    """[2^bits − 1]: code i is nearest from boundary i − 1 up to boundary i."""
    centroids: torch.Tensor
    """[2^bits]"""
    step: float
    longest: float
    """Length up to which FP16 holds the stored norm of any vector (src/cache/codec.cpp)."""
    shifts: torch.Tensor
    """0…7 in uint8."""

    @property
    def packed_bytes(self) -> int:
        """Bytes of a tile's codes."""
        return padded_dim(self.dim) * self.bits * (TILE_TOKENS // 8)

    def encode(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., 64, dim] float32 to codes [..., packed_bytes] uint8 and norms [..., 64] float16."""
        lengths = torch.linalg.vector_norm(vectors, dim=-1)
        inverse = torch.where(lengths > 0, 1.0 / lengths, 0.0)
        turned = (vectors * inverse[..., None]) @ self.rotation.mT
        codes = self._nearest(turned)
        # Norm correction: the reconstruction gets the length of the original.
        unit = self._length(codes)
        norms = torch.where(unit > 0, lengths / unit, 0.0).clamp(max=_MAX_HALF)
        small = (norms > 0) & (norms < _LEAST_NORMAL_HALF)
        if bool(small.any()):
            codes, norms = self._small(turned, lengths, codes, norms, small)
        codes = torch.nn.functional.pad(codes, (0, padded_dim(self.dim) - self.dim))
        pack = pack_keys if self.keys else pack_values
        return pack(codes, self.bits), norms.to(torch.float16)

    def _small(
        self,
        turned: torch.Tensor,
        lengths: torch.Tensor,
        codes: torch.Tensor,
        norms: torch.Tensor,
        small: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and norms where FP16 has few bits for a norm.

        It is rounded down, up, or to 0, and the codes make up for it, whichever is nearest
        (src/kernels/encode-inl.hpp).
        """
        least, steps = torch.ones_like(norms), (norms / _LEAST_HALF).floor()
        best_codes, best_norms = codes, torch.where(small, 0.0, norms)
        for rounded in (steps * _LEAST_HALF, (steps + 1) * _LEAST_HALF):
            factor = torch.where(rounded > 0, norms / rounded, 0.0)
            tried = self._nearest(turned * factor[..., None])
            share = rounded / lengths
            rest = turned - self.centroids[tried.int()] * share[..., None]
            distance = rest.square().sum(-1)
            nearer = small & (rounded > 0) & (distance < least)
            least = torch.where(nearer, distance, least)
            best_codes = torch.where(nearer[..., None], tried, best_codes)
            best_norms = torch.where(nearer, rounded, best_norms)
        return best_codes, best_norms

    def _nearest(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Codes uint8 of rotated coordinates of unit vectors."""
        if self.bits == 8:  # uniform: level i is i − 128
            return (coordinates * (1.0 / self.step) + 128.5).clamp(0.0, 255.0).to(torch.uint8)
        return torch.bucketize(coordinates, self.boundaries, right=True).to(torch.uint8)

    def _length(self, codes: torch.Tensor) -> torch.Tensor:
        """Length of what codes [..., dim] stand for."""
        return torch.linalg.vector_norm(self.centroids[codes.int()], dim=-1)

    def look_up(self, packed: torch.Tensor) -> torch.Tensor:
        """Codes [..., tiles, packed_bytes] to rotated unit vectors [..., tiles · 64, dim]."""
        unpack = unpack_keys if self.keys else unpack_values
        codes = unpack(packed, self.bits, self.shifts)[..., : self.dim].flatten(-3, -2)
        return self.centroids[codes.int()]


class Codec(NamedTuple):
    """Both sides, and where a tile's parts lie: key codes, value codes, key and value norms."""

    key: Side
    value: Side

    @property
    def tile_bytes(self) -> int:
        return self.key.packed_bytes + self.value.packed_bytes + 4 * TILE_TOKENS

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[..., tiles · 64, dim] float32, keys less their centre, to [..., tiles, tile_bytes]."""
        parts, norms = [], []
        for side, vectors in ((self.key, keys), (self.value, values)):
            codes, lengths = side.encode(vectors.unflatten(-2, (-1, TILE_TOKENS)))
            parts.append(codes)
            norms.append(lengths.contiguous().view(torch.uint8))
        return torch.cat([*parts, *norms], dim=-1)

    def longest(self, centering: str) -> tuple[float, float]:
        """Norms of keys and of values up to which they are compressed.

        Less its centre, which is no longer than such keys, a key may be twice as long.
        """
        key = self.key.longest * (1.0 if centering == "none" else 0.5)
        return min(MAX_NORM, key), min(MAX_NORM, self.value.longest)

    def split(self, tiles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Key codes, value codes [..., tiles, bytes], key norms, value norms [..., tiles · 64]."""
        codes = self.key.packed_bytes, self.value.packed_bytes
        *packed, norms = tiles.split([*codes, 4 * TILE_TOKENS], dim=-1)
        lengths = norms.contiguous().view(torch.float16).float()
        key_norms, value_norms = lengths.split(TILE_TOKENS, dim=-1)
        return (*packed, key_norms.flatten(-2), value_norms.flatten(-2))


@lru_cache(maxsize=256)
def codec_of(options: Options, device: torch.device) -> Codec:
    """The codec of caches with these options, its tables on `device`.

    Raises:
        ValueError: for options out of range.
    """
    template = _core.KvCache(
        batch=1,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        value_head_dim=options.value_head_dim,
        bits_k=options.bits_k,
        bits_v=options.bits_v,
        sink_tokens=options.sink_tokens,
        residual_window=options.residual_window,
        rotation=options.rotation,
        centering=options.centering,
        rope=options.rope,
        seed=options.seed,
    )
    key_rotation, value_rotation = template.rotations
    dims = options.head_dim, options.value_head_dim
    key = _side(dims[0], options.bits_k, True, key_rotation, device)
    return Codec(key, _side(dims[1], options.bits_v, False, value_rotation, device))


def _side(dim: int, bits: int, keys: bool, rotation: np.ndarray, device: torch.device) -> Side:
    book = _core.Codebook(dim, bits, "int8")
    arrays = rotation, book.boundaries, book.centroids, np.arange(8, dtype=np.uint8)
    *tables, shifts = (torch.from_numpy(array).to(device) for array in arrays)
    # Of a vector along one rotated axis: the outermost level once, else the innermost.
    outermost = min(-float(book.centroids[0]), float(book.centroids[-1]))
    innermost = float(np.abs(book.centroids).min())
    longest = 0.999 * _MAX_HALF * math.sqrt(outermost**2 + (dim - 1) * innermost**2)
    return Side(dim, bits, keys, *tables, book.step, longest, shifts)
