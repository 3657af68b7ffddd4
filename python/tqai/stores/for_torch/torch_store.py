"""The device store in torch's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tqai import _core
from tqai.stores.device import DeviceStore, Options
from tqai.stores.for_torch.operations import TorchOperations


class TorchStore(DeviceStore):
    """See ``DeviceStore``; its arrays are tensors on one device."""

    ops: TorchOperations

    def __init__(self, options: Options, batch: int, device: torch.device) -> None:
        """Empty, on `device`.

        Raises:
            ValueError: for options out of range.
        """
        super().__init__(options, batch, TorchOperations(device))

    @property
    def device(self) -> torch.device:
        return self.ops.device

    @classmethod
    def deserialize(
        cls, data: bytes, device: torch.device, key_bases: Sequence[_core.KeyBasis] = ()
    ) -> TorchStore:
        """The store that was serialized, on `device`.

        key_bases: those that its keys may be in.

        Raises:
            ValueError: for other bytes, and for keys in another basis.
        """
        store = cls.__new__(cls)
        store._read(data, TorchOperations(device), key_bases)
        return store

    def __getstate__(self) -> tuple[bytes, torch.device]:
        return self.serialize(with_basis=True), self.device

    def __setstate__(self, state: tuple[bytes, Any]) -> None:
        data, device = state
        self._read(data, TorchOperations(device))
