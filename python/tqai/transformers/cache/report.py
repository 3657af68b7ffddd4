"""What a cache's ``memory_report`` says of its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from tqai import reports
from tqai.settings import Settings
from tqai.transformers.cache.layer import TqaiLayer
from tqai.transformers.model.other_layers import tensors_of


def report_of(
    layers: Iterable[Any], settings: Settings, rotated: Mapping[int, str], kept: int
) -> dict[str, Any]:
    """``TqaiCache.memory_report``.

    rotated: by layer, why its keys are in no basis though the settings ask for one; kept: bytes of
    what other layers held before a forward pass that may not end.
    """
    layers = list(layers)
    packed = [layer for layer in layers if isinstance(layer, TqaiLayer)]
    report = reports.over_layers([_memory(layer) for layer in layers])
    report["exact_bytes"] += kept
    report["total_bytes"] += kept
    report["centering"] = dict(sum((_centerings(layer) for layer in packed), Counter()))
    report["rotary"] = dict(
        Counter(layer.rope.layout if layer.rope else "unrecognised" for layer in packed)
    )
    report["codecs"] = dict(Counter(_codec(layer, rotated) for layer in packed))
    report["value_codes"] = dict(Counter(layer.settings.value_codes for layer in packed))
    report["key_codes"] = dict(Counter(_key_codes(layer) for layer in packed))
    report["settings"] = asdict(settings)
    return report


def _memory(layer: Any) -> dict[str, int]:
    """One layer's numbers; those of transformers' own layers count as exact."""
    numbers = dict.fromkeys(reports.COUNTS, 0)
    if not isinstance(layer, TqaiLayer):
        keys = getattr(layer, "keys", None)
        if keys is not None and keys.ndim == 4:
            numbers["tokens"] = keys.shape[0] * keys.shape[-2]
    elif layer.core is not None:
        numbers = reports.numbers_of(layer.core)
    if isinstance(layer, TqaiLayer) and layer.basis is not None:
        numbers["basis_bytes"] = layer.basis.nbytes  # known before there are tokens
    size = sum(tensor.nbytes for tensor in tensors_of(layer))
    for name in ("exact_bytes", "total_bytes", "uncompressed_bytes"):
        numbers[name] += size
    return numbers


def _centerings(layer: TqaiLayer) -> Counter[str]:
    return Counter() if layer.core is None else reports.centerings_of(layer.core)


def _codec(layer: TqaiLayer, rotated: Mapping[int, str]) -> str:
    """What a layer's keys are quantised in, and why where it is not what the settings say."""
    if layer.basis is not None:
        return "adaptive"
    why = rotated.get(layer.index)
    return "scalar" if why is None else f"scalar: {why}"


def _key_codes(layer: TqaiLayer) -> str:
    return "scalar" if layer.core is None else layer.core.key_codes
