"""Layers of transformers' caches that hold something else than keys and values, or nothing.

Some hold recurrent states. These differ between versions: one tensor or a mapping of them, and
before 5.14 they record nothing that ``crop`` could go back to. They stay as they are, also beside
keys and values, as the keys of an index do that tells what sparse attention reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import cache_utils

RECURRENT: Any = getattr(cache_utils, "LinearAttentionLayer", None)
"""The class of the layers with recurrent states alone."""
_BESIDE = tuple(
    getattr(cache_utils, name)
    for name in (
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
        "DynamicIndexedLayer",
    )
    if hasattr(cache_utils, name)
)
_Empty = getattr(cache_utils, "DummyLayer", None)

HYBRIDS = RECURRENT is not None
"""Whether this transformers has one cache for models with recurrent layers; before 5.5 each has its
own."""

WRONG_AFTER_CROP = (
    f"transformers {transformers.__version__} leaves the states of convolutions as they are where "
    "a cache is cropped, with tqai or without: what comes after that, in assisted generation too, "
    "is wrong. From transformers 5.16 on it is right"
)


def is_recurrent(layer: Any) -> bool:
    """Whether a layer holds recurrent states and no keys and values."""
    return RECURRENT is not None and type(layer) is RECURRENT


def holds_nothing(layer: Any) -> bool:
    """Whether a layer only stands for one of the model's that has no cache of its own.

    Layers of experts alone are such, and those that read the keys and values of another layer.
    """
    return _Empty is not None and type(layer) is _Empty


def has_more(layer: Any) -> bool:
    """Whether a layer of transformers' own holds keys and values, and something beside them."""
    return type(layer) in _BESIDE


def has_index(layer: Any) -> bool:
    """Whether a layer holds the keys of an index beside its keys and values."""
    return hasattr(layer, "update_indexer")


def has_states(layer: Any) -> bool:
    """Whether a layer holds recurrent states, be it beside keys and values."""
    return hasattr(layer, "conv_states") or hasattr(layer, "recurrent_states")


def can_go_back(layer: Any) -> bool:
    """Whether a layer with states can be cropped: they are a convolution's last inputs.

    Where its class records no past, such states stay as they are when it is cropped, and the tokens
    after that come out wrong; see ``forgets_its_past``.
    """
    if any(True for _ in _tensors(layer.recurrent_states)):
        return False
    return forgets_its_past(layer) or (layer.record_past and is_croppable(layer))


def is_croppable(layer: Any) -> bool:
    """What transformers says of a layer's states alone."""
    said = getattr(RECURRENT, "is_croppable", True)
    return said.fget(layer) if isinstance(said, property) else said


def forgets_its_past(layer: Any) -> bool:
    """Whether a layer has states of a class that records no past."""
    return has_states(layer) and not hasattr(RECURRENT, "activate_past_recording")


def tensors_of(layer: Any) -> list[torch.Tensor]:
    """All tensors that a layer holds as attributes, each once, whatever other threads do to it."""
    return list({id(tensor): tensor for tensor in _tensors(vars(layer))}.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in list(value.values()):
            yield from _tensors(each)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for each in value:
            yield from _tensors(each)
