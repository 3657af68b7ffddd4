"""A compiled cache, with mlx's arrays put in and taken out."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from tqai import _core
from tqai.mlx.arrays import DTYPES, Ref, blank, from_memory, mask_ref, rows_contiguous
from tqai.mlx.attention.masks import Meaning
from tqai.mlx.model.geometry import LayerShape
from tqai.settings import Settings


def make_store(settings: Settings, shape: LayerShape, batch: int, dtype: mx.Dtype) -> _core.KvCache:
    """An empty store for a layer of this shape.

    Raises:
        ValueError: for options out of range.
    """
    options = settings.core_options()
    if shape.max_size is not None:
        options["sink_tokens"] = 0  # a sink that has left a sliding window is never seen again
    return _core.KvCache(
        batch=batch,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        value_head_dim=shape.value_head_dim,
        dtype=DTYPES[dtype],
        rope=None if shape.rope is None else shape.rope.core_argument(),
        **options,
    )


def attend(
    store: _core.KvCache,
    queries: mx.array,
    first: int,
    scale: float,
    mask: mx.array | Meaning,
    sinks: np.ndarray | None,
    soft_cap: float = 0.0,
) -> mx.array:
    """Attention of evaluated queries [batch, query_heads, n, head_dim] over tokens from `first` on.

    mask: what it says, or an evaluated array that broadcasts to [batch, query_heads, n, tokens −
    first]. sinks: [query_heads] float32. soft_cap: of scores; 0: none.

    Returns [batch, query_heads, n, value_head_dim].
    """
    queries, q = rows_contiguous(queries)
    batch, heads, count, _ = queries.shape
    memory, output = blank((batch, count, heads, store.value_head_dim), queries.dtype)
    where = mask if isinstance(mask, Meaning) else mask_ref(mask, count)
    attend_into(store, q, output, first, scale, where, sinks, soft_cap)
    return from_memory(memory, queries.dtype).transpose(0, 2, 1, 3)


def attend_into(
    store: _core.KvCache,
    queries: Ref,
    output: Ref,
    first: int,
    scale: float,
    mask: Ref | Meaning,
    sinks: np.ndarray | None,
    soft_cap: float = 0.0,
) -> None:
    """As ``attend``, of what lies in memory, into [batch, n, query_heads, value_head_dim] there."""
    says = mask if isinstance(mask, Meaning) else Meaning(causal=False)
    # By place: pybind11 takes as long to look up names as a short cache takes to be read.
    store.attend(
        queries,
        output,
        scale,
        soft_cap,
        says.causal,
        says.window,
        first,
        None if isinstance(mask, Meaning) else mask,
        0 if sinks is None else _core.borrowed(sinks)[0],
    )


def gather(
    store: _core.KvCache, first: int, length: int, dtypes: tuple[mx.Dtype, mx.Dtype]
) -> tuple[mx.array, mx.array]:
    """Dequantised keys and values of tokens first…first + length − 1."""
    shape = store.batch, store.kv_heads, length
    keys, k = blank((*shape, store.head_dim), dtypes[0])
    values, v = blank((*shape, store.value_head_dim), dtypes[1])
    store.gather(first, k, v)
    return from_memory(keys, dtypes[0]), from_memory(values, dtypes[1])
