"""Models whose ``generate`` calls that of a model inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import tqai
import transformers as hf
from caches import SEALING
from conftest import SMALL, make_ids
from tqai.transformers.model import parts

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QFORMER = {**VISION, "encoder_hidden_size": 32, "vocab_size": 64}
OPT = {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64}
T5 = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
IMAGE = 120
"""The token that stands for an image."""


def randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08, generator=generator)
    return model.eval()


def with_image(ids: torch.Tensor) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(1, 3, 28, 28, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def blip2(text: dict[str, Any], instruct: bool = False) -> tuple[Any, dict[str, Any]]:
    name = "InstructBlip" if instruct else "Blip2"
    config = getattr(hf, f"{name}Config")(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=text,
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    torch.manual_seed(1)
    model = randomised(getattr(hf, f"{name}ForConditionalGeneration")(config))
    ids = make_ids(tokens=120).clamp(max=IMAGE - 1)
    ids[:, 5:9] = IMAGE
    inputs = with_image(ids)
    if instruct:
        inputs["qformer_input_ids"] = make_ids(tokens=6).clamp(max=63)
    return model, inputs


def blip() -> tuple[Any, dict[str, Any]]:
    text = {**VISION, "vocab_size": 128, "encoder_hidden_size": 32, "num_hidden_layers": 2}
    text |= {"bos_token_id": 1, "sep_token_id": 127, "pad_token_id": 0}
    config = hf.BlipConfig(text_config=text, vision_config=VISION, projection_dim=32)
    torch.manual_seed(1)
    model = randomised(hf.BlipForConditionalGeneration(config))
    return model, with_image(make_ids(tokens=120).clamp(max=126))


def kosmos2() -> tuple[Any, dict[str, Any]]:
    text = {"vocab_size": 128, "embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 2}
    text |= {"max_position_embeddings": 512, "dropout": 0.0}
    config = hf.Kosmos2Config(text_config=text, vision_config=VISION, latent_query_num=4)
    torch.manual_seed(1)
    model = randomised(hf.Kosmos2ForConditionalGeneration(config))
    inputs = with_image(make_ids(tokens=120))
    inputs["image_embeds_position_mask"] = torch.zeros_like(inputs["input_ids"])
    inputs["image_embeds_position_mask"][:, 5:9] = 1
    return model, inputs


MODELS = {
    "BLIP": blip,
    "BLIP-2 with OPT": lambda: blip2({**OPT, "model_type": "opt"}),
    "BLIP-2 with T5": lambda: blip2({**T5, "model_type": "t5", "decoder_start_token_id": 0}),
    "InstructBLIP": lambda: blip2({**OPT, "model_type": "opt"}, instruct=True),
    "Kosmos-2": kosmos2,
}


@pytest.fixture
def filled_caches(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that says which compressed caches were made and hold something."""
    made: list[Any] = []
    real = tqai.TqaiCache.__init__

    def recorded(cache: Any, *arguments: Any, **options: Any) -> None:
        real(cache, *arguments, **options)
        made.append(cache)

    monkeypatch.setattr(tqai.TqaiCache, "__init__", recorded)
    return lambda: [cache for cache in made if cache.get_seq_length() > 0]


@pytest.mark.parametrize("name", MODELS)
def test_what_an_inner_model_generates_is_compressed(name: str, filled_caches: Any) -> None:
    model, inputs = MODELS[name]()
    greedy = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    expected = model.generate(**inputs, **greedy)
    returned = tqai.patch(model)
    assert torch.equal(model.generate(**inputs, **greedy), expected)
    assert filled_caches()
    assert type(tqai.new_cache(model)) is type(returned)
    before = len(filled_caches())
    tqai.patch(model, **SEALING)
    model.generate(**inputs, **greedy)
    assert any(cache.memory_report()["packed_tokens"] for cache in filled_caches()[before:])
    (inner,) = parts.parts_of(model)
    assert inner is not model and tqai.new_cache(inner).settings.residual_window == 16
    tqai.unpatch(model)
    before = len(filled_caches())
    assert torch.equal(model.generate(**inputs, **greedy), expected)
    assert len(filled_caches()) == before
    for patched in (model, inner):
        with pytest.raises(ValueError, match="not patched"):
            tqai.unpatch(patched)


def test_a_model_that_generates_by_several_is_refused() -> None:
    fields = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "block_size": 64}
    part = {**fields, "input_vocab_size": 64, "output_vocab_size": 64}
    config = hf.BarkConfig(
        semantic_config=part,
        coarse_acoustics_config=part,
        fine_acoustics_config={**part, "n_codes_total": 4, "n_codes_given": 1},
        codec_config=hf.EncodecConfig(num_filters=2, hidden_size=8, codebook_size=16).to_dict(),
    )
    model = hf.BarkModel(config).eval()
    call = r"tqai.patch\(model.semantic\) and tqai.patch\(model.coarse_acoustics\)"
    with pytest.raises(NotImplementedError, match=f"BarkModel.*its semantic and .*{call}"):
        tqai.patch(model)
    tqai.patch(model.semantic)
    tqai.unpatch(model.semantic)


