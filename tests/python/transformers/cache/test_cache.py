from __future__ import annotations

import copy
import gc
import json
import threading
from typing import Any

import pytest
import torch
import tqai
from caches import SEALING, assert_equal, filled, held
from conftest import TRANSFORMERS_4, VOCABULARY, Models, make_ids, make_model
from features import (
    beams,
    chunked,
    forward,
    left_padded,
    plain,
    prompt_lookup,
    sampled,
    turns,
)
from tqai import _core
from tqai.transformers.cache.layer import TqaiLayer
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]
OTHERS = ["mistral_wide", "gemma2", "gpt_oss", "gpt_neox", "falcon", "diffllama"]
BYTES = ["packed_bytes", "exact_bytes", "overhead_bytes", "total_bytes", "uncompressed_bytes"]


# With everything inside the window, outputs are those of the plain cache, to the bit.


FEATURES = [plain, left_padded, beams, chunked, sampled, prompt_lookup, turns, forward]


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_nothing_changes_while_the_window_holds_everything(
    family: str, feature: Any, models: Models, greedy: dict[str, Any]
) -> None:
    model = models(family)
    expected = feature(model, greedy)
    tqai.patch(model)
    got = feature(model, greedy)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_changes_in_other_dtypes_and_implementations(
    family: str,
    implementation: str,
    dtype: torch.dtype,
    models: Models,
    greedy: dict[str, Any],
) -> None:
    model = models(family, dtype=dtype, attn_implementation=implementation)
    expected = [feature(model, greedy) for feature in (left_padded, turns)]
    tqai.patch(model)
    got = [feature(model, greedy) for feature in (left_padded, turns)]
    for ours, theirs in zip(got, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_features_run_over_sealed_tokens(
    family: str, models: Models, greedy: dict[str, Any]
) -> None:
    """What is sealed when differs between these, so with 8 bits they agree with the plain cache."""
    model = models(family)
    ids = make_ids(2, 200)
    ids[:, 100:] = ids[:, :100]
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    for options in (
        {"attention_mask": mask},
        {"num_beams": 2},
        {"prefill_chunk_size": 90},
        {"prompt_lookup_num_tokens": 3, "input_ids": ids[:1]},
    ):
        options = {"input_ids": ids, **options, **greedy}
        expected = model.generate(**options)
        tqai.patch(model, bits_k=8, bits_v=8, residual_window=16)
        got = model.generate(**options)
        tqai.unpatch(model)
        assert (got == expected).float().mean() > 0.99


# Memory.


@pytest.mark.parametrize("batch", [1, 3])
def test_the_report_is_what_the_allocator_handed_out(batch: int, models: Models) -> None:
    model = models()
    gc.collect()
    start = _core.allocated_bytes()
    cache = tqai.patch(model, **SEALING)
    for step, tokens in enumerate([300, 1, 90, 1]):
        filled(model, cache, make_ids(batch, tokens, seed=step))
        report = cache.memory_report()
        assert report["total_bytes"] == cache.nbytes == _core.allocated_bytes() - start
        assert report["total_bytes"] == sum(report[name] for name in BYTES[:3])
        assert report["tokens"] == batch * cache.get_seq_length()
        assert report["uncompressed_bytes"] == report["tokens"] * 2 * 2 * 2 * 16 * 4
        for name in BYTES:
            assert report[name] == sum(layer[name] for layer in report["layers"])
    assert report["packed_tokens"] == batch * 320
    assert set(report["centering"]) <= {"mean", "none", "rope"}
    assert sum(report["centering"].values()) == batch * 2 * 2
    assert report["rotary"] == {"half_split": 2}
    assert report["settings"]["residual_window"] == 16
    json.dumps(report)
    assert "392 tokens" in repr(cache) or batch > 1
    del cache
    gc.collect()
    assert _core.allocated_bytes() == start


def test_a_sealed_token_costs_its_codes_and_norms(models: Models) -> None:
    model = models("qwen3")  # head_dim 32
    cache = filled(model, tqai.patch(model, bits_k=4, bits_v=2, **SEALING), make_ids(tokens=400))
    report = cache.memory_report()
    assert report["packed_tokens"] == 320
    tile = report["packed_bytes"] / 320 / 2 / 2
    assert tile == (4 + 2) * 32 / 8 + 2 * 2


def test_an_empty_cache_reports_nothing(models: Models) -> None:
    cache = tqai.patch(models())
    report = cache.memory_report()
    assert cache.nbytes == 0 and all(report[name] == 0 for name in [*BYTES, "tokens"])
    assert cache.get_seq_length() == 0 and repr(cache)


def test_skipped_layers_stay_plain_and_count_as_exact(
    models: Models, greedy: dict[str, Any]
) -> None:
    model = models("mistral_wide", num_hidden_layers=3)
    cache = tqai.patch(model, skip_layers=[0, -1], **SEALING)
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [DynamicSlidingWindowLayer, TqaiLayer, DynamicSlidingWindowLayer]
    filled(model, cache, make_ids(tokens=120))
    # Keys, values, and the counters that some versions keep as tensors.
    held = [value for value in vars(cache.layers[0]).values() if isinstance(value, torch.Tensor)]
    exact = sum(tensor.nbytes for tensor in held)
    assert exact >= cache.layers[0].keys.nbytes + cache.layers[0].values.nbytes
    layers = cache.memory_report()["layers"]
    assert layers[0]["exact_bytes"] == layers[0]["uncompressed_bytes"] == exact
    assert layers[0]["packed_bytes"] == 0 < layers[1]["packed_bytes"]
    model.generate(make_ids(tokens=200), **greedy)


# Operations.


@pytest.mark.parametrize("settings", [{}, SEALING], ids=["exact", "sealed"])
def test_operations_reach_all_layers(settings: dict[str, Any], models: Models) -> None:
    model = models()
    cache = filled(model, tqai.patch(model, **settings), make_ids(2, 150))
    before = held(cache)
    cache.crop(-10)
    assert cache.get_seq_length() == 140
    cache.crop(130)
    assert cache.get_seq_length() == 130
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    for got, was in zip(held(cache), before, strict=True):
        assert torch.equal(got, was[[1, 0], :, :130])
    assert cache.get_mask_sizes(torch.arange(3) if TRANSFORMERS_4 else 3, 0) == (133, 0)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    filled(model, cache, make_ids(2, 150))
    for got, was in zip(held(cache), before, strict=True):
        assert torch.equal(got, was)


@pytest.mark.parametrize("family", ["llama", "mistral_wide"])
def test_a_copied_prefix_shares_its_tiles(family: str, models: Models) -> None:
    model = models(family)
    cache = filled(model, tqai.patch(model, **SEALING), make_ids(tokens=1000))
    gc.collect()
    start, packed = _core.allocated_bytes(), cache.memory_report()["packed_bytes"]
    branches = [copy.deepcopy(cache) for _ in range(4)]
    assert _core.allocated_bytes() - start < 4 * (cache.nbytes - 0.9 * packed)
    before = held(cache)
    logits = []
    for branch in (*branches[:2], cache):
        with torch.no_grad():
            more = make_ids(tokens=5, seed=len(logits) // 2)
            logits.append(model(more, past_key_values=branch).logits)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    for got, was in zip(held(branches[3]), before, strict=True):
        assert torch.equal(got, was)
    assert branches[0].get_seq_length() == 1005


def test_two_caches_of_a_model_do_not_meet(models: Models) -> None:
    model = models()
    first, second = tqai.patch(model, **SEALING), tqai.new_cache(model)
    alone = tqai.new_cache(model)
    for step in range(3):
        filled(model, first, make_ids(tokens=90, seed=step))
        filled(model, second, make_ids(tokens=90, seed=10 + step))
    for step in range(3):
        filled(model, alone, make_ids(tokens=90, seed=step))
    assert_equal(first, alone)


def test_pairs_of_keys_and_values_can_be_read_like_a_dynamic_cache(models: Models) -> None:
    model = models("mistral")
    cache = filled(model, tqai.patch(model), make_ids(tokens=100))
    plain = filled(model, DynamicCache(config=model.config), make_ids(tokens=100))
    for ours, theirs in zip(cache, plain, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert len(cache) == 2 and not cache.is_compileable
    assert list(cache.is_sliding) == list(plain.is_sliding)


# Errors leave the cache and the model as they were.


def spoil(model: Any, layer: int, value: float) -> Any:
    """Makes the keys of a layer `value` until the hook is removed."""
    projection = model.model.layers[layer].self_attn.k_proj
    return projection.register_forward_hook(lambda *_: torch.full_like(_[2], value))


@pytest.mark.parametrize("family", ["llama", "mistral", "mistral_wide"])
@pytest.mark.parametrize("skip", [(), (0,)])
@pytest.mark.parametrize("tokens", [0, 200])
def test_a_failed_pass_is_undone(
    family: str, skip: tuple[int, ...], tokens: int, models: Models, greedy: dict[str, Any]
) -> None:
    model = models(family)
    cache = tqai.patch(model, skip_layers=skip, **SEALING)
    twin = tqai.new_cache(model)
    for both in (cache, twin) if tokens else ():
        filled(model, both, make_ids(tokens=tokens))
    for value in (float("nan"), float("inf"), -float("inf")):
        hook = spoil(model, 1, value)
        try:
            with pytest.raises(ValueError, match="layer 1"):
                filled(model, cache, make_ids(tokens=7))
        finally:
            hook.remove()
        assert cache.get_seq_length() == tokens
        assert len({layer.get_seq_length() for layer in cache.layers}) == 1
    for both in (cache, twin):
        filled(model, both, make_ids(tokens=30, seed=3))
    assert_equal(cache, twin)
    model.generate(make_ids(), **greedy)


def test_a_failure_in_attention_is_undone(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models()
    cache = filled(model, tqai.patch(model, **SEALING), make_ids(tokens=200))
    before = held(cache)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tqai.transformers.attention.functions._attend_packed", fail)
        with pytest.raises(KeyboardInterrupt):
            filled(model, cache, make_ids(tokens=3))
    assert cache.get_seq_length() == 200
    for got, was in zip(held(cache), before, strict=True):
        assert torch.equal(got, was)
    filled(model, cache, make_ids(tokens=3))
    assert cache.get_seq_length() == 203


OTHER_SHAPES = [{"num_key_value_heads": 4}, {"head_dim": 32}, {"num_hidden_layers": 3}]
SAME_SHAPES = [{"family": "qwen2"}, {"seed": 2}]  # told apart where both are patched


@pytest.mark.parametrize("tokens", [0, 50])
@pytest.mark.parametrize(
    ("other", "patched"),
    [
        *((other, patched) for other in OTHER_SHAPES for patched in (True, False)),
        *((other, True) for other in SAME_SHAPES),
    ],
    ids=str,
)
def test_the_cache_of_another_model_is_refused(
    other: dict[str, Any], tokens: int, patched: bool, models: Models, greedy: dict[str, Any]
) -> None:
    model, stranger = models(), models(**other)
    cache = tqai.patch(model)
    if tokens:
        filled(model, cache, make_ids(tokens=tokens))
    if patched:
        tqai.patch(stranger)
    with pytest.raises(ValueError, match="made for .*new_cache"):
        stranger.generate(make_ids(tokens=60), past_key_values=cache, **greedy)
    assert {layer.get_seq_length() for layer in cache.layers} == {tokens}
    filled(model, cache, make_ids(tokens=10))
    stranger.generate(make_ids(), **greedy)


def test_another_batch_is_refused(models: Models) -> None:
    model = models()
    cache = filled(model, tqai.patch(model, **SEALING), make_ids(2, 200))
    with pytest.raises(ValueError, match="^layer 0: keys of 3 rows; the cache holds 2"):
        filled(model, cache, make_ids(3, 5))
    assert cache.get_seq_length() == 200
    filled(model, cache, make_ids(2, 5))


def test_a_cache_outlives_its_patch(models: Models) -> None:
    model = models()
    cache = filled(model, tqai.patch(model, bits_k=8, bits_v=8, **SEALING), make_ids(tokens=200))
    twin = copy.deepcopy(cache)
    with torch.no_grad():
        patched = model(make_ids(tokens=1), past_key_values=cache).logits
        tqai.unpatch(model)
        unpatched = model(make_ids(tokens=1), past_key_values=twin).logits
    assert torch.allclose(patched, unpatched, atol=0.05 * patched.abs().max())
    assert unpatched.shape[-1] == VOCABULARY
    tqai.patch(model)
    filled(model, cache, make_ids(tokens=1))


def test_models_in_several_threads(greedy: dict[str, Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = make_model()
    tqai.patch(model, **SEALING)
    prompts = [make_ids(tokens=200, seed=seed) for seed in range(4)]
    expected = [model.generate(prompt, **greedy) for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda prompt: model.generate(prompt, **greedy), prompts))
    assert all(map(torch.equal, got, expected))


def test_two_threads_do_not_add_to_one_cache_at_once(models: Models) -> None:
    model = models()
    cache = tqai.patch(model, **SEALING)
    errors: list[str] = []

    def read_too() -> None:
        with torch.no_grad():
            try:
                model(make_ids(1, 30, seed=1), past_key_values=cache)
            except RuntimeError as error:
                errors.append(str(error))

    def meanwhile(*_: Any) -> None:
        thread = threading.Thread(target=read_too)
        thread.start()
        thread.join()

    handle = model.model.layers[1].register_forward_pre_hook(meanwhile)
    try:
        filled(model, cache, make_ids(1, 50))
    finally:
        handle.remove()
    assert len(errors) == 1 and "another thread's forward pass" in errors[0]
    assert_equal(cache, filled(model, tqai.new_cache(model), make_ids(1, 50)))


def test_a_cache_says_when_it_is_filled(models: Models) -> None:
    """Some models take a cache that is not for the sign of a first pass."""
    for family in ("llama", "mistral"):
        model = models(family)
        cache = tqai.patch(model)
        plain = DynamicCache(config=model.config)
        assert cache.is_initialized is False
        for one in (cache, plain):
            filled(model, one, make_ids(tokens=40))
        assert cache.is_initialized is plain.is_initialized is True
        assert cache.is_sliding == plain.is_sliding
        assert cache.is_compileable == plain.is_compileable
        cache.reset()
        assert cache.is_initialized is False
