"""Attention with a soft cap: what stands in the place of Gemma 2's attention modules' call.

Gemma 2 caps its scores, cap·tanh(score / cap), which mlx-lm's attention function does not, and so
its modules compute attention themselves. Here they hand the cap on, and compressed layers are read
packed. With mlx-lm's own caches, and without any, they are called as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx_lm.models import base, gemma2

_original = gemma2.Attention.__call__


def install() -> None:
    """Makes Gemma 2's modules call the function here. May be called again."""
    gemma2.Attention.__call__ = _call


def uninstall() -> None:
    """Makes them call mlx-lm's own again."""
    gemma2.Attention.__call__ = _original


@contextmanager
def standing_in() -> Iterator[None]:
    """The function here in that place, inside alone."""
    before = gemma2.Attention.__call__
    install()
    try:
        yield
    finally:
        gemma2.Attention.__call__ = before


def _call(self: gemma2.Attention, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    """x [batch, tokens, hidden]; returns the same shape."""
    if not getattr(cache, "takes_soft_cap", False):
        return _original(self, x, mask, cache)
    batch, count, _ = x.shape

    def heads(projected: mx.array, number: int) -> mx.array:
        return projected.reshape(batch, count, number, -1).transpose(0, 2, 1, 3)

    queries = self.rope(heads(self.q_proj(x), self.n_heads), offset=cache.offset)
    keys = self.rope(heads(self.k_proj(x), self.n_kv_heads), offset=cache.offset)
    keys, values = cache.update_and_fetch(keys, heads(self.v_proj(x), self.n_kv_heads))
    cache.soft_cap = self.attn_logit_softcapping
    # Looked up now: while a model is tried, something else stands there.
    output = base.scaled_dot_product_attention(
        queries, keys, values, cache=cache, scale=self.scale, mask=mask
    )
    return self.o_proj(output.transpose(0, 2, 1, 3).reshape(batch, count, -1))


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | str | None,
    cap: float,
) -> mx.array:
    """The same over arrays: queries [batch, query_heads, n, head_dim], keys and values [batch,
    kv_heads, length, dim]; mask: as mlx-lm's function takes it."""
    batch, query_heads, count, _ = queries.shape
    kv_heads, length = keys.shape[1:3]
    grouped = (queries * scale).reshape(batch, kv_heads, -1, count, queries.shape[3])
    scores = grouped @ keys[:, :, None].swapaxes(-1, -2)
    scores = (mx.tanh(scores / cap) * cap).reshape(batch, query_heads, count, length)
    if isinstance(mask, str):
        mask = base.create_causal_mask(count, length - count)
    if mask is not None and mask.dtype == mx.bool_:
        scores = mx.where(mask, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
    elif mask is not None:
        scores = scores + mask
    shares = mx.softmax(scores, precise=True, axis=-1)
    output = shares.reshape(*grouped.shape[:4], length) @ values[:, :, None]
    return output.reshape(batch, query_heads, count, values.shape[3])
