"""Prefill at the cache's true cost (``exact_prefill=False``).

A forward pass over a fresh prompt reads its own exact keys and values, and so does an evaluator
that scores texts by such passes: it never sees what compression costs. Here the tokens of an update
go through each layer a tile at a time, and each tile reads what is packed by then, as in decoding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tqai.stores import for_torch as stores
from tqai.transformers.attention.view import Update

STEP = 64
"""Tokens at a time: as many as are sealed together."""


def steps(
    update: Update, hidden: torch.Tensor | None, mask: torch.Tensor | None
) -> Iterator[tuple[int, Update]]:
    """Adds the tokens of `update` to its layer once more, ``STEP`` at a time or a few more.

    After each step, before anything of it is sealed, yields its first query and an update that
    stands for it.

    Args:
        hidden: [batch, queries] bool, tokens that no query sees.
        mask: as attention takes it, [batch or 1, heads or 1, queries, length]. Tokens that it lets
            look ahead, as those of an image, go in one step with what they see.
    """
    layer = update.layer
    core = layer.core
    assert core is not None
    start = core.tokens - update.queries
    states = update.fresh if update.fresh is not None else layer.gather(start, update.queries)
    dtype = torch.promote_types(states[0].dtype, states[1].dtype)
    keys, values = (tensor.to(dtype) for tensor in states)
    core.crop(start)
    at = 0
    for end in _ends(update, mask):
        count = end - at
        positions = None if update.positions is None else update.positions[..., at : at + count]
        stores.append(core, *(rows[:, :, at : at + count] for rows in (keys, values)), positions)
        length = start + at + count - update.first
        yield at, Update(layer, update.first, length, count, None)
        if hidden is not None:
            layer.mark_hidden(hidden[:, at : at + count])
        core.seal()
        at = end


def _ends(update: Update, mask: torch.Tensor | None) -> list[int]:
    """Where steps end: at least ``STEP`` tokens from each other, and nothing before sees beyond."""
    count = update.queries
    ahead = list(range(1, count + 1))
    if mask is not None and count > STEP:
        new = mask[..., update.length - count :]
        visible = new if mask.dtype == torch.bool else new > torch.finfo(mask.dtype).min / 2
        columns = visible.any(1).any(0) * torch.arange(1, count + 1, device=mask.device)
        ahead = columns.amax(-1).cummax(-1)[0].tolist()
    ends = []
    end = STEP
    while end < count:
        if ahead[end - 1] > end:
            end = ahead[end - 1]
        else:
            ends.append(end)
            end += STEP
    return [*ends, count]


def causal_mask(update: Update, sliding_window: int | None) -> torch.Tensor:
    """[1, 1, queries, length] bool: what an update's queries see where nothing else is said."""
    assert update.layer.core is not None
    device = stores.device_of(update.layer.core)
    key = torch.arange(update.length, device=device)
    query = torch.arange(update.length - update.queries, update.length, device=device)[:, None]
    visible = key <= query
    if sliding_window is not None:
        visible &= key > query - sliding_window
    return visible[None, None]
