"""Caches in files: a prompt is read once, and kept for later and for other processes.

A file is safetensors: one tensor of bytes for each compressed layer, as ``_core.KvCache.serialize``
writes it, the keys and values of uncompressed layers, and a header of JSON in the metadata. Reading
executes nothing, and every length, checksum and number is checked before it is used.
"""

from __future__ import annotations

import json
import os
import secrets
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tqai import _core, stores
from tqai.settings import Settings
from tqai.stores.rope import Rope
from tqai.stores.tensor_refs import DTYPES
from tqai.transformers import hooks
from tqai.transformers.cache import TqaiCache
from tqai.transformers.devices import layer_device
from tqai.transformers.encoder_decoder import CrossLayer, TqaiEncoderDecoderCache
from tqai.transformers.geometry import Geometry, decoder_of, geometry_of
from tqai.transformers.layer import TqaiLayer
from tqai.transformers.other_layers import holds_nothing
from tqai.transformers.weights import State, sampled_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1
WEIGHTS = "every tensor"
"""How files tell weights apart; those without a kind do so by ``sampled_fingerprint``."""
_LOCAL = ("backend", "level")
"""Settings that are the machine's, not the file's."""
# Frequencies are computed by the loading machine again; another rounding is no other embedding.
ROPE_TOLERANCE = 1e-5
_KINDS = {
    TqaiLayer: "tqai",
    CrossLayer: "cross",
    DynamicLayer: "exact",
    DynamicSlidingWindowLayer: "sliding",
}
_DTYPES = {str(dtype): dtype for dtype in DTYPES}


def save_cache(cache: TqaiCache | TqaiEncoderDecoderCache, path: str | os.PathLike[str]) -> None:
    """Writes `cache` to the file `path`, whole or not at all; an existing file is replaced.

    The file takes about ``cache.nbytes`` bytes, and writing it as many more of memory.

    Raises:
        ValueError: for something else than a cache of tqai's.
        NotImplementedError: for a layer that is neither compressed nor keys and values (the
            recurrent state of a hybrid model), naming it, and for layers beyond the model's.
        OSError: where the file cannot be written; what was there before is still there.
    """
    if not isinstance(cache, (TqaiCache, TqaiEncoderDecoderCache)):
        raise ValueError(
            "save_cache(cache, path) takes a cache that tqai made (TqaiCache, "
            f"TqaiEncoderDecoderCache); got {type(cache).__name__}"
        )
    weights = _weights(cache)
    tensors: dict[str, torch.Tensor] = {}
    described: dict[str, list[dict[str, Any]]] = {}
    for part, half in _parts(cache).items():
        if len(half.layers) != len(cache.geometry.heads):
            raise NotImplementedError(
                f"the cache has {len(half.layers)} layers, {len(cache.geometry.heads)} of which "
                f"{cache.geometry.model}'s configuration knows; the rest are copies that the model "
                "has added, and no file holds those"
            )
        described[part] = []
        for index, layer in enumerate(half.layers):
            description, held = _describe(index, layer)
            for name, tensor in held.items():
                tensors[f"{part}.{index}.{name}"] = tensor
            described[part].append(description)
    header = json.dumps(
        {
            "model": cache.geometry.describe(),
            "heads": cache.geometry.heads,
            "weights": weights,
            "settings": _of_any_machine(cache.settings),
            "sliding": cache.sliding,
            **described,
            "checksums": {name: _checksum(tensor) for name, tensor in tensors.items()},
        }
    )
    metadata = {
        "format": "tqai-cache",
        "version": str(VERSION),
        "header": header,
        "checksum": str(zlib.crc32(header.encode())),
    }
    _write_whole(tensors, metadata, Path(path))


