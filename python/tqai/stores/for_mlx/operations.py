"""The device store's operations, in mlx.

mlx puts everything off until something asks for numbers; what asks here is ``evaluate``,
``to_numpy``, ``to_bytes`` and Python's ``bool``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from tqai.stores.for_mlx.metal import metal_attention
from tqai.stores.gpu.attention import GpuAttention

_Number = float | int


@dataclass(frozen=True)
class MlxOperations:
    """See ``tqai.stores.device.operations.Operations``; on mlx's default device and stream."""

    waits = True
    bool_ = mx.bool_
    uint8 = mx.uint8
    float16 = mx.float16
    float32 = mx.float32

    @property
    def wide(self) -> mx.Dtype:
        return mx.float64 if mx.default_device().type == mx.cpu else mx.float32

    def plain(self) -> AbstractContextManager[None]:
        """They always are."""
        return nullcontext()

    def evaluate(self, *arrays: mx.array) -> None:
        mx.eval(arrays)

    def tile_kernel(self) -> GpuAttention | None:
        return metal_attention()

    def fused_dtype(self, dtype: str, head_dim: int, value_head_dim: int) -> None:
        """mlx's attention does not say what it summed up."""

    def fused_attention(self, *_: Any) -> Any:
        raise NotImplementedError("mlx has no attention that gives its scores' sum")

    def after(self, arrays: Sequence[mx.array], done: Sequence[mx.array]) -> Sequence[mx.array]:
        return mx.depends(list(arrays), list(done))

    def dtype(self, name: str) -> mx.Dtype:
        return getattr(mx, name)

    def astype(self, x: mx.array, dtype: mx.Dtype) -> mx.array:
        return x if x.dtype == dtype else x.astype(dtype)

    def view(self, x: mx.array, dtype: mx.Dtype) -> mx.array:
        return x.view(dtype)

    def asarray(self, x: np.ndarray) -> mx.array:
        return mx.array(x)

    def to_numpy(self, x: mx.array) -> np.ndarray:
        return np.array(x)

    def to_bytes(self, x: mx.array) -> bytes:
        return np.array(x.reshape(-1).view(mx.uint8)).tobytes() if x.size > 0 else b""

    def from_bytes(self, data: bytes, dtype: mx.Dtype, shape: Sequence[int]) -> mx.array:
        if len(data) == 0:
            return self.empty(shape, dtype)
        return mx.array(np.frombuffer(data, np.uint8)).view(dtype).reshape(*shape)

    def empty(self, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        return mx.zeros(tuple(shape), dtype)

    def zeros(self, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        return mx.zeros(tuple(shape), dtype)

    def arange(self, start: int, stop: int) -> mx.array:
        return mx.arange(start, stop)

    def contiguous(self, x: mx.array) -> mx.array:
        """`x` itself: how it lies is nobody's business before it is computed."""
        return x

    def copy(self, x: mx.array) -> mx.array:
        return mx.contiguous(x)  # which copies out of anything that is much larger

    def concat(self, arrays: Sequence[mx.array], axis: int) -> mx.array:
        return mx.concatenate(list(arrays), axis)

    def stack(self, arrays: Sequence[mx.array], axis: int) -> mx.array:
        return mx.stack(list(arrays), axis)

    def unstack(self, x: mx.array, axis: int) -> Sequence[mx.array]:
        return [part.squeeze(axis) for part in x.split(x.shape[axis], axis)]

    def permute_dims(self, x: mx.array, axes: Sequence[int]) -> mx.array:
        return x.transpose(*axes)

    def broadcast_to(self, x: mx.array, shape: Sequence[int]) -> mx.array:
        return mx.broadcast_to(x, shape)

    def pad(self, x: mx.array, before: int, after: int) -> mx.array:
        if before == after == 0:
            return x
        return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)])

    def where(self, condition: mx.array, x: Any, y: Any) -> mx.array:
        return mx.where(condition, x, y)

    def clip(self, x: mx.array, low: _Number | None, high: _Number | None) -> mx.array:
        return mx.clip(x, low, high)

    def maximum(self, x: mx.array, y: mx.array) -> mx.array:
        return mx.maximum(x, y)

    def floor(self, x: mx.array) -> mx.array:
        return mx.floor(x)

    def tanh(self, x: mx.array) -> mx.array:
        return mx.tanh(x)

    def isfinite(self, x: mx.array) -> mx.array:
        return mx.isfinite(x)

    def max(self, x: mx.array, axis: int) -> mx.array:
        return x.max(axis)

    def sum_kept(self, x: mx.array) -> mx.array:
        return x.sum(-1, keepdims=True)

    def vector_norm(self, x: mx.array) -> mx.array:
        return mx.linalg.norm(self.astype(x, mx.float32), axis=-1)

    def take(self, x: mx.array, indices: mx.array) -> mx.array:
        return mx.take(x, indices)

    def searchsorted(self, levels: mx.array, x: mx.array) -> mx.array:
        """Halves the levels, 2^bits − 1 of them, `bits` times."""
        found, step = mx.zeros(x.shape, mx.uint8), (len(levels) + 1) // 2
        while step > 0:
            found = found + step * (levels[found + (step - 1)] <= x).astype(mx.uint8)
            step //= 2
        return found
