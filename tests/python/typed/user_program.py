"""A program as users write it; pyright must find nothing to say (test_typing.py)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import tqai
from tqai.settings import Options
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)
from typing_extensions import assert_type


def decoder_only(path: Path) -> int:
    model = LlamaForCausalLM(LlamaConfig()).eval()
    cache = tqai.patch(model, bits_k=4, bits_v=2, skip_layers=[0, -1], rotation="haar")
    assert_type(cache, tqai.TqaiCache)
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, past_key_values=cache)
    branch = copy.deepcopy(cache)
    branch.crop(-1)
    tqai.save_cache(cache, path)
    again = tqai.load_cache(path, model)
    assert_type(tqai.load_cache(path, model, mapped=True), tqai.TqaiCache)
    assert_type(again, tqai.TqaiCache)
    report: dict[str, Any] = again.memory_report()
    print(report["total_bytes"], len(cache.layers), cache.settings.residual_window)
    if tqai.is_patched(model):
        tqai.unpatch(model)
    return cache.nbytes + branch.get_seq_length()


def by_hand(model: PreTrainedModel, translator: T5ForConditionalGeneration) -> tqai.TqaiCache:
    model.set_attn_implementation("tqai")
    tqai.TqaiEncoderDecoderCache(translator, bits_k=3)
    return tqai.TqaiCache(model, preset="quality", residual_window=64, backend="torch-ops")


def bits_layer_by_layer(model: PreTrainedModel) -> None:
    given: list[int] = [4, 4, 3, 2]
    some: dict[int, int] = {0: 8, -1: 8}
    tqai.patch(model, bits_k=given, bits_v=some, preset="small", level="avx2", seed=7)
    tqai.patch(model, bits_k=(4, 4), skip_layers=range(2), centering="rope", exact_prefill=False)


def options_in_a_mapping(model: PreTrainedModel, window: int) -> None:
    options: Options = {"bits_k": 3, "residual_window": window}
    tqai.patch(model, **options)
    settings = tqai.Settings.named("small", sink_tokens=0)
    assert_type(settings, tqai.Settings)
    print(tqai.Settings(bits_k=3).residual_window, tqai.PRESETS["balanced"]["bits_k"])


def in_a_context(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(name)
    with tqai.patched(model, preset="balanced") as cache:
        assert_type(cache, tqai.TqaiCache)
        model(input_ids=torch.tensor([[1]]), past_key_values=cache)
        cache = tqai.new_cache(model)


def encoder_decoder() -> None:
    model = T5ForConditionalGeneration(T5Config())
    assert_type(tqai.load_cache("file", model), tqai.TqaiEncoderDecoderCache)
    cache = tqai.patch(model, bits_k=2)
    assert_type(cache, tqai.TqaiEncoderDecoderCache)
    print(cache.self_attention_cache.nbytes, cache.cross_attention_cache.memory_report())
    with tqai.patched(model) as other:
        assert_type(other, tqai.TqaiEncoderDecoderCache)
    assert_type(tqai.new_cache(model), tqai.TqaiEncoderDecoderCache)


def measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    settings: list[str | Options] = ["k4v4", "small,residual_window=32", {"bits_k": 3}]
    results: list[tqai.Fidelity] = tqai.evaluate(model, tokenizer, settings=settings, read=64)
    found: list[tqai.Recall] = tqai.needle(model, tokenizer, settings=["k4v2"], depths=[0.5])
    return results[0].kl_mean + found[0].answered
