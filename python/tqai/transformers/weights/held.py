"""What a model computes with, by name: parameters, buffers that are saved, packed weights.

The names do not depend on how the weights are held. A layer under an adapter that is off, or merged
into it, is the layer; an adapter that is on goes by its place among those that are on; values that
accelerate keeps elsewhere are found there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

_INNER = ("base_layer", "original_module", "token_adapter", "_orig_mod")
"""What a wrapper calls the module that it wraps."""
_OF_ROWS = frozenset({"adapter_names", "alora_offsets"})
"""Arguments by which PEFT's layers compute each row of a batch in its own way."""
CHANGING = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose frequencies depend on the length of the text."""


class Adapter(NamedTuple):
    """What an adapter layer (PEFT's, also as transformers uses them) is set to."""

    off: bool
    active: tuple[str, ...]
    merged: tuple[str, ...]
    scaling: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, module: Any) -> Adapter | None:
        """None for a module that is no adapter layer."""
        if not ("_disable_adapters" in vars(module) or hasattr(type(module), "_disable_adapters")):
            return None
        off, active = module._disable_adapters, module._active_adapter
        scaling = vars(module).get("scaling")
        return cls(
            bool(off),
            (active,) if isinstance(active, str) else tuple(active),
            tuple(module.merged_adapters),
            tuple(scaling.items()) if isinstance(scaling, dict) else (),
        )

    @property
    def on(self) -> tuple[str, ...]:
        """The adapters whose own weights are computed with."""
        return () if self.off or self.merged else self.active

    def effect(self) -> Any:
        """What they do beside their weights; None: nothing."""
        if self.off and self.merged:
            return "off, to be taken out of the layer again at its next call"
        scaling = dict(self.scaling)
        return tuple(scaling.get(name) for name in self.on) or None


