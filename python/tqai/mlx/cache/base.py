"""What compressed caches of one row and of several have in common."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_caches

from tqai.mlx.arrays import DTYPES, without_gradient
from tqai.mlx.attention import functions
from tqai.mlx.attention.masks import Meaning, meaning_of
from tqai.mlx.attention.view import TqaiView, Update
from tqai.mlx.cache.weights import Weights
from tqai.mlx.model.geometry import LayerShape
from tqai.settings import Settings

Dtypes = tuple[mx.Dtype, mx.Dtype]
TILE_TOKENS = 64
"""Tokens that are sealed together."""


class Compressed(mlx_caches._BaseCache):
    """A layer's cache, seen as columns, each a token or padding of each row.

    Not thread-safe.
    """

    soft_cap = 0.0
    """Of the scores of the model that reads it; 0: none. The attention module says it."""

    def __init__(self, shape: LayerShape, settings: Settings) -> None:
        """`settings` are those of the layer, with bits of its own."""
        self.shape = shape
        self.settings = settings
        self.dtypes: Dtypes | None = None
        """Of the keys and of the values; None before there were any."""
        self.version = 0
        """Counts changes, so that a view can tell whether it is out of date."""
        self.weights: Weights | None = None
        """Of the model whose keys and values it holds; None: unknown."""
        self.passing: Any = None
        """The forward pass that is under way, where its end will be told; see
        ``tqai.mlx.cache.passes``."""
        self.broken: str | None = None
        """Why nothing may be added any more; None: it may."""
        self._before: Any = None
        """What the layer was before the pass, once that has added something."""
        self._seals_later = False
        """Whether what leaves the window is sealed when the pass has ended."""
        self._pending: Any = None
        """New keys and values that the store has not got yet, and what else goes with them."""
        self._update: Update | None = None
        """What the last update handed out, until it is settled."""

    @property
    def index(self) -> int:
        return self.shape.index

    @property
    def takes_soft_cap(self) -> bool:
        """Whether attention over what it hands out goes by ``soft_cap``."""
        return self.shape.is_packed and functions.is_installed()

    @property
    def reads(self) -> int:
        return self.shape.reads

    @property
    def max_size(self) -> int | None:
        """Tokens that a query sees, its own among them; None: all."""
        return self.shape.max_size

    @property
    def is_sliding(self) -> bool:
        return self.max_size is not None

    def size(self) -> int:
        """Columns that the next query may see, without its own."""
        columns = self._columns()
        return columns if self.max_size is None else min(columns, self.max_size)

    def empty(self) -> bool:
        """Whether it has never held a token."""
        return self.dtypes is None

    def is_trimmable(self) -> bool:
        """Whether the last tokens can be taken away; a full window has moved on over others."""
        return self.max_size is None or self._columns() < self.max_size

    def keys_and_values(self) -> tuple[Any, Any]:
        """What the queries of the last update may see, while it is being read; later, what the next
        query will see."""
        if self.dtypes is None:
            return None, None
        update = self._update
        if update is None or not update.is_current():
            columns = self._columns()
            first = 0 if self.max_size is None else max(columns - self.max_size, 0)
            update = Update(self, first, columns - first, 0, None)
        return self._handed(update)

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Any:
        """Raises ValueError: the cache is compressed already."""
        raise ValueError(
            f"kv_bits={bits}: the model is patched by tqai, which compresses its cache: leave "
            "kv_bits out, or call tqai.unpatch(model)"
        )

    def __getattr__(self, name: str) -> Any:
        if name in ("keys", "values"):
            raise NotImplementedError(
                f"layer {self.shape.index}: a compressed cache has no .{name}, its tokens are "
                "packed: keys_and_values() stands for them"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # What forward passes ask of it.

    def lengths(self) -> tuple[int, ...]:
        """Tokens held of each row; of rows of equal length, once."""
        raise NotImplementedError

    def flush(self) -> None:
        """Makes the store hold what is pending.

        Raises:
            ValueError: for NaN or infinity.
        """
        raise NotImplementedError

    def end_pass(self) -> None:
        """Makes what the pass has added lasting."""
        self._seals_later = False
        self.settle()
        self._before = self.passing = None

    def undo_pass(self) -> None:
        """Makes the cache as it was before the pass. May be called again."""
        if self._before is not None:
            self._restore(self._before)
        self._seals_later = False
        self._before = self.passing = None

    def _note_pass(self, tokens: int) -> None:
        """Called when a pass, if one is under way, is about to add so many tokens."""
        if self.passing is None or self._before is not None:
            return
        self._seals_later = tokens <= TILE_TOKENS
        self._before = self._kept(not self._seals_later)

    def _kept(self, with_store: bool) -> Any:
        """What ``_restore`` makes the cache of again; with_store: also where tokens have been
        sealed or freed since."""
        raise NotImplementedError

    def _restore(self, before: Any) -> None:
        raise NotImplementedError

    # What views ask of it.

    def is_native(self) -> bool:
        """Whether the compiled cache holds its tokens, or will when it gets some."""
        raise NotImplementedError

    def is_packed(self) -> bool:
        """Whether any token is held as codes."""
        raise NotImplementedError

    def gather(self, first: int, length: int) -> tuple[mx.array, mx.array]:
        """Dequantised keys and values of columns first…first + length − 1 in the cache's dtypes."""
        raise NotImplementedError

    def settle(self) -> None:
        """Compresses what has left the residual window, and frees what has left a sliding one."""
        raise NotImplementedError

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
        if sinks is not None:
            sinks = sinks.astype(mx.float32)
        if self.is_native():
            # What is pending is evaluated together with what reads it.
            read = [*(self._pending or ())[:2], mask if says is None else None, sinks]
            mx.eval(queries, [array for array in read if array is not None])
        given = mask if says is None else says
        assert not isinstance(given, str) and given is not None
        output = self._attend(update, queries, scale, given, sinks)
        return without_gradient(output, queries, *update.given) if self.is_native() else output

    def _fits(self, update: Update, queries: mx.array, mask: Any, says: Meaning | None) -> bool:
        """Whether the kernel computes this."""
        raise NotImplementedError

    def _attend(
        self,
        update: Update,
        queries: mx.array,
        scale: float,
        mask: mx.array | Meaning,
        sinks: mx.array | None,
    ) -> mx.array:
        """As ``attend``, of what fits and, for a compiled cache, is evaluated."""
        raise NotImplementedError

    def _columns(self) -> int:
        raise NotImplementedError

    def _rows(self) -> int:
        raise NotImplementedError

    def _first_seen(self, before: int, count: int) -> int:
        """First column that any of `count` new queries sees, after `before` columns."""
        if self.max_size is None:
            return 0
        return max(before - self.max_size + 1, 0)

    def _handed(self, update: Update) -> tuple[Any, Any]:
        if not (self.shape.is_packed and functions.is_installed()):
            return update.dense(0), update.dense(1)
        assert self.dtypes is not None
        shape = self._rows(), self.shape.kv_heads, update.length
        return (
            TqaiView(update, 0, (*shape, self.shape.head_dim), self.dtypes[0]),
            TqaiView(update, 1, (*shape, self.shape.value_head_dim), self.dtypes[1]),
        )

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
        rows = self._rows()
        if rows not in (0, keys.shape[0]):
            raise ValueError(
                f"layer {shape.index}: keys of {keys.shape[0]} rows; the cache holds {rows}: make "
                "another with make_prompt_cache(model)"
            )
        if self.dtypes not in (None, (keys.dtype, values.dtype)):
            raise ValueError(
                f"layer {shape.index}: keys of {keys.dtype} and values of {values.dtype}; the "
                f"cache holds {self.dtypes[0]} and {self.dtypes[1]}: make another with "
                "make_prompt_cache(model)"
            )
