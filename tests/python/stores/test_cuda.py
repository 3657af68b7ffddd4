"""CUDA's kernels: compiled where NVRTC is installed, run where there is a GPU.

What they compute with all that attention takes, test_metal.py says of the same source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from tqai.stores.device import Options, attend
from tqai.stores.for_torch import cuda
from tqai.stores.for_torch.torch_store import TorchStore
from tqai.stores.gpu import kernels
from tqai.stores.gpu.cuda import program

GPU = torch.device("cuda", 0)
ROPE = tuple(10000.0 ** (-i / 64) for i in range(0, 64, 2)), "half_split", 64
OPTIONS = Options(2, 64, 64, "float32", 4, 2, 4, 16, "auto", "auto", ROPE)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU of NVIDIA's here")


def nvrtc_works() -> bool:
    try:
        from cuda.bindings import nvrtc

        return nvrtc.nvrtcVersion()[0] == nvrtc.nvrtcResult.NVRTC_SUCCESS
    except Exception:  # not installed, or its library is not
        return False


@pytest.mark.skipif(
    not nvrtc_works(), reason="NVRTC is not installed (cuda-bindings, nvidia-cuda-nvrtc)"
)
@pytest.mark.parametrize(
    "capability, widths", [((7, 5), [4]), ((9, 0), range(1, 9)), ((99, 0), [4])]
)
def test_they_compile(capability: tuple[int, int], widths: Sequence[int]) -> None:
    """Also for GPUs that NVRTC does not know yet."""
    made = [kernels.attend_kernel(bits, 9 - bits, 32, 24, 3) for bits in widths]
    made += [kernels.merge_kernel(80), kernels.centre_kernel(30, 5)]
    for kernel in made:
        assert kernel.name.encode() in cuda.compiled(kernel, capability)
    broken = replace(made[0], body="nonsense;")
    with pytest.raises(RuntimeError, match="nonsense"):
        cuda.compiled(broken, capability)


def test_the_arguments_are_inputs_outputs_and_the_grid() -> None:
    text = program(kernels.merge_kernel(48))
    signature = text[text.rindex("tqai_merge_48(") :].partition(")")[0]
    assert signature == (
        "tqai_merge_48(const float* maxima, const float* sums, const float* outputs, "
        "const float* previous_max, const float* previous_sum, const float* previous_output, "
        "tqai::Sizes sizes, float* maximum, float* sum, float* output, uint3 groups, uint threads"
    )


def test_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "_works", lambda: True)
    assert cuda.cuda_attention(GPU) is not None
    assert cuda.cuda_attention(torch.device("cpu")) is None
    monkeypatch.setenv("TQAI_CUDA", "0")
    assert cuda.cuda_attention(GPU) is None
    monkeypatch.setenv("TQAI_CUDA", "yes")
    with pytest.raises(ValueError, match="TQAI_CUDA='yes'; allowed: 0"):
        cuda.cuda_attention(GPU)
    monkeypatch.delenv("TQAI_CUDA")
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm's
    assert cuda.cuda_attention(GPU) is None


def test_without_bindings_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    cuda._works.cache_clear()
    with pytest.warns(UserWarning, match=r"cuda-bindings==12\.\*.*TQAI_CUDA=0"):
        assert cuda.cuda_attention(GPU) is None
    cuda._works.cache_clear()


@needs_gpu
@pytest.mark.parametrize("bits", [(4, 2), (3, 3), (8, 1), (5, 7)])
@pytest.mark.parametrize("rope", [ROPE, None])
def test_they_give_what_array_operations_give(bits: tuple[int, int], rope: Any) -> None:
    torch.manual_seed(1)
    keys, values = torch.randn(2, 2, 2, 5000, 64, device=GPU)
    store = TorchStore(replace(OPTIONS, bits_k=bits[0], bits_v=bits[1], rope=rope), 2, GPU)
    store.append(keys + 1, values)
    store.seal()
    for count in (1, 5):
        queries = torch.randn(2, 6, count, 64, device=GPU)
        mask = torch.rand(2, 1, count, 5000, device=GPU) > 0.3
        with mock.patch.object(cuda, "run", wraps=cuda.run) as launched:
            given = store.attend(queries, mask=mask)
        assert launched.called
        with mock.patch.dict("os.environ", TQAI_CUDA="0"):
            expected = store.attend(queries, mask=mask)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=2e-6)


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_prompts_by_fused_attention(dtype: str) -> None:
    torch.manual_seed(1)
    given = getattr(torch, dtype)
    keys, values = torch.randn(2, 2, 2, 5000, 64, device=GPU).to(given)
    store = TorchStore(replace(OPTIONS, dtype=dtype), 2, GPU)
    store.append(keys + 1, values)
    store.seal()
    queries = torch.randn(2, 6, 70, 64, device=GPU).to(given)
    mask = torch.rand(2, 1, 70, 5000, device=GPU) > 0.3
    mask[0, 0, 7] = False
    output = store.attend(queries, mask=mask)
    with mock.patch.object(attend, "FEW_QUERIES", 1 << 30):
        expected = store.attend(queries, mask=mask)
    rounding = 1e-5 if dtype == "float32" else torch.finfo(given).eps
    torch.testing.assert_close(output, expected, rtol=4 * rounding, atol=rounding)
