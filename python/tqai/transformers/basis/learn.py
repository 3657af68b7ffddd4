"""What a model's keys and queries look like, found out from the model alone.

A shadow of the model writes some text, each next token drawn from what the model itself expects,
and what each layer's attention gets while it does is summed up. No text is needed, and the model's
own is as good as others'. Many short rows differ more among one another than few long ones; see
docs/algorithm.md. A decoder without a head that tells next tokens reads random ones instead.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tqai import _core
from tqai.shapes.rope import Rope
from tqai.signals import is_of_a_handler
from tqai.transformers.attention import functions as attention
from tqai.transformers.attention.original import configs_of, patched_name
from tqai.transformers.model.devices import device_of, lacks_memory
from tqai.transformers.model.find_rope import first_too_far, turn_unrecognised
from tqai.transformers.model.geometry import Geometry, is_encoder_decoder
from tqai.transformers.model.names import cache_argument
from tqai.transformers.model.parts import keeper_of
from tqai.transformers.model.shadow import shadow_of
from tqai.transformers.weights.identity import watch_of

ROW_TOKENS = 8
"""Of what a model writes: many beginnings differ more than few long texts."""
TOKENS = 560
"""Of what it writes, all rows together, and without what is left out of each."""
RANDOM_ROW_TOKENS = 64
RANDOM_TOKENS = 1024
"""The same of random tokens, which say less."""
TOKENS_A_COORDINATE = 3.5
"""Of heads so wide that this is more."""
SINK_TOKENS = 1
"""Of each row, left out: attention's sinks look like no other token's keys."""
SAME_ROWS = 16
"""Of rows that begin alike, how many read their first token. Not one: sums of PyTorch's for single
rows may depend on the number of threads."""
SEED = 1952541041
"""Of the token ids where the settings name none; ``tqai::CacheOptions::seed``."""

_DRAWN_ROWS = 8

Moments = _core.KeyMoments | str
"""Of a layer, or why there are none."""


def learn_moments(
    geometry: Geometry, decoder: torch.nn.Module, seed: int, progress: Callable[[float], object]
) -> list[Moments]:
    """What the keys and queries of each of the decoder's cache layers look like.

    The same weights and seed give the same on one machine and version of PyTorch, whatever the
    number of threads. Nothing is done to the decoder, nor to random numbers or autocast.

    progress: called with the share of the work that has been done since it was called before.

    Raises:
        NotImplementedError: for a decoder that does not take token ids alone.
        MemoryError, RuntimeError: where there is no memory for that.
    """
    unrecognised = turn_unrecognised(shadow_of(decoder), geometry.config, geometry.ropes)
    longest = first_too_far(geometry.config)
    writer = _writer_of(decoder)
    for shared in (True, False):
        listener = _Listener(geometry, unrecognised, min(ROW_TOKENS, longest))
        if writer is not None and _write(
            writer, decoder, geometry, seed, listener, progress, shared
        ):
            break
    else:
        listener = _Listener(geometry, unrecognised, min(RANDOM_ROW_TOKENS, longest))
        _read(decoder, geometry, seed, listener)
        progress(1.0)
    return [listener.moments_of(layer) for layer in range(len(geometry.heads))]


def _writer_of(decoder: torch.nn.Module) -> torch.nn.Module | None:
    """The model that has the decoder and a head that tells next tokens of token ids alone."""
    model = watch_of(decoder).model()
    if model is None or is_encoder_decoder(model):
        return None
    model = keeper_of(model)
    head = getattr(model, "get_output_embeddings", None)
    return model if head is not None and head() is not None else None


def _write(
    model: torch.nn.Module,
    decoder: torch.nn.Module,
    geometry: Geometry,
    seed: int,
    listener: _Listener,
    progress: Callable[[float], object],
    shared: bool,
) -> bool:
    """Lets the model write; whether it can.

    shared: a first token that all rows have is read by few of them, and the last one by the decoder
        alone.
    """
    shadow = shadow_of(model)
    _make_heard(shadow, decoder, listener)
    inner = _part_of(shadow, model, decoder) if shared else None
    device = device_of(shadow)
    length = min(ROW_TOKENS, first_too_far(geometry.config))
    generator = torch.Generator("cpu").manual_seed(seed)
    ids = _first_ids(geometry, _rows(geometry, length, TOKENS), generator)
    copies = 1
    if shared and length > SINK_TOKENS and (ids == ids[0]).all():
        copies = max(len(ids) // SAME_ROWS, 1)
        ids = ids[: len(ids) // copies]
    with _alone(device):
        for at in range(length):
            listener.first = at
            listener.cache.handed.clear()
            reader = shadow if inner is None or at < length - 1 else inner
            try:
                cache = cache_argument(reader, listener.cache)
                output = reader(input_ids=ids.to(device), use_cache=True, **cache)
                logits = output.logits if reader is shadow else None
            except Exception as error:  # whatever a model's own code raises
                if lacks_memory(error) or is_of_a_handler(error):
                    raise
                return False
            if logits is None:
                progress(1.0 / length)
                break
            if logits.ndim != 3 or logits.shape[:2] != ids.shape:
                return False
            if at == 0 and copies > 1:
                if not _spread(listener.cache, copies):
                    return False
                logits = logits.repeat_interleave(copies, 0)
            progress(1.0 / length)
            ids = _drawn(logits[:, 0, : geometry.config.vocab_size], generator)
    return True


def _part_of(
    shadow: torch.nn.Module, model: torch.nn.Module, part: torch.nn.Module
) -> torch.nn.Module | None:
    """What `part` of the model is in its shadow; None where it is no part."""
    for name, module in model.named_modules():
        if module is part:
            return shadow.get_submodule(name)
    return None


def _spread(cache: DynamicCache, copies: int) -> bool:
    """Makes so many rows of each, unless the cache holds more than keys and values."""
    plain = DynamicLayer, DynamicSlidingWindowLayer
    if any(type(layer) not in plain for layer in cache.layers):
        return False
    cache.batch_repeat_interleave(copies)
    return True


def _drawn(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[rows, 1] int64: a next token of each row, of logits [rows, tokens]."""
    size = len(logits), 1
    shares = torch.rand(size, generator=generator, dtype=torch.float32, device="cpu")
    found = []
    # A few rows at a time stay in a processor's cache.
    for rows, share in zip(logits.split(_DRAWN_ROWS), shares.split(_DRAWN_ROWS), strict=True):
        likely = rows.float().nan_to_num().softmax(-1).cpu().cumsum(-1)
        at = torch.searchsorted(likely, share * likely[:, -1:], right=True)
        found.append(at.clamp(max=likely.shape[1] - 1))
    return torch.cat(found)


