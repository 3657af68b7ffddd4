"""Modules are importable by the names that they had before they were put into rooms."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys

import pytest
import tqai
from tqai import _moved
from tqai.stores.for_torch.torch_store import TorchStore
from tqai.transformers.cache import cache


@pytest.mark.parametrize("name", sorted(_moved._NEW_NAMES))
def test_an_old_name_gives_the_module_itself(name: str) -> None:
    assert importlib.import_module(name) is importlib.import_module(_moved._NEW_NAMES[name])


def test_the_function_patch_stays_a_function() -> None:
    code = "import tqai.patch; from tqai.patch import patch; assert tqai.patch is patch"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pickles_that_name_an_old_module_are_read() -> None:
    assert pickle.loads(b"ctqai.cache\nTqaiCache\n.") is cache.TqaiCache
    assert pickle.loads(b"ctqai.stores.torch_ops.store\nTorchStore\n.") is TorchStore


def test_a_name_that_never_was_is_an_import_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"tqai\.nothing"):
        importlib.import_module("tqai.nothing")
    assert not hasattr(tqai, "nothing")
