"""The rotary position embedding that keys have gone through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MAX_SECTIONS = 4
"""Positions a token that stores keep; ``tqai::Rope::kMaxSections``."""
LAYOUTS = ("half_split", "interleaved")


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a layer's keys.

    Pair f of a key is turned by the angle p · inv_freq[f], p being the key's position in the pair's
    section.
    """

    inv_freq: tuple[float, ...]
    """[rotary_dim / 2], radians per token, with scaling."""
    layout: str
    """"half_split": pair f is coordinates f and f + rotary_dim / 2; "interleaved": 2f, 2f + 1."""
    sections: tuple[int, ...] = ()
    """[rotary_dim / 2], which of a token's positions turns each pair, where it has several (the
    time, height and width of M-RoPE); empty: it has one."""

    changes: bool = False
    """Whether the frequencies depend on the length of the text; these are those of a short one."""

    @cached_property
    def section_count(self) -> int:
        return 1 + max(self.sections, default=0)

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)

    def core_argument(self) -> tuple[list[float], str, int, list[int]]:
        """As ``_core.KvCache`` takes it."""
        return list(self.inv_freq), self.layout, self.rotary_dim, list(self.sections)

    def options(self) -> tuple[tuple[float, ...], str, int, tuple[int, ...]]:
        """As ``TorchStore`` takes it."""
        return self.inv_freq, self.layout, self.rotary_dim, self.sections

    def turn(self, keys: torch.Tensor, position: int | Sequence[int]) -> torch.Tensor:
        """Keys [..., head_dim] of position 0 as they are at `position`, of one section or each."""
        import torch

        angles = torch.tensor(self.inv_freq, dtype=torch.float64, device=keys.device)
        if isinstance(position, int):
            angles = angles * position
        else:
            own = [position[section] for section in self.sections or (0,) * len(self.inv_freq)]
            angles = angles * torch.tensor(own, dtype=torch.float64, device=keys.device)
        cos, sin = angles.cos(), angles.sin()
        keys = keys.double()
        turning, rest = keys[..., : self.rotary_dim], keys[..., self.rotary_dim :]
        if self.layout == "half_split":
            a, b = turning.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([turned, rest], dim=-1)
