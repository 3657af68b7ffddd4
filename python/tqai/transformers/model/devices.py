"""Where a model computes, and whether there was room."""

from __future__ import annotations

import re

import torch

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def device_of(module: torch.nn.Module) -> torch.device:
    """Where the first of the module's weights is that is anywhere; those offloaded are not."""
    devices = (parameter.device for parameter in module.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def layer_device(decoder: torch.nn.Module, index: int) -> torch.device:
    """Where layer `index` of a decoder computes, whose layers may be on several devices."""
    largest, found = -1, None
    for name, parameter in decoder.named_parameters():
        numbered = _LAYER.search(name)
        # The largest of its weights: small ones may lie elsewhere.
        if numbered and int(numbered[1]) == index and parameter.numel() > largest:
            device = parameter.device
            if device.type == "meta":
                device = _execution_device(decoder.get_submodule(name.rpartition(".")[0]))
            if device is not None:
                largest, found = parameter.numel(), device
    return device_of(decoder) if found is None else found


def _execution_device(module: torch.nn.Module) -> torch.device | None:
    """Where accelerate brings the module's offloaded weights when it is run; None: it does not."""
    hook = vars(module).get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):
        device = getattr(each, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def lacks_memory(error: Exception) -> bool:
    """Whether `error` says that memory could not be had, and nothing else."""
    # torch's CPU allocator raises a RuntimeError that only its words tell from others.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in str(error)
