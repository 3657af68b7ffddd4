"""The rotary position embedding that keys have gone through."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LAYOUTS = ("half_split", "interleaved")


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a layer's keys.

    Pair f of a key at position p is turned by the angle p · inv_freq[f].
    """

    inv_freq: tuple[float, ...]
    """[rotary_dim / 2], radians per token, with scaling."""
    layout: str
    """"half_split": pair f is coordinates f and f + rotary_dim / 2; "interleaved": 2f, 2f + 1."""

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)

    def core_argument(self) -> tuple[list[float], str, int]:
        """As ``_core.KvCache`` takes it."""
        return list(self.inv_freq), self.layout, self.rotary_dim

    def turn(self, keys: torch.Tensor, position: int) -> torch.Tensor:
        """Keys [..., head_dim] of position 0 as they are at `position`."""
        angles = position * torch.tensor(self.inv_freq, dtype=torch.float64, device=keys.device)
        cos, sin = angles.cos(), angles.sin()
        keys = keys.double()
        turning, rest = keys[..., : self.rotary_dim], keys[..., self.rotary_dim :]
        if self.layout == "half_split":
            a, b = turning.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([turned, rest], dim=-1)
