"""TurboQuant compression of transformers' key/value caches, with attention from the packed bytes.

``import tqai`` needs numpy only; torch and transformers, or mlx-lm, are imported at the first
``patch`` of a model of theirs.

A map of the package, from what users call down to the bits; a room imports only from those below:

- ``cli``: the command line, a module a verb;
- ``measure``: what a setting costs in fidelity and brings in memory and speed;
- ``api``: ``patch``, ``unpatch`` and what goes with them, for the framework that a model belongs
  to;
- ``lmcache``: LMCache's serde;
- ``transformers``: the seam into Hugging Face transformers, ``hooks`` its way in;
- ``mlx``: the seam into mlx-lm, beside that one, ``hooks`` its way in;
- ``stores``: what holds a layer's tokens: the C++ cache on the CPU, on other devices
  ``stores.device``, which is written in operations that each framework has its own of:
  ``stores.for_torch`` and ``stores.for_mlx``, each of which imports its own framework alone;
- ``exchange``: packed caches between processes and machines: envelopes, and shelves for them;
- ``container``: the file that a cache lies in;
- ``shapes``: heads and rotary embeddings, as stores and seams speak of them;
- ``signals``: errors of the application's signal handlers, told from others';
- ``remarks``: what a patched model says when it is used without a compressed cache;
- ``reports``: what memory reports say, whatever the framework;
- ``settings``: the knobs, checked, and all names and defaults;
- ``requirements``: says what is not installed;
- ``_core``: the compiled module, bits and attention.

``_moved`` lets modules be imported by the names that they had before they were put into rooms.
"""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

from tqai import requirements

if (_reason := requirements.why_not_compiled()) is not None:
    raise ImportError(_reason, name="tqai._core")

from tqai import _moved, api
from tqai.api import is_patched, new_cache, patch, patched, unpatch
from tqai.requirements import needs_transformers
from tqai.settings import PRESETS, Settings

if TYPE_CHECKING:
    from tqai._core import Codebook, ProdQuantizer, Quantizer
    from tqai.measure.fidelity import Fidelity, evaluate
    from tqai.measure.recall import Recall, needle
    from tqai.transformers.cache.cache import TqaiCache
    from tqai.transformers.cache.encoder_decoder import TqaiEncoderDecoderCache
    from tqai.transformers.files.save_load import load_cache, save_cache
    from tqai.transformers.prefixes.store import PrefixStore

__all__ = [
    "Codebook",
    "Fidelity",
    "PRESETS",
    "PrefixStore",
    "ProdQuantizer",
    "Quantizer",
    "Recall",
    "Settings",
    "TqaiCache",
    "TqaiEncoderDecoderCache",
    "__version__",
    "evaluate",
    "is_patched",
    "load_cache",
    "needle",
    "new_cache",
    "patch",
    "patched",
    "save_cache",
    "unpatch",
]

_moved.install()
# Found here first, so that importing the module by its old name does not hide the function.
sys.modules["tqai.patch"] = api

try:
    __version__ = metadata.version("tqai")
except metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_LAZY = {
    "TqaiCache": "tqai.transformers.cache.cache",
    "TqaiEncoderDecoderCache": "tqai.transformers.cache.encoder_decoder",
    "load_cache": "tqai.transformers.files.save_load",
    "save_cache": "tqai.transformers.files.save_load",
    "PrefixStore": "tqai.transformers.prefixes.store",
    "Fidelity": "tqai.measure.fidelity",
    "evaluate": "tqai.measure.fidelity",
    "Recall": "tqai.measure.recall",
    "needle": "tqai.measure.recall",
    "Codebook": "tqai._core",
    "ProdQuantizer": "tqai._core",
    "Quantizer": "tqai._core",
}


if not TYPE_CHECKING:  # which would take any name for one of these

    def __getattr__(name: str) -> Any:
        """Imports the exports that need torch or the compiled module when they are asked for."""
        if name not in _LAZY:
            raise AttributeError(f"module 'tqai' has no attribute {name!r}")
        # Who has a model of mlx's to evaluate has imported it.
        both = name in ("Fidelity", "Recall", "evaluate", "needle") and "mlx.nn" in sys.modules
        if _LAZY[name] != "tqai._core" and not both:
            needs_transformers()
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
