from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import tqai
from caches import SEALING, assert_equal, filled
from conftest import TRANSFORMERS_4, Models, make_ids, make_model
from safetensors import safe_open
from safetensors.torch import save_file
from tqai.transformers import files
from tqai.transformers.weights import sampled_fingerprint
from transformers import DynamicCache

FAMILIES = ["llama", "qwen2", "mistral", "mistral_wide", "gemma2", "gpt_oss", "gpt_neox"]


def next_logits(model: Any, cache: Any, tokens: int = 3) -> torch.Tensor:
    ids = make_ids(cache.layers[0].batch_size, tokens, seed=9)
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_cache_goes_on_as_the_saved_one(
    models: Models, family: str, tmp_path: Path
) -> None:
    model = models(family)
    cache = filled(model, tqai.patch(model, **SEALING), make_ids(2, 200))
    tqai.save_cache(cache, tmp_path / "prompt")
    loaded = tqai.load_cache(tmp_path / "prompt", model)
    assert_equal(loaded, cache)
    assert loaded.memory_report()["packed_bytes"] == cache.memory_report()["packed_bytes"]
    for tokens in (1, 100, 2):
        assert torch.equal(next_logits(model, loaded, tokens), next_logits(model, cache, tokens))
    assert_equal(loaded, cache)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_layers_that_are_not_compressed_are_saved_too(
    models: Models, family: str, tmp_path: Path
) -> None:
    model = models(family)
    cache = filled(model, tqai.patch(model, skip_layers=[-1], **SEALING), make_ids(1, 150))
    tqai.save_cache(cache, tmp_path / "prompt")
    loaded = tqai.load_cache(tmp_path / "prompt", model)
    assert torch.equal(next_logits(model, loaded), next_logits(model, cache))


def test_settings_are_the_file_s_and_the_level_is_the_model_s(
    models: Models, tmp_path: Path
) -> None:
    model = models("llama")
    settings = {**SEALING, "bits_k": {0: 3}, "bits_v": (2, 8), "seed": 7}
    tqai.save_cache(filled(model, tqai.patch(model, **settings), make_ids(1, 99)), tmp_path / "f")
    tqai.patch(model, level="scalar")
    loaded = tqai.load_cache(tmp_path / "f", model)
    report = loaded.memory_report()["settings"]
    assert {name: report[name] for name in settings} == settings
    assert [layer.core.level for layer in loaded.layers] == ["scalar", "scalar"]


def test_padding_and_beams_come_back(models: Models, tmp_path: Path) -> None:
    model = models("llama")
    ids = make_ids(2, 120)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    cache = filled(model, tqai.patch(model, **SEALING), ids, attention_mask=mask)
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    tqai.save_cache(cache, tmp_path / "f")
    loaded = tqai.load_cache(tmp_path / "f", model)
    assert [layer.padding for layer in loaded.layers] == [layer.padding for layer in cache.layers]
    assert loaded.nbytes <= cache.nbytes
    assert_equal(loaded, cache)


def test_an_empty_cache_comes_back(models: Models, tmp_path: Path) -> None:
    model = models("llama")
    tqai.save_cache(tqai.patch(model), tmp_path / "f")
    assert tqai.load_cache(tmp_path / "f", model).get_seq_length() == 0


IN_ANOTHER_PROCESS = """
import sys, pickle, torch, tqai
from transformers import AutoModelForCausalLM
folder, file, pickled = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tqai.patch(model)
ids = torch.arange(3, 120).remainder(100).add(3)[None]
for cache in (tqai.load_cache(file, model), pickle.load(open(pickled, "rb"))):
    out = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False,
                         eos_token_id=999, pad_token_id=0)
    print(out[0, ids.shape[1]:].tolist())
"""


def test_another_process_goes_on_with_the_same_tokens(tmp_path: Path) -> None:
    folder = toy.folder(tmp_path / "model")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    cache = tqai.patch(model, **SEALING)
    ids = torch.arange(3, 120).remainder(100).add(3)[None]
    filled(model, cache, ids[:, :-1])
    tqai.save_cache(cache, tmp_path / "f")
    (tmp_path / "p").write_bytes(pickle.dumps(cache))
    expected = model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=999,
        pad_token_id=0,
    )
    arguments = [str(folder), str(tmp_path / "f"), str(tmp_path / "p")]
    printed = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, *arguments],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert printed == [str(expected[0, ids.shape[1] :].tolist())] * 2


def test_pickle_and_deepcopy_do_not_see_later_changes(models: Models) -> None:
    model = models("mistral_wide")
    cache = filled(model, tqai.patch(model, **SEALING), make_ids(2, 200))
    copies = [pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)]
    expected = next_logits(model, cache)
    filled(model, cache, make_ids(2, 150, seed=5))
    for other in copies:
        assert torch.equal(next_logits(model, other), expected)


