"""What is learnt of keys and queries, from models of many makes."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
import tqai
import transformers as hf
from caches import SEALING, filled
from conftest import SMALL, TRANSFORMERS_4, Models, make_ids, make_model
from tqai import _core
from tqai.transformers.basis import learn
from tqai.transformers.model.geometry import decoder_of, geometry_of

ADAPTIVE: Any = {"codec": "adaptive", **SEALING}


def moments_of(model: Any, seed: int = 1) -> list[Any]:
    return learn.learn_moments(geometry_of(model), decoder_of(model), seed, lambda share: None)


def codecs_of(model: Any) -> dict[str, int]:
    return tqai.patch(model, **ADAPTIVE).memory_report()["codecs"]


def make(name: str, **fields: Any) -> Any:
    torch.manual_seed(1)
    config = getattr(hf, f"{name}Config")(**{**SMALL, **fields})
    return hf.AutoModelForCausalLM.from_config(config).eval()


ROWS = learn.TOKENS // (learn.ROW_TOKENS - learn.SINK_TOKENS)


def written_by(model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, list[Any]]:
    """[rows, tokens] int64 that the model writes while it is learnt from, and what is learnt."""
    drawn: list[torch.Tensor] = []
    draw = learn._drawn

    def noted(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        drawn.append(draw(logits, generator))
        return drawn[-1]

    with monkeypatch.context() as patched:
        patched.setattr(learn, "_drawn", noted)
        moments = moments_of(model)
    first = torch.full_like(drawn[0], SMALL["bos_token_id"])
    return torch.cat([first, *drawn[: learn.ROW_TOKENS - 1]], 1), moments


def checked(model: Any, ids: torch.Tensor, found: Any) -> None:
    """Holds moments of layer 1 against what its projections make of the ids."""
    decoder, geometry = decoder_of(model), geometry_of(model)
    seen: list[tuple[Any, Any]] = []
    cache = hf.DynamicCache(config=model.config)
    attention = decoder.layers[1].self_attn
    normed = getattr(attention, "q_norm", None)
    hook = (normed or attention.q_proj).register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        decoder(input_ids=ids, past_key_values=cache, use_cache=True)
    hook.remove()
    heads = geometry.heads[1]
    assert heads is not None
    queries = seen[0].reshape(*ids.shape, -1, heads.dim)  # not turned yet, as in position 0
    groups = queries.shape[2] // heads.count
    for head in range(heads.count):
        own = queries[:, learn.SINK_TOKENS :, head * groups : (head + 1) * groups]
        flat = own.reshape(-1, heads.dim).double().numpy()
        expected = flat.T @ flat / len(flat)
        np.testing.assert_allclose(found.queries_until(head, 0), expected, rtol=1e-3, atol=1e-4)
        kept = ids.shape[0] * (ids.shape[1] - learn.SINK_TOKENS)
        assert found.tokens(head) == kept
        keys = cache.layers[1].keys[:, head, learn.SINK_TOKENS :]
        assert found.keys_until(head, 0).trace() <= keys.square().sum(-1).mean() + 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_they_are_the_moments_of_what_attention_reads(
    models: Models, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models(family)
    ids, moments = written_by(model, monkeypatch)
    assert ids.shape == (ROWS, learn.ROW_TOKENS)
    checked(model, ids, moments[1])


@pytest.mark.parametrize("known", [True, False])
def test_few_rows_read_a_first_token_that_all_have(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(seed=13)
    sizes: list[int] = []
    forward = type(model).forward

    @functools.wraps(forward)
    def noted(self: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        return forward(self, **kwargs)

    monkeypatch.setattr(type(model), "forward", noted)
    if not known:  # as of a cache that holds something else
        monkeypatch.setattr(learn, "_spread", lambda cache, copies: False)
    ids, moments = written_by(model, monkeypatch)
    passes = learn.ROW_TOKENS - 2 if known else learn.ROW_TOKENS  # the last is the decoder's alone
    assert sizes == [learn.SAME_ROWS] + [ROWS] * passes
    checked(model, ids, moments[1])


def test_a_model_writes_what_it_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(seed=12)
    ids, _ = written_by(model, monkeypatch)
    assert len(ids.unique()) > 64
    with torch.no_grad():
        model.lm_head.weight[40:].copy_(-model.lm_head.weight[:1])
        model.lm_head.weight[:40].copy_(model.lm_head.weight[:1] * 2000)
    ids, _ = written_by(model, monkeypatch)  # 0 to 39, or the others, from any state
    lower = ids[:, 1:] < 40
    assert lower.any() and not lower.all()
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, :-1].argmax(-1) < 40
    assert (expected == lower).float().mean() > 0.99


def test_tokens_are_drawn_as_likely_as_they_are() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, torch.nan]]).expand(4000, 5).clone()
    logits[:, 4] = -torch.inf
    drawn = learn._drawn(logits, torch.Generator("cpu").manual_seed(1))
    assert drawn.shape == (4000, 1)
    shares = torch.bincount(drawn[:, 0], minlength=5) / 4000
    torch.testing.assert_close(shares, logits[0].softmax(-1), rtol=0.0, atol=0.03)
    assert (learn._drawn(torch.full((9, 7), torch.nan), torch.Generator("cpu")) < 7).all()


def test_a_decoder_without_a_head_reads_random_tokens() -> None:
    torch.manual_seed(1)
    model = hf.AutoModel.from_config(hf.LlamaConfig(**SMALL)).eval()
    checked(model, learn._random_ids(geometry_of(model), 1), moments_of(model)[1])


def test_a_model_whose_forward_wants_more_than_ids_reads_random_tokens() -> None:
    class Wanting(hf.LlamaForCausalLM):
        """Takes ids with an image alone."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if "image" not in kwargs:
                raise ValueError("no image")
            return super().forward(*args, **kwargs)

    torch.manual_seed(1)
    model = Wanting(hf.LlamaConfig(**SMALL)).eval()
    checked(model, learn._random_ids(geometry_of(model), 1), moments_of(model)[1])


