"""The compressed cache of one layer for rows of different lengths, as mlx-lm batches them.

mlx-lm sees columns: a row's tokens stand to the right, behind as many columns of padding as it is
shorter than the longest. Here each row is a cache of its own that knows nothing of padding, so that
a row reads the same bytes in any company, and leaves with them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import base

from tqai import reports
from tqai.mlx.arrays import (
    DTYPES,
    Ref,
    blank,
    from_memory,
    is_mask_dtype,
    mask_ref,
    part,
    promoted,
    rows_contiguous,
)
from tqai.mlx.attention.masks import Meaning, remember
from tqai.mlx.attention.view import Update
from tqai.mlx.cache import state, store
from tqai.mlx.cache.base import Compressed
from tqai.mlx.cache.layer import TqaiKVCache
from tqai.mlx.model.geometry import LayerShape
from tqai.settings import Settings

Taken = list[tuple[int, int]]
"""Of each row, which of some new columns it takes: the first and how many."""


class TqaiBatchKVCache(Compressed):
    """Keys and values of one layer for several rows, in the place of mlx-lm's BatchKVCache and
    BatchRotatingKVCache.

    Columns are counted as in BatchKVCache, those that have left a sliding window included.
    """

    def __init__(
        self, shape: LayerShape, settings: Settings, left_padding: Sequence[int] = (0,)
    ) -> None:
        """An empty cache. left_padding: how many of the first columns are padding, of each row."""
        super().__init__(shape, settings)
        self.rows = [TqaiKVCache(shape, settings) for _ in left_padding]
        self.padding = list(left_padding)
        """Columns of padding before each row's first token."""
        self._idx = 0
        """Columns."""
        self._lengths: list[int] | None = None
        """Tokens that each row is still to get before its prompt's padding on the right begins."""
        self._late: list[int] = [0] * len(self.rows)
        """Columns of padding on the right that each row has got."""
        self._pending: tuple[mx.array, mx.array, Taken] | None = None
        """New columns, and which of them each row takes."""
        self._offset: mx.array | None = None

    # What mlx-lm asks of a cache.

    @property
    def offset(self) -> mx.array:
        """[rows] int32, the position of each row's next token; negative before its first column."""
        if self._offset is None:
            self._offset = mx.array([self._idx - padding for padding in self.padding])
        return self._offset

    @property
    def left_padding(self) -> mx.array:
        """[rows] int32, columns of padding before each row's first token."""
        return mx.array(self.padding)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Adds a column for each new token, and returns what the queries may see of all columns.

        keys [rows, kv_heads, n, head_dim], values [rows, kv_heads, n, value_head_dim]. What stands
        in columns of padding is not kept.

        Raises:
            ValueError: for a shape or dtype that does not fit the cache. NaN and infinity are found
                when attention reads the tokens.
        """
        self._check(keys, values)
        self.settle()
        before, count = self._idx, keys.shape[2]
        self._note_pass(count)
        taken = []
        for row, padding in enumerate(self.padding):
            start = min(max(padding - before, 0), count)
            stop = count
            if self._lengths is not None:
                stop = min(count, start + self._lengths[row])
                self._lengths[row] -= stop - start
            self._late[row] += count - stop
            taken.append((start, stop - start))
        self._pending = keys, values, taken
        self.dtypes = keys.dtype, values.dtype
        self._idx += count
        self._changed()
        first = self._first_seen(before, count)
        fresh = (keys, values) if before == 0 else None
        given = keys, values
        self._update = update = Update(self, first, self._idx - first, count, fresh, given)
        return self._handed(update)

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """[rows, 1, N, columns] bool, which columns `N` new tokens' queries see."""
        window = window_size or self.max_size
        before = self._idx
        if self.max_size is not None:
            before = min(self.max_size - 1, before)
        hidden = self._idx - before
        mask = base.create_causal_mask(
            N, before, window_size=window, left_padding=self.left_padding - hidden
        )
        return remember(mask, Meaning(causal=True, window=window or 0))

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Says what of the columns to come is padding: the first `left_padding` of each row, or the
        last `right_padding`, behind `lengths` tokens, until ``finalize`` is called.

        Raises:
            ValueError: for padding on the left of what holds columns, and for some on the right
                without lengths.
        """
        if left_padding is not None:
            if not self.empty():
                raise ValueError(
                    f"layer {self.index}: padding on the left can only be added to an empty cache"
                )
            self.padding = [sum(both) for both in zip(self.padding, left_padding, strict=True)]
            self._changed()
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise ValueError(
                    f"layer {self.index}: padding on the right needs lengths, the tokens before it"
                )
            self._lengths = list(lengths)
            self._late = [0] * len(self.rows)

    def finalize(self) -> None:
        """Moves the padding on the right that came since ``prepare`` to the left."""
        if self._lengths is None:
            return
        self.settle()
        self.padding = [sum(both) for both in zip(self.padding, self._late, strict=True)]
        self._lengths = None
        self._late = [0] * len(self.rows)
        self._changed()

    def filter(self, batch_indices: Any) -> None:
        """Keeps these rows only, in this order."""
        self.settle()
        indices = batch_indices.tolist() if hasattr(batch_indices, "tolist") else batch_indices
        self.rows = [
            copy.deepcopy(self.rows[row]) if row in indices[:at] else self.rows[row]
            for at, row in enumerate(indices)
        ]
        self.padding = [self.padding[row] for row in indices]
        self._late = [self._late[row] for row in indices]
        if self._lengths is not None:
            self._lengths = [self._lengths[row] for row in indices]
        # As BatchKVCache does, so that both have columns for the same mask.
        spare = min(self.padding, default=0) if self.max_size is None else 0
        if spare > 0:
            self.padding = [padding - spare for padding in self.padding]
            self._idx -= spare
        self._changed()

    def extend(self, other: TqaiBatchKVCache) -> None:
        """Adds the rows of another cache of the same layer."""
        self.settle()
        other.settle()
        columns = max(self._idx, other._idx)
        self.padding = [
            padding + columns - each._idx for each in (self, other) for padding in each.padding
        ]
        self.rows += copy.deepcopy(other.rows)
        self._late += other._late
        self.dtypes = self.dtypes or other.dtypes
        self._idx = columns
        self._changed()

    def extract(self, idx: int) -> TqaiKVCache:
        """A cache of one row's own, that shares its tiles."""
        self.settle()
        row = copy.deepcopy(self.rows[idx])
        row.weights = self.weights
        return row

    @classmethod
    def merge(cls, caches: Sequence[TqaiKVCache]) -> TqaiBatchKVCache:
        """A cache with the row of each of these, all of the same layer; tiles are shared.

        Raises:
            ValueError: for caches of several rows, or of different layers or settings.
            NotImplementedError: for a sliding window beside layers with one that stay exact.
        """
        first = caches[0]
        for cache in caches:
            cache.settle()
            if (cache.shape, cache.settings) != (first.shape, first.settings):
                raise ValueError(
                    f"layer {first.index}: caches of different models or settings cannot be "
                    "batched; make all of them with make_prompt_cache(model)"
                )
            if cache.core is not None and cache.core.batch != 1:
                raise ValueError(
                    f"layer {first.index}: a cache of {cache.core.batch} rows cannot be batched"
                )
        if first.shape.has_exact_siblings:
            raise NotImplementedError(
                f"layer {first.index}: some layers with a sliding window are left exact by "
                "skip_layers, and in batches mlx-lm's masks for these do not go with the others: "
                "skip all of them or none"
            )
        columns = max(cache.offset for cache in caches)
        merged = cls(first.shape, first.settings, [columns - cache.offset for cache in caches])
        merged.rows = [copy.deepcopy(cache) for cache in caches]
        merged.weights = next((each.weights for each in caches if each.weights is not None), None)
        merged.dtypes = next((cache.dtypes for cache in caches if cache.dtypes is not None), None)
        merged._idx = columns
        return merged

    def trim(self, n: int) -> int:
        """Forgets the last `n` columns, or all that there are; returns how many."""
        n = min(self._idx, n)
        if n > 0:
            self.settle()
            self._idx -= n
            for row, padding in zip(self.rows, self.padding, strict=True):
                row.trim(row.offset - max(self._idx - padding, 0))
            self._changed()
        return n

    @property
    def state(self) -> state.State:
        """What ``from_state`` makes the cache of again; see ``tqai.mlx.cache.state``."""
        self.settle()
        return state.State(self._state_items)

    @state.setter
    def state(self, items: Any) -> None:
        text, *rows = state.items_of(items)
        shape, settings, more = state.read_header(text)
        TqaiBatchKVCache.__init__(self, shape, settings, more["padding"])
        self.weights = state.weights_of(more)
        self.rows = [TqaiKVCache.from_state(row) for row in rows]
        self.dtypes = next((row.dtypes for row in self.rows if row.dtypes is not None), None)
        self._idx = more["columns"]

    def _state_items(self) -> list[Any]:
        self.settle()
        text = state.header(
            self.shape, self.settings, self.weights, padding=self.padding, columns=self._idx
        )
        return [text, *(row._state_items() for row in self.rows)]

    @property
    def nbytes(self) -> int:
        """Bytes held; tiles that caches share count in each of them."""
        return self.memory()["total_bytes"]

    def memory(self) -> dict[str, int]:
        """The cache's numbers, as in a memory report."""
        self.settle()
        rows = [row.memory() for row in self.rows]
        return {name: sum(row[name] for row in rows) for name in reports.COUNTS}

    def __deepcopy__(self, memo: dict[int, Any]) -> TqaiBatchKVCache:
        """A copy that shares the tiles."""
        self.settle()
        other = copy.copy(self)
        other.rows = copy.deepcopy(self.rows, memo)
        other.padding, other._late = list(self.padding), list(self._late)
        other._lengths = None if self._lengths is None else list(self._lengths)
        other._update = other._before = other.passing = None
        other._seals_later = False
        return other

    def lengths(self) -> tuple[int, ...]:
        return tuple(row.offset for row in self.rows)

    def _kept(self, with_store: bool) -> Any:
        lengths = None if self._lengths is None else list(self._lengths)
        rows = [(row, row._kept(with_store)) for row in self.rows]
        return self._idx, self.dtypes, lengths, list(self._late), rows

    def _restore(self, before: Any) -> None:
        self._pending = self._update = None
        self._idx, self.dtypes, lengths, late, rows = before
        self._lengths = None if lengths is None else list(lengths)
        self._late = list(late)
        for row, kept in rows:
            row._restore(kept)
        self._changed()

    def __repr__(self) -> str:
        lengths = [row.offset for row in self.rows]
        return f"TqaiBatchKVCache(layer {self.index}: {lengths} tokens in {self.nbytes} bytes)"

    # What views and attention ask of it.

    def is_native(self) -> bool:
        return all(row.is_native() for row in self.rows)

    def is_packed(self) -> bool:
        return any(row.is_packed() for row in self.rows)

    def gather(self, first: int, length: int) -> tuple[mx.array, mx.array]:
        """As ``Compressed.gather``; what stands in columns of padding is zeros."""
        self.flush()
        assert self.dtypes is not None
        dims = self.shape.head_dim, self.shape.value_head_dim
        parts: tuple[list[mx.array], list[mx.array]] = ([], [])
        for row, padding in zip(self.rows, self.padding, strict=True):
            start = max(first - padding, 0)
            count = max(min(first + length - padding, row.offset) - start, 0)
            left = min(max(padding - first, 0), length)
            for which, dtype in enumerate(self.dtypes):
                if count > 0:
                    array = row.gather(start, count)[which]
                else:
                    array = mx.zeros((1, self.shape.kv_heads, 0, dims[which]), dtype)
                sides = (left, length - left - count)
                parts[which].append(mx.pad(array, [(0, 0), (0, 0), sides, (0, 0)]))
        return mx.concatenate(parts[0]), mx.concatenate(parts[1])

    def _attend(
        self,
        update: Update,
        queries: mx.array,
        scale: float,
        mask: mx.array | Meaning,
        sinks: mx.array | None,
    ) -> mx.array:
        """Queries in columns of padding give zeros."""
        assert self._pending is not None
        taken = self._pending[2]
        native = self.is_native()
        self.flush(keep=True)
        attend = self._attend_in_memory if native else self._attend_arrays
        return attend(taken, update, queries, scale, mask, sinks)

    def _attend_arrays(
        self,
        taken: Taken,
        update: Update,
        queries: mx.array,
        scale: float,
        mask: mx.array | Meaning,
        sinks: mx.array | None,
    ) -> mx.array:
        _, heads, count, _ = queries.shape
        outputs = []
        for row, (start, tokens) in enumerate(taken):
            core, end = self.rows[row].core, start + tokens
            if tokens == 0:
                shape = 1, heads, count, self.shape.value_head_dim
                outputs.append(mx.zeros(shape, queries.dtype))
                continue
            assert core is not None
            first = max(update.first - self.padding[row], 0)
            where = mask
            if isinstance(mask, mx.array):
                where = store.in_four(mask)
                rows, _, mask_rows, _ = where.shape
                column, held = self._columns_of(row, update, first)
                where = where[
                    row if rows > 1 else 0,
                    None,
                    :,
                    slice(start, end) if mask_rows > 1 else slice(None),
                    column : column + held,
                ]
            own = queries[row : row + 1, :, start:end]
            output = store.attend(core, own, first, scale, where, sinks, self.soft_cap)
            outputs.append(mx.pad(output, [(0, 0), (0, 0), (start, count - end), (0, 0)]))
        return mx.concatenate(outputs)

    def _attend_in_memory(
        self,
        taken: Taken,
        update: Update,
        queries: mx.array,
        scale: float,
        mask: mx.array | Meaning,
        sinks: mx.array | None,
    ) -> mx.array:
        scores = None if sinks is None else np.array(sinks)
        queries, q = rows_contiguous(queries)
        _, heads, count, dim = queries.shape
        value_dim = self.shape.value_head_dim
        shape = (len(self.rows), count, heads, value_dim)
        memory, output = blank(shape, queries.dtype)
        for row, (start, tokens) in enumerate(taken):
            memory[row, :start] = memory[row, start + tokens :] = 0
            if tokens == 0:
                continue
            core = self.rows[row].core
            assert core is not None
            first = max(update.first - self.padding[row], 0)
            where: Ref | Meaning = (
                self._part_of(mask, row, start, tokens, update, first)
                if isinstance(mask, mx.array)
                else mask
            )
            store.attend_into(
                core,
                part(q, (row, 0, start, 0), (1, heads, tokens, dim)),
                part(output, (row, start, 0, 0), (1, tokens, heads, value_dim)),
                first,
                scale,
                where,
                scores,
                self.soft_cap,
            )
        return from_memory(memory, queries.dtype).transpose(0, 2, 1, 3)

    def _part_of(
        self, mask: mx.array, row: int, start: int, tokens: int, update: Update, first: int
    ) -> Ref:
        """What of a mask is about one row's tokens."""
        whole = mask_ref(mask, update.queries)
        rows, heads, _, _ = whole[2]
        column, held = self._columns_of(row, update, first)
        return part(whole, (row if rows > 1 else 0, 0, start, column), (1, heads, tokens, held))

    def _columns_of(self, row: int, update: Update, first: int) -> tuple[int, int]:
        """Which of a mask's columns are a row's tokens from `first` on: the first and how many."""
        return self.padding[row] + first - update.first, self.rows[row].offset - first

    def flush(self, keep: bool = False) -> None:
        """Makes the rows hold what is pending. keep: it stays known which columns these took.

        Raises:
            ValueError: for NaN or infinity; the rows that come before keep their tokens.
        """
        if self._pending is None:
            return
        keys, values, taken = self._pending
        if keys.shape[2] == 0:  # done already
            if not keep:
                self._pending = None
            return
        self._pending = None
        dtypes = keys.dtype, values.dtype
        keys, values = promoted(keys, values)
        both: list[Any] = [keys, values]
        native = self.is_native()
        if native:
            mx.eval(keys, values)
            keys, k = rows_contiguous(keys)
            values, v = rows_contiguous(values)
            both = [k, v]
        heads = self.shape.kv_heads
        dims = self.shape.head_dim, self.shape.value_head_dim
        for row, (start, tokens) in enumerate(taken):
            if tokens == 0:
                continue
            parts = [
                part(whole, (row, 0, start, 0), (1, heads, tokens, dim))
                if native
                else whole[row : row + 1, :, start : start + tokens]
                for whole, dim in zip(both, dims, strict=True)
            ]
            try:
                self.rows[row].take(parts[0], parts[1], tokens, keys.dtype, dtypes)
            except ValueError as error:
                raise ValueError(f"row {row} of the batch, {error}") from error
        if keep:
            self._pending = keys[:, :, :0], values[:, :, :0], taken

    def settle(self) -> None:
        """See ``Compressed.settle``."""
        self.flush()
        self._update = None
        if not self._seals_later:
            for row in self.rows:
                row.settle()

    def _changed(self) -> None:
        self.version += 1
        self._offset = None

    def _columns(self) -> int:
        return self._idx

    def _rows(self) -> int:
        return len(self.rows)

    def _fits(self, update: Update, queries: mx.array, mask: Any, says: Meaning | None) -> bool:
        if self._pending is None:  # what the queries' columns are is no longer known
            return False
        batch, heads, count, dim = queries.shape
        if (batch, dim) != (len(self.rows), self.shape.head_dim) or heads % self.shape.kv_heads:
            return False
        if queries.dtype not in DTYPES or count != update.queries:
            return False
        if not isinstance(mask, mx.array):
            return True
        shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
        if len(shape) != 4 or shape[3] != update.length or shape[2] not in (1, count):
            return False
        if says is not None:
            return True
        return shape[0] in (1, batch) and shape[1] in (1, heads) and is_mask_dtype(mask.dtype)
