"""A cache goes by one name or another, as transformers or a model's own code has it."""

from __future__ import annotations

import functools
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tqai
import transformers
from conftest import Models, make_ids, make_model
from tqai.transformers.model import names
from transformers.cache_utils import Cache, DynamicCache


class Older(torch.nn.Module):
    def forward(self, ids: Any, past_key_values: Cache | None = None, **kwargs: Any) -> Any:
        return past_key_values


class Newer(torch.nn.Module):
    def forward(self, ids: Any, cache: Cache | None = None, use_cache: Any = None) -> Any:
        return cache


class Dictionary(torch.nn.Module):
    def forward(self, ids: Any, cache: dict[str, Any] | None = None) -> Any:
        return cache


class Nothing(torch.nn.Module):
    def forward(self, ids: Any) -> Any:
        return ids


class Wrapped(Newer):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def decorated() -> torch.nn.Module:
    """As accelerate's hooks and others put a wrapper on an instance."""
    module = Older()
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]
    return module


def replaced() -> torch.nn.Module:
    module = Older()
    module.forward = lambda *args, **kwargs: Older.forward(module, *args, **kwargs)  # type: ignore
    return module


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (Older(), "past_key_values"),
        (Newer(), "cache"),
        (Wrapped(), "cache"),
        (decorated(), "past_key_values"),
        (replaced(), "past_key_values"),
        (Dictionary(), None),
        (Nothing(), None),
    ],
    ids=["older", "newer", "wrapped class", "decorated", "replaced", "dictionary", "nothing"],
)
def test_the_name_is_read_off_the_signature(module: torch.nn.Module, name: str | None) -> None:
    assert names.cache_name(module) == name


@pytest.mark.parametrize("module", [Older(), Newer(), Wrapped(), decorated(), replaced()])
def test_a_cache_is_put_where_the_forward_looks_for_it(module: torch.nn.Module) -> None:
    cache = DynamicCache()
    assert module(1, **names.cache_argument(module, cache)) is cache
    for args, kwargs in [((1,), {}), ((1, None), {}), ((), {"ids": 1})]:
        args, kwargs = names.with_cache(module, args, kwargs, cache)
        assert module(*args, **kwargs) is cache
        assert names.given(module, args, kwargs)[str(names.cache_name(module))] is cache


def test_the_older_keyword_goes_on_working_with_a_newer_forward() -> None:
    cache = DynamicCache()
    assert names.given(Newer(), (1,), {"past_key_values": cache}) == {"ids": 1, "cache": cache}
    args, kwargs = names.with_cache(Newer(), (1,), {"past_key_values": None}, cache)
    assert Newer()(*args, **kwargs) is cache


def test_the_newer_keyword_with_an_older_forward_is_an_error() -> None:
    with pytest.raises(ValueError, match="Older got cache=.*takes a cache as past_key_values="):
        names.given(Older(), (1,), {"cache": DynamicCache()})


def test_generate_says_what_it_calls_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert names.generate_name() == names.cache_name(make_model())
    # A version that has yet another name.
    mixin = SimpleNamespace(prepare_inputs_for_generation=lambda self, ids, store=None: None)
    monkeypatch.setattr(names, "GenerationMixin", mixin)
    with pytest.raises(NotImplementedError, match=f"{transformers.__version__}.*does not know"):
        names.generate_name.__wrapped__()


def test_both_keywords_on_a_patched_model(models: Models) -> None:
    model, ids = models(), make_ids()
    cache = tqai.patch(model, residual_window=16)
    own = names.cache_name(model)
    for decoder in (model, model.model):
        for name in ("past_key_values", "cache"):
            given = tqai.new_cache(model)
            if name == "cache" and own == "past_key_values":
                with pytest.raises(ValueError, match="takes a cache as past_key_values="):
                    decoder(ids, **{name: given})
            else:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)
                    decoder(ids, **{name: given})
                assert given.get_seq_length() == ids.shape[1]
    with torch.no_grad():
        model.model(ids, None, None, cache)
    assert cache.get_seq_length() == ids.shape[1]


def test_tqai_itself_uses_no_keyword_that_is_deprecated(
    models: Models, greedy: dict[str, Any]
) -> None:
    model = models()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        cache = tqai.patch(model)
        model.generate(make_ids(), **{names.generate_name(): cache}, **greedy)
        with torch.no_grad():
            model(make_ids())
            model.model(make_ids())
    assert cache.get_seq_length() == make_ids().shape[1] + greedy["max_new_tokens"] - 1