def test_models_that_generate_by_themselves_have_one_part() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))
    assert parts.parts_of(model) == [model]
    assert parts.parts_of(model.model) == [model.model]
    assert parts.parts_of(torch.nn.Linear(1, 1))


def test_a_decoder_that_is_called_past_its_wrapper_is_found(filled_caches: Any) -> None:
    """SpeechT5 generates speech without ``generate``'s own loop, by what its decoder wraps."""
    layers = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    layers |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    sizes = {"num_mel_bins": 8, "speech_decoder_prenet_units": 16, "speaker_embedding_dim": 8}
    config = hf.SpeechT5Config(
        vocab_size=128,
        hidden_size=32,
        speech_decoder_postnet_units=16,
        speech_decoder_postnet_layers=1,
        speech_decoder_prenet_dropout=0.0,
        **layers,
        **sizes,
    )
    torch.manual_seed(1)
    model = randomised(hf.SpeechT5ForTextToSpeech(config))
    inputs = {"input_ids": make_ids(tokens=80), "speaker_embeddings": torch.zeros(1, 8)}
    options = {"threshold": 2.0, "maxlenratio": 0.5}

    def generate() -> torch.Tensor:
        torch.manual_seed(0)  # its dropout is on in generation too
        return model.generate(**inputs, **options)

    expected = generate()
    tqai.patch(model)
    assert torch.equal(generate(), expected)
    assert {type(cache) for cache in filled_caches()} >= {tqai.TqaiCache}


@pytest.mark.parametrize("beams", [1, 2])
def test_rows_of_documents_go_along_with_their_beam(beams: int, filled_caches: Any) -> None:
    """RAG reorders rows in groups, by a method of its own that takes caches apart."""
    question = hf.DPRConfig(vocab_size=128, **VISION)
    layers = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 96}
    layers |= {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96}
    special = {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
    special["decoder_start_token_id"] = 2
    bart = hf.BartConfig(vocab_size=128, d_model=64, forced_eos_token_id=None, **layers, **special)
    config = hf.RagConfig.from_question_encoder_generator_configs(
        question, bart, n_docs=2, vocab_size=128, **special
    )
    torch.manual_seed(1)
    model = randomised(hf.RagTokenForGeneration(config))
    documents = make_ids(2, 100)
    inputs = {
        "context_input_ids": documents,
        "context_attention_mask": torch.ones_like(documents),
        "doc_scores": torch.tensor([[1.0, 0.5]]),
        "n_docs": 2,
        "num_beams": beams,
        "max_new_tokens": 16,
        "do_sample": False,
    }
    try:
        expected = model.generate(**inputs)
    except IndexError:
        pytest.skip("this transformers has no beams for RAG")
    tqai.patch(model)
    assert torch.equal(model.generate(**inputs), expected)
    assert filled_caches()
    tqai.unpatch(model)
    assert torch.equal(model.generate(**inputs), expected)


def test_a_model_that_generates_and_has_a_part_that_does_gets_both(filled_caches: Any) -> None:
    """CSM makes the tokens of each audio frame by a small decoder inside."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    depth = {**sizes, **heads, "num_codebooks": 4, "backbone_hidden_size": 64, "vocab_size": 64}
    codec = {**sizes, **heads, "num_filters": 8, "codebook_size": 64, "upsampling_ratios": [2, 2]}
    codec |= {"codebook_dim": 16, "vector_quantization_hidden_dimension": 16, "upsample_groups": 32}
    config = hf.CsmConfig(
        **{**SMALL, "vocab_size": 64},
        num_codebooks=4,
        text_vocab_size=128,
        depth_decoder_config=depth,
        codec_config=hf.MimiConfig(**codec).to_dict(),
        codebook_eos_token_id=0,
        audio_token_id=126,
        audio_eos_token_id=127,
    )
    torch.manual_seed(1)
    model = randomised(hf.CsmForConditionalGeneration(config))
    ids = make_ids(tokens=80)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6}
    expected = model.generate(**inputs, do_sample=False)
    cache = tqai.patch(model)
    assert torch.equal(model.generate(**inputs, do_sample=False), expected)
    backbone, *frames = filled_caches()
    assert len(backbone.layers) == len(cache.layers) == 2
    assert frames and {len(one.layers) for one in frames} == {1}
    assert tqai.new_cache(model.depth_decoder).settings == cache.settings
    tqai.unpatch(model)
    with pytest.raises(ValueError, match="not patched"):
        tqai.unpatch(model.depth_decoder)
