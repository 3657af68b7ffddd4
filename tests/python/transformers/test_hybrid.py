"""Models with recurrent states beside attention: these stay as transformers keeps them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import tqai
import transformers
from conftest import TRANSFORMERS_4, make_ids
from test_matrix import FAMILIES, SMALL

if TRANSFORMERS_4:
    pytest.skip("transformers 4 has no common cache for hybrids", allow_module_level=True)


@pytest.fixture
def model() -> Any:
    name, fields = FAMILIES["Qwen3-Next"]
    torch.manual_seed(1)
    config = getattr(transformers, name)(**{**SMALL, **fields})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def logits(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def spoil(model: Any) -> Any:
    """Makes the keys of the attention layer NaN until the hook is removed."""
    projection = model.model.layers[1].self_attn.k_proj
    return projection.register_forward_hook(lambda *a: torch.full_like(a[2], torch.nan))


def test_the_report_counts_the_states(model: Any) -> None:
    cache = tqai.patch(model)
    logits(model, cache, make_ids(2, 9))
    state = cache.layers[0]
    size = sum(
        held.nbytes for held in (*state.conv_states.values(), *state.recurrent_states.values())
    )
    report = cache.memory_report()
    assert size > 0
    assert report["layers"][0]["exact_bytes"] == report["layers"][0]["total_bytes"] == size
    assert report["layers"][0]["uncompressed_bytes"] == size


def test_a_failed_first_pass_is_undone(model: Any) -> None:
    cache = tqai.patch(model)
    hook = spoil(model)
    with pytest.raises(ValueError, match="layer 1"):
        logits(model, cache, make_ids(2, 9))
    hook.remove()
    fresh = tqai.new_cache(model)
    ids = make_ids(2, 20)
    assert torch.equal(logits(model, cache, ids), logits(model, fresh, ids))


def test_a_later_failed_pass_says_that_the_states_are_lost(model: Any) -> None:
    cache = tqai.patch(model)
    ids = make_ids(2, 20)
    logits(model, cache, ids)
    hook = spoil(model)
    with pytest.raises(ValueError, match="layer 1"):
        logits(model, cache, ids[:, :1])
    hook.remove()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="recurrent states of Qwen3Next.*new_cache"):
            logits(model, cache, ids[:, :1])
    cache.reset()
    assert torch.equal(logits(model, cache, ids), logits(model, tqai.new_cache(model), ids))
