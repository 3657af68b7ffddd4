"""Layers with recurrent states, or the keys of an index, beside their keys and values."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import tiny
import torch
import tqai
import transformers
from caches import SEALING, filled, held
from conftest import make_ids
from tqai.transformers.cache.beside import IndexedLayer, StatesLayer
from tqai.transformers.model import other_layers
from tqai.transformers.model.names import cache_argument

STATES = {"falcon_h1": "FalconH1ForCausalLM", "zaya": "ZayaForCausalLM"}
INDEXED = {"deepseek_v32": "DeepseekV32ForCausalLM", "qwen4_exp_text": "Qwen4ExpForCausalLM"}
IDS = make_ids(2, 200)


def model_of(kind: str) -> Any:
    name = {**STATES, **INDEXED}[kind]
    if not other_layers.HYBRIDS or not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}, or a cache of its own")
    return tiny.model_for(kind, name)


@pytest.fixture(params=STATES, scope="module")
def with_states(request: pytest.FixtureRequest) -> Any:
    return model_of(request.param)


@pytest.fixture(scope="module")
def indexed() -> Any:
    return model_of("deepseek_v32")


@torch.no_grad()
def logits(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, **cache_argument(model, cache)).logits


def stopped(module: Any) -> Any:
    """Makes a pass end where it comes to `module`, until the hook is removed."""

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    return module.register_forward_pre_hook(stop)


def beside(cache: Any) -> list[torch.Tensor]:
    """All that the layers hold in tensors of their own."""
    return [tensor for layer in cache.layers for tensor in other_layers.tensors_of(layer)]


@pytest.mark.parametrize("kind", [*STATES, *INDEXED])
def test_it_is_compressed_and_near_the_plain_cache(kind: str) -> None:
    model = model_of(kind)
    plain = filled(model, transformers.DynamicCache(config=model.config), IDS)
    more = make_ids(2, 3, seed=5)
    expected = [logits(model, plain, more[:, at : at + 1]) for at in range(3)]
    wide = filled(model, tqai.patch(model, residual_window=1000), IDS)
    for at in range(3):
        assert torch.equal(logits(model, wide, more[:, at : at + 1]), expected[at])
    cache = filled(model, tqai.patch(model, bits_k=8, bits_v=8, **SEALING), IDS)
    got = [logits(model, cache, more[:, at : at + 1]) for at in range(3)]
    error = torch.stack([a - b for a, b in zip(got, expected, strict=True)]).norm()
    assert error < 0.1 * torch.stack(expected).norm()
    kinds = {type(layer) for layer in cache.layers} & {StatesLayer, IndexedLayer}
    assert kinds == {StatesLayer if kind in STATES else IndexedLayer}
    report = cache.memory_report()
    assert report["packed_tokens"] > 0
    sizes = [tensor.nbytes for tensor in beside(cache)]
    stores = [layer.core.memory() for layer in cache.layers if hasattr(layer, "core")]
    assert report["exact_bytes"] == sum(sizes) + sum(store["exact_bytes"] for store in stores)


@pytest.mark.parametrize("kind", [*STATES, *INDEXED])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_do_not_see_each_other(kind: str, how: Any) -> None:
    model = model_of(kind)
    cache = filled(model, tqai.patch(model, **SEALING), IDS)
    copied = how(cache)
    expected = logits(model, cache, IDS[:, :5])
    assert torch.equal(logits(model, copied, IDS[:, :5]), expected)
    assert all(map(torch.equal, beside(copied), beside(cache)))


@pytest.mark.parametrize("kind", [*STATES, *INDEXED])
def test_rows_are_chosen_in_all_that_a_layer_holds(kind: str) -> None:
    model = model_of(kind)
    cache = filled(model, tqai.patch(model, **SEALING), IDS)
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    expected = logits(model, cache, IDS[:, :1])
    got = logits(model, swapped, IDS.flip(0)[:, :1]).flip(0)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    for layer in swapped.layers:
        if isinstance(layer, (StatesLayer, IndexedLayer)):
            layer.batch_select_indices(torch.tensor([1]))
            assert all(1 in tensor.shape[:2] for tensor in other_layers.tensors_of(layer))


@pytest.mark.parametrize("kind", [*STATES, *INDEXED])
def test_a_failed_first_pass_is_undone(kind: str) -> None:
    model = model_of(kind)
    cache = tqai.patch(model)
    expected = logits(model, tqai.new_cache(model), IDS)
    hook = stopped(model.model.layers[-1])
    with pytest.raises(KeyboardInterrupt):
        logits(model, cache, IDS)
    hook.remove()
    assert cache.get_seq_length() == 0
    assert torch.equal(logits(model, cache, IDS), expected)


def test_states_of_a_failed_pass_are_lost_and_it_says_so(with_states: Any) -> None:
    cache = filled(with_states, tqai.patch(with_states), IDS)
    hook = stopped(with_states.model.layers[-1])
    with pytest.raises(KeyboardInterrupt):
        logits(with_states, cache, IDS[:, :1])
    hook.remove()
    with pytest.raises(RuntimeError, match="recurrent states.*new_cache"):
        logits(with_states, cache, IDS[:, :1])
    cache.reset()
    expected = logits(with_states, tqai.new_cache(with_states), IDS)
    assert torch.equal(logits(with_states, cache, IDS), expected)


def test_states_go_into_no_file_and_not_back(with_states: Any, tmp_path: Any) -> None:
    cache = filled(with_states, tqai.patch(with_states), IDS)
    with pytest.raises(NotImplementedError, match="recurrent state.*deepcopy"):
        cache.crop(-1)
    with pytest.raises(NotImplementedError, match="tqai saves layers of keys and values only"):
        tqai.save_cache(cache, tmp_path / "f")


def test_an_index_goes_back_with_its_tokens(indexed: Any) -> None:
    """After ``crop``, and after a pass that fails between two layers."""
    cache = filled(indexed, tqai.patch(indexed, **SEALING), IDS)
    whole = copy.deepcopy(cache)
    logits(indexed, cache, IDS[:, :4])
    cache.crop(-4)
    assert all(map(torch.equal, beside(cache), beside(whole)))
    hook = stopped(indexed.model.layers[-1])
    with pytest.raises(KeyboardInterrupt):
        logits(indexed, cache, IDS[:, :4])
    hook.remove()
    assert cache.get_seq_length() == 200
    assert all(map(torch.equal, beside(cache), beside(whole)))
    assert all(map(torch.equal, held(cache), held(whole)))
    expected = logits(indexed, whole, IDS[:, :4])
    assert torch.equal(logits(indexed, cache, IDS[:, :4]), expected)
    cache.crop(-150)
    assert cache.layers[0].indexer_keys.shape[1] == cache.get_seq_length() == 54


def test_an_index_that_came_before_its_tokens_goes_back(indexed: Any) -> None:
    """A pass may end between a layer's index and its keys."""
    cache = filled(indexed, tqai.patch(indexed, **SEALING), IDS)
    whole = copy.deepcopy(cache)
    hook = stopped(indexed.model.layers[0].self_attn.indexer.weights_proj)
    with pytest.raises(KeyboardInterrupt):
        logits(indexed, cache, IDS[:, :1])
    assert cache.layers[0].indexer_keys.shape[1] == 201
    hook.remove()
    assert cache.get_seq_length() == 200
    assert all(map(torch.equal, beside(cache), beside(whole)))


