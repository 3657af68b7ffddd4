"""tqai as LMCache's serde: chunks of keys and values travel as tiles, a fifth of bfloat16.

``import tqai.lmcache`` registers the serde "tqai" with LMCache, where that is installed, and an L2
adapter of that name; in an L2 adapter's configuration the serde stands as ``{"type": "tqai",
"head_dim": 128, "bits_k": 4, …}`` (docs/scale.md). ``python -m tqai.lmcache`` is LMCache's own
command with both registered.

- ``serde``: LMCache's classes around ``tqai.exchange.chunk``;
- ``adapter``: an L2 adapter over a folder or Redis that takes chunks one by one;
- ``description``: what the serde needs to know of a model of transformers'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tqai.requirements import needs

needs("lmcache", "torch", what="tqai as LMCache's serde")

from tqai.exchange.chunk import ChunkCodec  # noqa: E402
from tqai.exchange.chunk_options import ChunkOptions  # noqa: E402
from tqai.lmcache.adapter import TqaiL2Adapter, TqaiL2AdapterConfig  # noqa: E402
from tqai.lmcache.serde import TqaiDeserializer, TqaiSerializer, create, register  # noqa: E402

if TYPE_CHECKING:
    from tqai.lmcache.description import describe

__all__ = [
    "ChunkCodec",
    "ChunkOptions",
    "TqaiDeserializer",
    "TqaiL2Adapter",
    "TqaiL2AdapterConfig",
    "TqaiSerializer",
    "create",
    "describe",
    "register",
]

register()


def __getattr__(name: str) -> Any:  # it imports transformers
    if name == "describe":
        from tqai.lmcache.description import describe

        return describe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
