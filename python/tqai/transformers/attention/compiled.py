"""What ``torch.compile`` traces of a compressed cache: a few operators in place of Python.

Dynamo cannot look into the store that holds a layer's tokens, and would end a graph at each layer's
update and attention. While it traces, layers are updated and read by operators, which find the
layer by a number in a tensor when they run; tracing itself sees lengths only, kept beside the store
as integers (``TqaiLayer.seen``), so that they may change from token to token.

A layer's keys and values are made of its tokens only where an operation uses them; attention that
the kernel computes takes them for the mark that is on them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from tqai.stores import for_torch as stores
from tqai.transformers.attention.padding import hidden_tokens
from tqai.transformers.attention.view import NOT_DIFFERENTIABLE

_numbers = itertools.count(1)
_objects: WeakValueDictionary[int, Any] = WeakValueDictionary()


def handle_of(target: Any) -> Tensor:
    """A new tensor, int64 [1], by which operators find `target` for as long as it lives.

    Operators that change or only have to wait for each other declare that they write into it.
    """
    number = next(_numbers)
    _objects[number] = target
    return torch.tensor([number], device="cpu")


def _target(handle: Tensor) -> Any:
    target = _objects.get(int(handle))
    if target is None:
        raise RuntimeError("a compiled forward pass was given a cache that is gone")
    return target


is_tracing = torch.compiler.is_compiling
"""Whether Dynamo reads this code to make a graph of it."""


@torch.compiler.disable
def outside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `function` returns; the graph ends before it and goes on after."""
    return function(*args, **kwargs)


@dataclass
class Mark:
    """What a traced update says of the keys that it hands out."""

    cache: Any
    layer: Any
    """The ``TqaiLayer`` behind them."""
    index: int
    first: int
    length: int
    queries: int
    fresh: bool
    """Whether the keys and values are the exact ones of an empty layer's first update."""
    is_cross = False


def begin(cache: Any, hook: Any, positions: Any, mask: Any) -> None:
    """Begins a pass over `cache`; when it runs, ``hook.begin`` does."""
    given = (each if isinstance(each, Tensor) else None for each in (positions, mask))
    _begin(cache.handle, hook.handle, *given)


def end(cache: Any) -> None:
    """Ends a pass."""
    _end(cache.handle)


def note(cache: Any, index: int, keys: Tensor) -> None:
    """Says that a layer which is not compressed is about to be updated."""
    _note(cache.handle, index, keys.shape[-2])


