"""What must hold of a file's header and of the layers in it, so that none is a wrong cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tqai.shapes.heads import Heads
from tqai.shapes.rope import Rope
from tqai.stores.device.serialize import options_in
from tqai.transformers.cache.beside import IndexedLayer
from tqai.transformers.cache.layer import TqaiLayer
from tqai.transformers.model.other_layers import holds_nothing

WEIGHTS = "every tensor"
"""How files tell weights apart; those without a kind do so by ``sampled_fingerprint``."""
# Frequencies are computed by the loading machine again; another rounding is no other embedding.
ROPE_TOLERANCE = 1e-5
_COMPARED = ("bits_k", "bits_v", "sink_tokens", "residual_window", "rotation", "centering", "seed")


def check_header(path: Path, header: Mapping[str, Any]) -> None:
    """Looks at the kinds of values; ones that are not known are let be, for later versions.

    Raises:
        ValueError: naming the first that is missing or of another kind.
    """
    needed: dict[str, Callable[[Any], bool]] = {
        "model": _is(str),
        "heads": _list(_either(_is(type(None)), _list(_is(int), 2))),
        "weights": _either(_is(str), _is(dict)),
        "settings": _is(dict),
        "sliding": _is(bool),
        "layers": _list(_is(dict)),
    }
    _check(path, "its header", header, needed)
    if isinstance(header["weights"], dict):
        digest = _either(_is(str), _is(type(None)))
        _check(path, "its weights", header["weights"], {"kind": _is(str)})
        if header["weights"]["kind"] == WEIGHTS:
            needed = {"structure": _is(str), "tensors": _list(digest)}
            _check(path, "its weights", header["weights"], needed)
            around = header["weights"].get("around", {"structure": "", "tensors": []})
            if not isinstance(around, dict):
                raise ValueError(f"{path}: its weights have 'around': {_shown(around)}")
            _check(path, "its weights", around, needed)
    constants = header.get("constants", {})
    if not isinstance(constants, dict):
        raise ValueError(f"{path}: its header has 'constants': {_shown(constants)}")
    for part in ("layers", "cross_layers"):
        for index, layer in enumerate(header.get(part, ())):
            _check_layer(path, f"layer {index}", layer)


def _check_layer(path: Path, place: str, layer: Any) -> None:
    if not isinstance(layer, dict):
        raise ValueError(f"{path}: {place} is described by {_shown(layer)}; save the cache again")
    _check(path, place, layer, {"kind": _is(str)})
    if layer["kind"] in ("exact", "sliding"):
        _check(path, place, layer, {"length": _count})
    if layer["kind"] not in ("tqai", "cross", "indexed"):
        return
    nothing = _is(type(None))
    needed = {
        "rope": _either(nothing, _is(dict)),
        "padding": _list(_count),
        "dtypes": _either(nothing, _list(_is(str), 2)),
    }
    _check(path, place, layer, needed)
    if layer.get("basis") is not None:
        _check(path, place, layer, {"basis": _is(str), "carried": _is(bool)})
    if layer.get("rotated") is not None:
        _check(path, place, layer, {"rotated": _is(str)})
    if layer["rope"] is not None:
        needed = {"inv_freq": _list(_either(_is(float), _count)), "layout": _is(str)}
        if "sections" in layer["rope"]:
            needed["sections"] = _list(_count)
        _check(path, f"the rotary embedding of {place}", layer["rope"], needed)


def _check(
    path: Path, place: str, given: Mapping[str, Any], needed: Mapping[str, Callable[[Any], bool]]
) -> None:
    for name, fits in needed.items():
        if name not in given:
            raise ValueError(f"{path}: {place} lacks {name!r}; save the cache again")
        if not fits(given[name]):
            raise ValueError(
                f"{path}: {place} has {name!r}: {_shown(given[name])}, which no cache has; save "
                "the cache again"
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind  # True is no number


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 40


def _either(*kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(kind(value) for kind in kinds)


def _list(kind: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    return lambda value: (
        type(value) is list and length in (None, len(value)) and all(map(kind, value))
    )


def check_rope(path: Path, index: int, saved: Mapping[str, Any] | None, rope: Rope | None) -> None:
    """Whether the keys went through the embedding that the model has.

    Raises:
        ValueError: where they did not.
    """
    if not _same_rope(saved, rope):
        raise ValueError(
            f"{path}: the keys of layer {index} went through another rotary embedding than the "
            "model's; load it with the configuration that it was saved with"
        )


def _same_rope(saved: Mapping[str, Any] | None, rope: Rope | None) -> bool:
    if saved is None or rope is None:
        return saved is None and rope is None
    if saved["layout"] != rope.layout or _sections_of(saved) not in ((), rope.sections):
        return False
    if rope.changes and len(saved["inv_freq"]) == len(rope.inv_freq):
        return True
    return _close(saved["inv_freq"], rope.inv_freq)


def rope_of(saved: Mapping[str, Any], rope: Rope) -> Rope:
    """The embedding that saved keys went through; `rope` is the model's, and is the same kind."""
    frequencies = tuple(map(float, saved["inv_freq"])) if rope.changes else rope.inv_freq
    return replace(rope, inv_freq=frequencies, sections=_sections_of(saved))


