"""Modules by the names that they had before they were put into rooms.

``from tqai.cache import TqaiCache`` goes on working, and so do pickles that name it: both give the
module where it is now.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_ROOMS = {
    "measure": ("fidelity", "recall", "reproduce", "resident", "text", "time_kernels")
    + ("time_model", "time_prefill", "timing"),
    "transformers": ("hooks",),
    "transformers.attention": ("view",),
    "transformers.cache": ("cache", "encoder_decoder", "layer"),
    "transformers.model": ("devices", "geometry"),
}
_NEW_NAMES = {
    **{f"tqai.{name}": f"tqai.{room}.{name}" for room, names in _ROOMS.items() for name in names},
    "tqai.attention": "tqai.transformers.attention.functions",
    "tqai.files": "tqai.transformers.files.save_load",
    "tqai.models": "tqai.transformers.loading",
    "tqai.named": "tqai.measure.named_settings",
    "tqai.original": "tqai.transformers.attention.original",
    "tqai.prefill": "tqai.transformers.attention.stepwise_prefill",
    "tqai.refs": "tqai.stores.for_torch.tensor_refs",
    "tqai.rope": "tqai.transformers.model.find_rope",
    "tqai.stores.rope": "tqai.shapes.rope",
    "tqai.stores.tensor_refs": "tqai.stores.for_torch.tensor_refs",
    "tqai.stores.torch_ops": "tqai.stores.for_torch",
    "tqai.stores.torch_ops.store": "tqai.stores.for_torch.torch_store",
    "tqai.transformers.model.heads": "tqai.shapes.heads",
}


class _Finder(MetaPathFinder, Loader):
    """Asked for what no other finder has found."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in _NEW_NAMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # What stands here afterwards is what the import gives (importlib's own rule).
        sys.modules[module.__name__] = import_module(_NEW_NAMES[module.__name__])


def install() -> None:
    """Makes the old names importable. May be called again."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
