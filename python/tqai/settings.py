"""The knobs of ``tqai.patch``, checked."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tqai import _core

ROTATIONS = ("auto", "hadamard", "haar")
CENTERINGS = ("auto", "none", "mean", "rope")
BACKENDS = ("auto", "torch-ops")
LEVELS = ("scalar", "neon", "avx2", "avx512")

Bits = int | tuple[int, ...] | Mapping[int, int]
"""Bits of every layer, layer by layer, or of some layers."""

DEFAULT_BITS = {"bits_k": 4, "bits_v": 2}

PRESETS: dict[str, dict[str, int]] = {
    "quality": {"bits_k": 4, "bits_v": 4},
    "balanced": dict(DEFAULT_BITS),
    "small": {"bits_k": 2, "bits_v": 2},
}
"""Settings by name; docs/algorithm.md has what each costs on several models."""

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


def _bits(name: str, value: Any) -> Bits:
    if isinstance(value, Mapping):
        return {
            _integer(f"layer of {name}", layer, -_INT32_MAX, _INT32_MAX): _integer(
                f"{name}[{layer}]", bits, 1, 8
            )
            for layer, bits in value.items()
        }
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(_integer(f"{name}[{at}]", bits, 1, 8) for at, bits in enumerate(value))
    return _integer(name, value, 1, 8)


def _bits_of_layer(name: str, value: Bits, layer: int, layers: int) -> int:
    if isinstance(value, int):
        return value
    if isinstance(value, tuple):
        if len(value) != layers:
            raise ValueError(
                f"{name} has {len(value)} entries: the model's cache has {layers} layers, expected "
                "one for each"
            )
        return value[layer]
    for given in value:
        if not -layers <= given < layers:
            raise ValueError(
                f"{name} names layer {given}: the model's cache has {layers} layers, expected "
                f"{-layers}…{layers - 1}"
            )
    return value.get(layer, value.get(layer - layers, DEFAULT_BITS[name]))


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected True or False")
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

    bits_k: Bits = DEFAULT_BITS["bits_k"]
    """Bits per key coordinate, 1…8: of every layer, a sequence with one for each, or a mapping from
    layers to bits, the others having the default."""
    bits_v: Bits = DEFAULT_BITS["bits_v"]
    """Bits per value coordinate, as ``bits_k``."""
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
    exact_prefill: bool = True
    """Whether the tokens of one forward pass see each other exact; False: as decoding would."""
    seed: int | None = None
    """Of the rotations; None: the library's."""
    backend: str = "auto"
    """What computes: "auto", the C++ kernels for tensors on the CPU and torch operations for those
    on other devices; "torch-ops", torch operations everywhere."""
    level: str | None = None
    """Kernel level; None: the best that the machine has, or TQAI_LEVEL."""

    def __post_init__(self) -> None:
        checked = {
            "bits_k": _bits("bits_k", self.bits_k),
            "bits_v": _bits("bits_v", self.bits_v),
            "sink_tokens": _integer("sink_tokens", self.sink_tokens, 0, _INT32_MAX),
            "residual_window": _integer("residual_window", self.residual_window, 0, _INT32_MAX),
            "rotation": _choice("rotation", self.rotation, ROTATIONS),
            "centering": _choice("centering", self.centering, CENTERINGS),
            "skip_layers": _layers(self.skip_layers),
            "exact_prefill": _flag("exact_prefill", self.exact_prefill),
            "seed": None if self.seed is None else _integer("seed", self.seed, 0, _UINT64_MAX),
            "backend": _choice("backend", self.backend, BACKENDS),
            "level": _level(self.level),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def named(cls, preset: str | None, **given: Any) -> Settings:
        """The settings of a preset, None being the defaults, with what is given in their place.

        Raises:
            ValueError: also for a preset that does not exist.
        """
        named = {} if preset is None else PRESETS[_choice("preset", preset, tuple(PRESETS))]
        return cls(**{**named, **given})

    def of_layer(self, layer: int, layers: int) -> Settings:
        """The settings of layer `layer` of `layers`, with its own bits.

        Raises:
            ValueError: for bits of layers that do not exist.
        """
        bits = {
            name: _bits_of_layer(name, getattr(self, name), layer, layers) for name in DEFAULT_BITS
        }
        return replace(self, **bits)

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

    @property
    def arithmetic(self) -> str:
        """What computes for a model on the CPU: a kernel level, or "torch-ops"."""
        return self.backend if self.backend != "auto" else self.level or _core.default_level()

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