def test_the_number_of_threads_does_not_show() -> None:
    model = make_model(seed=11)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append([each.queries_until(0, 0) for each in moments_of(model)])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        assert np.array_equal(one, two)


def test_the_default_dtype_does_not_show() -> None:
    model = make_model(seed=11)
    usual = [each.queries_until(0, 0) for each in moments_of(model)]
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        other = [each.queries_until(0, 0) for each in moments_of(model)]
    finally:
        torch.set_default_dtype(before)
    for one, two in zip(usual, other, strict=True):
        assert np.array_equal(one, two)


def test_rows_begin_as_texts_do_and_are_drawn_by_the_seed(models: Models) -> None:
    geometry = geometry_of(models("llama"))
    ids = learn._random_ids(geometry, 1)
    rows = math.ceil(learn.RANDOM_TOKENS / (learn.RANDOM_ROW_TOKENS - learn.SINK_TOKENS))
    assert ids.shape == (rows, learn.RANDOM_ROW_TOKENS)
    assert (ids[:, 0] == SMALL["bos_token_id"]).all()
    assert torch.equal(ids, learn._random_ids(geometry, 1))
    assert not torch.equal(ids, learn._random_ids(geometry, 2))


def test_wide_heads_are_shown_more_tokens() -> None:
    model = make("Llama", head_dim=512)
    rows = math.ceil(3.5 * 512 / (learn.RANDOM_ROW_TOKENS - learn.SINK_TOKENS))
    assert learn._random_ids(geometry_of(model), 1).shape == (rows, learn.RANDOM_ROW_TOKENS)


def test_a_short_model_reads_shorter_rows() -> None:
    model = make("Llama", max_position_embeddings=24)
    assert learn._random_ids(geometry_of(model), 1).shape == (45, 24)
    assert codecs_of(model) == {"adaptive": 2}


def test_without_a_first_token_rows_begin_anyhow() -> None:
    model = make("Llama", bos_token_id=None)
    assert len(learn._random_ids(geometry_of(model), 1)[:, 0].unique()) > 1


@pytest.mark.parametrize("name", ["GPT2", "OPT", "SmolLM3"])
def test_layers_without_a_rotary_embedding_have_bases(name: str) -> None:
    fields: dict[str, Any] = {"no_rope_layers": [1, 0]} if name == "SmolLM3" else {}
    if name == "OPT":
        fields = {"word_embed_proj_dim": 64, "ffn_dim": 96}
    model = make(name, **fields)
    assert codecs_of(model) == {"adaptive": len(geometry_of(model).heads)}


