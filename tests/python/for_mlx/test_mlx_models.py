"""Families of models that read their caches in ways of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from small_mlx import LFM2, error, make_model, mx, plain_cache, read, tokens

# isort: split
import mlx.nn as nn
import tqai
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import gemma2
from mlx_lm.models.cache import ArraysCache
from tqai.mlx.cache.layer import TqaiKVCache

_LONG = {"max_position_embeddings": 4096, "rope_theta": 1e4}
_TWO_KINDS = ["sliding_attention", "full_attention"]
_LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": None,
    "moe_intermediate_size": 32,
    "n_shared_experts": None,
    "first_k_dense_replace": 10,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
    "routed_scaling_factor": 1.0,
}
_FALCON = {
    "attention_bias": False,
    "mamba_d_conv": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 16,
    "mamba_expand": 1,
    "mamba_n_groups": 1,
    "mamba_n_heads": 4,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "mamba_rms_norm": False,
    "mamba_norm_before_gate": False,
}
_GEMMA3N = {
    "model_type": "gemma3n",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 128,
    "sliding_window": 64,
    "max_position_embeddings": 4096,
    "rope_local_base_freq": 1e4,
    "rope_theta": 1e6,
    "final_logit_softcapping": 30.0,
    "layer_types": _TWO_KINDS * 3,
    "activation_sparsity_pattern": [0.0] * 6,
    "hidden_size_per_layer_input": 8,
    "altup_num_inputs": 2,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 8,
    "rope_scaling": None,
    "query_pre_attn_scalar": 16,
}
_GEMMA4 = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "sliding_window": 64,
    "layer_types": _TWO_KINDS * 3,
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 16,
    "num_global_key_value_heads": None,
    "final_logit_softcapping": None,
    "use_double_wide_mlp": False,
    "rope_parameters": {
        "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
}
# Config; layouts of rotary embeddings found; layers that are dequantised; largest error at 8 bits.
MODELS: dict[str, tuple[dict[str, Any], dict[str, int], list[int], float]] = {
    "cohere2": (
        {"layer_norm_eps": 1e-5, "sliding_window": 64, "sliding_window_pattern": 2},
        {"interleaved": 1, "unrecognised": 1},
        [],
        0.01,
    ),
    "deepseek_v3": (_LATENT, {"unrecognised": 2}, [0, 1], 0.01),
    "falcon_h1": (_FALCON, {"half_split": 2}, [], 0.01),
    "gemma2": (
        {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
        {"half_split": 2},
        [],
        0.02,
    ),
    "gemma3n": ({"text_config": _GEMMA3N}, {"half_split": 4}, [], 0.03),
    "gemma4_text": (_GEMMA4, {"half_split": 4}, [], 0.06),
    "glm4": (
        {"partial_rotary_factor": 0.5, "attention_bias": False},
        {"interleaved": 2},
        [],
        0.02,
    ),
    "lfm2": ({"num_hidden_layers": 4, **LFM2}, {"half_split": 2}, [], 0.01),
    "stablelm": (
        {"use_qkv_bias": False, "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5},
        {"half_split": 2},
        [0, 1],
        0.01,
    ),
}
PARTS = [100, 70, 90]


@pytest.mark.parametrize("name", MODELS)
def test_each_is_right(name: str) -> None:
    config, rotary, dequantised, bound = MODELS[name]
    model = make_model(name, **{**_LONG, **config})
    text = tokens(280)
    expected = read(model, plain_cache(model), text, PARTS)
    cache = tqai.patch(model, residual_window=1024)
    assert error(read(model, cache, text, PARTS), expected) < 1e-5
    cache = tqai.patch(model, bits_k=8, bits_v=8, residual_window=16)
    assert error(read(model, cache, text, PARTS), expected) < bound
    report = cache.memory_report()
    assert (report["rotary"], report["dequantised"]) == (rotary, dequantised)
    assert report["packed_tokens"] >= 192
    if name == "lfm2":
        assert [type(layer) for layer in cache] == [ArraysCache, TqaiKVCache] * 2
    if name == "falcon_h1":
        assert all(list(map(type, layer.caches)) == [ArraysCache, TqaiKVCache] for layer in cache)


def test_latents_have_bits_of_their_own() -> None:
    """They are keys and values of all heads, and a rotary key is short."""
    cache = tqai.patch(make_model("deepseek_v3", **_LONG, **_LATENT), bits_k=3, bits_v=2)
    assert [(layer.settings.bits_k, layer.settings.bits_v) for layer in cache] == [(3, 6)] * 2


def test_a_soft_cap_is_read_packed_in_batches() -> None:
    """mlx-lm's own attention takes no mask that differs by rows."""
    model = make_model("gemma2", **{**_LONG, **MODELS["gemma2"][0]})
    tqai.patch(model, residual_window=16)
    texts = [tokens(200), tokens(90)]
    alone, rows = [], []
    for text in texts:
        cache = tqai.new_cache(model)
        read(model, cache, text, [text.shape[1]])
        rows.append(cache)
        alone.append(model(mx.array([[5]]), cache=copy.deepcopy(cache)))
    batch = [type(layers[0]).merge(layers) for layers in zip(*rows, strict=True)]
    together = model(mx.array([[5], [5]]), cache=batch)
    for row, expected in enumerate(alone):
        assert error(together[row : row + 1], expected) < 1e-5
    own = gemma2.Attention.__call__
    tqai.unpatch(model)
    assert gemma2.Attention.__call__ is not own


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights(bits: int) -> None:
    model = make_model("qwen3", head_dim=32, hidden_size=128, intermediate_size=128)
    nn.quantize(model, group_size=64, bits=bits)
    text = tokens(300)
    expected = read(model, plain_cache(model), text, PARTS)
    cache = tqai.patch(model, bits_k=8, bits_v=8, residual_window=16)
    assert error(read(model, cache, text, PARTS), expected) < 0.03
    assert cache[0].is_packed() and cache.memory_report()["rotary"] == {"half_split": 2}


@pytest.mark.parametrize("name", ["deepseek_v3", "falcon_h1", "gemma3n", "gemma4_text"])
def test_batches_of_each(name: str) -> None:
    model = make_model(name, **{**_LONG, **MODELS[name][0]})
    texts = [tokens(length)[0].tolist() for length in (120, 33, 77)]

    def answers() -> list[list[int]]:
        generator = BatchGenerator(model, stop_tokens=[], prefill_step_size=64)
        names = generator.insert(texts, [8, 5, 9])
        found: dict[int, list[int]] = {each: [] for each in names}
        for _ in range(30):
            for answer in generator.next()[1]:
                found[answer.uid].append(answer.token)
        return [found[each] for each in names]

    expected = answers()
    assert list(map(len, expected)) == [8, 5, 9]
    tqai.patch(model, residual_window=1024)
    assert answers() == expected
