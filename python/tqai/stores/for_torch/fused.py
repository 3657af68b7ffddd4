"""Torch's fused attention, which also says what it summed up, so that parts can be merged.

``scaled_dot_product_attention`` keeps that to itself; what it calls gives it.
"""

from __future__ import annotations

import torch

_LOWEST = torch.finfo(torch.float32).min
_ALIGNED = 16
"""Bytes to which CUDA's kernel wants a bias's rows aligned."""


def dtype_of(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_head_dim: int
) -> torch.dtype | None:
    """See ``tqai.stores.device.operations.Operations.fused_dtype``.

    On NVIDIA's GPUs the cache's own, as for attention without tqai.
    """
    if device.type == "cuda" and torch.version.cuda is not None:
        aligned = head_dim % 8 == 0 and value_head_dim % 8 == 0
        known = dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) >= (8, 0)
        return dtype if aligned and known else None
    return torch.float32 if device.type == "cpu" and head_dim == value_head_dim else None


def attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``tqai.stores.device.operations.Operations.fused_attention``."""
    seen = None
    if bias is not None:
        # Not −∞: where it hides all from a query, some versions and devices give no number.
        hidden = bias == -torch.inf
        seen = ~hidden.all(-1).expand(queries.shape[:3])
        low = torch.finfo(queries.dtype).min / 2
        bias = torch.where(hidden, low, bias.clamp_min(low)).to(queries.dtype)
        bias = _aligned(bias).expand(*queries.shape[:3], keys.shape[2])
    if queries.device.type == "cpu":
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, attn_mask=bias, scale=scale
        )
    else:
        output, log_sum, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            queries, keys, values, bias, True, scale=scale
        )
        log_sum = log_sum[..., : queries.shape[2]]
    output = output.float()
    if seen is not None:
        output = torch.where(seen[..., None], output, 0.0)
        log_sum = torch.where(seen, log_sum, _LOWEST)
    return output, log_sum


def _aligned(bias: torch.Tensor) -> torch.Tensor:
    """`bias` with room between its rows."""
    tokens = bias.shape[-1]
    room = -tokens % (_ALIGNED // bias.element_size())
    return bias if room == 0 else torch.nn.functional.pad(bias, (0, room))[..., :tokens]
