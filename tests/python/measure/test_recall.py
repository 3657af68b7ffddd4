"""``tqai.needle``: what it asks, its numbers against slow ones of its own, and what it refuses."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import toy
import tqai
from conftest import make_model
from tqai.measure.named_settings import parse_setting
from tqai.measure.readers import TorchReader
from tqai.measure.recall import (
    CANDIDATES,
    _generate,
    _hidden,
    _rows_of_table,
    _Trial,
    is_answer,
)
from tqai.measure.text import frame, prose
from transformers import DynamicCache

TEXT = "One more sentence of the text. " * 50
CONTEXT = 500
SETTING = "k2v2,sinks=2,window=32"


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


def chat_tokenizer() -> Any:
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = toy.CHAT_TEMPLATE
    return tokenizer


def make_trial(depth: float, seed: int = 0, tokenizer: Any = None) -> _Trial:
    tokenizer = tokenizer or toy.tokenizer()
    text = tokenizer(TEXT).input_ids
    (trial,) = _hidden(tokenizer, text, CONTEXT, [depth], random.Random(f"{seed} 0"))
    return trial


def needle(model: Any, settings: list[Any], **options: Any) -> list[tqai.Recall]:
    options = {"context": CONTEXT, "depths": (0.5,), "needles": 1, **options}
    return tqai.needle(model, toy.tokenizer(), TEXT, settings, **options)


@pytest.mark.parametrize("depth", [0, 0.3, 1])
@pytest.mark.parametrize("chat", [False, True])
def test_prompt(depth: float, chat: bool) -> None:
    tokenizer = chat_tokenizer() if chat else toy.tokenizer()
    trial = make_trial(depth, tokenizer=tokenizer)
    assert len(trial.ids) + len(trial.question) == CONTEXT
    prompt = tokenizer.decode(trial.ids)
    sentence = prompt[trial.first : trial.last + 1]
    fact, code = sentence.rsplit(" ", 1)
    assert fact.startswith(" The secret code of the ") and fact.endswith(" is")
    assert code == f"{trial.codes[0]}."

    head = "<user>" if chat else ""
    before, after = prompt[len(head) : trial.first], prompt[trial.last + 1 :]
    assert prompt.startswith(head) and before + after in TEXT
    assert before == "" or before.endswith(".")
    longest_sentence = 31
    assert 0 <= depth * len(before + after) - len(before) < longest_sentence

    asked = fact.removeprefix(" The").removesuffix(" is")
    template = "\n\nWhat is the{0}?{1}The{0} is"
    assert tokenizer.decode(trial.question) == template.format(asked, "<a>" if chat else " ")


def test_needles_in_one_text() -> None:
    tokenizer = toy.tokenizer()
    depths = [0.8, 0.0, 0.5]
    text = tokenizer(TEXT).input_ids
    trials = _hidden(tokenizer, text, 900, depths, random.Random(1))
    assert [trial.depth for trial in trials] == depths
    (ids,) = {tuple(trial.ids) for trial in trials}
    assert len(ids) + max(len(trial.question) for trial in trials) == 900
    prompt = tokenizer.decode(ids)
    asked = set()
    for trial in trials:
        sentence = prompt[trial.first : trial.last + 1]
        assert sentence.startswith(" The secret code of the ")
        assert sentence.endswith(f" is {trial.codes[0]}.")
        fact = sentence.removeprefix(" The").rpartition(" is ")[0]
        assert tokenizer.decode(trial.question) == f"\n\nWhat is the{fact}? The{fact} is"
        asked.add(fact)
        prompt.index(sentence)
    assert len(asked) == 3
    assert trials[1].first < trials[2].first < trials[0].first
    for trial in trials:
        prompt = prompt.replace(tokenizer.decode(trial.ids[trial.first : trial.last + 1]), "")
    assert prompt in TEXT


def test_a_table() -> None:
    tokenizer = toy.tokenizer()
    depths = [0.0, 0.5, 1.0]
    trials = _rows_of_table(tokenizer, 900, depths, random.Random(1))
    prompt = tokenizer.decode(trials[0].ids)
    lines = prompt.splitlines(keepends=True)
    assert "".join(lines) == prompt and 900 - 24 < len(prompt) + len(trials[0].question) <= 900
    for trial, line in zip(trials, (lines[0], lines[len(lines) // 2], lines[-1]), strict=True):
        assert trial.ids == trials[0].ids
        row = prompt[trial.first : trial.last + 1]
        number, value = row.removeprefix("Item ").strip().split(": ")
        assert (value, len(value)) == (trial.codes[0], 8)
        assert trial.depth == 0.5 or row == line
        question = f"\n\nWhat is the string of item {number}? The string of item {number} is"
        assert tokenizer.decode(trial.question) == question
        assert len(set(trial.codes)) == CANDIDATES and all(code in prompt for code in trial.codes)


def test_a_grid_is_the_sum_of_its_cells(model: Any) -> None:
    options: dict[str, Any] = {"depths": (0.2, 0.4), "needles": 1}
    for more in ({}, {"together": True}):
        contexts = (500, 700)
        both = needle(model, [SETTING], context=contexts, **options, **more)
        alone = [needle(model, [SETTING], context=each, **options, **more) for each in contexts]
        for which, result in enumerate(both):
            assert result.needles == 4 and result.grid.keys() == set(contexts)
            parts = [each[which] for each in alone]
            assert result.log_probability == pytest.approx(
                sum(part.log_probability for part in parts) / 2
            )
            assert result.tokens == max(part.tokens for part in parts)
            assert [part.grid for part in parts] == [{at: result.grid[at]} for at in contexts]
        assert both[1].needles_packed == 4


def test_questions_of_one_text_do_not_hear_one_another(model: Any) -> None:
    """Each is asked of the prompt alone, of either kind of cache."""
    depths = [0.2, 0.5]
    results = needle(model, [SETTING], depths=depths, together=True, seed=3)
    trials = _hidden(
        toy.tokenizer(),
        toy.tokenizer()(TEXT).input_ids,
        CONTEXT,
        depths,
        random.Random("3 0"),
    )
    for result, given in zip(results, (None, parse_setting(SETTING)), strict=True):
        expected = [log_probabilities(model, trial, given)[0] for trial in trials]
        assert result.log_probability == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_rows_of_a_table_are_asked_for(model: Any) -> None:
    plain, packed = tqai.needle(
        model,
        toy.tokenizer(),
        settings=[SETTING],
        context=600,
        depths=(0.1, 0.6),
        needles=2,
        table=True,
    )
    assert plain.needles == packed.needles == packed.needles_packed == 4
    assert plain.log_probability != packed.log_probability


def test_frame_without_an_answer() -> None:
    tokenizer = toy.tokenizer()
    assert tokenizer.decode(frame(tokenizer, "Why?")[1]) == "\n\nWhy?"
    assert [tokenizer.decode(ids) for ids in frame(chat_tokenizer(), "Why?")] == [
        "<user>",
        "\n\nWhy?<a>",
    ]


def test_codes_differ_by_needle_and_seed_but_not_by_depth() -> None:
    codes = make_trial(0.1).codes
    assert len(set(codes)) == CANDIDATES
    assert all(len(code) == 5 for code in codes)
    assert make_trial(0.9).codes == codes
    assert make_trial(0.1, seed=1).codes != codes


@torch.inference_mode()
def log_probabilities(model: Any, trial: _Trial, options: dict[str, Any] | None) -> list[float]:
    """Of each code after the question, with a cache filled anew for each."""
    sums = []
    for code in trial.codes:
        cache = DynamicCache(config=model.config)
        if options is not None:
            cache = tqai.patch(model, **options)
        ids = trial.tokenizer(f" {code}").input_ids
        logits = []
        for tokens in (trial.ids, trial.question, ids):
            given = torch.tensor([tokens])
            logits.append(model(given, past_key_values=cache, use_cache=True).logits[0])
        if options is not None:
            tqai.unpatch(model)
        scores = torch.cat([logits[1][-1:], logits[2][:-1]]).double().log_softmax(-1)
        sums.append(sum(scores[at, token].item() for at, token in enumerate(ids)))
    return sums


def test_numbers(model: Any) -> None:
    steps = []
    seeds = range(4)
    ranks = set()
    for seed in seeds:
        plain, packed = needle(
            model, [SETTING], seed=seed, progress=lambda *args: steps.append(args)
        )
        trial = make_trial(0.5, seed)
        expected = log_probabilities(model, trial, None)
        assert plain.setting == "uncompressed"
        assert plain.log_probability == pytest.approx(expected[0], rel=1e-5)
        assert plain.ranked_first == (max(expected) == expected[0])
        ranks.add(plain.ranked_first)
        quantised = log_probabilities(model, trial, parse_setting(SETTING))
        assert packed.log_probability == pytest.approx(quantised[0], rel=1e-5)
        assert abs(quantised[0] - expected[0]) > 1e-3  # the setting is one that shows
        assert packed.ranked_first == (max(quantised) == quantised[0])
        assert packed.tokens == len(trial.ids)
        assert packed.tokens_packed == (packed.tokens - 2 - 32) // 64 * 64
        assert (plain.tokens_packed, plain.needles_packed) == (0, 0)
        assert plain.depths == packed.depths == {0.5: 0}  # a random model finds nothing
    assert ranks == {False, True}  # both were seen
    assert steps[:2] == [(1, 2, "uncompressed"), (2, 2, SETTING)]


def test_generation_is_greedy() -> None:
    model = make_model("llama", seed=5)
    ids = torch.tensor([make_trial(0.5).ids])
    cache = tqai.patch(model, **parse_setting(SETTING))
    with torch.inference_mode():
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        tokens = _generate(TorchReader(model), logits[0].numpy(), cache, 8)
    expected = model.generate(
        ids, max_new_tokens=8, do_sample=False, eos_token_id=1000, pad_token_id=0
    )
    tqai.unpatch(model)
    assert tokens == expected[0, ids.shape[1] :].tolist()
    assert len(set(tokens)) > 1  # a model that does not repeat itself at once


def test_needles_that_are_not_packed_are_not_counted_so(model: Any) -> None:
    # One among the packed tokens, one in the window.
    packed = needle(model, [SETTING], depths=(0.3, 1), needles=2)[1]
    assert packed.needles == 4
    assert packed.needles_packed == 2
    assert packed.depths.keys() == {0.3, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"needles": 0}, "needles=0: expected at least 1"),
        ({"depths": ()}, "depths=.*expected numbers from 0 to 1"),
        ({"depths": (-0.1,)}, "depths=.*expected numbers from 0 to 1"),
        ({"context": 1025}, "context=1025: the model was made for 1024 tokens"),
        ({"context": 100}, r"context=100: expected \d+ to \d+ tokens, with a text of 1550"),
        ({"settings": []}, "at least one"),
        ({"context": ()}, "context: expected at least one number"),
        ({"context": (500, 1025)}, "context=1025: the model was made for 1024 tokens"),
        ({"table": True}, "text: goes without table"),
        ({"together": True, "depths": [at / 40 for at in range(37)]}, "at most 36 in one text"),
        ({"settings": ["k4v4,window=480"]}, "no packed token was read"),
        ({"depths": (1,)}, "no packed needle was read"),
    ],
)
def test_refused(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        needle(model, options.pop("settings", [SETTING]), **options)
    with pytest.raises(ValueError, match="not patched"):
        tqai.unpatch(model)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 48213.", True),
        (' "48213".', True),
        (" 48213", True),
        (" 482130", False),
        (" 4821", False),
        (" 1, not 48213", False),
        (" unknown", False),
    ],
)
def test_is_answer(text: str, right: bool) -> None:
    assert is_answer(text, "48213") is right


@pytest.mark.parametrize(
    ("text", "right"),
    [(" k7qd2mxx.", True), (' "k7qd2mxx"', True), (" k7qd2mx", False), ("", False)],
)
def test_is_answer_of_a_table(text: str, right: bool) -> None:
    assert is_answer(text, "k7qd2mxx", r"\w+") is right


def test_smollm2_finds_it_unless_the_cache_is_spoilt(smollm2: Any) -> None:
    spoilt = "k1v1,sinks=0,window=0,centering=none"
    plain, packed, none = tqai.needle(
        *smollm2,
        prose(),
        ["k8v8,window=32", spoilt],
        context=300,
        depths=(0.4,),
        needles=1,
    )
    for result in (plain, packed):
        assert (result.answered, result.ranked_first, result.depths) == (1, 1, {0.4: 1})
    assert none.answered == 0
    assert packed.needles_packed == none.needles_packed == 1
    assert none.log_probability < packed.log_probability - 5
    assert packed.log_probability == pytest.approx(plain.log_probability, abs=0.3)
