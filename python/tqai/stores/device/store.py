"""The compressed cache of one attention layer in a framework's arrays, on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from tqai import _core
from tqai.stores.device import serialize
from tqai.stores.device.attend import Query, attend
from tqai.stores.device.codec import ITEM_BYTES, Options, codec_of
from tqai.stores.device.operations import Array, Operations
from tqai.stores.device.pages import index_of
from tqai.stores.device.phasors import phasors_of
from tqai.stores.device.positions import MAX_POSITION, Positions, check_positions
from tqai.stores.device.rows import Context, Exact, Rows, check_finite

_Store = TypeVar("_Store", bound="DeviceStore")


@dataclass(frozen=True)
class Held:
    """All that a store holds. A change puts another in its place, in one step."""

    rows: Sequence[Rows]
    tokens: int
    batch: int

    def find(self, row: int) -> tuple[Rows, int]:
        """The rows that `row` is held in, and which of them it is."""
        for rows in self.rows:
            if row in rows.places:
                return rows, rows.places.index(row)
        raise IndexError(f"row {row} of a batch of {self.batch}")


class DeviceStore:
    """What ``_core.KvCache`` is on the CPU: the same tiles, windows and operations.

    Codes are equal to the C++ library's but where a rotated coordinate lies within rounding of the
    boundary between two. Attention looks codes up and multiplies in float32, a page of tiles at a
    time; how many makes no difference but rounding.

    NaN and infinity are refused by ``append``; in a single token, where looking at it would make
    the device wait (``Operations.waits``), when it is to be sealed. Vectors too long for FP16 norms
    stay exact, as do the tokens after them.

    One thread at a time may change it, while others read. A method that raises, or is interrupted,
    leaves the store as it was. Copies share sealed tiles.
    """

    def __init__(self, options: Options, batch: int, ops: Operations) -> None:
        """Empty, on the device of `ops`.

        Raises:
            ValueError: for options out of range.
        """
        self.ops = ops
        with ops.plain():
            self._context = _context_of(options, ops)
            exact = self._empty(batch)
            self._held = Held([Rows(tuple(range(batch)), exact, exact)], 0, batch)

    @property
    def batch(self) -> int:
        return self._held.batch

    @property
    def tokens(self) -> int:
        """Tokens appended and not cropped, the same for each row."""
        return self._held.tokens

    @property
    def options(self) -> Options:
        return self._context.options

    @property
    def kv_heads(self) -> int:
        return self.options.kv_heads

    @property
    def head_dim(self) -> int:
        return self.options.head_dim

    @property
    def value_head_dim(self) -> int:
        return self.options.value_head_dim

    @property
    def key_basis(self) -> _core.KeyBasis | None:
        """What keys are quantised in; None: a rotation."""
        return self.options.key_basis

    @property
    def value_codes(self) -> str:
        """What codes of values stand for: "scalar" or "trellis"."""
        return self.options.value_codes

    @property
    def key_codes(self) -> str:
        """What codes of keys stand for: "scalar" or "trellis"."""
        return self.options.key_codes

    @property
    def first_token(self) -> int:
        """First token that some row still holds."""
        return min(rows.token_at(rows.first) for rows in self._held.rows)

    @property
    def rows(self) -> Sequence[Rows]:
        """What is held, rows with the same history together."""
        return tuple(self._held.rows)

    def packed_tokens(self, row: int) -> int:
        """Tokens of a row held as codes."""
        return self._held.find(row)[0].sealed_tokens

    def centering(self, row: int, head: int) -> str | None:
        """What the keys sealed last are centred on; None before anything was sealed."""
        rows, at = self._held.find(row)
        if not rows.centre_sets:
            return None
        last = rows.pages[-1].set if rows.pages else 0
        return rows.centre_sets[last].kinds[at][head]

    def centre_sets(self, row: int) -> int:
        """Sets of centres that the tiles of a row refer to."""
        return len(self._held.find(row)[0].centre_sets)

    def append(self, keys: Array, values: Array, positions: np.ndarray | None = None) -> None:
        """Adds tokens: keys [batch, kv_heads, n, head_dim], values [.., value_head_dim].

        Tokens that had left the window before are sealed first.

        positions: [batch or 1, sections or 1, n] int64, what the keys were turned by; None: each
        token is one further than the one before in its row.

        Raises:
            ValueError: for a wrong shape, for NaN and infinity (see the class), and for positions
                out of range.
        """
        self._check_shapes(keys, values)
        tokens = keys.shape[2]
        if positions is not None:
            sections = self._context.sections
            if self._context.phasors is None:  # of no use then
                sections = positions.shape[1] if positions.ndim == 3 else 1
            check_positions(positions, self.batch, tokens, sections)
        if tokens == 0:
            return
        with self.ops.plain():
            if tokens > 1 or not self.ops.waits:
                check_finite(self.ops, keys, values, self.tokens)
            sealed = self._sealed()
            appended = [
                rows.appended(
                    self._context, *(_choose(states, rows) for states in (keys, values)), stand
                )
                for each in sealed
                for rows, stand in self._stands(each, positions, tokens)
            ]
        self._held = Held(appended, self.tokens + tokens, self.batch)

    def _stands(
        self, rows: Rows, positions: np.ndarray | None, tokens: int
    ) -> list[tuple[Rows, Positions]]:
        """Those of `rows` whose new tokens stand alike, and where."""
        if positions is None or not self._context.uses_positions:
            if rows.next_position + tokens - 1 > MAX_POSITION:
                raise ValueError(
                    f"a token's position = {rows.next_position + tokens - 1}; allowed: up to "
                    f"{MAX_POSITION}"
                )
            return [(rows, Positions(rows.next_position, tokens))]
        groups: list[tuple[Positions, list[int]]] = []
        for at, place in enumerate(rows.places):
            own = positions[0 if len(positions) == 1 else place].T
            stand = Positions.of(np.broadcast_to(own, (tokens, self._context.sections)))
            for other, group in groups:
                if stand.same(other):
                    group.append(at)
                    break
            else:
                groups.append((stand, [at]))
        if len(groups) == 1:
            return [(rows, groups[0][0])]
        return [
            (rows.select(group, tuple(rows.places[at] for at in group)), stand)
            for stand, group in groups
        ]

    def seal(self) -> int:
        """Compresses what has left the residual window.

        Returns how many tokens of a row cannot be, because of a vector too long for its norm.

        Raises:
            ValueError: for NaN and infinity; see the class.
        """
        held = self._held
        with self.ops.plain():
            sealed = self._sealed()
        self._held = replace(held, rows=sealed)
        return max(rows.sealable(self._context) for rows in sealed)

    def _sealed(self) -> list[Rows]:
        """What is held, with what has left the window as codes."""
        sealed = [part for rows in self._held.rows for part in rows.sealed(self._context)]
        if len(sealed) != len(self._held.rows) or any(map(_differ, sealed, self._held.rows)):
            self._evaluate(sealed)
        return sealed

    def _evaluate(self, held: Sequence[Rows]) -> None:
        self.ops.evaluate(*(array for rows in held for array in rows.arrays))

    def attend(
        self,
        queries: Array,
        *,
        scale: float | None = None,
        soft_cap: float = 0.0,
        causal: bool = True,
        window: int = 0,
        first_token: int = 0,
        mask: Array | None = None,
        sinks: Array | None = None,
    ) -> Array:
        """Softmax attention of the last n tokens' queries.

        Args:
            queries: [batch, query_heads, n, head_dim]; query head h reads key/value head
                h // (query_heads // kv_heads).
            scale: of the scores, finite; None: 1 / √head_dim.
            soft_cap: c of c · tanh(score / c); 0: none.
            causal: whether a query sees no later token than its own.
            window: how many tokens a query sees at most, its own the last, whatever `causal`
                says; 0: all.
            first_token: tokens before it are not seen.
            mask: [batch or 1, query_heads or 1, n, tokens − first_token], bool, or added.
            sinks: [query_heads], scores that count in the softmax's sum and bring no value.

        Returns:
            [batch, n, query_heads, value_head_dim] in the queries' dtype; zeros for a query that
            sees no token.
        """
        ops, held = self.ops, self._held
        batch, heads, n, dim = queries.shape
        shape = self.kv_heads, heads // self.kv_heads
        with ops.plain():
            factor = dim**-0.5 if scale is None else scale
            states = ops.astype(queries, ops.float32) * factor
            states = states.reshape(batch, *shape, n, dim)
            if mask is not None:
                of_head = (1, 1) if mask.shape[1] == 1 else shape
                mask = mask.reshape(mask.shape[0], *of_head, *mask.shape[2:])
            if sinks is not None:
                sinks = ops.astype(sinks, ops.float32).reshape(*shape)
            outputs = []
            for rows in held.rows:
                query = Query(
                    ops,
                    _choose(states, rows),
                    factor,
                    held.tokens,
                    soft_cap,
                    causal,
                    window,
                    first_token,
                    mask if mask is None or len(mask) == 1 else _choose(mask, rows),
                )
                part = attend(self._context, rows, query, sinks)
                part = part.reshape(len(rows.places), heads, n, self.value_head_dim)
                outputs.append(ops.astype(part.swapaxes(1, 2), queries.dtype))
            return self._in_order(outputs)

    def _in_order(self, parts: list[Array]) -> Array:
        """[batch, …] of what each of the held rows has."""
        if len(parts) == 1:
            return self.ops.contiguous(parts[0])
        places = [place for rows in self._held.rows for place in rows.places]
        order = tuple(map(int, np.argsort(places)))
        return self.ops.concat(parts, 0)[index_of(order, self.ops)]

    def gather(self, first: int, length: int, dtypes: tuple[Any, Any]) -> tuple[Array, Array]:
        """Decompressed keys and values of tokens first…first + length − 1, in these dtypes.

        [batch, kv_heads, length, head_dim] and [.., value_head_dim]; zeros for padding and what was
        discarded.
        """
        with self.ops.plain():
            found = [self._gathered(rows, first, length, dtypes) for rows in self._held.rows]
            return self._in_order([keys for keys, _ in found]), self._in_order(
                [values for _, values in found]
            )

    def _gathered(
        self, rows: Rows, first: int, length: int, dtypes: tuple[Any, Any]
    ) -> tuple[Array, Array]:
        shape = len(rows.places), self.kv_heads, length
        dims = self.head_dim, self.value_head_dim
        both = [
            self.ops.zeros((*shape, dim), dtype) for dim, dtype in zip(dims, dtypes, strict=True)
        ]
        spots = rows.spot_of(first), rows.spot_of(first + length)
        for start, *parts in _parts(self._context, rows, *spots):
            end = start + parts[0].shape[2]
            token, count = rows.token_at(start), end - start
            at: Any = slice(token - first, token - first + count)
            if rows.token_at(end - 1) + 1 - token != count:
                at = rows.tokens_at(start, end) - first
            for whole, part, dtype in zip(both, parts, dtypes, strict=True):
                whole[:, :, at] = self.ops.astype(part, dtype)
        return both[0], both[1]

    def crop(self, tokens: int) -> None:
        """Forgets all tokens from `tokens` on.

        Raises:
            ValueError: for more tokens than there are, or fewer than were discarded, but for 0.
        """
        first = self.first_token
        if not 0 <= tokens <= self.tokens or 0 < tokens < first:
            raise ValueError(
                f"crop to {tokens} tokens; allowed: 0 or {first}…{self.tokens}, what the cache has"
            )

        def cropped(rows: Rows) -> Rows:
            if tokens == 0:
                exact = self._empty(len(rows.places))
                return Rows(rows.places, exact, exact)
            kept = rows.cropped(tokens)
            return kept if kept.held > 0 else replace(kept, next_position=tokens)

        self._change(cropped, tokens)

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes a copy of row rows[i]; tiles are shared.

        Raises:
            ValueError: for no rows.
            IndexError: for a row that does not exist.
        """
        if not rows:
            raise ValueError("no rows were chosen; a batch needs 1 or more")
        for row in rows:
            if not 0 <= row < self.batch:
                raise IndexError(f"row {row} of a batch of {self.batch}")
        with self.ops.plain():
            chosen = []
            for held in self._held.rows:
                at = {place: i for i, place in enumerate(held.places)}
                places = tuple(i for i, row in enumerate(rows) if row in at)
                if places:
                    chosen.append(held.select([at[rows[i]] for i in places], places))
            self._evaluate(chosen)
        self._held = Held(chosen, self.tokens, len(rows))

    def set_padding(self, counts: Sequence[int]) -> None:
        """The first counts[row] tokens of each row are padding: they are dropped and never seen.

        Raises:
            ValueError: for a count that is lower than before or more than there are tokens, or rows
                that have sealed tokens already.
        """
        if len(counts) != self.batch:
            raise ValueError(f"{len(counts)} padding counts for a batch of {self.batch}")
        with self.ops.plain():
            changed = []
            for rows in self._held.rows:
                for count in dict.fromkeys(counts[place] for place in rows.places):
                    if not rows.first <= count <= self.tokens:
                        raise ValueError(
                            f"{count} tokens of padding; allowed: {rows.first}…{self.tokens}"
                        )
                    if count > rows.first and rows.centre_sets:
                        raise ValueError(
                            "rows have sealed tokens already; padding must be said before"
                        )
                    at = [i for i, place in enumerate(rows.places) if counts[place] == count]
                    part = rows.select(at, tuple(rows.places[i] for i in at))
                    changed.append(part.without_padding(count - rows.first))
            self._evaluate(changed)
        self._held = replace(self._held, rows=changed)

    def leave_out(self, hidden: Sequence[bool]) -> None:
        """Takes those of the last n tokens out of the rows that no query will ever see.

        hidden: [batch · n].

        Raises:
            ValueError: for another number, and where one is sealed already.
        """
        count = len(hidden) // self.batch
        if count * self.batch != len(hidden) or count > self.tokens:
            raise ValueError(
                f"{len(hidden)} marks of hidden tokens for a batch of {self.batch} with "
                f"{self.tokens} tokens; needed: [batch, n] of the last n tokens"
            )
        with self.ops.plain():
            changed = []
            for rows in self._held.rows:
                alike: dict[tuple[bool, ...], list[int]] = {}
                for at, place in enumerate(rows.places):
                    marks = tuple(map(bool, hidden[place * count : (place + 1) * count]))
                    alike.setdefault(marks, []).append(at)
                for marks, group in alike.items():
                    part = rows.select(group, tuple(rows.places[at] for at in group))
                    changed.append(part.left_out(self._context, self.tokens, list(marks)))
            self._evaluate(changed)
        self._held = replace(self._held, rows=changed)

    def left_out(self, row: int) -> list[tuple[int, int]]:
        """What ``leave_out`` has taken out of a row: first token and count, each."""
        return list(self._held.find(row)[0].gaps)

    def discard_before(self, token: int) -> None:
        """Frees what only tokens before `token` need."""
        if not 0 <= token <= self.tokens:
            raise ValueError(f"discard before token {token}; allowed: 0…{self.tokens}")
        self._change(
            lambda rows: (
                rows.without_front(self._context, rows.spot_of(token) - rows.first)
                if rows.spot_of(token) > rows.first
                else rows
            )
        )

    def memory(self) -> dict[str, int]:
        """Bytes held, by part; see ``TqaiCache.memory_report``."""
        packed = exact = overhead = tokens = packed_tokens = 0
        for rows in self._held.rows:
            packed += sum(page.tiles.nbytes for page in rows.pages)
            exact += rows.sinks.nbytes + rows.tail.nbytes
            overhead += sum(centres.nbytes for centres in rows.centre_sets)
            stands = [rows.sink_positions, rows.tail_positions]
            stands += [page.positions for page in rows.pages]
            overhead += sum(0 if part.each is None else part.each.nbytes for part in stands)
            tokens += rows.held * len(rows.places)
            packed_tokens += rows.sealed_tokens * len(rows.places)
        token_bytes = self.kv_heads * (self.head_dim + self.value_head_dim)
        return {
            "tokens": tokens,
            "packed_tokens": packed_tokens,
            "packed_bytes": packed,
            "exact_bytes": exact,
            "overhead_bytes": overhead,
            "mapped_bytes": 0,
            "basis_bytes": 0 if self.key_basis is None else self.key_basis.nbytes,
            "total_bytes": packed + exact + overhead,
            "uncompressed_bytes": tokens * token_bytes * ITEM_BYTES[self.options.dtype],
        }

    def copy(self: _Store) -> _Store:
        """A copy that shares the tiles."""
        other, held = self.snapshot(), self._held
        with self.ops.plain():
            other._held = replace(held, rows=[rows.copy() for rows in held.rows])
        return other

    __copy__ = copy

    def snapshot(self: _Store) -> _Store:
        """A copy that shares everything: of the two only one may be changed from now on."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __deepcopy__(self: _Store, memo: dict[int, Any]) -> _Store:
        return self.copy()

    def serialize(self, with_basis: bool = False) -> bytes:
        """The store as bytes, the same as ``_core.KvCache.serialize`` gives; each reads both."""
        held = self._held
        with self.ops.plain():
            return serialize.write(
                self.ops, self.options, held.tokens, held.batch, held.rows, with_basis
            )

    def _read(self, data: bytes, ops: Operations, key_bases: Sequence[_core.KeyBasis] = ()) -> None:
        """Becomes the store that was serialized, on the device of `ops`.

        Raises:
            ValueError: see ``serialize.read``.
        """
        self.ops = ops
        with ops.plain():
            options, tokens, rows = serialize.read(data, ops, key_bases)
            self._context = _context_of(options, ops)
        self._held = Held(rows, tokens, sum(len(each.places) for each in rows))

    def _empty(self, batch: int) -> Exact:
        options = self._context.options
        keys, values = (
            self.ops.empty((batch, options.kv_heads, 0, dim), self.ops.dtype(options.dtype))
            for dim in (options.head_dim, options.value_head_dim)
        )
        return Exact(self.ops, keys, values, 0)

    def _check_shapes(self, keys: Array, values: Array) -> None:
        tokens = keys.shape[2]
        for name, states, dim in (
            ("keys", keys, self.head_dim),
            ("values", values, self.value_head_dim),
        ):
            needed = self.batch, self.kv_heads, tokens, dim
            if tuple(states.shape) != needed:
                raise ValueError(
                    f"{name} has shape {tuple(states.shape)}; needed: {needed} = [batch, kv_heads, "
                    "tokens, head_dim]"
                )

    def _change(self, change: Callable[[Rows], Rows], tokens: int | None = None) -> None:
        held = self._held
        with self.ops.plain():
            rows = [change(rows) for rows in held.rows]
            if any(map(_differ, rows, held.rows)):
                self._evaluate(rows)
        self._held = replace(held, rows=rows, tokens=held.tokens if tokens is None else tokens)


def _context_of(options: Options, ops: Operations) -> Context:
    phasors = None if options.rope is None else phasors_of(options.rope, ops)
    return Context(ops, options, codec_of(options, ops), phasors)


def _differ(one: Rows, other: Rows) -> bool:
    return one is not other


def _choose(states: Array, rows: Rows) -> Array:
    """What of [batch, ...] belongs to `rows`."""
    if rows.places == tuple(range(len(states))):
        return states
    return states[rows.index]


def _parts(
    context: Context, rows: Rows, first: int, end: int
) -> Iterator[tuple[int, Array, Array]]:
    """What `rows` hold at spots first…end − 1: the first spot, keys and values, part by part."""
    for exact, start in ((rows.sinks, rows.first), (rows.tail, rows.tail_start)):
        a, b = max(first, start), min(end, start + exact.tokens)
        if a < b:
            yield a, *exact.part(a - start, b - start)
    for page in rows.pages:
        a, b = max(first, page.first), min(end, page.end)
        if a < b:
            keys, values = rows.decoded(context, page)
            yield (
                a,
                keys[:, :, a - page.first : b - page.first],
                values[:, :, a - page.first : b - page.first],
            )
