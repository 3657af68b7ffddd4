"""What a patched model says when it is given a cache that is not compressed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from small_mlx import make_model, mx, plain_cache, read, tokens

# isort: split
import tqai
from mlx_lm.generate import generate_step


def said(action: Callable[[], Any]) -> list[Any]:
    """The remarks of an action."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [each for each in caught if "nothing in it is compressed" in str(each.message)]


@pytest.mark.parametrize(("family", "kind"), [("llama", "KVCache"), ("gemma3", "RotatingKVCache")])
def test_a_plain_cache_is_remarked_on_once(family: str, kind: str) -> None:
    model = make_model(family)
    caches = [plain_cache(model), plain_cache(model)]
    expected = read(model, plain_cache(model), tokens(20), [18])
    tqai.patch(model)
    outputs = []
    (one,) = said(lambda: outputs.append(read(model, caches[0], tokens(20), [18])))
    assert f"Model was given a {kind}, which is used as it is" in str(one.message)
    assert "tqai.new_cache(model)" in str(one.message)
    assert mx.array_equal(outputs[0], expected)
    assert not said(lambda: model(tokens(1), cache=caches[0]))
    given = {"prompt_cache": caches[1], "max_tokens": 3}
    (one,) = said(lambda: list(generate_step(tokens(9)[0], model, **given)))
    assert one.filename == __file__


def test_what_is_meant_is_not_remarked_on() -> None:
    model, other = make_model("llama"), make_model("llama")
    cache = tqai.patch(model, skip_layers=[0])
    assert not said(lambda: read(model, cache, tokens(9), [8]))
    assert not said(lambda: model(tokens(9)))
    assert not said(lambda: list(generate_step(tokens(9)[0], model, max_tokens=2)))
    assert not said(lambda: read(other, plain_cache(other), tokens(9), [8]))
    tqai.patch(model, skip_layers=[0, 1])
    assert not said(lambda: read(model, tqai.new_cache(model), tokens(9), [8]))
    tqai.unpatch(model)
    assert not said(lambda: read(model, plain_cache(model), tokens(9), [8]))
