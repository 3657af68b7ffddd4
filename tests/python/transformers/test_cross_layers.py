"""Layers among a decoder's own that are updated once, with an image, and read from then on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import tqai
from caches import SEALING, held
from conftest import SMALL, TRANSFORMERS_4, make_ids
from tqai.transformers.attention import functions as attention
from tqai.transformers.cache.layer import TqaiLayer
from transformers import DynamicCache, MllamaForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

IMAGE = 300
"""Tokens of the image."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
WIDE = {"residual_window": 4096}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(1)
    config = MllamaTextConfig(
        **{**SMALL, "num_hidden_layers": 3},
        cross_attention_layers=[1],
        **{"rope_scaling" if TRANSFORMERS_4 else "rope_parameters": ROPE},
    )
    model = MllamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08)
        elif "gate" in name:
            parameter.data.fill_(1.0)
    yield model
    if getattr(model.config, "_attn_implementation", "").startswith("tqai"):
        tqai.unpatch(model)


def image(tokens: int = IMAGE, batch: int = 1, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, SMALL["hidden_size"], generator=generator)


def masks(queries: int, tokens: int, batch: int = 1) -> dict[str, torch.Tensor]:
    """Each query sees the first two thirds of an image."""
    mask = torch.zeros(batch, 1, queries, tokens)
    mask[..., 2 * tokens // 3 :] = torch.finfo(mask.dtype).min
    return {
        "cross_attention_mask": mask,
        "full_text_row_masked_out_mask": torch.ones(batch, 1, queries, 1),
    }


def read(model: Any, cache: Any, ids: torch.Tensor, seen: int = IMAGE, **new: Any) -> torch.Tensor:
    """Logits of `ids`, which look at an image of `seen` tokens."""
    length = cache.get_seq_length() + ids.shape[1]
    options = {**masks(ids.shape[1], seen, len(ids)), **new}
    options["attention_mask"] = torch.ones(len(ids), length, dtype=torch.long)
    with torch.no_grad():
        return model(ids, past_key_values=cache, **options).logits


def conversation(model: Any, cache: Any, prompt: int = 100) -> torch.Tensor:
    """Logits of a prompt with an image, and of ten more tokens one by one."""
    ids = make_ids(2, prompt + 10)
    parts = [read(model, cache, ids[:, :prompt], cross_attention_states=image(batch=2))]
    parts += [read(model, cache, ids[:, at : at + 1]) for at in range(prompt, prompt + 10)]
    return torch.cat(parts, dim=1)


def own(model: Any) -> torch.Tensor:
    return conversation(model, DynamicCache(config=model.config))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("prompt", [100, IMAGE])
@pytest.mark.parametrize("exact_prefill", [True, False])
def test_within_the_window_nothing_changes(model: Any, prompt: int, exact_prefill: bool) -> None:
    expected = conversation(model, DynamicCache(config=model.config), prompt)
    cache = tqai.patch(model, exact_prefill=exact_prefill, **WIDE)
    got = conversation(model, cache, prompt)
    if exact_prefill:
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    tqai.unpatch(model)


def test_attention_over_what_was_sealed_goes_to_the_kernel(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = own(model)
    calls: list[int] = []
    packed = attention._attend_packed

    def counted(query: Any, update: Any, arguments: Any) -> Any:
        calls.append(update.layer.index)
        return packed(query, update, arguments)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the whole layer was dequantised")

    cache = tqai.patch(model, bits_k=8, bits_v=8, **SEALING)
    monkeypatch.setattr(attention, "_attend_packed", counted)
    monkeypatch.setattr(TqaiLayer, "gather", refuse)
    got = conversation(model, cache)
    assert calls.count(1) == 10
    assert 0 < distance(got, expected) < 0.05
    tqai.unpatch(model)


def test_without_an_exact_prefill_the_first_pass_reads_codes_too(model: Any) -> None:
    expected = own(model)
    settings = {**SEALING, "bits_k": 8, "bits_v": 8}
    got = conversation(model, tqai.patch(model, exact_prefill=False, **settings))
    assert 0 < distance(got[:, :100], expected[:, :100]) < 0.05
    tqai.unpatch(model)


def test_a_second_image_comes_to_the_first(model: Any) -> None:
    ids = make_ids(1, 30)

    def turns(cache: Any) -> torch.Tensor:
        read(model, cache, ids[:, :20], cross_attention_states=image())
        read(model, cache, ids[:, 20:21])
        new = {"cross_attention_states": image(90, seed=4)}
        return read(model, cache, ids[:, 21:], IMAGE + 90, **new)

    expected = turns(DynamicCache(config=model.config))
    cache = tqai.patch(model, bits_k=8, bits_v=8, **SEALING)
    assert 0 < distance(turns(cache), expected) < 0.05
    assert cache.get_seq_length(1) == IMAGE + 90
    tqai.unpatch(model)


def test_rows_copies_and_cropping(model: Any) -> None:
    cache = tqai.patch(model, bits_k=8, bits_v=8, **SEALING)
    conversation(model, cache)
    twin = copy.deepcopy(cache)
    twin.reorder_cache(torch.tensor([1, 0]))
    ids = make_ids(2, 1, seed=5)
    got = read(model, twin, ids.flip(0)).flip(0)
    twin = copy.deepcopy(cache)
    torch.testing.assert_close(got, read(model, twin, ids))
    twin.crop(-4)
    assert [twin.get_seq_length(layer) for layer in range(3)] == [107, IMAGE - 4, 107]
    assert [cache.get_seq_length(layer) for layer in range(3)] == [110, IMAGE, 110]
    tqai.unpatch(model)


def test_a_pass_that_fails_in_the_image_layer_is_undone(model: Any) -> None:
    cache = tqai.patch(model, **SEALING)
    conversation(model, cache)
    for tried in (cache, copy.deepcopy(cache)):
        before = [tensor.clone() for tensor in held(tried)]
        ids = make_ids(2, 1)
        with pytest.raises(Exception):  # noqa: B017 (whatever torch says of such a mask)
            read(model, tried, ids, cross_attention_mask=torch.zeros(2, 1, 1, 7))
        assert tried.get_seq_length() == 110
        for after, expected in zip(held(tried), before, strict=True):
            assert torch.equal(after, expected)
    tqai.unpatch(model)
