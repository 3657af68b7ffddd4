"""What the device store needs of mlx, and the store in its arrays."""

from tqai.stores.for_mlx.mlx_store import MlxStore

__all__ = ["MlxStore"]
