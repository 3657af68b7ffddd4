"""Batch rows with the same history: what they hold, and how tokens move from exact to sealed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from tqai.stores.device.centre_sets import choose_centre_sets
from tqai.stores.device.centres import Centres, find_moments, stacked
from tqai.stores.device.codec import Codec, Options
from tqai.stores.device.operations import Array, Operations
from tqai.stores.device.packing import TILE_TOKENS
from tqai.stores.device.pages import PAGE_TILES, Page, extend, index_of
from tqai.stores.device.phasors import Phasors
from tqai.stores.device.positions import Positions

_FEWEST_TOKENS = 16
# What is unpacked at a time, so that never a whole cache is.
_SCRATCH_FLOATS = 1 << 23


@dataclass(frozen=True)
class Context:
    """Settings and tables that the rows of a cache share."""

    ops: Operations
    options: Options
    codec: Codec
    phasors: Phasors | None

    @property
    def uses_positions(self) -> bool:
        """Whether centres may turn with the position."""
        return self.phasors is not None and self.options.centering in ("auto", "rope")

    @property
    def sections(self) -> int:
        return 1 if self.phasors is None else self.phasors.sections

    def tiles_at_once(self, vectors: int) -> int:
        """How many tiles to open together where each takes so many float32 vectors per token."""
        dim = max(self.options.head_dim, self.options.value_head_dim)
        return max(1, min(PAGE_TILES, _SCRATCH_FLOATS // (vectors * TILE_TOKENS * dim)))


@dataclass
class Exact:
    """Exact tokens in buffers with room for more."""

    ops: Operations
    keys: Array
    """[rows, kv_heads, capacity, head_dim] in the cache's dtype."""
    values: Array
    """[rows, kv_heads, capacity, value_head_dim]"""
    tokens: int

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def part(self, start: int, end: int) -> tuple[Array, Array]:
        """Keys and values of tokens start…end − 1, without copying."""
        return self.keys[:, :, start:end], self.values[:, :, start:end]

    def copy(self, start: int, end: int, capacity: int) -> Exact:
        """Tokens start…end − 1 in buffers of their own."""
        copies = []
        for part in self.part(start, end):
            rows, heads, tokens, dim = part.shape
            copy = self.ops.empty((rows, heads, capacity, dim), part.dtype)
            copy[:, :, :tokens] = part
            copies.append(copy)
        return Exact(self.ops, copies[0], copies[1], end - start)

    def select(self, index: Array) -> Exact:
        return Exact(self.ops, self.keys[index], self.values[index], self.tokens)


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch that hold tokens of the same positions, in the same parts.

    Held are, in order, sinks, sealed tokens and the tail. Their spots follow each other from
    `first` on: a token's spot is its index, less the tokens in ``gaps`` before it. Before the first
    sealing all are in the tail. Nothing changes but the tail's buffer, behind its end.
    """

    places: tuple[int, ...]
    """The rows of the batch that these are."""
    sinks: Exact
    tail: Exact
    first: int = 0
    pages: tuple[Page, ...] = ()
    centre_sets: tuple[Centres, ...] = ()
    """None before the first sealing."""
    sink_positions: Positions = Positions()
    tail_positions: Positions = Positions()
    next_position: int = 0
    """Of a token that comes without."""
    gaps: tuple[tuple[int, int], ...] = ()
    """First token and count of what the rows have left out, in order."""

    @property
    def ops(self) -> Operations:
        return self.tail.ops

    @property
    def index(self) -> Array:
        """``places`` on the device."""
        return index_of(self.places, self.ops)

    @property
    def arrays(self) -> list[Array]:
        """All arrays that are held."""
        exact = [part for each in (self.sinks, self.tail) for part in (each.keys, each.values)]
        return [*exact, *(page.tiles for page in self.pages)]

    @property
    def sealed_tokens(self) -> int:
        return sum(page.tokens for page in self.pages)

    @property
    def held(self) -> int:
        return self.sinks.tokens + self.sealed_tokens + self.tail.tokens

    @property
    def tail_start(self) -> int:
        """The spot that the tail begins with."""
        return self.first + self.sinks.tokens + self.sealed_tokens

    def spot_of(self, token: int) -> int:
        """Of a token; in a gap, that of the next one."""
        before = sum(min(count, token - first) for first, count in self.gaps if first < token)
        return token - before

    def token_at(self, spot: int) -> int:
        """What `spot_of` gives `spot` for."""
        for first, count in self.gaps:
            if spot < first:
                break
            spot += count
        return spot

    def tokens_at(self, start: int, end: int) -> Array:
        """Those at spots start…end − 1."""
        tokens = self.ops.arange(start, end)
        for first, count in self.gaps:
            tokens = self.ops.where(tokens < first, tokens, tokens + count)
        return tokens

    def left_out(self, context: Context, end: int, hidden: list[bool]) -> Rows:
        """Without those of the tokens before `end`, the last ones, that `hidden` marks.

        Raises:
            ValueError: where one is sealed already.
        """
        kept = [True] * self.tail.tokens
        added: list[int] = []
        leading = 0
        for token, is_hidden in enumerate(hidden, end - len(hidden)):
            spot = self.spot_of(token)
            if not is_hidden or spot < self.first or self.token_at(spot) != token:
                continue
            if spot < self.tail_start:
                raise ValueError(f"token {token} is sealed already; tokens must be left out before")
            kept[spot - self.tail_start] = False
            if spot == self.first + leading:  # padding at the start
                leading += 1
            else:
                added.append(token)
        if all(kept):
            return self
        index = self.ops.asarray(np.flatnonzero(kept))
        keys, values = (part[:, :, index] for part in self.tail.part(0, self.tail.tokens))
        positions, at = Positions(), 0
        for keep, run in groupby(kept):
            upto = at + len(list(run))
            if keep:
                positions = positions.joined(self.tail_positions.part(at, upto))
            at = upto
        next_position = self.next_position
        if not context.uses_positions:  # none are kept, and the next token follows
            positions = Positions(self.tail_positions.first + leading, len(index))
            next_position = positions.next
        return replace(
            self,
            tail=Exact(self.ops, keys, values, len(index)),
            tail_positions=positions,
            next_position=next_position,
            first=self.first + leading,
            gaps=_joined([*self.gaps, *((token, 1) for token in added)]),
        )

    def cropped(self, tokens: int) -> Rows:
        """With the tokens before `tokens`."""
        spot = self.spot_of(tokens)
        kept = self.truncated(max(spot - self.first, 0)).starting(min(self.first, spot))
        gaps = tuple(
            (first, min(count, tokens - first)) for first, count in self.gaps if first < tokens
        )
        return replace(kept, gaps=gaps)

    def appended(self, context: Context, keys: Array, values: Array, positions: Positions) -> Rows:
        """With more tokens at the end, [rows, kv_heads, n, dim] each."""
        tail, more = self.tail, keys.shape[2]
        needed = tail.tokens + more
        if needed > tail.capacity:
            kept = context.options.residual_window + TILE_TOKENS
            grown = min(max(2 * tail.capacity, _FEWEST_TOKENS), kept)
            if tail.tokens > kept:  # a tail that cannot be sealed
                grown = needed + needed // 8
            tail = tail.copy(0, tail.tokens, max(needed, grown))
        tail.keys[:, :, tail.tokens : needed] = keys
        tail.values[:, :, tail.tokens : needed] = values
        return replace(
            self,
            tail=replace(tail, tokens=needed),
            tail_positions=self.tail_positions.joined(positions),
            next_position=positions.next,
        )

    def sealable(self, context: Context) -> int:
        """Tokens that may be sealed now, a multiple of 64."""
        tail = self.tail.tokens
        if not self.centre_sets:
            tail -= context.options.sink_tokens - self.sinks.tokens
        beyond = tail - context.options.residual_window
        return max(beyond, 0) // TILE_TOKENS * TILE_TOKENS

    def sealed(self, context: Context) -> list[Rows]:
        """With what has left the window as codes, up to vectors that are too long for FP16 norms.

        Apart where not as many tokens can be sealed, and where their tiles get other centres.

        Raises:
            ValueError: for NaN and infinity.
        """
        count = self.sealable(context)
        if count == 0:
            return [self]
        start = self._new_sinks(context)
        states = self.tail.part(start, start + count)
        check_finite(self.ops, *states, self.tail_start + start)
        longest = context.codec.longest(context.options.centering)
        norms = zip(map(self.ops.vector_norm, states), longest, strict=True)
        key_fits, value_fits = ((norm <= most).all(1) for norm, most in norms)
        fits = self.ops.to_numpy(key_fits & value_fits)
        tiles = fits.reshape(len(fits), count // TILE_TOKENS, TILE_TOKENS).all(-1)
        counts = (tiles.cumprod(-1).sum(-1) * TILE_TOKENS).tolist()
        parts = []
        for count in dict.fromkeys(counts):  # mostly one
            at = [row for row, other in enumerate(counts) if other == count]
            part = self.select(at, tuple(self.places[row] for row in at))
            parts += part._centred(context, count) if count else [part]
        return parts

    def _new_sinks(self, context: Context) -> int:
        """Tokens that become sinks by the next sealing."""
        return 0 if self.centre_sets else context.options.sink_tokens - self.sinks.tokens

    def _centred(self, context: Context, count: int) -> list[Rows]:
        """With `count` tokens of the tail as codes, apart where their tiles get other centres."""
        new_sinks = self._new_sinks(context)
        end = new_sinks + count
        keys, values = self.tail.part(new_sinks, end)
        start = self.tail_start + new_sinks
        positions = self.tail_positions.part(new_sinks, end)
        step = self._step(context)
        moments = find_moments(self.ops, context.options, context.phasors, keys, positions, step)
        row_tiles = start // TILE_TOKENS + count // TILE_TOKENS
        chosen = []
        for row, of_row in enumerate(moments):
            held = [centres.of_row(row) for centres in self.centre_sets]
            chosen.append(choose_centre_sets(context.options, held, of_row, row_tiles))
        alike: dict[tuple[int, ...], list[int]] = {}
        for row, (sets, of_tile) in enumerate(chosen):
            alike.setdefault((len(sets), *of_tile), []).append(row)
        parts = []
        for (_, *of_tile), rows in alike.items():
            part = self.select(rows, tuple(self.places[row] for row in rows))
            sets = zip(*(chosen[row][0] for row in rows), strict=True)
            new_sets = tuple(stacked(list(rows_of_set), self.ops) for rows_of_set in sets)
            parts.append(part._sealed(context, new_sinks, of_tile, new_sets))
        return parts

    def _sealed(
        self, context: Context, new_sinks: int, of_tile: list[int], centre_sets: tuple[Centres, ...]
    ) -> Rows:
        """With these tiles of the tail, `new_sinks` tokens from its start, as codes."""
        sinks, sink_positions = self.sinks, self.sink_positions
        if new_sinks > 0:
            parts = zip(sinks.part(0, sinks.tokens), self.tail.part(0, new_sinks), strict=True)
            both = (self.ops.concat(part, 2) for part in parts)
            sinks = Exact(self.ops, *both, sinks.tokens + new_sinks)
            sink_positions = sink_positions.joined(self.tail_positions.part(0, new_sinks))
        start, step, pages = self.tail_start, self._step(context), self.pages
        at = new_sinks
        for centre_set, run in groupby(of_tile):
            run_end = at + len(list(run)) * TILE_TOKENS
            while at < run_end:
                end = min(at + step, run_end)
                key, value = self.tail.part(at, end)
                positions = self.tail_positions.part(at, end)
                centre = centre_sets[centre_set].at(context.phasors, positions)
                key, value = (self.ops.astype(part, self.ops.float32) for part in (key, value))
                tiles = context.codec.encode(key - centre, value)
                pages = extend(self.ops, pages, tiles, start + at, positions, centre_set)
                self.ops.evaluate(pages[-1].tiles)
                at = end
        # More is left than usual where not all that may be sealed can be.
        usual = context.options.residual_window + TILE_TOKENS
        tail = self.tail.copy(at, self.tail.tokens, max(self.tail.tokens - at, usual))
        return replace(
            self,
            sinks=sinks,
            tail=tail,
            pages=pages,
            centre_sets=centre_sets,
            sink_positions=sink_positions,
            tail_positions=self.tail_positions.part(at, self.tail.tokens),
        )

    def _step(self, context: Context) -> int:
        """Tokens that are encoded at once."""
        return context.tiles_at_once(4 * len(self.places) * context.options.kv_heads) * TILE_TOKENS

    def decoded(self, context: Context, page: Page) -> tuple[Array, Array]:
        """The keys and values of a page, [rows, kv_heads, 64 · tiles, dim] float32."""
        codec = context.codec
        keys, values, key_norms, value_norms = codec.split(page.read(0, page.count))
        centre = self.centre_sets[page.set].at(context.phasors, page.positions)
        turned = codec.key.look_up(keys) * key_norms[..., None] @ codec.key.rotation
        return (
            turned + centre,
            codec.value.look_up(values) * value_norms[..., None] @ codec.value.rotation,
        )

    def starting(self, first: int) -> Rows:
        """The same, the first held token being `first`."""
        return replace(self, first=first)

    def truncated(self, held: int) -> Rows:
        """With the first `held` of the held tokens."""
        if held >= self.held:
            return self
        before_tail = self.sinks.tokens + self.sealed_tokens
        if held >= before_tail:
            kept = held - before_tail
            return replace(
                self,
                tail=replace(self.tail, tokens=kept),
                tail_positions=self.tail_positions.part(0, kept),
            )._standing()
        if held <= self.sinks.tokens:
            # Nothing is sealed any more: the rows start anew, with their sinks as first tokens.
            tail = self.sinks.copy(0, held, held)
            sinks = self.sinks.copy(0, 0, 0)
            return replace(
                self,
                sinks=sinks,
                tail=tail,
                pages=(),
                centre_sets=(),
                sink_positions=Positions(),
                tail_positions=self.sink_positions.part(0, held),
            )._standing()
        pages, left = [], held - self.sinks.tokens
        for page in self.pages:
            if left > 0:
                pages.append(page if page.tokens <= left else page.crop(left))
            left -= page.tokens
        rest = replace(
            self, tail=self.tail.copy(0, 0, 0), pages=tuple(pages), tail_positions=Positions()
        )
        return rest._compact()._standing()

    def _standing(self) -> Rows:
        """With the position that follows the last token, where there is one."""
        if self.tail.tokens > 0:
            return replace(self, next_position=self.tail_positions.next)
        if self.pages:
            last = self.pages[-1]
            return replace(self, next_position=last.positions.part(0, last.tokens).next)
        if self.sinks.tokens > 0:
            return replace(self, next_position=self.sink_positions.next)
        return self

    def _compact(self) -> Rows:
        """Without centre sets that no page refers to; one is kept for what will be sealed."""
        used = sorted({page.set for page in self.pages}) or [len(self.centre_sets) - 1]
        if not self.centre_sets or len(used) == len(self.centre_sets):
            return self
        return replace(
            self,
            pages=tuple(replace(page, set=used.index(page.set)) for page in self.pages),
            centre_sets=tuple(self.centre_sets[index] for index in used),
        )

    def without_front(self, context: Context, count: int) -> Rows:
        """Without up to `count` tokens at the front: sinks one by one, others 64 at a time."""
        count = min(count, self.held)
        from_sinks = min(count, self.sinks.tokens)
        sinks, sink_positions = self.sinks, self.sink_positions
        if from_sinks > 0:
            sink_positions = sink_positions.part(from_sinks, sinks.tokens)
            sinks = sinks.copy(from_sinks, sinks.tokens, sinks.tokens - from_sinks)
        first, rest = self.first + from_sinks, count - from_sinks
        from_tail = max(rest - self.sealed_tokens, 0) // TILE_TOKENS * TILE_TOKENS
        pages = []
        for page in self.pages:
            gone = page.count if rest >= page.tokens else max(rest, 0) // TILE_TOKENS
            if gone < page.count:
                pages.append(page.drop(gone) if gone else page)
            dropped = min(gone * TILE_TOKENS, page.tokens)
            first += dropped
            rest = rest - page.tokens if gone == page.count else 0
        tail, tail_positions = self.tail, self.tail_positions
        if from_tail > 0:
            tail_positions = tail_positions.part(from_tail, tail.tokens)
            usual = context.options.residual_window + TILE_TOKENS
            kept = tail.tokens - from_tail
            tail = tail.copy(from_tail, tail.tokens, max(kept, min(tail.capacity, usual)))
            first += from_tail
        if first == self.first:
            return self
        rest = replace(
            self,
            sinks=sinks,
            tail=tail,
            first=first,
            pages=tuple(pages),
            sink_positions=sink_positions,
            tail_positions=tail_positions,
        )
        return rest if len(pages) == len(self.pages) else rest._compact()

    def without_padding(self, count: int) -> Rows:
        """Without exactly `count` tokens at the front; nothing is sealed."""
        if count == 0:
            return self
        tail = self.tail.copy(count, self.tail.tokens, self.tail.capacity)
        positions = self.tail_positions.part(count, self.tail.tokens)
        return replace(self, tail=tail, first=self.first + count, tail_positions=positions)

    def select(self, rows: list[int], places: tuple[int, ...]) -> Rows:
        """Row i becomes row rows[i] of these, in the batch's row places[i]."""
        if rows == list(range(len(self.places))):
            return replace(self, places=places)
        index = index_of(tuple(rows), self.ops)
        return replace(
            self,
            places=places,
            sinks=self.sinks.select(index),
            tail=self.tail.select(index),
            pages=tuple(page.select(rows) for page in self.pages),
            centre_sets=tuple(centres.select(rows) for centres in self.centre_sets),
        )

    def copy(self) -> Rows:
        """A copy with a tail of its own, whose end may change."""
        tail = self.tail
        return replace(self, tail=tail.copy(0, tail.tokens, tail.capacity))


def _joined(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """First token and count, each, in order; those that touch are one."""
    joined: list[tuple[int, int]] = []
    for first, count in sorted(spans):
        if joined and sum(joined[-1]) == first:
            joined[-1] = joined[-1][0], joined[-1][1] + count
        else:
            joined.append((first, count))
    return tuple(joined)


def check_finite(ops: Operations, keys: Array, values: Array, first: int) -> None:
    """Raises ValueError for NaN and infinity, naming the vector.

    keys, values: [rows, kv_heads, n, dim] of the tokens from `first` on. Waits for the device.
    """
    for name, vectors in (("keys", keys), ("values", values)):
        fine = ops.isfinite(vectors).all(-1)
        if not bool(fine.all()):
            row, head, token = np.argwhere(~ops.to_numpy(fine))[0].tolist()
            remedy = (
                ", and float16 ends at 65504: compute the model in bfloat16 or float32"
                if vectors.dtype == ops.float16
                else ""
            )
            raise ValueError(
                f"{name}[{row}, {head}] of token {first + token} holds NaN or infinity; only "
                f"finite numbers can be cached{remedy}"
            )
