"""Prefill at the cache's true cost (``exact_prefill=False``).

A forward pass over a fresh prompt reads its own exact keys and values, and so does an evaluator
that scores texts by such passes: it never sees what compression costs. Here the tokens of an update
go through each layer a tile at a time, and each tile reads what is packed by then, as in decoding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tqai import stores
from tqai.transformers.view import Layer, Update

STEP = 64
"""Tokens at a time: as many as are sealed together."""


def steps(update: Update, hidden: list[int] | None) -> Iterator[tuple[int, Update]]:
    """Adds the tokens of `update` to its layer once more, ``STEP`` at a time.

    After each step, before anything of it is sealed, yields its first query and an update that
    stands for it. hidden: [batch], padding at the start of each row, where the layer was empty.
    """
    layer = update.layer
    core = layer.core
    assert core is not None
    start = core.tokens - update.queries
    states = update.fresh if update.fresh is not None else layer.gather(start, update.queries)
    dtype = torch.promote_types(states[0].dtype, states[1].dtype)
    keys, values = (tensor.to(dtype) for tensor in states)
    core.crop(start)
    for at in range(0, update.queries, STEP):
        count = min(STEP, update.queries - at)
        stores.append(core, *(rows[:, :, at : at + count] for rows in (keys, values)))
        if hidden is not None and start == 0:
            _drop_padding(layer, [min(tokens, at + count) for tokens in hidden])
        length = start + at + count - update.first
        yield at, Update(layer, update.first, length, count, None)
        core.seal()


def _drop_padding(layer: Layer, counts: list[int]) -> None:
    assert layer.core is not None
    if counts != layer.padding:
        layer.core.set_padding(counts)
        layer.padding = counts


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
