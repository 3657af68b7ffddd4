"""What is called of the functions in ``attend.metal``, and with what.

A kernel is compiled for widths and dimensions, which stand in its text as numbers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tqai.stores.device.packing import COORDINATE_BLOCK, TILE_TOKENS, padded_dim

SIMDS = 4
"""Simdgroups of a threadgroup."""
SIMD = 32
"""Threads of a simdgroup."""

METAL, CUDA = "TQAI_METAL", "TQAI_CUDA"
_LANGUAGES = {METAL: "Metal", CUDA: "CUDA"}

# Each thread sums up so many numbers of values at most, in registers.
_MOST_SUMS = 64
_MOST_ROWS = 8
_MOST_CENTRE_ROWS = 16
_SHARED_BYTES = 32 << 10  # what every GPU of Apple's has for a threadgroup


@dataclass(frozen=True)
class Kernel:
    """A kernel in text, and what it is called with."""

    name: str
    inputs: tuple[tuple[str, str], ...]
    """Name and element type of each input; "sizes" and "soft_cap" are numbers of the host's."""
    outputs: tuple[str, ...]
    """Names; all are float."""
    places: tuple[tuple[str, str], ...]
    """Type and name of what a thread is told about itself."""
    body: str
    """Names inputs, outputs and places."""


@lru_cache(maxsize=1)
def source() -> str:
    """``attend.metal``, which comes before each kernel."""
    return Path(__file__).with_name("attend.metal").read_text(encoding="utf-8")


def rows_at_once(queries: int, head_dim: int, value_head_dim: int) -> int:
    """How many of a head's queries a simdgroup computes with together."""
    most = _MOST_SUMS * COORDINATE_BLOCK // padded_dim(value_head_dim)
    levels = 2 * 256
    numbers = _SHARED_BYTES // 4 - levels
    most = min(most, _MOST_ROWS, numbers // (padded_dim(head_dim) + SIMDS * TILE_TOKENS))
    return _evenly(queries, max(most, 1))


def centre_rows_at_once(queries: int, pairs: int) -> int:
    """How many queries a threadgroup of ``centre_kernel`` computes with."""
    padded = -(-pairs // 4) * 4
    return _evenly(queries, max(1, min(_MOST_CENTRE_ROWS, _SHARED_BYTES // (2 * 4 * padded))))


def _evenly(count: int, most: int) -> int:
    """The largest of as few parts as there can be, none of which is more than `most`."""
    return -(-count // -(-count // most))


@lru_cache(maxsize=256)
def attend_kernel(
    bits_k: int, bits_v: int, head_dim: int, value_head_dim: int, rows: int
) -> Kernel:
    """Goes through a few tiles of each head; a softmax each."""
    numbers = bits_k, bits_v, head_dim, value_head_dim, rows, SIMDS
    configured = f"tqai::Attend<{', '.join(map(str, numbers))}>"
    inputs = (
        ("queries", "float"),
        ("tiles", "uint8_t"),
        ("held", "int64_t"),
        ("centre", "float"),
        ("bias", "float"),
        ("key_levels", "float"),
        ("value_levels", "float"),
        ("sizes", "int64_t"),
        ("soft_cap", "float"),
    )
    outputs = "maxima", "sums", "outputs"
    places = (
        ("uint", "simdgroup_index_in_threadgroup"),
        ("uint", "thread_index_in_simdgroup"),
        ("uint3", "threadgroup_position_in_grid"),
    )
    arguments = *(name for name, _ in inputs), *outputs, "shared", places[2][1], *_names(places[:2])
    body = (
        f"threadgroup float4 shared[{configured}::kShared];\n"
        f"{configured}::run({', '.join(arguments)});\n"
    )
    return Kernel(
        f"tqai_attend_k{bits_k}v{bits_v}_{head_dim}x{value_head_dim}_{rows}",
        inputs,
        outputs,
        places,
        body,
    )


@lru_cache(maxsize=64)
def merge_kernel(value_head_dim: int) -> Kernel:
    """Makes one state of those of several splits, and of the one before."""
    inputs = (
        ("maxima", "float"),
        ("sums", "float"),
        ("outputs", "float"),
        ("previous_max", "float"),
        ("previous_sum", "float"),
        ("previous_output", "float"),
        ("sizes", "int64_t"),
    )
    outputs = "maximum", "sum", "output"
    places = (("uint3", "thread_position_in_grid"),)
    arguments = *(name for name, _ in inputs), *outputs, *_names(places)
    body = f"tqai::merge<{value_head_dim}>({', '.join(arguments)});\n"
    return Kernel(f"tqai_merge_{value_head_dim}", inputs, outputs, places, body)


@lru_cache(maxsize=64)
def centre_kernel(pairs: int, rows: int) -> Kernel:
    """What queries give with centres that turn, for tiles of consecutive positions."""
    configured = f"tqai::Centres<{pairs}, {rows}>"
    inputs = (
        ("factors", "float"),
        ("fixed", "float"),
        ("tile_cos", "float"),
        ("tile_sin", "float"),
        ("cosines", "float"),
        ("sines", "float"),
        ("sizes", "int64_t"),
    )
    outputs = ("scores",)
    places = ("uint", "thread_index_in_threadgroup"), ("uint3", "threadgroup_position_in_grid")
    arguments = *(name for name, _ in inputs), *outputs, "shared", places[1][1], places[0][1]
    body = (
        f"threadgroup float4 shared[{configured}::kShared];\n"
        f"{configured}::run({', '.join(arguments)});\n"
    )
    return Kernel(f"tqai_centre_{pairs}_{rows}", inputs, outputs, places, body)


def _names(places: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    return tuple(name for _, name in places)


def refused(kernel: Kernel, error: Exception, switch: str) -> RuntimeError:
    """What is said where a framework cannot compile or run a kernel; `switch` as for ``wanted``."""
    return RuntimeError(
        f"the {_LANGUAGES[switch]} kernel {kernel.name} failed: {error}. With {switch}=0 in the "
        "environment array operations take its place"
    )


def wanted(switch: str) -> bool:
    """Whether kernels are to be used where they can be: unless the environment's `switch` is 0.

    switch: ``METAL`` or ``CUDA``.

    Raises:
        ValueError: where it is neither 0 nor 1.
    """
    value = os.environ.get(switch, "1")
    if value not in ("0", "1"):
        raise ValueError(
            f"{switch}={value!r}; allowed: 0, array operations in place of {_LANGUAGES[switch]} "
            "kernels, and 1"
        )
    return value == "1"
