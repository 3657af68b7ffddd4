"""The device store imports no framework."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import importlib, pkgutil, sys
import tqai.stores.device as room

for module in pkgutil.iter_modules(room.__path__, room.__name__ + "."):
    importlib.import_module(module.name)
assert room.DeviceStore
assert not {"torch", "mlx", "mlx.core", "transformers"} & set(sys.modules), "a framework"
"""


def test_it_imports_no_framework() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)
