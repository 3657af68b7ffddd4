"""The attention function that patched models call in the place of mlx-lm's."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import base

from tqai.mlx.attention import patching, soft_cap
from tqai.mlx.attention.view import plain, update_of

_original = base.scaled_dot_product_attention


def install() -> None:
    """Makes all models call the function here. May be called again."""
    patching.put(scaled_dot_product_attention, _original)
    soft_cap.install()


def uninstall() -> None:
    """Makes all models call mlx-lm's own function again."""
    patching.put(_original, scaled_dot_product_attention)
    soft_cap.uninstall()


def is_installed() -> bool:
    """Whether models call the function here."""
    return base.scaled_dot_product_attention is not _original


def scaled_dot_product_attention(
    queries: Any,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention from the packed bytes where `keys` and `values` are views of a compressed layer.

    Anything else, and whatever the kernel does not compute, goes to mlx-lm's own function, with
    dequantised keys and values if need be.

    Args:
        queries: [batch, query_heads, n, head_dim].
        keys: [batch, kv_heads, length, head_dim].
        values: [batch, kv_heads, length, value_head_dim].
        cache: whose keys they are; what is not tqai's is mlx-lm's business.
        mask: None, "causal", or an array that broadcasts to [batch, query_heads, n, length], bool
            or additive.
        sinks: [query_heads], scores that join the softmax with no value of their own.

    Returns:
        [batch, query_heads, n, value_head_dim] in the queries' dtype.

    Raises:
        RuntimeError: for views that are older than the cache.
    """
    update = update_of(keys, values)
    if update is None:
        keys, values = plain(keys), plain(values)
        return _original(plain(queries), keys, values, cache, scale, mask, sinks=sinks)
    queries = plain(queries)
    output = None
    if update.fresh is None and update.layer.is_packed():
        output = update.layer.attend(update, queries, scale, mask, sinks)
    if output is None:
        dense = update.dense(0), update.dense(1)
        cap = update.layer.soft_cap
        if cap:
            output = soft_cap.attention(queries, *dense, scale, mask, cap)
        else:
            output = _original(queries, *dense, cache, scale, mask, sinks=sinks)
    update.was_read()
    return output
