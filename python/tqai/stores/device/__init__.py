"""The store that lies on a framework's device: the C++ library's tiles, in operations on arrays.

``store`` is what others use, over any framework's ``operations``; under it, ``rows`` hold tokens,
exact ones and ``pages`` of tiles, which ``attend`` reads; ``codec`` makes tiles (``packing``), less
their ``centres`` (``centre_sets``, ``phasors``); ``positions`` says where tokens stand, and
``serialize`` writes and reads the C++ library's bytes. No framework is imported here.
"""

from tqai.stores.device.codec import MAX_NORM, Options
from tqai.stores.device.packing import TILE_TOKENS
from tqai.stores.device.store import DeviceStore

__all__ = ["MAX_NORM", "TILE_TOKENS", "DeviceStore", "Options"]
