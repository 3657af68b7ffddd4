"""The synthetic results of TurboQuant (arXiv:2504.19874) on this machine: what its two quantisers
do to random unit vectors, beside the paper's numbers and bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tqai import _core
from tqai.measure import lattices
from tqai.measure.lattices import Lattice
from tqai.settings import ROTATIONS, Rotation

# What the paper prints beside Theorems 1 and 2 for 1 to 4 bits; the latter times the dimension.
_PAPER_ERROR = (0.36, 0.117, 0.03, 0.009)
_PAPER_PRODUCT = (1.57, 0.56, 0.18, 0.047)

_MOST_TRELLIS_BITS = 4

# Vectors of each part that lattices quantise, by looking at all of up to 65536 points.
_LATTICE_VECTORS = 2
_LATTICES: tuple[Lattice, ...] = ("D4", "E8")

# Distortion of Lloyd–Max quantisers of a Gaussian, which the sphere's law tends to (J. Max, 1960).
_GAUSSIAN_ERROR = {3: 0.03455, 4: 0.00950}


@dataclass(frozen=True)
class Quantity:
    """A mean squared error."""

    measured: float
    standard_error: float
    expected: float
    """What the exact law on the sphere gives, by integration."""
    paper: float | None
    """As the paper prints it, for a large dimension; None where it prints none."""
    lower_bound: float
    upper_bound: float


@dataclass(frozen=True)
class Estimate:
    """A mean squared error that no integral gives."""

    measured: float
    standard_error: float


@dataclass(frozen=True)
class Bias:
    """Slope of an estimate's error over the true inner product: −1 is an estimate of nothing."""

    measured: float
    standard_error: float
    expected: float


@dataclass(frozen=True)
class Row:
    """One number of bits. Errors of inner products are those of unit queries and unit vectors."""

    bits: int
    error: Quantity
    """‖x − x̂‖² of the mse quantiser."""
    error_int8: Quantity
    """The same with the centroids on the integer grid that the cache's kernels multiply on."""
    error_trellis: Estimate | None
    """The same with trellis codes on that grid; None where there are none of so many bits."""
    error_d4: Estimate | None
    """Of the 2^(4·bits) points of the lattice D4 that are nearest to its centre, on some of the
    vectors; None where they are too many to look at, or d is no multiple of 4."""
    error_e8: Estimate | None
    """The same of the lattice E8, in 8 dimensions."""
    product_mse: Quantity
    """(⟨y, x⟩ − ⟨y, x̂⟩)² of the mse quantiser."""
    bias_mse: Bias
    product_prod: Quantity
    """The same of the prod quantiser."""
    bias_prod: Bias


@dataclass(frozen=True)
class Reproduction:
    head_dim: int
    rotation: str
    """The one used: hadamard or haar."""
    vectors: int
    queries: int
    projections: int
    seed: int
    rows: list[Row]

    def notes(self) -> list[str]:
        """Where the bounds come from, and why a figure is not the paper's."""
        d = self.head_dim
        notes = [
            "Bounds of arXiv:2504.19874: no quantiser has a squared error below 4^−b on its worst "
            "vector, nor below 4^−b/d for inner products (Theorem 3); the mse quantiser's is at "
            "most √3π/2·4^−b (Theorem 1), prod's for inner products √3π²/d·4^−b (Theorem 2).",
            "For inner products with queries uniform on the sphere, the mse quantiser's squared "
            "error is that of the vector over d, and so is its bound. That is a mean over queries: "
            "its bias grows with the inner product. Theorem 2 holds for every query.",
            "Bias is the slope of an estimate's error over the true inner product. The mse "
            "quantiser's is minus its squared error: 2/π − 1 at 1 bit for large d. prod's is 0 "
            "over projection seeds; any single projection leaves a little.",
            "The paper's values are rounded, and for large d, where a coordinate is Gaussian: its "
            f"0.03 at 3 bits is {_GAUSSIAN_ERROR[3]:.4f}, its 0.009 at 4 bits "
            f"{_GAUSSIAN_ERROR[4]:.4f}, and its 0.047/d for prod at 4 bits, π/2 times the rounded "
            f"0.03, is {math.pi / 2 * _GAUSSIAN_ERROR[3]:.3f}/d.",
            f"At d = {d} a coordinate's law on the sphere has lighter tails than the Gaussian, so "
            "that the squared error is lower. prod's for inner products is (π/2 − 1/d)/d times the "
            "squared error at one bit less; the paper's bound has no 1/d, as it drops a term of "
            "the projection's variance.",
        ]
        if any(row.error_trellis for row in self.rows):
            notes.append(
                "Trellis codes are tqai's, not the paper's: a code's level goes by the 8 bits that "
                "end with its own. Their cells have many dimensions: Lloyd–Max's error is no bound."
            )
        if any(row.error_d4 or row.error_e8 for row in self.rows):
            notes.append(
                "D4 and E8: the points of these lattices that are nearest to a place between them, "
                "as many as a table of so many bits for 4 or 8 coordinates has, up to 65536. They "
                f"were measured on {_LATTICE_VECTORS} vectors of each part, within "
                f"{100 * self._lattice_uncertainty():.1f} % (standard error)."
            )
        above = [str(r.bits) for r in self.rows if r.error_int8.expected > r.error.upper_bound]
        if above:
            notes.append(
                "Theorem 1 is about the best centroids. The int8 grid's are above its bound at "
                f"{' and '.join(above)} bits, as they lie on 256 evenly spaced levels; at 8 bits "
                "they are all of these."
            )
        notes.append(
            "Bits count the codes alone; the FP16 norms come on top, one a vector, two with prod."
        )
        return notes

    def _lattice_uncertainty(self) -> float:
        found = (each for row in self.rows for each in (row.error_d4, row.error_e8) if each)
        return max(each.standard_error / each.measured for each in found)


