"""What caches hold, in numbers: the parts of ``memory_report()`` that all frameworks share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

BYTES = (
    "packed_bytes",
    "exact_bytes",
    "overhead_bytes",
    "total_bytes",
    "mapped_bytes",
    "basis_bytes",
    "uncompressed_bytes",
)
COUNTS = ("tokens", "packed_tokens", *BYTES)


class Counted(Protocol):
    """A store, as far as it is counted."""

    @property
    def batch(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    def memory(self) -> dict[str, int]: ...
    def centering(self, row: int, head: int) -> str | None: ...


def numbers_of(store: Counted) -> dict[str, int]:
    """A store's numbers."""
    memory = {"basis_bytes": 0, **store.memory()}
    return {name: memory[name] for name in COUNTS}


def centerings_of(store: Counted) -> Counter[str]:
    """How many of a store's heads are centred on what."""
    kinds = (
        store.centering(row, head) for row in range(store.batch) for head in range(store.kv_heads)
    )
    return Counter(kind or "undecided" for kind in kinds)


def over_layers(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums of the layers' bytes, the tokens of the layer that holds most, and the layers."""
    layers = list(layers)
    report: dict[str, Any] = {name: sum(layer[name] for layer in layers) for name in BYTES}
    for name in ("tokens", "packed_tokens"):
        report[name] = max((layer[name] for layer in layers), default=0)
    report["layers"] = layers
    return report
