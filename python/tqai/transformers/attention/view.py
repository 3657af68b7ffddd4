"""Storage-less stand-ins for the keys and values of a compressed layer.

A cache layer hands these out in place of dense tensors, so that attention can find the layer behind
them and read its packed bytes. Every other operation sees dequantised values.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import torch

from tqai.settings import Settings
from tqai.stores.for_torch import Store

_NAMES = ("keys", "values")


class Layer(Protocol):
    """What views, and attention over them, need of the layer behind: a ``TqaiLayer``."""

    index: int
    settings: Settings
    sliding_window: int | None
    core: Store | None
    padding: list[int]
    version: int
    exact_arithmetic: bool

    def is_packed(self) -> bool: ...
    def gather(self, first: int, length: int) -> tuple[torch.Tensor, torch.Tensor]: ...
    def mark_hidden(self, hidden: torch.Tensor) -> None: ...
    @property
    def has_dropped(self) -> bool: ...
    def check_dropped(self, mask: torch.Tensor | None, first: int) -> None: ...
    def settle(self, was_empty: bool) -> None: ...


class Owner(Protocol):
    """What forward passes are done with: the whole cache that a layer belongs to."""

    def end_pass(self) -> None: ...
    def roll_back(self) -> None: ...


class Update:
    """What one ``TqaiLayer.update`` handed out: a range of tokens of one layer at one moment.

    Both views of the update share it.
    """

    def __init__(
        self,
        layer: Layer,
        first: int,
        length: int,
        queries: int,
        fresh: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        self.layer = layer
        self.first = first
        """Token that the views start at."""
        self.length = length
        """Tokens that the views span."""
        self.queries = queries
        """New tokens, the last of the span; 0 for an encoder's tokens, all of which all see."""
        self.fresh = fresh
        """The exact keys and values, where the update was the first of an empty layer."""
        self.positions: torch.Tensor | None = None
        """What the new tokens' keys were turned by, where it is known; see ``stores.append``."""
        self.cache: Owner | None = None
        """The cache that the layer belongs to, to undo a forward pass that fails."""
        self.settled = False
        """Whether attention ran and the layer has sealed what it could."""
        self._version = layer.version
        self._spare: dict[int, torch.Tensor] = {}

    @property
    def is_cross(self) -> bool:
        """Whether the tokens are an encoder's, and no queries among them."""
        return self.queries == 0

    def is_current(self) -> bool:
        """Whether the layer is still as this update left it."""
        return self._version == self.layer.version

    def dense(self, which: int) -> torch.Tensor:
        """The keys (0) or values (1), [batch, kv_heads, length, head_dim], in the cache's dtype.

        Raises:
            RuntimeError: when the layer was changed since.
        """
        if self.fresh is not None:
            return self.fresh[which]
        if not self.is_current():
            raise RuntimeError(
                f"the {_NAMES[which]} of layer {self.layer.index} are from before the cache was "
                "changed; read them before the next update, crop or reorder"
            )
        # One gather writes both; most callers that ask for one ask for the other right after.
        if which not in self._spare:
            self._spare = dict(enumerate(self.layer.gather(self.first, self.length)))
        return self._spare.pop(which)

    def views(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[TqaiView, TqaiView]:
        """Views in the dtype and with the heads of the new `keys` and `values`.

        Where autograd records, gradients reach fresh keys and values, and a backward pass through
        keys and values from the cache raises RuntimeError.
        """
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            return _Tracked.apply(keys, self, 0), _Tracked.apply(values, self, 1)
        return view_of(self, 0, keys), view_of(self, 1, values)


class _Part:
    """Stands for what slicing, transposing or the like has made of an update's keys or values."""

    def __init__(self, layer: Layer, values: torch.Tensor) -> None:
        self.layer = layer
        self._values = values

    def dense(self, which: int) -> torch.Tensor:
        return self._values


class TqaiView(torch.Tensor):
    """The keys or values of one layer, [batch, kv_heads, length, head_dim], without storage.

    Any operation works on the dequantised values and gives an ordinary tensor. Writing into the
    view, or into a part of it, raises NotImplementedError: it would not reach the layer.
    """

    update: Update | _Part
    which: int

    __torch_function__ = torch._C._disabled_torch_function_impl

    def dense(self) -> torch.Tensor:
        """The dequantised values; see ``Update.dense``."""
        return self.update.dense(self.which)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if isinstance(value, TqaiView) and _is_written(argument):
                raise NotImplementedError(
                    f"{func} writes into the {_NAMES[value.which]} of a compressed cache; "
                    "clone() them first"
                )
        result = func(*_dense(args), **_dense(kwargs))
        if not _gives_views(func):
            return result
        source = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, TqaiView))
        return _parts_of(source, result)

    # What torch does not send through the dispatcher, but reads from memory that a view lacks.

    def numpy(self, *, force: bool = False) -> Any:
        return self.dense().numpy(force=force)

    def tolist(self) -> list[Any]:
        return self.dense().tolist()

    def share_memory_(self) -> torch.Tensor:
        raise NotImplementedError(f"{self} has no memory to share: clone() it first")

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.dense().__dlpack__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return memo.setdefault(id(self), self.dense().clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().clone().__reduce_ex__(protocol)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise NotImplementedError(
            f"{self} cannot be written into, its tokens are compressed; clone() it for a tensor of "
            "your own"
        )

    def __repr__(self, **_: Any) -> str:
        return (
            f"TqaiView({_NAMES[self.which]} of layer {self.update.layer.index}, "
            f"shape={tuple(self.shape)}, dtype={self.dtype})"
        )


def view_of(update: Update, which: int, like: torch.Tensor) -> TqaiView:
    """The keys (0) or values (1) of an update, with the rows, heads, dtype and device of `like`."""
    batch, heads, _, head_dim = like.shape
    shape = batch, heads, update.length, head_dim
    # Not the class's constructor: two a layer and token are made, and it takes half as long again.
    view = torch.Tensor._make_wrapper_subclass(
        TqaiView, shape, dtype=like.dtype, device=like.device
    )
    view.update = update
    view.which = which
    return view


def _parts_of(source: TqaiView, values: Any) -> Any:
    """Views of parts of `source`, with these values."""
    if isinstance(values, (tuple, list)):
        return type(values)(_parts_of(source, each) for each in values)
    part = torch.Tensor._make_wrapper_subclass(
        TqaiView,
        values.shape,
        values.stride(),
        values.storage_offset(),
        dtype=values.dtype,
        device=values.device,
    )
    part.update = _Part(source.update.layer, values)
    part.which = source.which
    return part


@lru_cache(maxsize=256)
def _gives_views(func: Any) -> bool:
    """Whether what an operation gives shares its memory with what it got."""
    return any(value.alias_info is not None for value in func._schema.returns)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _dense(value: Any) -> Any:
    if isinstance(value, TqaiView):
        return value.dense()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_dense, value))
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items()}
    return value


class _Tracked(torch.autograd.Function):
    """A view that autograd knows as made from the new keys or values."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, update: Update, which: int) -> torch.Tensor:
        ctx.fresh = update.fresh is not None
        return view_of(update, which, tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if not ctx.fresh:
            raise RuntimeError(NOT_DIFFERENTIABLE)
        return grads[0], None, None


class Undifferentiable(torch.autograd.Function):
    """Marks `output` as made from `query` by a computation that has no derivative."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        raise RuntimeError(NOT_DIFFERENTIABLE)


NOT_DIFFERENTIABLE = (
    "attention over a compressed cache is not differentiable; run it under torch.no_grad(), "
    "or train with use_cache=False or model.train()"
)


def update_of(key: torch.Tensor, value: torch.Tensor) -> Update | None:
    """The update that `key` and `value` are the two views of, if they are."""
    if isinstance(key, TqaiView) and isinstance(value, TqaiView):
        update = key.update
        if update is value.update and isinstance(update, Update):
            if (key.which, value.which) == (0, 1):
                return update
    return None
