"""Softmax attention over packed tiles, a few at a time, in operations on arrays.

Nothing here looks at an array's numbers, so that ``torch.compile`` can take each step whole, and
mlx put all of it off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from tqai.stores.device.centres import Asked
from tqai.stores.device.codec import Codec
from tqai.stores.device.operations import Array, Operations
from tqai.stores.device.packing import TILE_TOKENS
from tqai.stores.device.pages import index_of
from tqai.stores.device.phasors import Phasors, Steps
from tqai.stores.device.positions import Positions
from tqai.stores.device.rows import Context, Rows

_LOWEST = float(np.finfo(np.float32).min)
_SMALLEST = float(np.finfo(np.float32).tiny)

FEW_QUERIES = 64
"""Of a head, its whole group together: more are left to matrix products, which have hardware of
their own, by the framework's attention where that says what it summed up. What is best has not been
measured."""


@dataclass(frozen=True)
class Query:
    """What is asked of a cache; ``DeviceStore.attend`` explains each part."""

    ops: Operations
    states: Array
    """[rows, kv_heads, group, n, head_dim] float32, times the scale."""
    scale: float
    tokens: int
    """Tokens of the cache; the queries are its last n."""
    soft_cap: float
    causal: bool
    window: int
    first_token: int
    mask: Array | None
    """[rows or 1, kv_heads or 1, group or 1, n, tokens − first_token]."""

    @property
    def count(self) -> int:
        return self.states.shape[3]

    def bias(self, rows: Rows, start: int, end: int) -> Array | None:
        """What is added to the scores of what `rows` hold at spots start…end − 1, where it is seen.

        [rows or 1, kv_heads or 1, group or 1, n, end − start]; None where all queries see all.
        """
        ops = self.ops
        oldest = self.tokens - self.count
        bias = None
        if self.mask is not None:
            # Tokens before first_token are seen by none, whatever stands there.
            columns = slice(max(start - self.first_token, 0), max(end - self.first_token, 0))
            if rows.gaps:
                tokens = rows.tokens_at(start, end) - self.first_token
                bias = self.mask[..., ops.clip(tokens, 0, None)]
            else:
                bias = self.mask[..., columns]
            if bias.dtype == ops.bool_:
                bias = ops.where(bias, 0.0, -math.inf)
            bias = ops.pad(ops.astype(bias, ops.float32), end - start - bias.shape[-1], 0)
        spots = start, end
        start, end = rows.token_at(start), rows.token_at(end - 1) + 1
        before = start < self.first_token
        after = (self.causal or self.window > 0) and end - 1 > oldest
        left = self.window > 0 and start <= self.tokens - 1 - self.window
        if not (before or after or left):
            return bias
        hidden = None
        key = rows.tokens_at(*spots)
        query = ops.arange(oldest, self.tokens)[:, None]
        if before:
            hidden = key < self.first_token
        if after:
            later = key > query
            hidden = later if hidden is None else hidden | later
        if left:
            earlier = key <= query - self.window
            hidden = earlier if hidden is None else hidden | earlier
        assert hidden is not None
        return ops.where(hidden, -math.inf, 0.0 if bias is None else bias)


class State(NamedTuple):
    """A softmax under way, over some of the tokens."""

    max: Array
    """[rows, kv_heads, group, n]: the largest score."""
    sum: Array
    """[rows, kv_heads, group, n] of e^(score − max)."""
    output: Array
    """[rows, kv_heads, group, n, value_head_dim]: the values by those weights."""


class TileKernel(Protocol):
    """Goes through packed tiles in a kernel that is written for a device."""

    def takes(self, queries: int) -> bool:
        """Whether it is meant for so many queries of a head, those of its whole group together."""
        ...

    def __call__(
        self,
        codec: Codec,
        state: State | None,
        rotated: Array,
        tiles: Array,
        held: Array,
        tokens: int,
        centre: Array,
        bias: Array | None,
        soft_cap: float,
    ) -> State:
        """What ``attend_tiles`` gives but for rounding, of tiles as a page holds them.

        held: [rows] int64, which of the rows of `tiles` each row's are. Where a query sees nothing,
        the largest score may be any that no other is below.
        """
        ...

    def centre_scores(self, fixed: Array, factors: Array, steps: Steps, tiles: int) -> Array:
        """What ``Asked.scores`` gives of its `fixed` and `factors`, for so many tiles."""
        ...


def attend(context: Context, rows: Rows, query: Query, sinks: Array | None) -> Array:
    """[rows, kv_heads, group, n, value_head_dim] float32.

    sinks: [kv_heads, group] float32, scores that count in the sum and bring no value.
    """
    ops = context.ops
    state = _attend_many(context, rows, query) or _attend_few(context, rows, query)
    if state is None:
        shape = *query.states.shape[:-1], context.options.value_head_dim
        return ops.zeros(shape, ops.float32)
    total, output = state.sum, state.output
    if sinks is not None:
        sink = sinks[:, :, None]
        top = ops.maximum(state.max, sink)
        share = (state.max - top).exp()
        total, output = total * share + (sink - top).exp(), output * share[..., None]
    return output / ops.clip(total, _SMALLEST, None)[..., None]  # a query that sees nothing: 0


def _attend_few(context: Context, rows: Rows, query: Query) -> State | None:
    ops = context.ops
    packed = _attend_pages(context, rows, query)
    exact = None
    for keys, values, bias in _exact_parts(ops, rows, query):
        exact = attend_exact(ops, exact, query.states, keys, values, bias, query.soft_cap)
    if packed is not None:
        # Sealed values were summed in their rotated domain.
        turned = packed.output @ context.codec.value.rotation
        packed = packed._replace(output=turned)
    return _merge(ops, packed, exact)


def _attend_many(context: Context, rows: Rows, query: Query) -> State | None:
    """By the framework's own attention over one page after the other; None where it has none for
    these."""
    ops, options = context.ops, context.options
    batch, heads, group, n, dim = query.states.shape
    if group * n <= FEW_QUERIES or query.soft_cap > 0.0 or query.scale == 0.0:
        return None
    dtype = ops.fused_dtype(options.dtype, options.head_dim, options.value_head_dim)
    if dtype is None:
        return None
    # As they were given, but for rounding.
    asked = ops.astype(query.states / query.scale, dtype).reshape(batch, heads, group * n, dim)

    def parts() -> Iterator[tuple[Array, Array, Array | None]]:
        for page in rows.pages:
            if query.first_token <= rows.token_at(page.end - 1):
                keys, values = rows.decoded(context, page)
                bias = query.bias(rows, page.first, page.end)
                yield keys[:, :, : page.tokens], values[:, :, : page.tokens], bias
        yield from _exact_parts(ops, rows, query)

    state = None
    for keys, values, bias in parts():
        keys, values = ops.astype(keys, dtype), ops.astype(values, dtype)
        if bias is not None:
            each = (*(1,) * (5 - bias.ndim), *bias.shape)
            all_queries = *each[:2], group, n, each[-1]
            bias = ops.broadcast_to(bias.reshape(*each), all_queries)
            bias = bias.reshape(*each[:2], group * n, each[-1])
        output, log_sum = ops.fused_attention(asked, keys, values, bias, query.scale)
        shape = batch, heads, group, n
        # One sum of a single score, as large as what was summed up.
        log_sum = log_sum.reshape(*shape)
        whole = ops.where(log_sum > _LOWEST, 1.0, ops.zeros((), ops.float32))
        new = State(log_sum, whole, output.reshape(*shape, options.value_head_dim))
        state = _merge(ops, state, new)
    return state


def _exact_parts(
    ops: Operations, rows: Rows, query: Query
) -> list[tuple[Array, Array, Array | None]]:
    """Keys, values and bias of the sinks and of the tail, or of both together."""
    parts = []
    for part, start in ((rows.sinks, rows.first), (rows.tail, rows.tail_start)):
        if part.tokens > 0:
            parts.append((*part.part(0, part.tokens), query.bias(rows, start, start + part.tokens)))
    if len(parts) == 2 and parts[0][2] is None and parts[1][2] is None:
        keys, values = (ops.concat([part[i] for part in parts], 2) for i in (0, 1))
        return [(keys, values, None)]
    return parts


def _attend_pages(context: Context, rows: Rows, query: Query) -> State | None:
    heads, group, n = query.states.shape[1:4]
    # A token takes a key, a value and their codes, and scores and weights for each query.
    dim = max(context.options.head_dim, context.options.value_head_dim)
    vectors = len(rows.places) * heads * (4 + -(-3 * group * n // dim))
    kernel = tile_kernel(context.ops, group * n, context.codec)
    # A kernel takes a whole page, as it unpacks nothing into memory.
    most = context.tiles_at_once(vectors) if kernel is None else None
    flat = query.states.reshape(len(rows.places), heads, group * n, context.options.head_dim)
    rotated = (flat @ context.codec.key.rotation.mT).reshape(*query.states.shape)
    state = None
    asked: dict[int, Asked] = {}
    for page in rows.pages:
        step = most or page.count
        for at in range(0, page.count, step):
            count = min(step, page.count - at)
            first = page.first + at * TILE_TOKENS
            tokens = min(count * TILE_TOKENS, page.end - first)
            if query.first_token > rows.token_at(first + tokens - 1):
                continue
            stand = page.positions.part(at * TILE_TOKENS, (at + count) * TILE_TOKENS)
            if page.set not in asked:
                asked[page.set] = rows.centre_sets[page.set].asked(context.phasors, flat)
            given = asked[page.set]
            tiles = page.tiles
            if kernel is None:
                tiles = page.read(at, count)
                if state is not None:
                    # One page after the other: all unpacked at once would be the whole cache.
                    tiles, given = _after(context.ops, tiles, given, state)
            centre = _centre_scores(kernel, context.phasors, given, stand)
            bias = query.bias(rows, first, first + tokens)
            rest = tokens, centre, bias, query.soft_cap
            if kernel is None:
                state = attend_tiles(context.codec, state, rotated, tiles, *rest)
            else:
                held = index_of(page.rows, context.ops)
                state = kernel(context.codec, state, rotated, tiles, held, *rest)
    return state


def _after(ops: Operations, tiles: Array, asked: Asked, state: State) -> tuple[Array, Asked]:
    """Both, with nothing computed of them before the state is."""
    if asked.factors is None:
        tiles, fixed = ops.after((tiles, asked.fixed), state)
        return tiles, asked._replace(fixed=fixed)
    tiles, factors = ops.after((tiles, asked.factors), state)
    return tiles, asked._replace(factors=factors)


def _centre_scores(
    kernel: TileKernel | None, phasors: Phasors | None, asked: Asked, positions: Positions
) -> Array:
    """As ``Asked.scores``."""
    if kernel is not None and asked.factors is not None and phasors is not None:
        steps = phasors.steps(positions)
        if steps is not None:
            tiles = positions.count // TILE_TOKENS
            return kernel.centre_scores(asked.fixed, asked.factors, steps, tiles)
    return asked.scores(phasors, positions)


def tile_kernel(ops: Operations, queries: int, codec: Codec) -> TileKernel | None:
    """The kernel that goes through packed tiles on this device with so many queries of a head: None
    where ``attend_tiles`` does. No other place chooses."""
    paths = codec.value.trellis or codec.key.trellis
    kernel = None if paths else ops.tile_kernel()
    return kernel if kernel is not None and kernel.takes(queries) else None


def attend_tiles(
    codec: Codec,
    state: State | None,
    rotated: Array,
    tiles: Array,
    tokens: int,
    centre: Array,
    bias: Array | None,
    soft_cap: float,
) -> State:
    """Goes on with the first `tokens` tokens of `tiles` [rows, kv_heads, count, tile_bytes].

    rotated: queries turned as the keys, [rows, kv_heads, group, n, head_dim]; centre: what they
    give with the keys' centres, [rows, kv_heads, group · n, tokens or more, or 1].
    """
    key_codes, value_codes, key_norms, value_norms = codec.split(tiles)
    rows, heads, group, n, dim = rotated.shape
    keys = codec.key.look_up(key_codes)
    queries = rotated.reshape(rows, heads, group * n, dim)
    scores = queries @ keys.mT * key_norms[:, :, None] + centre
    scores = scores[..., :tokens].reshape(rows, heads, group, n, tokens)
    values = codec.value.look_up(value_codes)[:, :, :tokens]

    def summed(weights: Array) -> Array:
        weights = weights * value_norms[:, :, :tokens][:, :, None, None]
        return weights.reshape(rows, heads, group * n, tokens) @ values

    return go_on(codec.key.ops, state, scores, bias, soft_cap, summed)


def attend_exact(
    ops: Operations,
    state: State | None,
    queries: Array,
    keys: Array,
    values: Array,
    bias: Array | None,
    soft_cap: float,
) -> State:
    """Goes on with exact keys and values [rows, kv_heads, tokens, dim]."""
    rows, heads, group, n, dim = queries.shape
    flat = queries.reshape(rows, heads, group * n, dim)
    scores = flat @ ops.astype(keys, ops.float32).mT
    scores = scores.reshape(rows, heads, group, n, keys.shape[2])
    values = ops.astype(values, ops.float32)

    def summed(weights: Array) -> Array:
        return weights.reshape(rows, heads, group * n, keys.shape[2]) @ values

    return go_on(ops, state, scores, bias, soft_cap, summed)


def go_on(
    ops: Operations,
    state: State | None,
    scores: Array,
    bias: Array | None,
    soft_cap: float,
    summed: Callable[[Array], Array],
) -> State:
    """The softmax `state`, gone on with over more tokens.

    scores: [rows, kv_heads, group, n, tokens], before `soft_cap` and `bias`. summed: gives the
    values by weights of that shape, [rows, kv_heads, group · n, value_head_dim].
    """
    if soft_cap > 0.0:
        scores = soft_cap * ops.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + bias
    top = ops.max(scores, -1)
    # Where a query sees none of these, −∞ − −∞ would be no number.
    weights = (scores - ops.clip(top, _LOWEST, None)[..., None]).exp()
    output = summed(weights)
    new = State(top, weights.sum(-1), output.reshape(*top.shape, output.shape[-1]))
    return new if state is None else _merge_two(ops, state, new)


def _merge(ops: Operations, a: State | None, b: State | None) -> State | None:
    if a is None or b is None:
        return b if a is None else a
    return _merge_two(ops, a, b)


def _merge_two(ops: Operations, a: State, b: State) -> State:
    top = ops.maximum(a.max, b.max)
    floor = ops.clip(top, _LOWEST, None)
    left, right = (a.max - floor).exp(), (b.max - floor).exp()
    return State(
        top,
        a.sum * left + b.sum * right,
        a.output * left[..., None] + b.output * right[..., None],
    )