def load_cache(
    path: str | os.PathLike[str], model: PreTrainedModel
) -> TqaiCache | TqaiEncoderDecoderCache:
    """The cache that ``save_cache`` wrote, for a patched model with the same weights.

    Bits, windows and centres are the file's; the level and the backend are those that `model` is
    patched with, and the device is `model`'s, whichever ones wrote the file.
    Pass the cache as ``past_key_values``, with the ids of all tokens that it has read and new ones.

    Raises:
        ValueError: for a file that is not such a cache, is damaged, or was written by another
            version of the format; for another model; for a model that is not patched.
        OSError: where the file cannot be read.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(
            f"load_cache(path, model) takes the path of a file; got {type(path).__name__}"
        )
    here = hooks.settings_of(model)
    geometry, decoder = geometry_of(model), decoder_of(model)
    path = Path(path)
    with path.open("rb"):  # safetensors' own errors do not tell a missing file from a damaged one
        pass
    try:
        with safe_open(path, "pt") as file:
            header = _header(path, file.metadata() or {})
            state = _check_model(path, header, geometry, decoder)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if {name: _checksum(tensor) for name, tensor in tensors.items()} != header["checksums"]:
            raise ValueError(f"{path} is damaged: its checksums do not fit; save the cache again")
        settings = _settings(header["settings"], here)
        cache = hooks.make_cache(model, settings, header["sliding"])
        for part, half in _parts(cache).items():
            if len(half.layers) != len(header[part]):
                raise ValueError(f"{path} has {len(header[part])} layers; expected one a layer")
            for index, (layer, described) in enumerate(zip(half.layers, header[part], strict=True)):
                prefix = f"{part}.{index}."
                held = {
                    name.removeprefix(prefix): tensor
                    for name, tensor in tensors.items()
                    if name.startswith(prefix)
                }
                _restore(path, index, layer, described, held, layer_device(decoder, index))
            half.weights = state
        if isinstance(cache, TqaiEncoderDecoderCache):
            cache.mark_updated()
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no file of tqai.save_cache, or damaged ({error}); save the cache again"
        ) from error
    return cache


def _parts(cache: TqaiCache | TqaiEncoderDecoderCache) -> dict[str, TqaiCache]:
    """What a cache consists of, by the name in the file."""
    if isinstance(cache, TqaiEncoderDecoderCache):
        return {"layers": cache.self_attention_cache, "cross_layers": cache.cross_attention_cache}
    return {"layers": cache}


def _describe(index: int, layer: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the header says of a layer, and its tensors."""
    kind = _kind(layer)
    if kind is None:
        raise NotImplementedError(
            f"layer {index} is a {type(layer).__name__}; tqai saves layers of keys and values only"
        )
    if isinstance(layer, TqaiLayer):
        rope = None if layer.rope is None else asdict(layer.rope)
        described = {"kind": kind, "rope": rope, "padding": layer.padding, "dtypes": None}
        if layer.core is None or layer.dtypes is None:
            return described, {}
        described["dtypes"] = [str(dtype) for dtype in layer.dtypes]
        packed = torch.frombuffer(bytearray(layer.core.serialize()), dtype=torch.uint8)
        return described, {"packed": packed}
    if holds_nothing(layer):
        return {"kind": kind}, {}
    described = {"kind": kind, "length": int(layer.get_seq_length())}
    if not layer.is_initialized:
        return described, {}
    states = {"keys": layer.keys, "values": layer.values}
    return described, {name: tensor.contiguous().cpu() for name, tensor in states.items()}


def _kind(layer: Any) -> str | None:
    """The layer's kind in a file; None for those that are not written into files."""
    return "nothing" if holds_nothing(layer) else _KINDS.get(type(layer))


def _restore(
    path: Path,
    index: int,
    layer: Any,
    described: dict[str, Any],
    held: dict[str, torch.Tensor],
    device: torch.device,
) -> None:
    """Gives a fresh layer what a file holds of it."""
    if described["kind"] != _kind(layer):
        raise ValueError(
            f"{path}: layer {index} is of kind {described['kind']!r}, the model's is a "
            f"{type(layer).__name__}; load it with the transformers version that it was saved with"
        )
    if not held:
        return
    if not isinstance(layer, TqaiLayer):
        keys, values = (held[name].to(device) for name in ("keys", "values"))
        layer.update(keys, values)
        if type(layer) is DynamicSlidingWindowLayer:
            layer.cumulative_length = described["length"]
        return
    if not _same_rope(described["rope"], layer.rope):
        raise ValueError(
            f"{path}: the keys of layer {index} went through another rotary embedding than the "
            "model's; load it with the configuration that it was saved with"
        )
    core = _core.KvCache.deserialize(held["packed"].numpy(), level=layer.settings.level)
    if layer.heads is not None and (core.kv_heads, core.head_dim) != tuple(layer.heads):
        raise ValueError(f"{path}: layer {index} has other heads than the model")
    layer.core = stores.moved(core, layer.settings, device)
    layer.dtypes = tuple(_DTYPES[dtype] for dtype in described["dtypes"])
    layer.padding = [int(count) for count in described["padding"]]


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if metadata.get("format") != "tqai-cache":
        raise ValueError(f"{path} is a safetensors file, but not one of tqai.save_cache")
    if metadata["version"] != str(VERSION):
        raise ValueError(
            f"{path} is of format version {metadata['version']}; this tqai reads version "
            f"{VERSION}: save the cache again, or use the tqai that wrote it"
        )
    header = metadata["header"]
    if str(zlib.crc32(header.encode())) != metadata["checksum"]:
        raise ValueError(f"{path} is damaged: its header's checksum does not fit; save it again")
    return json.loads(header)


