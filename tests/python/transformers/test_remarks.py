from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import tqai
from conftest import Models, make_ids, make_model
from tqai.transformers.model.names import cache_argument, generate_name
from transformers import DynamicCache, EncoderDecoderCache


def said(action: Any) -> list[Any]:
    """The warnings of an action."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [warning for warning in caught if "nothing in it is compressed" in str(warning.message)]


def test_a_cache_that_the_user_brings_is_remarked_on_once(
    models: Models, greedy: dict[str, Any]
) -> None:
    model = models()
    tqai.patch(model)
    own = DynamicCache(config=model.config)
    (one,) = said(lambda: model.generate(make_ids(), **cache_argument(model, own), **greedy))
    assert "given a DynamicCache" in str(one.message) and "new_cache" in str(one.message)
    assert one.filename == __file__
    assert not said(lambda: model(make_ids(tokens=1), **cache_argument(model, own)))
    (one,) = said(lambda: model(make_ids(), **cache_argument(model, DynamicCache())))
    assert "LlamaModel was given a DynamicCache" in str(one.message) and one.filename == __file__


@pytest.mark.parametrize("in_config", [False, True])
def test_a_chosen_implementation_is_remarked_on(in_config: bool, greedy: dict[str, Any]) -> None:
    model = make_model()  # some versions keep a static cache for the model's next calls
    tqai.patch(model)
    options = {} if in_config else {"cache_implementation": "static"}
    model.generation_config.cache_implementation = "static" if in_config else None
    (one,) = said(lambda: model.generate(make_ids(), **options, **greedy))
    assert "StaticCache for cache_implementation='static'" in str(one.message)
    assert "model.generation_config" in str(one.message)


def test_what_is_compressed_is_not_remarked_on(models: Models, greedy: dict[str, Any]) -> None:
    model = models()
    cache = tqai.patch(model)

    def use() -> None:
        for options in ({}, cache_argument(model, cache), {"use_cache": False}, {"num_beams": 2}):
            model.generate(make_ids(), **options, **greedy)
        model.generate(make_ids(), cache_implementation="dynamic", **greedy)
        model(make_ids())

    assert not said(use)
    tqai.unpatch(model)
    assert not said(lambda: model.generate(make_ids(), **greedy))


def test_training_with_a_cache_is_not_remarked_on() -> None:
    model = make_model().train()
    tqai.patch(model)
    assert not said(lambda: model(make_ids(), **cache_argument(model, DynamicCache())))


def test_a_model_around_the_patched_one_is_remarked_on(greedy: dict[str, Any]) -> None:
    model = make_model()
    tqai.patch(model.model)
    results: list[Any] = []
    options = {"return_dict_in_generate": True, **greedy}
    remarks = said(lambda: results.append(model.generate(make_ids(), **options)))
    # Where generate() makes no cache of its own, the patched model inside does.
    uncompressed = type(results[0].past_key_values) is DynamicCache
    assert len(remarks) == uncompressed
    assert all("patch that model" in str(one.message) for one in remarks)


@pytest.mark.parametrize("kind", ["PrefixTuning", "PromptTuning", "Lora"])
def test_peft(kind: str, greedy: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    tokens = {} if kind == "Lora" else {"num_virtual_tokens": 8}
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **tokens)
    model = peft.get_peft_model(make_model(), config).eval()
    with pytest.raises(ValueError, match=r"tqai.patch\(model.get_base_model\(\)\)"):
        tqai.patch(model)
    tqai.patch(model.get_base_model())
    remarks = said(lambda: model.generate(input_ids=make_ids(), **greedy))
    # A prefix by the older name of a cache is passed over where there is a newer one.
    brings_one = kind == "PrefixTuning" and generate_name() == "past_key_values"
    assert len(remarks) == brings_one
    assert all("prefix tuning" in str(one.message) for one in remarks)


def test_wrappers_are_told_what_to_patch() -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language = make_model()

    with pytest.raises(ValueError, match=r"got Wrapper: patch its \.language"):
        tqai.patch(Wrapper())


def test_a_compressed_half_of_a_pair_is_no_reason() -> None:
    model = make_model()
    cache = tqai.patch(model)
    pair = EncoderDecoderCache(cache, DynamicCache())
    from tqai.transformers import hooks

    assert hooks._is_compressed(pair) and not hooks._is_compressed(DynamicCache())
