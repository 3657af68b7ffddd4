"""The attention and mask functions that transformers calls in a patched model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import NoneType
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tqai.stores import for_torch as stores
from tqai.stores.for_torch.tensor_refs import is_mask_dtype
from tqai.transformers.attention import compiled
from tqai.transformers.attention.original import (
    PATCHED_NAMES,
    Attention,
    formula_of,
    original_attention,
    takes_unknown,
)
from tqai.transformers.attention.padding import hidden_tokens
from tqai.transformers.attention.stepwise_prefill import causal_mask, steps
from tqai.transformers.attention.view import TqaiView, Undifferentiable, Update, update_of

CONTINUOUS_BATCHING = (
    "continuous batching was begun with a paged cache of its own, which tqai does not compress: "
    "begin it with the patched model (transformers 5.24 or newer), or call tqai.unpatch(model) "
    "before generate_batch()"
)

SEQUENCES = "tqai_sequences"
"""The argument by which attention is given the keys and values of each request of a pass; see
``serving.requests``."""


class Sequence(NamedTuple):
    """What a request's queries read in one layer."""

    first: int
    """Of its queries in the pass."""
    count: int
    key: torch.Tensor
    value: torch.Tensor
    fail: Callable[[Exception], None]
    """Told what attention over them raises: others in the pass go on."""


class Single(NamedTuple):
    """A query that is a request's only one, and what it reads."""

    place: int
    update: Update
    fail: Callable[[Exception], None]
    """As a ``Sequence``'s."""


class Sequences:
    """What the queries of a pass read in one layer."""

    def __init__(self) -> None:
        self.alone: list[Sequence] = []
        self.together: list[Single] = []


_OF_BATCHES = frozenset(
    "cache cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k read_index write_index is_causal "
    "logits_indices logits_processor_args block_table use_cache".split()
)
"""What continuous batching tells attention, beside what any pass does."""

LISTENER = "_tqai_listener"
"""What a module has that tells somebody of the queries and keys that its attention gets, before it
is computed; see ``basis.learn``."""


def register() -> None:
    """Makes tqai's names known as attention implementations. May be called again."""
    for implementation, name in PATCHED_NAMES.items():
        AttentionInterface.register(name, partial(attention_forward, implementation))
        AttentionInterface.register(f"paged|{name}", _refuse_paged)
        AttentionMaskInterface.register(name, partial(_mask, implementation))


