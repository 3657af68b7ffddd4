"""What a chunk keeps of a cache's norms and centres: fewer bits, and none that are not needed."""

from __future__ import annotations

import numpy as np

from tqai.exchange.cache_bytes import TILE_TOKENS
from tqai.settings import CENTERINGS

_BOUNDS_BYTES = 2 * 2 * 2
"""Of a head: the least and the largest norm of its keys, and of its values, in FP16."""
_ROPE = CENTERINGS.index("rope")


def norms_bytes(rows: int, heads: int, tokens: int, widths: tuple[int, int]) -> int:
    """How many ``short_norms`` gives; `widths`: bits of a norm of the keys, and of the values."""
    norms = rows * heads * tokens * sum(widths) // 8
    return norms if widths[0] == 16 else norms + rows * heads * _BOUNDS_BYTES


def short_norms(norms: np.ndarray, widths: tuple[int, int]) -> list[np.ndarray]:
    """Norms [rows, blocks, heads, 2 · 64] FP16 as bits, as they are written.

    The bits of numbers that are not negative are as good as their logarithm, and exact on every
    machine. 0 stays 0.
    """
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


def long_norms(
    data: np.ndarray, shape: tuple[int, int, int], widths: tuple[int, int]
) -> np.ndarray:
    """Norms [rows, blocks, heads, 2 · 64] FP16 as bits, from what ``short_norms`` gave."""
    rows, blocks, heads = shape
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


def centres_bytes(heads: int, dim: int) -> int:
    """A set's kind and centre of each head; the energy that it left is not needed again."""
    return heads * (1 + 2 * dim)


def short_centres(sets: np.ndarray, heads: int, dim: int, pairs: int) -> np.ndarray:
    """A cache's sets [sets, bytes], of `pairs` turned pairs, as they are written."""
    ends = np.cumsum([heads * 4 * dim, heads * 8 * pairs, heads * 4])
    constant, means, _, kinds = np.split(np.ascontiguousarray(sets), ends, axis=1)
    centres = np.ascontiguousarray(constant).view("<f4").reshape(len(sets), heads, dim).copy()
    turned = np.ascontiguousarray(means).view("<f4").reshape(len(sets), heads, 2 * pairs)
    # What is turned is in no constant.
    centres[..., : 2 * pairs] += turned
    written = np.empty((len(sets), heads, centres_bytes(1, dim)), np.uint8)
    written[..., 0] = kinds
    written[..., 1:] = centres.astype("<f2").view(np.uint8)
    return written


def long_centres(written: np.ndarray, heads: int, dim: int, pairs: int) -> np.ndarray:
    """Sets as a cache has them, [sets, bytes], from what ``short_centres`` gave."""
    written = written.reshape(-1, heads, centres_bytes(1, dim))
    kinds = written[..., 0]
    centres = np.ascontiguousarray(written[..., 1:]).view("<f2").astype("<f4")
    turned = np.where((kinds == _ROPE)[..., None], centres[..., : 2 * pairs], 0)
    constant = centres.copy()
    constant[..., : 2 * pairs] -= turned
    parts = [constant, turned.astype("<f4"), np.zeros((len(written), heads), "<f4"), kinds]
    flat = [np.ascontiguousarray(p).reshape(len(written), -1).view(np.uint8) for p in parts]
    return np.concatenate(flat, 1)


def _steps(width: int) -> int:
    """Steps between the least and the largest norm that bits have numbers for; 0 is a norm of 0."""
    return (1 << width) - 2


def _packed(numbers: np.ndarray, width: int) -> np.ndarray:
    """Numbers of `width` bits, 4 or 8, of an even count in the last axis."""
    return numbers if width == 8 else numbers[..., ::2] | numbers[..., 1::2] << 4


def _unpacked(data: np.ndarray, width: int) -> np.ndarray:
    """What was packed, in one row."""
    return data if width == 8 else np.stack([data & 15, data >> 4], -1).reshape(-1)
