from __future__ import annotations

import pytest
import torch
from tqai import _core
from tqai.stores.tensor_refs import DTYPES, mask_ref, ref, rows_contiguous


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_reference_tells_where_and_how_a_tensor_lies(dtype: torch.dtype) -> None:
    tensor = torch.zeros(2, 3, 5, 8, dtype=dtype).transpose(1, 2)[:, 1:]
    address, kind, shape, strides = ref(tensor)
    assert address == tensor.data_ptr() and kind.name == str(dtype).removeprefix("torch.")
    assert (shape, strides) == ((2, 4, 3, 8), (120, 8, 40, 1))


def test_masks_may_be_bool_and_broadcast() -> None:
    mask = torch.ones(1, 1, 3, 4, dtype=torch.bool).expand(2, 1, 3, 4)
    assert mask_ref(mask)[1:] == (_core.DType.bool, (2, 1, 3, 4), (0, 12, 4, 1))


def test_only_scattered_rows_are_copied() -> None:
    tensor = torch.rand(2, 3, 5, 8)
    assert rows_contiguous(tensor) is tensor
    scattered = tensor.transpose(2, 3)
    copied = rows_contiguous(scattered)
    assert copied.stride(-1) == 1 and torch.equal(copied, scattered)
