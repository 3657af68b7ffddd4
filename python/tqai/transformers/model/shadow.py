"""A copy of a module to try things on: it shares the weights, and nothing done to it shows.

Running a model that belongs to someone else, even once, calls its owner's hooks, and with its
weights on a disk takes as long as reading them. A shadow has no hooks, is in eval mode whatever the
model is, and has constants in the place of weights that are not in memory.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch

_OWN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def shadow_of(module: torch.nn.Module) -> torch.nn.Module:
    """A shadow of `module` and of all modules inside it."""
    shadows = {id(original): _copy(original) for original in module.modules()}
    for shadow in shadows.values():
        for name, value in list(vars(shadow).items()):
            vars(shadow)[name] = _rebound(value, shadows)
    shadow = shadows[id(module)]
    _spare_what_is_offloaded(shadow, None, {})
    return shadow


def with_constants(module: torch.nn.Module) -> torch.nn.Module:
    """A shadow of `module` that computes on the CPU, constants standing for all weights that are
    on the device "meta"."""
    shadow = shadow_of(module)
    _spare_what_is_offloaded(shadow, torch.device("cpu"), {})
    for part in shadow.modules():  # also of classes that a model has made of these, as Falcon's
        if isinstance(part, (torch.nn.Linear, torch.nn.Embedding)) and "forward" not in vars(part):
            vars(part)["forward"] = _Row(part.weight, isinstance(part, torch.nn.Linear))
    return shadow


def _copy(module: torch.nn.Module) -> torch.nn.Module:
    shadow = object.__new__(type(module))  # classes may have a __new__ of another's, as FSDP's
    for name, value in vars(module).items():
        if name in _OWN:
            value = copy.copy(value)
        elif name.startswith("_") and "_hooks" in name:
            value = OrderedDict()
        vars(shadow)[name] = value
    vars(shadow).update(training=False, _compiled_call_impl=None)
    return shadow


def _rebound(value: Any, shadows: Mapping[int, torch.nn.Module]) -> Any:
    """`value` with the shadows in place of the modules in it."""
    if id(value) in shadows:
        return shadows[id(value)]
    if isinstance(value, MethodType) and id(value.__self__) in shadows:
        return MethodType(value.__func__, shadows[id(value.__self__)])
    if type(value) is partial:  # accelerate's forward methods
        arguments = [_rebound(argument, shadows) for argument in value.args]
        result = partial(value.func, *arguments, **value.keywords)
        vars(result).update(vars(value))
        return result
    if type(value) in (list, tuple):
        return type(value)(_rebound(item, shadows) for item in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _rebound(item, shadows)) for key, item in value.items())
    return value


def _spare_what_is_offloaded(
    shadow: torch.nn.Module, device: Any, constants: dict[Any, torch.Tensor]
) -> None:
    """Puts constants in the place of weights that accelerate would read for each pass.

    device: where the module around it computes, if accelerate sees to it. constants: those made so
    far, by shape, dtype and device.
    """
    hook = vars(shadow).get("_hf_hook")
    if hook is not None:
        vars(shadow)["_hf_hook"], own = _that_only_moves(hook)
        device = device if own is None else own
    if device is not None:
        offloaded = {
            name: weight
            for name, weight in shadow._parameters.items()
            if weight is not None and weight.device.type == "meta"
        }
        if type(shadow) in (torch.nn.Linear, torch.nn.Embedding) and "weight" in offloaded:
            name = "_old_forward" if hook is not None else "forward"
            vars(shadow)[name] = _Row(offloaded["weight"], type(shadow) is torch.nn.Linear)
            offloaded = {}
        for name, weight in offloaded.items():
            # What goes through a norm stays, and experts, which share one matrix, add nothing.
            kind = (tuple(weight.shape[-2:]), weight.dtype, device)
            if kind not in constants:
                value = float(weight.ndim == 1)
                constants[kind] = torch.full(kind[0], value, dtype=weight.dtype, device=device)
            constant = constants[kind].expand(weight.shape)
            shadow._parameters[name] = torch.nn.Parameter(constant, requires_grad=False)
    for child in shadow.children():
        _spare_what_is_offloaded(child, device, constants)


def _that_only_moves(hook: Any) -> tuple[Any, Any]:
    """A copy of accelerate's `hook` that reads no weights, and where it makes a module compute."""
    hook = copy.copy(hook)
    device = getattr(hook, "execution_device", None)
    if isinstance(getattr(hook, "hooks", None), (list, tuple)):  # a sequence of hooks
        parts = [_that_only_moves(one) for one in hook.hooks]
        hook.hooks = tuple(one for one, _ in parts)
        device = next((where for _, where in parts if where is not None), None)
    hook.offload = False
    return hook, device


class _Row:
    """What stands for a linear layer or an embedding: the same vector, whatever comes in."""

    def __init__(self, weight: torch.Tensor, is_linear: bool) -> None:
        self.is_linear = is_linear
        generator = torch.Generator("cpu").manual_seed(1)
        width = weight.shape[0 if is_linear else 1]
        row = torch.randn(width, generator=generator, dtype=torch.float32, device="cpu")
        self.row = row.to(weight.dtype)

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        leading = given.shape[:-1] if self.is_linear else given.shape
        # Not views of one another: models add to what comes out.
        return self.row.to(given.device).expand(*leading, len(self.row)).clone()
