"""The key/value heads of attention layers: how many, how wide, and which are latents."""

from __future__ import annotations

from typing import NamedTuple

MIN_HEAD_DIM = 8
MAX_HEAD_DIM = 576


class Heads(NamedTuple):
    """The key/value heads of a layer."""

    count: int
    dim: int


Latents = frozenset[tuple[int, int]]
"""Pairs of widths: where a layer's single head of "keys" and "values" has these, they are a latent,
of which the model makes the keys and values of all heads, and a rotary key that all heads share
(multi-head latent attention)."""


def check_head_dim(layer: int, name: str, head_dim: int) -> None:
    """Raises NotImplementedError, naming the layer, for a head_dim that cannot be compressed."""
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise NotImplementedError(
            f"layer {layer}: {name} of head_dim {head_dim}; tqai compresses {MIN_HEAD_DIM}…"
            f"{MAX_HEAD_DIM}: leave the layer exact with skip_layers=[{layer}]"
        )
