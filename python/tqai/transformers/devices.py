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
    for name, parameter in decoder.named_parameters():
        numbered = _LAYER.search(name)
        if numbered and int(numbered[1]) == index and parameter.device.type != "meta":
            return parameter.device
    return device_of(decoder)


def lacks_memory(error: Exception) -> bool:
    """Whether `error` says that memory could not be had, and nothing else."""
    # torch's CPU allocator raises a RuntimeError that only its words tell from others.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in str(error)
