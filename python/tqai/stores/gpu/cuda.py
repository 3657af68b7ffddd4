"""The text of a kernel for CUDA, which compiles ``attend.metal`` with ``metal_stdlib.cuh``."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from tqai.stores.gpu.kernels import SIMD, Kernel, source

MOST_SIZES = 16
"""Numbers that "sizes" has room for."""

_PLACES = {
    "simdgroup_index_in_threadgroup": f"threadIdx.x / {SIMD}u",
    "thread_index_in_simdgroup": f"threadIdx.x % {SIMD}u",
    "thread_index_in_threadgroup": "threadIdx.x",
    "threadgroup_position_in_grid": "group",
    "thread_position_in_grid": "thread_at",
}
_NUMBERS = {"sizes": "tqai::Sizes", "soft_cap": "tqai::Cap"}


@lru_cache(maxsize=1)
def header() -> str:
    """What ``source`` includes as ``metal_stdlib``."""
    return Path(__file__).with_name("metal_stdlib.cuh").read_text(encoding="utf-8")


def program(kernel: Kernel) -> str:
    """The source with the kernel after it.

    Its arguments are the inputs and outputs in their order, the host's numbers by value, then how
    many threadgroups there are (uint3) and how many threads along the first axis (uint).
    Threadgroups are of one dimension, and numbered along one, as CUDA has few along the others.
    """
    arguments = [f"{_NUMBERS.get(name, f'const {kind}*')} {name}" for name, kind in kernel.inputs]
    arguments += [f"float* {name}" for name in kernel.outputs]
    arguments += ["uint3 groups", "uint threads"]
    places = "".join(f"  const {kind} {name} = {_PLACES[name]};\n" for kind, name in kernel.places)
    body = kernel.body.replace("threadgroup float4", "__shared__ tqai::float4")
    return f"""{source()}
extern "C" __global__ void {kernel.name}({", ".join(arguments)}) {{
  const uint3 group = {{blockIdx.x % groups.x, blockIdx.x / groups.x % groups.y,
                       blockIdx.x / groups.x / groups.y}};
  const uint3 thread_at = {{group.x * blockDim.x + threadIdx.x, group.y, group.z}};
  if (thread_at.x >= threads) return;
{places}{body}}}
"""
