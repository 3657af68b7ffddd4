"""Metal kernels in torch, for tensors on MPS."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from tqai.stores.gpu import kernels, metal
from tqai.stores.gpu.attention import GpuAttention, Grid, Numbers


def metal_attention(device: torch.device) -> GpuAttention | None:
    """That of tensors on `device`, where it is one of Metal's and kernels are wanted."""
    # torch.compile cannot look into kernels, and makes its own of array operations.
    usable = device.type == "mps" and hasattr(torch.mps, "compile_shader")
    if not usable or torch.compiler.is_compiling() or not kernels.wanted(kernels.METAL):
        return None
    return GpuAttention(run)


def run(
    kernel: kernels.Kernel,
    inputs: Sequence[torch.Tensor | Numbers],
    shapes: Sequence[tuple[int, ...]],
    grid: Grid,
    group: Grid,
) -> list[torch.Tensor]:
    """See ``tqai.stores.gpu.attention.Run``.

    Raises:
        RuntimeError: where torch cannot compile the kernel.
    """
    arguments = [x.contiguous() if isinstance(x, torch.Tensor) else list(x) for x in inputs]
    device = next(x.device for x in inputs if isinstance(x, torch.Tensor))
    outputs = [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
    _compiled(kernel)(*arguments, *outputs, threads=list(grid), group_size=list(group))
    return outputs


@lru_cache(maxsize=256)
def _compiled(kernel: kernels.Kernel) -> Any:
    text = f"{kernels.source()}\n{metal.function(kernel)}"
    try:
        return getattr(torch.mps.compile_shader(text), kernel.name)
    except RuntimeError as error:
        raise kernels.refused(kernel, error, kernels.METAL) from error
