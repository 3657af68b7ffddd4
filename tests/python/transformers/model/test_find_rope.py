"""Rotary embeddings are found by trying the model, and what is found turns its keys."""

from __future__ import annotations

import pytest
import torch
import tqai
import transformers as hf
from tqai.shapes.rope import Rope
from tqai.transformers.model.geometry import decoder_of, geometry_of
from transformers.cache_utils import DynamicCache

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def make(name: str, **config: object) -> hf.PreTrainedModel:
    torch.manual_seed(3)
    shape = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 4096,
    }
    kind = getattr(hf, f"{name}TextConfig", None) or getattr(hf, f"{name}Config")
    return getattr(hf, f"{name}ForCausalLM")(kind(**{**shape, **config})).eval()


@pytest.mark.parametrize(
    ("name", "config", "layout", "rotary_dim"),
    [
        ("Llama", {}, "half_split", 16),
        ("Llama", {"rope_scaling": LLAMA3}, "half_split", 16),
        ("Llama", {"rope_scaling": LINEAR}, "half_split", 16),
        ("Qwen2", {"rope_scaling": YARN}, "half_split", 16),
        ("Qwen3", {"head_dim": 32}, "half_split", 32),
        ("Mistral", {"sliding_window": 32}, "half_split", 16),
        ("Phi3", {}, "half_split", 16),
        ("Phi", {}, "half_split", 8),
        ("Cohere", {}, "interleaved", 16),
        ("Glm4", {"head_dim": 16}, "interleaved", 8),
    ],
)
def test_the_layout_and_the_frequencies_turn_the_models_own_keys(
    name: str, config: dict[str, object], layout: str, rotary_dim: int
) -> None:
    model = make(name, **config)
    for rope in geometry_of(model).ropes:
        assert rope is not None
        assert (rope.layout, rope.rotary_dim) == (layout, rotary_dim)
    # At positions that the probe did not try.
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        decoder_of(model)(
            input_ids=torch.full((3, 1), 7),
            position_ids=torch.tensor([[0], [77], [1234]]),
            past_key_values=cache,
        )
    for layer, rope in zip(cache.layers, geometry_of(model).ropes, strict=True):
        for row, position in ((1, 77), (2, 1234)):
            turned = rope.turn(layer.keys[0], position).float()
            torch.testing.assert_close(turned, layer.keys[row], rtol=0, atol=2e-3)


def test_two_bases_in_one_model_are_told_apart() -> None:
    model = make(
        "Gemma3", head_dim=32, layer_types=["sliding_attention", "full_attention"], sliding_window=8
    )
    local, whole = geometry_of(model).ropes
    assert local is not None and whole is not None
    assert local.inv_freq != whole.inv_freq


def test_layers_without_an_embedding_get_none() -> None:
    first, second = geometry_of(make("SmolLM3", no_rope_layers=[1, 0])).ropes
    assert first is not None and second is None
    config = hf.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4)
    assert geometry_of(hf.GPT2LMHeadModel(config)).ropes == (None, None)


def test_what_is_not_recognised_says_so() -> None:
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4))
    assert tqai.patch(model).memory_report()["rotary"] == {"unrecognised": 2}
    with pytest.raises(ValueError, match="layer 0: centering='rope' needs a rotary embedding"):
        tqai.patch(model, centering="rope")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change_are_those_of_a_short_text_at_first(kind: str) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8} if kind == "longrope" else {}
    scaling = {"rope_type": kind, "factor": 4.0, **factors}
    scaling["original_max_position_embeddings"] = 64
    model = make("Llama", rope_scaling=scaling, max_position_embeddings=64)
    plain = geometry_of(make("Llama")).ropes[0]
    rope = geometry_of(model).ropes[0]
    assert rope is not None and plain is not None
    assert rope.changes and not plain.changes
    assert rope.inv_freq == plain.inv_freq


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = make("Llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert geometry_of(model).ropes[0] is not None
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keys_are_recognised_too(dtype: torch.dtype) -> None:
    rope = geometry_of(make("Qwen2").to(dtype)).ropes[0]
    assert rope is not None and rope.layout == "half_split"


def test_interleaved_pairs_are_neighbours() -> None:
    rope = Rope((torch.pi / 2,), "interleaved")
    turned = rope.turn(torch.tensor([1.0, 0.0, 5.0]), 1)
    torch.testing.assert_close(turned.float(), torch.tensor([0.0, 1.0, 5.0]))


def biased_model() -> hf.PreTrainedModel:
    """A Qwen2-like model whose key biases are 30 times the spread of its keys."""
    model = make("Qwen2", hidden_size=256, intermediate_size=256)
    with torch.no_grad():
        for layer in model.model.layers:
            projection = layer.self_attn.k_proj
            inputs = layer.input_layernorm(torch.randn(64, projection.in_features))
            spread = (inputs @ projection.weight.T).std()
            projection.bias.normal_().mul_(30 * spread)
            # Scores of a trained size, so that attention is neither flat nor a single token.
            layer.self_attn.q_proj.weight.mul_(4.0)
    return model


def read_packed(model: hf.PreTrainedModel, ids: torch.Tensor, prefill: int) -> torch.Tensor:
    """Log probabilities of the tokens after `prefill`, each read on its own."""
    cache = tqai.new_cache(model)
    rows = []
    with torch.no_grad():
        model(ids[:, :prefill], past_key_values=cache)
        for position in range(prefill, ids.shape[1]):
            logits = model(ids[:, position : position + 1], past_key_values=cache).logits
            rows.append(logits[0, -1].log_softmax(-1))
    assert cache.memory_report()["packed_tokens"] > 0
    return torch.stack(rows)


def test_biased_keys_cost_a_hundredth_with_the_rotary_centre() -> None:
    model = biased_model()
    ids = torch.randint(3, 64, (1, 320), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        exact = model(ids).logits[0, 256:].log_softmax(-1)
    divergence = {}
    for centering in ("none", "auto"):
        tqai.patch(model, bits_k=4, bits_v=8, residual_window=16, centering=centering)
        given = read_packed(model, ids, 256)
        divergence[centering] = float((exact.exp() * (exact - given)).sum(-1).mean())
    assert tqai.new_cache(model).memory_report()["rotary"] == {"half_split": 2}
    assert divergence["auto"] <= 0.01 * divergence["none"]
