"""Layers of transformers' caches without keys and values, which stay as they are.

Some hold recurrent states. These differ between versions: one tensor or a mapping of them, and
before 5.14 they record nothing that ``crop`` could go back to. Others hold nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import cache_utils

_Recurrent = getattr(cache_utils, "LinearAttentionLayer", None)
_Empty = getattr(cache_utils, "DummyLayer", None)

HYBRIDS = _Recurrent is not None
"""Whether this transformers has one cache for models with recurrent layers; before 5.5 each has its
own."""

WRONG_AFTER_CROP = (
    f"transformers {transformers.__version__} leaves the states of convolutions as they are where "
    "a cache is cropped, with tqai or without: what comes after that, in assisted generation too, "
    "is wrong. From transformers 5.16 on it is right"
)


def is_recurrent(layer: Any) -> bool:
    """Whether a layer holds recurrent states and no keys and values."""
    return _Recurrent is not None and type(layer) is _Recurrent


def holds_nothing(layer: Any) -> bool:
    """Whether a layer only stands for one of the model's that has no cache of its own.

    Layers of experts alone are such, and those that read the keys and values of another layer.
    """
    return _Empty is not None and type(layer) is _Empty


def has_states(layer: Any) -> bool:
    """Whether a layer holds recurrent states, be it beside keys and values."""
    return hasattr(layer, "conv_states") or hasattr(layer, "recurrent_states")


def can_go_back(layer: Any) -> bool:
    """Whether a recurrent layer can be cropped: its states are a convolution's last inputs.

    Where its class records no past, such states stay as they are when it is cropped, and the tokens
    after that come out wrong; see ``forgets_its_past``.
    """
    if any(True for _ in _tensors(layer.recurrent_states)):
        return False
    return forgets_its_past(layer) or (layer.record_past and getattr(layer, "is_croppable", True))


def forgets_its_past(layer: Any) -> bool:
    """Whether a recurrent layer is of a class that records no past."""
    return is_recurrent(layer) and not hasattr(layer, "record_past")


def tensors_of(layer: Any) -> list[torch.Tensor]:
    """All tensors that a layer of transformers' own holds, each once."""
    return list({id(tensor): tensor for tensor in _tensors(vars(layer))}.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for each in value:
            yield from _tensors(each)
