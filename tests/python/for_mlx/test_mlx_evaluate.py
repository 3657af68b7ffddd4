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
from mlx_lm.models.cache import make_prompt_cache
from tqai._core import default_level
from tqai.cli import main
from tqai.measure.mlx_decoder import quantised_together
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
        assert one.tokens_read_packed == other.tokens_read_packed == 4 * 12
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


def test_its_own_continuation_seeds_and_windows(folder: Path) -> None:
    """As for transformers."""
    options = {"prefill": 300, "read": 12, "own": True, "seeds": 2}
    theirs = tqai.evaluate(
        make_torch_model("llama"), toy.tokenizer(), None, ["k2v2"], tails=(0, 32), **options
    )
    model, tokenizer = load(str(folder))
    model.set_dtype(mx.float32)
    ours = tqai.evaluate(model, tokenizer, None, ["k2v2"], tails=(0, 32), bos=False, **options)
    for one, other in zip(ours, theirs, strict=True):
        assert one.setting == other.setting and one.bytes_held == other.bytes_held
        assert one.kl_by_seed == pytest.approx(other.kl_by_seed, rel=0.02)
        assert one.perplexity_uncompressed == pytest.approx(other.perplexity_uncompressed)
        assert len(one.equal_tokens) == 4
    large, small = tqai.evaluate(
        model, tokenizer, None, ["k8v8", "k2v2"], equal_bytes=True, prefill=600, read=4
    )
    assert small.setting != "k2v2" and small.bytes_held <= large.bytes_held


def test_exact_arithmetic_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="arithmetic='exact' is for transformers"):
        tqai.evaluate(make_model("llama"), toy.tokenizer(), None, ["k4v2,arithmetic=exact"])


def test_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "--framework", "mlx", "--prefill", "300", "--read", "6", "--setting", "k4v2"]
    assert main([*command, "--model", str(folder), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["setting"] == "k4v2" and result["tokens_read_packed"] == 4 * 6
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


@pytest.mark.parametrize("scaling", [{}, {"rope_type": "linear", "factor": 4.0}])
def test_a_base_is_found_where_transformers_5_writes_it(tmp_path: Path, scaling: dict) -> None:
    """mlx-lm would take its own, 10 000."""
    folder = toy.folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_theta", None)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0, **scaling}
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load_checked(folder)
    x = mx.random.normal((1, 1, 8, 16))
    own = model.model.layers[0].self_attn.rope(x)
    scale = 1 / scaling.get("factor", 1.0)
    turned = mx.fast.rope(x, 16, traditional=False, base=500.0, scale=scale, offset=0)
    assert mx.allclose(own, turned, atol=1e-5)


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
    assert "16 of 16 tokens read packed ones" in ran.stdout


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads of 32, which mlx-lm quantises, and a chat template."""
    return toy.folder(tmp_path_factory.mktemp("wide"), chat=True, hidden_size=128)


def test_decoding_is_timed_beside_mlx_lms_caches(
    wide_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "model", "--framework", "mlx", "--model", str(wide_folder), "--json"]
    numbers = ["--contexts", "64", "500", "--prefill", "200", "--tokens", "2", "--window", "32"]
    assert main([*command, *numbers, "--dtypes", "float32"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["notes"] == []
    rows = {(row["cache"], row["context"]): row for row in result["rows"]}
    assert list(rows) == [
        (kind, context) for context in (64, 500) for kind in ("KVCache", "QuantizedKVCache", "tqai")
    ]
    assert all(row["milliseconds"] > 0 and row["threads"] >= 1 for row in rows.values())
    assert rows["KVCache", 64]["times_dynamic"] == 1
    # mlx-lm's buffers come in steps of 256 tokens: 2 layers, 2 sides, 2 heads of 32
    assert rows["KVCache", 64]["cache_bytes"] == 256 * 2 * 2 * 2 * 32 * 4
    assert rows["QuantizedKVCache", 500]["bits"] == "4"
    ours = rows["tqai", 500]
    assert (ours["bits"], ours["packed_tokens"], ours["repeated"]) == ("k4v2", 448, 300)
    assert ours["level"] == default_level() and ours["model"] == str(wide_folder)
    assert ours["cache_bytes"] < rows["KVCache", 500]["cache_bytes"]


def test_what_cannot_be_timed_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["bench", "model", "--framework", "mlx", "--contexts", "8", "--prefill", "8"]
    for more, message in (
        ([], "mlx-lm loads no .gguf files"),
        (["--model", str(folder), "--device", "cpu"], "--device cpu goes with"),
        (
            ["--model", str(folder), "--caches", "quantized"],
            "mlx-lm quantises 64 or 32 coordinates together: leave its quantised cache out with "
            "--caches dynamic tqai",
        ),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err


def test_a_sliding_window_cannot_be_quantised() -> None:
    model = make_model("mistral", head_dim=32)
    cache = make_prompt_cache(model)
    model(mx.array([[1, 2]]), cache=cache)
    with pytest.raises(NotImplementedError, match="layer 0 has a RotatingKVCache"):
        quantised_together(cache)


def test_demo(wide_folder: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["demo", "--framework", "mlx", "--context", "500", "--tokens", "6", "--window", "32"]
    assert main([*command, "--model", str(wide_folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    plain, quantized, ours = (result[name] for name in ("plain", "quantized", "compressed"))
    for run in (plain, quantized, ours):
        assert len(run["tokens"]) == 6 and run["prompt_tokens"] == 500
        assert run["prefill_seconds"] > 0 and run["decode_tokens_per_second"] > 0
    assert ours["cache_bytes"] == ours["report"]["total_bytes"] < plain["cache_bytes"]
    assert quantized["cache_bytes"] < plain["cache_bytes"]
    assert ours["report"]["packed_tokens"] == 448
    assert 0 <= result["tokens_equal_given_same_text"] <= 6

    command[command.index("--window") + 1] = "600"  # nothing is sealed
    assert main([*command, "--model", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "Equal tokens: 6 of 6" in text and "at 6 of 6 places" in text
    assert "Without mlx-lm's quantised cache: the model has heads of [16]" in text
    assert f"{folder}, " in text and f"{default_level()} kernels" in text
