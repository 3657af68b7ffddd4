"""``tqai.evaluate``: its numbers against slow ones of its own, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import toy
import tqai
from conftest import make_model
from tqai.fidelity import parse_setting
from transformers import DynamicCache

TEXT = "".join(chr(32 + (i * i + 3 * i) % 90) for i in range(2000))
PREFILL, READ = 96, 24
# A tile of 64 is sealed in the prefill.
SETTING = "k2v2,sinks=2,window=8"


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


@torch.inference_mode()
def reference(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Log-probabilities [READ, vocabulary] after each token that follows the prefill."""
    model(ids[:, :PREFILL], past_key_values=cache, use_cache=True)
    logits = [
        model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0, -1]
        for i in range(PREFILL, PREFILL + READ)
    ]
    return torch.log_softmax(torch.stack(logits).double(), -1)


def test_numbers(model: Any) -> None:
    progress = []
    (result,) = tqai.evaluate(
        model,
        toy.tokenizer(),
        TEXT,
        [SETTING],
        prefill=PREFILL,
        read=READ,
        progress=lambda *args: progress.append(args),
    )
    ids = torch.tensor([toy.tokenizer()(TEXT).input_ids[: PREFILL + READ + 1]])
    targets = ids[0, PREFILL + 1 :, None]
    p = reference(model, ids, DynamicCache(config=model.config))
    cache = tqai.patch(model, **parse_setting(SETTING))
    q = reference(model, ids, cache)
    report = cache.memory_report()
    tqai.unpatch(model)

    kl = (p.exp() * (p - q)).sum(-1)
    assert kl.max() > 1e-3  # the setting is one that shows
    assert result.kl_mean == pytest.approx(kl.mean().item(), rel=1e-3)
    assert result.kl_median == pytest.approx(kl.median().item(), rel=1e-3)
    assert result.kl_max == pytest.approx(kl.max().item(), rel=1e-3)
    assert result.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert result.perplexity == pytest.approx(math.exp(-q.gather(1, targets).mean()), rel=1e-4)
    assert result.perplexity_uncompressed == pytest.approx(
        math.exp(-p.gather(1, targets).mean()), rel=1e-4
    )
    dim = 16
    assert result.bits_per_coordinate == pytest.approx(2 + 16 / dim)
    assert result.bits_per_coordinate_whole == pytest.approx(
        32 * report["total_bytes"] / report["uncompressed_bytes"]
    )
    assert result.tokens_read == result.tokens_read_packed == READ
    assert result.packed_share == 64 / (PREFILL + READ)
    assert progress[0] == (1, 2 * READ, "uncompressed")
    assert progress[-1] == (2 * READ, 2 * READ, SETTING)


def test_samples_are_spread_over_the_text(model: Any) -> None:
    def evaluate(text: str, samples: int) -> tqai.Fidelity:
        return tqai.evaluate(
            model, toy.tokenizer(), text, [SETTING], prefill=PREFILL, read=READ, samples=samples
        )[0]

    stretch = PREFILL + READ + 1
    both = evaluate(TEXT, 2)
    ends = [evaluate(TEXT[:stretch], 1), evaluate(TEXT[-stretch:], 1)]
    assert both.tokens_read == 2 * READ
    assert both.kl_mean == pytest.approx(sum(end.kl_mean for end in ends) / 2, rel=1e-4)
    assert both.kl_max == pytest.approx(max(end.kl_max for end in ends), rel=1e-4)


def test_exact_cache_costs_nothing_but_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="no packed token was read"):
        tqai.evaluate(model, toy.tokenizer(), TEXT, ["k4v4,window=500"], prefill=PREFILL, read=READ)
    with pytest.raises(ValueError, match="not patched"):
        tqai.unpatch(model)  # it is as it was


def test_more_bits_cost_less(model: Any) -> None:
    results = tqai.evaluate(
        model,
        toy.tokenizer(),
        TEXT,
        [{"bits_k": b, "bits_v": b, "sink_tokens": 0, "residual_window": 0} for b in (2, 4, 8)],
        prefill=PREFILL,
        read=READ,
    )
    divergences = [result.kl_mean for result in results]
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[0] > 10 * divergences[2]
    assert results[0].setting == "bits_k=2,bits_v=2,sink_tokens=0,residual_window=0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": []}, "at least one"),
        ({"prefill": 0}, "prefill=0"),
        ({"read": 0}, "read=0"),
        ({"samples": 0}, "samples=0"),
        ({"text": "short"}, "the text has 5 tokens: expected at least 769"),
        ({"settings": ["k9v2"]}, "bits_k=9"),
    ],
)
def test_refused(model: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tqai.evaluate(model, toy.tokenizer(), **arguments)
    with pytest.raises(ValueError, match="not patched"):
        tqai.unpatch(model)


def test_patched_model_is_refused() -> None:
    model = make_model("llama")
    tqai.patch(model)
    with pytest.raises(ValueError, match=r"call tqai\.unpatch"):
        tqai.evaluate(model, toy.tokenizer(), TEXT)
    assert tqai.new_cache(model).memory_report()["settings"]["bits_k"] == 4  # still patched


def test_parse_setting() -> None:
    assert parse_setting("k4v2") == {"bits_k": 4, "bits_v": 2}
    assert parse_setting("k3v8,sinks=0,window=32,rotation=haar,centering=none,skip=0+29") == {
        "bits_k": 3,
        "bits_v": 8,
        "sink_tokens": 0,
        "residual_window": 32,
        "rotation": "haar",
        "centering": "none",
        "skip_layers": (0, 29),
    }


@pytest.mark.parametrize("name", ["", "4v2", "k4", "k4v2,", "k4v2,bits=3", "k4v2,window=wide"])
def test_parse_setting_refuses(name: str) -> None:
    with pytest.raises(ValueError, match="setting"):
        parse_setting(name)
