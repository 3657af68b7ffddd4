from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import tqai
import transformers
from caches import SEALING, filled
from conftest import FAMILIES, SMALL, TRANSFORMERS_4, Models, make_ids, make_model
from tqai.shapes.heads import Heads
from tqai.transformers.cache.layer import TqaiLayer
from tqai.transformers.model.geometry import decoder_of, geometry_of
from tqai.transformers.model.other_layers import HYBRIDS


def test_a_model_and_its_decoder_have_one_geometry(models: Models) -> None:
    model = models("qwen3")
    geometry = geometry_of(model)
    assert decoder_of(model) is model.model is decoder_of(model.model)
    assert geometry_of(model.model) is geometry
    assert geometry.heads == (Heads(2, 32),) * 2
    assert geometry.describe() == "Qwen3ForCausalLM (2 layers, 2 key/value heads of 32)"


def test_the_decoder_of_a_model_around_a_whole_model_is_the_innermost() -> None:
    whole, inner = make_model("qwen3"), make_model()
    whole.get_decoder = lambda: inner  # with a head of its own
    assert decoder_of(whole) is inner.model
    assert geometry_of(whole) is geometry_of(inner.model)


def test_models_of_one_shape_differ() -> None:
    model = make_model()
    twin = copy.deepcopy(model)
    assert geometry_of(twin).heads == geometry_of(model).heads
    assert geometry_of(twin) == geometry_of(model) == geometry_of(model)
    assert geometry_of(twin).identity == geometry_of(model).identity
    other = make_model(seed=2)
    assert geometry_of(other) == geometry_of(model)
    assert geometry_of(other).identity != geometry_of(model).identity


def test_heads_that_the_modules_do_not_tell_are_unknown(models: Models) -> None:
    assert geometry_of(models("gpt_neox")).heads == (None, None)
    assert geometry_of(models("gpt_neox")).describe() == "GPTNeoXForCausalLM (2 layers)"


def test_layers_without_keys_stay_those_of_transformers() -> None:
    if not hasattr(transformers, "Qwen3NextConfig"):
        pytest.skip("this transformers has no hybrid model")
    config = transformers.Qwen3NextConfig(
        **SMALL,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if not HYBRIDS:
        with pytest.raises(NotImplementedError, match="Qwen3NextForCausalLM.*transformers 5.5"):
            tqai.patch(model)
        return
    ids = make_ids(tokens=200)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 1000}
    expected = model.generate(ids, **options)
    cache = tqai.patch(model, residual_window=1000)
    assert [isinstance(layer, TqaiLayer) for layer in cache.layers] == [False, True]
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
    assert cache.memory_report()["tokens"] == 207


LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 16,
    "head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
    "n_group": 1,
    "topk_group": 1,
}


def packed_bytes(cache: object) -> list[float]:
    """Of each token and layer."""
    return [
        layer["packed_bytes"] / layer["packed_tokens"] for layer in cache.memory_report()["layers"]
    ]


def latent_model() -> object:
    """A model with multi-head latent attention, whose cache holds latents and rotary keys."""
    if TRANSFORMERS_4:
        pytest.skip("this transformers caches keys and values of such a model")
    config = transformers.DeepseekV3Config(**{**SMALL, **LATENT})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    own = transformers.DynamicCache(config=config)
    filled(model, own, make_ids(tokens=3))
    if own.layers[0].keys.shape[1] != 1:
        pytest.skip("this transformers caches keys and values of such a model")
    return model


def test_a_rotary_key_beside_a_latent_gets_more_bits_than_values(tmp_path: Path) -> None:
    model = latent_model()
    assert all((32, 16) in latents for latents in geometry_of(model).latents)

    def read(cache: object) -> object:
        # Attention that is not given the layers' own views leaves sealing to the next update.
        return filled(model, filled(model, cache, make_ids(tokens=200)), make_ids(tokens=1))

    cache = read(tqai.patch(model, bits_k=4, bits_v=2, **SEALING))
    of_a_latent = 32 * 4 / 8 + 2
    assert packed_bytes(cache) == [of_a_latent + 16 * 8 / 8 + 2] * 2
    keys, values = cache.layers[1].keys, cache.layers[1].values
    path = tmp_path / "cache.safetensors"
    tqai.save_cache(cache, path)
    for other in (tqai.load_cache(path, model), copy.deepcopy(cache)):
        assert torch.equal(other.layers[1].keys, keys)
        assert torch.equal(other.layers[1].values, values)
        assert packed_bytes(other) == packed_bytes(cache)

    bits = {"bits_k": [2, 3], "bits_v": [4, 2]}
    cache = read(tqai.patch(model, **bits, **SEALING))
    assert packed_bytes(cache) == [32 * 4 / 8 + 2 + 16 * 4 / 8 + 2, 32 * 3 / 8 + 2 + 16 * 6 / 8 + 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_are_not_taken_for_latents(models: Models, family: str) -> None:
    model = models(family)
    own = filled(model, transformers.DynamicCache(config=model.config), make_ids(tokens=3))
    for layer, latents in zip(own.layers, geometry_of(model).latents, strict=True):
        assert (layer.keys.shape[3], layer.values.shape[3]) not in latents


SPARSE = {
    **SMALL,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_topk": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "head_dim": 16,
}
"""For attention to a few tokens, which an index chooses where the attention's name is known."""


def sparse(name: str, **fields: Any) -> Any:
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    config = getattr(transformers, f"{name}Config")(**{**SPARSE, **fields})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08)
    return model


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(make_ids(tokens=120), **options).logits


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("DeepseekV4", ["heavily_compressed_attention", "compressed_sparse_attention"]),
        ("MiniMaxM3VLText", ["minimax_m3_sparse"] * 2),
    ],
)
def test_the_layers_to_leave_exact_are_all_named(name: str, kinds: list[str]) -> None:
    first = "sliding_attention" if name == "DeepseekV4" else "full_attention"
    heads = 1 if name == "DeepseekV4" else 4
    model = sparse(name, layer_types=[first, *kinds], num_key_value_heads=heads)
    expected = logits(model)
    with pytest.raises(NotImplementedError, match=r"layer 1 .* skip_layers=\[1, 2\]"):
        tqai.patch(model)
    tqai.patch(model, skip_layers=[1, 2])
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model, use_cache=False), expected)
