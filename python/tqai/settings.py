"""The knobs of ``tqai.patch``, checked."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tqai import _core

ROTATIONS = ("auto", "hadamard", "haar")
CENTERINGS = ("auto", "none", "mean", "rope")
LEVELS = ("scalar", "avx2", "avx512")

_INT32_MAX = 2**31 - 1
_UINT64_MAX = 2**64 - 1


def _integer(name: str, value: Any, low: int, high: int) -> int:
    allowed = f"an integer from {low} to {high}"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: expected {allowed}") from None
    if not low <= number <= high:
        raise ValueError(f"{name}={number}: expected {allowed}")
    return number


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}")
    return value


def _layers(value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"skip_layers={value!r}: expected a sequence of layer numbers")
    return tuple(_integer("skip_layers", layer, -_INT32_MAX, _INT32_MAX) for layer in value)


def _level(value: str | None) -> str | None:
    if value is None:
        _core.default_level()  # reports a TQAI_LEVEL that this machine cannot run
        return None
    level = _choice("level", value, LEVELS)
    if level not in _core.available_levels():
        raise NotImplementedError(
            f"level={level!r} does not run on this machine; available: "
            f"{', '.join(map(repr, _core.available_levels()))}"
        )
    return level


@dataclass(frozen=True)
class Settings:
    """How a cache compresses; the arguments of ``tqai.patch``.

    Raises:
        ValueError: for a value out of range, naming it and what is allowed.
        NotImplementedError: for a kernel level that this machine lacks.
    """

    bits_k: int = 4
    """Bits per key coordinate, 1…8."""
    bits_v: int = 2
    """Bits per value coordinate, 1…8."""
    sink_tokens: int = 4
    """First tokens of each row, kept exact for ever."""
    residual_window: int = 128
    """Last tokens of each row, kept exact."""
    rotation: str = "auto"
    centering: str = "auto"
    """What is left out of the keys' codes: "mean", "rope" (the mean before rotary embedding, turned
    to each position), "none", or "auto": the best for each head."""
    skip_layers: tuple[int, ...] = ()
    """Layers that stay uncompressed; negative numbers count from the end."""
    seed: int | None = None
    """Of the rotations; None: the library's."""
    level: str | None = None
    """Kernel level; None: the best that the machine has, or TQAI_LEVEL."""

    def __post_init__(self) -> None:
        checked = {
            "bits_k": _integer("bits_k", self.bits_k, 1, 8),
            "bits_v": _integer("bits_v", self.bits_v, 1, 8),
            "sink_tokens": _integer("sink_tokens", self.sink_tokens, 0, _INT32_MAX),
            "residual_window": _integer("residual_window", self.residual_window, 0, _INT32_MAX),
            "rotation": _choice("rotation", self.rotation, ROTATIONS),
            "centering": _choice("centering", self.centering, CENTERINGS),
            "skip_layers": _layers(self.skip_layers),
            "seed": None if self.seed is None else _integer("seed", self.seed, 0, _UINT64_MAX),
            "level": _level(self.level),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def skipped(self, layers: int) -> frozenset[int]:
        """The layers to leave uncompressed, as numbers from 0, of a model with `layers` layers.

        Raises:
            ValueError: for a layer that the model does not have.
        """
        for layer in self.skip_layers:
            if not -layers <= layer < layers:
                raise ValueError(
                    f"skip_layers={layer}: the model's cache has {layers} layers, "
                    f"expected {-layers}…{layers - 1}"
                )
        return frozenset(layer % layers for layer in self.skip_layers)

    def core_options(self) -> dict[str, Any]:
        """The keyword arguments of ``_core.KvCache`` that do not depend on the layer."""
        options: dict[str, Any] = {
            "bits_k": self.bits_k,
            "bits_v": self.bits_v,
            "sink_tokens": self.sink_tokens,
            "residual_window": self.residual_window,
            "rotation": self.rotation,
            "centering": self.centering,
        }
        if self.seed is not None:
            options["seed"] = self.seed
        if self.level is not None:
            options["level"] = self.level
        return options
