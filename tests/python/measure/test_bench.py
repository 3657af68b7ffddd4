"""``tqai bench``: what is timed, what the figures mean, and what it refuses. No time is judged."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from tqai import _core
from tqai.cli import main
from tqai.measure import time_kernels, time_model, torch_decoder
from tqai.measure.decoder import COMPRESSED, DYNAMIC, Variant
from tqai.measure.time_kernels import SDPA, Shape
from tqai.measure.time_model import ModelTime
from tqai.measure.timing import in_turns, ratio
from tqai.settings import Settings
from tqai.transformers.serving.paged import serves_requests

KERNELS = ("bench", "kernels", "--dim", "32", "--group", "2", "--kv-heads", "2", "--tokens", "100",
           "--rounds", "1")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(toy.folder(tmp_path_factory.mktemp("toy")))


@pytest.fixture(autouse=True)
def keeping(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the verbs set for the whole process: --threads a variable; and what malloc keeps, which
    is noted here instead."""
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    noted: list[bool] = []

    def keep() -> bool:
        noted.append(True)
        return len(noted) % 2 == 1

    monkeypatch.setattr("tqai.measure.timing.keep_freed_memory", keep)
    return noted


@contextmanager
def here() -> Iterator[Callable[..., Any]]:
    """This process in place of a fresh one."""

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        with _LOCK:
            return function(*arguments)

    yield call
    time_model._decoders.clear()


_LOCK = threading.Lock()


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json", "--threads", "1"]) == 0
    return json.loads(capsys.readouterr().out)


def test_calls_take_turns() -> None:
    order: list[str] = []
    slow = threading.Event()

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            slow.wait(0.021)  # longer than a turn, so that a turn is one call

        return run

    steps: list[Any] = []
    times = in_turns(
        {"a": call("a"), "b": call("b")},
        rounds=5,
        seconds=0,
        progress=lambda *step: steps.append(step),
    )
    assert order == ["a", "a", "b", "b"] + ["a", "b"] * 3  # and three rounds in any case
    assert [len(each) for each in times.values()] == [3, 3]
    assert steps[-1] == (2, 5, "b")
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2
    with pytest.raises(ValueError, match="rounds=0: expected at least 1"):
        in_turns({}, rounds=0, seconds=1)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("centering", ["mean", "rope"])
def test_all_ways_give_the_same(queries: int, centering: str) -> None:
    setting = Settings(bits_k=8, bits_v=8, sink_tokens=0, residual_window=0, centering=centering)
    shape = Shape(dim=64, group=3, kv_heads=2, tokens=1100, queries=queries)
    with torch.inference_mode():
        outputs = {way.key: way.call() for way in time_kernels.ways(shape, [setting])}
    assert len(outputs) == (7 if queries == 1 else 5)
    exact = outputs[f"{SDPA} float32"]
    for name, output in outputs.items():
        assert output.shape == (1, queries, 6, 64), name
        assert (output - exact).norm() < 0.03 * exact.norm(), name


def test_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = run_json(capsys, *KERNELS, "--bits", "k4v4", "k2v3", "--level", "scalar")
    rows = result["rows"]
    packed = [row for row in rows if row["name"] == "tqai"]
    assert [(row["bits"], row["centering"]) for row in packed] == [
        ("k4v4", "mean"), ("k4v4", "rope"), ("k2v3", "mean"), ("k2v3", "rope")
    ]  # fmt: skip
    assert [(row["name"], row["dtype"]) for row in rows[4:]] == [
        (name, dtype)
        for dtype in ("float32", "bfloat16")
        for name in ("torch SDPA", "torch SDPA, rows", "torch matmul, rows")
    ]
    # 2 heads of 32 coordinates, keys and values; a tile of 64 tokens, with norms, and 36 exact
    assert rows[4]["bytes_read"] == 100 * 2 * 2 * 32 * 4
    assert rows[7]["bytes_read"] == 100 * 2 * 2 * 32 * 2
    assert packed[0]["bytes_read"] == 2 * (64 * (32 + 4) + 36 * 2 * 32 * 4)
    assert [row["is_best_torch"] for row in rows].count(True) == 1
    for row in rows:
        assert row["threads"] == 1
        assert row["shape"] == {
            "dim": 32, "group": 2, "kv_heads": 2, "tokens": 100, "queries": 1,
            "layers": 1,
        }  # fmt: skip
        assert row["level"] == ("scalar" if row["name"] == "tqai" else None)
        seconds = row["microseconds"] / 1e6
        assert row["nanoseconds_per_token_head"] == pytest.approx(seconds * 1e9 / 200)
        rate = row["bytes_read"] / seconds
        assert row["gigabytes_per_second"] == pytest.approx(rate / 1e9)
        assert row["bandwidth_share"] == pytest.approx(rate / result["bandwidth"])
        if row["is_best_torch"]:
            assert row["times_best_torch"] == 1 and row["bits"] is None


