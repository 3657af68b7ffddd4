"""Models with recurrent states beside attention: these stay as transformers keeps them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import tqai
import transformers
from conftest import make_ids
from test_matrix import FAMILIES, SMALL
from tqai.transformers.model import other_layers

if not other_layers.HYBRIDS:
    pytest.skip("no common cache for hybrids before transformers 5.5", allow_module_level=True)


def make(family: str, seed: int = 1) -> Any:
    name, fields = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**{**SMALL, **fields})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def model() -> Any:
    return make("Qwen3-Next")


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
    size = sum(held.nbytes for held in other_layers.tensors_of(cache.layers[0]))
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


def assisted(model: Any, assistant: Any, options: dict[str, Any]) -> torch.Tensor:
    return model.generate(make_ids(tokens=60), assistant_model=assistant, **options)


def test_assisted_generation_is_as_without_tqai(greedy: dict[str, Any]) -> None:
    """States of convolutions go back, or do not, as without tqai."""
    model, assistant = make("LFM 2"), make("LFM 2", seed=2)
    try:
        expected = assisted(model, assistant, greedy)
    except ValueError as error:
        pytest.skip(f"transformers {transformers.__version__}: {error}")
    for options in ({"residual_window": 1000}, {"residual_window": 16, "bits_k": 8, "bits_v": 8}):
        cache = tqai.patch(model, **options)
        tqai.patch(assistant, **options)
        if other_layers.forgets_its_past(cache.layers[0]):
            with pytest.warns(UserWarning, match="states of convolutions.*5.16"):
                got = assisted(model, assistant, greedy)
        else:
            got = assisted(model, assistant, greedy)
        assert got.shape == expected.shape
        if options["residual_window"] == 1000:
            assert torch.equal(got, expected)


def test_a_recurrent_state_cannot_be_cropped(model: Any) -> None:
    cache = tqai.patch(model)
    logits(model, cache, make_ids(2, 20))
    with pytest.raises(NotImplementedError, match="layer 0 of Qwen3Next.*cannot go back"):
        cache.crop(-1)
    assert cache.get_seq_length() == 20
