"""The compressed cache of one layer, as mlx-lm's models and generators want it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_caches

from tqai import _core, reports
from tqai.mlx.arrays import DTYPES, Ref, is_mask_dtype, promoted
from tqai.mlx.attention.masks import Meaning, remember
from tqai.mlx.attention.view import Update
from tqai.mlx.cache import state, store
from tqai.mlx.cache.base import Compressed, Dtypes
from tqai.mlx.model.geometry import LayerShape
from tqai.remarks import remark_on_long_vector
from tqai.settings import Settings


class TqaiKVCache(Compressed):
    """Keys and values of one layer, compressed as they leave the residual window.

    In the place of mlx-lm's KVCache, or of its RotatingKVCache where the layer's shape has a
    ``max_size``. ``update_and_fetch`` returns views (``tqai.mlx.attention.view``) in the shapes
    that those caches would give arrays of; of a layer that is not read through mlx-lm's attention
    function, and while no model is patched, dequantised arrays.

    Rows are of equal length; ``merge`` makes a cache of rows of any. A method that raises leaves
    the cache as it was.
    """

    def __init__(self, shape: LayerShape, settings: Settings) -> None:
        """See ``Compressed``."""
        super().__init__(shape, settings)
        self.core: store.Store | None = None
        self._tokens = 0
        self._pending: tuple[mx.array, mx.array] | None = None
        """New tokens that the store has not got yet: they are evaluated together with the queries
        that read them."""
        self._settled = 0
        """The version that was settled last."""
        self._warned = False

    # What mlx-lm asks of a cache.

    @property
    def offset(self) -> int:
        """Tokens held; the position of the next one."""
        return self._tokens

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Adds tokens, and returns what their queries may see of all tokens.

        keys [batch, kv_heads, n, head_dim], values [batch, kv_heads, n, value_head_dim]; float32,
        float16 or bfloat16.

        Raises:
            ValueError: for a shape or dtype that does not fit the cache. NaN and infinity are found
                when attention reads the tokens.
        """
        self._check(keys, values)
        self.settle()
        before, count = self._tokens, keys.shape[2]
        self._note_pass(count)
        self._pending = keys, values
        self.dtypes = keys.dtype, values.dtype
        self._tokens += count
        self.version += 1
        first = self._first_seen(before, count)
        fresh = (keys, values) if before == 0 else None
        given = keys, values
        self._update = update = Update(self, first, self._tokens - first, count, fresh, given)
        return self._handed(update)

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """The mask of `N` new tokens' queries, in the shape that mlx-lm's own cache would give it,
        with the tokens in their order."""
        window = window_size or 0
        if self.max_size is None:
            mask = mlx_caches.create_attention_mask(N, self._tokens, return_array, window_size)
        elif N > 1:
            window = window_size or self.max_size
            before = min(self.max_size - 1, self._tokens)
            if before + N <= window and not return_array:
                return "causal"
            mask = base.create_causal_mask(N, before, window_size=window)
        elif window_size is None or not window_size <= self._tokens or window_size >= self.max_size:
            return None
        else:
            columns = min(self._tokens + 1, self.max_size)
            mask = mx.arange(columns) >= columns - window_size
        if isinstance(mask, mx.array):
            remember(mask, Meaning(causal=True, window=window))
        return mask

    @property
    def state(self) -> state.State:
        """What ``from_state`` makes the cache of again; see ``tqai.mlx.cache.state``."""
        self.settle()
        return state.State(self._state_items)

    @state.setter
    def state(self, items: Any) -> None:
        text, data = state.items_of(items)
        shape, settings, more = state.read_header(text)
        core = state.unpacked(data, settings)
        TqaiKVCache.__init__(self, shape, settings)
        self.weights = state.weights_of(more)
        self.core = core
        if core is not None:
            self._tokens = core.tokens
            self.dtypes = tuple(getattr(mx, name) for name in more["dtypes"])

    def _state_items(self) -> list[Any]:
        self.settle()
        names = (
            None
            if self.dtypes is None
            else [str(dtype).rpartition(".")[2] for dtype in self.dtypes]
        )
        text = state.header(self.shape, self.settings, self.weights, dtypes=names)
        return [text, state.packed(self.core)]

    def trim(self, n: int) -> int:
        """Forgets the last `n` tokens, or all that there are; returns how many."""
        n = min(self._tokens, n)
        if n > 0:
            self.flush()
            assert self.core is not None
            self.core.crop(self._tokens - n)
            self._tokens -= n
            self.version += 1
        return n

    @property
    def nbytes(self) -> int:
        """Bytes held; tiles that caches share count in each of them."""
        return self.memory()["total_bytes"]

    @classmethod
    def merge(cls, caches: Sequence[TqaiKVCache]) -> Any:
        """A cache with the row of each of these; see ``TqaiBatchKVCache.merge``."""
        from tqai.mlx.cache.batch import TqaiBatchKVCache  # which is made of these

        return TqaiBatchKVCache.merge(caches)

    def __deepcopy__(self, memo: dict[int, Any]) -> TqaiKVCache:
        """A copy that shares the tiles."""
        self.flush()
        other = copy.copy(self)
        other._update = other._before = other.passing = None
        other._seals_later = False
        other.core = None if self.core is None else self.core.copy()
        return other

    def lengths(self) -> tuple[int, ...]:
        return (self._tokens,)

    def _kept(self, with_store: bool) -> Any:
        copied = self.core.copy() if with_store and self.core is not None else None
        return self._tokens, self.dtypes, self.core, copied

    def _restore(self, before: Any) -> None:
        tokens, dtypes, core, copied = before
        self._pending = self._update = None
        if copied is not None:
            core = copied
        elif core is not None and core.tokens > tokens:
            core.crop(tokens)
        self.core, self.dtypes, self._tokens = core, dtypes, tokens
        self.version += 1

    def __repr__(self) -> str:
        return (
            f"TqaiKVCache(layer {self.shape.index}: {self._tokens} tokens in {self.nbytes} bytes)"
        )

    # What views and attention ask of it.

    def is_native(self) -> bool:
        if self.core is None:
            return store.is_native(self.settings.backend)
        return isinstance(self.core, _core.KvCache)

    def is_packed(self) -> bool:
        """Whether any token is held as codes, or will be when what is pending is added."""
        core = self.core
        return core is not None and any(map(core.packed_tokens, range(core.batch)))

    def gather(self, first: int, length: int) -> tuple[mx.array, mx.array]:
        """Dequantised keys and values of tokens first…first + length − 1 in the cache's dtypes."""
        self.flush()
        assert self.core is not None and self.dtypes is not None
        return store.gather(self.core, first, length, self.dtypes)

    def _attend(
        self,
        update: Update,
        queries: mx.array,
        scale: float,
        mask: mx.array | Meaning,
        sinks: mx.array | None,
    ) -> mx.array:
        self.flush()
        assert self.core is not None
        return store.attend(self.core, queries, update.first, scale, mask, sinks, self.soft_cap)

    def flush(self) -> None:
        """Makes the store hold what is pending.

        Raises:
            ValueError: for NaN or infinity; the tokens are forgotten.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        keys, values = promoted(*pending)
        try:
            self._append(keys, values, keys.dtype, keys.shape[0])
        except BaseException:
            self._tokens -= keys.shape[2]
            self.version += 1
            if self._tokens == 0 and self.core is None:
                self.dtypes = None
            raise

    def take(
        self,
        keys: Ref | mx.array,
        values: Ref | mx.array,
        tokens: int,
        dtype: mx.Dtype,
        dtypes: Dtypes,
    ) -> None:
        """Adds `tokens` of one row, [1, kv_heads, tokens, dim], in `dtype`, which holds both of
        `dtypes`; of a cache that is native, they may lie in memory.

        Raises:
            ValueError: for NaN or infinity.
        """
        self.settle()
        self._append(keys, values, dtype, 1)
        self.dtypes = dtypes
        self._tokens += tokens
        self.version += 1

    def _append(
        self, keys: Ref | mx.array, values: Ref | mx.array, dtype: mx.Dtype, rows: int
    ) -> None:
        core = self.core
        try:
            if core is None:
                core = store.make_store(self.settings, self.shape, rows, dtype)
            store.append(core, keys, values)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"layer {self.index}: {error}") from error
        self.core = core

    def settle(self) -> None:
        """Compresses what has left the residual window, and frees what has left a sliding one.

        Warns, once, where it cannot because of a vector that is too long for its FP16 norm.
        """
        self.flush()
        self._update = None
        core = self.core
        if core is None or self._seals_later or self._settled == self.version:
            return
        self._settled = self.version
        if self.max_size is not None and self._tokens >= self.max_size:
            core.discard_before(self._tokens - self.max_size + 1)
        try:
            waiting = core.seal()
        except ValueError as error:
            raise ValueError(f"layer {self.index}: {error}") from error
        if waiting > 0 and not self._warned:
            self._warned = True
            remark_on_long_vector(self.index, self.settings.sink_tokens)

    def memory(self) -> dict[str, int]:
        """The cache's numbers, as in a memory report."""
        self.settle()
        return (
            dict.fromkeys(reports.COUNTS, 0) if self.core is None else reports.numbers_of(self.core)
        )

    def _columns(self) -> int:
        return self._tokens

    def _rows(self) -> int:
        if self._pending is not None:
            return self._pending[0].shape[0]
        return 0 if self.core is None else self.core.batch

    def _fits(self, update: Update, queries: mx.array, mask: Any, says: Meaning | None) -> bool:
        batch, heads, count, dim = queries.shape
        if (batch, dim) != (self._rows(), self.shape.head_dim) or heads % self.shape.kv_heads:
            return False
        if queries.dtype not in DTYPES or count > self._tokens:
            return False
        if says is not None and not isinstance(mask, mx.array):
            return not says.causal or count == update.queries
        shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
        if len(shape) != 4 or shape[3] != update.length or shape[2] not in (1, count):
            return False
        if says is not None:
            return count == update.queries
        return shape[0] in (1, batch) and shape[1] in (1, heads) and is_mask_dtype(mask.dtype)
