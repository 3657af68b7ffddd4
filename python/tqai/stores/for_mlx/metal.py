"""Metal kernels in mlx."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx

from tqai.stores.gpu import kernels
from tqai.stores.gpu.attention import GpuAttention, Grid, Numbers

_tried: set[kernels.Kernel] = set()


def metal_attention() -> GpuAttention | None:
    """That of arrays on the default device, where it is one of Metal's and kernels are wanted."""
    usable = mx.metal.is_available() and mx.default_device().type == mx.gpu
    return GpuAttention(run) if usable and kernels.wanted(kernels.METAL) else None


def run(
    kernel: kernels.Kernel,
    inputs: Sequence[mx.array | Numbers],
    shapes: Sequence[tuple[int, ...]],
    grid: Grid,
    group: Grid,
) -> list[mx.array]:
    """See ``tqai.stores.gpu.attention.Run``.

    Raises:
        RuntimeError: where mlx cannot compile the kernel.
    """
    outputs = _compiled(kernel)(
        inputs=[x if isinstance(x, mx.array) else _numbers(x, _dtype(x)) for x in inputs],
        output_shapes=list(shapes),
        output_dtypes=[mx.float32] * len(shapes),
        grid=grid,
        threadgroup=group,
    )
    if kernel not in _tried:  # mlx compiles where it computes; later nobody would know what failed
        try:
            mx.eval(outputs)
        except RuntimeError as error:
            raise kernels.refused(kernel, error, kernels.METAL) from error
        _tried.add(kernel)
    return outputs


def _dtype(numbers: Numbers) -> mx.Dtype:
    return mx.int64 if isinstance(numbers[0], int) else mx.float32


@lru_cache(maxsize=256)
def _numbers(numbers: Numbers, dtype: mx.Dtype) -> mx.array:
    """Kept, as most are the same for many steps."""
    return mx.array(numbers, dtype)


@lru_cache(maxsize=256)
def _compiled(kernel: kernels.Kernel) -> Any:
    return mx.fast.metal_kernel(
        name=kernel.name,
        input_names=[name for name, _ in kernel.inputs],
        output_names=list(kernel.outputs),
        source=kernel.body,
        header=kernels.source(),
    )
