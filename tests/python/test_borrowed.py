"""``_core.borrowed``: an array's memory as the compiled module takes it."""

from __future__ import annotations

import numpy as np
import pytest
from tqai import _core

DTYPES = {"float32": np.float32, "float16": np.float16, "bool": np.bool_}


@pytest.mark.parametrize("name", DTYPES)
def test_it_says_where_and_what_the_elements_are(name: str) -> None:
    array = np.zeros((2, 3, 4, 8), DTYPES[name]).transpose(0, 2, 1, 3)[:, 1:, ::2]
    address, dtype, shape, strides = _core.borrowed(array)
    assert address == array.__array_interface__["data"][0]
    assert dtype is _core.DType[name]
    assert shape == array.shape
    assert strides == tuple(stride // array.itemsize for stride in array.strides)


def test_a_dtype_that_numpy_has_no_name_for_is_given() -> None:
    array = np.zeros((2, 8), np.uint16)
    assert _core.borrowed(array, _core.DType.bfloat16)[1] is _core.DType.bfloat16


@pytest.mark.parametrize("dtype", [np.int32, np.float64, np.uint16])
def test_other_elements_are_refused(dtype: type) -> None:
    with pytest.raises(ValueError, match="bool, float32, float16 or bfloat16 needed"):
        _core.borrowed(np.zeros(3, dtype))


def test_a_dtype_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="elements of 4 bytes; the dtype has 2"):
        _core.borrowed(np.zeros(3, np.float32), _core.DType.bfloat16)


def test_what_has_no_memory_is_refused() -> None:
    with pytest.raises(TypeError, match="bytes-like"):
        _core.borrowed(3)


def test_what_may_only_be_read_is_no_place_for_results() -> None:
    cache = _core.KvCache(batch=1, kv_heads=2, head_dim=32)
    tokens = np.random.default_rng(0).standard_normal((1, 2, 10, 32), np.float32)
    tokens.flags.writeable = False
    cache.append(_core.borrowed(tokens), _core.borrowed(tokens))
    queries, output = np.ones((1, 8, 1, 32), np.float32), np.zeros((1, 1, 8, 32), np.float32)
    output.flags.writeable = False
    assert _core.borrowed(output)[4:] == (True,)
    with pytest.raises(ValueError, match="output is read-only"):
        cache.attend(_core.borrowed(queries), _core.borrowed(output))
    with pytest.raises(ValueError, match="keys is read-only"):
        cache.gather(0, _core.borrowed(tokens), _core.borrowed(tokens))
    assert not output.any()


def test_an_array_is_let_go_afterwards() -> None:
    array = bytearray(4)
    _core.borrowed(np.frombuffer(array, np.float32))
    array.clear()  # BufferError where somebody still has it
