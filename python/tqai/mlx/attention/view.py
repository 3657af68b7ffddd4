"""Stand-ins for the keys and values of a compressed layer, without memory of their own.

A layer hands these out in place of arrays, so that attention can find the layer behind them and
read its packed bytes. Whatever else Python does with one is done to the dequantised array;
functions of mlx itself take arrays alone, and raise TypeError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx

from tqai.mlx.arrays import without_gradient

_NAMES = ("keys", "values")


class Layer(Protocol):
    """What views, and attention over them, need of the cache behind."""

    index: int
    version: int
    reads: int
    soft_cap: float

    def is_native(self) -> bool: ...
    def is_packed(self) -> bool: ...
    def gather(self, first: int, length: int) -> tuple[mx.array, mx.array]: ...
    def settle(self) -> None: ...
    def attend(
        self,
        update: Update,
        queries: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
    ) -> mx.array | None: ...


class Update:
    """A range of tokens of one layer at one moment; both views of it share it."""

    def __init__(
        self,
        layer: Layer,
        first: int,
        length: int,
        queries: int,
        fresh: tuple[mx.array, mx.array] | None,
        given: tuple[mx.array, ...] = (),
    ) -> None:
        self.layer = layer
        self.first = first
        """Token that the views start at."""
        self.length = length
        """Tokens that the views span."""
        self.queries = queries
        """New tokens, the last of the span."""
        self.fresh = fresh
        """The exact keys and values, where the layer was empty before."""
        self.given = given
        """The new keys and values, as the layer got them."""
        self.reads_left = layer.reads
        """How often attention is still to read it before the layer may seal what it brought."""
        self._version = layer.version
        self._dense: tuple[mx.array, mx.array] | None = None

    def is_current(self) -> bool:
        """Whether the layer is still as this update left it."""
        return self._version == self.layer.version

    def dense(self, which: int) -> mx.array:
        """The keys (0) or values (1), [batch, kv_heads, length, head_dim], in the cache's dtype.

        Raises:
            RuntimeError: when the layer was changed since.
        """
        if self.fresh is not None:
            return self.fresh[which]
        if self._dense is None:
            if not self.is_current():
                raise RuntimeError(
                    f"the {_NAMES[which]} of layer {self.layer.index} are from before the cache "
                    "was changed; read them before the next update or trim"
                )
            dense = self.layer.gather(self.first, self.length)
            if self.given and self.layer.is_native():
                keys, values = (without_gradient(each, *self.given) for each in dense)
                dense = keys, values
            self._dense = dense
        return self._dense[which]

    def was_read(self) -> None:
        """Called when attention has read it."""
        self.reads_left -= 1
        if self.reads_left == 0 and self.is_current():
            self.layer.settle()


class TqaiView:
    """The keys or values of one layer, [batch, kv_heads, length, head_dim]."""

    __slots__ = ("dtype", "shape", "update", "which")

    def __init__(
        self, update: Update, which: int, shape: tuple[int, int, int, int], dtype: mx.Dtype
    ) -> None:
        self.update = update
        self.which = which
        self.shape = shape
        self.dtype = dtype

    def dense(self) -> mx.array:
        """The dequantised array; see ``Update.dense``."""
        return self.update.dense(self.which)

    def __mlx_array__(self) -> mx.array:
        return self.dense()

    @property
    def ndim(self) -> int:
        return 4

    @property
    def size(self) -> int:
        batch, heads, length, head_dim = self.shape
        return batch * heads * length * head_dim

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise NotImplementedError(
            f"{self} cannot be written into, its tokens are compressed: take + 0 for an array of "
            "your own"
        )

    def __repr__(self) -> str:
        return (
            f"TqaiView({_NAMES[self.which]} of layer {self.update.layer.index}, "
            f"shape={self.shape}, dtype={self.dtype})"
        )


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: TqaiView, *args: Any) -> Any:
        return getattr(self.dense(), name)(*map(plain, args))

    operate.__name__ = name
    return operate


# Python looks these up on the class, past __getattr__.
for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv"),
    *("mod", "rmod", "pow", "rpow", "matmul", "neg", "abs", "eq", "ne", "lt", "le", "gt", "ge"),
    *("getitem", "iter", "len", "bool", "float", "int"),
):
    setattr(TqaiView, f"__{_name}__", _operator(f"__{_name}__"))


def plain(value: Any) -> Any:
    """`value`, or the array that it stands for."""
    return value.dense() if type(value) is TqaiView else value


def update_of(keys: Any, values: Any) -> Update | None:
    """The update that `keys` and `values` are the two views of, if they are."""
    if type(keys) is TqaiView and type(values) is TqaiView:
        if keys.update is values.update and (keys.which, values.which) == (0, 1):
            return keys.update
    return None
