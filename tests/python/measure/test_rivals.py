"""bench/rivals.py: other caches, measured as tqai's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import tqai
from conftest import make_model

PATH = Path(__file__).parents[3] / "bench" / "rivals.py"
OWN = ("tbq4", "kivi2", "kvarn42", "kvarn22", "e8")
DIM = 32


@pytest.fixture(scope="module")
def rivals() -> Any:
    pytest.importorskip("transformers", minversion="4.58")  # QuantizedCache of another form
    spec = importlib.util.spec_from_file_location("rivals", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["rivals"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama", head_dim=DIM)


def test_all_are_measured_in_one_go(rivals: Any, model: Any) -> None:
    known = rivals.rivals_of(model)
    chosen = [known[name] for name in OWN]
    results = tqai.evaluate(
        model, toy.tokenizer(), None, ["k4v4", *chosen], prefill=300, read=16, samples=1
    )
    found = {each.setting: each for each in results}
    assert list(found) == ["k4v4", *OWN]
    for name in OWN:
        assert 1e-4 < found[name].kl_mean < 10
        assert found[name].tokens_read_packed == found[name].tokens_read == 16
        assert found[name].bytes_uncompressed == found["k4v4"].bytes_uncompressed
    # all but the last token, with an FP16 norm; 32 tokens or channels with a scale and a zero
    assert found["tbq4"].bits_per_coordinate == 4 + 16 / DIM
    assert found["tbq4"].packed_share == 315 / 316 or found["tbq4"].packed_share == 1
    assert found["kivi2"].bits_per_coordinate == 2 + 32 / 32
    assert found["e8"].bits_per_coordinate == 2 + 16 / DIM
    # of keys: a scale and a zero a channel, a scale a token; of values the other way around
    scales = (2 * DIM + 128 + 2 * 128 + DIM) * 16 / (2 * 128 * DIM)
    assert found["kvarn42"].bits_per_coordinate == pytest.approx(3 + scales)
    assert found["kvarn22"].kl_mean > found["kvarn42"].kl_mean


def test_errors_are_what_codes_of_so_many_bits_make(rivals: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 256, DIM) * torch.logspace(-1, 1, 256)[torch.randperm(256), None]

    def error(quantise: Any) -> float:
        found, _ = quantise(x, 3)
        return float(((found - x).square().sum(2) / x.square().sum(2)).mean())

    assert error(rivals.tbq(4)) == pytest.approx(0.0091, rel=0.1)
    assert error(rivals.e8) == pytest.approx(0.088, rel=0.1)
    # Tokens of all lengths: a scale for each is what brings them to one grid.
    assert error(rivals.kvarn(2, 128, True)) < error(rivals.kivi(2, 32, True)) / 2
    assert error(rivals.kivi(8, 32, False)) < 1e-4 and error(rivals.kvarn(8, 128, False)) < 1e-4


def test_a_window_stays_exact(rivals: Any, model: Any) -> None:
    rival = rivals.rivals_of(model)["kivi2"].again(residual_window=64)
    assert (rival.name, rival.window) == ("kivi2,window=64", 64)
    ids = torch.randint(3, 100, (1, 200), generator=torch.Generator().manual_seed(0))
    with rival.patched() as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        exact = cache.layers[0].keys.clone()
        report = cache.memory_report()
    assert report["packed_tokens"] == 128  # of 136, groups of 32
    changed = (cache.layers[0].keys != exact).any(3).any(1)[0]
    assert changed[:128].all() and not changed[128:].any()
