"""The device store's operations, in torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tqai.stores.for_torch import fused
from tqai.stores.for_torch.cuda import cuda_attention
from tqai.stores.for_torch.metal import metal_attention
from tqai.stores.gpu.attention import GpuAttention

_Number = float | int
_Arrays = Sequence[torch.Tensor]


@dataclass(frozen=True)
class TorchOperations:
    """See ``tqai.stores.device.operations.Operations``."""

    device: torch.device

    bool_ = torch.bool
    uint8 = torch.uint8
    float16 = torch.float16
    float32 = torch.float32

    @property
    def wide(self) -> torch.dtype:
        return torch.float32 if self.device.type == "mps" else torch.float64

    @property
    def waits(self) -> bool:
        return self.device.type != "cpu"

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Neither autograd, nor tensors that only inference mode may change, nor autocast."""
        with torch.inference_mode(False), torch.no_grad(), _without_autocast(self.device.type):
            yield

    def evaluate(self, *arrays: torch.Tensor) -> None:
        """Nothing is put off."""

    def tile_kernel(self) -> GpuAttention | None:
        find = cuda_attention if self.device.type == "cuda" else metal_attention
        return find(self.device)

    def fused_dtype(self, dtype: str, head_dim: int, value_head_dim: int) -> torch.dtype | None:
        return fused.dtype_of(self.device, self.dtype(dtype), head_dim, value_head_dim)

    def fused_attention(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return fused.attention(queries, keys, values, bias, scale)

    def after(self, arrays: _Arrays, done: _Arrays) -> _Arrays:
        """`arrays`: all is done in order."""
        return arrays

    def dtype(self, name: str) -> torch.dtype:
        return getattr(torch, name)

    def astype(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.to(dtype)

    def view(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.contiguous().view(dtype)

    def asarray(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device)

    def to_numpy(self, x: torch.Tensor) -> np.ndarray:
        return x.cpu().numpy()

    def to_bytes(self, x: torch.Tensor) -> bytes:
        if x.numel() == 0:
            return b""
        return x.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()

    def from_bytes(self, data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        if len(data) == 0:
            return self.empty(shape, dtype)
        flat = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        return flat.view(dtype).view(*shape).to(self.device)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, device=self.device)

    def arange(self, start: int, stop: int) -> torch.Tensor:
        return torch.arange(start, stop, device=self.device)

    def contiguous(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous()

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    def concat(self, arrays: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        return torch.cat(tuple(arrays), axis)

    def stack(self, arrays: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        return torch.stack(tuple(arrays), axis)

    def unstack(self, x: torch.Tensor, axis: int) -> Sequence[torch.Tensor]:
        return x.unbind(axis)

    def permute_dims(self, x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
        return x.permute(tuple(axes))

    def broadcast_to(self, x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        return x.expand(tuple(shape))

    def pad(self, x: torch.Tensor, before: int, after: int) -> torch.Tensor:
        return torch.nn.functional.pad(x, (before, after))

    def where(self, condition: torch.Tensor, x: Any, y: Any) -> torch.Tensor:
        return torch.where(condition, x, y)

    def clip(self, x: torch.Tensor, low: _Number | None, high: _Number | None) -> torch.Tensor:
        return x.clamp(low, high)

    def maximum(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.maximum(x, y)

    def floor(self, x: torch.Tensor) -> torch.Tensor:
        return x.floor()

    def tanh(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh()

    def isfinite(self, x: torch.Tensor) -> torch.Tensor:
        return x.isfinite()

    def max(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        return x.amax(axis)

    def sum_kept(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(-1, keepdim=True)

    def vector_norm(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)

    def take(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return x[indices.int()]

    def searchsorted(self, levels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.bucketize(x, levels, right=True).to(torch.uint8)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
