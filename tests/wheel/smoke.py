"""What an installed wheel must do where there is numpy and nothing else: run as a program, outside
of the checkout."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata

import numpy as np
import tqai
from tqai import _core
from tqai.stores.gpu import kernels

HEADS, DIM, TOKENS = 2, 64, 500


def tensor(array: np.ndarray) -> tuple[int, _core.DType, tuple[int, ...], tuple[int, ...]]:
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return array.ctypes.data, _core.DType.float32, array.shape, strides


def attention(level: str, keys: np.ndarray, values: np.ndarray, query: np.ndarray) -> np.ndarray:
    cache = _core.KvCache(batch=1, kv_heads=HEADS, head_dim=DIM, bits_k=8, bits_v=8, level=level)
    cache.append(tensor(keys), tensor(values))
    cache.seal()
    assert cache.packed_tokens(0) == 320  # all but sinks, window and what fills no tile
    cache = _core.KvCache.deserialize(cache.serialize(), level=level)
    output = np.empty((1, 1, HEADS, DIM), np.float32)
    cache.attend(tensor(query), tensor(output))
    return output


def check_attention() -> None:
    random = np.random.default_rng(5)
    keys, values = random.standard_normal((2, 1, HEADS, TOKENS, DIM), dtype=np.float32)
    query = random.standard_normal((1, HEADS, 1, DIM), dtype=np.float32)
    scores = query @ keys.swapaxes(2, 3) / np.sqrt(DIM)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    exact = (weights @ values / weights.sum(-1, keepdims=True)).swapaxes(1, 2)
    outputs = [attention(level, keys, values, query) for level in _core.available_levels()]
    for output in outputs:
        assert np.linalg.norm(output - exact) < 0.03 * np.linalg.norm(exact)
        np.testing.assert_array_equal(output, outputs[0])


def check_quantizer() -> None:
    vectors = np.random.default_rng(6).standard_normal((100, DIM), dtype=np.float32)
    quantizer = tqai.Quantizer(DIM, bits=4)
    decoded = quantizer.decode(*quantizer.encode(vectors))
    assert 0.005 < np.sum((decoded - vectors) ** 2) / np.sum(vectors**2) < 0.02


def check_files() -> None:
    assert kernels.source().startswith("// Softmax attention over sealed tiles")


def check_package() -> None:
    assert tqai.__version__ == metadata.version("tqai")
    try:
        tqai.patch(object())
    except ImportError as error:  # torch is no requirement
        assert "pip install torch transformers" in str(error), error
    except ValueError:  # it is there all the same
        pass
    else:
        raise AssertionError("patch took an object that is no model")
    info = subprocess.run(
        [sys.executable, "-m", "tqai", "info"], capture_output=True, text=True, check=True
    )
    assert re.search(rf"^tqai +{re.escape(tqai.__version__)}$", info.stdout, re.M), info.stdout


if __name__ == "__main__":
    check_package()
    check_files()
    check_quantizer()
    check_attention()
    print("tqai", tqai.__version__, "at", ", ".join(_core.available_levels()))
