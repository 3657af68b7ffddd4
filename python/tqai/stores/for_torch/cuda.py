"""Kernels for tensors on NVIDIA's GPUs: compiled by NVRTC when they are first called.

``cuda-bindings``, which torch 2.10 and newer bring along with CUDA, reaches NVRTC and the driver.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from tqai.stores.gpu import cuda, kernels
from tqai.stores.gpu.attention import GpuAttention, Grid, Numbers

_ENOUGH_SIMDGROUPS = 2048
_UINT3 = ctypes.c_uint * 3
_SIZES = ctypes.c_int64 * cuda.MOST_SIZES


def cuda_attention(device: torch.device) -> GpuAttention | None:
    """That of tensors on `device`, where it is one of NVIDIA's and kernels are wanted."""
    # torch.compile cannot look into kernels, and makes its own of array operations.
    usable = device.type == "cuda" and torch.version.cuda is not None
    if not usable or torch.compiler.is_compiling() or not kernels.wanted(kernels.CUDA):
        return None
    return GpuAttention(run, _ENOUGH_SIMDGROUPS) if _works() else None


@lru_cache(maxsize=1)
def _works() -> bool:
    """Whether NVRTC is to be had; says once what is missing."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except Exception as error:  # what the bindings raise for a missing library is their own
        warnings.warn(
            "packed tokens on CUDA are read by torch's operations, several times slower than by "
            f"tqai's kernels, which need NVRTC ({error}): pip install "
            f"'cuda-bindings=={str(torch.version.cuda).partition('.')[0]}.*' as torch's CUDA is, "
            f"or set {kernels.CUDA}=0 to stay without",
            stacklevel=2,
        )
        return False
    return True


def run(
    kernel: kernels.Kernel,
    inputs: Sequence[torch.Tensor | Numbers],
    shapes: Sequence[tuple[int, ...]],
    grid: Grid,
    group: Grid,
) -> list[torch.Tensor]:
    """See ``tqai.stores.gpu.attention.Run``; on the current stream of the tensors' device.

    Raises:
        RuntimeError: where NVRTC cannot compile the kernel, or the driver not launch it.
    """
    from cuda.bindings import driver

    given = [x.contiguous() if isinstance(x, torch.Tensor) else x for x in inputs]
    device = next(x.device for x in given if isinstance(x, torch.Tensor))
    outputs = [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
    blocks = [-(-threads // size) for threads, size in zip(grid, group, strict=True)]
    arguments = [_argument(x) for x in (*given, *outputs)]
    arguments += [_UINT3(*blocks), ctypes.c_uint(grid[0])]
    pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    with torch.cuda.device(device):
        function, stream = _loaded(kernel, device.index), torch.cuda.current_stream(device)
        launch = math.prod(blocks), 1, 1, group[0], 1, 1, 0, stream.cuda_stream
        result = driver.cuLaunchKernel(function, *launch, ctypes.addressof(pointers), 0)
    try:
        _done(result)
    except RuntimeError as error:
        raise kernels.refused(kernel, error, kernels.CUDA) from error
    return outputs


def _argument(given: torch.Tensor | Numbers) -> Any:
    if isinstance(given, torch.Tensor):
        return ctypes.c_void_p(given.data_ptr())
    if isinstance(given[0], float):
        return ctypes.c_float(given[0])
    return _SIZES(*given)


@lru_cache(maxsize=1024)
def _loaded(kernel: kernels.Kernel, device: int) -> Any:
    """The function, in the context of a device, which is the current one."""
    from cuda.bindings import driver

    try:
        binary = compiled(kernel, torch.cuda.get_device_capability(device))
        (module,) = _done(driver.cuModuleLoadData(binary))
        (function,) = _done(driver.cuModuleGetFunction(module, kernel.name.encode()))
    except RuntimeError as error:
        raise kernels.refused(kernel, error, kernels.CUDA) from error
    return function


def compiled(kernel: kernels.Kernel, capability: tuple[int, int]) -> bytes:
    """Code for GPUs of a compute capability; what they compile, where NVRTC is older than they.

    Needs no GPU.

    Raises:
        RuntimeError: where it does not compile, with what NVRTC says.
    """
    from cuda.bindings import nvrtc

    wanted = 10 * capability[0] + capability[1]
    (known,) = _done(nvrtc.nvrtcGetSupportedArchs())
    most = max((each for each in known if each <= wanted), default=wanted)
    options = [
        f"--gpu-architecture={'sm' if most == wanted else 'compute'}_{most}",
        "--std=c++17",
        "--device-as-default-execution-space",
    ]
    text, header = cuda.program(kernel), cuda.header()
    (program,) = _done(
        nvrtc.nvrtcCreateProgram(
            text.encode(), b"attend.metal", 1, [header.encode()], [b"metal_stdlib"]
        )
    )
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(_log(program))
        get = nvrtc.nvrtcGetCUBIN if most == wanted else nvrtc.nvrtcGetPTX
        size = nvrtc.nvrtcGetCUBINSize if most == wanted else nvrtc.nvrtcGetPTXSize
        data = bytes(_done(size(program))[0])
        _done(get(program, data))
        return data
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _log(program: Any) -> str:
    from cuda.bindings import nvrtc

    log = bytes(_done(nvrtc.nvrtcGetProgramLogSize(program))[0])
    _done(nvrtc.nvrtcGetProgramLog(program, log))
    return log.rstrip(b"\0").decode(errors="replace")


def _done(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a function of NVRTC's or the driver's gave, without its error, which is 0."""
    error, *given = result
    if error.value != 0:
        raise RuntimeError(error.name)
    return tuple(given)
