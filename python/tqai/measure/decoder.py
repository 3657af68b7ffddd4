"""What is timed when a model decodes, in any framework: a model with one kind of cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

DYNAMIC = "DynamicCache"
QUANTIZED = "QuantizedCache"
MLX_PLAIN = "KVCache"
MLX_QUANTIZED = "QuantizedKVCache"
COMPRESSED = "tqai"
KINDS = {
    "transformers": (DYNAMIC, QUANTIZED, COMPRESSED),
    "mlx": (MLX_PLAIN, MLX_QUANTIZED, COMPRESSED),
}
"""Of caches, by framework."""

# More than sinks, window and a tile hold by default, so that nothing runs for the first time later.
WARM_UP_TOKENS = 320
# Decoded before the steps that count, at each context.
FIRST_STEPS = 2


@dataclass(frozen=True)
class Variant:
    """A kind of cache, of a model in one dtype."""

    kind: str
    """One of ``KINDS[framework]``."""
    dtype: str
    options: dict[str, Any] = field(default_factory=dict)
    """Of ``tqai.patch``, or what quantises, and with how many bits."""
    framework: str = "transformers"


class Decoder(Protocol):
    """A model with one kind of cache, which is filled and decoded from."""

    def fill(self, context: int) -> None:
        """Makes a cache of `context` tokens, and decodes the first steps."""
        ...

    def decode(self, steps: int) -> list[float]:
        """Seconds of each step."""
        ...

    def look_at(self) -> dict[str, Any]:
        """The part of a ``ModelTime`` that this process knows."""
        ...


def short_bits(bits: Any) -> str:
    """Bits of all layers, or a star where they differ."""
    return str(bits) if isinstance(bits, int) else "*"