def test_layers_are_read_in_turn_and_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: list[int] = []
    made = time_kernels._torch

    def noted(shape: Shape, dtype: torch.dtype, *states: torch.Tensor) -> Any:
        tensors.append(states[1].data_ptr())
        return made(shape, dtype, *states)

    def constant(calls: dict[str, Callable[[], Any]], **_: Any) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [0.3 if "SDPA" in name else 0.6] * 3 for name in calls}

    monkeypatch.setattr(time_kernels, "_torch", noted)
    monkeypatch.setattr(time_kernels, "in_turns", constant)
    shape = Shape(dim=32, group=2, kv_heads=1, tokens=70, queries=1, layers=3)
    (result,) = time_kernels.time_kernels([shape], ["k4v4"], rounds=1, seconds=0)
    assert len(set(tensors)) == 3  # one a layer, which both dtypes are made of
    packed, sdpa = result.rows[:2]
    assert packed.microseconds == pytest.approx(0.2e6)
    assert packed.nanoseconds_per_token_head == pytest.approx(0.2e9 / 70)
    assert packed.times_best_torch == 0.5
    assert sdpa.microseconds == pytest.approx(0.1e6)
    assert sdpa.bytes_read == 70 * 2 * 32 * 4
    assert result.bandwidth == pytest.approx(time_kernels.BUFFER_BYTES / 0.6)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_is_kept() -> None:
    """What was freed is given out again without the system clearing its pages anew."""
    code = """
import resource
import torch
from tqai.measure.timing import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)  # 40 MB, beyond what glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
without = [faults() for _ in range(20)]
keep_freed_memory()
kept = [faults() for _ in range(40)]  # until pieces that fit have been freed
print(sum(without), sum(kept[20:]))
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    without, kept = map(int, run.stdout.split())
    if without < 2000:
        pytest.skip("the system does not count pages, or malloc kept them already")
    assert kept < without / 10, (without, kept)


def test_kernels_table_of_each_shape(
    capsys: pytest.CaptureFixture[str], keeping: list[bool]
) -> None:
    verb = (*KERNELS, "--tokens", "64", "130", "--queries", "1", "3", "--bits", "small")
    assert main(verb) == 0
    text = capsys.readouterr().out
    for queries in (1, 3):
        for tokens in (64, 130):
            assert (
                f"d=32 G=2 kv_heads=2 tokens={tokens} layers=1 queries={queries} threads=" in text
            )
    assert text.count("(best)") == 4
    assert keeping == [True] and "What is freed is kept by the process" in text
    assert text.count(f"tqai k2v2 mean {_core.default_level()} float32") == 4
    assert "sum over\n256 MB" in text


def test_kernels_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.svg"
    assert main([*KERNELS, "--bits", "k4v2", "--plot", str(file)]) == 0
    assert "<svg" in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "--tokens", "0"], "tokens=0: expected at least 1"),
        (["kernels", "--kv-heads", "-1"], "kv_heads=-1: expected at least 1"),
        (["kernels", "--layers", "0"], "layers=0: expected at least 1"),
        (["kernels", "--dim", "4"], "head_dim"),
        (["kernels", "--bits", "4"], "expected the bits of keys and values first"),
        (["kernels", "--bits", "k9v4"], "bits_k=9: expected an integer from 1 to 8"),
        (["kernels", "--bits", "k4v4,sinks=1"], "expected no more than bits"),
        (["kernels", "--rounds", "0"], "rounds=0: expected at least 1"),
        (["kernels", "--plot", "no/plot.png"], "no folder"),
        (["model", "--contexts", "64", "0"], "contexts=0: expected at least 1"),
        (["model", "--tokens", "0"], "tokens=0: expected at least 1"),
        (["model", "--bits-k", "9"], "bits_k=9: expected an integer from 1 to 8"),
        (["model", "--caches", "quantized"], "optimum-quanto and hqq, is installed"),
    ],
)
def test_user_errors(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(torch_decoder, "quantized_backend", lambda: None)
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("tqai: ") and message in printed.err


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short text to tokenize, and no look at the process, which collects garbage first."""
    monkeypatch.setattr(torch_decoder, "resident_bytes", lambda: 1000)
    monkeypatch.setattr(torch_decoder, "prose", lambda: "A short text. " * 40)


