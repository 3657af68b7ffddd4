"""What uses a patched model from outside: pipelines, streamers, compilers, servers, loaders."""

from __future__ import annotations

import asyncio
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import toy
import tqai
import transformers
from conftest import Models, make_ids
from tqai.transformers.serving.paged import serves_requests
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SEALING = {"residual_window": 16, "sink_tokens": 2}
PROMPT = "What is kept of a text that is longer than the window of exact tokens? " * 3


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tqai.TqaiCache]:
    """All compressed caches that are made in the test."""
    caches = []
    init = tqai.TqaiCache.__init__

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        caches.append(self)

    monkeypatch.setattr(tqai.TqaiCache, "__init__", note)
    return caches


def packed(caches: list[tqai.TqaiCache]) -> int:
    return max(cache.memory_report()["packed_tokens"] for cache in caches)


def test_the_pipeline(models: Models, made: list[Any], greedy: dict[str, Any]) -> None:
    model, tokenizer = models(), toy.tokenizer()
    writer = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    config = GenerationConfig(**greedy)
    expected = writer(PROMPT, generation_config=config)
    tqai.patch(model, residual_window=512)
    assert writer(PROMPT, generation_config=config) == expected
    tqai.patch(model, **SEALING)
    assert writer(PROMPT, generation_config=config)[0]["generated_text"].startswith(PROMPT)
    assert packed(made) >= 128


def test_streamers(
    models: Models, made: list[Any], greedy: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = models(), toy.tokenizer()
    tqai.patch(model, **SEALING)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    result = model.generate(**inputs, streamer=TextStreamer(tokenizer, skip_prompt=True), **greedy)
    text = tokenizer.decode(result[0, inputs["input_ids"].shape[1] :])
    assert capsys.readouterr().out.rstrip("\n") == text.rstrip("\n") != ""

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, **greedy})
    thread.start()
    assert "".join(streamer) == text
    thread.join()
    assert packed(made) >= 128


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model(whole: bool, models: Models, greedy: dict[str, Any]) -> None:
    """Also where the pass makes a cache, which is not in the graph."""
    model = models()
    ids = make_ids(2, 200)
    cache = tqai.patch(model, **SEALING)
    expected = model.generate(ids, past_key_values=cache, **greedy)
    with torch.no_grad():
        logits = model(ids).logits
        if whole:
            # With torch 2.6 compiled models round otherwise, patched or not.
            rounding = 0.0 if torch.__version__ >= "2.11" else 1e-5
            got = torch.compile(model, backend="eager")(ids).logits
            torch.testing.assert_close(got, logits, rtol=0.0, atol=rounding)
            return
        model.forward = torch.compile(model.forward, backend="eager")
        again = tqai.new_cache(model)
        try:
            assert torch.equal(model.generate(ids, past_key_values=again, **greedy), expected)
        finally:
            del model.forward
    assert again.memory_report()["packed_tokens"] == cache.memory_report()["packed_tokens"] > 0
    torch._dynamo.reset()


def test_the_single_requests_of_transformers_serve(
    models: Models, made: list[Any], greedy: dict[str, Any]
) -> None:
    try:
        from transformers.cli.serving import utils as serving
    except (ImportError, NameError) as error:  # some versions name what is not installed
        pytest.skip(f"transformers serve cannot be imported: {error}")
    model, tokenizer = models(), toy.tokenizer()
    tqai.patch(model, **SEALING)
    inputs = {"input_ids": tokenizer(PROMPT, return_tensors="pt")["input_ids"]}
    config = GenerationConfig(**greedy)
    expected = tokenizer.decode(model.generate(**inputs, **greedy)[0, len(PROMPT) :])

    async def serve() -> tuple[str, str]:
        manager = serving.GenerateManager()
        whole, _, _ = await manager.generate_non_streaming(model, tokenizer, inputs, config, "1")
        queue, _ = manager.generate_streaming(model, tokenizer, inputs, config, "2")
        parts = []
        while isinstance(part := await asyncio.wait_for(queue.get(), 60), str):
            parts.append(part)
        assert part is None  # the end, and no error
        return whole, "".join(parts)

    assert asyncio.run(serve()) == (expected, expected)
    assert packed(made) >= 128
    if not serves_requests():  # else serving/test_paged.py
        with pytest.raises(NotImplementedError, match="continuous batching.*unpatch"):
            serving.CBGenerateManager().init_cb(model, config)


@pytest.mark.parametrize("name", ["tqai", "tqai_eager"])
def test_the_name_of_the_attention_alone_compresses_nothing_and_says_so(
    name: str, tmp_path: Path, models: Models, greedy: dict[str, Any]
) -> None:
    tqai.patch(models())  # makes the name known
    assert name in ALL_ATTENTION_FUNCTIONS.valid_keys()
    folder = toy.folder(tmp_path / "model")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, attn_implementation=name).eval()
    with pytest.raises(RuntimeError, match=rf"attn_implementation='{name}'.*tqai\.patch"):
        model.generate(make_ids(), **greedy)
    tqai.patch(model, **SEALING)
    result = model.generate(make_ids(), return_dict_in_generate=True, **greedy)
    assert isinstance(result.past_key_values, tqai.TqaiCache)
    with torch.no_grad():
        model(make_ids(), use_cache=False)
    tqai.unpatch(model)
    assert model.config._attn_implementation == name
    model.set_attn_implementation({"tqai": "sdpa", "tqai_eager": "eager"}[name])
    expected = load(folder).eval().generate(make_ids(), **greedy)
    assert torch.equal(model.generate(make_ids(), **greedy), expected)
