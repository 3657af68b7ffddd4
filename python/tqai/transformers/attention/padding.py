"""Padding, as masks tell of it."""

from __future__ import annotations

import torch


def hidden_tokens(mask: torch.Tensor, queries: int, length: int, batch: int) -> torch.Tensor | None:
    """[batch, queries] bool on the CPU: which of the last `queries` tokens no query sees.

    None where there is none, or the mask is of an unusual shape. Asked again in each layer, for a
    mask may be written to in between; without padding that costs a look at its diagonal.

    mask: [batch or 1, heads or 1, queries, length], bool or additive.
    """
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[2:] != (queries, length):
        return None
    new = mask[..., length - queries :]
    # A padded token does not see itself: that bounds the columns to look at.
    seen = _visible(new.diagonal(dim1=-2, dim2=-1)).any(1)
    if seen.all():
        return None
    columns = (~seen).any(0).nonzero()[:, 0]
    seen[:, columns] = _visible(new[..., columns]).any(-2).any(1)
    return (~seen).expand(batch, -1).cpu()


def shown(mask: torch.Tensor, row: int, first: int, count: int) -> bool:
    """Whether any query of a batch row sees one of the mask's columns first … first + count − 1."""
    columns = mask[row if mask.shape[0] > 1 else 0, ..., max(first, 0) : max(first + count, 0)]
    return bool(_visible(columns).any())


def _visible(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
