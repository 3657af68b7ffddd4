"""mlx's arrays as ``tqai._core`` takes them, and what it has written as mlx's arrays.

Memory is read where it lies, without a copy; for that arrays are evaluated.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from tqai import _core, settings

Ref = tuple[int, "_core.DType", tuple[int, ...], tuple[int, ...]]

DTYPES: dict[mx.Dtype, _core.DType] = {
    getattr(mx, name): _core.DType[name] for name in settings.DTYPES
}
"""Of keys and values, in the order of tqai::DType."""
_MASK_DTYPES = {*DTYPES, mx.bool_}
_BYTES = {
    _core.DType.float32: 4,
    _core.DType.float16: 2,
    _core.DType.bfloat16: 2,
    _core.DType.bool: 1,
}
# numpy has no bfloat16: its bits.
_NUMPY = {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16}


def rows_contiguous(array: mx.array) -> tuple[mx.array, Ref]:
    """`array`, copied only if its last dimension is not contiguous, and where it lies.

    The caller keeps the array alive while the reference is used.
    """
    reference = _core.borrowed(array)
    if reference[3][-1] != 1:
        array = mx.contiguous(array)
        reference = _core.borrowed(array)
    return array, reference


def mask_ref(mask: mx.array, queries: int) -> Ref:
    """As ``_core.KvCache.attend`` takes a mask, of one with 1 to 4 dimensions, broadcast to
    [batch or 1, heads or 1, queries, columns]."""
    address, dtype, shape, strides = _core.borrowed(mask)[:4]
    missing = 4 - len(shape)
    shape, strides = (1,) * missing + shape, (0,) * missing + strides
    if shape[2] != queries:  # one row for all of them
        shape, strides = (*shape[:2], queries, shape[3]), (*strides[:2], 0, strides[3])
    return address, dtype, shape, strides


def part(reference: Ref, starts: tuple[int, ...], counts: tuple[int, ...]) -> Ref:
    """Where the part of an array lies that starts there and has this shape."""
    address, dtype, _, strides = reference
    offset = sum(start * stride for start, stride in zip(starts, strides, strict=True))
    return address + offset * _BYTES[dtype], dtype, counts, strides


def is_mask_dtype(dtype: mx.Dtype) -> bool:
    """Whether ``_core`` reads masks of this dtype."""
    return dtype in _MASK_DTYPES


def blank(shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[np.ndarray, Ref]:
    """Memory for `shape` elements of an mlx dtype, a key of ``DTYPES``, and where it lies."""
    memory = np.empty(shape, _NUMPY[dtype])
    return memory, _core.borrowed(memory, DTYPES[dtype])


def from_memory(memory: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """What was written into memory that ``blank`` gave for `dtype`, copied."""
    array = mx.array(memory)
    return array if array.dtype == dtype else array.view(dtype)


@mx.custom_function
def without_gradient(result: mx.array, *of: mx.array) -> mx.array:
    """`result`, computed of the arrays `of` outside of mlx: where a gradient is asked for by way of
    these, an error says that there is none, as there would be zeros otherwise."""
    return result


def _refuse(*_: Any) -> Any:
    raise NotImplementedError(
        "gradients do not flow through tokens that a compressed cache holds: train without a "
        "cache, or call tqai.unpatch(model); backend='mlx-ops' has gradients of what is new"
    )


without_gradient.vjp(_refuse)
without_gradient.jvp(_refuse)


def promoted(keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    """Both in one dtype that holds them exactly."""
    if keys.dtype == values.dtype:
        return keys, values
    dtype = mx.result_type(keys, values)
    return keys.astype(dtype), values.astype(dtype)
