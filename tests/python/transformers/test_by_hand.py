"""Caches made by hand, for models that are not patched and have tqai's attention, or another."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import tqai
import transformers
from caches import SEALING, filled
from conftest import Models, make_ids, make_model
from tqai.settings import OPTIONS
from tqai.transformers.attention import functions as attention
from tqai.transformers.model.names import cache_argument
from transformers import DynamicCache

NAMES = [("sdpa", "tqai"), ("eager", "tqai_eager")]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of layers, one for each time that attention was computed from packed bytes."""
    calls: list[int] = []
    attend = attention._attend_packed

    def count(query: Any, update: Any, arguments: Any) -> Any:
        calls.append(update.layer.index)
        return attend(query, update, arguments)

    monkeypatch.setattr(attention, "_attend_packed", count)
    return calls


@pytest.mark.parametrize(("implementation", "name"), NAMES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral_wide"])
def test_it_gives_what_a_patched_model_gives(
    family: str, implementation: str, name: str, kernels: list[int], greedy: dict[str, Any]
) -> None:
    model = make_model(family, attn_implementation=implementation)
    ids = make_ids(2, 200)
    cache = tqai.patch(model, bits_k=3, **SEALING)
    expected = model.generate(ids, **cache_argument(model, cache), **greedy)
    packed_calls = len(kernels)
    assert packed_calls > 0
    tqai.unpatch(model)

    model.set_attn_implementation(name)
    mine = tqai.TqaiCache(model, bits_k=3, **SEALING)
    assert torch.equal(model.generate(ids, **cache_argument(model, mine), **greedy), expected)
    assert len(kernels) == 2 * packed_calls
    assert mine.memory_report() == cache.memory_report()

    more = make_ids(2, 3, seed=1)
    logits = [filled_logits(model, copy.deepcopy(mine), more)]
    model.set_attn_implementation(implementation)  # decompressed for it
    logits.append(filled_logits(model, copy.deepcopy(mine), more))
    assert len(kernels) == 2 * packed_calls + len(mine.layers)
    assert not torch.equal(*logits)
    assert torch.allclose(*logits, atol=0.02)


@torch.no_grad()
def filled_logits(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, **cache_argument(model, cache)).logits


def test_copies_and_files(tmp_path: Path) -> None:
    model = make_model()
    cache = tqai.TqaiCache(model, bits_k=3, **SEALING)
    model.set_attn_implementation("tqai")  # which the first cache makes known
    filled(model, cache, make_ids(1, 200))
    more = make_ids(1, 3, seed=1)
    tqai.save_cache(cache, tmp_path / "cache")
    copied, pickled = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    with pytest.raises(ValueError, match="is not patched"):
        tqai.load_cache(tmp_path / "cache", model)
    with tqai.patched(model):
        loaded = tqai.load_cache(tmp_path / "cache", model)
        assert loaded.settings == cache.settings
        expected = filled_logits(model, loaded, more)
    for each in (cache, copied, pickled):
        assert torch.equal(filled_logits(model, each, more), expected)


def test_an_encoder_decoder_model(kernels: list[int], greedy: dict[str, Any]) -> None:
    config = transformers.BartConfig(
        vocab_size=128, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(config).eval()
    ids = make_ids(1, 200)
    cache = tqai.patch(model, **SEALING)
    expected = model.generate(ids, past_key_values=cache, **greedy)
    packed_calls = len(kernels)
    assert packed_calls > 0
    tqai.unpatch(model)
    model.set_attn_implementation("tqai")
    mine = tqai.TqaiEncoderDecoderCache(model, **SEALING)
    assert torch.equal(model.generate(ids, past_key_values=mine, **greedy), expected)
    assert len(kernels) == 2 * packed_calls
    assert mine.nbytes == cache.nbytes
    with pytest.raises(ValueError, match=r"is an encoder-decoder.*TqaiEncoderDecoderCache\(model"):
        tqai.TqaiCache(model)


def test_nothing_is_silently_uncompressed(greedy: dict[str, Any]) -> None:
    model = make_model()
    ids = make_ids(1, 20)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    model.set_attn_implementation("tqai")
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, expected)
    for cache in (None, DynamicCache(config=model.config)):
        with pytest.raises(RuntimeError, match=r"attn_implementation='tqai'.*TqaiCache\(model"):
            model.generate(ids, **cache_argument(model, cache), **greedy)
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert model.get_input_embeddings().weight.grad is not None


def test_options_and_layers() -> None:
    model = make_model()
    cache = tqai.TqaiCache(model, preset="small", bits_v=3, skip_layers=[0])
    assert cache.settings == tqai.Settings(bits_k=2, bits_v=3, codec="adaptive", skip_layers=(0,))
    assert not tqai.is_patched(model)
    assert {*OPTIONS} <= inspect.signature(tqai.TqaiCache).parameters.keys()
    for tokens in (300, 1):  # with torch's attention, tokens are sealed at the next update
        held = filled(model, cache, make_ids(1, tokens)).memory_report()
    assert held["packed_tokens"] > 0 and held["layers"][0]["packed_tokens"] == 0


def test_a_context(models: Models, greedy: dict[str, Any]) -> None:
    model = models()
    with tqai.patched(model, bits_k=3, **SEALING) as cache:
        assert tqai.is_patched(model) and cache.settings.bits_k == 3
        with tqai.patched(model, bits_k=8) as inner:
            assert (inner.settings.bits_k, tqai.new_cache(model).settings.bits_k) == (8, 8)
        assert tqai.new_cache(model).settings == cache.settings
    assert not tqai.is_patched(model)
    with pytest.raises(ZeroDivisionError), tqai.patched(model):
        raise ZeroDivisionError
    assert not tqai.is_patched(model)
    with tqai.patched(model):
        tqai.unpatch(model)
    assert not tqai.is_patched(model)
    with pytest.raises(TypeError, match=r"tqai\.patched\(\) has no keyword argument 'bit_k'"):
        tqai.patched(model, bit_k=4)  # type: ignore[call-arg]


def test_what_is_patched(models: Models) -> None:
    model = models()
    assert not tqai.is_patched(model) and not tqai.is_patched("llama")
    tqai.patch(model)
    assert tqai.is_patched(model) and not tqai.is_patched(models(seed=2))