def update(cache: Any, keys: Tensor, values: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """As ``TqaiCache.update`` for a compressed layer, traced."""
    layer = cache.layers[index]
    queries = keys.shape[-2]
    length, first = layer.get_mask_sizes(queries)
    fresh = layer.seen == 0
    _append(cache.handle, keys.detach(), values.detach(), index, layer.seen)
    layer.seen = layer.seen + queries
    if fresh:
        keys, values = keys.contiguous(), values.contiguous()
    else:
        view = torch.ops.tqai.view
        keys, values = (
            _of_the_past(like, view(cache.handle, like.detach(), index, which, first, length))
            for which, like in enumerate((keys, values))
        )
    mark = Mark(cache, layer, index, first, length, queries, fresh)
    keys.tqai_keys = values.tqai_values = mark
    return keys, values


def mark_of(key: Tensor, value: Tensor) -> Mark | None:
    """What is marked as keys and values of one traced update, as ``view.update_of``."""
    mark = getattr(key, "tqai_keys", None)
    return mark if mark is getattr(value, "tqai_values", None) else None


def dense(mark: Mark, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values that attention of torch's own reads."""
    if mark.fresh:
        return key, value
    keys, values = _dense(
        mark.cache.handle, key.detach(), value.detach(), mark.index, mark.first, mark.length
    )
    return _of_the_past(query, keys), values


def attend(mark: Mark, query: Tensor, value_dim: int, arguments: dict[str, Any]) -> Tensor:
    """Attention from the packed bytes; `arguments` are those of ``stores.attend``."""
    output = _attend(
        mark.cache.handle,
        query.detach(),
        arguments["mask"],
        arguments["sinks"],
        mark.index,
        arguments["scale"],
        arguments["soft_cap"],
        arguments["causal"],
        arguments["window"],
        mark.first,
        value_dim,
    )
    settle(mark, arguments["mask"], query)
    return _of_the_past(query, output)


def settle(mark: Mark, mask: Tensor | None, query: Tensor) -> None:
    """Says that attention over an update is done, as ``TqaiLayer.settle``."""
    rows = query.shape[0]
    _settle(mark.cache.handle, mask, mark.index, mark.length, mark.queries, rows, mark.fresh)


def _of_the_past(source: Tensor, made: Tensor) -> Tensor:
    """`made`, so that a backward pass that would go through it to `source` raises."""
    if torch.is_grad_enabled() and source.requires_grad:
        return _undifferentiable(made, source)
    return made


@torch.library.custom_op(
    "tqai::undifferentiable",
    mutates_args=(),
    schema="(Tensor made, Tensor source) -> Tensor",
)
def _undifferentiable(made: Tensor, source: Tensor) -> Tensor:
    return made.clone()


@_undifferentiable.register_fake
def _(made: Tensor, source: Tensor) -> Tensor:
    return torch.empty_like(made)


# Graphs of backward passes are made whether they are run or not: it is running that raises.
@torch.library.custom_op(
    "tqai::refuse",
    mutates_args=(),
    schema="(Tensor gradient, Tensor source) -> Tensor",
)
def _refuse(gradient: Tensor, source: Tensor) -> Tensor:
    raise RuntimeError(NOT_DIFFERENTIABLE)


@_refuse.register_fake
def _(gradient: Tensor, source: Tensor) -> Tensor:
    return torch.empty_like(source)


def _keep_source(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
    return None, _refuse(gradient, *ctx.saved_tensors)


_undifferentiable.register_autograd(_backward, setup_context=_keep_source)


def _writes(schema: str) -> Callable[..., Any]:
    """An operator of a cache, the handle's; it declares that it writes, to keep its place."""
    name, arguments = schema.split("(", 1)
    return torch.library.custom_op(
        f"tqai::{name}", mutates_args=("handle",), schema=f"(Tensor(a!) handle, {arguments}"
    )


def _nothing(*args: Any) -> None:
    return None


@_writes("begin(Tensor hook, Tensor? positions, Tensor? mask) -> ()")
def _begin(handle: Tensor, hook: Tensor, positions: Tensor | None, mask: Tensor | None) -> None:
    _target(hook).begin(_target(handle), positions, mask)


@torch.library.custom_op("tqai::end", mutates_args=("handle",), schema="(Tensor(a!) handle) -> ()")
def _end(handle: Tensor) -> None:
    _target(handle).end_pass()


@_writes("note(int layer, SymInt tokens) -> ()")
def _note(handle: Tensor, layer: int, tokens: int) -> None:
    _target(handle).note_before(layer, tokens)


@_writes("append(Tensor keys, Tensor values, int layer, SymInt seen) -> ()")
def _append(handle: Tensor, keys: Tensor, values: Tensor, layer: int, seen: int) -> None:
    cache = _target(handle)
    held = cache.layers[layer].get_seq_length()
    if held != seen:
        raise RuntimeError(
            f"layer {layer} holds {held} tokens, and a compiled forward pass was made for {seen}: "
            "the cache was changed during the pass"
        )
    cache.update(keys, values, layer)


@_writes(
    "settle(Tensor? mask, int layer, SymInt length, SymInt queries, SymInt rows, bool fresh) -> ()"
)
def _settle(
    handle: Tensor,
    mask: Tensor | None,
    layer: int,
    length: int,
    queries: int,
    rows: int,
    fresh: bool,
) -> None:
    cache = _target(handle)
    target = cache.layers[layer]
    if not fresh and target.has_dropped:
        try:
            target.check_dropped(mask, target.core.tokens - length)
        except ValueError:
            cache.roll_back()
            raise
    if mask is not None and queries > 1:
        hidden = hidden_tokens(mask, queries, length, rows)
        if hidden is not None:
            target.mark_hidden(hidden)
    target.settle(fresh)


for _operator in (_begin, _end, _note, _append, _settle):
    _operator.register_fake(_nothing)


@_writes(
    "dense(Tensor keys, Tensor values, int layer, SymInt first, SymInt length) -> (Tensor, Tensor)"
)
def _dense(
    handle: Tensor, keys: Tensor, values: Tensor, layer: int, first: int, length: int
) -> tuple[Tensor, Tensor]:
    return _target(handle).layers[layer].gather(first, length)


@_dense.register_fake
def _(
    handle: Tensor, keys: Tensor, values: Tensor, layer: int, first: int, length: int
) -> tuple[Tensor, Tensor]:
    return keys.new_empty(_shape(keys, length)), values.new_empty(_shape(values, length))


@_writes(
    "attend(Tensor query, Tensor? mask, Tensor? sinks, int layer, float? scale, float soft_cap, "
    "bool causal, int window, SymInt first, int value_dim) -> Tensor"
)
def _attend(
    handle: Tensor,
    query: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    layer: int,
    scale: float | None,
    soft_cap: float,
    causal: bool,
    window: int,
    first: int,
    value_dim: int,
) -> Tensor:
    cache = _target(handle)
    target = cache.layers[layer]
    try:
        return stores.attend(
            target.core,
            query,
            mask=mask,
            sinks=sinks,
            scale=scale,
            soft_cap=soft_cap,
            causal=causal,
            window=window,
            first_token=first,
        )
    except BaseException:
        cache.roll_back()
        raise


@_attend.register_fake
def _(
    handle: Tensor,
    query: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    layer: int,
    scale: float | None,
    soft_cap: float,
    causal: bool,
    window: int,
    first: int,
    value_dim: int,
) -> Tensor:
    batch, heads, count, _ = query.shape
    return query.new_empty(batch, count, heads, value_dim)


@torch.library.custom_op(
    "tqai::gather",
    mutates_args=(),
    schema=(
        "(Tensor handle, Tensor like, int layer, int which, SymInt first, SymInt length) -> Tensor"
    ),
)
def _gather(
    handle: Tensor, like: Tensor, layer: int, which: int, first: int, length: int
) -> Tensor:
    return _target(handle).layers[layer].gather(first, length)[which]


@_gather.register_fake
def _(handle: Tensor, like: Tensor, layer: int, which: int, first: int, length: int) -> Tensor:
    return like.new_empty(_shape(like, length))


def _shape(like: Tensor, length: int) -> tuple[int, int, int, int]:
    return like.shape[0], like.shape[1], length, like.shape[3]


# Made of ``gather`` when a graph is lowered, and left out where nothing uses it. Backends that run
# the graph as it is get a view, which costs nothing until it is used.
_library = torch.library.Library("tqai", "FRAGMENT")
_library.define(
    "view(Tensor handle, Tensor like, int layer, int which, SymInt first, SymInt length) -> Tensor"
)


def _view(handle: Tensor, like: Tensor, layer: int, which: int, first: int, length: int) -> Tensor:
    if type(handle) is Tensor:
        return _target(handle).layers[layer].view(like, which, first, length)
    return _gather(handle, like, layer, which, first, length)


_library.impl("view", _view, "CompositeImplicitAutograd")
