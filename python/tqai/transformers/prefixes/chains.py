"""Names of prefixes: each says all that the keys and values of its tokens depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from tqai.exchange import envelope
from tqai.exchange.cache_bytes import TILE_TOKENS
from tqai.transformers.cache.cache import TqaiCache
from tqai.transformers.cache.layer import TqaiLayer
from tqai.transformers.model.devices import device_of
from tqai.transformers.model.other_layers import holds_nothing

_LOCAL = ("backend", "level")
"""Settings that are the machine's."""


def why_not(cache: Any) -> str:
    """Why prefixes of such a cache cannot be stored; empty: they can."""
    if not isinstance(cache, TqaiCache):
        return f"a {type(cache).__name__} holds what a decoder reads of an encoder too"
    for index, layer in enumerate(cache.layers):
        if holds_nothing(layer):
            continue
        if type(layer) is not TqaiLayer:
            return (
                f"layer {index} is a {type(layer).__name__}, and compressed layers of keys and "
                "values alone are stored"
            )
        if layer.is_sliding:
            return f"layer {index} forgets the tokens that have left its window"
        if layer.rope is not None and layer.rope.changes:
            return f"the rotary embedding of layer {index} depends on the length of the text"
    return ""


def facts_of(cache: TqaiCache) -> dict[str, Any]:
    """What keys and values depend on beside tokens, and what their codes are.

    Raises:
        ValueError: where the weights cannot be told from others, as their values are out of reach.
    """
    geometry, settings = cache.geometry, cache.settings
    identity = geometry.weights().identity(afresh=True)
    if identity.unread or (identity.around is not None and identity.around.unread):
        raise ValueError(
            f"weights of {geometry.describe()} are out of reach (on the device 'meta'), so that it "
            "cannot be told from other models"
        )
    layers = [layer for layer in cache.layers if isinstance(layer, TqaiLayer)]
    chosen = asdict(settings)
    cast = _cast_to(cache, layers)
    return {
        **({} if cast is None else {"autocast": str(cast)}),
        "model": f"{geometry.model} {identity.digest()}",
        "constants": _digest(geometry.constants),
        "heads": [None if heads is None else list(heads) for heads in geometry.heads],
        "rotary": _digest([None if layer.rope is None else asdict(layer.rope) for layer in layers]),
        "bases": _digest([None if layer.basis is None else layer.basis.id for layer in layers]),
        "codebooks": envelope.codebooks(
            [
                (layer.heads.dim, bits)
                for layer in layers
                if layer.heads is not None
                for bits in (layer.settings.bits_k, layer.settings.bits_v)
                if isinstance(bits, int)
            ]
        ),
        "settings": {name: _plain(value) for name, value in chosen.items() if name not in _LOCAL},
    }


def _cast_to(cache: TqaiCache, layers: Sequence[TqaiLayer]) -> torch.dtype | None:
    """What autocast makes of keys and values that would be of the weights' dtype; None: nothing.

    Of an empty cache what it would make of them now."""
    assert cache.geometry.decoder is not None
    decoder = cache.geometry.decoder()
    weights = {each.dtype for each in decoder.parameters()} if decoder is not None else set()
    dtypes = next((layer.dtypes for layer in layers if layer.dtypes is not None), ())
    if not dtypes and decoder is not None:
        device = device_of(decoder).type
        if torch.is_autocast_enabled(device):
            dtypes = (torch.get_autocast_dtype(device),)
    # A model may keep keys in more digits than its weights have, also under autocast.
    half = (torch.bfloat16, torch.float16)
    return next((each for each in dtypes if each in half and each not in weights), None)


def names_of(
    facts: dict[str, Any], ids: Sequence[int] | np.ndarray, sinks: int, blocks: int
) -> list[str]:
    """The names of the first `blocks` blocks of a text, the first of which has the sinks too.

    Each depends on all tokens up to its end.
    """
    name = _digest([envelope.VERSION, facts])
    tokens = np.asarray(ids, dtype="<i8")
    names, start = [], 0
    for block in range(blocks):
        end = sinks + (block + 1) * TILE_TOKENS
        name = hashlib.blake2b(
            name.encode() + tokens[start:end].tobytes(), digest_size=16
        ).hexdigest()
        names.append(name)
        start = end
    return names


def name_of_centres(facts: dict[str, Any], payload: bytes) -> str:
    """The name of centres, by what they are."""
    start = _digest([envelope.VERSION, facts]).encode()
    return hashlib.blake2b(start + payload, digest_size=16).hexdigest()


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    """As JSON has it: the keys of mappings are strings there."""
    if isinstance(value, dict):
        return {str(key): each for key, each in value.items()}
    return list(value) if isinstance(value, (tuple, list, set, frozenset)) else value
