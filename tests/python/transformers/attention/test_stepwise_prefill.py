from __future__ import annotations

from typing import Any

import pytest
import torch
import tqai
from caches import SEALING
from conftest import Models, make_ids

SETTINGS: dict[str, Any] = {**SEALING, "bits_k": 2, "bits_v": 2}
# Matrix products over other numbers of rows round differently, and a few codes with them.
ROUNDING = 0.05


def logits(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache, **options).logits


def in_chunks(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    return torch.cat([logits(model, part, cache) for part in ids.split(64, dim=1)], dim=1)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the last 100 tokens' logits, which read many packed tokens."""
    return float((a - b)[:, -100:].norm() / b[:, -100:].norm())


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral_wide", "gemma2", "gpt_oss"])
def test_a_forward_pass_costs_what_reading_in_chunks_costs(models: Models, family: str) -> None:
    model = models(family)
    ids = make_ids(2, 260)
    exact = logits(model, ids, tqai.patch(model, **SETTINGS))
    expected_cache = tqai.new_cache(model)
    expected = in_chunks(model, ids, expected_cache)
    cache = tqai.patch(model, exact_prefill=False, **SETTINGS)
    got = logits(model, ids, cache)
    assert distance(got, expected) < ROUNDING
    assert distance(exact, expected) > 2 * ROUNDING
    ours, theirs = cache.memory_report(), expected_cache.memory_report()
    assert ours["packed_tokens"] == theirs["packed_tokens"] > 0


def test_evaluators_that_pass_no_cache_pay_too(models: Models) -> None:
    model = models("llama")
    ids = make_ids(1, 260)
    tqai.patch(model, exact_prefill=False, **SETTINGS)
    with torch.no_grad():
        default = model(ids).logits
    assert torch.equal(default, logits(model, ids, tqai.new_cache(model)))
    tqai.unpatch(model)
    with torch.no_grad():
        assert distance(default, model(ids).logits) > 2 * ROUNDING


def test_within_the_window_nothing_is_packed_and_nothing_changes(models: Models) -> None:
    model = models("llama")
    ids = make_ids(2, 120)
    with torch.no_grad():
        expected = model(ids).logits
    got = logits(model, ids, tqai.patch(model, exact_prefill=False))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_left_padding_is_dropped_as_ever(models: Models) -> None:
    model = models("llama")
    ids = make_ids(2, 200)
    mask = torch.ones_like(ids)
    mask[1, :90] = 0
    cache = tqai.patch(model, exact_prefill=False, **SETTINGS)
    padded = logits(model, ids, cache, attention_mask=mask)
    assert cache.layers[0].padding == [0, 90]
    alone = logits(model, ids[1:, 90:], tqai.new_cache(model))
    # Tiles begin elsewhere, since the steps do: the same cost, not the same numbers.
    assert padded[1:, 90:].isfinite().all()
    torch.testing.assert_close(padded[1:, 90:100], alone[:, :10], rtol=1e-3, atol=1e-3)


def test_a_second_turn_pays_for_its_own_tokens(models: Models) -> None:
    model = models("llama")
    ids = make_ids(1, 330)
    cache = tqai.patch(model, exact_prefill=False, **SETTINGS)
    got = torch.cat([logits(model, part, cache) for part in ids.split([128, 202], dim=1)], dim=1)
    tqai.patch(model, **SETTINGS)
    expected = in_chunks(model, ids, tqai.new_cache(model))
    assert distance(got, expected) < ROUNDING


def test_tokens_that_see_each_other_are_read_together(models: Models) -> None:
    """As those of an image, which may lie across the end of a tile."""
    model = models("llama")
    ids = make_ids(1, 200)
    mask = torch.ones(200, 200, dtype=torch.bool).tril()
    mask[40:100, 40:100] = True
    mask = mask[None, None]
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    for settings in ({}, {**SEALING, "bits_k": 8, "bits_v": 8}):
        cache = tqai.patch(model, exact_prefill=False, **settings)
        got = logits(model, ids, cache, attention_mask=mask)
        assert float((got - expected).norm() / expected.norm()) < ROUNDING


def test_generate_works(models: Models, greedy: dict[str, Any]) -> None:
    model = models("llama")
    cache = tqai.patch(model, exact_prefill=False, **SETTINGS)
    ids = make_ids(1, 150)
    assert model.generate(ids, past_key_values=cache, **greedy).shape == (1, 166)
    assert cache.get_seq_length() == 165


def test_attention_weights_are_refused_and_the_cache_stays(models: Models) -> None:
    model = models("llama", attn_implementation="eager")
    cache = tqai.patch(model, exact_prefill=False)
    with pytest.raises(NotImplementedError, match="exact_prefill=False"):
        model(make_ids(), past_key_values=cache, output_attentions=True)
    assert cache.get_seq_length() == 0


def test_anything_but_a_truth_value_is_refused(models: Models) -> None:
    with pytest.raises(ValueError, match="exact_prefill='no': expected True or False"):
        tqai.patch(models("llama"), exact_prefill="no")  # type: ignore[arg-type]
