"""Metal kernels without Metal: texts that a framework would compile, run as C++ (tests/metal)."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

SHIM = Path(__file__).parents[1] / "metal"
_SIGNATURE = re.compile(r"\[\[kernel\]\] void (\w+)\((.*?)\) \{", re.DOTALL)
_BUFFER = re.compile(r"(.+?\*) *(\w+) \[\[buffer\((\d+)\)\]\]")
_PLACE = re.compile(r"(\w+) (\w+) \[\[(\w+)\]\]")
_NUMBERS = {
    "float": np.dtype(np.float32),
    "uint8_t": np.dtype(np.uint8),
    "int64_t": np.dtype(np.int64),
}
_SHARED = re.compile(r"threadgroup (\w+) (\w+)\[(.*?)\];")

_folder = TemporaryDirectory()


def compiler() -> list[str]:
    """A C++ compiler's command; skips the test where the shim cannot be compiled."""
    if sys.platform != "linux":
        pytest.skip("threads of tests/metal/run need Linux's ucontext.h")
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if found is None:
        pytest.skip("no C++ compiler is installed (c++)")
    return shlex.split(found)


def run(
    text: str,
    buffers: Sequence[np.ndarray],
    grid: Sequence[int],
    group: Sequence[int],
    seed: int = 1,
) -> None:
    """Runs the kernel of `text` once in each thread of `grid`; it writes to `buffers`.

    buffers: in the order of the kernel's, each of its element type.
    """
    program, kinds = _compiled(text)
    assert len(kinds) == len(buffers)
    for kind, buffer in zip(kinds, buffers, strict=True):
        assert _NUMBERS[kind] == buffer.dtype, (kind, buffer.dtype)
        assert buffer.flags.c_contiguous
    pointers = (ctypes.c_void_p * len(buffers))(*(buffer.ctypes.data for buffer in buffers))
    sizes = (ctypes.c_uint * 6)(*grid, *group)
    program.launch(pointers, sizes, ctypes.c_uint(seed))


@lru_cache(maxsize=256)
def _compiled(text: str) -> tuple[ctypes.CDLL, tuple[str, ...]]:
    (signature,) = _SIGNATURE.findall(text)
    name, arguments = signature
    kinds, passed = [], []
    for argument in arguments.split(",\n"):
        if buffer := _BUFFER.fullmatch(argument.strip()):
            kind = re.sub(r"\b(const|device|constant)\b|\*", "", buffer[1]).strip()
            assert int(buffer[3]) == len(kinds)
            passed.append(f"static_cast<{kind}*>(buffers[{len(kinds)}])")
            kinds.append(kind)
        else:
            place = _PLACE.fullmatch(argument.strip())
            assert place is not None and place[2] == place[3], argument
            passed.append(f"at.{place[2]}")
    # One for all threads of a threadgroup, not one for each.
    text = _SHARED.sub(r"static metal_shim::Shared<\1, \3> \2;", text)
    text += (
        'extern "C" void launch(void** buffers, const unsigned* sizes, unsigned seed) {\n'
        "  const uint3 grid = {sizes[0], sizes[1], sizes[2]};\n"
        "  const uint3 size = {sizes[3], sizes[4], sizes[5]};\n"
        "  metal_shim::launch(grid, size, seed, [&](const metal_shim::Thread& at) {\n"
        f"    {name}({', '.join(passed)});\n  }});\n}}\n"
    )
    path = Path(_folder.name) / hashlib.sha256(text.encode()).hexdigest()
    path.with_suffix(".cpp").write_text(text, encoding="utf-8")
    _compile("-shared", path.with_suffix(".cpp"), _threads(), "-o", path)
    return ctypes.CDLL(str(path)), tuple(kinds)


@lru_cache(maxsize=1)
def _threads() -> Path:
    path = Path(_folder.name) / "threads.o"
    _compile("-c", SHIM / "run" / "threads.cpp", "-o", path)
    return path


def _compile(*arguments: str | Path) -> None:
    command = [*compiler(), "-std=c++14", "-O1", "-fPIC", "-w", "-I", str(SHIM / "run")]
    subprocess.run([*command, *map(str, arguments)], check=True)


def address_space_errors(text: str, folder: Path) -> str:
    """What Clang says of pointers' address spaces, "" where all are right; skips without Clang."""
    clang = shutil.which("clang++")
    if clang is None:
        pytest.skip("clang++ is not installed, which alone knows address spaces")
    path = folder / "kernel.clcpp"
    path.write_text(text.replace("[[kernel]]", "kernel"), encoding="utf-8")
    lacks = "generic_address_space", "pipes", "device_enqueue", "program_scope_global_variables"
    lacks = *(f"__opencl_c_{each}" for each in (*lacks, "read_write_images", "fp64")), "cl_khr_fp64"
    command = [clang, "-x", "clcpp", "-cl-std=clc++2021", "-target", "spir64", "-fsyntax-only"]
    command += ["-Xclang", f"-cl-ext={','.join(f'-{each}' for each in lacks)}", "-w"]
    command += ["-I", str(SHIM / "address_spaces"), str(path)]
    return subprocess.run(command, capture_output=True, text=True).stderr
