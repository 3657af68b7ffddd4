from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import tqai
import transformers
from caches import filled
from conftest import TRANSFORMERS_4, Models, make_ids, make_model
from tqai.transformers.attention import functions as attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

SEALING = {"residual_window": 16, "sink_tokens": 2, "bits_k": 4, "bits_v": 4}
NATIVE = ["llama", "qwen2", "qwen3", "mistral_wide", "gpt_oss", "gpt_neox", "gemma2"]
BOUND = {torch.float32: 2e-2, torch.float16: 2e-2, torch.bfloat16: 3e-2}


class Checker:
    """Compares each attention over packed tokens with the original function on the same codes."""

    def __init__(self) -> None:
        self.packed = 0
        """Calls that read the packed bytes."""
        self.dense = 0
        """Calls over packed layers that went to the original function."""
        self.worst = 0.0
        """Largest relative error of an output vector's norm, over all rows and heads together."""

    def attend_update(self, real: Any, original: Any, module: Any, query: Any, update: Any,
                      mask: Any, kwargs: Any) -> Any:  # fmt: skip
        if update.fresh is not None or not update.layer.is_packed():
            return real(original, module, query, update, mask, kwargs)
        dense = update.layer.gather(update.first, update.length)
        reference = original(module, query, *dense, mask, **kwargs)[0]
        packed = self.packed
        result = real(original, module, query, update, mask, kwargs)
        self.dense += packed == self.packed
        assert result[0].dtype == query.dtype and result[0].shape == reference.shape
        got, reference = result[0].float(), reference.float()
        if mask is not None and mask.shape[1] == 1:  # a query of padding sees nothing
            visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            real_queries = visible[:, 0].any(-1)[..., None, None]
            got, reference = got * real_queries, reference * real_queries
        error = (got - reference).norm() / reference.norm()
        self.worst = max(self.worst, error.item())
        return result


@pytest.fixture
def checker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Checker]:
    found = Checker()
    real, packed = attention._attend_update, attention._attend_packed

    def count(*args: Any) -> Any:
        found.packed += 1
        return packed(*args)

    monkeypatch.setattr(attention, "_attend_packed", count)
    monkeypatch.setattr(attention, "_attend_update", lambda *args: found.attend_update(real, *args))
    yield found


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("family", NATIVE)
def test_packed_attention_is_near_the_original_on_the_same_codes(
    family: str, dtype: torch.dtype, models: Models, checker: Checker, greedy: dict[str, Any]
) -> None:
    model = models(family, dtype=dtype)
    cache = tqai.patch(model, **SEALING)
    model.generate(make_ids(tokens=200), past_key_values=cache, **greedy)
    assert checker.packed == 2 * 15 and checker.dense == 0
    assert 0 < checker.worst < BOUND[dtype]


@pytest.mark.parametrize("family", ["llama", "mistral_wide"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_of_padded_rows_and_chunks(
    family: str, implementation: str, models: Models, checker: Checker, greedy: dict[str, Any]
) -> None:
    model = models(family, attn_implementation=implementation)
    tqai.patch(model, **SEALING)
    ids = make_ids(3, 200)
    mask = torch.ones_like(ids)
    mask[1, :120] = 0
    mask[2, :30] = 0
    for options in ({}, {"prefill_chunk_size": 90}, {"num_beams": 2}):
        model.generate(ids, attention_mask=mask, **options, **greedy)
    assert checker.packed >= 2 * 3 * 15 and checker.dense == 0
    assert 0 < checker.worst < BOUND[torch.float32]


def test_turns_of_several_tokens_read_the_packed_past(
    models: Models, checker: Checker, greedy: dict[str, Any]
) -> None:
    for family in ("llama", "mistral_wide"):
        model = models(family)
        cache = tqai.patch(model, **SEALING)
        ids = make_ids(tokens=200)
        for turn in range(3):
            ids = model.generate(ids, past_key_values=cache, **greedy)
            ids = torch.cat([ids, make_ids(tokens=40, seed=turn)], 1)
        tqai.unpatch(model)
    assert checker.packed == 2 * 2 * (15 + 16 + 16) and checker.dense == 0
    assert 0 < checker.worst < BOUND[torch.float32]


@pytest.mark.parametrize("kind", ["bool", "float32", "bfloat16", "heads", "bidirectional"])
def test_custom_masks(kind: str, models: Models, checker: Checker) -> None:
    model = models()
    tokens, past = 6, 200
    cache = tqai.patch(model, **SEALING)
    torch.manual_seed(0)
    seen = torch.rand(1, 4 if kind == "heads" else 1, tokens, past + tokens) < 0.5
    seen[..., :1] = True
    if kind != "bidirectional":
        seen &= torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past)
    mask = seen
    if kind in ("float32", "bfloat16"):
        dtype = getattr(torch, kind)
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        model = models(dtype=dtype)
        cache = tqai.patch(model, **SEALING)
    with torch.no_grad():
        model(make_ids(tokens=past), past_key_values=cache)
        model(make_ids(tokens=tokens), past_key_values=cache, attention_mask=mask)
    assert checker.packed == 2 and checker.dense == 0
    assert 0 < checker.worst < BOUND[torch.bfloat16]


def test_the_soft_cap_is_applied_where_the_original_applies_it(
    models: Models, checker: Checker, greedy: dict[str, Any]
) -> None:
    caps = []
    real = attention._attend_packed

    def look(query: Any, update: Any, arguments: Any) -> Any:
        caps.append(arguments["soft_cap"])
        return real(query, update, arguments)

    for implementation, cap in (("eager", 1.0), ("sdpa", 0.0)):
        if implementation == "sdpa" and not transformers.Gemma2PreTrainedModel._supports_sdpa:
            continue  # newer versions refuse what would ignore the cap
        model = models("gemma2", attn_implementation=implementation)
        tqai.patch(model, **SEALING)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "_attend_packed", look)
            model.generate(make_ids(tokens=200), **greedy)
        assert set(caps) == {cap}
        caps.clear()
    assert 0 < checker.worst < BOUND[torch.float32]


