"""What is left out of the keys' codes, as src/cache/centres.cpp finds it, in torch operations."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tqai.stores.torch_ops.codec import Options
from tqai.stores.torch_ops.packing import TILE_TOKENS
from tqai.stores.torch_ops.phasors import Phasors, turn

# The same thresholds as in src/cache/centres.cpp, where each is explained.
_CLEARLY_A_MEAN = 2.0
_CLEARLY_LESS = 0.9
_NEGLIGIBLE = 0.01


class Centres(NamedTuple):
    """The centres of some rows that were sealed together. Immutable."""

    constant: torch.Tensor
    """[rows, kv_heads, head_dim] float32."""
    means: torch.Tensor
    """[rows, kv_heads, 2, pairs] float32, real and imaginary parts; zeros where nothing turns."""
    kinds: tuple[tuple[str, ...], ...]
    """[rows][kv_heads]: "none", "mean" or "rope"."""

    @property
    def nbytes(self) -> int:
        return self.constant.nbytes + self.means.nbytes

    @property
    def is_constant(self) -> bool:
        """Whether no head's centre turns with the position."""
        return not any("rope" in heads for heads in self.kinds)

    def select(self, rows: list[int]) -> Centres:
        index = torch.tensor(rows, device=self.constant.device)
        kinds = tuple(self.kinds[row] for row in rows)
        return Centres(self.constant[index], self.means[index], kinds)

    def at(self, phasors: Phasors | None, first: int, tiles: int) -> torch.Tensor:
        """The centres of keys first…, [rows, kv_heads, 64 · tiles or 1, head_dim]."""
        constant = self.constant[:, :, None]
        if phasors is None or self.is_constant:
            return constant
        real, imaginary = (part[:, :, None] for part in self.means.unbind(-2))
        turned = turn(real, imaginary, *phasors.of(first, tiles))
        return constant + phasors.join(*turned, self.constant.shape[-1])

    def scores(
        self, phasors: Phasors | None, queries: torch.Tensor, first: int, tiles: int
    ) -> torch.Tensor:
        """What queries [rows, kv_heads, n, head_dim] give with the centres of keys first….

        [rows, kv_heads, n, 64 · tiles or 1]. Re Σ conj(q) m e^(i p ω), a product of the queries
        with a table that all rows and heads share.
        """
        scores = (queries * self.constant[:, :, None]).sum(-1, keepdim=True)
        if phasors is None or self.is_constant:
            return scores
        a, b = phasors.split(queries)
        real, imaginary = (part[:, :, None] for part in self.means.unbind(-2))
        factors = torch.cat([a * real + b * imaginary, b * real - a * imaginary], -1)
        cos, sin = phasors.of(first, tiles)
        return scores + factors @ torch.cat([cos, sin], -1).mT


def choose_centres(
    options: Options, phasors: Phasors | None, keys: torch.Tensor, first: int, step: int
) -> Centres:
    """The centres of keys [rows, kv_heads, n, head_dim] of the tokens from `first` on.

    n is a multiple of 64; `step` tokens are gone through at once, a multiple of 64 as well.
    """
    rows, heads, tokens, dim = keys.shape
    pairs = 0 if phasors is None else phasors.pairs
    # Not every device has double precision; sums of float32 in pairs are nearly as good.
    wide = torch.float32 if keys.device.type == "mps" else torch.float64
    total = torch.zeros(rows, heads, dim, dtype=wide, device=keys.device)
    turned = torch.zeros(rows, heads, 2, pairs, dtype=wide, device=keys.device)
    energy = torch.zeros(rows, heads, dtype=wide, device=keys.device)
    if options.centering == "none":
        kinds = (("none",) * heads,) * rows
        return Centres(total.float(), turned.float(), kinds)
    for start in range(0, tokens, step):
        part = keys[:, :, start : start + step].to(wide)
        total += part.sum(-2)
        energy += (part * part).sum((-2, -1))
        if phasors is not None:
            tiles = part.shape[-2] // TILE_TOKENS
            cos, sin = (table.to(wide) for table in phasors.of(first + start, tiles))
            back = turn(*phasors.split(part), cos, -sin)
            turned += torch.stack([unturned.sum(-2) for unturned in back], -2)
    total, turned, energy = total / tokens, turned / tokens, energy / tokens

    # What each centre takes away of the energy per token, and what it leaves.
    mean_energy = total.square().sum(-1)
    mean_left = energy - mean_energy
    use_mean = torch.ones_like(energy, dtype=torch.bool)
    use_rope = torch.zeros_like(use_mean)
    if options.centering == "auto":
        use_mean = mean_energy > _CLEARLY_A_MEAN * mean_left / tokens
    steady, means = total, turned
    if phasors is not None and options.centering != "mean":
        strengths = turned.square().sum(-2)
        steady = torch.cat(
            [torch.zeros_like(total[..., : phasors.rotary_dim]), total[..., phasors.rotary_dim :]],
            -1,
        )
        rope_energy = steady.square().sum(-1) + strengths.sum(-1)
        rope_left = energy - rope_energy
        use_rope = torch.ones_like(use_mean)
        if options.centering == "auto":
            use_rope = (rope_left < _CLEARLY_LESS * mean_left) & (
                rope_energy > _CLEARLY_A_MEAN * rope_left / tokens
            )
        means = turned * _worth_turning(strengths, rope_left)[..., None, :]
    use_mean &= ~use_rope
    constant = torch.where(use_rope[..., None], steady, total * use_mean[..., None])
    means = means * use_rope[..., None, None]
    kinds = (use_rope.int() * 2 + use_mean.int()).tolist()
    names = ("none", "mean", "rope")
    return Centres(
        constant.float(), means.float(), tuple(tuple(names[kind] for kind in row) for row in kinds)
    )


def _worth_turning(strengths: torch.Tensor, rope_left: torch.Tensor) -> torch.Tensor:
    """[..., pairs] bool: all but the weakest frequencies, which together leave next to nothing."""
    order = strengths.argsort(-1)
    spent = strengths.gather(-1, order).cumsum(-1)
    strong = spent > _NEGLIGIBLE * rope_left.clamp(min=0.0)[..., None]
    return torch.zeros_like(strong).scatter(-1, order, strong)