def attention_forward(
    implementation: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention from the packed bytes where `key` and `value` are views of a compressed layer.

    Anything else, and whatever the kernel does not compute, goes to the model's original function,
    with dequantised keys and values if need be.

    Args:
        implementation: the original implementation, "sdpa" or "eager".
        module: the attention layer.
        query: [batch, query_heads, n, head_dim].
        key: [batch, kv_heads, kv_len, head_dim].
        value: [batch, kv_heads, kv_len, value_head_dim].
        attention_mask: [batch or 1, query_heads or 1, n, kv_len], bool or additive; None: causal.

    Returns:
        [batch, n, query_heads, value_head_dim] in the query's dtype, and the attention weights if
        the original gave them.

    Raises:
        NotImplementedError: under continuous batching.
        ValueError: for queries on another device than the layer's tokens.
        RuntimeError: for views that are older than the cache, or another's cache in a model that
            has the name of tqai's attention but is not patched.
    """
    sequences = kwargs.pop(SEQUENCES, None)
    if sequences is not None:
        return _attend_sequences(implementation, module, query, sequences, kwargs)
    if not isinstance(kwargs.get("cache"), (Cache, NoneType)):  # a paged one
        raise NotImplementedError(CONTINUOUS_BATCHING)
    original = original_attention(implementation, module)
    if compiled.is_tracing():
        if not isinstance(key, TqaiView):
            return _attend_traced(original, module, query, key, value, attention_mask, kwargs)
        arguments = (implementation, module, query, key, value, attention_mask)
        return compiled.outside(attention_forward, *arguments, **kwargs)
    update = update_of(key, value)
    if update is None:
        listener = module.__dict__.get(LISTENER)
        if listener is not None:
            listener(query, key)
        _check_compressed(module, query, key)
        return original(module, query, key, value, attention_mask, **kwargs)
    try:
        return _attend_update(original, module, query, update, attention_mask, kwargs)
    except BaseException:
        if update.cache is not None:
            update.cache.roll_back()
        raise


def _attend_sequences(
    implementation: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    sequences: Sequences,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Attention of each request's queries over its own tokens; see ``serving.requests``."""
    own = {name: value for name, value in kwargs.items() if name not in _OF_BATCHES}
    parts: list[tuple[int, torch.Tensor]] = []
    if sequences.together:
        try:
            parts += _attend_together(implementation, module, query, sequences.together, own)
        except Exception:  # of one of them
            parts += _attend_singly(implementation, module, query, sequences.together, own)
        except BaseException:
            for single in sequences.together:
                if single.update.cache is not None:
                    single.update.cache.roll_back()
            raise
    for first, count, key, value, fail in sequences.alone:
        rows = query[:, :, first : first + count]
        update = update_of(key, value)
        if update is None:
            window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
        else:
            window = update.layer.sliding_window
        mask = _mask_of(implementation, window, rows, key)
        try:
            part = attention_forward(implementation, module, rows, key, value, mask, **own)[0]
        except Exception as error:  # one request's numbers are no concern of the others'
            fail(error)
            part = query.new_zeros(1, count, query.shape[1], value.shape[3])
        parts.append((first, part))
    parts.sort(key=lambda part: part[0])
    return torch.cat([part for _, part in parts], 1), None


def _attend_singly(
    implementation: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    together: list[Single],
    kwargs: dict[str, Any],
) -> list[tuple[int, torch.Tensor]]:
    """``_attend_together`` one by one, where that raises: it is an error of some requests only."""
    original = original_attention(implementation, module)
    parts = []
    for place, update, fail in together:
        one = query[:, :, place : place + 1]
        try:
            part = _attend_update(original, module, one, update, None, kwargs)[0]
        except Exception as error:
            fail(error)
            core = update.layer.core
            assert core is not None
            part = query.new_zeros(1, 1, query.shape[1], core.value_head_dim)
        parts.append((place, part))
    return parts


def _attend_together(
    implementation: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    together: list[Single],
    kwargs: dict[str, Any],
) -> list[tuple[int, torch.Tensor]]:
    """Attention of requests' only queries: those that read packed tokens, in one call."""
    original = original_attention(implementation, module)
    packed = [(place, update) for place, update, _ in together if _reads_packed(update)]
    arguments = None
    if len(packed) > 1 and not (torch.is_grad_enabled() and query.requires_grad):
        core = packed[0][1].layer.core
        assert core is not None
        shape = core.batch, core.kv_heads, core.head_dim, core.value_head_dim
        one = query[:, :, :1]
        arguments = _kernel_arguments(original, module, shape, one, packed[0][1], None, kwargs)
    parts = []
    if arguments is None:
        packed = []
    else:
        places = [place for place, _ in packed]
        rows = query
        if places != list(range(query.shape[2])):
            rows = query.index_select(2, torch.tensor(places, device=query.device))
        del arguments["mask"], arguments["causal"]  # none, and so it is
        cores = [update.layer.core for _, update in packed]
        output = stores.attend_each(cores, rows, **arguments)  # type: ignore[arg-type]
        for _, update in packed:
            update.layer.settle(False)
            update.settled = True
        parts = list(zip(places, output.split(1, 1), strict=True))
    done = {place for place, _ in packed}
    for place, update, _ in together:
        if place not in done:
            one = query[:, :, place : place + 1]
            parts.append((place, _attend_update(original, module, one, update, None, kwargs)[0]))
    return parts


def _reads_packed(update: Update) -> bool:
    layer = update.layer
    plain = not layer.exact_arithmetic and not layer.has_dropped and update.is_current()
    return plain and layer.is_packed()


def _mask_of(
    implementation: str, window: int | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """What a model would give its attention for a single row without padding."""
    count, length = query.shape[2], key.shape[2]
    slides = window is not None and length > window
    if count == 1 and not slides:
        return None
    if count == length and not slides and implementation != "eager":
        return None
    seen = torch.ones(count, length, dtype=torch.bool, device=query.device).tril(length - count)
    if slides:
        seen = seen.triu(length - count - window + 1)
    if implementation != "eager":
        return seen[None, None]
    least = torch.finfo(query.dtype).min
    return torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, least)[None, None]


def _attend_traced(
    original: Attention,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As what follows, of operators that can be in a graph; see ``compiled``."""
    mark = compiled.mark_of(key, value)
    if mark is None:
        return original(module, query, key, value, mask, **kwargs)
    layer = mark.layer
    if layer.has_packed and not mark.fresh and not layer.exact_arithmetic:
        shape = key.shape[0], key.shape[1], key.shape[3], value.shape[3]
        arguments = _kernel_arguments(original, module, shape, query, mark, mask, kwargs)
        if arguments is not None:
            return compiled.attend(mark, query, value.shape[3], arguments), None
    key, value = compiled.dense(mark, query, key, value)
    result = original(module, query, key, value, mask, **kwargs)
    compiled.settle(mark, mask, query)
    return result


def _check_compressed(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor) -> None:
    """Raises RuntimeError where a model that was given tqai's attention by its name, and is not
    patched, reads a past that somebody else keeps.

    A pass without a past, as in training, is all right: there is nothing to compress in it.
    """
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if type(name) is not str or name not in PATCHED_NAMES.values():
        return
    if getattr(module, "is_causal", True) and key.shape[-2] > query.shape[-2]:
        raise RuntimeError(
            f"the model has attn_implementation={name!r}, which alone compresses nothing, and "
            "reads a cache that is not tqai's: pass it a tqai.TqaiCache(model), or call "
            "tqai.patch(model), or choose another attention"
        )


def _attend_update(
    original: Attention,
    module: torch.nn.Module,
    query: torch.Tensor,
    update: Update,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if update.queries == 1 or not _pays_for_prefill(update):
        result = _attend_once(original, module, query, update, mask, kwargs)
    elif _is_of_others(update, query, mask):
        update.layer.settle(update.fresh is not None)
        update.fresh = None
        result = _attend_once(original, module, query, update, mask, kwargs)
    else:
        result = _attend_in_steps(original, module, query, update, mask, kwargs), None
    if not update.settled and update.is_current():
        if mask is not None and update.queries > 1:
            hidden = hidden_tokens(mask, update.queries, update.length, query.shape[0])
            if hidden is not None:
                update.layer.mark_hidden(hidden)
        update.layer.settle(update.fresh is not None)
        update.settled = True
    return result


def _attend_once(
    original: Attention,
    module: torch.nn.Module,
    query: torch.Tensor,
    update: Update,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    layer = update.layer
    _check_device(query, update)
    if update.fresh is None and not update.settled and layer.has_dropped:
        layer.check_dropped(mask, update.first)
    if update.fresh is None and layer.is_packed() and not layer.exact_arithmetic:
        core = layer.core
        assert core is not None
        shape = core.batch, core.kv_heads, core.head_dim, core.value_head_dim
        arguments = _kernel_arguments(original, module, shape, query, update, mask, kwargs)
        if arguments is not None:
            return _attend_packed(query, update, arguments), None
    # A view's dense tensors are its fresh ones, exact, where the layer was empty before.
    key, value = _dense(query, update)
    return original(module, query, key, value, mask, **kwargs)


def _check_device(query: torch.Tensor, update: Update) -> None:
    core = update.layer.core
    where = query.device if core is None else stores.device_of(core)
    if query.device != where:
        raise ValueError(
            f"layer {update.layer.index}: queries on {query.device}; the keys and values that they "
            f"read are on {where}: move both to one device, or make another cache with "
            "tqai.new_cache(model) after the model has moved"
        )


def _pays_for_prefill(update: Update) -> bool:
    """Whether the update's own tokens are to be read as decoding would read them."""
    layer = update.layer
    wanted = not layer.settings.exact_prefill and update.queries > 1
    return wanted and not update.settled and update.is_current()


def _is_of_others(update: Update, query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether an update's tokens are an image's or the like, and the queries a text's."""
    count = query.shape[-2]
    return (
        count != update.queries
        and mask is not None
        and mask.ndim == 4
        and tuple(mask.shape[2:]) == (count, update.length)
    )


def _attend_in_steps(
    original: Attention,
    module: torch.nn.Module,
    query: torch.Tensor,
    update: Update,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    if _wants_weights(module, kwargs):
        raise NotImplementedError(
            "attention weights are not computed with exact_prefill=False: patch the model with "
            "exact_prefill=True, or leave output_attentions out"
        )
    if query.shape[-2] != update.queries or (
        mask is not None and (mask.ndim != 4 or mask.shape[2:] != (update.queries, update.length))
    ):
        raise NotImplementedError(
            f"exact_prefill=False needs a query for each new token, and a 4-dimensional mask or "
            f"none; {type(module).__name__} attends otherwise: use exact_prefill=True"
        )
    hidden = (
        None if mask is None else hidden_tokens(mask, update.queries, update.length, query.shape[0])
    )
    outputs = []
    for at, step in steps(update, hidden, mask):
        if mask is None:
            part = causal_mask(step, update.layer.sliding_window)
        else:
            part = mask[:, :, at : at + step.queries, : step.length]
        rows = query[:, :, at : at + step.queries]
        outputs.append(_attend_once(original, module, rows, step, part, kwargs)[0])
    return torch.cat(outputs, dim=1)


def _dense(query: torch.Tensor, update: Update) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = update.dense(0), update.dense(1)
    if update.fresh is None and torch.is_grad_enabled() and query.requires_grad:
        key = Undifferentiable.apply(query, key)
    return key, value


def _attend_packed(query: torch.Tensor, update: Update, arguments: dict[str, Any]) -> torch.Tensor:
    core = update.layer.core
    assert core is not None
    if not update.is_current():
        update.dense(0)  # raises
    # A text's queries may be more than the image's or the encoder's tokens; a store takes no more
    # at a time than it has tokens.
    if query.shape[2] <= core.tokens:
        output = stores.attend(core, query, first_token=update.first, **arguments)
    else:
        output = _attend_in_parts(core, query, update, arguments)
    if torch.is_grad_enabled() and query.requires_grad:
        return Undifferentiable.apply(query, output)
    return output


def _attend_in_parts(
    core: stores.Store, query: torch.Tensor, update: Update, arguments: dict[str, Any]
) -> torch.Tensor:
    """Attention of more queries than the store has tokens."""
    mask, most = arguments["mask"], max(core.tokens, 1)
    outputs = [
        stores.attend(
            core,
            query[:, :, at : at + most],
            first_token=update.first,
            **{**arguments, "mask": None if mask is None else mask[:, :, at : at + most]},
        )
        for at in range(0, query.shape[2], most)
    ]
    return torch.cat(outputs, 1)


def _kernel_arguments(
    original: Attention,
    module: torch.nn.Module,
    shape: tuple[int, int, int, int],
    query: torch.Tensor,
    update: Update | compiled.Mark,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> dict[str, Any] | None:
    """Keyword arguments for ``KvCache.attend``; None where only `original` is right.

    shape: the layer's rows, key/value heads, head_dim and value_head_dim.
    """
    rows, kv_heads, head_dim, value_dim = shape
    batch, heads, queries, dim = query.shape
    groups = getattr(module, "num_key_value_groups", 1)
    if (batch, dim) != (rows, head_dim) or heads != kv_heads * groups:
        return None
    if takes_unknown(original, kwargs) or kwargs.get("dropout"):
        return None
    if original is not ALL_ATTENTION_FUNCTIONS["sdpa"] and _wants_weights(module, kwargs):
        return None
    # A mask says everything: models with bidirectional or chunked spans put them there.
    causal = mask is None and not update.is_cross
    if causal and queries != update.queries:
        return None
    if mask is None and queries > 1:  # what no mask means then differs between implementations
        if causal or getattr(module, "is_causal", True):
            return None
    if mask is not None and not _fits(mask, update, query):
        return None

    soft_cap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    sizes = heads, kv_heads, dim, value_dim
    formula = formula_of(original, module, sizes, soft_cap, sinks, query.device)
    if formula is None:
        return None
    if sinks is not None:
        sinks = sinks.detach()
        if formula.sinks and sinks.numel() != heads:
            return None
    return {
        "scale": kwargs.get("scaling"),
        "soft_cap": float(soft_cap) if formula.soft_cap else 0.0,
        "causal": causal,
        "window": (update.layer.sliding_window or 0) if mask is None else 0,
        "mask": mask,
        "sinks": sinks if formula.sinks else None,
    }


def _wants_weights(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    if "output_attentions" in kwargs:
        return bool(kwargs["output_attentions"])
    return bool(getattr(getattr(module, "config", None), "output_attentions", False))


def _fits(mask: torch.Tensor, update: Update | compiled.Mark, query: torch.Tensor) -> bool:
    batch, heads, queries, _ = query.shape
    return (
        mask.ndim == 4
        and mask.shape[0] in (1, batch)
        and mask.shape[1] in (1, heads)
        and tuple(mask.shape[2:]) == (queries, update.length)
        and is_mask_dtype(mask.dtype)
        and mask.device == query.device
    )


def _mask(implementation: str, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The mask that the original implementation takes."""
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](*args, **kwargs)


def _refuse_paged(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(CONTINUOUS_BATCHING)
