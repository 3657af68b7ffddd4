"""What the compiled module shows to others in its process."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from tqai import _core


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="needs Linux and nm")
def test_it_exports_nothing_but_what_python_looks_for() -> None:
    """A compiler that links its standard library statically puts all of it into the module."""
    listed = ["nm", "--dynamic", "--defined-only", "--format=just-symbols", _core.__file__]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
    assert names == ["PyInit__core"]


@pytest.mark.parametrize("order", ["tqai._core, torch", "torch, tqai._core"])
def test_it_may_come_before_or_after_torch(order: str) -> None:
    pytest.importorskip("torch")
    program = f"import {order}; torch.ones(1); tqai._core.KvCache(batch=1, kv_heads=1, head_dim=16)"
    subprocess.run([sys.executable, "-c", program], check=True)
