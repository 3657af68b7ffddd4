"""What holds a layer's tokens, with mlx's arrays put in and taken out.

Where mlx computes on the CPU that is the compiled cache, which reads arrays where they lie: they
are evaluated first. On other devices it is the store in mlx's operations, which computes nothing
before it is asked to.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from tqai import _core
from tqai.mlx.arrays import DTYPES, Ref, blank, from_memory, mask_ref, rows_contiguous
from tqai.mlx.attention.masks import Meaning
from tqai.mlx.model.geometry import LayerShape
from tqai.settings import Settings
from tqai.stores.device import Options
from tqai.stores.for_mlx import MlxStore

Store = _core.KvCache | MlxStore
"""Both have the same methods; those that take arrays are called by the functions here."""


def is_native(backend: str) -> bool:
    """Whether tokens go to the C++ cache, mlx's default device being what it is."""
    return backend == "auto" and mx.default_device().type == mx.cpu


def make_store(settings: Settings, shape: LayerShape, batch: int, dtype: mx.Dtype) -> Store:
    """An empty store for a layer of this shape.

    Raises:
        ValueError: for options out of range.
    """
    options = settings.core_options()
    if shape.max_size is not None:
        options["sink_tokens"] = 0  # a sink that has left a sliding window is never seen again
    options.update(
        kv_heads=shape.kv_heads, head_dim=shape.head_dim, value_head_dim=shape.value_head_dim
    )
    if is_native(settings.backend):
        rope = None if shape.rope is None else shape.rope.core_argument()
        return _core.KvCache(batch=batch, dtype=DTYPES[dtype], rope=rope, **options)
    options.pop("level", None)
    rope = None if shape.rope is None else shape.rope.options()
    return MlxStore(Options(dtype=DTYPES[dtype].name, rope=rope, **options), batch)


def read(data: mx.array, settings: Settings) -> Store:
    """The store whose bytes `data` holds, uint8.

    Raises:
        ValueError: for other bytes.
    """
    if is_native(settings.backend):
        return _core.KvCache.deserialize(data)
    return MlxStore.deserialize(bytes(memoryview(data)))


def append(store: Store, keys: mx.array | Ref, values: mx.array | Ref) -> None:
    """Adds tokens [batch, kv_heads, n, dim], of the store's dtype or one that it can hold; to a
    compiled cache also such as lie in memory.

    Raises:
        ValueError: for NaN or infinity.
    """
    if isinstance(store, MlxStore):
        store.append(keys, values)
    elif isinstance(keys, mx.array):
        mx.eval(keys, values)
        keys, k = rows_contiguous(keys)
        values, v = rows_contiguous(values)
        store.append(k, v)
    else:
        store.append(keys, values)


def attend(
    store: Store,
    queries: mx.array,
    first: int,
    scale: float,
    mask: mx.array | Meaning,
    sinks: mx.array | None,
    soft_cap: float = 0.0,
) -> mx.array:
    """Attention of queries [batch, query_heads, n, head_dim] over tokens from `first` on.

    mask: what it says, or an array that broadcasts to [batch, query_heads, n, tokens − first].
    sinks: [query_heads] float32. soft_cap: of scores; 0: none. For a compiled cache all arrays are
    evaluated already.

    Returns [batch, query_heads, n, value_head_dim].
    """
    if isinstance(store, MlxStore):
        says = mask if isinstance(mask, Meaning) else Meaning(causal=False)
        output = store.attend(
            queries,
            scale=scale,
            soft_cap=soft_cap,
            causal=says.causal,
            window=says.window,
            first_token=first,
            mask=None if isinstance(mask, Meaning) else in_four(mask),
            sinks=sinks,
        )
        return output.transpose(0, 2, 1, 3)
    queries, q = rows_contiguous(queries)
    batch, heads, count, _ = queries.shape
    memory, output = blank((batch, count, heads, store.value_head_dim), queries.dtype)
    where = mask if isinstance(mask, Meaning) else mask_ref(mask, count)
    own = None if sinks is None else np.array(sinks)
    attend_into(store, q, output, first, scale, where, own, soft_cap)
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
    store: Store, first: int, length: int, dtypes: tuple[mx.Dtype, mx.Dtype]
) -> tuple[mx.array, mx.array]:
    """Dequantised keys and values of tokens first…first + length − 1."""
    if isinstance(store, MlxStore):
        return store.gather(first, length, dtypes)
    shape = store.batch, store.kv_heads, length
    keys, k = blank((*shape, store.head_dim), dtypes[0])
    values, v = blank((*shape, store.value_head_dim), dtypes[1])
    store.gather(first, k, v)
    return from_memory(keys, dtypes[0]), from_memory(values, dtypes[1])


def in_four(mask: mx.array) -> mx.array:
    """A mask of 1 to 4 dimensions with 4."""
    return mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