def reproduce(
    head_dim: int = 128,
    bits: Iterable[int] = range(1, 9),
    *,
    vectors: int = 32768,
    queries: int = 64,
    projections: int = 128,
    rotation: Rotation = "auto",
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Reproduction:
    """Errors of the paper's mse and prod quantisers on unit vectors uniform on the sphere.

    The vectors come in equal parts, one for each projection seed of the prod quantiser, since it
    is unbiased only over these. Each part has its own vectors and queries, so the parts are
    independent, and standard errors are those of the mean over them. One rotation serves all:
    with vectors uniform on the sphere every rotation has the same errors. The mse quantiser is
    measured without norm correction, as in the paper.

    Differs from the paper: it prints rounded values for d → ∞ (0.03 for 0.0345 at 3 bits), where
    a coordinate is Gaussian; on the sphere the error at small d is lower. ``notes()`` of the
    result says where each bound comes from.

    Args:
        head_dim: d, 8 to 576.
        bits: each 1 to 8; with prod the sign of the projection is one of them. Rows are in
            ascending order, each number once.
        vectors: in all; rounded down to a multiple of `projections`.
        queries: for each part, multiplied with each of its vectors.
        projections: seeds of the prod quantiser, at least 2; below 30 the standard errors are
            uncertain themselves.
        rotation: "auto", "hadamard" (d a power of two) or "haar".
        seed: of everything; vectors, rotation and projections get unrelated ones from it. (A
            rotation made from the vectors' own numbers would not be independent of them.)
        progress: called after every step with the steps done, all that will be, and for what.

    Raises:
        ValueError: for an argument outside its range.
    """
    bits = sorted(set(bits))
    for name, value, low, high in (
        ("head_dim", head_dim, 8, 576),
        *(("bits", b, 1, 8) for b in bits),
        ("queries", queries, 1, None),
        ("projections", projections, 2, None),
        ("seed", seed, 0, None),
    ):
        _check(name, value, low, high)
    if not bits:
        raise ValueError("bits: expected at least one number from 1 to 8")
    if rotation not in ROTATIONS:
        raise ValueError(f"rotation={rotation!r}: expected one of {', '.join(ROTATIONS)}")
    if vectors < projections:
        raise ValueError(f"vectors={vectors}: expected at least projections={projections}")

    data_seed, rotation_seed, projection_seed = np.random.SeedSequence(seed).spawn(3)
    random = np.random.default_rng(data_seed)
    common: dict[str, Any] = {
        "rotation": rotation,
        "seed": int(rotation_seed.generate_state(1, np.uint64)[0]),
    }
    exact, int8 = (
        [_core.Quantizer(head_dim, b, grid=grid, norm_correction=False, **common) for b in bits]
        for grid in ("exact", "int8")
    )
    trellis = [
        _core.Quantizer(head_dim, b, codes="trellis", norm_correction=False, **common)
        if b <= _MOST_TRELLIS_BITS
        else None
        for b in bits
    ]
    part = vectors // projections
    samples = np.empty((len(bits), 7, projections))
    of_lattices = {
        (lattice, b): np.empty(projections)
        for lattice in _LATTICES
        for b in bits
        if b <= lattices.most_bits(lattice) and head_dim % lattices.DIMENSION[lattice] == 0
    }
    for j, own_seed in enumerate(projection_seed.generate_state(projections, np.uint64)):
        x = _unit_vectors(random, part, head_dim)
        y = _unit_vectors(random, queries, head_dim)
        true = y.astype(np.float64) @ x.T.astype(np.float64)  # [queries, part]
        for i, b in enumerate(bits):
            prod = _core.ProdQuantizer(head_dim, b, projection_seed=int(own_seed), **common)
            codes = exact[i].encode(x)
            samples[i, :, j] = (
                _squared_error(x, exact[i].decode(*codes)),
                _squared_error(x, int8[i].decode(*int8[i].encode(x))),
                _squared_error(x, each.decode(*each.encode(x))) if (each := trellis[i]) else 0.0,
                *_product_error(true, exact[i].inner_products(y, *codes)),
                *_product_error(true, prod.inner_products(y, *prod.encode(x))),
            )
            few = x[:_LATTICE_VECTORS]
            for lattice in _LATTICES:
                if (lattice, b) in of_lattices:
                    found = lattices.quantised(lattice, b, few)
                    of_lattices[lattice, b][j] = _squared_error(few, found)
            if progress is not None:
                progress(j * len(bits) + i + 1, projections * len(bits), f"{b} bits")
    return Reproduction(
        head_dim=head_dim,
        rotation=exact[0].rotation,
        vectors=part * projections,
        queries=queries,
        projections=projections,
        seed=seed,
        rows=[
            _row(head_dim, b, samples[i], *(of_lattices.get((each, b)) for each in _LATTICES))
            for i, b in enumerate(bits)
        ],
    )


def _check(name: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}={value}: expected {allowed}")


def _unit_vectors(random: np.random.Generator, rows: int, head_dim: int) -> np.ndarray:
    """[rows, head_dim] fp32, uniform on the sphere."""
    gaussian = random.standard_normal((rows, head_dim))
    return (gaussian / np.linalg.norm(gaussian, axis=1, keepdims=True)).astype(np.float32)


def _squared_error(x: np.ndarray, decoded: np.ndarray) -> float:
    return float(np.square(x.astype(np.float64) - decoded).sum(axis=1).mean())


def _product_error(true: np.ndarray, estimate: np.ndarray) -> tuple[float, float]:
    """Mean squared error, and the slope of the error over the true value (least squares)."""
    error = estimate - true
    return float(np.square(error).mean()), float((error * true).sum() / np.square(true).sum())


def _estimate(samples: np.ndarray | None) -> Estimate | None:
    """samples: [projections]"""
    if samples is None:
        return None
    error = float(samples.std(ddof=1)) / math.sqrt(len(samples))
    return Estimate(float(samples.mean()), error)


def _row(
    d: int, bits: int, samples: np.ndarray, d4: np.ndarray | None, e8: np.ndarray | None
) -> Row:
    """samples: [7, projections], in the order of the row's fields but for those of lattices, whose
    own are [projections]."""

    def distortion(bits: int, grid: str = "exact") -> float:
        return _core.Codebook(d, bits, grid).distortion if bits > 0 else 1.0

    mean = samples.mean(axis=1)
    error = samples.std(axis=1, ddof=1) / math.sqrt(samples.shape[1])
    measured = [(float(m), float(e)) for m, e in zip(mean, error, strict=True)]
    lower = 4.0**-bits  # Theorem 3
    upper = math.sqrt(3) * math.pi / 2 * lower  # Theorem 1
    printed = bits <= len(_PAPER_ERROR)
    # The variance of d signs' estimate of ⟨y, r⟩ is (π/2·‖r‖² − ⟨y, r⟩²)/d (Lemma 4 has only its
    # first term); over queries the mean of ⟨y, r⟩² is ‖r‖²/d.
    prod = distortion(bits - 1) * (math.pi / 2 - 1 / d) / d
    return Row(
        bits=bits,
        error=Quantity(
            *measured[0],
            expected=distortion(bits),
            paper=_PAPER_ERROR[bits - 1] if printed else None,
            lower_bound=lower,
            upper_bound=upper,
        ),
        error_int8=Quantity(
            *measured[1],
            expected=distortion(bits, "int8"),
            paper=None,
            lower_bound=lower,
            upper_bound=upper,
        ),
        error_trellis=Estimate(*measured[2]) if bits <= _MOST_TRELLIS_BITS else None,
        error_d4=_estimate(d4),
        error_e8=_estimate(e8),
        product_mse=Quantity(
            *measured[3],
            expected=distortion(bits) / d,
            paper=None,
            lower_bound=lower / d,
            upper_bound=upper / d,
        ),
        # A centroid is the mean of its cell, so E⟨x, x̂⟩ = E‖x̂‖² = 1 − E‖x − x̂‖².
        bias_mse=Bias(*measured[4], expected=-distortion(bits)),
        product_prod=Quantity(
            *measured[5],
            expected=prod,
            paper=_PAPER_PRODUCT[bits - 1] / d if printed else None,
            lower_bound=lower / d,
            upper_bound=math.sqrt(3) * math.pi**2 * lower / d,  # Theorem 2
        ),
        bias_prod=Bias(*measured[6], expected=0.0),
    )
