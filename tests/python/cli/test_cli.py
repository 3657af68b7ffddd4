"""The command line: each verb on a small model, and what it says to users' errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy
from toy import needs_smollm2
from tqai import _core
from tqai.cli import main
from tqai.measure.text import prose

_BASIS_BYTES = 2 * (5 * 16 * 16 - 16) // 2 + 2 * 16 * 16 + 4 * (16 + 3)
"""Of one of the toy model's four heads: FP16 matrices, one of integers, and factors."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(toy.folder(tmp_path_factory.mktemp("toy"), chat=True))


@pytest.fixture(autouse=True)
def _environment() -> Any:
    """--threads sets a variable for the process."""
    before = os.environ.get("OMP_NUM_THREADS")
    yield
    os.environ.pop("OMP_NUM_THREADS", None)
    if before is not None:
        os.environ["OMP_NUM_THREADS"] = before


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(run(capsys, *arguments, "--json", "--threads", "1"))


def test_info(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    result = run_json(capsys, "info", "--model", folder, "--bits-k", "3")
    installation, model = result["installation"], result["model"]
    assert installation["level"] in installation["available_levels"]
    assert installation["threads"] == 1
    assert (model["layers"], model["layers_compressed"]) == (2, 2)
    assert (model["kv_heads"], model["head_dim"]) == ([2], [16])
    # 16 coordinates at 3 and 2 bits and two FP16 norms, for two layers of two heads
    assert model["token_bytes"] == {"sealed": 4 * 14, "bfloat16": 4 * 64, "float32": 4 * 128}
    text = run(capsys, "info", "--model", folder)
    assert "2 layers (2 compressed), 2 key/value heads of 16" in text
    assert "packed at K4/V2" in text
    assert model["attention"] == ["kernel", "kernel"]
    assert "attention over packed tokens: kernel in all layers" in text
    assert installation["openmp"] is (_core.openmp_threads() > 0)


def test_info_counts_skipped_layers_out(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    model = run_json(capsys, "info", "--model", folder, "--skip-layers", "0")["model"]
    assert model["layers_compressed"] == 1
    assert model["attention"] == ["exact", "kernel"]
    assert model["token_bytes"]["bfloat16"] == 2 * 64


def test_info_says_what_bases_take_without_learning_any(
    capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    info = ("info", "--model", folder, "--codec", "adaptive")
    model = run_json(capsys, *info)["model"]
    assert model["basis_bytes_at_most"] == 4 * _BASIS_BYTES
    assert model["settings"]["codec"] == "adaptive"
    assert model["attention"] == ["kernel", "kernel"]
    assert "Bases that keys are quantised in: at most 0.01 MB" in run(capsys, *info)


def test_demo(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    demo = ("demo", "--model", folder, "--context", "600", "--tokens", "8")
    result = run_json(capsys, *demo, "--level", "scalar", "--window", "32")
    plain, compressed = result["plain"], result["compressed"]
    assert result["prompt_tokens"] == 600
    assert result["level"] == "scalar"
    assert len(plain["tokens"]) == len(compressed["tokens"]) == result["tokens_compared"] == 8
    # the last token is not in the cache; 2 layers, 2 sides, 2 heads of 16 in fp32
    assert plain["cache_bytes"] == 607 * 2 * 2 * 2 * 16 * 4
    assert compressed["cache_bytes"] == compressed["report"]["total_bytes"]
    assert compressed["report"]["packed_tokens"] >= 512
    assert 0 <= result["tokens_equal_given_same_text"] <= 8
    for part in (plain, compressed):
        assert part["prefill_seconds"] > 0
        assert part["decode_tokens_per_second"] > 0


def test_demo_with_nothing_sealed_equals_the_plain_cache(
    capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    text = run(capsys, "demo", "--model", folder, "--context", "300", "--tokens", "8",
               "--window", "400", "--threads", "1")  # fmt: skip
    assert "Equal tokens: 8 of 8, the first 8 in a row." in text
    assert "at 8 of 8 places" in text
    assert "0 of 307 tokens are packed" in text


def test_eval(capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(prose()[:1000])
    verb = ("eval", "--model", folder, "--prefill", "200", "--read", "8", "--text", str(text))
    few, many = run_json(capsys, *verb, "--setting", "k2v2", "k8v8,window=16", "--window", "0")
    assert (few["setting"], many["setting"]) == ("k2v2,residual_window=0", "k8v8,window=16")
    assert few["kl_mean"] > many["kl_mean"] > 0
    assert few["tokens_read_packed"] == few["tokens_read"] == 4 * 8
    assert (few["chunk"], many["chunk"]) == (1, 16)
    printed = run(capsys, *verb, "--setting", "k2v2", "--skip-layers", "0")
    assert "k2v2,skip_layers=0: 32 of 32 tokens read packed ones, 16 at a time" in printed
    half = (few["kl_interval"][1] - few["kl_interval"][0]) / 2
    printed = run(capsys, *verb, "--setting", "k2v2", "--window", "0")
    cells = next(line for line in printed.splitlines() if line.startswith("k2v2")).split()
    assert cells[1:3] == [f"{few['kl_mean']:.5f}", f"{half:.5f}"]


def test_eval_of_its_own_continuation_with_seeds_and_tails(
    capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    verb = ("eval", "--model", folder, "--prefill", "200", "--read", "8", "--setting", "k2v2")
    own = ("--own", "--temperature", "0.5", "--seeds", "2", "--tails", "0", "32")
    results = run_json(capsys, *verb, *own)
    assert [each["setting"] for each in results] == [
        "k2v2,residual_window=0",
        "k2v2,residual_window=32",
    ]
    for each in results:
        assert each["own"] and len(each["equal_tokens"]) == 2 * 2 and len(each["kl_by_seed"]) == 2
    printed = run(capsys, *verb, *own)
    equal = ", ".join(map(str, results[0]["equal_tokens"]))
    assert f"k2v2,residual_window=0: {equal}" in printed
    assert "Mean KL over 2 seeds" in printed


def test_eval_in_chunks_with_both_arithmetics(
    capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    verb = ("eval", "--model", folder, "--prefill", "200", "--read", "10", "--chunk", "4")
    both = run_json(capsys, *verb, "--setting", "k2v2", "k2v2,arithmetic=kernel",
                    "--arithmetic", "exact", "--window", "4")  # fmt: skip
    assert [result["setting"] for result in both] == [
        "k2v2,residual_window=4,arithmetic=exact",
        "k2v2,arithmetic=kernel,residual_window=4",
    ]
    assert both[0]["kl_mean"] != both[1]["kl_mean"]
    assert both[0]["tokens_read_packed"] == 4 * 10


def test_eval_plot(capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.svg"
    verb = ("eval", "--model", folder, "--prefill", "200", "--read", "4", "--window", "0")
    results = run_json(capsys, *verb, "--setting", "k2v2", "small,skip=0", "--plot", str(file))
    drawn = file.read_text()
    for result in results:  # glyphs are paths; the text is in a comment
        assert f"<!-- {result['setting']} -->" in drawn
    assert main(["eval", "--plot", str(tmp_path / "no" / "plot.svg")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_eval_needle(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    verb = ("eval", "--needle", "--model", folder, "--context", "500", "--depths", "0.2", "0.5",
            "--needles", "1", "--needle-seed", "3", "--window", "64")  # fmt: skip
    plain, packed = run_json(capsys, *verb, "--setting", "k2v2")
    assert (plain["setting"], packed["setting"]) == ("uncompressed", "k2v2,residual_window=64")
    assert plain["needles"] == packed["needles"] == packed["needles_packed"] == 2
    assert plain["depths"].keys() == {"0.2", "0.5"}
    assert plain["log_probability"] != packed["log_probability"]
    printed = run(capsys, *verb, "--setting", "k2v2")
    cells = next(line for line in printed.splitlines() if line.startswith("k2v2")).split()
    assert cells[-2:] == [str(packed["tokens_packed"]), "2"]
    assert f"of about {packed['tokens']} tokens" in printed


def test_eval_needle_grid(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    verb = ("eval", "--needle", "--model", folder, "--context", "500", "700", "--depths", "0.2",
            "0.5", "--needles", "1", "--window", "64", "--setting", "k2v2")  # fmt: skip
    for kind in ("--together", "--table"):
        plain, packed = run_json(capsys, *verb, kind)
        assert plain["grid"].keys() == {"500", "700"} and plain["needles"] == 4
        printed = run(capsys, *verb, kind)
        assert "Right, of 1 in each place, by tokens of the prompt:" in printed
        lines = [line.split() for line in printed.splitlines() if line.startswith("k2v2")]
        assert [line[1] for line in lines[1:]] == ["500", "700"]
        assert lines[1][2:4] == [str(packed["grid"]["500"][depth]) for depth in ("0.2", "0.5")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", "0.5"], "--depths goes with --needle"),
        (["--table"], "--table goes with --needle"),
        (["--needle", "--table", "--text", __file__], "--text goes without --table"),
        (["--needles", "3"], "--needles goes with --needle"),
        (["--needle", "--chunk", "4"], "--chunk goes without --needle"),
        (["--needle", "--own"], "--own goes without --needle"),
        (["--needle", "--seeds", "3"], "--seeds goes without --needle"),
        (["--temperature", "1"], "temperature=1.0: expected at least 0, and 0 where the text"),
        (["--needle", "--plot", "a.png"], "--plot goes without --needle"),
        (["--needle", "--context", "1025"], "context=1025: the model was made for 1024 tokens"),
        (["--needle", "--depths", "1.5"], "depths=[1.5]: expected numbers from 0 to 1"),
    ],
)
def test_user_errors_of_eval(
    capsys: pytest.CaptureFixture[str], folder: str, arguments: list[str], message: str
) -> None:
    assert main(["eval", *arguments, "--model", folder]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tqai: ")]
    assert len(error) == 1
    assert message in error[0]


def test_memory(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    memory = ("memory", "--model", folder, "--context", "900")
    result = run_json(capsys, *memory)
    report = result["report"]
    # 16 coordinates at 4 and 2 bits, two FP16 norms
    assert result["bytes_per_sealed_token_layer_head"] == 16
    assert report["packed_bytes"] == 16 * 2 * 2 * report["packed_tokens"]
    assert report["total_bytes"] == result["allocated_bytes"]
    assert result["float32_bytes"] == 900 * 2 * 2 * 2 * 16 * 4
    text = run(capsys, *memory, "--dtype", "bfloat16")
    assert "A sealed token takes 16 bytes a layer and head." in text
    assert "+0 bytes from the report" in text


def test_memory_of_keys_in_bases(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    memory = ("memory", "--model", folder, "--context", "900", "--codec", "adaptive")
    report = run_json(capsys, *memory)["report"]
    assert report["codecs"] == {"adaptive": 2}
    assert report["basis_bytes"] == 4 * _BASIS_BYTES
    text = run(capsys, *memory)
    assert "bases of keys, beside it" in text
    assert "+0 bytes from the report" in text


@needs_smollm2
@pytest.mark.skipif(sys.platform != "linux", reason="the growth of a process is read from Linux")
def test_memory_of_smollm2_is_the_growth_of_the_process() -> None:
    # In a process of its own whose larger blocks go back to the system when they are freed: in one
    # heap with all else, pieces of freed memory that cannot be given back count as growth.
    ran = subprocess.run(
        [sys.executable, "-m", "tqai", "memory", "--context", "3072", "--json", "--threads", "1"],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        check=True,
    )
    result = json.loads(ran.stdout)
    total = result["report"]["total_bytes"]
    assert result["bytes_per_sealed_token_layer_head"] == 52
    assert result["allocated_bytes"] == total
    assert abs(result["growth_bytes"] / total - 1) < 0.15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "--bits-k", "9"], "bits_k=9: expected an integer from 1 to 8"),
        (["info", "--skip-layers", "7"], "skip_layers=7: the model's cache has 2 layers"),
        (["eval", "--setting", "4bits"], "setting '4bits'"),
        (["eval", "--own", "--temperature", "nan"], "temperature=nan: expected at least 0"),
        (["eval", "--chunk", "129"], "chunk=129: setting 'k4v4' has a window of 128 tokens"),
        (["eval", "--prefill", "32"], "no packed token was read"),
        (["eval", "--text", "/nonexistent/text"], "No such file"),
        (["demo", "--context", "3"], "--context 3: expected"),
        (["demo", "--context", "1020"], "the model was made for 1024 tokens"),
        (["demo", "--tokens", "0"], "--tokens 0: expected at least 1"),
        (["memory", "--context", "1"], "--context 1: expected 2 to"),
    ],
)
def test_user_errors(
    capsys: pytest.CaptureFixture[str], folder: str, arguments: list[str], message: str
) -> None:
    verb = arguments[0]
    more = ["--read", "2"] if verb == "eval" else []
    assert main([*arguments, *more, "--model", folder, "--threads", "1"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tqai: ")]
    assert len(error) == 1
    assert message in error[0]


def test_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    verb = ("eval", "--model", folder)
    assert main([*verb, "--device", "gpu"]) == 2
    assert "tqai: device 'gpu' cannot be used here: " in capsys.readouterr().err
    assert main([*verb, "--device", "meta"]) == 2
    assert "holds no numbers" in capsys.readouterr().err
    result = run_json(capsys, *verb, "--device", "cpu", "--read", "2", "--prefill", "400")
    assert result[0]["tokens_read"] == 4 * 2


def test_the_former_names_of_options_still_work(
    capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    read = [
        run_json(capsys, "info", "--model", folder, *given)["model"]["settings"]
        for given in (
            ("--sinks", "2", "--window", "32"),
            ("--sink-tokens", "2", "--residual-window", "32"),
        )
    ]
    assert read[0] == read[1]
    assert (read[0]["sink_tokens"], read[0]["residual_window"]) == (2, 32)
    with pytest.raises(SystemExit):
        main(["info", "--help"])
    shown = capsys.readouterr().out
    assert "--residual-window" in shown and "--window" not in shown


def test_unknown_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["demo", "--model", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["info", "--level", "sse2"],
        ["eval", "--dtype", "int8"],
        ["info", "--threads", "0"],
        ["info", "--threads", "1025"],
        ["info", "--threads", "99999999999999999999"],
    ],
)
def test_unknown_options_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2


VERB = [sys.executable, "-m", "tqai"]


@pytest.mark.parametrize("encoding", ["latin1", "ascii"])
def test_a_terminal_without_some_letters_still_shows_the_text(encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    ran = subprocess.run([*VERB, "run", "--help"], env=environment, capture_output=True, check=True)
    assert b"--bits-k" in ran.stdout and ran.stderr == b""


@pytest.mark.skipif(os.name != "posix", reason="signals and pipes as on POSIX")
def test_a_reader_that_goes_away_is_no_error(folder: str) -> None:
    ran = subprocess.run(
        ["sh", "-c", '"$@" | true', "sh", *VERB, "info", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Broken pipe" not in ran.stderr and "Traceback" not in ran.stderr


def test_unknown_level_in_the_environment(folder: str) -> None:
    environment = os.environ | {"TQAI_LEVEL": "sse2"}
    ran = subprocess.run(
        [sys.executable, "-m", "tqai", "info", "--model", folder],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 2
    assert ran.stderr.startswith("tqai: ")
    assert "sse2" in ran.stderr and len(ran.stderr.splitlines()) == 1
    assert "scalar" in _core.available_levels()
