"""Metal kernels in mlx's device store: the text that mlx itself makes of them, run as C++."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import metal_double
import numpy as np
import pytest
from small_mlx import error, make_model, mx, read, tokens

# isort: split
import tqai
from tqai.stores.device import Options
from tqai.stores.for_mlx import MlxStore, metal
from tqai.stores.for_mlx.operations import MlxOperations
from tqai.stores.gpu.attention import GpuAttention

OPTIONS = Options(2, 64, 64, "float32", 4, 2, 4, 16, "auto", "auto", None)
ROPE = tuple(10000.0 ** (-i / 32) for i in range(0, 32, 2)), "half_split", 32

metal_kernel = mx.fast.metal_kernel


class Kernel:
    """What ``mx.fast.metal_kernel`` gives where there is Metal; here its text is run as C++."""

    launches = 0
    texts: dict[tuple[str, tuple[bool, ...]], str] = {}

    def __init__(self, **description: Any) -> None:
        self.description = description

    def __call__(self, *, inputs: Sequence[mx.array], **launch: Any) -> list[mx.array]:
        text = self.text(inputs, launch)
        given = [np.array(each, order="C") for each in inputs]  # mlx copies what is not contiguous
        made = [np.full(shape, np.nan, np.float32) for shape in launch["output_shapes"]]
        Kernel.launches += 1
        group = map(min, launch["threadgroup"], launch["grid"])
        metal_double.run(text, [*given, *made], launch["grid"], (*group,), seed=Kernel.launches)
        return [mx.array(each) for each in made]

    def text(self, inputs: Sequence[mx.array], launch: dict[str, Any]) -> str:
        """What mlx compiles: it writes it into exported functions, where there is no Metal, too."""
        key = self.description["name"], tuple(each.size < 8 for each in inputs)
        if key not in Kernel.texts:

            def traced(*arrays: mx.array) -> list[mx.array]:
                return metal_kernel(**self.description)(inputs=list(arrays), **launch)

            with TemporaryDirectory() as folder:
                path = Path(folder) / "kernel.mlxfn"
                mx.export_function(str(path), traced, *inputs)
                data = path.read_bytes()
            start = data.index(self.description["header"].encode())
            length = int.from_bytes(data[start - 8 : start], "little")
            Kernel.texts[key] = data[start : start + length].decode()
        return Kernel.texts[key]


@contextmanager
def kernels_run() -> Iterator[None]:
    """As on Metal."""
    with (
        mock.patch.object(MlxOperations, "tile_kernel", lambda _: GpuAttention(metal.run)),
        mock.patch.object(mx.fast, "metal_kernel", Kernel),
    ):
        yield


def with_kernels(store: MlxStore, queries: mx.array, **options: Any) -> mx.array:
    """``store.attend`` with kernels, which are launched where tokens are packed."""
    before = Kernel.launches
    with kernels_run():
        output = store.attend(queries, **options)
        mx.eval(output)
    assert Kernel.launches > before
    return output


def filled(options: Options, batch: int, count: int) -> MlxStore:
    store = MlxStore(options, batch)
    append(store, count)
    store.seal()
    return store


def append(store: MlxStore, count: int) -> None:
    options = store.options
    dtype = getattr(mx, options.dtype)
    keys = mx.random.normal((store.batch, options.kv_heads, count, options.head_dim))
    keys = keys + 2.0 * mx.arange(options.head_dim).sin()
    values = mx.random.normal((store.batch, options.kv_heads, count, options.value_head_dim))
    store.append(keys.astype(dtype), values.astype(dtype))


def assert_near(given: mx.array, expected: mx.array) -> None:
    assert given.dtype == expected.dtype and given.shape == expected.shape
    rounding = 3e-6 if given.dtype == mx.float32 else mx.finfo(given.dtype).eps
    both = (np.array(each.astype(mx.float32)) for each in (given, expected))
    np.testing.assert_allclose(*both, rtol=2 * rounding, atol=rounding)


@pytest.mark.parametrize("centering", ["none", "mean", "rope"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_attention_is_that_of_array_operations(dtype: str, centering: str) -> None:
    mx.random.seed(1)
    store = filled(replace(OPTIONS, dtype=dtype, centering=centering, rope=ROPE), 2, 400)
    queries = mx.random.normal((2, 8, 3, 64)).astype(getattr(mx, dtype))
    lowest = float(np.finfo(np.float32).min)
    seen = mx.random.uniform(shape=(2, 8, 3, 400)) > 0.4
    for options in (
        {},
        {"causal": False, "soft_cap": 2.0},
        {"window": 150, "sinks": mx.random.normal((8,))},
        {"mask": seen},
        {"mask": mx.where(seen[:1, :1], mx.random.normal((1, 1, 3, 400)), lowest)},
    ):
        assert_near(with_kernels(store, queries, **options), store.attend(queries, **options))


def test_pages_and_shared_rows() -> None:
    mx.random.seed(2)
    store = filled(OPTIONS, 2, 4300)
    store.select([1, 1, 0])
    append(store, 20)
    queries = mx.random.normal((3, 2, 1, 64))
    assert_near(with_kernels(store, queries), store.attend(queries))


def test_arrays_of_less_than_eight_numbers(tmp_path: Path) -> None:
    """mlx has them in another address space, for which it compiles another kernel."""
    mx.random.seed(3)
    store = filled(replace(OPTIONS, kv_heads=1, bits_k=2), 1, 300)
    store.crop(10)
    queries = mx.random.normal((1, 1, 1, 64))
    mask = mx.random.normal((1, 1, 1, 10))
    for options in ({}, {"mask": mask}):
        assert_near(with_kernels(store, queries, **options), store.attend(queries, **options))
    small = {name for name, few in Kernel.texts if "attend_k2" in name and sum(few) >= 5}
    assert small == {"tqai_attend_k2v2_64x64_1"}
    for number, text in enumerate(Kernel.texts.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert metal_double.address_space_errors(text, folder) == ""


def test_a_model_decodes_as_with_array_operations() -> None:
    model, text = make_model("llama"), tokens(310)
    settings: dict[str, Any] = {"backend": "mlx-ops", "residual_window": 32}
    expected = read(model, tqai.patch(model, **settings), text, [300, *[1] * 10])
    before = Kernel.launches
    with kernels_run():
        given = read(model, tqai.patch(model, **settings), text, [300, *[1] * 10])
    assert Kernel.launches >= before + 10 * 2 * 2  # steps, layers, attention and merging
    assert error(given, expected) < 1e-5


def test_a_kernel_that_does_not_compile_says_how_to_do_without() -> None:
    store = filled(replace(OPTIONS, bits_k=7, bits_v=7), 1, 100)
    broken = mock.Mock(side_effect=RuntimeError("[metal::Device] Unable to build metal library"))
    match = "k7v7_64x64_1 failed: .metal::Device. Unable.*TQAI_METAL=0"
    with (
        kernels_run(),
        mock.patch.object(mx, "eval", broken),
        pytest.raises(RuntimeError, match=match),
    ):
        store.attend(mx.random.normal((1, 2, 1, 64)))


def test_kernels_are_for_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MlxOperations().tile_kernel() is None or mx.metal.is_available()
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert isinstance(MlxOperations().tile_kernel(), GpuAttention)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert MlxOperations().tile_kernel() is None
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setenv("TQAI_METAL", "0")
    assert MlxOperations().tile_kernel() is None
