"""The knobs of ``tqai.patch``, checked, and the names that they may have.

The only place of names and defaults; what is in C++ has the same in include/tqai.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, get_args

from tqai import _core

if TYPE_CHECKING:
    from typing_extensions import Unpack

Codec = Literal["scalar", "trellis", "adaptive", "auto"]
Rotation = Literal["auto", "hadamard", "haar"]
Centering = Literal["auto", "none", "mean", "rope"]
Backend = Literal["auto", "torch-ops", "mlx-ops"]
Level = Literal["scalar", "neon", "avx2", "avx_vnni", "avx512_vnni", "avx512"]
Preset = Literal["quality", "balanced", "small"]
Dtype = Literal["float32", "float16", "bfloat16"]

CODECS: tuple[Codec, ...] = get_args(Codec)
# Rotations, centrings and dtypes are numbered in files, in this order.
ROTATIONS: tuple[Rotation, ...] = get_args(Rotation)
CENTERINGS: tuple[Centering, ...] = get_args(Centering)
BACKENDS: tuple[Backend, ...] = get_args(Backend)
LEVELS: tuple[Level, ...] = get_args(Level)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
"""Of the keys and values that a cache takes."""

TRELLIS_BITS = 4
"""Up to which trellises have tables."""
KEY_TRELLIS_BITS = 2, 4
"""The fewest and the most of keys in trellis codes."""

Bits = int | Sequence[int] | Mapping[int, int]
"""Bits of every layer, layer by layer, or of some layers."""


class PresetBits(TypedDict):
    """The bits of a preset."""

    bits_k: int
    bits_v: int


class PresetOptions(PresetBits):
    """What a preset stands for."""

    codec: Codec


DEFAULT_BITS: PresetBits = {"bits_k": 4, "bits_v": 2}

PRESETS: Mapping[Preset, PresetOptions] = {
    "quality": {"bits_k": 4, "bits_v": 4, "codec": "auto"},
    "balanced": {**DEFAULT_BITS, "codec": "scalar"},
    "small": {"bits_k": 2, "bits_v": 2, "codec": "auto"},
}
"""Bits and codecs by name; docs/algorithm.md has what each costs on several models."""

_Name = TypeVar("_Name", bound=str)
_BitsName = Literal["bits_k", "bits_v"]

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


def _bits_of_layer(name: _BitsName, value: Bits, layer: int, layers: int) -> int:
    if isinstance(value, int):
        return value
    if isinstance(value, Sequence):
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


def _choice(name: str, value: Any, allowed: tuple[_Name, ...]) -> _Name:
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


def _level(value: Any) -> Level | None:
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


class OwnOptions(TypedDict, total=False):
    """Keyword arguments that make ``Settings``."""

    bits_k: Bits | None
    bits_v: Bits | None
    sink_tokens: int
    residual_window: int
    codec: Codec
    rotation: Rotation
    centering: Centering
    skip_layers: Collection[int]
    exact_prefill: bool
    seed: int | None
    backend: Backend
    level: Level | None


class Options(OwnOptions, total=False):
    """Keyword arguments of ``tqai.patch`` and of whatever else makes a cache."""

    preset: Preset | None
    """Bits and codec by name; those that are given as well take precedence."""


@dataclass(frozen=True)
class Settings:
    """How a cache compresses; the arguments of ``tqai.patch``.

    Raises:
        ValueError: for a value out of range, naming it and what is allowed.
        NotImplementedError: for a kernel level that this machine lacks, or a codec that the backend
            does not have.
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
    codec: Codec = "scalar"
    """How codes are chosen: "scalar", each coordinate of a random rotation by itself; "trellis",
    values of up to ``TRELLIS_BITS`` bits in trellis codes, which take a third of their squared
    error away; "adaptive", those, and keys in a basis that is learnt from the model when it is
    patched, in trellis codes too from 2 to 4 bits, which takes the error of scores to a fraction;
    "auto", as "adaptive" where the model can be run for that, else as "trellis". All take the same
    bytes; the bases are shared by all caches of a model."""
    rotation: Rotation = "auto"
    centering: Centering = "auto"
    """What is left out of the keys' codes: "mean", "rope" (the mean before rotary embedding, turned
    to each position), "none", or "auto": the best for each head."""
    skip_layers: Collection[int] = ()
    """Layers that stay uncompressed; negative numbers count from the end."""
    exact_prefill: bool = True
    """Whether the tokens of one forward pass see each other exact; False: as decoding would."""
    seed: int | None = None
    """Of the rotations, and of the random tokens that bases are learnt from; None: the library's
    own."""
    backend: Backend = "auto"
    """What computes: "auto", the C++ kernels on the CPU and the framework's operations on other
    devices; "torch-ops" and "mlx-ops", the operations of that framework everywhere."""
    level: Level | None = None
    """Kernel level; None: the best that the machine has, or TQAI_LEVEL."""

    def __post_init__(self) -> None:
        checked = {
            "bits_k": _bits("bits_k", self.bits_k),
            "bits_v": _bits("bits_v", self.bits_v),
            "sink_tokens": _integer("sink_tokens", self.sink_tokens, 0, _INT32_MAX),
            "residual_window": _integer("residual_window", self.residual_window, 0, _INT32_MAX),
            "codec": _choice("codec", self.codec, CODECS),
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
    def named(cls, preset: Preset | None = None, **given: Unpack[OwnOptions]) -> Settings:
        """The settings of a preset, None being the defaults, with what is given in their place.

        Bits that are given as None are not given.

        Raises:
            ValueError: also for a preset that does not exist.
        """
        named = {} if preset is None else PRESETS[_choice("preset", preset, tuple(PRESETS))]
        values: dict[str, Any] = dict(given)
        for name in DEFAULT_BITS:
            if values.get(name, 0) is None:
                del values[name]
        return cls(**{**named, **values})

    @classmethod
    def of_options(cls, function: str, options: Options) -> Settings:
        """The settings that `function` was given as keyword arguments, whatever these are.

        Raises:
            TypeError: for a name that is no option, with the nearest one.
            ValueError, NotImplementedError: as ``named``.
        """
        for name in options:
            if name not in OPTIONS:
                raise TypeError(_unknown_option(function, name))
        return cls.named(**options)

    def of_layer(self, layer: int, layers: int) -> Settings:
        """The settings of layer `layer` of `layers`, with its own bits; these where none differ.

        Raises:
            ValueError: for bits of layers that do not exist.
        """
        given = {name: getattr(self, name) for name in DEFAULT_BITS}
        bits = {name: _bits_of_layer(name, own, layer, layers) for name, own in given.items()}
        return self if bits == given else replace(self, **bits)

    def of_latents(self) -> Settings:
        """The settings of a layer that caches latents and rotary keys, with bits of its own.

        A latent becomes keys and values of all heads: it gets the better of both bits, in the
        place of keys. A rotary key, in the place of values, enters the scores of all heads and is
        short: it gets twice the keys' bits, at most 8.
        """
        assert isinstance(self.bits_k, int) and isinstance(self.bits_v, int)
        latent, rotary = max(self.bits_k, self.bits_v), min(2 * self.bits_k, 8)
        return replace(self, bits_k=latent, bits_v=rotary)

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
        """What computes for a model on the CPU: a kernel level, or a framework's operations."""
        return self.backend if self.backend != "auto" else self.level or _core.default_level()

    @property
    def learns_bases(self) -> bool:
        """Whether keys are quantised in bases that are learnt from the model, if they can be."""
        return self.codec in ("adaptive", "auto")

    @property
    def value_codes(self) -> str:
        """What codes of values stand for, of a layer: "scalar" or "trellis"."""
        if self.codec == "scalar":
            return "scalar"
        assert isinstance(self.bits_v, int)
        return "trellis" if self.bits_v <= TRELLIS_BITS else "scalar"

    @property
    def key_codes(self) -> str:
        """What codes of keys stand for where they are in a basis, of a layer: "scalar" or
        "trellis"."""
        assert isinstance(self.bits_k, int)
        fits = KEY_TRELLIS_BITS[0] <= self.bits_k <= KEY_TRELLIS_BITS[1]
        return "trellis" if self.learns_bases and fits else "scalar"

    def without_bases(self) -> Settings:
        """The settings for a model that no bases can be learnt from, where they leave that open."""
        return replace(self, codec="trellis") if self.codec == "auto" else self

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
        if self.value_codes != "scalar":
            options["value_codes"] = self.value_codes
        if self.seed is not None:
            options["seed"] = self.seed
        if self.level is not None:
            options["level"] = self.level
        return options


OPTIONS: Mapping[str, Any] = {
    "preset": None,
    **{field.name: field.default for field in fields(Settings)},
}
"""Names and defaults of ``Options``."""


def signature_with_options(function: Callable[..., Any]) -> inspect.Signature:
    """What ``help`` shows of a function with ``**options``: each of them, and its default."""
    own = inspect.signature(function)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = (
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Options.__annotations__[name].__forward_arg__,
        )
        for name, default in OPTIONS.items()
    )
    return own.replace(parameters=[*parameters, *options])


def _unknown_option(function: str, name: str) -> str:
    near = get_close_matches(name, OPTIONS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"{function}() has no keyword argument {name!r}; {hint}it takes a model and "
        f"{', '.join(OPTIONS)}"
    )
