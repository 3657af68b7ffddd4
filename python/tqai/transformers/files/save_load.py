"""Caches in files: a prompt is read once, and kept for later and for other processes.

A file is safetensors: one tensor of bytes for each compressed layer, as ``_core.KvCache.serialize``
writes it, the keys and values of uncompressed layers, and a header of JSON in the metadata. Reading
executes nothing, and every length, checksum and number is checked before it is used.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tqai import _core, container
from tqai.settings import Settings
from tqai.shapes.heads import Heads
from tqai.stores import for_torch as stores
from tqai.stores.for_torch.tensor_refs import DTYPES
from tqai.transformers import hooks
from tqai.transformers.basis.bases import NONE, Bases
from tqai.transformers.cache.beside import IndexedLayer
from tqai.transformers.cache.cache import TqaiCache
from tqai.transformers.cache.encoder_decoder import CrossLayer, TqaiEncoderDecoderCache
from tqai.transformers.cache.layer import TqaiLayer
from tqai.transformers.files import checks as file_checks
from tqai.transformers.files.checks import WEIGHTS
from tqai.transformers.model.constants import difference
from tqai.transformers.model.devices import layer_device
from tqai.transformers.model.geometry import Geometry, decoder_of, geometry_of
from tqai.transformers.model.other_layers import holds_nothing
from tqai.transformers.weights.identity import Identity, State, sampled_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tqai.api import EncoderDecoder

_INDEX = {"index": "indexer_keys", "index_positions": "indexer_position_ids"}
"""Tensors of an index in a file, and what the layer calls them."""
_TENSORS = ("packed", "keys", "values", *_INDEX)
_LOCAL = ("backend", "level")
"""Settings that are the machine's, not the file's."""
_KINDS = {
    TqaiLayer: "tqai",
    CrossLayer: "cross",
    IndexedLayer: "indexed",
    DynamicLayer: "exact",
    DynamicSlidingWindowLayer: "sliding",
}
_MAPPED_SINCE = 3
"""Version of files whose tiles are aligned."""
_OPTIONS_BYTES = 1 << 16
"""Of a layer's bytes, more than its options take."""
_FILE_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}
"""What uncompressed tensors are, as safetensors calls it."""
_DTYPES = {str(dtype): dtype for dtype in DTYPES}


def save_cache(
    cache: TqaiCache | TqaiEncoderDecoderCache, path: str | os.PathLike[str], *, basis: bool = False
) -> None:
    """Writes `cache` to the file `path`, whole or not at all; an existing file is replaced.

    The file takes about ``cache.nbytes`` bytes; writing it takes memory for one layer at most.

    basis: whether the bases go into it that keys are quantised in (codec="adaptive"), which takes
    up to ``memory_report()["basis_bytes"]`` more. Without them the file only names them, and is
    read where the same ones are learnt: from the same weights, on a like machine with the same
    PyTorch.

    Raises:
        ValueError: for something else than a cache of tqai's; for layers that have not read the
            same tokens, as after a forward pass that was interrupted; where the model's weights are
            no more those that the cache has read its text with.
        NotImplementedError: for a layer that is neither compressed nor keys and values (the
            recurrent state of a hybrid model), naming it, and for layers beyond the model's.
        OSError: where the file cannot be written; what was there before is still there.
    """
    write_cache(cache, path, basis, {})


def write_cache(
    cache: TqaiCache | TqaiEncoderDecoderCache,
    path: str | os.PathLike[str],
    basis: bool,
    notes: Mapping[str, Any],
) -> None:
    """``save_cache``, with `notes` beside what the file's header says itself."""
    if not isinstance(cache, (TqaiCache, TqaiEncoderDecoderCache)):
        raise ValueError(
            "save_cache(cache, path) takes a cache that tqai made (TqaiCache, "
            f"TqaiEncoderDecoderCache); got {type(cache).__name__}"
        )
    if not isinstance(basis, bool):
        raise ValueError(f"save_cache(…, basis={basis!r}): expected True or False")
    cache = copy.copy(cache)  # of one moment, whatever other threads do
    tensors: list[tuple[str, str, tuple[int, ...] | None, container.Source]] = []
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
            if cache.settings.learns_bases and isinstance(layer, TqaiLayer):
                description.update(_basis_of(layer, basis), rotated=half.rotated.get(index))
            for name, tensor in held.items():
                tensors.append(_entry(f"{part}.{index}.{name}", tensor, basis))
            described[part].append(description)
    file_checks.check_layers("this cache cannot be saved", _parts(cache))
    header = {
        "model": cache.geometry.describe(),
        "heads": cache.geometry.heads,
        "weights": _weights(cache),
        "constants": dict(cache.geometry.constants),
        "settings": _of_any_machine(cache.settings),
        "sliding": cache.sliding,
        **described,
        **notes,
    }
    container.write(path, header, tensors)


