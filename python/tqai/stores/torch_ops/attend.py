"""Softmax attention over packed tiles, a few at a time, in torch operations.

Nothing here looks at a tensor's numbers, so that ``torch.compile`` can take each step whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from tqai.stores.torch_ops.codec import Codec
from tqai.stores.torch_ops.packing import TILE_TOKENS
from tqai.stores.torch_ops.rows import Context, Rows

_LOWEST = torch.finfo(torch.float32).min
_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Query:
    """What is asked of a cache; ``TorchStore.attend`` explains each part."""

    states: torch.Tensor
    """[rows, kv_heads, group, n, head_dim] float32, times the scale."""
    tokens: int
    """Tokens of the cache; the queries are its last n."""
    soft_cap: float
    causal: bool
    window: int
    first_token: int
    mask: torch.Tensor | None
    """[rows or 1, kv_heads or 1, group or 1, n, tokens − first_token]."""

    @property
    def count(self) -> int:
        return self.states.shape[3]

    def bias(self, rows: Rows, start: int, end: int) -> torch.Tensor | None:
        """What is added to the scores of what `rows` hold at spots start…end − 1, where it is seen.

        [rows or 1, kv_heads or 1, group or 1, n, end − start]; None where all queries see all.
        """
        device = self.states.device
        oldest = self.tokens - self.count
        bias = None
        if self.mask is not None:
            # Tokens before first_token are seen by none, whatever stands there.
            columns = slice(max(start - self.first_token, 0), max(end - self.first_token, 0))
            if rows.gaps:
                tokens = rows.tokens_at(start, end, device) - self.first_token
                bias = self.mask[..., tokens.clamp(min=0)]
            else:
                bias = self.mask[..., columns]
            if bias.dtype == torch.bool:
                bias = torch.where(bias, 0.0, -torch.inf)
            bias = torch.nn.functional.pad(bias.float(), (end - start - bias.shape[-1], 0))
        spots = start, end
        start, end = rows.token_at(start), rows.token_at(end - 1) + 1
        before = start < self.first_token
        after = (self.causal or self.window > 0) and end - 1 > oldest
        left = self.window > 0 and start <= self.tokens - 1 - self.window
        if not (before or after or left):
            return bias
        hidden = None
        key = rows.tokens_at(*spots, device)
        query = torch.arange(oldest, self.tokens, device=device)[:, None]
        if before:
            hidden = key < self.first_token
        if after:
            later = key > query
            hidden = later if hidden is None else hidden | later
        if left:
            earlier = key <= query - self.window
            hidden = earlier if hidden is None else hidden | earlier
        assert hidden is not None
        return torch.where(hidden, -torch.inf, 0.0 if bias is None else bias)


class State(NamedTuple):
    """A softmax under way, over some of the tokens."""

    max: torch.Tensor
    """[rows, kv_heads, group, n]: the largest score."""
    sum: torch.Tensor
    """[rows, kv_heads, group, n] of e^(score − max)."""
    output: torch.Tensor
    """[rows, kv_heads, group, n, value_head_dim]: the values by those weights."""


def attend(context: Context, rows: Rows, query: Query, sinks: torch.Tensor | None) -> torch.Tensor:
    """[rows, kv_heads, group, n, value_head_dim] float32.

    sinks: [kv_heads, group] float32, scores that count in the sum and bring no value.
    """
    packed = _attend_pages(context, rows, query)
    exact = None
    for keys, values, bias in _exact_parts(rows, query):
        exact = attend_exact(exact, query.states, keys, values, bias, query.soft_cap)
    if packed is not None:
        # Sealed values were summed in their rotated domain.
        turned = packed.output @ context.codec.value.rotation
        packed = packed._replace(output=turned)
    state = _merge(packed, exact)
    if state is None:
        return query.states.new_zeros(*query.states.shape[:-1], context.options.value_head_dim)
    total, output = state.sum, state.output
    if sinks is not None:
        sink = sinks[:, :, None]
        top = torch.maximum(state.max, sink)
        share = torch.exp(state.max - top)
        total, output = total * share + torch.exp(sink - top), output * share[..., None]
    return output / total.clamp(min=_SMALLEST)[..., None]  # a query that sees nothing: 0


def _exact_parts(
    rows: Rows, query: Query
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Keys, values and bias of the sinks and of the tail, or of both together."""
    parts = []
    for part, start in ((rows.sinks, rows.first), (rows.tail, rows.tail_start)):
        if part.tokens > 0:
            parts.append((*part.part(0, part.tokens), query.bias(rows, start, start + part.tokens)))
    if len(parts) == 2 and parts[0][2] is None and parts[1][2] is None:
        keys, values = (torch.cat([part[i] for part in parts], dim=2) for i in (0, 1))
        return [(keys, values, None)]
    return parts