def _read(decoder: torch.nn.Module, geometry: Geometry, seed: int, listener: _Listener) -> None:
    """Lets the decoder read random tokens."""
    shadow = shadow_of(decoder)
    _make_heard(shadow, decoder, listener)
    device = device_of(shadow)
    try:
        ids = _random_ids(geometry, seed)
        with _alone(device):
            shadow(
                input_ids=ids.to(device), use_cache=True, **cache_argument(shadow, listener.cache)
            )
    except Exception as error:  # whatever a model's own code raises
        if lacks_memory(error) or is_of_a_handler(error):
            raise
        raise NotImplementedError(
            f"codec='adaptive' learns from a forward pass of {geometry.model} over token ids, "
            f"which its {type(decoder).__name__} does not take ({type(error).__name__}: {error}): "
            "use codec='scalar'"
        ) from error


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """Passes inside leave gradients, random numbers and autocast as they are, and their sums do not
    depend on the number of threads, as those of PyTorch's fused attention for single queries do."""
    numbered = [device] if device.type == "cuda" else []
    with (
        torch.no_grad(),
        torch.random.fork_rng(numbered),
        torch.autocast(device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield


def _rows(geometry: Geometry, length: int, tokens: int) -> int:
    """Of so many tokens, how many have `tokens` that count, or as many as wide heads want."""
    dims = [heads.dim for heads in geometry.heads if heads is not None]
    counting = max(length - SINK_TOKENS, 1)
    return math.ceil(max(tokens, TOKENS_A_COORDINATE * max(dims, default=0)) / counting)


def _random_ids(geometry: Geometry, seed: int) -> torch.Tensor:
    """[rows, tokens] int64; each row begins with the token that the model's texts begin with."""
    length = min(RANDOM_ROW_TOKENS, first_too_far(geometry.config))
    generator = torch.Generator("cpu").manual_seed(seed)
    first = _first_ids(geometry, _rows(geometry, length, RANDOM_TOKENS), generator)
    shape = len(first), length - 1
    vocabulary = geometry.config.vocab_size
    others = torch.randint(vocabulary, shape, generator=generator, device="cpu")
    return torch.cat([first, others], 1)


def _first_ids(geometry: Geometry, rows: int, generator: torch.Generator) -> torch.Tensor:
    """[rows, 1] int64: what the model's texts begin with; drawn where it does not say."""
    config = geometry.config
    first = getattr(config, "bos_token_id", None)
    if isinstance(first, int) and 0 <= first < config.vocab_size:
        return torch.full((rows, 1), first, device="cpu")
    return torch.randint(config.vocab_size, (rows, 1), generator=generator, device="cpu")


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

    def __init__(self, geometry: Geometry, unrecognised: tuple[bool, ...], length: int) -> None:
        """length: of the rows."""
        self.cache = _NotingCache(geometry.config)
        self._sinks = min(SINK_TOKENS, length - 1)
        self.first = 0
        """Position of the first token of the pass."""
        self._ropes: tuple[Rope | None, ...] = geometry.ropes
        self._unrecognised = unrecognised
        self._moments: dict[int, Moments] = {}
        self._read_until: dict[int, int] = {}
        """Positions of keys that are in a layer's moments."""

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
        if not isinstance(moments, _core.KeyMoments):
            return
        of = "keys"
        try:
            if self._read_until.get(layer, 0) <= self.first:  # not yet by another layer
                self._read_until[layer] = self.first + query.shape[2]
                for head in range(key.shape[1]):
                    own = key[:, head : head + 1, -query.shape[2] :]
                    self._add(moments.add_keys, head, own)
            of = "queries"
            self._add_queries(moments, query)
        except ValueError as error:
            self._moments[layer] = f"of its {of}: {error}"

    def _begun(self, layer: int, keys: torch.Tensor) -> Moments:
        """Of a layer's keys, before any are added."""
        if self._unrecognised[layer]:
            return "its rotary embedding is not recognised"
        rope = self._ropes[layer]
        argument = None if rope is None else rope.core_argument()
        try:
            return _core.KeyMoments(keys.shape[1], keys.shape[3], rope=argument)
        except ValueError as error:
            return f"of its keys: {error}"

    def _add_queries(self, moments: _core.KeyMoments, queries: torch.Tensor) -> None:
        groups, rest = divmod(queries.shape[1], moments.kv_heads)
        if rest or queries.shape[3] != moments.head_dim:
            raise ValueError(
                f"{queries.shape[1]} heads of {queries.shape[3]} read {moments.kv_heads} of "
                f"{moments.head_dim}"
            )
        for head in range(moments.kv_heads):
            own = queries[:, head * groups : (head + 1) * groups]
            self._add(moments.add_queries, head, own)

    def _add(self, add: Callable[..., None], head: int, vectors: torch.Tensor) -> None:
        """vectors: [rows, heads, tokens, head_dim], of the pass."""
        rows, heads, tokens, dim = vectors.shape
        left_out = min(max(self._sinks - self.first, 0), tokens)
        numbers = vectors[:, :, left_out:].float().reshape(-1, dim).cpu().numpy()
        positions = np.arange(self.first + left_out, self.first + tokens)
        add(head, numbers, np.tile(positions, rows * heads))
