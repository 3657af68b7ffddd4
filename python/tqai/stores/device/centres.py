"""What is left out of the keys' codes, as src/cache/centres.cpp finds it, in array operations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tqai.stores.device.codec import Options
from tqai.stores.device.operations import Array, Operations
from tqai.stores.device.packing import TILE_TOKENS
from tqai.stores.device.pages import index_of
from tqai.stores.device.phasors import Phasors, turn
from tqai.stores.device.positions import Positions

# The same thresholds as in src/cache/centres.cpp, where each is explained.
_CLEARLY_A_MEAN = 2.0
_CLEARLY_LESS = 0.9
_REACH = 1 << 15
_NEGLIGIBLE = 0.01


class Centres(NamedTuple):
    """One set of centres of each of some rows. Immutable."""

    ops: Operations
    constant: Array
    """[rows, kv_heads, head_dim] float32."""
    means: Array
    """[rows, kv_heads, 2, pairs] float32, real and imaginary parts; zeros where nothing turns."""
    left: np.ndarray
    """[rows, kv_heads] float32: the energy per token that it left of the keys it comes from."""
    kinds: tuple[tuple[str, ...], ...]
    """[rows][kv_heads]: "none", "mean" or "rope"."""

    @property
    def nbytes(self) -> int:
        return self.constant.nbytes + self.means.nbytes + self.left.nbytes

    @property
    def is_constant(self) -> bool:
        """Whether no head's centre turns with the position."""
        return not any("rope" in heads for heads in self.kinds)

    def select(self, rows: list[int]) -> Centres:
        index = index_of(tuple(rows), self.ops)
        kinds = tuple(self.kinds[row] for row in rows)
        return Centres(self.ops, self.constant[index], self.means[index], self.left[rows], kinds)

    def of_row(self, row: int) -> RowCentres:
        constant, means = (self.ops.to_numpy(part[row]) for part in (self.constant, self.means))
        return RowCentres(constant, means, self.left[row], self.kinds[row])

    def at(self, phasors: Phasors | None, positions: Positions) -> Array:
        """The centres of keys at these positions, [rows, kv_heads, tokens or 1, head_dim]."""
        constant = self.constant[:, :, None]
        if phasors is None or self.is_constant:
            return constant
        real, imaginary = (part[:, :, None] for part in self.ops.unstack(self.means, -2))
        turned = turn(real, imaginary, *phasors.of(positions))
        return constant + phasors.join(*turned, self.constant.shape[-1])

    def asked(self, phasors: Phasors | None, queries: Array) -> Asked:
        """What queries [rows, kv_heads, n, head_dim] give with the centres of keys anywhere."""
        fixed = self.ops.sum_kept(queries * self.constant[:, :, None])
        if phasors is None or self.is_constant:
            return Asked(self.ops, fixed, None)
        a, b = phasors.split(queries)
        real, imaginary = (part[:, :, None] for part in self.ops.unstack(self.means, -2))
        factors = self.ops.concat([a * real + b * imaginary, b * real - a * imaginary], -1)
        return Asked(self.ops, fixed, factors)


class Asked(NamedTuple):
    """What queries give with centres: Re Σ conj(q) m e^(i p ω) for keys at p, and what is fixed."""

    ops: Operations
    fixed: Array
    """[rows, kv_heads, n, 1]"""
    factors: Array | None
    """[rows, kv_heads, n, 2 · pairs], of cosines and then sines; None where nothing turns."""

    def scores(self, phasors: Phasors | None, positions: Positions) -> Array:
        """[rows, kv_heads, n, tokens or 1], by a table that all rows and heads share."""
        if self.factors is None:
            return self.fixed
        assert phasors is not None
        return self.fixed + self.factors @ self.ops.concat(phasors.of(positions), -1).mT


class RowCentres(NamedTuple):
    """One set of one row, as ``Centres`` has it, in numpy."""

    constant: np.ndarray
    means: np.ndarray
    left: np.ndarray
    kinds: tuple[str, ...]


def stacked(rows: list[RowCentres], ops: Operations) -> Centres:
    """Those of several rows, on the operations' device."""
    constant, means = (ops.asarray(np.stack([row[i] for row in rows])) for i in (0, 1))
    left = np.stack([row.left for row in rows])
    return Centres(ops, constant, means, left, tuple(row.kinds for row in rows))


class Moments(NamedTuple):
    """Means over the tokens of each tile of a row, in double precision."""

    mean: np.ndarray
    """[kv_heads, tiles, head_dim], of the keys k."""
    turned: np.ndarray
    """[kv_heads, tiles, 2, pairs], of k · e^(−i p ω), real and imaginary parts."""
    energy: np.ndarray
    """[kv_heads, tiles], of |k|²."""
    steady: np.ndarray
    """[head_dim] bool: coordinates that do not turn."""

    @property
    def tiles(self) -> int:
        return self.energy.shape[1]

    def some(self, tiles: list[int]) -> Moments:
        return Moments(
            self.mean[:, tiles], self.turned[:, tiles], self.energy[:, tiles], self.steady
        )


