"""Tensors' contents as short texts: all of their bytes, and a look at some of them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tqai.transformers.weights.held import inner_tensors

CHUNK = 4 << 20
"""Bytes of one checksum. Each finds what accidents do with certainty up to 32 changed bits in a
row, and else but for one in 2^32."""
_FEW = 4096
_PLAIN = (bool, int, float, str, bytes, torch.dtype, type(None))


def short(text: str | bytes) -> str:
    """A digest in 16 characters."""
    data = text.encode() if isinstance(text, str) else text
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def describe(value: Any) -> str:
    """What there is to say of a value beside its numbers."""
    if isinstance(value, torch.Tensor):
        kind = "" if not inner_tensors(value) else f"{type(value).__name__} {_context(value)} "
        return f"{kind}{value.dtype} {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(describe, value))})"
    if isinstance(value, dict):
        return f"({', '.join(f'{key}: {describe(each)}' for key, each in value.items())})"
    return repr(value) if isinstance(value, _PLAIN) else type(value).__name__


def _context(tensor: torch.Tensor) -> str:
    """The numbers and names beside the tensors that a tensor of a class of its own consists of."""
    context = tensor.__tensor_flatten__()[1]
    values = context.values() if isinstance(context, dict) else context
    return repr([value for value in values or () if isinstance(value, _PLAIN)])


def digest(value: Any, pool: ThreadPoolExecutor) -> str | None:
    """Of all numbers in a value; None where some of them are nowhere."""
    checksums: list[int] = []
    for flat in _flat(value):
        if flat is None:
            return None
        chunks = [chunk.cpu().numpy() for chunk in flat.split(CHUNK)]
        checksums += map(zlib.crc32, chunks) if len(chunks) < 2 else pool.map(zlib.crc32, chunks)
    return short(repr(checksums))


def look(tensor: torch.Tensor) -> int:
    """A checksum of a middle column, so that of each row there is something, or of a few numbers.

    It costs a hundredth of ``digest``, and finds edits of whole rows that leave no other trace.
    """
    numbers = tensor.detach()
    if numbers.numel() > _FEW and numbers.ndim > 1:
        numbers = numbers.reshape(-1, numbers.shape[-1])[:, numbers.shape[-1] // 2]
    elif numbers.numel() > _FEW:
        numbers = numbers[:: numbers.numel() // _FEW]
    return zlib.crc32(_bytes(numbers).cpu().numpy())


def _flat(value: Any) -> Iterator[torch.Tensor | None]:
    """The bytes of all tensors in a value, [bytes] uint8 each; None for some that are nowhere."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _flat(each)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    elif not isinstance(value, torch.Tensor):
        return
    elif inner := inner_tensors(value):
        for _, each in inner:
            yield from _flat(each)
    elif value.device.type == "meta":
        yield None
    elif value.is_quantized:
        yield from _flat(_quantized(value))
    else:
        yield _bytes(value.detach())


def _quantized(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What a tensor of PyTorch's own quantisation consists of."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale, zero_point = tensor.q_scale(), tensor.q_zero_point()
        scales = [torch.tensor(each, device="cpu") for each in (scale, zero_point)]
    else:
        scales = [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
    return [tensor.int_repr(), *scales]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return tensor.view(torch.uint8)