def _attend_pages(context: Context, rows: Rows, query: Query) -> State | None:
    heads, group, n = query.states.shape[1:4]
    # A token takes a key, a value and their codes, and scores and weights for each query.
    dim = max(context.options.head_dim, context.options.value_head_dim)
    vectors = len(rows.places) * heads * (4 + -(-3 * group * n // dim))
    step = context.tiles_at_once(vectors)
    rotated = query.states @ context.codec.key.rotation.mT
    flat = query.states.flatten(2, 3)
    state = None
    for page in rows.pages:
        for at in range(0, page.count, step):
            count = min(step, page.count - at)
            first = page.first + at * TILE_TOKENS
            tokens = min(count * TILE_TOKENS, page.end - first)
            if query.first_token > rows.token_at(first + tokens - 1):
                continue
            stand = page.positions.part(at * TILE_TOKENS, (at + count) * TILE_TOKENS)
            centre = rows.centre_sets[page.set].scores(context.phasors, flat, stand)
            bias = query.bias(rows, first, first + tokens)
            tiles = page.read(at, count)
            state = attend_tiles(
                context.codec, state, rotated, tiles, tokens, centre, bias, query.soft_cap
            )
    return state


def attend_tiles(
    codec: Codec,
    state: State | None,
    rotated: torch.Tensor,
    tiles: torch.Tensor,
    tokens: int,
    centre: torch.Tensor,
    bias: torch.Tensor | None,
    soft_cap: float,
) -> State:
    """Goes on with the first `tokens` tokens of `tiles` [rows, kv_heads, count, tile_bytes].

    rotated: queries turned as the keys, [rows, kv_heads, group, n, head_dim]; centre: what they
    give with the keys' centres, [rows, kv_heads, group · n, tokens or more, or 1].
    """
    key_codes, value_codes, key_norms, value_norms = codec.split(tiles)
    keys = codec.key.look_up(key_codes)
    scores = rotated.flatten(2, 3) @ keys.mT * key_norms[:, :, None] + centre
    scores = scores[..., :tokens].unflatten(2, rotated.shape[2:4])
    values = codec.value.look_up(value_codes)[:, :, :tokens]
    return _go_on(state, scores, bias, soft_cap, values, value_norms[:, :, :tokens])


def attend_exact(
    state: State | None,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    soft_cap: float,
) -> State:
    """Goes on with exact keys and values [rows, kv_heads, tokens, dim]."""
    scores = queries.flatten(2, 3) @ keys.float().mT
    scores = scores.unflatten(2, queries.shape[2:4])
    return _go_on(state, scores, bias, soft_cap, values.float(), None)


def _go_on(
    state: State | None,
    scores: torch.Tensor,
    bias: torch.Tensor | None,
    soft_cap: float,
    values: torch.Tensor,
    norms: torch.Tensor | None,
) -> State:
    if soft_cap > 0.0:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + bias
    top = scores.amax(-1)
    # Where a query sees none of these, −∞ − −∞ would be no number.
    weights = torch.exp(scores - top.clamp(min=_LOWEST)[..., None])
    total = weights.sum(-1)
    if norms is not None:
        weights = weights * norms[:, :, None, None]
    output = (weights.flatten(2, 3) @ values).unflatten(2, scores.shape[2:4])
    new = State(top, total, output)
    return new if state is None else _merge_two(state, new)


def _merge(a: State | None, b: State | None) -> State | None:
    if a is None or b is None:
        return b if a is None else a
    return _merge_two(a, b)


def _merge_two(a: State, b: State) -> State:
    top = torch.maximum(a.max, b.max)
    floor = top.clamp(min=_LOWEST)
    left, right = torch.exp(a.max - floor), torch.exp(b.max - floor)
    return State(
        top,
        a.sum * left + b.sum * right,
        a.output * left[..., None] + b.output * right[..., None],
    )
