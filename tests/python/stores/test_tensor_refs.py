from __future__ import annotations

import pytest
import torch
from tqai import _core
from tqai.stores.for_torch.tensor_refs import DTYPES, mask_ref, ref, rows_contiguous


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


def test_memory_that_no_tensor_has_is_refused() -> None:
    cache = _core.KvCache(batch=1, kv_heads=2, head_dim=16)
    tokens = torch.rand(1, 2, 5, 16)
    address, dtype, shape, strides = ref(tokens)

    def appended(address: int = address, strides: tuple[int, ...] = strides) -> None:
        given = address, dtype, shape, strides
        cache.append(given, given)

    with pytest.raises(ValueError, match="multiple of 4 bytes"):
        appended(address + 2)
    with pytest.raises(ValueError, match="no data"):
        appended(0)
    with pytest.raises(ValueError, match="out of any memory"):
        appended(strides=(0, -(2**63), 16, 1))
    appended()
    queries, output = torch.rand(1, 2, 1, 16), torch.empty(1, 1, 2, 16)
    with pytest.raises(ValueError, match="output overlaps the queries"):
        cache.attend(ref(queries), ref(queries.transpose(1, 2)))
    with pytest.raises(ValueError, match="keys overlaps values"):
        cache.gather(0, ref(tokens), ref(tokens))
    with pytest.raises(ValueError, match="sink_scores lies at an address"):
        cache.attend(ref(queries), ref(output), sink_scores=queries.data_ptr() + 1)
    with pytest.raises(ValueError, match="positions lies at an address"):
        places = torch.arange(6)
        cache.append(ref(tokens), ref(tokens), (places.data_ptr() + 4, (1, 1, 5), (0, 0, 1)))
    assert cache.tokens == 5


def test_addresses_of_other_devices_are_refused() -> None:
    elsewhere = torch.empty(1, 2, 5, 16, device="meta")
    for reference in (ref, mask_ref):
        with pytest.raises(ValueError, match="a tensor on meta.*allowed: on the CPU"):
            reference(elsewhere)


def test_log_sum_exp_of_what_queries_saw_and_threads_by_number() -> None:
    cache = _core.KvCache(batch=1, kv_heads=1, head_dim=16)
    keys = torch.randn(1, 1, 20, 16)
    cache.append(ref(keys), ref(torch.randn(1, 1, 20, 16)), threads=2)
    assert cache.seal(threads=2) == 0
    queries, output, logs = (
        torch.randn(1, 2, 3, 16),
        torch.empty(1, 3, 2, 16),
        torch.empty(1, 3, 2, 1),
    )
    cache.attend(ref(queries), ref(output), log_sum_exp=ref(logs), causal=False, threads=1)
    scores = queries.double() @ keys.double().mT / 4
    torch.testing.assert_close(logs[..., 0].mT.double(), scores.logsumexp(-1), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="threads = -1; allowed: 1"):
        cache.seal(threads=-1)
