"""Metal kernels in torch's device store, run as C++, beside array operations and double precision.

That every width and dimension is right, tests/cpp/metal_test.cpp says.
"""

from __future__ import annotations

import math
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import metal_double
import numpy as np
import pytest
import torch
from tqai.stores.device import Options
from tqai.stores.device import attend as device_attend
from tqai.stores.device.attend import FEW_QUERIES
from tqai.stores.device.codec import codec_of
from tqai.stores.for_torch import metal
from tqai.stores.for_torch.operations import TorchOperations
from tqai.stores.for_torch.torch_store import TorchStore
from tqai.stores.gpu import attention, kernels
from tqai.stores.gpu import metal as gpu_metal
from tqai.stores.gpu.attention import GpuAttention

CPU = torch.device("cpu")
ROPE = tuple(10000.0 ** (-i / 32) for i in range(0, 32, 2)), "half_split", 32
OPTIONS = Options(2, 64, 64, "float32", 4, 2, 4, 16, "auto", "auto", None)


class Library:
    """What ``torch.mps.compile_shader`` gives: here the text is run as C++."""

    launches = 0

    def __init__(self, text: str) -> None:
        self.text = text

    def __getattr__(self, name: str) -> Any:
        assert f"void {name}(" in self.text

        def call(*arguments: Any, threads: Sequence[int], group_size: Sequence[int]) -> None:
            buffers = []
            for argument in arguments:
                if isinstance(argument, torch.Tensor):
                    assert argument.is_contiguous()
                    buffers.append(argument.numpy())
                else:  # as torch passes lists of numbers
                    kind = np.int64 if isinstance(argument[0], int) else np.float32
                    buffers.append(np.array(argument, kind))
            Library.launches += 1
            metal_double.run(self.text, buffers, threads, group_size, seed=Library.launches)

        return call


def with_kernels(
    store: TorchStore, queries: torch.Tensor, enough_simdgroups: int = 256, **options: Any
) -> torch.Tensor:
    """``store.attend`` as on MPS; kernels are launched where tokens are packed."""
    before, kernel = Library.launches, GpuAttention(metal.run, enough_simdgroups)
    with (
        mock.patch.object(TorchOperations, "tile_kernel", lambda _: kernel),
        mock.patch.object(torch.mps, "compile_shader", Library),
    ):
        output = store.attend(queries, **options)
    assert (Library.launches > before) == (queries.shape[2] > 0 and pages(store) > 0)
    return output


def pages(store: TorchStore) -> int:
    return sum(len(rows.pages) for rows in store.rows)


def filled(options: Options, batch: int, count: int, mean: float = 0.0) -> TorchStore:
    store = TorchStore(options, batch, CPU)
    dtype = getattr(torch, options.dtype)
    keys = torch.randn(batch, options.kv_heads, count, options.head_dim)
    keys += mean * torch.arange(options.head_dim).sin()
    values = torch.randn(batch, options.kv_heads, count, options.value_head_dim)
    store.append(keys.to(dtype), values.to(dtype))
    store.seal()
    return store


@pytest.mark.parametrize(
    "bits_k, bits_v, dim, value_dim",
    [
        *((2, 8, 64, 64), (3, 7, 80, 80), (4, 6, 96, 96), (5, 5, 128, 128), (6, 4, 256, 256)),
        *((7, 3, 128, 64), (8, 2, 64, 128), (1, 4, 24, 40)),
    ],
)
def test_widths_and_dimensions(bits_k: int, bits_v: int, dim: int, value_dim: int) -> None:
    torch.manual_seed(dim)
    options = replace(OPTIONS, bits_k=bits_k, bits_v=bits_v, head_dim=dim, value_head_dim=value_dim)
    store = filled(options, 2, 400, 1.0)
    queries = torch.randn(2, 8, 1, dim)
    torch.testing.assert_close(
        with_kernels(store, queries), store.attend(queries), rtol=1e-5, atol=2e-6
    )


def test_attention_is_that_of_double_precision_over_pages() -> None:
    torch.manual_seed(3)
    store = filled(replace(OPTIONS, rope=ROPE, centering="rope"), 1, 4700, 2.0)
    assert pages(store) == 2
    queries = torch.randn(1, 4, 2, 64)
    keys, values = (
        part.double().repeat_interleave(2, 1)
        for part in store.gather(0, store.tokens, (torch.float32, torch.float32))
    )
    scores = queries.double() @ keys.mT / 8
    later = torch.arange(store.tokens) > torch.arange(store.tokens - 2, store.tokens)[:, None]
    expected = (scores.masked_fill(later, -math.inf).softmax(-1) @ values).transpose(1, 2)
    given = with_kernels(store, queries)
    torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=2e-6)


