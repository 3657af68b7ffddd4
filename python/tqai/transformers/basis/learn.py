"""What a model's keys and queries look like, found out from the model alone.

A shadow of the model reads random tokens, once, and what each layer's attention gets is summed up.
No text is needed: keys and queries are projections of what goes through the model, and most of
their structure is the projections'. Many short rows are better than one long one, whose later
tokens look at one another in ways that no text brings about; see docs/algorithm.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache

from tqai import _core
from tqai.shapes.rope import Rope
from tqai.transformers.attention import functions as attention
from tqai.transformers.attention.original import configs_of, patched_name
from tqai.transformers.model.devices import device_of, lacks_memory
from tqai.transformers.model.find_rope import first_too_far, turn_unrecognised
from tqai.transformers.model.geometry import Geometry
from tqai.transformers.model.names import cache_argument
from tqai.transformers.model.shadow import shadow_of

ROW_TOKENS = 64
TOKENS = 1024
"""With half as many, what is learnt depends on which tokens they happen to be."""
TOKENS_A_COORDINATE = 4
"""Of heads so wide that this is more."""
SINK_TOKENS = 4
"""Of each row, left out: attention's sinks look like no other token's keys."""
SEED = 1952541041
"""Of the token ids where the settings name none; ``tqai::CacheOptions::seed``."""

Moments = _core.KeyMoments | str
"""Of a layer, or why there are none."""


def learn_moments(
    geometry: Geometry, decoder: torch.nn.Module, seed: int, progress: Callable[[], object]
) -> list[Moments]:
    """What the keys and queries of each of the decoder's cache layers look like.

    The same weights and seed give the same on one machine and version of PyTorch, whatever the
    number of threads. Nothing is done to the decoder, nor to random numbers or autocast.

    progress: called for each attention that was seen.

    Raises:
        NotImplementedError: for a decoder that does not take token ids alone.
        MemoryError, RuntimeError: where there is no memory for that.
    """
    layers = len(geometry.heads)
    shadow = shadow_of(decoder)
    unrecognised = turn_unrecognised(shadow, geometry.config, geometry.ropes)
    listener = _Listener(geometry, unrecognised, progress)
    _make_heard(shadow, decoder, listener)
    device = device_of(shadow)
    numbered = [device] if device.type == "cuda" else []
    try:
        ids = _random_ids(geometry, seed)
        with (
            torch.no_grad(),
            torch.random.fork_rng(numbered),
            torch.autocast(device.type, enabled=False),
        ):
            shadow(
                input_ids=ids.to(device), use_cache=True, **cache_argument(shadow, listener.cache)
            )
    except Exception as error:  # whatever a model's own code raises
        if lacks_memory(error):
            raise
        raise NotImplementedError(
            f"codec='adaptive' learns from a forward pass of {geometry.model} over random tokens, "
            f"which its {type(decoder).__name__} does not take ({type(error).__name__}: {error}): "
            "use codec='scalar'"
        ) from error
    return [listener.moments_of(layer) for layer in range(layers)]


def _random_ids(geometry: Geometry, seed: int) -> torch.Tensor:
    """[rows, tokens] int64; each row begins with the token that the model's texts begin with."""
    config = geometry.config
    dims = [heads.dim for heads in geometry.heads if heads is not None]
    length = min(ROW_TOKENS, first_too_far(config))
    tokens = max(TOKENS, TOKENS_A_COORDINATE * max(dims, default=0))
    rows = -(-tokens // length)
    generator = torch.Generator("cpu").manual_seed(seed)
    ids = torch.randint(config.vocab_size, (rows, length), generator=generator, device="cpu")
    first = getattr(config, "bos_token_id", None)
    if isinstance(first, int) and 0 <= first < config.vocab_size:
        ids[:, 0] = first
    return ids


def _make_heard(shadow: torch.nn.Module, decoder: torch.nn.Module, listener: _Listener) -> None:
    """Makes attention inside `shadow` call `listener`, whatever implementation the model has."""
    attention.register()
    copies: dict[int, Any] = {}
    for config in configs_of(decoder):
        copies[id(config)] = copy.copy(config)
        name = patched_name(config._attn_implementation)
        copies[id(config)]._attn_implementation_internal = name
    for module in shadow.modules():
        own = vars(module)
        own[attention.LISTENER] = listener
        for name, value in list(own.items()):
            if isinstance(value, PretrainedConfig) and id(value) in copies:
                own[name] = copies[id(value)]


class _Keys(NamedTuple):
    """Keys that a cache layer has handed out."""

    layer: int
    keys: torch.Tensor


class _NotingCache(DynamicCache):
    """Tells which layer the keys are of that it hands out."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.handed: dict[int, _Keys] = {}
        """By the address of their memory; as long as they are here, nothing else gets that."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.handed[keys.data_ptr()] = _Keys(layer_idx, keys)
        return keys, values


class _Listener:
    """Sums up the keys and queries that attention gets.

    What counts is what attention reads: a layer that others share has queries of them all, and one
    whose cached keys are turned into something else before attention has none.
    """

    def __init__(
        self, geometry: Geometry, unrecognised: tuple[bool, ...], progress: Callable[[], object]
    ) -> None:
        self.cache = _NotingCache(geometry.config)
        self._ropes: tuple[Rope | None, ...] = geometry.ropes
        self._unrecognised = unrecognised
        self._progress = progress
        self._moments: dict[int, Moments] = {}

    def moments_of(self, layer: int) -> Moments:
        unseen = "its attention is not seen to read the keys that the cache holds"
        return self._moments.get(layer, unseen)

    def __call__(self, query: torch.Tensor, key: torch.Tensor) -> None:
        known = self.cache.handed.get(key.data_ptr())
        if known is None or known.keys.shape != key.shape or known.keys.stride() != key.stride():
            return
        layer = known.layer
        if layer not in self._moments:
            self._moments[layer] = self._begun(layer, key)
        moments = self._moments[layer]
        if isinstance(moments, _core.KeyMoments):
            try:
                _add_queries(moments, query)
            except ValueError as error:
                self._moments[layer] = f"of its queries: {error}"
        self._progress()

    def _begun(self, layer: int, keys: torch.Tensor) -> Moments:
        """Of a layer's keys, without any queries."""
        if self._unrecognised[layer]:
            return "its rotary embedding is not recognised"
        rope = self._ropes[layer]
        argument = None if rope is None else rope.core_argument()
        try:
            moments = _core.KeyMoments(keys.shape[1], keys.shape[3], rope=argument)
            for head in range(keys.shape[1]):
                _add(moments.add_keys, head, keys[:, head : head + 1])
        except ValueError as error:
            return f"of its keys: {error}"
        return moments


def _add_queries(moments: _core.KeyMoments, queries: torch.Tensor) -> None:
    groups, rest = divmod(queries.shape[1], moments.kv_heads)
    if rest or queries.shape[3] != moments.head_dim:
        raise ValueError(
            f"{queries.shape[1]} heads of {queries.shape[3]} read {moments.kv_heads} of "
            f"{moments.head_dim}"
        )
    for head in range(moments.kv_heads):
        _add(moments.add_queries, head, queries[:, head * groups : (head + 1) * groups])


def _add(add: Callable[..., None], head: int, vectors: torch.Tensor) -> None:
    """vectors: [rows, heads, tokens, head_dim], token i of each row and head at position i."""
    rows, heads, tokens, dim = vectors.shape
    first = min(SINK_TOKENS, tokens - 1)
    numbers = vectors[:, :, first:].float().reshape(-1, dim).cpu().numpy()
    positions = torch.arange(first, tokens, device="cpu").repeat(rows * heads).numpy()
    add(head, numbers, positions)