def _weights(cache: TqaiCache | TqaiEncoderDecoderCache) -> dict[str, Any] | None:
    """What the header says of the weights that a cache has read its text with; None: no text."""
    parts = _parts(cache)
    state = next((half.weights for half in parts.values() if not half.is_empty()), None)
    if state is None:
        state = cache.geometry.weights()
    try:
        identity = state.identity(afresh=True)
    except ValueError as error:
        raise ValueError(
            f"{error}; a file says which weights its cache goes with, and cannot say so any more: "
            "save caches before the model changes"
        ) from error
    return {
        "kind": WEIGHTS,
        "structure": identity.structure,
        "tensors": identity.tensors,
    }


def _check_model(
    path: Path, header: dict[str, Any], geometry: Geometry, decoder: torch.nn.Module
) -> State:
    """The state of the weights of `decoder`, where they are those of the file."""
    heads = [None if heads is None else list(heads) for heads in geometry.heads]
    if header["heads"] != heads:
        raise ValueError(
            f"{path} was made for {header['model']}, not for {geometry.describe()}; a cache goes "
            "with one model"
        )
    saved, state = header["weights"], geometry.weights()
    if isinstance(saved, str):  # before there was "kind"
        if saved != sampled_fingerprint(decoder):
            raise _other_weights(path, header)
        return state
    if saved["kind"] != WEIGHTS:
        raise ValueError(
            f"{path} tells weights apart by {saved['kind']!r}; this tqai knows {WEIGHTS!r}: save "
            "the cache again, or use the tqai that wrote it"
        )
    identity = state.identity(afresh=True)
    if saved["structure"] != identity.structure or len(saved["tensors"]) != len(identity.names):
        raise _other_weights(path, header)
    differing = identity.differing(saved["tensors"])
    if differing:
        raise _other_weights(path, header, f" ({_some(differing)})")
    unread = [
        name
        for name, ours, theirs in zip(
            identity.names, identity.tensors, saved["tensors"], strict=True
        )
        if ours is None or theirs is None
    ]
    if unread:
        warnings.warn(
            f"{path}: {len(unread)} of {len(identity.names)} weights ({_some(unread)}) could not "
            "be compared with those that the cache was made with, as their values are out of reach "
            "(on the device 'meta'), then or now; only names, shapes and dtypes were compared",
            stacklevel=3,
        )
    return state


def _other_weights(path: Path, header: dict[str, Any], which: str = "") -> ValueError:
    return ValueError(
        f"{path} was made by a {header['model']} with other weights{which}, of another dtype or "
        "with other adapters; put them back, or read the prompt again with this one"
    )


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _same_rope(saved: dict[str, Any] | None, rope: Rope | None) -> bool:
    if saved is None or rope is None:
        return saved is None and rope is None
    frequencies = [
        torch.tensor(given, dtype=torch.float64) for given in (saved["inv_freq"], rope.inv_freq)
    ]
    return (
        saved["layout"] == rope.layout
        and frequencies[0].shape == frequencies[1].shape
        and torch.allclose(*frequencies, rtol=ROPE_TOLERANCE, atol=0.0)
    )


def _of_any_machine(settings: Settings) -> dict[str, Any]:
    return {name: value for name, value in asdict(settings).items() if name not in _LOCAL}


def _settings(saved: dict[str, Any], here: Settings) -> Settings:
    """JSON has made strings of the layers that a mapping of bits names."""
    values = {
        name: {int(layer): bits for layer, bits in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in saved.items()
    }
    return replace(Settings(**values), **{name: getattr(here, name) for name in _LOCAL})


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _write_whole(tensors: dict[str, torch.Tensor], metadata: dict[str, str], path: Path) -> None:
    """Writes beside `path`, to the disk, and then takes its place."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
