"""How chunks are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqai.settings import Settings
from tqai.shapes.heads import MAX_HEAD_DIM, MIN_HEAD_DIM
from tqai.shapes.rope import LAYOUTS

_CODECS = "scalar", "trellis"
"""Those whose tables are everybody's; bases are a model's own."""


@dataclass(frozen=True)
class ChunkOptions:
    """How chunks are written; the options of the serde.

    Raises:
        ValueError: for a value out of range.
    """

    head_dim: int
    """Coordinates of a head; LMCache does not say."""
    bits_k: Any = 4
    """Bits a key coordinate: of all layers, a list, or {layer: bits}, as for ``tqai.patch``."""
    bits_v: Any = 2
    codec: str = "scalar"
    """"trellis": values of up to 4 bits in trellis codes, with two thirds of the squared error in
    the same bytes, for more time to write them."""
    model: str = ""
    """Tells the model from others of the same name: entries of another one are not used."""
    rope: Mapping[str, Any] | None = field(default=None, hash=False)
    """The rotary embedding, {"inv_freq": […], "layout": "half_split" or "interleaved"}, by which
    keys are centred before it; None: on their mean."""
    exact_first: int = 1
    """First tokens of each chunk that are kept exact."""
    exact_last: int = 0
    """Last tokens of each chunk that are kept exact."""
    norm_bits: int = 8
    """8, and 4 beside codes of 1 or 2 bits; or 16 of all, as in a cache."""
    seed: int | None = None

    def __post_init__(self) -> None:
        checked = {
            "head_dim": _integer("head_dim", self.head_dim, MIN_HEAD_DIM, MAX_HEAD_DIM),
            "exact_first": _integer("exact_first", self.exact_first, 0, 1 << 20),
            "exact_last": _integer("exact_last", self.exact_last, 0, 1 << 20),
            "norm_bits": _integer("norm_bits", self.norm_bits, 8, 16),
        }
        if self.norm_bits not in (8, 16):
            raise ValueError(f"norm_bits={self.norm_bits}: expected 8 or 16")
        if self.codec not in _CODECS:
            raise ValueError(f"codec={self.codec!r}: expected one of {', '.join(_CODECS)}")
        if not isinstance(self.model, str):
            raise ValueError(f"model={self.model!r}: expected a string")
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        for name in ("bits_k", "bits_v"):
            given = getattr(self, name)
            if isinstance(given, Mapping):  # JSON's keys are strings
                given = {int(layer): bits for layer, bits in given.items()}
                object.__setattr__(self, name, given)
        self.settings()
        if self.rope is not None:
            self._check_rope(self.rope)

    def settings(self) -> Settings:
        return Settings(
            bits_k=self.bits_k,
            bits_v=self.bits_v,
            codec="trellis" if self.codec == "trellis" else "scalar",
            sink_tokens=0,
            residual_window=0,
            centering="mean" if self.rope is None else "auto",
            seed=self.seed,
        )

    def _check_rope(self, rope: Mapping[str, Any]) -> None:
        frequencies, layout = rope.get("inv_freq"), rope.get("layout", "half_split")
        if layout not in LAYOUTS:
            raise ValueError(f"rope has layout={layout!r}: expected one of {', '.join(LAYOUTS)}")
        fits = isinstance(frequencies, Sequence) and 0 < 2 * len(frequencies) <= self.head_dim
        if not fits or not all(isinstance(each, (int, float)) for each in frequencies or ()):
            raise ValueError(
                "rope needs inv_freq, a list of radians a token for half as many pairs of "
                f"coordinates as head_dim={self.head_dim} at most"
            )


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: expected an integer from {low} to {high}")
    return value
