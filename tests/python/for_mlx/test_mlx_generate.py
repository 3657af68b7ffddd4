"""mlx-lm's own ways to generate, over compressed caches."""

from __future__ import annotations

from typing import Any

import pytest
from small_mlx import make_model, make_prompt_cache, mx, plain_cache, tokens

# isort: split
import tqai
from mlx_lm.generate import generate_step, speculative_generate_step
from tqai.mlx.cache.layer import TqaiKVCache


def greedy(model: Any, prompt: Any, count: int = 30, **options: Any) -> list[int]:
    return [int(token) for token, _ in generate_step(prompt, model, max_tokens=count, **options)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_tokens_are_those_of_the_plain_cache_within_the_window(family: str) -> None:
    model = make_model(family)
    prompt = tokens(200)[0]
    expected = greedy(model, prompt)
    tqai.patch(model, residual_window=1024)
    assert greedy(model, prompt, prefill_step_size=64) == expected


def test_a_prompt_cache_is_made_or_given() -> None:
    model = make_model("llama")
    prompt = tokens(300)[0]
    cache = tqai.patch(model)
    expected = greedy(model, prompt)
    assert greedy(model, prompt, prompt_cache=cache) == expected
    assert cache[0].offset == 300 + 30 and cache[0].is_packed()
    assert greedy(model, prompt, prompt_cache=make_prompt_cache(model)) == expected


def test_a_conversation_goes_on() -> None:
    """Each turn reads its own tokens alone; the whole text at once gives the same, as far as its
    tokens are still exact."""
    model = make_model("llama")
    cache = tqai.patch(model, residual_window=2048)
    first = greedy(model, tokens(200)[0], count=20, prompt_cache=cache)
    second = greedy(model, tokens(50)[0], count=20, prompt_cache=cache)
    whole = mx.concatenate([tokens(200)[0], mx.array(first), tokens(50)[0]])
    assert greedy(model, whole, count=20) == second


@pytest.mark.parametrize("compressed_draft", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_speculative_decoding(family: str, compressed_draft: bool) -> None:
    model, draft = make_model(family), make_model("llama", num_hidden_layers=1)
    prompt = tokens(100)[0]
    expected = greedy(model, prompt, count=25)
    cache = tqai.patch(model, residual_window=1024)
    if compressed_draft:
        cache += tqai.patch(draft, residual_window=1024)
    else:
        cache += plain_cache(draft)
    for given in ({}, {"prompt_cache": cache}):
        steps = speculative_generate_step(
            prompt, model, draft, max_tokens=25, num_draft_tokens=3, **given
        )
        assert [int(token) for token, _, _ in steps] == expected
    assert all(type(layer) is TqaiKVCache for layer in cache[:2])


def test_kv_bits_are_refused_when_they_would_set_in() -> None:
    model = make_model("llama")
    tqai.patch(model)
    with pytest.raises(ValueError, match="kv_bits=4: the model is patched by tqai"):
        greedy(model, tokens(20)[0], kv_bits=4, quantized_kv_start=0)


def test_max_kv_size_is_refused() -> None:
    model = make_model("qwen2")
    tqai.patch(model)
    with pytest.raises(NotImplementedError, match="max_kv_size=64"):
        greedy(model, tokens(20)[0], max_kv_size=64)