# What is refused.


@pytest.fixture
def saved(models: Models, tmp_path: Path) -> Path:
    model = models("llama")
    cache = filled(model, tqai.patch(model, **SEALING), make_ids(1, 150))
    tqai.save_cache(cache, tmp_path / "f")
    return tmp_path / "f"


def test_every_damaged_or_shortened_file_is_refused(models: Models, saved: Path) -> None:
    content = saved.read_bytes()
    generator = torch.Generator().manual_seed(3)
    places = torch.randint(8, len(content), (120,), generator=generator).tolist()
    damaged = [content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :] for at in places]
    shortened = [content[:at] for at in (0, 4, 8, 100, len(content) // 2, len(content) - 1)]
    for bad in [*damaged, *shortened, content + b"x"]:
        saved.write_bytes(bad)
        with pytest.raises(ValueError, match=saved.name):
            tqai.load_cache(saved, models("llama"))


def test_a_cache_goes_with_one_model(models: Models, saved: Path) -> None:
    other = make_model("llama", seed=2)
    tqai.patch(other)
    with pytest.raises(ValueError, match="other weights"):
        tqai.load_cache(saved, other)
    other = models("qwen3")
    tqai.patch(other)
    with pytest.raises(ValueError, match="was made for LlamaForCausalLM .* not for Qwen3"):
        tqai.load_cache(saved, other)


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the header of a file, so that its checksum fits."""
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["header"])
    change(header)
    metadata["header"] = json.dumps(header)
    metadata["checksum"] = str(zlib.crc32(metadata["header"].encode()))
    save_file(tensors, path, metadata=metadata)


def test_files_that_sampled_the_weights_still_load(models: Models, saved: Path) -> None:
    model = models("llama")
    sample = sampled_fingerprint(model.model)
    rewritten(saved, lambda header: header.update(weights=sample))
    assert tqai.load_cache(saved, model).get_seq_length() == 150
    rewritten(saved, lambda header: header.update(weights=sample[::-1]))
    with pytest.raises(ValueError, match="other weights"):
        tqai.load_cache(saved, model)
    rewritten(saved, lambda header: header.update(weights={"kind": "smell"}))
    with pytest.raises(ValueError, match="tells weights apart by 'smell'"):
        tqai.load_cache(saved, model)


def test_another_rotary_embedding_is_refused(saved: Path) -> None:
    base = {"rope_theta": 500.0}
    other = make_model(
        "llama",
        **(base if TRANSFORMERS_4 else {"rope_parameters": {"rope_type": "default", **base}}),
    )
    tqai.patch(other)
    with pytest.raises(ValueError, match="rotary embedding"):
        tqai.load_cache(saved, other)


def test_a_model_that_is_not_patched_is_refused(models: Models, saved: Path) -> None:
    tqai.unpatch(models("llama"))
    with pytest.raises(ValueError, match=r"not patched; call tqai.patch\(model\) first"):
        tqai.load_cache(saved, models("llama"))


def test_other_files_are_refused(models: Models, tmp_path: Path) -> None:
    model = models("llama")
    tqai.patch(model)
    save_file({"a": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="not one of tqai.save_cache"):
        tqai.load_cache(tmp_path / "weights", model)
    save_file({}, tmp_path / "later", metadata={"format": "tqai-cache", "version": "99"})
    with pytest.raises(ValueError, match="format version 99"):
        tqai.load_cache(tmp_path / "later", model)
    with pytest.raises(FileNotFoundError):
        tqai.load_cache(tmp_path / "nothing", model)
    with pytest.raises(
        ValueError, match="save_cache.*takes a cache that tqai made.*got DynamicCache"
    ):
        tqai.save_cache(DynamicCache(), tmp_path / "f")


def test_layers_that_a_model_has_added_are_not_saved(models: Models, tmp_path: Path) -> None:
    model = models("llama")
    cache = filled(model, tqai.patch(model), make_ids(1, 30))
    cache.layers.append(copy.deepcopy(cache.layers[0]))  # as models do that run layers in a loop
    with pytest.raises(NotImplementedError, match="the cache has 3 layers, 2 of which"):
        tqai.save_cache(cache, tmp_path / "f")


def test_a_failed_save_leaves_the_old_file(
    models: Models, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    cache = filled(models("llama"), tqai.new_cache(models("llama")), make_ids(1, 30))

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        tqai.save_cache(cache, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
    with pytest.raises(OSError, match="no such folder/f could not be written"):
        tqai.save_cache(cache, saved.parent / "no such folder" / "f")
