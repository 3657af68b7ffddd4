"""What new users get wrong: each message says what was given, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import tqai
import transformers
from caches import SEALING, filled
from conftest import Models, make_ids, make_model
from tqai.transformers.model.names import generate_name
from tqai.transformers.serving import paged
from transformers import DynamicCache


def says(error: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
    message = str(error.value)
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"bit_k": 4}, ["'bit_k'", "did you mean 'bits_k'?", "residual_window"]),
        ({"exact_prefil": False}, ["'exact_prefil'", "did you mean 'exact_prefill'?"]),
        ({"backend_": "x"}, ["'backend_'", "it takes a model and preset, bits_k, bits_v"]),
    ],
)
def test_a_misspelled_keyword(options: dict[str, Any], parts: list[str], models: Models) -> None:
    with pytest.raises(TypeError) as error:
        tqai.patch(models(), **options)
    says(error, *parts)
    assert not hasattr(models(), "_tqai_patch")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"bits_k": 0}, ["bits_k=0", "from 1 to 8"]),
        ({"bits_v": 16}, ["bits_v=16", "from 1 to 8"]),
        ({"bits_k": 4.5}, ["bits_k=4.5", "an integer from 1 to 8"]),
        ({"bits_k": "4"}, ["bits_k='4'", "an integer from 1 to 8"]),
        ({"bits_k": [4]}, ["bits_k has 1 entries", "2 layers", "one for each"]),
        ({"bits_v": {5: 4}}, ["bits_v names layer 5", "2 layers", "-2…1"]),
        ({"preset": "fast"}, ["preset='fast'", "'quality', 'balanced', 'small'"]),
        ({"residual_window": -1}, ["residual_window=-1", "from 0 to"]),
        ({"sink_tokens": None}, ["sink_tokens=None", "an integer from 0"]),
        ({"rotation": "random"}, ["rotation='random'", "'hadamard'"]),
        ({"centering": True}, ["centering=True", "'mean'"]),
        ({"skip_layers": 1}, ["skip_layers=1", "a sequence of layer numbers"]),
        ({"skip_layers": [7]}, ["skip_layers=7", "2 layers", "-2…1"]),
        ({"exact_prefill": "no"}, ["exact_prefill='no'", "True or False"]),
        ({"seed": -3}, ["seed=-3", "from 0"]),
        ({"level": "sse"}, ["level='sse'", "'avx2'"]),
    ],
    ids=str,
)
def test_a_setting_out_of_range(options: dict[str, Any], parts: list[str], models: Models) -> None:
    with pytest.raises(ValueError) as error:
        tqai.patch(models(), **options)
    says(error, *parts)


def test_something_that_is_no_model(models: Models) -> None:
    writer = transformers.pipeline("text-generation", model=models(), tokenizer=toy.tokenizer())
    cases: list[tuple[Any, list[str]]] = [
        ("Qwen/Qwen2.5-0.5B", ["got str", "from_pretrained('Qwen/Qwen2.5-0.5B')"]),
        (writer, ["got TextGenerationPipeline", "its .model"]),
        (torch.compile(models(), backend="eager"), ["OptimizedModule", "before torch.compile"]),
        (torch.nn.Linear(2, 2), ["a transformers PreTrainedModel", "got Linear"]),
    ]
    for given, parts in cases:
        with pytest.raises(ValueError) as error:
            tqai.patch(given)
        says(error, *parts)
    for function in (tqai.new_cache, tqai.unpatch):
        with pytest.raises(ValueError) as error:
            function("Qwen/Qwen2.5-0.5B")
        says(error, "the transformers model that was patched", "got str")


def test_a_model_that_is_not_supported() -> None:
    bert = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError) as error:
        tqai.patch(transformers.BertModel(bert).eval())
    says(error, "BertModel has no causal attention layers", "1 × BertLayer")


@pytest.mark.parametrize("function", [tqai.unpatch, tqai.new_cache])
def test_a_model_that_is_not_patched(function: Callable[[Any], Any], models: Models) -> None:
    with pytest.raises(ValueError) as error:
        function(models())
    says(error, "LlamaForCausalLM is not patched", "call tqai.patch(model) first")


def test_patching_twice_is_no_mistake(models: Models, greedy: dict[str, Any]) -> None:
    model = models()
    expected = model.generate(make_ids(), **greedy)
    tqai.patch(model)
    tqai.patch(model)
    tqai.unpatch(model)
    assert torch.equal(model.generate(make_ids(), **greedy), expected)
    with pytest.raises(ValueError, match="not patched"):
        tqai.unpatch(model)


@pytest.mark.parametrize("given", ["tqai", tqai.TqaiCache, 4], ids=str)
def test_something_that_is_no_cache(given: Any, models: Models, greedy: dict[str, Any]) -> None:
    model = models()
    tqai.patch(model)
    with pytest.raises(ValueError) as error:
        model.generate(make_ids(), past_key_values=given, **greedy)
    name = getattr(given, "__name__", repr(given))
    says(error, f"{generate_name()}={name}", "tqai.new_cache(model)")


def test_a_cache_made_by_hand(models: Models) -> None:
    model = models()
    cases: list[tuple[Callable[[], Any], type[Exception], list[str]]] = [
        (lambda: tqai.TqaiCache(), TypeError, ["'model'"]),  # type: ignore[call-overload]
        (lambda: tqai.TqaiCache(model, tqai.Settings()), TypeError, ["options by their names"]),
        (lambda: tqai.TqaiCache(model, config=1), TypeError, ["tqai.TqaiCache()", "'config'"]),
        (lambda: tqai.TqaiCache(model, bit_v=1), TypeError, ["did you mean 'bits_v'?"]),
        (lambda: tqai.TqaiCache(model, bits_v=9), ValueError, ["bits_v=9", "from 1 to 8"]),
        (lambda: tqai.TqaiCache(model.config), ValueError, ["PreTrainedModel", "LlamaConfig"]),
        (
            lambda: tqai.TqaiEncoderDecoderCache(model),
            ValueError,
            ["is not an encoder-decoder model", "tqai.TqaiCache(model)"],
        ),
    ]
    for make, kind, parts in cases:
        with pytest.raises(kind) as error:
            make()
        says(error, *parts)


def test_the_cache_of_another_model(models: Models, greedy: dict[str, Any]) -> None:
    cache = tqai.patch(models())
    other = models("qwen3")
    tqai.patch(other)
    with pytest.raises(ValueError) as error:
        other.generate(make_ids(), past_key_values=cache, **greedy)
    says(error, "made for LlamaForCausalLM", "not for Qwen3ForCausalLM", "tqai.new_cache(model)")
    tqai.unpatch(other)
    with pytest.raises(ValueError) as error:  # it cannot tell its name then
        other.generate(make_ids(), past_key_values=cache, **greedy)
    says(error, "layer 0", "2 heads of 32", "2 of 16", "tqai.new_cache(model)")


@pytest.mark.parametrize("masked", [False, True])
def test_only_the_new_tokens(masked: bool, models: Models, greedy: dict[str, Any]) -> None:
    model = models()
    cache = filled(model, tqai.patch(model, **SEALING), make_ids(2, 100))
    new = make_ids(2, 30)
    if masked:
        greedy = {**greedy, "attention_mask": torch.ones_like(new)}
    with pytest.raises(ValueError) as error:
        model.generate(new, past_key_values=cache, **greedy)
    says(error, "read 100 tokens", "got 30", "all of them", "tqai.new_cache(model)")
    assert cache.get_seq_length() == 100


def test_another_batch_size(models: Models, greedy: dict[str, Any]) -> None:
    model = models()
    cache = filled(model, tqai.patch(model, **SEALING), make_ids(2, 100))
    for rows, options, given in ((3, {}, 3), (2, {"num_beams": 2}, 4)):
        with pytest.raises(ValueError) as error:
            model.generate(make_ids(rows, 110), past_key_values=cache, **options, **greedy)
        says(error, f"keys of {given} rows", "holds 2", "tqai.new_cache(model)")


def test_another_dtype() -> None:
    model = make_model()
    cache = filled(model, tqai.patch(model, **SEALING), make_ids(2, 100))
    with pytest.raises(ValueError) as error:
        filled(model.to(torch.bfloat16), cache, make_ids(2, 1))
    says(error, "of torch.float32 then, of torch.bfloat16 now", "tqai.new_cache(model)")
    with pytest.raises(ValueError) as error:
        filled(model.to(torch.float64), tqai.new_cache(model), make_ids(2, 1))
    says(error, "torch.float64", "float32, float16 or bfloat16", "model.to(torch.float32)")


def test_another_device(models: Models) -> None:
    cache = tqai.patch(models())
    with pytest.raises(NotImplementedError) as error:
        cache.update(*torch.zeros(2, 1, 2, 3, 16, device="meta"), 0)
    says(error, "layer 0", "meta", "no numbers", "load the model's weights")


def test_files(models: Models, tmp_path: Path) -> None:
    model = models()
    cache = filled(model, tqai.patch(model, **SEALING), make_ids(2, 100))
    path = tmp_path / "cache"
    tqai.save_cache(cache, path)
    whole = path.read_bytes()
    (tmp_path / "other").write_text("no cache at all")
    (tmp_path / "cut").write_bytes(whole[:-100])
    (tmp_path / "bad").write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    for name in ("other", "cut", "bad"):
        with pytest.raises(ValueError) as error:
            tqai.load_cache(tmp_path / name, model)
        says(error, str(tmp_path / name), "damaged", "save the cache again")
    for missing, kind in (("nothing", FileNotFoundError), ("", IsADirectoryError)):
        with pytest.raises(kind) as os_error:
            tqai.load_cache(tmp_path / missing, model)
        says(os_error, str(tmp_path / missing))
    with pytest.raises(OSError) as os_error:
        tqai.save_cache(cache, tmp_path / "no folder" / "cache")
    says(os_error, str(tmp_path / "no folder" / "cache"), "could not be written")
    with pytest.raises(ValueError) as error:
        tqai.load_cache(model, path)  # type: ignore[arg-type]
    says(error, "load_cache(path, model)", "got LlamaForCausalLM")
    for given in (str(path), DynamicCache()):
        with pytest.raises(ValueError) as error:
            tqai.save_cache(given, cache)  # type: ignore[arg-type]
        says(error, "save_cache(cache, path)", f"got {type(given).__name__}")
    other = models(seed=2)
    tqai.patch(other)
    with pytest.raises(ValueError) as error:
        tqai.load_cache(path, other)
    says(error, str(path), "other weights", "read the prompt again")
    tqai.unpatch(other)
    with pytest.raises(ValueError) as error:
        tqai.load_cache(path, other)
    says(error, "is not patched", "tqai.patch(model)")


def test_going_back_further_than_a_window(models: Models) -> None:
    model = models("mistral")
    cache = filled(model, tqai.patch(model), make_ids(1, 200))
    with pytest.raises(RuntimeError) as error:
        cache.crop(-150)
    says(error, "layer 0", "from 200 tokens to 50", "window of 24", "activate_past_recording()")


def test_rows_that_do_not_exist(models: Models) -> None:
    model = models()
    cache = filled(model, tqai.patch(model, **SEALING), make_ids(2, 100))
    with pytest.raises(IndexError) as error:
        cache.reorder_cache(torch.tensor([0, 5]))
    says(error, "row 5", "batch of 2")
    assert [layer.core.batch for layer in cache.layers] == [2, 2]


def test_centring_on_a_rotary_embedding_that_is_not_there() -> None:
    config = transformers.GPT2Config(n_embd=64, n_head=4, n_layer=1, vocab_size=32)
    with pytest.raises(ValueError) as error:
        tqai.patch(transformers.GPT2LMHeadModel(config).eval(), centering="rope")
    says(error, "layer 0", "centering='rope'", "use centering='auto'")


def test_continuous_batching_with_another_transformers(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models()
    tqai.patch(model)
    monkeypatch.setattr(paged, "_allocators", None)
    with pytest.raises(NotImplementedError) as error:
        model.generate_batch([[3, 4, 5]])
    says(error, "continuous batching", transformers.__version__, "tqai.unpatch(model)")
