"""The operations on arrays that the store is written in; each framework has its own.

What arrays of all frameworks do alike, as methods and operators, is used as it is: ``Array`` lists
it. What they call otherwise, or do not all have, goes by ``Operations``, under the names of the
array API standard where that has one. To bring the store to another framework is to write one class
like ``tqai.stores.for_torch.operations.TorchOperations``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

Array = Any
"""A framework's array, on the device that its ``Operations`` make arrays on.

What is used of it, beside operators with arrays and with Python's numbers, which take on the
array's dtype: ``shape``, ``ndim``, ``dtype``, ``nbytes``, ``len``; ``mT``, the last two axes
swapped; ``reshape(*shape)``, ``swapaxes``; ``sum``, ``mean`` and ``all`` over one axis, ``any``
over all of them; ``exp``, ``square``. It is indexed by numbers, slices, None, ``...``, and one
array of integers, by which it is copied. Assigning to a part changes the array for all who hold
it; parts that were taken of it before may change with it or not.
"""


class Operations(Protocol):
    """Makes arrays on one device, and computes there. Immutable, hashable, picklable."""

    @property
    def waits(self) -> bool:
        """Whether looking at an array's numbers makes the device, or what is still to be computed,
        wait: a decoding step does not do it."""
        ...

    def plain(self) -> AbstractContextManager[None]:
        """Arrays made inside are plain ones, and computed with in the dtypes that they have."""
        ...

    def evaluate(self, *arrays: Array) -> None:
        """Computes these now, where a framework puts that off, so that nothing that they were made
        from is kept."""

    def tile_kernel(self) -> Any:
        """The device's own ``tqai.stores.device.attend.TileKernel``; None: there is none."""

    def fused_dtype(self, dtype: str, head_dim: int, value_head_dim: int) -> Any:
        """What ``fused_attention`` computes in for a cache's dtype and these dimensions; None where
        there is none for them."""

    def fused_attention(
        self, queries: Array, keys: Array, values: Array, bias: Array | None, scale: float
    ) -> tuple[Array, Array]:
        """Softmax attention by a kernel of the framework's.

        All in one dtype, [rows, heads, queries or tokens, dim]; `bias` [rows or 1, heads or 1,
        queries, tokens] float32 is added to the scores, where −∞ hides a token.

        Returns:
            output: [rows, heads, queries, value_dim] float32, 0 for a query that sees nothing.
            log_sum: [rows, heads, queries] float32, log Σ e^score; the lowest finite number for a
                query that sees nothing.
        """
        ...

    def after(self, arrays: Sequence[Array], done: Sequence[Array]) -> Sequence[Any]:
        """`arrays`, with none of which anything is computed before `done` is."""
        ...

    # Dtypes.

    @property
    def bool_(self) -> Any: ...
    @property
    def uint8(self) -> Any: ...
    @property
    def float16(self) -> Any: ...
    @property
    def float32(self) -> Any: ...
    @property
    def wide(self) -> Any:
        """float64, or float32 where the device has none."""

    def dtype(self, name: str) -> Any:
        """The one of that name, one of ``tqai.settings.DTYPES``."""

    def astype(self, x: Array, dtype: Any) -> Any: ...
    def view(self, x: Array, dtype: Any) -> Any:
        """The bytes of the last axis as numbers of another dtype."""

    # To the device and back.

    def asarray(self, x: np.ndarray) -> Any:
        """Of numpy's numbers, in their dtype, copied where it need be."""

    def to_numpy(self, x: Array) -> np.ndarray:
        """Waits for the device; not of bfloat16."""
        ...

    def to_bytes(self, x: Array) -> bytes: ...
    def from_bytes(self, data: bytes, dtype: Any, shape: Sequence[int]) -> Any: ...

    # Arrays.

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """Of any numbers."""

    def zeros(self, shape: Sequence[int], dtype: Any) -> Any: ...
    def arange(self, start: int, stop: int) -> Any: ...
    def contiguous(self, x: Array) -> Any:
        """`x`, in memory in the order of its axes where it is handed out."""

    def copy(self, x: Array) -> Any:
        """In memory of its own, no larger than need be."""

    def concat(self, arrays: Sequence[Array], axis: int) -> Any: ...
    def stack(self, arrays: Sequence[Array], axis: int) -> Any: ...
    def unstack(self, x: Array, axis: int) -> Sequence[Any]: ...
    def permute_dims(self, x: Array, axes: Sequence[int]) -> Any: ...
    def broadcast_to(self, x: Array, shape: Sequence[int]) -> Any: ...
    def pad(self, x: Array, before: int, after: int) -> Any:
        """Zeros before and after the last axis."""

    # Numbers.

    def where(self, condition: Array, x: Array | float, y: Array | float) -> Any: ...
    def clip(self, x: Array, low: float | None, high: float | None) -> Any: ...
    def maximum(self, x: Array, y: Array) -> Any: ...
    def floor(self, x: Array) -> Any: ...
    def tanh(self, x: Array) -> Any: ...
    def isfinite(self, x: Array) -> Any: ...
    def max(self, x: Array, axis: int) -> Any: ...
    def sum_kept(self, x: Array) -> Any:
        """Over the last axis, which stays as one of 1."""

    def vector_norm(self, x: Array) -> Any:
        """Over the last axis, in float32."""

    def take(self, x: Array, indices: Array) -> Any:
        """x[i] for each of `indices`, uint8; `x` has one axis."""

    def searchsorted(self, levels: Array, x: Array) -> Any:
        """uint8, how many of the sorted `levels`, 255 at most, are not above each number."""
