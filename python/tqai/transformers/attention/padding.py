"""Padding at the start of rows, as masks tell of it."""

from __future__ import annotations

import torch


def leading_hidden(mask: torch.Tensor, queries: int, length: int, batch: int) -> list[int] | None:
    """[batch]: how many of the last `queries` tokens, from the first of them on, no query sees.

    None where the mask is of an unusual shape. Asked again in each layer, for a mask may be written
    to in between; without padding that costs a look at its diagonal.

    mask: [batch or 1, heads or 1, queries, length], bool or additive.
    """
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[2:] != (queries, length):
        return None
    new = mask[..., length - queries :]
    # A padded token does not see itself: that bounds the columns to look at.
    itself = _visible(new.diagonal(dim1=-2, dim2=-1)).any(1)
    candidates = int((itself.cumsum(-1) == 0).sum(-1).max())
    seen = _visible(new[..., :candidates]).any(-2).any(1)
    return (seen.cumsum(-1) == 0).sum(-1).expand(batch).tolist()


def _visible(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