def test_unknown_arguments_go_to_the_original(models: Models, checker: Checker) -> None:
    model = models()
    cache = tqai.patch(model, **SEALING)
    layer = model.model.layers[0].self_attn
    with torch.no_grad():
        model(make_ids(tokens=200), past_key_values=cache)
    plain = attention.original_attention("sdpa", layer)

    def twisted(module: Any, *args: Any, twist: float | None = None, **kwargs: Any) -> Any:
        output, weights = plain(module, *args, **kwargs)
        return output * (twist or 1), weights

    query, packed = torch.randn(1, 4, 1, 16), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "original_attention", lambda *_: twisted)
        for twist in (None, 7.0):
            views = cache.update(*torch.randn(2, 1, 2, 1, 16), 0)
            attention.attention_forward(
                "sdpa", layer, query, *views, None, scaling=0.1, twist=twist, other=3
            )
            packed.append(checker.packed)
    assert packed == [1, 1]
    assert checker.worst < BOUND[torch.float32]


def test_an_original_that_computes_something_else_is_called(
    models: Models, checker: Checker
) -> None:
    model = models()
    cache = tqai.patch(model, **SEALING)
    with torch.no_grad():
        model(make_ids(tokens=200), past_key_values=cache)

    def doubled(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        weights = torch.softmax(query @ key.repeat_interleave(2, 1).mT, -1)
        return 2 * (weights @ value.repeat_interleave(2, 1)).transpose(1, 2), None

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(attention, "original_attention", lambda *_: doubled)
        model(make_ids(tokens=1), past_key_values=cache)
    assert checker.packed == 0 and checker.dense == 2


def test_families_outside_the_interface_dequantise(
    models: Models, checker: Checker, greedy: dict[str, Any]
) -> None:
    for family in ("falcon", "diffllama"):
        model = models(family)
        cache = tqai.patch(model, bits_k=8, bits_v=8, residual_window=16)
        got = model.generate(make_ids(tokens=200), past_key_values=cache, **greedy)
        assert cache.memory_report()["packed_tokens"] == 192
        tqai.unpatch(model)
        # Near enough to the plain cache that the tokens agree, with 8 bits.
        assert torch.equal(got, model.generate(make_ids(tokens=200), **greedy))
    assert checker.packed == 0


def test_attention_weights_come_from_the_eager_function(
    models: Models, checker: Checker, greedy: dict[str, Any]
) -> None:
    model = models(attn_implementation="eager")
    tqai.patch(model, **SEALING)
    options = {"output_attentions": True, "return_dict_in_generate": True, **greedy}
    result = model.generate(make_ids(tokens=200), **options)
    assert checker.packed == 0 and checker.dense == 2 * 15
    assert len(result.attentions) == 16
    last = result.attentions[-1][1]
    assert last.shape == (1, 4, 1, 215)
    assert torch.allclose(last.sum(-1), torch.ones(1, 4, 1), atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_are_those_of_the_original(implementation: str) -> None:
    name = {"sdpa": "tqai", "eager": "tqai_eager"}[implementation]
    attention.register()
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[1, :4] = False
    common = {"batch_size": 2, "kv_length": 9, "device": "cpu"}
    if TRANSFORMERS_4:
        common |= {"cache_position": torch.arange(6, 9)}
    else:
        common |= {"q_length": 3, "q_offset": 6}
    for mask in (None, padding):
        got = ALL_MASK_ATTENTION_FUNCTIONS[name](attention_mask=mask, **common)
        expected = ALL_MASK_ATTENTION_FUNCTIONS[implementation](attention_mask=mask, **common)
        assert torch.equal(got, expected) and got.dtype == expected.dtype


def test_left_padding_is_dropped_but_not_what_a_strict_mask_hides(models: Models) -> None:
    model = models()
    ids = make_ids(2, 100)
    mask = torch.ones_like(ids)
    mask[1, :70] = 0
    cache = tqai.patch(model, **SEALING)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    assert [layer.padding for layer in cache.layers] == [[0, 70]] * 2
    assert cache.memory_report()["tokens"] == 130

    # No token sees itself, but all but the last are seen.
    strict = torch.ones(100, 100, dtype=torch.bool).tril(-1).expand(2, 1, 100, 100)
    cache = tqai.new_cache(model)
    with torch.no_grad():
        model(ids, attention_mask=strict, past_key_values=cache)
    assert [layer.padding for layer in cache.layers] == [[0, 0]] * 2


def test_padding_longer_than_the_first_chunk(models: Models, greedy: dict[str, Any]) -> None:
    model = models()
    ids = make_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    mask[1, :45] = 0
    options = {"attention_mask": mask, "prefill_chunk_size": 20, **greedy}
    expected = model.generate(ids, **options)
    cache = tqai.patch(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
    assert cache.layers[0].padding == [10, 45]


def test_a_paged_cache_is_refused() -> None:
    attention.register()
    tensors = torch.zeros(3, 1, 1, 1, 8)
    with pytest.raises(NotImplementedError, match="continuous batching"):
        attention.attention_forward("sdpa", torch.nn.Identity(), *tensors, None, cache=object())


def test_stale_views_are_refused(models: Models) -> None:
    model = models()
    cache = tqai.patch(model, **SEALING)
    with torch.no_grad():
        model(make_ids(tokens=200), past_key_values=cache)
    views = cache.update(*torch.randn(2, 1, 2, 1, 16), 0)
    cache.layers[0].crop(-1)
    with pytest.raises(RuntimeError, match="layer 0.*before the cache was changed"):
        attention.attention_forward(
            "sdpa", model.model.layers[0].self_attn, torch.zeros(1, 4, 1, 16), *views, None
        )


def test_inference_mode_and_autocast(greedy: dict[str, Any], checker: Checker) -> None:
    model = make_model()
    tqai.patch(model, **SEALING)
    ids, mask = make_ids(2, 200), torch.ones(2, 200, dtype=torch.long)
    mask[0, :20] = 0
    with torch.inference_mode():
        model.generate(ids, attention_mask=mask, **greedy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.generate(ids, attention_mask=mask, **greedy)
    assert checker.packed == 2 * 2 * 15 and checker.dense == 0
    assert 0 < checker.worst < BOUND[torch.bfloat16]


def test_a_mask_may_be_written_to_between_passes(models: Models) -> None:
    model, ids = models(), make_ids(tokens=40)
    tqai.patch(model, residual_window=16)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    for mask_of_pass in (mask, torch.zeros(1, 1, 40, 40).masked_fill(~mask, float("-inf"))):
        buffer = mask_of_pass.clone()
        buffer[..., :10] = torch.finfo().min if buffer.is_floating_point() else False
        padding = []
        for _ in range(2):
            cache = filled(model, tqai.new_cache(model), ids, attention_mask=buffer)
            padding.append([layer.padding for layer in cache.layers])
            buffer.copy_(mask_of_pass)
        assert padding == [[[10], [10]], [[0], [0]]]


def test_queries_on_another_device_are_refused(models: Models) -> None:
    model = models()
    module = model.model.layers[0].self_attn
    cache = filled(model, tqai.patch(model, residual_window=16), make_ids(tokens=100))
    keys, values = cache.layers[0].update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))
    queries = torch.zeros(1, 4, 1, 16, device="meta")
    with pytest.raises(ValueError, match="layer 0: queries on meta.*are on cpu"):
        attention.attention_forward("sdpa", module, queries, keys, values)
