"""What compression costs mlx-lm's models, measured as for transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_mlx import make_model, mx

# isort: split
import toy
import tqai
from conftest import make_model as make_torch_model
from mlx_lm import load
from tqai.cli import main
from tqai.mlx.loading import load as load_checked

NUMBERS = {"prefill": 300, "read": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that both frameworks load."""
    return toy.folder(tmp_path_factory.mktemp("model"))


def test_both_frameworks_measure_the_same(folder: Path) -> None:
    settings = ["k8v8", "k3v2,residual_window=32"]
    theirs = tqai.evaluate(make_torch_model("llama"), toy.tokenizer(), None, settings, **NUMBERS)
    model, tokenizer = load(str(folder))
    model.set_dtype(mx.float32)
    ours = tqai.evaluate(model, tokenizer, None, settings, **NUMBERS, bos=False)
    assert not tqai.is_patched(model)
    for one, other in zip(ours, theirs, strict=True):
        assert one.tokens_read_packed == other.tokens_read_packed == 12
        assert one.packed_share == other.packed_share
        assert one.bits_per_coordinate == other.bits_per_coordinate
    assert 0 < ours[0].kl_mean < ours[1].kl_mean


def test_both_frameworks_look_for_the_same_needles(folder: Path) -> None:
    options = {"context": 500, "depths": (0.3, 0.6), "needles": 1}
    settings = ["k8v8,residual_window=32"]
    theirs = tqai.needle(make_torch_model("llama"), toy.tokenizer(), None, settings, **options)
    model, tokenizer = load(str(folder))
    model.set_dtype(mx.float32)
    ours = tqai.needle(model, tokenizer, None, settings, **options)
    for one, other in zip(ours, theirs, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, rel=0.01)
        assert (one.tokens_packed, one.needles_packed) == (
            other.tokens_packed,
            other.needles_packed,
        )
    assert ours[1].needles_packed == 2


def test_chunks_and_samples(folder: Path) -> None:
    model, tokenizer = load(str(folder))
    results = tqai.evaluate(model, tokenizer, None, ["k4v2"], **NUMBERS, chunk=5, samples=2)
    assert results[0].tokens_read == 24


def test_exact_arithmetic_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="arithmetic='exact' is for transformers"):
        tqai.evaluate(make_model("llama"), toy.tokenizer(), None, ["k4v2,arithmetic=exact"])


def test_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "--framework", "mlx", "--prefill", "300", "--read", "6", "--setting", "k4v2"]
    assert main([*command, "--model", str(folder), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["setting"] == "k4v2" and result["tokens_read_packed"] == 6
    for more, message in (
        ([], "mlx-lm loads no .gguf files"),
        (["--model", str(folder), "--device", "cpu"], "--device cpu goes with"),
        (["--model", str(folder), "--needle"], "--prefill goes without --needle"),
        (["--model", "/nowhere"], "no such folder: /nowhere"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err


def test_bytes_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As for transformers, but for the growth of the process."""
    results = []
    for framework in ("transformers", "mlx"):
        command = ["memory", "--framework", framework, "--model", str(folder), "--json"]
        assert main([*command, "--context", "400"]) == 0
        results.append(json.loads(capsys.readouterr().out))
        assert results[-1].pop("growth_bytes") is not None
        report = results[-1].pop("report")
        assert report["tokens"] == 400 and report["packed_tokens"] == 256
        assert results[-1].pop("allocated_bytes") == report["total_bytes"]
    assert results[0] == results[1]
    assert results[0]["bytes_per_sealed_token_layer_head"] == 2 * 2 + 16 * (4 + 2) / 8


def test_dtypes_are_those_of_the_settings(folder: Path) -> None:
    model, _ = load_checked(folder, "float16")
    assert model.model.norm.weight.dtype == mx.float16
    with pytest.raises(ValueError, match="dtype is 'float64'"):
        load_checked(folder, "float64")  # type: ignore


def test_torch_is_not_needed(folder: Path) -> None:
    code = f"""
import sys
sys.path[:0] = {[path for path in sys.path if path]!r}
sys.modules["torch"] = None  # as where it is not installed
from tqai.cli import main
numbers = ["--prefill", "300", "--read", "4", "--setting", "k4v2"]
sys.exit(main(["eval", "--framework", "mlx", "--model", {str(folder)!r}, *numbers]))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "4 of 4 tokens read packed ones" in ran.stdout