def test_an_embedding_that_is_not_recognised_leaves_a_layer_scalar() -> None:
    model = make("SmolLM3", no_rope_layers=[1, 0])
    attention = type(model.model.layers[1].self_attn)

    class Doubled(attention):  # type: ignore[misc, valid-type]
        """Turns keys by twice the angles that the buffers say."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            cos, sin = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = cos * cos - sin * sin, 2 * cos * sin
            return super().forward(*args, **kwargs)

    model.model.layers[0].self_attn.__class__ = Doubled
    assert geometry_of(model).ropes == (None, None)
    why = "scalar: its rotary embedding is not recognised"
    assert codecs_of(model) == {why: 1, "adaptive": 1}
    assert [layer.basis is None for layer in tqai.new_cache(model).layers] == [True, False]


def test_latents_have_none() -> None:
    fields = {
        "q_lora_rank": 16,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
    }
    model = make("DeepseekV3", **fields)
    geometry = geometry_of(model)
    moments = moments_of(model)
    for layer in range(2):
        # Expanded keys, as older versions cache them, are what attention reads.
        latent = any(geometry.latents[layer]) and isinstance(moments[layer], str)
        assert latent or isinstance(moments[layer], _core.KeyMoments)


@pytest.mark.skipif(TRANSFORMERS_4, reason="Gemma 3n's shared keys are kept elsewhere there")
def test_queries_of_layers_that_share_keys_count() -> None:
    fields = {
        "head_dim": 16,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
        "sliding_window": 64,
    }
    model = make("Gemma3nText", **fields)
    own = moments_of(model)[1].queries_until(0, 0)
    model.model.layers[3].self_attn.q_proj.weight.data.neg_().mul_(0.1)  # its norm undoes that
    model.model.layers[3].self_attn.q_norm.weight.data.mul_(3)
    assert not np.allclose(moments_of(model)[1].queries_until(0, 0), own)
    assert set(codecs_of(model)) == {"adaptive"}


def test_sliding_layers_have_bases_of_all_rows() -> None:
    model = make_model("mistral", sliding_window=learn.ROW_TOKENS - 2)
    found = moments_of(model)[0]
    assert found.tokens(0) == ROWS * (learn.ROW_TOKENS - learn.SINK_TOKENS)
    cache = filled(model, tqai.patch(model, residual_window=4, codec="adaptive"), make_ids(1, 200))
    assert cache.memory_report()["packed_tokens"] >= 0
    assert cache.memory_report()["codecs"] == {"adaptive": 2}


@pytest.mark.parametrize("name", ["Bart", "Whisper"])
def test_encoder_decoders_have_them_for_their_own_tokens(name: str) -> None:
    small: dict[str, Any] = {
        "d_model": 64,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "vocab_size": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    torch.manual_seed(1)
    cls = getattr(hf, f"{name}ForConditionalGeneration")
    model = cls(getattr(hf, f"{name}Config")(**small)).eval()
    report = tqai.patch(model, **ADAPTIVE).memory_report()
    assert report["cross_attention_cache"]["codecs"] == {"scalar: it reads an encoder's output": 2}
    assert report["self_attention_cache"]["codecs"] == {"adaptive": 2}
    assert report["basis_bytes"] == report["self_attention_cache"]["basis_bytes"] > 0
    assert tqai.patch(model).memory_report()["cross_attention_cache"]["codecs"] == {"scalar": 2}
    open_ = tqai.patch(model, codec="auto")
    assert [half.settings.codec for half in open_.halves] == ["adaptive", "adaptive"]


def test_a_model_in_bf16_with_autocast_and_grad(models: Models) -> None:
    model = make_model(dtype=torch.bfloat16)
    with torch.enable_grad(), torch.autocast("cpu", torch.float16):
        assert codecs_of(model) == {"adaptive": 2}


def test_eager_attention_has_them_too(models: Models) -> None:
    eager = make_model(attn_implementation="eager")
    for ours, theirs in zip(moments_of(eager), moments_of(make_model()), strict=True):
        np.testing.assert_allclose(
            ours.queries_until(0, 0), theirs.queries_until(0, 0), rtol=1e-3, atol=1e-5
        )


def test_a_patched_model_is_learnt_from_as_it_was(models: Models) -> None:
    model = models("llama")
    expected = moments_of(model)[1].queries_until(0, 0)
    tqai.patch(model)
    assert np.array_equal(moments_of(model)[1].queries_until(0, 0), expected)


def test_a_copied_model_learns_for_itself(models: Models) -> None:
    import copy

    model = make_model(seed=3)
    first = tqai.patch(model, **ADAPTIVE)
    copied = copy.deepcopy(model)
    second = tqai.new_cache(copied)
    assert [layer.basis.id for layer in first.layers] == [layer.basis.id for layer in second.layers]
    with torch.no_grad():
        copied.model.layers[0].self_attn.q_proj.weight.mul_(torch.linspace(0.1, 3, 64)[:, None])
    changed = tqai.new_cache(copied)
    assert changed.layers[0].basis.id != first.layers[0].basis.id
