from __future__ import annotations

import copy

import pytest
import torch
import tqai
import transformers
from conftest import SMALL, Models, make_ids, make_model
from tqai.transformers.geometry import decoder_of, geometry_of
from tqai.transformers.layer import Heads, TqaiLayer
from tqai.transformers.other_layers import HYBRIDS


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
