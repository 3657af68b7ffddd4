"""The compressed cache of one layer, as mlx-lm's models and generators want it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_caches

from tqai import _core, reports
from tqai.mlx.arrays import DTYPES, is_mask_dtype, promoted
from tqai.mlx.attention import functions
from tqai.mlx.attention.masks import Meaning, meaning_of, remember
from tqai.mlx.attention.view import TqaiView, Update
from tqai.mlx.cache import state, store
from tqai.mlx.model.geometry import LayerShape
from tqai.settings import Settings

Dtypes = tuple[mx.Dtype, mx.Dtype]


class TqaiKVCache(mlx_caches._BaseCache):
    """Keys and values of one layer, compressed as they leave the residual window.

    In the place of mlx-lm's KVCache, or of its RotatingKVCache where the layer's shape has a
    ``max_size``. ``update_and_fetch`` returns views (``tqai.mlx.attention.view``) in the shapes
    that those caches would give arrays of; of a layer that is not read through mlx-lm's attention
    function, and while no model is patched, dequantised arrays.

    Rows are of equal length. Not thread-safe. A method that raises leaves the cache as it was.
    """

    def __init__(self, shape: LayerShape, settings: Settings) -> None:
        """`settings` are those of the layer, with bits of its own."""
        self.shape = shape
        self.settings = settings
        self.core: _core.KvCache | None = None
        self.dtypes: Dtypes | None = None
        """Of the keys and of the values."""
        self.version = 0
        """Counts changes, so that a view can tell whether it is out of date."""
        self._tokens = 0
        self._pending: tuple[mx.array, mx.array] | None = None
        """New tokens that the store has not got yet: they are evaluated together with the queries
        that read them."""
        self._update: Update | None = None
        """What the last update handed out, until it is settled."""
        self._settled = 0
        """The version that was settled last."""
        self._warned = False

    # What mlx-lm asks of a cache.

    @property
    def offset(self) -> int:
        """Tokens held; the position of the next one."""
        return self._tokens

    @property
    def max_size(self) -> int | None:
        """Tokens that a query sees, its own among them; None: all."""
        return self.shape.max_size

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
        self._pending = keys, values
        self.dtypes = keys.dtype, values.dtype
        self._tokens += count
        self.version += 1
        first = self._first_seen(before, count)
        fresh = (keys, values) if before == 0 else None
        self._update = update = Update(self, first, self._tokens - first, count, fresh)
        return self._handed(update)

    def keys_and_values(self) -> tuple[Any, Any]:
        """What the queries of the last update may see, while it is being read; later, what the next
        query will see."""
        if self.dtypes is None:
            return None, None
        update = self._update
        if update is None or not update.is_current():
            first = 0 if self.max_size is None else max(self._tokens - self.max_size, 0)
            update = Update(self, first, self._tokens - first, 0, None)
        return self._handed(update)

    def _handed(self, update: Update) -> tuple[Any, Any]:
        if not (self.shape.is_packed and functions.is_installed()):
            return update.dense(0), update.dense(1)
        assert self.dtypes is not None
        shape = self._rows(), self.shape.kv_heads, update.length
        return (
            TqaiView(update, 0, (*shape, self.shape.head_dim), self.dtypes[0]),
            TqaiView(update, 1, (*shape, self.shape.value_head_dim), self.dtypes[1]),
        )

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
        core = state.unpacked(data)
        TqaiKVCache.__init__(self, shape, settings)
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
        return [state.header(self.shape, self.settings, dtypes=names), state.packed(self.core)]

    def is_trimmable(self) -> bool:
        """Whether the last tokens can be taken away; a full window has moved on over others."""
        return self.max_size is None or self._tokens < self.max_size

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

    def size(self) -> int:
        """Tokens that the next query may see, without its own."""
        return self._tokens if self.max_size is None else min(self._tokens, self.max_size)

    def empty(self) -> bool:
        """Whether it has never held a token."""
        return self.dtypes is None

    @property
    def nbytes(self) -> int:
        """Bytes held; tiles that caches share count in each of them."""
        return self.memory()["total_bytes"]

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Any:
        """Raises ValueError: the cache is compressed already."""
        raise ValueError(
            f"kv_bits={bits}: the model is patched by tqai, which compresses its cache: leave "
            "kv_bits out, or call tqai.unpatch(model)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> TqaiKVCache:
        """A copy that shares the tiles."""
        self.flush()
        other = copy.copy(self)
        other._update = None
        other.core = None if self.core is None else self.core.copy()
        return other

    def __getattr__(self, name: str) -> Any:
        if name in ("keys", "values"):
            raise NotImplementedError(
                f"layer {self.shape.index}: a compressed cache has no .{name}, its tokens are "
                "packed: keys_and_values() stands for them"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return (
            f"TqaiKVCache(layer {self.shape.index}: {self._tokens} tokens in {self.nbytes} bytes)"
        )

    # What views and attention ask of it.

    @property
    def index(self) -> int:
        return self.shape.index

    @property
    def reads(self) -> int:
        return self.shape.reads

    def is_packed(self) -> bool:
        """Whether any token is held as codes, or will be when what is pending is added."""
        core = self.core
        return core is not None and any(map(core.packed_tokens, range(core.batch)))

    def gather(self, first: int, length: int) -> tuple[mx.array, mx.array]:
        """Dequantised keys and values of tokens first…first + length − 1 in the cache's dtypes."""
        self.flush()
        assert self.core is not None and self.dtypes is not None
        return store.gather(self.core, first, length, self.dtypes)

    def attend(
        self,
        update: Update,
        queries: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
    ) -> mx.array | None:
        """Attention over an update's tokens; None for what the kernel does not compute.

        Raises:
            RuntimeError: where the update is older than the cache.
        """
        if not update.is_current():
            update.dense(0)  # raises
        says = meaning_of(mask)
        if not self._fits(update, queries, mask, says):
            return None
        wanted = [queries, *(self._pending or ())]
        if says is None:
            wanted.append(mask)
        if sinks is not None:
            sinks = sinks.astype(mx.float32)
            wanted.append(sinks)
        mx.eval(wanted)
        self.flush()
        assert self.core is not None
        given = mask if says is None else says
        assert not isinstance(given, str) and given is not None
        numbers = None if sinks is None else np.array(sinks)
        return store.attend(self.core, queries, update.first, scale, given, numbers)

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
            mx.eval(keys, values)
            core = self.core
            if core is None:
                core = store.make_store(self.settings, self.shape, keys.shape[0], keys.dtype)
            store.append(core, keys, values)
        except BaseException as error:
            self._tokens -= keys.shape[2]
            self.version += 1
            if self._tokens == 0 and self.core is None:
                self.dtypes = None
            if isinstance(error, (ValueError, NotImplementedError)):
                raise type(error)(f"layer {self.index}: {error}") from error
            raise
        self.core = core

    def settle(self) -> None:
        """Compresses what has left the residual window, and frees what has left a sliding one.

        Warns, once, where it cannot because of a vector that is too long for its FP16 norm.
        """
        self.flush()
        self._update = None
        core = self.core
        if core is None or self._settled == self.version:
            return
        self._settled = self.version
        if self.max_size is not None and self._tokens >= self.max_size:
            core.discard_before(self._tokens - self.max_size + 1)
        waiting = core.seal()
        if waiting > 0 and not self._warned:
            self._warned = True
            warnings.warn(
                f"layer {self.index} has a key or value longer than FP16 norms of codes can hold, "
                f"beyond its {self.settings.sink_tokens} sink tokens: from there on "
                "all tokens stay exact and take their full memory. Give it more sink_tokens, or "
                f"leave it exact with skip_layers=[{self.index}]",
                stacklevel=2,
            )

    def memory(self) -> dict[str, int]:
        """The cache's numbers, as in a memory report."""
        self.settle()
        return (
            dict.fromkeys(reports.COUNTS, 0) if self.core is None else reports.numbers_of(self.core)
        )

    def _first_seen(self, before: int, count: int) -> int:
        """First token that any of `count` new queries sees, after `before` tokens."""
        if self.max_size is None:
            return 0
        if count == 1:
            return max(before + 1 - self.max_size, 0)
        return max(before - self.max_size + 1, 0)

    def _rows(self) -> int:
        if self._pending is not None:
            return self._pending[0].shape[0]
        return 0 if self.core is None else self.core.batch

    def _fits(self, update: Update, queries: mx.array, mask: Any, says: Meaning | None) -> bool:
        """Whether the kernel computes this."""
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

    def _check(self, keys: mx.array, values: mx.array) -> None:
        shape = self.shape
        for name, array, dim in (
            ("keys", keys, shape.head_dim),
            ("values", values, shape.value_head_dim),
        ):
            if array.ndim != 4 or (array.shape[1], array.shape[3]) != (shape.kv_heads, dim):
                raise ValueError(
                    f"layer {shape.index}: {name} of shape {tuple(array.shape)}; the cache was "
                    f"made for [batch, {shape.kv_heads}, tokens, {dim}]. A cache goes with one "
                    "model: make another with make_prompt_cache(model)"
                )
            if array.dtype not in DTYPES:
                raise ValueError(
                    f"layer {shape.index}: {name} of {array.dtype}; expected float32, float16 or "
                    "bfloat16"
                )
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"layer {shape.index}: keys of shape {tuple(keys.shape)} do not go with values of "
                f"shape {tuple(values.shape)}"
            )
        if self.dtypes is None:
            return
        if keys.shape[0] != self._rows():
            raise ValueError(
                f"layer {shape.index}: keys of {keys.shape[0]} rows; the cache holds "
                f"{self._rows()}: make another with make_prompt_cache(model)"
            )
        if self.dtypes != (keys.dtype, values.dtype):
            raise ValueError(
                f"layer {shape.index}: keys of {keys.dtype} and values of {values.dtype}; the "
                f"cache holds {self.dtypes[0]} and {self.dtypes[1]}: make another with "
                "make_prompt_cache(model)"
            )
