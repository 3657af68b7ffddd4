"""bench/learnt_on.py: bases learnt on texts, beside those that a model learns by itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import toy
import tqai
from conftest import make_model
from tqai.transformers.basis import learn

PATH = Path(__file__).parents[3] / "bench" / "learnt_on.py"


@pytest.fixture(scope="module")
def learnt_on() -> Any:
    spec = importlib.util.spec_from_file_location("learnt_on", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_are_from_all_over_a_text(learnt_on: Any) -> None:
    text = "".join(chr(ord("a") + at // 100) for at in range(2600))
    tokenizer = toy.tokenizer()
    rows = learnt_on.rows_of(tokenizer, text, 8)
    assert rows.shape == (8, learn.ROW_TOKENS)
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert [row[: len(first)] for row in rows.tolist()] == [first] * 8
    assert len({tuple(row) for row in rows.tolist()}) == 8


def test_each_text_has_bases_of_its_own(learnt_on: Any) -> None:
    model, tokenizer = make_model(), toy.tokenizer()
    found = []
    for text in ("abcd" * 200, "xyz?" * 200):
        ids = learnt_on.rows_of(tokenizer, text, 16)
        setting = learnt_on.LearntOn(model, "k2v2", text[:4], ids)
        assert setting.name == f"k2v2, learnt on {text[:4]}"
        for _ in range(2):
            with setting.patched() as cache:
                found.append([layer.basis.id for layer in cache.layers])
    assert found[0] == found[1] != found[2] == found[3]
    own = [layer.basis.id for layer in tqai.TqaiCache(model, bits_k=2, codec="adaptive").layers]
    assert not set(own) & {*found[0], *found[2]}
    assert not tqai.is_patched(model)