@pytest.mark.parametrize("kind", [*STATES, *INDEXED])
def test_skipped_layers_stay_those_of_transformers(kind: str) -> None:
    model = model_of(kind)
    expected = logits(model, transformers.DynamicCache(config=model.config), IDS)
    cache = tqai.patch(model, skip_layers=range(len(model.model.layers)))
    assert not any(isinstance(layer, (StatesLayer, IndexedLayer)) for layer in cache.layers)
    assert torch.equal(logits(model, cache, IDS), expected)


def test_an_index_goes_into_files(indexed: Any, tmp_path: Any) -> None:
    cache = filled(indexed, tqai.patch(indexed, **SEALING), IDS)
    tqai.save_cache(cache, tmp_path / "f")
    loaded = tqai.load_cache(tmp_path / "f", indexed)
    assert all(map(torch.equal, beside(loaded), beside(cache)))
    assert len(beside(loaded)) == 2
    expected = logits(indexed, cache, IDS[:, :3])
    assert torch.equal(logits(indexed, loaded, IDS[:, :3]), expected)


@pytest.mark.parametrize(
    ("keys", "said"),
    [(None, "layer 0 lacks an index"), ((2, 199, 32), "index of shape .*200 tokens in 2 rows")],
)
def test_a_file_with_another_index_is_refused(
    indexed: Any, tmp_path: Any, keys: tuple[int, ...] | None, said: str
) -> None:
    cache = filled(indexed, tqai.patch(indexed, **SEALING), IDS)
    cache.layers[0].indexer_keys = None if keys is None else torch.zeros(keys)
    tqai.save_cache(cache, tmp_path / "f")
    with pytest.raises(ValueError, match=said):
        tqai.load_cache(tmp_path / "f", indexed)
