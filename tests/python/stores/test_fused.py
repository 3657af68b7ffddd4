"""Prompts by torch's fused attention over pages that are opened, beside array operations.

On the CPU, where caches of all dtypes are computed with in float32; CUDA's own is tried where there
is a GPU (test_cuda.py).
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from tqai.stores.device import Options, attend
from tqai.stores.for_torch import fused
from tqai.stores.for_torch.operations import TorchOperations
from tqai.stores.for_torch.torch_store import TorchStore

CPU = torch.device("cpu")
ROPE = tuple(10000.0 ** (-i / 32) for i in range(0, 32, 2)), "half_split", 32
BATCH, HEADS, GROUP, DIM, TOKENS, QUERIES = 2, 2, 3, 32, 5000, 90


@pytest.fixture(scope="module")
def store() -> TorchStore:
    """Of sinks, two pages and a tail, the second row's first 30 tokens padding."""
    generator = torch.Generator("cpu").manual_seed(1)
    shape = BATCH, HEADS, TOKENS, DIM
    keys, values = (torch.randn(shape, generator=generator, device="cpu") for _ in range(2))
    made = TorchStore(
        Options(HEADS, DIM, DIM, "float32", 4, 3, 4, 16, "auto", "auto", ROPE), BATCH, CPU
    )
    made.append(keys[:, :, :100] + 1, values[:, :, :100])
    made.set_padding([0, 30])
    made.append(keys[:, :, 100:] + 1, values[:, :, 100:])
    made.seal()
    assert [len(rows.pages) for rows in made.rows] == [2, 2]
    return made


def asked(kind: str) -> dict[str, Any]:
    generator = torch.Generator("cpu").manual_seed(2)
    if kind == "bool mask":
        seen = torch.rand(BATCH, 1, QUERIES, TOKENS, generator=generator, device="cpu") > 0.4
        seen[1, 0, 7] = False  # this query sees nothing
        return {"mask": seen}
    if kind == "added mask":
        heads = HEADS * GROUP
        return {"mask": torch.randn(1, heads, QUERIES, TOKENS, generator=generator, device="cpu")}
    return {
        "plain": {},
        "all see all": {"causal": False},
        "window": {"window": 4300},
        "first token": {"first_token": 4500},
        "scale": {"scale": -0.3},
        "sinks": {"sinks": torch.linspace(-1, 1, HEADS * GROUP, device="cpu")},
    }[kind]


KINDS = ["plain", "all see all", "window", "first token", "scale", "sinks", "bool mask"]


@pytest.mark.parametrize("kind", [*KINDS, "added mask"])
def test_it_is_what_array_operations_give(kind: str, store: TorchStore) -> None:
    generator = torch.Generator("cpu").manual_seed(3)
    shape = BATCH, HEADS * GROUP, QUERIES, DIM
    queries, options = torch.randn(shape, generator=generator, device="cpu"), asked(kind)
    with mock.patch.object(fused, "attention", wraps=fused.attention) as called:
        given = store.attend(queries, **options)
    assert called.call_count >= 4  # two rows of sinks and a tail, and what pages are seen
    with mock.patch.object(attend, "FEW_QUERIES", QUERIES * GROUP):
        expected = store.attend(queries, **options)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("options", [{"soft_cap": 5.0}, {"scale": 0.0}])
def test_what_it_cannot_do_is_left_to_array_operations(
    options: dict[str, Any], store: TorchStore
) -> None:
    with mock.patch.object(fused, "attention") as called:
        output = store.attend(torch.randn(BATCH, HEADS * GROUP, QUERIES, DIM), **options)
    assert not called.called and output.isfinite().all()


def test_which_dtypes_and_dimensions_it_takes() -> None:
    ops = TorchOperations(CPU)
    assert ops.fused_dtype("bfloat16", 64, 64) == torch.float32
    assert ops.fused_dtype("bfloat16", 64, 96) is None
    with (
        mock.patch.object(torch.version, "cuda", "13.0"),
        mock.patch.object(torch.cuda, "get_device_capability", lambda _: (7, 5)),
    ):
        gpu = TorchOperations(torch.device("cuda", 0))
        assert gpu.fused_dtype("float16", 64, 96) == torch.float16
        assert gpu.fused_dtype("bfloat16", 64, 96) is None
        assert gpu.fused_dtype("float32", 60, 64) is None
