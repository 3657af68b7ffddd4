"""Caches on devices that the C++ kernels do not reach: the same codes, in torch operations."""

from tqai.stores.torch_ops.codec import MAX_NORM, Options
from tqai.stores.torch_ops.packing import TILE_TOKENS
from tqai.stores.torch_ops.store import TorchStore

__all__ = ["MAX_NORM", "TILE_TOKENS", "Options", "TorchStore"]
