"""Which store a layer gets, and going from one to the other."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import tqai
from caches import SEALING, filled
from conftest import Models, make_ids
from tqai import _core
from tqai.settings import Settings
from tqai.stores import for_torch as stores
from tqai.stores.for_torch.torch_store import TorchStore
from tqai.transformers.cache.layer import TqaiLayer

CPU = torch.device("cpu")
TORCH_OPS = {**SEALING, "backend": "torch-ops"}


def cores(cache: Any) -> set[type]:
    return {type(layer.core) for layer in cache.layers if isinstance(layer, TqaiLayer)}


def test_the_cpu_has_the_kernels_and_other_devices_have_torch() -> None:
    assert stores.is_native("auto", CPU)
    assert not stores.is_native("auto", torch.device("cuda", 1))
    assert not stores.is_native("auto", torch.device("mps"))
    assert not stores.is_native("torch-ops", CPU)
    with pytest.raises(ValueError, match="backend='cuda': expected one of 'auto', 'torch-ops'"):
        Settings(backend="cuda")


def test_the_other_framework_s_operations_are_refused(models: Models) -> None:
    with pytest.raises(NotImplementedError, match="'mlx-ops' is for mlx-lm's.*'torch-ops'"):
        tqai.patch(models(), backend="mlx-ops")


@pytest.mark.parametrize("family", ["llama", "mistral_wide", "gemma2", "gpt_oss"])
def test_generate_gives_the_same_tokens_from_both(family: str, models: Models) -> None:
    model, ids = models(family), make_ids(2, 400)
    outputs = []
    for settings in (SEALING, TORCH_OPS):
        cache = tqai.patch(model, **settings)
        outputs.append(model.generate(ids, past_key_values=cache, max_new_tokens=70))
        expected = {_core.KvCache} if settings is SEALING else {TorchStore}
        assert cores(cache) == expected
        assert cache.memory_report()["packed_tokens"] > 0
    # The kernels' integer products may turn a near tie of these random models' logits.
    same = (outputs[0] == outputs[1]).cumprod(-1).sum(-1)
    assert same.max() > 400 and same.sum() > 2 * 400 + 35


def test_memory_falls_as_much(models: Models) -> None:
    model, ids = models(), make_ids(1, 900)
    reports = [
        filled(model, tqai.patch(model, **settings), ids).memory_report()
        for settings in (SEALING, TORCH_OPS)
    ]
    assert reports[0]["packed_bytes"] == reports[1]["packed_bytes"] > 0
    assert reports[1]["total_bytes"] < 1.1 * reports[0]["total_bytes"]
    assert reports[0]["centering"] == reports[1]["centering"]


def test_attention_reads_the_tiles(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never the whole cache dequantised."""
    model = models()
    cache = filled(model, tqai.patch(model, **TORCH_OPS), make_ids(1, 500))
    monkeypatch.setattr(TorchStore, "gather", None)
    model(make_ids(1, 1), past_key_values=cache)
    model(make_ids(1, 30), past_key_values=cache)


@pytest.mark.parametrize("wrote", ["auto", "torch-ops"])
@pytest.mark.parametrize("read", ["auto", "torch-ops"])
def test_files_are_the_same(wrote: str, read: str, models: Models, tmp_path: Path) -> None:
    model, ids = models("mistral_wide"), make_ids(2, 300)
    skipping = {**SEALING, "skip_layers": [1]}
    cache = filled(model, tqai.patch(model, **skipping, backend=wrote), ids)
    tqai.save_cache(cache, tmp_path / "cache")
    tqai.patch(model, **skipping, backend=read)
    loaded = tqai.load_cache(tmp_path / "cache", model)
    assert cores(loaded) == {_core.KvCache if read == "auto" else TorchStore}
    assert loaded.memory_report()["settings"]["backend"] == read
    more = make_ids(2, 3)
    logits = [model(more, past_key_values=each).logits for each in (cache, loaded)]
    assert torch.allclose(*logits, atol=3e-2)
    if wrote == read:
        assert torch.equal(*logits)


def test_a_store_moves_to_where_the_tokens_are(models: Models) -> None:
    layer = TqaiLayer(0, Settings(**TORCH_OPS))
    keys, values = torch.randn(2, 1, 2, 300, 16)
    layer.update(keys, values)
    layer.settle(True)
    before = layer.gather(0, 300)
    layer.settings = Settings(**SEALING)  # as after model.to() another device
    layer.update(keys[:, :, :1], values[:, :, :1])
    assert type(layer.core) is _core.KvCache
    for given, expected in zip(layer.gather(0, 300), before, strict=True):
        assert torch.allclose(given, expected, atol=1e-5)
    layer.settings = Settings(**TORCH_OPS)
    layer.update(keys[:, :, :1], values[:, :, :1])
    assert type(layer.core) is TorchStore and layer.core.tokens == 302
    assert stores.moved(layer.core, layer.settings, CPU) is layer.core


def test_copies_and_pickles(models: Models) -> None:
    model = models()
    cache = filled(model, tqai.patch(model, **TORCH_OPS), make_ids(1, 300))
    copies = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    more = make_ids(1, 2)
    logits = [model(more, past_key_values=each).logits for each in (cache, *copies)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_bad_tokens_leave_the_cache_as_it_was(models: Models) -> None:
    model = models()
    cache = filled(model, tqai.patch(model, **TORCH_OPS), make_ids(1, 200))
    with pytest.raises(ValueError, match=r"layer 0: keys\[0, 1\] of token 203 holds NaN"):
        keys = torch.zeros(1, 2, 5, 16)
        keys[0, 1, 3] = torch.nan
        cache.update(keys, torch.zeros(1, 2, 5, 16), 0)
    assert [layer.get_seq_length() for layer in cache.layers] == [200, 200]


def test_a_compiled_model_gives_the_same(models: Models) -> None:
    model, ids = models(), make_ids(1, 300)
    cache = filled(model, tqai.patch(model, **TORCH_OPS), ids)
    twin = copy.deepcopy(cache)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            step = make_ids(1, 1)
            expected = model(step, past_key_values=cache).logits
            given = compiled(step, past_key_values=twin).logits
            assert torch.allclose(given, expected, atol=1e-4)
