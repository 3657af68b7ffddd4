"""Models whose decoder reads an encoder: both halves of their cache are compressed."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tqai
import transformers
from caches import traces
from conftest import VOCABULARY, make_ids, make_model
from tqai import _core
from tqai.transformers.attention import functions as attention
from tqai.transformers.model.names import cache_name
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicSlidingWindowLayer

SEALING = {"residual_window": 16, "sink_tokens": 2, "bits_k": 4, "bits_v": 4}
TOKENS = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
BART = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
GEMMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 40,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "T5": ("T5", T5),
    "BART": ("Bart", {**BART, "max_position_embeddings": 1024}),
    "Marian": ("Marian", {**BART, "max_position_embeddings": 1024}),
    "M2M-100": ("M2M100", BART),
    "T5Gemma": ("T5Gemma", {"encoder": GEMMA, "decoder": GEMMA}),
    "Whisper": (
        "Whisper",
        {**BART, "num_mel_bins": 16, "max_source_positions": 150, "max_target_positions": 512},
    ),
}
# Of attention, by the kernel's arithmetic; two layers of random weights carry it on undiminished.
KERNEL_ERROR = 0.05


def make(family: str, **options: Any) -> Any:
    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**TOKENS, **fields, **options})
    torch.manual_seed(1)
    auto = transformers.AutoModelForSeq2SeqLM
    if family == "Whisper":
        auto = transformers.AutoModelForSpeechSeq2Seq
        config.begin_suppress_tokens = config.suppress_tokens = None
    model = auto.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08)
    model.family = family
    return model


def encoded(model: Any, tokens: int = 100, batch: int = 2, padded: int = 0) -> dict[str, Any]:
    """What the encoder gets: `tokens` of text, or 150 frames of sound."""
    if model.family == "Whisper":
        generator = torch.Generator().manual_seed(0)
        return {"input_features": torch.randn(batch, 16, 300, generator=generator)}
    mask = torch.ones(batch, tokens, dtype=torch.long)
    if padded:
        mask[1, -padded:] = 0
    return {"input_ids": make_ids(batch, tokens), "attention_mask": mask}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    name = f"{FAMILIES[request.param][0]}Config"
    try:
        getattr(transformers, name)()
    except Exception as error:  # transformers 5.4.0 refuses its own default for M2M-100
        pytest.skip(f"transformers {transformers.__version__} has no default {name}: {error}")
    return make(request.param)


@pytest.fixture
def bart() -> Any:
    return make("BART")


def wide(**settings: Any) -> dict[str, Any]:
    """Settings under which nothing is sealed, whatever the encoder gives."""
    return {"residual_window": 512, **settings}


LOGITS = {"return_dict_in_generate": True, "output_logits": True}


def greedily(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    if model.family == "Whisper":  # its own generate() returns other things
        return [model.generate(**encoded(model), **options)]
    result = model.generate(**encoded(model, padded=30), **LOGITS, **options)
    return [result.sequences, *result.logits]


def beams(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    return [
        model.generate(**encoded(model, padded=7), num_beams=3, num_return_sequences=2, **options)
    ]


def beam_samples(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    options = {**options, "do_sample": True, "num_beams": 2}
    return [model.generate(**encoded(model), **options)]


def prompted(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    """With several tokens for the decoder to begin with."""
    return [model.generate(**encoded(model), decoder_input_ids=make_ids(2, 9), **options)]


def prompt_lookup(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    return [
        model.generate(
            **encoded(model, batch=1),
            decoder_input_ids=make_ids(1, 9).repeat(1, 2),
            prompt_lookup_num_tokens=3,
            **options,
        )
    ]


def forward(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        first = model(**encoded(model), decoder_input_ids=make_ids(2, 9))
        again = model(
            **encoded(model),
            decoder_input_ids=make_ids(2, 3),
            past_key_values=first.past_key_values,
        )
    return [first.logits, again.logits]


FEATURES: list[Callable[[Any, dict[str, Any]], list[torch.Tensor]]] = [
    greedily,
    beams,
    beam_samples,
    prompted,
    prompt_lookup,
    forward,
]


def cuts_what_it_reads(model: Any) -> bool:
    """Whether the plain model's cache of the encoder's output forgets some of it."""
    out = model.generate(
        **encoded(model), max_new_tokens=1, do_sample=False, return_dict_in_generate=True
    )
    layers = getattr(out.past_key_values.cross_attention_cache, "layers", ())
    return any(type(layer) is DynamicSlidingWindowLayer for layer in layers)


@pytest.mark.parametrize("feature", FEATURES)
def test_with_nothing_sealed_it_is_as_without_tqai(
    model: Any, feature: Any, greedy: dict[str, Any]
) -> None:
    if cuts_what_it_reads(model):
        pytest.skip("this transformers cuts what T5Gemma's decoder reads to its sliding window")
    # A token that is in no text ends none; the models' own code wants to see it among the logits.
    greedy = {**greedy, "eos_token_id": VOCABULARY - 1, "min_new_tokens": 16}
    expected = feature(model, greedy)
    tqai.patch(model, **wide())
    got = feature(model, greedy)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_what_generate_makes_is_compressed(model: Any, greedy: dict[str, Any]) -> None:
    tqai.patch(model, **SEALING)
    made = []
    decoder = model.get_decoder()
    hook = decoder.register_forward_hook(
        lambda _, args, kwargs, output: made.append(kwargs[cache_name(decoder)]), with_kwargs=True
    )
    model.generate(**encoded(model, tokens=150), **greedy)
    hook.remove()
    assert {type(cache) for cache in made} == {tqai.TqaiEncoderDecoderCache}
    report = made[-1].memory_report()
    assert report["cross_attention_cache"]["packed_tokens"] == 2 * 128
    assert len(report["cross_attention_cache"]["layers"]) >= 2
    assert report["total_bytes"] < 0.8 * report["uncompressed_bytes"]


def test_sealed_tokens_are_read_as_torch_reads_the_same_codes(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = []
    kernel = attention._attend_packed

    def count(query: Any, update: Any, arguments: Any) -> Any:
        packed.append(update.is_cross)
        return kernel(query, update, arguments)

    monkeypatch.setattr(attention, "_attend_packed", count)
    cache = tqai.patch(model, **SEALING)
    inputs = encoded(model, tokens=150, padded=30)
    with torch.no_grad():
        model(**inputs, decoder_input_ids=make_ids(2, 120), past_key_values=cache)
        slow = copy.deepcopy(cache)
        slow.use_exact_arithmetic()
        for tokens in (1, 1, 3):
            given = {**inputs, "decoder_input_ids": make_ids(2, tokens)}
            got = model(**given, past_key_values=cache).logits
            expected = model(**given, past_key_values=slow).logits
            assert (got - expected).norm() < KERNEL_ERROR * expected.norm()
            assert model.family == "T5" or not torch.equal(got, expected)
    # T5's attention adds a bias by position, which the kernel does not.
    layers = 0 if model.family == "T5" else 2
    assert packed.count(True) == 3 * layers
    # One layer of T5Gemma has a window, from which nothing is sealed.
    assert packed.count(False) == 3 * (1 if model.family == "T5Gemma" else layers)
    assert cache.memory_report()["cross_attention_cache"]["packed_tokens"] == 2 * 128


def test_eight_bits_give_the_uncompressed_logits(model: Any) -> None:
    inputs, ids = encoded(model, tokens=150), make_ids(2, 120)
    with torch.no_grad():
        expected = model(**inputs, decoder_input_ids=ids, use_cache=False).logits
        cache = tqai.patch(model, bits_k=8, bits_v=8, residual_window=16)
        for at in (slice(0, 100), *(slice(at, at + 1) for at in range(100, 120))):
            got = model(**inputs, decoder_input_ids=ids[:, at], past_key_values=cache).logits
            assert (got - expected[:, at]).norm() < 0.02 * expected[:, at].norm()


def test_the_decoders_layers_count(greedy: dict[str, Any]) -> None:
    model = make("T5", num_layers=3, num_decoder_layers=2)
    expected = model.generate(**encoded(model), **greedy)
    cache = tqai.patch(model, **wide())
    assert torch.equal(model.generate(**encoded(model), past_key_values=cache, **greedy), expected)
    assert len(cache) == 2 and set(cache.is_updated.values()) == {True}


def test_assisted_generation(bart: Any, greedy: dict[str, Any]) -> None:
    assistant = make("BART", decoder_layers=1)
    inputs = encoded(bart, batch=1)
    expected = bart.generate(**inputs, **greedy)
    for model in (bart, assistant):
        tqai.patch(model, **wide())
    assert torch.equal(bart.generate(**inputs, assistant_model=assistant, **greedy), expected)


def test_prefill_at_its_true_cost_reads_the_encoders_codes(bart: Any) -> None:
    inputs = encoded(bart, tokens=150)

    def logits(**settings: Any) -> torch.Tensor:
        cache = tqai.patch(bart, **SEALING, **settings)
        with torch.no_grad():
            return bart(**inputs, decoder_input_ids=make_ids(2, 1), past_key_values=cache).logits

    exact, coded = logits(), logits(exact_prefill=False)
    assert not torch.equal(coded, exact)
    # The second token of the exact prefill reads the same codes.
    cache = tqai.patch(bart, **SEALING)
    with torch.no_grad():
        bart(**inputs, decoder_input_ids=make_ids(2, 1), past_key_values=cache)
        cache.crop(-1)
        again = bart(**inputs, decoder_input_ids=make_ids(2, 1), past_key_values=cache).logits
    assert torch.equal(coded, again)


def test_the_report_is_what_the_allocator_handed_out(bart: Any) -> None:
    gc.collect()
    start = _core.allocated_bytes()
    cache = tqai.patch(bart, skip_layers=[1], **SEALING)
    with torch.no_grad():
        bart(**encoded(bart, 150), decoder_input_ids=make_ids(2, 120), past_key_values=cache)
    report = cache.memory_report()
    plain = sum(
        tensor.nbytes
        for half in (cache.self_attention_cache, cache.cross_attention_cache)
        for tensor in (half.layers[1].keys, half.layers[1].values)
    )
    assert report["total_bytes"] == cache.nbytes == _core.allocated_bytes() - start + plain
    assert report["tokens"] == 2 * (150 + 120) and "540 tokens" in repr(cache)
    assert report["uncompressed_bytes"] == 540 * 2 * 2 * 64 * 4
    assert report["settings"]["skip_layers"] == (1,)
    del cache
    assert _core.allocated_bytes() == start  # nothing waits for the garbage collector


def test_copies_and_files_are_the_same_cache(model: Any, tmp_path: Path) -> None:
    cache = tqai.patch(model, **SEALING)
    inputs = encoded(model, tokens=150)
    with torch.no_grad():
        model(**inputs, decoder_input_ids=make_ids(2, 100), past_key_values=cache)
        tqai.save_cache(cache, tmp_path / "f")
        others = [
            copy.deepcopy(cache),
            pickle.loads(pickle.dumps(cache)),
            tqai.load_cache(tmp_path / "f", model),
        ]
        step = {**inputs, "decoder_input_ids": make_ids(2, 1)}
        expected = model(**step, past_key_values=cache).logits
        for other in others:
            assert torch.equal(model(**step, past_key_values=other).logits, expected)
            assert other.nbytes <= cache.nbytes
            assert other.get_seq_length() == 101


def test_reordered_rows_are_those_of_the_rows_read_alone(bart: Any) -> None:
    inputs, ids = encoded(bart, tokens=150), make_ids(2, 100)
    cache, alone = tqai.patch(bart, **SEALING), tqai.new_cache(bart)
    with torch.no_grad():
        bart(**inputs, decoder_input_ids=ids, past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        swapped = {name: value[[1, 1]] for name, value in inputs.items()}
        bart(**swapped, decoder_input_ids=ids[[1, 1]], past_key_values=alone)
        step = {**swapped, "decoder_input_ids": make_ids(2, 1)}
        got = bart(**step, past_key_values=cache).logits
        assert torch.equal(got, bart(**step, past_key_values=alone).logits)


def test_a_failed_pass_is_undone_in_both_halves(bart: Any) -> None:
    cache, twin = tqai.patch(bart, **SEALING), tqai.new_cache(bart)
    inputs = encoded(bart, tokens=150)
    layer = bart.get_decoder().layers[1]

    def step(cache: Any, tokens: int) -> torch.Tensor:
        ids = make_ids(2, tokens)
        with torch.no_grad():
            return bart(**inputs, decoder_input_ids=ids, past_key_values=cache).logits

    for name, projection in (("self", layer.self_attn), ("cross", layer.encoder_attn)):
        hook = projection.k_proj.register_forward_hook(lambda *a: torch.full_like(a[2], torch.nan))
        with pytest.raises(ValueError, match="layer 1"):
            step(cache, 50)
        hook.remove()
        assert cache.get_seq_length() == 0 and not any(cache.is_updated.values()), name
        assert cache.nbytes == 0
    for both in (cache, twin):
        step(both, 100)
    hook = layer.self_attn.v_proj.register_forward_hook(lambda *a: torch.full_like(a[2], torch.nan))
    with pytest.raises(ValueError, match="layer 1"):
        step(cache, 1)
    hook.remove()
    # The encoder's half is older than the pass that failed.
    assert cache.get_seq_length() == 100 and all(cache.is_updated.values())
    assert torch.equal(step(cache, 1), step(twin, 1))


def test_an_interrupt_while_the_encoder_is_read_is_undone(
    bart: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tqai.patch(bart, **SEALING)
    inputs = {**encoded(bart, tokens=150), "decoder_input_ids": make_ids(2, 10)}

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        bart(**inputs, past_key_values=cache)
        monkeypatch.setattr(attention, "_attend_packed", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bart(**inputs, past_key_values=cache)
    assert cache.get_seq_length() == 10 and all(cache.is_updated.values())


def test_gradients_through_the_encoders_codes_raise(model: Any) -> None:
    cache = tqai.patch(model, **SEALING)
    inputs = {**encoded(model, tokens=150), "decoder_input_ids": make_ids(2, 1)}
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    loss = model(**inputs, past_key_values=cache).logits.sum()
    with pytest.raises(RuntimeError, match="not differentiable"):
        loss.backward()


def test_training_is_left_alone(bart: Any) -> None:
    inputs = {**encoded(bart), "labels": make_ids(2, 9)}

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        bart.train()(**inputs).loss.backward()
        found = [parameter.grad.clone() for parameter in bart.parameters()]
        bart.zero_grad()
        return found

    expected = gradients()
    tqai.patch(bart)
    assert all(map(torch.equal, gradients(), expected))


def test_unpatch_restores_everything(model: Any) -> None:
    before = traces(model)
    tqai.patch(model)
    assert traces(model) != before
    tqai.unpatch(model)
    assert traces(model) == before
    with torch.no_grad():
        output = model(**encoded(model), decoder_input_ids=make_ids(2, 1), use_cache=True)
    assert type(output.past_key_values) is EncoderDecoderCache


def test_caches_of_the_wrong_kind_are_refused(bart: Any, greedy: dict[str, Any]) -> None:
    decoder_only = make_model()
    single, cache = tqai.patch(decoder_only), tqai.patch(bart)
    with pytest.raises(ValueError, match="made for LlamaForCausalLM.*not for Bart"):
        bart.generate(**encoded(bart), past_key_values=single, **greedy)
    with pytest.raises(ValueError, match="made for BartFor.*not for .*Llama"):
        decoder_only.generate(make_ids(), past_key_values=cache, **greedy)
    with pytest.raises(ValueError, match="TqaiEncoderDecoderCache"):
        bart.generate(**encoded(bart), past_key_values=cache.self_attention_cache, **greedy)
    # A cache of transformers' own stays what the user chose.
    own = EncoderDecoderCache(*(DynamicCache(config=bart.config) for _ in range(2)))
    bart.generate(**encoded(bart), past_key_values=own, **greedy)
    assert own.get_seq_length() > 0


def test_whisper_gives_back_a_plain_cache(greedy: dict[str, Any]) -> None:
    model = make("Whisper")
    tqai.patch(model, **SEALING)
    options = {**greedy, "eos_token_id": VOCABULARY - 1, "min_new_tokens": 16}
    result = model.generate(**encoded(model), return_dict_in_generate=True, **options)
    cache = result["past_key_values"]
    assert type(cache) is EncoderDecoderCache
    assert cache.cross_attention_cache.layers[0].keys.shape == (2, 4, 150, 16)
    with torch.no_grad():
        plain = model.model.encoder(encoded(model)["input_features"]).last_hidden_state
        keys = model.model.decoder.layers[0].encoder_attn.k_proj(plain)
    keys = keys.view(2, 150, 4, 16).transpose(1, 2)
    # Decompressed, not the originals: near them.
    error = (cache.cross_attention_cache.layers[0].keys - keys).norm() / keys.norm()
    assert 0 < error < 0.2


def test_one_cache_takes_one_encoder_input(bart: Any) -> None:
    cache = tqai.patch(bart, **SEALING)
    states = torch.randn(2, 2, 4, 30, 16)
    cache.cross_attention_cache.update(*states, 0)
    with pytest.raises(ValueError, match="layer 0.*another encoder output.*new_cache"):
        cache.cross_attention_cache.update(*states, 0)
    assert cache.cross_attention_cache.get_seq_length() == 30


@pytest.mark.parametrize("measure", [tqai.evaluate, tqai.needle])
def test_measurements_are_of_decoder_only_models(bart: Any, measure: Any) -> None:
    with pytest.raises(NotImplementedError, match="BartFor.* is an encoder-decoder model"):
        measure(bart, None)


@torch.no_grad()
def test_a_text_may_be_longer_than_what_the_encoder_has_read() -> None:
    model = make("BART")
    ids, text = make_ids(2, 100), make_ids(2, 160, seed=1)
    cache = tqai.patch(model, **SEALING)
    given = {"encoder_outputs": model.get_encoder()(ids)}
    name = str(cache_name(model))
    model(**given, decoder_input_ids=text[:, :5], **{name: cache})
    slow = copy.deepcopy(cache)
    slow.use_exact_arithmetic()
    assert cache.cross_attention_cache.memory_report()["packed_tokens"] > 0
    got, expected = (
        model(**given, decoder_input_ids=text[:, 5:], **{name: each}).logits
        for each in (cache, slow)
    )
    assert (got - expected).norm() / expected.norm() < KERNEL_ERROR