@overload
def load_cache(
    path: str | os.PathLike[str], model: EncoderDecoder, *, mapped: bool = False
) -> TqaiEncoderDecoderCache: ...
@overload
def load_cache(
    path: str | os.PathLike[str], model: PreTrainedModel, *, mapped: bool = False
) -> TqaiCache: ...
def load_cache(
    path: str | os.PathLike[str], model: PreTrainedModel, *, mapped: bool = False
) -> TqaiCache | TqaiEncoderDecoderCache:
    """The cache that ``save_cache`` wrote, for a patched model with the same weights.

    Bits, windows, centres and bases are the file's; the level and the backend are those that
    `model` is patched with, and the device is `model`'s, whichever ones wrote the file.
    Pass the cache as ``past_key_values``, with the ids of all tokens that it has read and new ones.

    mapped: compressed tokens stay in the file's pages, which the system reads when they are used,
    shares between processes and may drop when memory is short; everything else is copied, also what
    comes later. Replacing or removing the file is fine; as long as the cache or a copy lives,
    nobody may shorten it or write into it: the process would end by SIGBUS, or read other tokens.

    Raises:
        ValueError: for a file that is not such a cache, is damaged, or was written by another
            version of the format; for another model; for a model that is not patched; for keys in
            a basis that the file only names and the model has not learnt; where
            `mapped` is asked for and layers are not read by the C++ kernels, or the file is of a
            format before 3.
        OSError: where the file cannot be read.
    """
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise ValueError(
            f"load_cache(path, model) takes the path of a file; got {type(path).__name__}"
        )
    path = Path(os.fsdecode(path))
    return read_cache(path, *container.opened(path), model, mapped)


def read_cache(
    path: Path,
    file: _core.CacheFile,
    header: Mapping[str, Any],
    model: PreTrainedModel,
    mapped: bool,
) -> TqaiCache | TqaiEncoderDecoderCache:
    """``load_cache`` of a file that is open, whatever lies at `path` by now."""
    here = hooks.settings_of(model)
    geometry, decoder = geometry_of(model, afresh=True), decoder_of(model)
    file_checks.check_header(path, header)
    if mapped and file.version < _MAPPED_SINCE:
        raise ValueError(
            f"{path} is of format version {file.version}, whose compressed tokens cannot stay in "
            "the file; load it without mapped, or save it again"
        )
    state = _check_model(path, header, geometry, decoder)
    left = set(file.tensors)
    try:
        settings = _settings(header["settings"], here)
        cache = hooks.make_cache(model, settings, header["sliding"], _bases_in(header))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: its settings are none of a cache of this model: {error}"
        ) from error
    for part, half in _parts(cache).items():
        layers = header.get(part, ())
        if len(half.layers) != len(layers):
            raise ValueError(f"{path} has {len(layers)} {part}; the model has {len(half.layers)}")
        for index, (layer, described) in enumerate(zip(half.layers, layers, strict=True)):
            names = {name: f"{part}.{index}.{name}" for name in _TENSORS}
            held = {
                name: _Packed(file, full, mapped) if name == "packed" else _tensor(path, file, full)
                for name, full in names.items()
                if full in left
            }
            left.difference_update(names.values())
            device = layer_device(decoder, index)
            heads = geometry.heads[index]
            _restore(path, index, heads, layer, described, held, device)
        half.rotated = {
            index: described["rotated"]
            for index, described in enumerate(layers)
            if described.get("rotated") is not None
        }
        half.weights = state
    if left:
        raise ValueError(f"{path} has {min(left)!r}, which is no part of a cache")
    file_checks.check_layers(str(path), _parts(cache))
    if isinstance(cache, TqaiEncoderDecoderCache):
        cache.mark_updated()
    return cache


def _parts(cache: TqaiCache | TqaiEncoderDecoderCache) -> dict[str, TqaiCache]:
    """What a cache consists of, by the name in the file."""
    if isinstance(cache, TqaiEncoderDecoderCache):
        return {"layers": cache.self_attention_cache, "cross_layers": cache.cross_attention_cache}
    return {"layers": cache}


