"""Lattices as codebooks: that they are these lattices, and what they reach."""

from __future__ import annotations

import numpy as np
import pytest
from tqai.measure import lattices
from tqai.measure.lattices import _d4, _e8, codebook, quantised

# Of Lloyd–Max's quantiser of a normal number.
SCALAR = (0.3634, 0.1175, 0.03454, 0.00950)


def test_neighbours_are_as_many_as_they_are_known_to_be() -> None:
    for points, shells in (
        (_d4(np.zeros(4), 2.1), (1, 24, 24)),
        (_e8(np.zeros(8), 2.1), (1, 240, 2160)),
    ):
        far = np.square(points).sum(1)
        assert np.unique(far).tolist() == [0, 2, 4]
        assert np.unique(far, return_counts=True)[1].tolist() == list(shells)
        # Of a lattice: sums of points are points, so that no two are nearer than √2.
        few = points[far <= 2]
        apart = np.square(few[:, None] - few).sum(2)
        assert apart[apart > 0].min() == 2


@pytest.mark.parametrize(
    ("lattice", "bits"), [("D4", 1), ("D4", 2), ("D4", 3), ("E8", 1), ("E8", 2)]
)
def test_codebooks(lattice: lattices.Lattice, bits: int) -> None:
    points = codebook(lattice, bits)
    dimension = lattices.DIMENSION[lattice]
    assert points.shape == (2 ** (bits * dimension), dimension)
    assert len(np.unique(points, axis=0)) == len(points)
    # The nearest ones: none that is left out is nearer than the farthest of them.
    scale = lattices._SCALES[lattice][bits - 1]
    centre = np.array(lattices._CENTRE[:dimension])
    farthest = np.linalg.norm(points, axis=1).max() / scale
    wider = (_d4 if lattice == "D4" else _e8)(centre, farthest * (1 + 1e-6))
    assert len(points) <= len(wider) < len(points) * 1.001


def test_the_nearest_point_is_taken() -> None:
    x = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    found = quantised("E8", 1, x).reshape(-1, 8) * 4
    for run, point in zip(x.reshape(-1, 8) * 4, found, strict=True):
        errors = np.square(codebook("E8", 1) - run).sum(1)
        assert np.square(point - run).sum() == pytest.approx(errors.min(), rel=1e-4)


@pytest.mark.parametrize(
    ("lattice", "bits", "share"),
    [("D4", 1, 1.01), ("D4", 2, 0.87), ("D4", 3, 0.87), ("E8", 1, 0.90), ("E8", 2, 0.78)],
)
def test_errors(lattice: lattices.Lattice, bits: int, share: float) -> None:
    """On d = 512, whose coordinates are nearly normal."""
    x = np.random.default_rng(1).standard_normal((2**17 >> (9 if bits < 3 else 11), 512))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    error = float(np.square(x - quantised(lattice, bits, x)).sum(1).mean())
    assert error / SCALAR[bits - 1] == pytest.approx(share, abs=0.025)
    assert error > 4.0**-bits


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="d=12: expected a multiple of 8, for E8"):
        quantised("E8", 1, np.zeros((1, 12), np.float32))
