"""TurboQuant compression of transformers' key/value caches, with attention from the packed bytes.

``import tqai`` needs numpy only; torch and transformers are imported at the first ``patch``.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

from tqai.patch import new_cache, patch, unpatch

if TYPE_CHECKING:
    from tqai._core import Codebook, ProdQuantizer, Quantizer
    from tqai.cache import TqaiCache
    from tqai.encoder_decoder import TqaiEncoderDecoderCache
    from tqai.fidelity import Fidelity, evaluate
    from tqai.files import load_cache, save_cache
    from tqai.recall import Recall, needle

__all__ = [
    "Codebook",
    "Fidelity",
    "ProdQuantizer",
    "Quantizer",
    "Recall",
    "TqaiCache",
    "TqaiEncoderDecoderCache",
    "__version__",
    "evaluate",
    "load_cache",
    "needle",
    "new_cache",
    "patch",
    "save_cache",
    "unpatch",
]

try:
    __version__ = metadata.version("tqai")
except metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_LAZY = {
    "TqaiCache": "tqai.cache",
    "TqaiEncoderDecoderCache": "tqai.encoder_decoder",
    "load_cache": "tqai.files",
    "save_cache": "tqai.files",
    "Fidelity": "tqai.fidelity",
    "evaluate": "tqai.fidelity",
    "Recall": "tqai.recall",
    "needle": "tqai.recall",
    "Codebook": "tqai._core",
    "ProdQuantizer": "tqai._core",
    "Quantizer": "tqai._core",
}


def __getattr__(name: str) -> Any:
    """Imports the exports that need torch or the compiled module when they are first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'tqai' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