def find_moments(
    ops: Operations,
    options: Options,
    phasors: Phasors | None,
    keys: Array,
    positions: Positions,
    step: int,
) -> list[Moments]:
    """Those of each row, of keys [rows, kv_heads, n, head_dim] at these positions.

    n is a multiple of 64; `step` tokens are gone through at once, a multiple of 64 as well.
    """
    # Not every device has double precision; sums of float32 in pairs are nearly as good.
    parts: list[list[np.ndarray]] = [[], [], []]
    for start in range(0, keys.shape[2], step):
        part = ops.astype(keys[:, :, start : start + step], ops.wide)
        rows, heads, tokens, dim = part.shape
        shape = rows, heads, tokens // TILE_TOKENS, TILE_TOKENS
        tiles = part.reshape(*shape, dim)
        means, energy = tiles.mean(3), tiles.square().sum(-1).mean(3)
        turned = np.zeros((*shape[:3], 2, 0))
        if phasors is not None:
            tables = phasors.of(positions.part(start, start + tokens))
            cos, sin = (ops.astype(table, ops.wide) for table in tables)
            back = turn(*phasors.split(part), cos, -sin)
            unturned = [each.reshape(*shape, phasors.pairs).mean(3) for each in back]
            turned = ops.to_numpy(ops.stack(unturned, -2))
        for held, found in zip(
            parts, (ops.to_numpy(means), turned, ops.to_numpy(energy)), strict=True
        ):
            held.append(found.astype(np.float64))
    mean, turned_back, energy = (np.concatenate(held, axis=2) for held in parts)
    steady = np.arange(options.head_dim) >= (0 if phasors is None else phasors.rotary_dim)
    return [
        Moments(mean[row], turned_back[row], energy[row], steady) for row in range(keys.shape[0])
    ]


def _taken(mean: np.ndarray, turned: np.ndarray, steady: np.ndarray) -> tuple[np.ndarray, ...]:
    """What the mean and the RoPE centre take away of the energy, and each frequency's share."""
    strengths = np.square(turned).sum(-2)
    rope = np.square(mean[..., steady]).sum(-1) + strengths.sum(-1)
    return np.square(mean).sum(-1), rope, strengths


def _lost(options: Options, mean: np.ndarray) -> np.ndarray:
    """[kv_heads]: what the mean [kv_heads, head_dim] takes away here, and no longer elsewhere."""
    if options.rope is None:
        return np.zeros(len(mean))
    inv_freq, layout = np.array(options.rope[0]), options.rope[1]
    pairs = np.arange(len(inv_freq))
    first = pairs if layout == "half_split" else 2 * pairs
    second = first + (len(pairs) if layout == "half_split" else 1)
    drift = 2.0 * (1.0 - np.sinc(_REACH / np.pi * inv_freq))
    return ((np.square(mean[:, first]) + np.square(mean[:, second])) * drift).sum(-1)


def choose_centres(options: Options, moments: Moments) -> RowCentres:
    """One set for all of these tiles together, as the options say."""
    mean, turned, energy = moments.mean.mean(1), moments.turned.mean(1), moments.energy.mean(1)
    tokens = moments.tiles * TILE_TOKENS
    heads, has_rope = len(energy), turned.shape[-1] > 0
    mean_energy, rope_energy, strengths = _taken(mean, turned, moments.steady)
    mean_left, rope_left = energy - mean_energy, energy - rope_energy
    use_mean = np.full(heads, options.centering != "none")
    use_rope = np.full(heads, options.centering == "rope")
    if options.centering == "auto":
        use_mean = mean_energy > _CLEARLY_A_MEAN * mean_left / tokens
        use_rope = rope_left < _CLEARLY_LESS * mean_left
        elsewhere = mean_left + _lost(options, mean)
        use_rope |= (_CLEARLY_LESS * rope_left < mean_left) & (
            rope_left < _CLEARLY_LESS * elsewhere
        )
        use_rope &= rope_energy > _CLEARLY_A_MEAN * rope_left / tokens
    use_rope &= has_rope
    use_mean &= ~use_rope
    constant = np.where(
        use_rope[:, None], mean * moments.steady, np.where(use_mean[:, None], mean, 0.0)
    )
    means = turned * (use_rope[:, None] & _worth_turning(strengths, rope_left))[:, None]
    left = np.where(use_rope, rope_left, np.where(use_mean, mean_left, energy))
    kinds = (
        "rope" if rope else "mean" if use_mean[h] else "none" for h, rope in enumerate(use_rope)
    )
    return RowCentres(
        constant.astype(np.float32),
        means.astype(np.float32),
        left.clip(min=0.0).astype(np.float32),
        tuple(kinds),
    )


def least_left(options: Options, moments: Moments) -> np.ndarray:
    """[kv_heads, tiles]: the least energy per token that a choice for a tile alone could leave."""
    mean, rope, _ = _taken(moments.mean, moments.turned, moments.steady)
    if moments.turned.shape[-1] == 0:
        rope = np.zeros_like(mean)
    most = {"none": 0.0 * mean, "mean": mean, "rope": rope, "auto": np.maximum(mean, rope)}
    return (moments.energy - most[options.centering]).clip(min=0.0)


def left_by(centres: RowCentres, moments: Moments) -> np.ndarray:
    """[kv_heads, tiles]: the energy per token that a set leaves."""
    constant = centres.constant.astype(np.float64)[:, None]
    means = centres.means.astype(np.float64)[:, None]
    taken = (constant * (constant - 2.0 * moments.mean)).sum(-1)
    taken += (means * (means - 2.0 * moments.turned)).sum((-2, -1))
    return (moments.energy + taken).clip(min=0.0)


def _worth_turning(strengths: np.ndarray, rope_left: np.ndarray) -> np.ndarray:
    """[kv_heads, pairs] bool: all but the weakest, which together leave next to nothing."""
    order = strengths.argsort(-1, kind="stable")
    spent = np.take_along_axis(strengths, order, -1).cumsum(-1)
    strong = spent > _NEGLIGIBLE * rope_left.clip(min=0.0)[:, None]
    worth = np.zeros_like(strong)
    np.put_along_axis(worth, order, strong, -1)
    return worth
