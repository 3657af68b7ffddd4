"""What the bytes of a cache are, by its report, and which window makes them another number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TILE = 64


def packed_bits(report: Mapping[str, Any], item_size: int) -> float:
    """Bits per coordinate of the packed tokens, over the layers that have any.

    item_size: bytes of an exact coordinate."""
    layers = [layer for layer in report["layers"] if layer["packed_tokens"] > 0]
    coordinates = sum(
        layer["uncompressed_bytes"] / item_size * layer["packed_tokens"] / layer["tokens"]
        for layer in layers
    )
    return 8 * sum(layer["packed_bytes"] for layer in layers) / coordinates


def window_of_bytes(report: Mapping[str, Any], window: int, wanted: int) -> int | None:
    """The residual window with which a cache takes at most `wanted` bytes, and no tile less would.

    report: of the same cache with `window`. None where it takes more without any window.
    """
    tile = _TILE * sum(
        layer["uncompressed_bytes"] / layer["tokens"]
        - layer["packed_bytes"] / layer["packed_tokens"]
        for layer in report["layers"]
        if layer["packed_tokens"] > 0
    )
    if tile <= 0:  # nothing is packed, or packing brings nothing
        return window if report["total_bytes"] <= wanted else None
    tiles = (wanted - report["total_bytes"]) // tile
    other = window + _TILE * int(tiles)
    return other if other >= 0 else None