class Part(NamedTuple):
    """A module without its children."""

    name: str
    """Of the module with a dot at its end, empty for the whole."""
    module: nn.Module
    only: Mapping[str, str] | None
    """Of a collection, the keys that count and their names; None: all."""
    elsewhere: tuple[tuple[Mapping[str, torch.Tensor], str], ...]
    """Where offloaded values are: a mapping and what comes before the tensor's name in it."""
    adapter: Adapter | None

    def tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Key, whole name and tensor of each parameter and buffer that counts."""
        hidden = self.module._non_persistent_buffers_set
        buffers = {k: t for k, t in self.module._buffers.items() if k not in hidden}
        for key, tensor in {**self.module._parameters, **buffers}.items():
            named = key if self.only is None else self.only.get(key)
            if tensor is not None and named is not None:
                yield key, self.name + named, tensor

    def packed(self) -> Any:
        """Weights in a form of their own, as torch's quantised modules hold them; or None."""
        return vars(self.module).get("_packed_params")

    def at_hand(self, key: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """`tensor`, or where it is offloaded, its value in memory; None where that is not there."""
        if tensor.device.type != "meta":
            return tensor
        for mapping, prefix in self.elsewhere:
            name = prefix + key
            while not isinstance(mapping, dict):  # accelerate's views of one mapping
                if hasattr(mapping, "prefix"):
                    name, mapping = mapping.prefix + name, mapping.dataset
                else:
                    mapping = getattr(mapping, "state_dict", {})
            if isinstance(mapping.get(name), torch.Tensor):
                return mapping[name]
        return None

    def values(self) -> Iterator[tuple[str, Any]]:
        """Names and contents; read from the disk where they are there, on "meta" where nowhere."""
        if self._is_usual():
            for key, name, tensor in self.tensors():
                yield name, self._value(key, tensor)
            return
        own: dict[str, Any] = {}
        self.module._save_to_state_dict(own, "", True)
        for key, value in own.items():
            yield (
                self.name + key,
                self._value(key, value) if isinstance(value, torch.Tensor) else value,
            )

    def _is_usual(self) -> bool:
        kind = type(self.module)
        return self.only is not None or (
            kind._save_to_state_dict is nn.Module._save_to_state_dict
            and kind.get_extra_state is nn.Module.get_extra_state
        )

    def _value(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        value = self.at_hand(key, tensor)
        if value is None:
            for mapping, prefix in self.elsewhere:
                try:
                    value = mapping[prefix + key]
                    break
                except KeyError:
                    continue
        if value is None:
            return tensor
        # accelerate casts what it brings back.
        return value.to(tensor.dtype) if value.dtype != tensor.dtype else value


def adapters_of_rows(decoder: nn.Module) -> bool:
    """Whether rows are computed with adapters that the pass was given for each of them, as PEFT's
    ``adapter_names``, which come by hooks on the adapter layers."""
    for module in decoder.modules():
        if Adapter.of(module) is None:
            continue
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, partial) and _OF_ROWS & hook.keywords.keys():
                return True
    return False


def parts_of(decoder: nn.Module) -> Iterator[Part]:
    """All modules that compute; a module that is held in two places comes twice."""
    return _walk(decoder, "", None, (), ())


def parts_around(model: nn.Module, decoder: nn.Module) -> Iterator[Part]:
    """What of `model` is neither its decoder nor its output head: what makes the decoder's input.

    An encoder is such, and what reads images.
    """
    heads: list[nn.Module] = []
    for owner in (model, decoder):
        try:
            heads.append(owner.get_output_embeddings())
        except (AttributeError, NotImplementedError):
            continue
    return _walk(model, "", None, (), (decoder, *heads))


def turns_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The frequencies that a rotary module turns keys by, which are not saved with a model.

    Empty for other modules, and where they change with the length of the text.
    """
    kinds = getattr(module, "rope_type", None)
    kinds = tuple(kinds.values()) if isinstance(kinds, dict) else (kinds,)
    if not all(isinstance(kind, str) and kind not in CHANGING for kind in kinds):
        return {}
    return {
        key: buffer
        for key, buffer in module._buffers.items()
        if key.endswith("inv_freq") and "original" not in key and buffer is not None
    }


def _walk(
    module: nn.Module,
    name: str,
    only: Mapping[str, str] | None,
    elsewhere: tuple[tuple[Mapping[str, torch.Tensor], str], ...],
    above: tuple[nn.Module, ...],
) -> Iterator[Part]:
    if any(module is other for other in above):
        return
    above = (*above, module)
    hooks = _offloads(module)
    adapter = Adapter.of(module)
    own = tuple((hook.weights_map, "") for hook in hooks)
    yield Part(name, module, {} if adapter and not adapter.on else only, own + elsewhere, adapter)

    below = tuple((hook.weights_map, "") for hook in hooks if hook.place_submodules) + elsewhere
    for key, child, keys in _children(module, adapter, only):
        inner = key in _INNER
        yield from _walk(
            child,
            name if inner else f"{name}{key if only is None else only[key]}.",
            keys,
            tuple((mapping, f"{prefix}{key}.") for mapping, prefix in below),
            above,
        )


def _children(
    module: nn.Module, adapter: Adapter | None, only: Mapping[str, str] | None
) -> Iterator[tuple[str, nn.Module, Mapping[str, str] | None]]:
    """Key, module and keys that count in it, of the children that compute."""
    children = {key: child for key, child in module._modules.items() if child is not None}
    if adapter is None:
        for key, child in children.items():
            if only is None or key in only:
                yield key, child, None
        return
    if "token_adapter" in children:  # which wraps the original itself
        children.pop("original_module", None)
    copies = children.pop("modules_to_save", None)
    if copies is not None and isinstance(copies, nn.ModuleDict):
        for name in adapter.on:
            if name in copies:  # in place of the original
                yield "original_module", copies[name], None
                return
    for key, child in children.items():
        if key in _INNER:
            yield key, child, None
        elif isinstance(child, (nn.ModuleDict, nn.ParameterDict)) or hasattr(child, "keys"):
            yield key, child, {name: str(at) for at, name in enumerate(adapter.on)}
        elif adapter.on:
            yield key, child, None


def _offloads(module: nn.Module) -> list[Any]:
    """accelerate's hooks that keep the module's values elsewhere."""
    hook = vars(module).get("_hf_hook")
    hooks = getattr(hook, "hooks", None) or (hook,)
    return [
        each
        for each in hooks
        if getattr(each, "offload", False) and getattr(each, "weights_map", None) is not None
    ]


def inner_tensors(tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """What a tensor of a class of its own (torchao's, quanto's) consists of; empty: itself."""
    if type(tensor) in (torch.Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return []
    names, _ = tensor.__tensor_flatten__()
    inner = [(name, getattr(tensor, name)) for name in names]
    return [(name, each) for name, each in inner if isinstance(each, torch.Tensor)]  # no meshes


def leaves_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with memory that `tensor` consists of."""
    inner = inner_tensors(tensor)
    if not inner:
        yield tensor
    for _, each in inner:
        yield from leaves_of(each)
