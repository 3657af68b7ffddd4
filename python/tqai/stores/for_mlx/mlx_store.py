"""The device store in mlx's arrays."""

from __future__ import annotations

from tqai.stores.device import DeviceStore, Options
from tqai.stores.for_mlx.operations import MlxOperations


class MlxStore(DeviceStore):
    """See ``DeviceStore``; its arrays are mlx's. What reads it computes nothing yet."""

    ops: MlxOperations

    def __init__(self, options: Options, batch: int) -> None:
        """Empty.

        Raises:
            ValueError: for options out of range.
        """
        super().__init__(options, batch, MlxOperations())

    @classmethod
    def deserialize(cls, data: bytes) -> MlxStore:
        """The store that was serialized.

        Raises:
            ValueError: for other bytes, and where keys are in a basis that they only name.
        """
        store = cls.__new__(cls)
        store.__setstate__(data)
        return store

    def __getstate__(self) -> bytes:
        return self.serialize(with_basis=True)

    def __setstate__(self, state: bytes) -> None:
        self._read(state, MlxOperations())
