"""Lattices as codebooks: what vector quantisers with a table of points reach, beside tqai's codes.

A codebook of b bits is the 2^(b·n) points of D4 or E8 that are nearest to a place between them,
times a scale that suits independent normal numbers (Conway and Sloane, Sphere Packings, ch. 2 and
4; E8 at 2 bits is what QuIP# rounds weights to, arXiv:2402.04396).
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np

Lattice = Literal["D4", "E8"]

DIMENSION: dict[Lattice, int] = {"D4": 4, "E8": 8}

# Least squared error of 5000 normal vectors and more, by search; bits from 1. What would come next
# has more points than can be looked through.
_SCALES: dict[Lattice, tuple[float, ...]] = {"D4": (1.289, 0.822, 0.475, 0.262), "E8": (1.6, 0.981)}
# Of no symmetry, so that no two points are equally far from it: which ones belong to the codebook
# would be arbitrary. The errors of deep holes and of points of the lattice are within 3 % of this
# one's (D4 at 1 bit: 13 % more around a point).
_CENTRE = (0.2931, 0.2043, 0.1171, 0.0517, 0.3893, 0.1439, 0.2677, 0.0213)
# Distances of one block of vectors to all points: 64 MB.
_BLOCK = 2**24


def most_bits(lattice: Lattice) -> int:
    return len(_SCALES[lattice])


@cache
def codebook(lattice: Lattice, bits: int) -> np.ndarray:
    """[2^(bits·n), n] float32, n being the lattice's dimension; scaled for normal numbers."""
    dimension = DIMENSION[lattice]
    count = 2 ** (bits * dimension)
    centre = np.array(_CENTRE[:dimension])
    # A ball of as much volume as that many points have, and a little more.
    volume = {"D4": 2.0 * 2 / np.pi**2, "E8": 24 / np.pi**4}[lattice]
    radius = (count * volume) ** (1 / dimension) + 0.6
    points = _d4(centre, radius) if lattice == "D4" else _e8(centre, radius)
    far = np.square(points).sum(1)
    assert len(points) >= count
    nearest = points[np.argsort(far, kind="stable")[:count]]
    return (nearest * _SCALES[lattice][bits - 1]).astype(np.float32)


def quantised(lattice: Lattice, bits: int, x: np.ndarray) -> np.ndarray:
    """Unit vectors x [rows, d] with each run of the lattice's dimension as its nearest point, which
    is found by looking at all of them.

    Raises:
        ValueError: for a d that does not consist of such runs.
    """
    dimension = DIMENSION[lattice]
    rows, d = x.shape
    if d % dimension:
        raise ValueError(f"d={d}: expected a multiple of {dimension}, for {lattice}")
    points = codebook(lattice, bits)
    half_norms = np.square(points).sum(1) / 2
    # As large as normal numbers are.
    runs = (x * np.sqrt(d)).astype(np.float32).reshape(-1, dimension)
    found = np.empty_like(runs)
    step = max(1, _BLOCK // len(points))
    for at in range(0, len(runs), step):
        nearest = (runs[at : at + step] @ points.T - half_norms).argmax(1)
        found[at : at + step] = points[nearest]
    return found.reshape(rows, d) / np.sqrt(d)


def _d4(centre: np.ndarray, radius: float) -> np.ndarray:
    """Whole numbers of an even sum, less `centre`, within a radius."""
    points, odd = _grid(centre, 0.0, radius)
    return points[~odd]


def _e8(centre: np.ndarray, radius: float) -> np.ndarray:
    """The same in 8 dimensions, and all of it moved by ½ in each."""
    parts = []
    for offset in (0.0, 0.5):
        (left, left_odd), (right, right_odd) = (
            _grid(half, offset, radius) for half in (centre[:4], centre[4:])
        )
        far = np.square(left).sum(1)[:, None] + np.square(right).sum(1)
        i, j = np.nonzero((far <= radius**2) & (left_odd[:, None] == right_odd))
        parts.append(np.concatenate([left[i], right[j]], 1))
    return np.concatenate(parts)


def _grid(centre: np.ndarray, offset: float, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers [n, 4] plus `offset` less `centre`, within a radius, and whether their sums
    were odd before."""
    reach = int(radius) + 1
    line = np.arange(-reach, reach + 1)
    whole = np.stack(np.meshgrid(*[line] * 4, indexing="ij"), -1).reshape(-1, 4)
    points = whole + (offset - centre)
    near = np.square(points).sum(1) <= radius**2
    return points[near], whole[near].sum(1) % 2 == 1