def _sections_of(saved: Mapping[str, Any]) -> tuple[int, ...]:
    """None in files from before there were any, where those of M-RoPE were taken for one."""
    return tuple(saved.get("sections", ()))


def _close(a: Any, b: Any) -> bool:
    exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    frequencies = [torch.tensor([float(f) for f in given], **exact) for given in (a, b)]
    return frequencies[0].shape == frequencies[1].shape and torch.allclose(
        *frequencies, rtol=ROPE_TOLERANCE, atol=0.0
    )


def check_store(
    path: Path, layer: TqaiLayer, data: bytes, core: Any, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Whether a layer's bytes are what the layer would write: its heads, bits, windows and so on.

    data: what `core` was made from.

    Raises:
        ValueError: naming what differs.
    """
    where = f"{path}: layer {layer.index}"
    heads = Heads(core.kv_heads, core.head_dim)
    if layer.heads is not None and heads != layer.heads:
        raise ValueError(f"{where} has {heads}, the model's {layer.heads}")
    keys, values = (
        torch.empty(core.batch, core.kv_heads, 0, dim, dtype=dtype, device="cpu")
        for dim, dtype in zip((core.head_dim, core.value_head_dim), dtypes, strict=True)
    )
    dtype = torch.promote_types(*dtypes)
    held, usual = (options_in(each) for each in (data, layer._store_for(keys, values).serialize()))
    holds = getattr(torch, held.dtype)
    if holds != dtype:
        raise ValueError(f"{where} holds {holds}, and its header says {dtype}")
    if core.value_codes != layer.settings.value_codes:
        raise ValueError(
            f"{where} has values in {core.value_codes} codes, and the file's settings say "
            f"{layer.settings.value_codes}"
        )
    for name in _COMPARED:
        got, expected = getattr(held, name), getattr(usual, name)
        if got != expected:
            raise ValueError(
                f"{where} was compressed with {name}={got!r}, and the file's settings say "
                f"{expected!r}"
            )
    ropes = held.rope, usual.rope
    if (ropes[0] is None) != (ropes[1] is None) or (
        ropes[0] is not None
        and (ropes[0][1:] != ropes[1][1:] or not _close(ropes[0][0], ropes[1][0]))
    ):
        raise ValueError(f"{where} was compressed with another rotary embedding than it says")


def check_basis(path: Path, layer: TqaiLayer, core: Any, described: Mapping[str, Any]) -> None:
    """Whether a layer's keys are in the basis that the header names.

    Raises:
        ValueError: where they are not.
    """
    named = described.get("basis")
    held = None if core.key_basis is None else f"{core.key_basis.id:016x}"
    if named != held or (held is not None and not layer.settings.learns_bases):
        raise ValueError(
            f"{path}: the keys of layer {layer.index} are in the basis {held}, and the file's "
            f"header says {named}, with codec={layer.settings.codec!r}"
        )


def check_index(path: Path, layer: TqaiLayer, core: Any, found: Mapping[str, torch.Tensor]) -> None:
    """Whether the index of a layer, if it has one, is one of the tokens that `core` holds.

    Raises:
        ValueError: naming what it is.
    """
    if ("index" in found) != isinstance(layer, IndexedLayer):
        has = "has" if "index" in found else "lacks"
        raise ValueError(f"{path}: layer {layer.index} {has} an index; save the cache again")
    tokens = (core.batch, core.tokens)
    for name, tensor in found.items():
        its = tensor.shape[:2] if name == "index" else tensor.shape[1:]
        if tensor.ndim != 3 or tuple(its) != tokens:
            raise ValueError(
                f"{path}: layer {layer.index} has {name} of shape {tuple(tensor.shape)}, and "
                f"{tokens[1]} tokens in {tokens[0]} rows"
            )


def check_exact(path: Path, index: int, heads: Heads | None, held: Mapping[str, Any]) -> None:
    """Whether the tensors of an uncompressed layer are keys and values of one another.

    Raises:
        ValueError: naming what they are.
    """
    keys, values = held["keys"], held["values"]
    fits = (
        keys.ndim == values.ndim == 4
        and keys.shape[:3] == values.shape[:3]
        and keys.dtype.is_floating_point
        and values.dtype.is_floating_point
        and (heads is None or (keys.shape[1], keys.shape[3]) == tuple(heads))
    )
    if not fits:
        shapes = [f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (keys, values)]
        raise ValueError(
            f"{path}: layer {index} has keys of {shapes[0]} and values of {shapes[1]}, which no "
            f"layer of the model has (heads: {heads})"
        )


def check_layers(where: str, parts: Mapping[str, Any]) -> None:
    """Whether all layers of a cache have read the same tokens of the same rows.

    where: what comes first in the message.

    Raises:
        ValueError: naming the layers that differ.
    """
    batches: dict[str, int] = {}
    for part, half in parts.items():
        name = "layer" if part == "layers" else "cross layer"
        config = half.geometry.config
        apart = set(getattr(config, "cross_attention_layers", None) or ())  # they read an image
        lengths: dict[str, int] = {}
        paddings: dict[Any, dict[str, list[int]]] = defaultdict(dict)
        for index, layer in enumerate(half.layers):
            if holds_nothing(layer):
                continue
            tokens = int(layer.get_seq_length())
            place = f"{name} {index}"
            if tokens > 0:
                batches[place] = _batch(layer)
            if tokens > 0 or not (index in apart or _shares(config, index, len(half.layers))):
                if index not in apart:
                    lengths[place] = tokens
            if isinstance(layer, TqaiLayer) and tokens > 0:
                if len(layer.padding) != layer.core.batch or max(layer.padding) > tokens:
                    raise ValueError(
                        f"{where}: {place} has {layer.padding} tokens of padding, and "
                        f"{layer.core.batch} rows of {tokens} tokens"
                    )
                if index not in apart:
                    paddings[layer.sliding_window][place] = layer.padding
        _agree(where, lengths, "tokens")
        for each in paddings.values():
            _agree(where, each, "tokens of padding")
    _agree(where, batches, "rows")


def _agree(where: str, values: Mapping[str, Any], what: str) -> None:
    places = list(values)
    for place in places[1:]:
        if values[place] != values[places[0]]:
            raise ValueError(
                f"{where}: {places[0]} has {values[places[0]]} {what}, {place} has {values[place]}"
            )


def _batch(layer: Any) -> int:
    return layer.core.batch if isinstance(layer, TqaiLayer) else layer.keys.shape[0]


def _shares(config: Any, index: int, layers: int) -> bool:
    """Whether a layer reads the keys and values of another one, and may have none."""
    return index >= layers - (getattr(config, "num_kv_shared_layers", None) or 0)