def times(folder: str, variants: list[Variant], contexts: list[int], **how: Any) -> list[ModelTime]:
    found = time_model.time_model(variants, contexts, here, model=folder, threads=1, **how)
    return [row for rows in found for row in rows]


@pytest.mark.usefixtures("quick")
def test_model_rows(folder: str) -> None:
    settings = {"bits_k": 4, "bits_v": 2, "residual_window": 32, "level": "scalar"}
    variants = [
        Variant(kind, dtype, settings if kind == COMPRESSED else {})
        for dtype in ("float32", "bfloat16")
        for kind in (DYNAMIC, COMPRESSED)
    ]
    steps: list[Any] = []
    rows = times(
        folder, variants, [70, 500], prefill=200, tokens=5, progress=lambda *s: steps.append(s)
    )
    assert [(row.context, row.cache, row.dtype) for row in rows] == [
        (context, variant.kind, variant.dtype) for context in (70, 500) for variant in variants
    ]
    assert steps[0] == (0, 40, "loading") and steps[-1][:2] == (40, 40)
    for row in rows:
        assert row.repeated == (300 if row.context == 500 else 0)
        assert (row.steps, row.threads, row.model) == (5, 1, folder)
        assert row.milliseconds > 0 and row.times_dynamic is not None
        # the steps that count and two before them; 2 layers, 2 sides, 2 heads of 16
        exact = (row.context + 7) * 2 * 2 * 2 * 16 * (4 if row.dtype == "float32" else 2)
        if row.cache == DYNAMIC:
            assert (row.cache_bytes, row.times_dynamic) == (exact, 1)
            assert (row.bits, row.level, row.packed_tokens) == (None, None, None)
        else:
            assert (row.bits, row.level) == ("k4v2", "scalar")
            assert row.packed_tokens == (448 if row.context == 500 else 0)
            assert row.context == 70 or row.cache_bytes < exact
        json.dumps(asdict(row))


@pytest.mark.usefixtures("quick")
def test_what_is_decoded_is_the_contexts_continuation(folder: str) -> None:
    """A cache that was filled goes on as one that was read."""
    logits = []
    for prefill in (200, 100):
        decoder = torch_decoder.TorchDecoder(Variant(DYNAMIC, "float32"), folder, prefill, 300, 1)
        decoder.fill(100)
        assert decoder._cache.get_seq_length() == 102
        logits.append(decoder._cache.layers[0].keys[:, :, :100])
    assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.usefixtures("quick")
def test_model_without_dynamic_rows_has_no_ratio(folder: str) -> None:
    (row,) = times(folder, [Variant(COMPRESSED, "float32")], [64], prefill=64, tokens=1)
    assert row.times_dynamic is None


def test_learned_positions_end() -> None:
    class Config:
        max_position_embeddings = 64

        def get_text_config(self) -> Config:
            return self

    torch_decoder._check_length(Config(), 64)
    with pytest.raises(ValueError, match="the model takes 64"):
        torch_decoder._check_length(Config(), 65)


