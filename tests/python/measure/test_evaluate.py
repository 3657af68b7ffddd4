"""``tqai.evaluate``: its numbers against slow ones of its own, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import toy
import tqai
from conftest import make_model
from tqai.measure.named_settings import parse_setting
from tqai.transformers.attention import functions as attention
from transformers import DynamicCache

TEXT = "".join(chr(32 + (i * i + 3 * i) % 90) for i in range(2000))
PREFILL, READ = 96, 24
# A tile of 64 is sealed in the prefill.
SETTING = "k2v2,sinks=2,window=8"


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


@torch.inference_mode()
def reference(model: Any, ids: torch.Tensor, cache: Any, chunk: int) -> torch.Tensor:
    """Log-probabilities [READ, vocabulary] after each token that follows the prefill."""
    model(ids[:, :PREFILL], past_key_values=cache, use_cache=True)
    logits = [
        model(ids[:, i : min(i + chunk, PREFILL + READ)], past_key_values=cache).logits[0]
        for i in range(PREFILL, PREFILL + READ, chunk)
    ]
    return torch.log_softmax(torch.cat(logits).double(), -1)


# Chunks of 7 leave 3 tokens for the last one.
@pytest.mark.parametrize("chunk", [1, 7])
def test_numbers(model: Any, chunk: int) -> None:
    progress = []
    (result,) = tqai.evaluate(
        model,
        toy.tokenizer(),
        TEXT,
        [SETTING],
        prefill=PREFILL,
        read=READ,
        samples=1,
        chunk=chunk,
        progress=lambda *args: progress.append(args),
    )
    ids = torch.tensor([toy.tokenizer()(TEXT).input_ids[: PREFILL + READ + 1]])
    targets = ids[0, PREFILL + 1 :, None]
    p = reference(model, ids, DynamicCache(config=model.config), chunk)
    cache = tqai.patch(model, **parse_setting(SETTING))
    q = reference(model, ids, cache, chunk)
    report = cache.memory_report()
    tqai.unpatch(model)

    kl = (p.exp() * (p - q)).sum(-1)
    assert kl.max() > 1e-3  # the setting is one that shows
    assert result.kl_mean == pytest.approx(kl.mean().item(), rel=1e-3)
    assert result.kl_median == pytest.approx(kl.median().item(), rel=1e-3)
    assert result.kl_p999 == result.kl_max == pytest.approx(kl.max().item(), rel=1e-3)
    quarters = kl.reshape(4, -1).mean(1).tolist()
    assert result.kl_along == pytest.approx(quarters, rel=1e-3)
    assert result.kl_by_stretch == result.kl_by_seed == (result.kl_mean,)
    assert result.kl_interval is result.equal_tokens is None
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
    assert result.bytes_held == report["total_bytes"]
    assert result.bytes_uncompressed == report["uncompressed_bytes"]
    assert result.bytes_shared == 0
    assert result.tokens_read == result.tokens_read_packed == READ
    assert result.packed_share == 64 / (PREFILL + READ)
    assert progress[0] == (chunk, 2 * READ, "uncompressed")
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
    assert both.kl_by_stretch == pytest.approx([end.kl_mean for end in ends], rel=1e-4)
    low, high = both.kl_interval
    assert low < min(both.kl_by_stretch) and max(both.kl_by_stretch) < high


def test_a_stretch_begins_as_asked(model: Any) -> None:
    def evaluate(text: str, bos: bool | None) -> float:
        (result,) = tqai.evaluate(
            model, toy.tokenizer(), text, [SETTING], prefill=PREFILL, read=READ, bos=bos
        )
        return result.perplexity_uncompressed

    # The toy tokenizer puts no first token by itself; "\x01" is it.
    text = TEXT[: PREFILL + READ]
    assert evaluate(text, True) == evaluate("\x01" + text, False) == evaluate("\x01" + text, None)
    assert evaluate(text + " ", True) != evaluate(text + " ", None)


def test_only_tokens_that_read_packed_ones_are_counted_so(model: Any) -> None:
    # 2 sinks, a tile of 64 and the window of 32 are full after the second token that is fed.
    def read_packed(chunk: int) -> int:
        (result,) = tqai.evaluate(
            model,
            toy.tokenizer(),
            TEXT,
            ["k4v4,sinks=2,window=32"],
            prefill=PREFILL,
            read=READ,
            samples=1,
            chunk=chunk,
        )
        return result.tokens_read_packed

    assert read_packed(1) == READ - 2
    assert read_packed(7) == READ - 7
    assert read_packed(16) == READ - 16


def test_seeds_are_counted_together(model: Any) -> None:
    def evaluate(setting: str, seeds: int) -> tqai.Fidelity:
        options = {"prefill": PREFILL, "read": READ, "samples": 2, "seeds": seeds}
        return tqai.evaluate(model, toy.tokenizer(), TEXT, [setting], **options)[0]

    all_three = evaluate(f"{SETTING},seed=5", 3)
    alone = [evaluate(f"{SETTING},seed={seed}", 1) for seed in (5, 6, 7)]
    assert all_three.setting == f"{SETTING},seed=5"
    assert all_three.kl_by_seed == pytest.approx([one.kl_mean for one in alone])
    assert len(set(all_three.kl_by_seed)) == 3
    assert all_three.kl_mean == pytest.approx(sum(all_three.kl_by_seed) / 3)
    assert all_three.kl_max == max(one.kl_max for one in alone)
    by_stretch = zip(*(one.kl_by_stretch for one in alone), strict=True)
    assert all_three.kl_by_stretch == pytest.approx([sum(each) / 3 for each in by_stretch])
    assert all_three.tokens_read == all_three.tokens_read_packed == 2 * READ
    assert all_three.perplexity == pytest.approx(
        math.prod(one.perplexity for one in alone) ** (1 / 3)
    )


def test_tails_replace_windows(model: Any) -> None:
    options = {"prefill": PREFILL, "read": READ, "samples": 1}
    settings = ["k2v2,window=1,sinks=2", "k4v4,sinks=2"]
    found = tqai.evaluate(model, toy.tokenizer(), TEXT, settings, tails=(0, 24), **options)
    names = [
        f"{bits},sinks=2,residual_window={tail}" for tail in (0, 24) for bits in ("k2v2", "k4v4")
    ]
    assert [each.setting for each in found] == names
    assert [each.chunk for each in found] == [1, 1, 16, 16]
    assert found == tqai.evaluate(model, toy.tokenizer(), TEXT, names, **options)


def test_equal_bytes(model: Any) -> None:
    options = {"prefill": 600, "read": 8, "samples": 1}
    settings = ["k8v8,window=16", "k2v2,window=16"]
    large, small = tqai.evaluate(
        model, toy.tokenizer(), TEXT, settings, equal_bytes=True, **options
    )
    assert large.setting == settings[0]
    # 2 layers of 2 heads; 16 coordinates in fp32, or at 2 bits and a norm
    tile = 64 * 2 * 2 * 2 * (16 * 4 - 6)
    assert 0 <= large.bytes_held - small.bytes_held < tile
    window = int(small.setting.removeprefix("k2v2,residual_window="))
    assert window > 16 and (window - 16) % 64 == 0
    alone = [tqai.evaluate(model, toy.tokenizer(), TEXT, [name], **options)[0] for name in settings]
    assert alone[0] == large
    assert alone[0].bytes_held - alone[1].bytes_held >= tile
    with pytest.raises(ValueError, match=r"setting 'k8v8,window=16': takes more bytes.*largest"):
        tqai.evaluate(model, toy.tokenizer(), TEXT, settings[::-1], equal_bytes=True, **options)


@pytest.mark.parametrize("chunk", [1, 8])
def test_own_continuation(model: Any, chunk: int) -> None:
    """Against generation itself, of both caches."""
    options: dict[str, Any] = {"prefill": PREFILL, "read": READ, "own": True, "chunk": chunk}
    (result,) = tqai.evaluate(model, toy.tokenizer(), TEXT, [SETTING], samples=1, **options)
    prompt = torch.tensor([toy.tokenizer()(TEXT).input_ids[:PREFILL]])

    def generate(cache: Any) -> Any:
        never = {"eos_token_id": 1000, "pad_token_id": 0}
        return model.generate(
            prompt, past_key_values=cache, max_new_tokens=READ + 1, do_sample=False, **never
        )

    ids = generate(DynamicCache(config=model.config))
    p = reference(model, ids, DynamicCache(config=model.config), chunk)
    q = reference(model, ids, tqai.patch(model, **parse_setting(SETTING)), chunk)
    theirs = generate(tqai.new_cache(model))
    tqai.unpatch(model)
    kl = (p.exp() * (p - q)).sum(-1)
    assert result.own and result.kl_mean == pytest.approx(kl.mean().item(), rel=1e-3)
    equal = (ids == theirs)[0, PREFILL:].int().cumprod(0).sum().item()
    assert 1 < equal < READ  # one that shows
    if chunk == 1:
        assert result.equal_tokens == (equal,)
    targets = ids[0, PREFILL + 1 :, None]
    loss = -p.gather(1, targets).mean()
    assert result.perplexity_uncompressed == pytest.approx(math.exp(loss), rel=1e-4)


def test_a_sampled_continuation(model: Any) -> None:
    def evaluate(setting: str, temperature: float) -> tqai.Fidelity:
        options: dict[str, Any] = {"own": True, "temperature": temperature}
        (result,) = tqai.evaluate(
            model, toy.tokenizer(), TEXT, [setting], prefill=PREFILL, read=READ, **options
        )
        return result

    fine, coarse = evaluate("k8v8,sinks=2,window=8", 1.0), evaluate(SETTING, 1.0)
    assert fine.perplexity_uncompressed == coarse.perplexity_uncompressed
    assert coarse.perplexity_uncompressed != evaluate(SETTING, 0.0).perplexity_uncompressed
    assert min(fine.equal_tokens) > 10  # where random numbers of its own would leave 1 or 2
    assert min(coarse.equal_tokens) < READ


@pytest.mark.parametrize("chunk", [1, 8])
def test_exact_arithmetic_reads_the_same_codes_without_the_kernels(
    model: Any, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    def evaluate(*settings: Any) -> list[tqai.Fidelity]:
        return tqai.evaluate(
            model, toy.tokenizer(), TEXT, settings, prefill=PREFILL, read=READ, chunk=chunk
        )

    kernel, exact = evaluate(SETTING, f"{SETTING},arithmetic=exact")
    assert exact.setting == f"{SETTING},arithmetic=exact"
    assert exact.kl_mean != kernel.kl_mean
    assert exact.kl_mean == pytest.approx(kernel.kl_mean, rel=0.02)
    assert exact.bits_per_coordinate == kernel.bits_per_coordinate

    def refuse(*_: Any) -> None:
        raise AssertionError("the kernel ran")

    monkeypatch.setattr(attention, "_attend_packed", refuse)
    assert evaluate({**parse_setting(SETTING), "arithmetic": "exact"})[0].kl_mean == exact.kl_mean
    with pytest.raises(AssertionError, match="the kernel ran"):
        evaluate(SETTING)


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
        ({"seeds": 0}, "seeds=0"),
        ({"temperature": 1.0}, "temperature=1.0: expected at least 0, and 0 where the text"),
        ({"temperature": -1.0, "own": True}, "temperature=-1.0"),
        ({"tails": (0,), "equal_bytes": True}, "expected one of them"),
        ({"tails": (-1,)}, "residual_window=-1"),
        ({"chunk": 0}, "chunk=0"),
        ({"chunk": 33, "settings": ["k4v2", "k4v4,window=32"]}, "chunk=33: setting 'k4v4,window"),
        ({"chunk": 2, "settings": ["k4v4,window=0"]}, "a window of 0 tokens"),
        ({"settings": ["k4v2,arithmetic=none"]}, "arithmetic='none'; expected one of kernel, ex"),
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
    assert parse_setting("small,seed=3") == {"preset": "small", "seed": 3}
    assert parse_setting("k4v2,arithmetic=exact")["arithmetic"] == "exact"


@pytest.mark.parametrize(
    "name", ["", "tiny", "4v2", "k4", "k4v2,", "k4v2,bits=3", "k4v2,window=wide"]
)
def test_parse_setting_refuses(name: str) -> None:
    with pytest.raises(ValueError, match="setting"):
        parse_setting(name)


@pytest.mark.parametrize("measure", [tqai.evaluate, tqai.needle])
def test_tokens_are_made_where_the_model_is(measure: Any, model: Any) -> None:
    """Tensors that are made nowhere in particular come on a device that holds no numbers here."""
    options: dict[str, Any] = {"prefill": PREFILL, "read": 2}
    if measure is tqai.needle:
        options = {"context": 500, "depths": [0.5], "needles": 1}
    tokenizer = toy.tokenizer()
    expected = measure(model, tokenizer, settings=[SETTING], **options)
    with torch.device("meta"):
        assert measure(model, tokenizer, settings=[SETTING], **options) == expected


def test_the_shorter_names_in_settings() -> None:
    short = parse_setting("k4v2,window=32,sinks=0,skip=0+1")
    assert short == parse_setting("k4v2,residual_window=32,sink_tokens=0,skip_layers=0+1")
    assert short["skip_layers"] == (0, 1)
