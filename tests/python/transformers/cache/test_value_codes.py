"""codec="trellis": values in trellis codes, through everything that caches go through."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import tqai
from caches import SEALING, assert_equal, filled
from conftest import Models, make_ids, make_model
from safetensors import safe_open
from tqai.settings import Settings
from tqai.stores.for_torch.torch_store import TorchStore

TRELLIS: Any = {"codec": "trellis", **SEALING}


def value_errors(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Mean squared errors of the values, by layer."""
    exact = filled(model, tqai.patch(model, residual_window=1000), ids)
    cache = filled(model, tqai.patch(model, **{**SEALING, **options}), ids)
    errors = [
        (ours.values[:] - theirs.values[:]).square().mean()
        for ours, theirs in zip(cache.layers, exact.layers, strict=True)
    ]
    tqai.unpatch(model)
    return torch.stack(errors)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_are_held_better_in_the_same_bytes(bits: int) -> None:
    model, ids = make_model(), make_ids(1, 300)
    trellis = value_errors(model, ids, codec="trellis", bits_v=bits)
    assert (trellis < 0.8 * value_errors(model, ids, bits_v=bits)).all()
    sizes = [
        filled(model, tqai.patch(model, bits_v=bits, **options), ids).nbytes
        for options in (TRELLIS, SEALING)
    ]
    assert sizes[0] == sizes[1]


def test_wide_values_keep_scalar_codes(models: Models) -> None:
    model, ids = models("llama"), make_ids(1, 200)
    cache = filled(model, tqai.patch(model, bits_v={0: 4, 1: 5}, **TRELLIS), ids)
    assert [layer.core.value_codes for layer in cache.layers] == ["trellis", "scalar"]
    assert cache.memory_report()["value_codes"] == {"trellis": 1, "scalar": 1}
    assert cache.memory_report()["codecs"] == {"scalar": 2}


def test_adaptive_keys_have_values_in_trellis_codes(models: Models) -> None:
    model = models("llama")
    cache = filled(model, tqai.patch(model, codec="adaptive", **SEALING), make_ids(1, 200))
    assert cache.memory_report()["codecs"] == {"adaptive": 2}
    assert cache.memory_report()["value_codes"] == {"trellis": 2}


@pytest.mark.parametrize(("bits", "codes"), [(1, "scalar"), (2, "trellis"), (5, "scalar")])
def test_adaptive_keys_are_in_trellis_codes_where_there_are_such(
    bits: int, codes: str, models: Models
) -> None:
    model = models("llama")
    cache = filled(model, tqai.patch(model, codec="adaptive", bits_k=bits, **SEALING), make_ids())
    assert cache.memory_report()["key_codes"] == {codes: 2}
    assert [layer.core.key_codes for layer in cache.layers] == [codes] * 2


def test_files_of_adaptive_keys_in_scalar_codes_go_on(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As versions without such trellis codes wrote them."""
    model, step = models("llama"), make_ids(1, 3, seed=3)
    tqai.patch(model, codec="adaptive", **SEALING)
    with monkeypatch.context() as patch:
        patch.setattr(Settings, "key_codes", "scalar")
        cache = filled(model, tqai.new_cache(model), make_ids(1, 200))
    tqai.save_cache(cache, tmp_path / "prompt")
    loaded = tqai.load_cache(tmp_path / "prompt", model)
    assert loaded.memory_report()["key_codes"] == {"scalar": 2}
    with torch.no_grad():
        outs = [model(step, past_key_values=each).logits for each in (cache, loaded)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_it_is_the_same_cache_by_any_way(models: Models, family: str, tmp_path: Path) -> None:
    model = models(family)
    cache = filled(model, tqai.patch(model, **TRELLIS), make_ids(2, 200))
    tqai.save_cache(cache, tmp_path / "prompt")
    others = [
        copy.deepcopy(cache),
        pickle.loads(pickle.dumps(cache)),
        tqai.load_cache(tmp_path / "prompt", model),
    ]
    for other in others:
        assert_equal(other, cache)
    step = make_ids(2, 5, seed=3)
    with torch.no_grad():
        outs = [model(step, past_key_values=each).logits for each in (cache, *others)]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_all_in_the_window_it_is_as_scalar_codes(models: Models) -> None:
    model, ids = models("llama"), make_ids(1, 60)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    tqai.patch(model, codec="trellis")
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), expected)


def test_beams_and_crops(models: Models) -> None:
    model, ids = models("llama"), make_ids(2, 150)
    tqai.patch(model, **TRELLIS)
    assert model.generate(ids, num_beams=3, max_new_tokens=30).shape[0] == 2
    cache = filled(model, tqai.new_cache(model), ids)
    cache.crop(140)
    filled(model, cache, ids[:, 140:])
    assert cache.get_seq_length() == 150


def test_a_header_that_lies_of_codes_is_refused(models: Models, tmp_path: Path) -> None:
    model = models("llama")
    cache = filled(model, tqai.patch(model, **TRELLIS), make_ids(1, 150))
    tqai.save_cache(cache, tmp_path / "prompt")
    with safe_open(tmp_path / "prompt", "pt") as file:
        assert json.loads(file.metadata()["header"])["settings"]["codec"] == "trellis"
    cache.settings = Settings(**SEALING)
    tqai.save_cache(cache, tmp_path / "lie")
    with pytest.raises(ValueError, match="layer 0 has values in trellis codes, .* say scalar"):
        tqai.load_cache(tmp_path / "lie", model)


@pytest.mark.parametrize("codec", ["trellis", "adaptive"])
def test_operations_read_them_too(codec: str, models: Models, tmp_path: Path) -> None:
    model, ids, step = models("llama"), make_ids(2, 200), make_ids(2, 3, seed=3)
    native = filled(model, tqai.patch(model, codec=codec, **SEALING), ids)
    tqai.save_cache(native, tmp_path / "native", basis=True)
    with torch.no_grad():
        expected = model(step, past_key_values=native).logits
    tqai.unpatch(model)
    cache = filled(model, tqai.patch(model, codec=codec, backend="torch-ops", **SEALING), ids)
    assert isinstance(cache.layers[0].core, TorchStore)
    assert cache.memory_report()["codecs"] == native.memory_report()["codecs"]
    loaded = tqai.load_cache(tmp_path / "native", model)
    tqai.save_cache(cache, tmp_path / "ours", basis=True)
    again = tqai.load_cache(tmp_path / "ours", model)
    others = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    for each in (cache, loaded, again, *others):
        with torch.no_grad():
            given = model(step, past_key_values=each).logits
        torch.testing.assert_close(given, expected, rtol=0, atol=0.01)
