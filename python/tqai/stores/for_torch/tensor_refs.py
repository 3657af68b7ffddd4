"""Torch tensors as the integers that ``tqai._core`` takes: address, dtype, shape, strides."""

from __future__ import annotations

import torch

from tqai import _core, settings

Ref = tuple[int, "_core.DType", tuple[int, ...], tuple[int, ...]]

DTYPES: dict[torch.dtype, _core.DType] = {
    getattr(torch, name): _core.DType[name] for name in settings.DTYPES
}
"""Of keys and values, in the order of tqai::DType."""
_MASK_DTYPES = {**DTYPES, torch.bool: _core.DType.bool}


def rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, copied only if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def ref(tensor: torch.Tensor) -> Ref:
    """Borrows a 4-dimensional CPU tensor whose dtype is a key of ``DTYPES``.

    The caller keeps `tensor` alive while the reference is used.

    Raises:
        ValueError: for one on another device, whose address is none of this process's.
    """
    _check_device(tensor)
    return tensor.data_ptr(), DTYPES[tensor.dtype], tensor.shape, tensor.stride()


def mask_ref(mask: torch.Tensor) -> Ref:
    """As ``ref``, for an attention mask: bool as well, and any strides."""
    _check_device(mask)
    return mask.data_ptr(), _MASK_DTYPES[mask.dtype], mask.shape, mask.stride()


def _check_device(tensor: torch.Tensor) -> None:
    if not tensor.is_cpu:
        raise ValueError(f"a tensor on {tensor.device} for the CPU's kernels; allowed: on the CPU")


def is_mask_dtype(dtype: torch.dtype) -> bool:
    """Whether ``_core`` reads masks of this dtype."""
    return dtype in _MASK_DTYPES