def test_model(capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path) -> None:
    """In processes of their own, with all that is printed."""
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.svg"
    verb = ("bench", "model", "--model", folder, "--contexts", "400", "64", "--tokens", "2",
            "--prefill", "300", "--dtypes", "float32", "--window", "16",
            "--caches", "quantized", "tqai")  # fmt: skip
    assert main([*verb, "--plot", str(file), "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert "1 threads, median of 2 tokens" in text
    assert f"tqai k4v2 {_core.default_level()} float32" in text
    assert "Context 400: 300 tokens were read by the model; 100 repeat" in text
    assert "Context 64" not in text
    if torch_decoder.quantized_backend() is None:
        assert "QuantizedCache: not measured" in text
    assert "<svg" in file.read_text()


@pytest.mark.usefixtures("quick")
def test_model_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setattr("tqai.cli.bench.fresh_process", here)
    verb = ("bench", "model", "--model", folder, "--contexts", "64", "--tokens", "1", "--prefill",
            "64", "--dtypes", "float32", "--caches", "dynamic")  # fmt: skip
    result = run_json(capsys, *verb)
    assert result["notes"] == []
    assert [set(row) for row in result["rows"]] == [set(ModelTime.__dataclass_fields__)]


PEAK = """
import sys
from tqai.measure.resident import peak_resident_bytes, reset_peak, resident_bytes
assert resident_bytes() is None or resident_bytes() > 0
if not reset_peak():
    sys.exit("the system does not tell")
floor = peak_resident_bytes()
large = b"x" * (64 << 20)
del large
peak = peak_resident_bytes()
assert peak - floor > 56 << 20, (floor, peak)
assert reset_peak() and peak_resident_bytes() < peak - (56 << 20)
"""


def test_peak_of_the_process() -> None:
    """In a process of its own: the system takes memory back from one that holds much idle."""
    ran = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=False)
    if "the system does not tell" in ran.stderr.splitlines():
        pytest.skip(ran.stderr)
    assert ran.returncode == 0, ran.stderr


def test_prefill(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    verb = ["bench", "prefill", "--model", folder, "--tokens", "300", "--rounds", "2"]
    assert main([*verb, "--json", "--threads", "1"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["tokens"] == 300 and row["packed_tokens"] == 128 and row["rounds"] == 2
    assert 0 < row["sealing_milliseconds"] and 0 < row["dynamic_milliseconds"]
    assert row["sealing_share"] > 0 and row["times_dynamic"] > 0
    assert main(verb) == 0
    assert "DynamicCache ms" in capsys.readouterr().out
    assert main(["bench", "prefill", "--model", folder, "--tokens", "0"]) == 2
    assert "tokens=[0]: expected at least 1" in capsys.readouterr().err


@pytest.mark.skipif(not serves_requests(), reason="a paged cache of another interface")
def test_requests(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    verb = ["bench", "requests", "--model", folder, "--lengths", "40", "230", "--tokens", "6"]
    verb += ["--rounds", "1", "--threads", "1", "--window", "16"]
    assert main([*verb, "--json"]) == 0
    times = json.loads(capsys.readouterr().out)
    assert times["lengths"] == [40, 230] and times["rounds"] == 1 and times["new_tokens"] == 6
    assert times["paged_tokens_per_second"] > 0 and times["tqai_tokens_per_second"] > 0
    assert times["times_paged"] > 0 and 0 <= times["same_tokens"] <= 2
    assert main(verb) == 0
    assert "requests got the same tokens" in capsys.readouterr().out
    assert main([*verb, "--tokens", "1"]) == 2
    assert "new_tokens=1" in capsys.readouterr().err
    assert main([*verb, "--lengths", "1000000"]) == 2
    assert "the text's" in capsys.readouterr().err


def test_store(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    verb = ["bench", "store", "--model", folder, "--tokens", "384", "--chunk", "128"]
    verb += ["--read", "8", "--rounds", "1", "--threads", "1"]
    assert main([*verb, "--exact-first", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    names = ["bfloat16", "fp8 (e4m3)", "K4/V4", "K4/V2", "K4/V2, trellis", "K2/V2"]
    names.append("K4/V2, first 2 exact")
    assert [row["name"] for row in result["formats"]] == names
    sizes = {row["name"]: row["bytes"] for row in result["formats"]}
    assert sizes["bfloat16"] == 2 * sizes["fp8 (e4m3)"] > sizes["K4/V4"] > sizes["K4/V2"]
    errors = {row["name"]: row["kl"] for row in result["formats"]}
    assert errors["bfloat16"] < errors["K4/V4"] < errors["K2/V2"]
    assert all(row["fetch_seconds"]["1"] > row["fetch_seconds"]["400"] for row in result["formats"])
    assert all(row["later_kl"] > 0 for row in result["formats"])
    assert len(result["in_process_kl"]) == 2 and min(result["in_process_kl"]) > 0
    assert result["prefix_tokens"] == 4 + 64 * ((384 - 4 - 128) // 64)
    assert result["read_seconds"] > 0 and result["with_prefix_seconds"] > 0
    [shelf] = result["shelves"]
    assert shelf["put_gigabytes"] > 0 and shelf["fetch_gigabytes"] > 0
    assert main(verb) == 0
    assert "as fast as reading at" in capsys.readouterr().out
    assert main(["bench", "store", "--model", folder, "--chunk", "100"]) == 2
    assert "multiple of 64" in capsys.readouterr().err