class Features:
    """A cache that things were done to, and a way to ask it, drawn at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        choice = self.random.choice
        options = replace(
            OPTIONS,
            dtype=choice(["float32", "bfloat16", "float16"]),
            centering=choice(["none", "mean", "rope"]),
            rope=ROPE,
            sink_tokens=choice([0, 4]),
        )
        batch = choice([1, 3])
        self.store = filled(options, batch, choice([200, 333]), choice([0.0, 2.0]))
        getattr(self, choice(["leave", "crop", "share", "discard", "pad"]))()

    def leave(self) -> None:
        hidden = [self.random.random() < 0.2 for _ in range(self.store.batch * 5)]
        self.store.leave_out(hidden)

    def crop(self) -> None:
        self.store.crop(150)

    def share(self) -> None:
        """Rows that hold the same tiles, and then different tokens."""
        last = self.store.batch - 1
        self.store.select([last, 0, last, last])
        self.append(90, seal=False)

    def discard(self) -> None:
        self.store.discard_before(70)

    def pad(self) -> None:
        self.store.crop(0)
        self.append(300, seal=False)
        self.store.set_padding([7 * row for row in range(self.store.batch)])
        self.store.seal()

    def append(self, count: int, seal: bool = True) -> None:
        options = self.store.options
        dtype = getattr(torch, options.dtype)
        for dim in (options.head_dim,):
            shape = self.store.batch, options.kv_heads, count, dim
            self.store.append(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))
        if seal:
            self.store.seal()

    def question(self) -> tuple[torch.Tensor, dict[str, Any]]:
        store, choice = self.store, self.random.choice
        heads = store.kv_heads * choice([1, 4, 7, 8])
        count = choice([1, 1, 3])
        dtype = getattr(torch, store.options.dtype)
        queries = torch.randn(store.batch, heads, count, store.head_dim).to(dtype)
        options: dict[str, Any] = {
            "first_token": choice([0, 0, store.tokens // 3]),
            "window": choice([0, 0, 150]),
            "soft_cap": choice([0.0, 2.0]),
            "causal": choice([True, False]),
        }
        kind = choice(["none", "none", "bool", "added"])
        if kind != "none":
            tokens = store.tokens - options["first_token"]
            shape = choice([1, store.batch]), choice([1, heads]), count, tokens
            seen = torch.rand(shape) > 0.4
            lowest = torch.finfo(torch.float32).min
            options["mask"] = seen if kind == "bool" else torch.randn(shape).where(seen, lowest)
        if choice([True, False]):
            options["sinks"] = torch.randn(heads)
        return queries, options


@pytest.mark.parametrize("seed", range(24))
def test_features(seed: int) -> None:
    features = Features(seed)
    queries, options = features.question()
    expected = features.store.attend(queries, **options)
    enough = features.random.choice([1, 10, 256])
    given = with_kernels(features.store, queries, enough, **options)
    assert given.dtype == queries.dtype
    rounding = 3e-6 if queries.dtype == torch.float32 else torch.finfo(queries.dtype).eps
    torch.testing.assert_close(given, expected, rtol=2 * rounding, atol=rounding)


@pytest.mark.parametrize("layout, pairs", [("half_split", 32), ("interleaved", 15)])
@pytest.mark.parametrize("first", [0, 7, 1_000_003, (1 << 20) - 200, "apart"])
def test_centres_that_turn(first: int | str, layout: str, pairs: int) -> None:
    torch.manual_seed(5)
    rope = tuple(100.0 ** (-i / pairs) for i in range(pairs)), layout, 2 * pairs
    store = TorchStore(replace(OPTIONS, rope=rope, centering="rope"), 2, CPU)
    step = 3 if first == "apart" else 1
    positions = (0 if first == "apart" else int(first)) + step * np.arange(300)
    keys = torch.randn(2, 2, 300, 64) + 2 * torch.arange(64).sin()
    store.append(keys, torch.randn(2, 2, 300, 64), positions[None, None])
    store.seal()
    queries = torch.randn(2, 6, 3, 64)
    with mock.patch.object(attention, "centre_kernel", wraps=kernels.centre_kernel) as made:
        given = with_kernels(store, queries)
    # Others are left to array operations.
    assert made.called == (first in (0, 7, 1_000_003))
    torch.testing.assert_close(given, store.attend(queries), rtol=2e-5, atol=5e-6)


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    torch.manual_seed(0)
    store = filled(replace(OPTIONS, sink_tokens=0, residual_window=0), 1, 128)
    mask = torch.ones(1, 1, 2, 128, dtype=torch.bool)
    mask[:, :, 0] = False
    output = with_kernels(store, torch.randn(1, 2, 2, 64), mask=mask, causal=False)
    assert (output[:, 0] == 0).all() and (output[:, 1] != 0).all()


# When kernels are used.


def test_kernels_are_for_tensors_on_metal() -> None:
    assert metal.metal_attention(CPU) is None
    assert isinstance(metal.metal_attention(torch.device("mps")), GpuAttention)
    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        assert metal.metal_attention(torch.device("mps")) is None


def test_the_environment_turns_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQAI_METAL", "0")
    assert metal.metal_attention(torch.device("mps")) is None
    monkeypatch.setenv("TQAI_METAL", "yes")
    with pytest.raises(ValueError, match="TQAI_METAL='yes'; allowed: 0"):
        metal.metal_attention(torch.device("mps"))


def test_a_kernel_that_does_not_compile_says_how_to_do_without() -> None:
    store = filled(replace(OPTIONS, bits_k=7, bits_v=7), 1, 100)
    broken = mock.Mock(side_effect=RuntimeError("program_source:1:1: error: unknown type"))
    with (
        mock.patch.object(TorchOperations, "tile_kernel", lambda _: GpuAttention(metal.run)),
        mock.patch.object(torch.mps, "compile_shader", broken),
        pytest.raises(RuntimeError, match="k7v7_64x64_1 failed: program_source.*TQAI_METAL=0"),
    ):
        store.attend(torch.randn(1, 2, 1, 64))


def test_many_queries_are_left_to_matrix_products() -> None:
    with mock.patch.object(TorchOperations, "tile_kernel", lambda _: GpuAttention(metal.run)):
        ops = TorchOperations(CPU)
        codec = codec_of(OPTIONS, ops)
        assert device_attend.tile_kernel(ops, FEW_QUERIES, codec) is not None
        assert device_attend.tile_kernel(ops, FEW_QUERIES + 1, codec) is None
        assert device_attend.tile_kernel(ops, 0, codec) is None
        of_values = codec_of(replace(OPTIONS, value_codes="trellis"), ops)
        assert device_attend.tile_kernel(ops, 1, of_values) is None


# The text.


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256, 512, 1024])
def test_rows_fit_registers_and_threadgroups(dim: int) -> None:
    for value_dim in (16, dim):
        for queries in range(1, 30):
            rows = kernels.rows_at_once(queries, dim, value_dim)
            assert 1 <= rows <= min(queries, 8)
            assert rows == 1 or rows * value_dim <= 16 * 64
            floats = rows * dim + kernels.SIMDS * rows * 64 + 2 * 256
            assert 4 * floats <= 32 << 10
            pairs = dim // 2
            centre_rows = kernels.centre_rows_at_once(queries, pairs)
            assert 1 <= centre_rows <= min(queries, 16)
            assert 4 * centre_rows * 2 * pairs <= 32 << 10
            # No chunk of queries is more than one query shorter than needed.
            chunks = -(-queries // rows)
            assert rows == -(-queries // chunks)


def texts() -> str:
    """The source and kernels of all widths."""
    made = [kernels.attend_kernel(bits, 10 - bits, 64, 80, 7) for bits in range(2, 9)]
    made += [kernels.merge_kernel(80), kernels.centre_kernel(30, 5)]
    return "\n".join([kernels.source(), *map(gpu_metal.function, made)])


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_compilers_have_nothing_to_say(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    path = tmp_path / "kernels.cpp"
    path.write_text(texts(), encoding="utf-8")
    warnings = "pedantic all extra shadow conversion double-promotion error no-attributes".split()
    command = [compiler, "-std=c++14", *(f"-W{warning}" for warning in warnings), "-fsyntax-only"]
    command += ["-Wno-unknown-attributes"] * (compiler == "clang++")
    command += ["-I", str(metal_double.SHIM / "run"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_the_source_has_nothing_that_metal_lacks() -> None:
    code = re.sub(r"//.*", "", kernels.source())
    for lacking in (r"\bdouble\b", r"\bstd::", r"\[[&=]?\]\s*\(", r"\b(new|goto|throw|virtual)\b"):
        assert not re.search(lacking, code), lacking
    assert set(re.findall(r"#include (.*)", code)) == {"<metal_stdlib>"}


def test_address_spaces_are_right(tmp_path: Path) -> None:
    assert metal_double.address_space_errors(texts(), tmp_path) == ""


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("const device uint* lines", "const uint* lines"),
        ("threadgroup float* memory =", "float* memory ="),
        ("const device half* norms", "const threadgroup half* norms"),
        ("const float cap = soft_cap[0]", "const double cap = soft_cap[0]"),
    ],
)
def test_wrong_address_spaces_are_seen(right: str, wrong: str, tmp_path: Path) -> None:
    text = kernels.source() + gpu_metal.function(kernels.attend_kernel(4, 2, 64, 64, 1))
    assert right in text
    assert "error" in metal_double.address_space_errors(text.replace(right, wrong), tmp_path)