def _describe(index: int, layer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the header says of a layer, and its tensors; its store in the place of one."""
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
        return described, {"packed": layer.core, **_index_of(layer)}
    if holds_nothing(layer):
        return {"kind": kind}, {}
    described = {"kind": kind, "length": int(layer.get_seq_length())}
    if not layer.is_initialized:
        return described, {}
    states = {"keys": layer.keys, "values": layer.values}
    return described, states


def _index_of(layer: TqaiLayer) -> dict[str, torch.Tensor]:
    """The tensors of a layer's index, where it has one."""
    found = {name: getattr(layer, attribute, None) for name, attribute in _INDEX.items()}
    return {name: each for name, each in found.items() if each is not None}


def _kind(layer: Any) -> str | None:
    """The layer's kind in a file; None for those that are not written into files."""
    return "nothing" if holds_nothing(layer) else _KINDS.get(type(layer))


def _restore(
    path: Path,
    index: int,
    heads: Heads | None,
    layer: Any,
    described: dict[str, Any],
    held: dict[str, Any],
    device: torch.device,
) -> None:
    """Gives a fresh layer what a file holds of it."""
    if described["kind"] != _kind(layer):
        raise ValueError(
            f"{path}: layer {index} is of kind {described['kind']!r}, the model's is a "
            f"{type(layer).__name__}; load it with the transformers version that it was saved with"
        )
    found = {name: held.pop(name) for name in _INDEX if name in held}
    expected = ("keys", "values") if not isinstance(layer, TqaiLayer) else ("packed",)
    if (held or found) and tuple(held) != expected:
        raise ValueError(f"{path}: layer {index} has {', '.join(held)}; expected {expected}")
    if not isinstance(layer, TqaiLayer):
        if held:
            _restore_exact(path, index, heads, layer, described["length"], held, device)
        return
    file_checks.check_rope(path, index, described["rope"], layer.rope)
    if not held:
        return
    packed = held["packed"]
    if described["dtypes"] is None:
        raise ValueError(f"{path}: layer {index} holds bytes, and its header says no dtypes")
    unknown = [name for name in described["dtypes"] if name not in _DTYPES]
    if unknown:
        raise ValueError(
            f"{path}: layer {index} is of {unknown[0]!r}; allowed are {', '.join(_DTYPES)}"
        )
    if layer.rope is not None:
        layer.rope = file_checks.rope_of(described["rope"], layer.rope)
    dtypes = tuple(_DTYPES[dtype] for dtype in described["dtypes"])
    if packed.mapped and not stores.is_native(layer.settings.backend, device):
        raise ValueError(
            f"{path}: mapped, but layer {index} is read on the device {device} with backend "
            f"{layer.settings.backend!r}; only the C++ kernels (on the CPU, backend 'auto') read "
            "files where they are: load it without mapped"
        )
    core = _load_packed(path, layer, described, packed)
    beginning = container.first_bytes_of(packed.file, packed.name, _OPTIONS_BYTES)
    file_checks.check_store(path, layer, beginning.data, core, dtypes)
    file_checks.check_basis(path, layer, core, described)
    layer.basis = core.key_basis
    file_checks.check_index(path, layer, core, found)
    for name, tensor in found.items():
        setattr(layer, _INDEX[name], tensor.to(device))
    layer.core = stores.moved(core, layer.settings, device)
    layer.dtypes = dtypes
    layer.padding = described["padding"]
    layer.has_gaps = any(core.left_out(row) for row in range(core.batch))
    layer.take_note()


def _load_packed(
    path: Path, layer: TqaiLayer, described: dict[str, Any], packed: _Packed
) -> _core.KvCache:
    """The store of a compressed layer.

    Raises:
        ValueError: also where its keys are in a basis that is neither in the file nor the layer's.
    """
    needed, own = described.get("basis"), layer.basis
    if needed is not None and not described["carried"]:
        if own is None or f"{own.id:016x}" != needed:
            learnt = "none" if own is None else f"{own.id:016x}"
            raise ValueError(
                f"{path}: the keys of layer {layer.index} are in the basis {needed}, which the "
                f"file only names, and this process has learnt {learnt} from the model: another "
                "kind of machine or another PyTorch may. Where the file was written, save the "
                "cache with save_cache(cache, path, basis=True), or read the text again here"
            )
    bases = [] if own is None else [own]
    level = layer.settings.level
    return packed.file.load(packed.name, level=level, mapped=packed.mapped, key_bases=bases)


def _basis_of(layer: TqaiLayer, carried: bool) -> dict[str, Any]:
    """What the header says of a layer's basis; its matrices are in the layer's bytes."""
    if layer.basis is None:
        return {"basis": None, "carried": False}
    return {"basis": f"{layer.basis.id:016x}", "carried": carried and layer.core is not None}


def _bases_in(header: dict[str, Any]) -> Bases | None:
    """None where the cache that a file holds needs bases that the file only names."""
    layers = [
        described for part in ("layers", "cross_layers") for described in header.get(part, ())
    ]
    named = any(
        described.get("basis") is not None and not described["carried"] for described in layers
    )
    return None if named else NONE


def _restore_exact(
    path: Path,
    index: int,
    heads: Heads | None,
    layer: Any,
    length: int,
    held: dict[str, torch.Tensor],
    device: torch.device,
) -> None:
    file_checks.check_exact(path, index, heads, held)
    keys, values = (held[name].to(device) for name in ("keys", "values"))
    kept = layer.sliding_window - 1 if type(layer) is DynamicSlidingWindowLayer else length
    if not min(length, kept) <= keys.shape[2] <= length:
        raise ValueError(
            f"{path}: layer {index} holds {keys.shape[2]} tokens; its header says that it has read "
            f"{length}"
        )
    layer.update(keys, values)
    if type(layer) is DynamicSlidingWindowLayer:
        layer.cumulative_length = length


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
    described = {"kind": WEIGHTS, **_described(identity)}
    if identity.around is not None:
        described["around"] = _described(identity.around)
    return described


def _described(identity: Identity) -> dict[str, Any]:
    return {"structure": identity.structure, "tensors": identity.tensors}


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
    # Files of before this was known have none.
    differing = difference(header.get("constants", {}), geometry.constants)
    if differing:
        raise ValueError(
            f"{path} was made by a {header['model']} whose configuration has another constant "
            f"({differing}); load the model as it was, or read the prompt again with this one"
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
    names, unread = _compare(path, header, saved, identity)
    # What makes the decoder's input, where both knew of it: a decoder can be patched by itself.
    if identity.around is not None and "around" in saved:
        more = _compare(path, header, saved["around"], identity.around)
        names, unread = names + more[0], unread + more[1]
    if unread:
        warnings.warn(
            f"{path}: {len(unread)} of {names} weights ({_some(unread)}) could not be compared "
            "with those that the cache was made with, as their values are out of reach (on the "
            "device 'meta'), then or now; only names, shapes and dtypes were compared",
            stacklevel=3,
        )
    return state


def _compare(
    path: Path, header: dict[str, Any], saved: dict[str, Any], identity: Identity
) -> tuple[int, list[str]]:
    """How many weights there are, and the names of those that cannot be compared."""
    if saved["structure"] != identity.structure or len(saved["tensors"]) != len(identity.names):
        raise _other_weights(path, header)
    differing = identity.differing(saved["tensors"])
    if differing:
        raise _other_weights(path, header, f" ({_some(differing)})")
    pairs = zip(identity.names, identity.tensors, saved["tensors"], strict=True)
    unread = [name for name, ours, theirs in pairs if ours is None or theirs is None]
    return len(identity.names), unread


def _other_weights(path: Path, header: dict[str, Any], which: str = "") -> ValueError:
    return ValueError(
        f"{path} was made by a {header['model']} with other weights{which}, of another dtype or "
        "with other adapters; put them back, or read the prompt again with this one"
    )


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _of_any_machine(settings: Settings) -> dict[str, Any]:
    values = {name: value for name, value in asdict(settings).items() if name not in _LOCAL}
    if settings.codec == "scalar":  # older versions say nothing of it, and read no other
        del values["codec"]
    return values


def _settings(saved: dict[str, Any], here: Settings) -> Settings:
    """JSON has made strings of the layers that a mapping of bits names."""
    values = {
        name: {int(layer): bits for layer, bits in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in saved.items()
    }
    return replace(Settings(**values), **{name: getattr(here, name) for name in _LOCAL})


class _Packed(NamedTuple):
    """A compressed layer that is still in its file."""

    file: _core.CacheFile
    name: str
    mapped: bool


def _entry(
    name: str, held: Any, basis: bool
) -> tuple[str, str, tuple[int, ...] | None, container.Source]:
    """A tensor or a store as ``container.write`` takes it; what is elsewhere comes at its turn."""
    if not isinstance(held, torch.Tensor):
        carried = basis and held.key_basis is not None
        if isinstance(held, _core.KvCache) and not carried:
            return name, "U8", None, held
        return name, "U8", None, partial(held.serialize, with_basis=carried)

    def data() -> np.ndarray:
        return held.contiguous().cpu().view(-1).view(torch.uint8).numpy()

    return name, _FILE_DTYPES[held.dtype], tuple(held.shape), data


def _tensor(path: Path, file: _core.CacheFile, name: str) -> torch.Tensor:
    """A tensor of a file, on the CPU."""
    dtype, shape, _ = file.tensors[name]
    known = {held: each for each, held in _FILE_DTYPES.items()}
    if dtype not in known:
        raise ValueError(f"{path}: {name} is of dtype {dtype}; allowed are {', '.join(known)}")
    if 0 in shape:
        file.verify(name)
        return torch.empty(shape, dtype=known[dtype], device="cpu")
    return torch.from_numpy(container.bytes_of(file, name)).view(known[dtype]).view(shape)
