"""What mlx's arrays become in the compiled cache, beside what torch's become."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_mlx import compiled_alone, mx

# isort: split
from tqai.mlx.arrays import rows_contiguous
from tqai.mlx.attention.masks import Meaning
from tqai.mlx.cache import store
from tqai.mlx.model.geometry import LayerShape
from tqai.settings import Settings
from tqai.shapes.rope import Rope
from tqai.stores import for_torch as stores

pytestmark = compiled_alone
DTYPES = ["float32", "float16", "bfloat16"]
KV_HEADS, DIM, VALUE_DIM = 2, 64, 32
ROPE = Rope(tuple(10000 ** (-2 * f / DIM) for f in range(DIM // 2)), "half_split")


def both(dtype: str, *shape: int) -> tuple[torch.Tensor, Any]:
    """The same numbers for each framework, with the strides that projections leave."""
    rng = np.random.default_rng(sum(shape))
    numbers = rng.standard_normal((shape[0], shape[2], shape[1], shape[3]), np.float32)
    theirs = torch.from_numpy(numbers).to(getattr(torch, dtype)).transpose(1, 2)
    ours = mx.array(numbers).astype(getattr(mx, dtype)).transpose(0, 2, 1, 3)
    return theirs, ours


def filled(settings: Settings, dtype: str, count: int = 300, rows: int = 1) -> tuple[Any, Any]:
    keys = both(dtype, rows, KV_HEADS, count, DIM)
    values = both(dtype, rows, KV_HEADS, count, VALUE_DIM)
    theirs = stores.make_store(settings, ROPE, keys[0], values[0], keys[0].dtype, keeps_sinks=True)
    shape = LayerShape(0, KV_HEADS, DIM, VALUE_DIM, rope=ROPE)
    ours = store.make_store(settings, shape, rows, keys[1].dtype)
    stores.append(theirs, keys[0], values[0])
    k, v = (rows_contiguous(both[1]) for both in (keys, values))
    ours.append(k[1], v[1])
    theirs.seal()
    ours.seal()
    return theirs, ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_both_frameworks_make_the_same_bytes(bits: int, dtype: str) -> None:
    theirs, ours = filled(Settings(bits_k=bits, bits_v=9 - bits), dtype)
    assert ours.packed_tokens(0) > 0 and ours.serialize() == theirs.serialize()


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_frameworks_read_the_same_numbers(dtype: str) -> None:
    theirs, ours = filled(Settings(), dtype, rows=2)
    queries = both(dtype, 2, 4, 3, DIM)
    mask = np.random.default_rng(5).random((3, 300)) < 0.7
    sinks = np.ones(4, np.float32)
    for given, says, options in (
        (None, Meaning(causal=False), {"causal": False}),
        (None, Meaning(causal=True, window=70), {"causal": True, "window": 70}),
        (mask, mx.array(mask), {"causal": False, "mask": torch.from_numpy(mask)[None, None]}),
        (mask, mx.array(mask[:1]), {"causal": False, "mask": torch.from_numpy(mask)[None, None]}),
    ):
        if given is not None and says.shape[0] == 1:
            options = {**options, "mask": options["mask"][:, :, :1].expand(-1, -1, 3, -1)}
        expected = stores.attend(
            theirs, queries[0], scale=0.3, sinks=torch.from_numpy(sinks), **options
        )
        given = store.attend(ours, queries[1], 0, 0.3, says, sinks)
        assert given.dtype == getattr(mx, dtype)
        assert np.array_equal(
            np.array(given.astype(mx.float32)), expected.transpose(1, 2).float().numpy()
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_frameworks_get_the_same_numbers_back(dtype: str) -> None:
    theirs, ours = filled(Settings(), dtype)
    expected = stores.gather(theirs, 7, 280, (getattr(torch, dtype),) * 2)
    given = store.gather(ours, 7, 280, (getattr(mx, dtype),) * 2)
    for one, other in zip(given, expected, strict=True):
        assert np.array_equal(np.array(one.astype(mx.float32)), other.float().numpy())


def test_scattered_rows_are_copied_first() -> None:
    shape = LayerShape(0, KV_HEADS, DIM, DIM)
    ours = store.make_store(Settings(), shape, 1, mx.float32)
    keys = both("float32", 1, KV_HEADS, DIM, 9)[1].swapaxes(2, 3)
    copied, where = rows_contiguous(keys)
    ours.append(where, where)
    given, _ = store.gather(ours, 0, 9, (mx.float32, mx.float32))
    assert mx.array_equal(given, keys)
