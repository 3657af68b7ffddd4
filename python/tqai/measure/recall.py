"""Whether a model with a compressed cache still finds a fact that was hidden in a long text."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tqai.measure.named_settings import Candidate, named_settings
from tqai.measure.readers import Reader, reader_of
from tqai.measure.text import frame, prose

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tqai.api import MlxModel

CANDIDATES = 10
"""Codes that the right one is ranked among, itself included."""

_COLOURS = ("red", "blue", "green", "white", "black", "yellow")
_PLACES = ("house", "tower", "bridge", "garden", "harbour", "library")
# A model may put its answer in quotes.
_EXTRA_TOKENS = 2
_LETTERS = "abcdefghijkmnpqrstuvwxyz23456789"
_STRING = 8


@dataclass(frozen=True)
class Recall:
    """How often one setting found the needle."""

    setting: str
    """Or "uncompressed"."""
    needles: int
    """Asked for, at all depths together."""
    answered: int
    """Greedy generation gave the right code."""
    ranked_first: int
    """The right code was the likeliest of ten."""
    log_probability: float
    """Of the right code given the beginning of the answer, in nats, mean."""
    depths: dict[float, int]
    """Depth → needles answered there, of an equal number at each depth."""
    grid: dict[int, dict[float, int]]
    """Context → depth → needles answered there."""
    tokens: int
    """In the cache when the question was read: the most of any prompt."""
    tokens_packed: int
    """Of these, packed: the fewest of any needle."""
    needles_packed: int
    """Needles all of whose tokens were packed then."""


def needle(
    model: PreTrainedModel | MlxModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | None = None,
    settings: Iterable[str | Mapping[str, Any]] = ("k4v4", "k4v2"),
    *,
    context: int | Sequence[int] = 1024,
    depths: Sequence[float] = (0.1, 0.5, 0.8),
    needles: int = 2,
    together: bool = False,
    table: bool = False,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Recall]:
    """Hides a sentence with a secret code in a long text and asks for it; the model's own cache
    comes first in the result, then one entry per setting.

    The model reads the text at once and exactly, as any prompt. Then the tokens go to the cache, so
    that the question, in one chunk, and each token of the answer read the packed ones. The answer's
    beginning ("The secret code of the red house is") is given, so that small models have only to
    find the code.

    Args:
        model: on any device, or one that ``mlx_lm.load`` gives; not patched; patched in between,
            and as it was in the end.
        text: by default ``tqai.text.prose()``; each needle gets another stretch of it.
        settings: as for ``tqai.evaluate``.
        context: tokens of the whole prompt, or of several.
        depths: shares of the text that come before the needle, which is put at the end of a
            sentence.
        needles: for each depth and context.
        together: whether the needles of all depths are hidden in one text, which is then read once,
            in place of one text for each. Harder, as they are alike, and as many times faster.
        table: whether the prompt is a table of random strings, of which one is asked for, in place
            of a text with a sentence. The rows of all depths are asked of one table.
        seed: of codes and stretches.
        progress: called after every answer with the answers given, all that will be, and for what.

    Raises:
        ValueError: for a text or context too short, a patched model, or a setting under which
            nothing, or no needle, was packed: it would have measured nothing.
    """
    if needles < 1:
        raise ValueError(f"needles={needles}: expected at least 1")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths={list(depths)}: expected numbers from 0 to 1")
    if table and text is not None:
        raise ValueError("text: goes without table, whose prompts have none")
    contexts = [context] if isinstance(context, int) else list(dict.fromkeys(context))
    if not contexts:
        raise ValueError("context: expected at least one number of tokens")
    reader = reader_of(model)
    tokenizer, limit = reader.tokenizer(tokenizer), reader.limit
    if limit is not None and max(contexts) > limit:
        raise ValueError(f"context={max(contexts)}: the model was made for {limit} tokens")
    counts = [
        _Count("uncompressed", None),
        *(_Count(named.name, named) for named in named_settings(model, settings)),
    ]
    depths = list(dict.fromkeys(depths))
    if together and len(depths) > len(_COLOURS) * len(_PLACES):
        raise ValueError(f"depths: expected at most {len(_COLOURS) * len(_PLACES)} in one text")
    tokens = [] if table else _ids(tokenizer, prose() if text is None else text)
    # The same stretches and codes at every depth, so that depths can be compared.
    prompts = [
        _rows_of_table(tokenizer, length, own, random.Random(f"{seed} {at}"))
        if table
        else _hidden(tokenizer, tokens, length, own, random.Random(f"{seed} {at}"))
        for length in contexts
        for own in ([depths] if together or table else [[depth] for depth in depths])
        for at in range(needles)
    ]
    total = sum(map(len, prompts)) * len(counts)
    done = 0
    for prompt in prompts:
        for count in counts:
            with count.cache(reader) as cache:
                for _ in count.add(prompt, reader, cache):
                    done += 1
                    if progress is not None:
                        progress(done, total, count.name)
    return [count.result() for count in counts]


@dataclass(frozen=True)
class _Trial:
    """What is asked of a prompt."""

    tokenizer: PreTrainedTokenizerBase
    context: int
    depth: float
    codes: list[str]
    """The right one, then others."""
    ids: list[int]
    """The prompt up to the question."""
    first: int
    last: int
    """Places of the needle in `ids`."""
    question: list[int]
    pattern: str
    """Of what is taken for the answer."""

    @cached_property
    def continuations(self) -> list[list[int]]:
        """Token ids of each code, as the answer's beginning goes on."""
        return [_ids(self.tokenizer, f" {code}") for code in self.codes]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _hidden(
    tokenizer: PreTrainedTokenizerBase,
    text: list[int],
    context: int,
    depths: Sequence[float],
    rng: random.Random,
) -> list[_Trial]:
    """A sentence with a code at each depth of one stretch of a text."""
    pairs: list[tuple[str, str]] = []
    asked: list[tuple[list[str], list[int], list[int]]] = []
    head: list[int] = []
    for _ in depths:
        codes = [str(code) for code in rng.sample(range(10_000, 100_000), CANDIDATES)]
        pair = rng.choice(_COLOURS), rng.choice(_PLACES)
        while pair in pairs:
            pair = rng.choice(_COLOURS), rng.choice(_PLACES)
        pairs.append(pair)
        fact = f"The secret code of the {' '.join(pair)} is"
        question = f"What is {fact[0].lower()}{fact[1:].removesuffix(' is')}?"
        head, tail = frame(tokenizer, question, fact)
        asked.append((codes, _ids(tokenizer, f" {fact} {codes[0]}."), tail))
    length = context - len(head) - sum(len(sentence) for _, sentence, _ in asked)
    length -= max(len(tail) for *_, tail in asked)
    if not 1 <= length <= len(text):
        shortest = context - length + 1
        raise ValueError(
            f"context={context}: expected {shortest} to {shortest - 1 + len(text)} tokens, "
            f"with a text of {len(text)}"
        )
    start = rng.randrange(len(text) - length + 1)
    body = text[start : start + length]
    ids, done = list(head), 0
    places: dict[int, int] = {}
    for at in sorted(range(len(depths)), key=lambda at: depths[at]):
        place = max(done, _sentence_end(tokenizer, body, round(depths[at] * length)))
        ids += body[done:place]
        places[at], done = len(ids), place
        ids += asked[at][1]
    ids += body[done:]
    return [
        _Trial(
            *(tokenizer, context, depth, codes, ids),
            first=places[at],
            last=places[at] + len(sentence) - 1,
            question=tail,
            pattern=r"\d+",
        )
        for at, (depth, (codes, sentence, tail)) in enumerate(zip(depths, asked, strict=True))
    ]


def _sentence_end(tokenizer: PreTrainedTokenizerBase, tokens: list[int], place: int) -> int:
    """The last place up to `place` that follows a full stop; `place` where there is none."""
    for end in range(place, 0, -1):
        if tokenizer.decode(tokens[end - 1 : end]).endswith("."):
            return end
    return place


def _rows_of_table(
    tokenizer: PreTrainedTokenizerBase, context: int, depths: Sequence[float], rng: random.Random
) -> list[_Trial]:
    """Rows of one table of random strings, of which nothing but the table itself tells any."""

    def string() -> str:
        return "".join(rng.choices(_LETTERS, k=_STRING))

    def ask(number: int) -> tuple[list[int], list[int]]:
        fact = f"The string of item {number} is"
        return frame(tokenizer, f"What is the string of item {number}?", fact)

    numbers = rng.sample(range(1000, 10_000), 9000)
    head, tail = ask(numbers[0])
    length = context - len(head) - len(tail)
    ids, rows, strings = list(head), [len(head)], []
    for number in numbers:
        value = string()
        row = _ids(tokenizer, f"Item {number}: {value}\n")
        if len(ids) - len(head) + len(row) > length:
            break
        ids += row
        rows.append(len(ids))
        strings.append(value)
    if len(strings) < max(CANDIDATES, len(depths)):
        raise ValueError(
            f"context={context}: a table of {len(strings)} rows; expected one that has at least "
            f"{max(CANDIDATES, len(depths))}"
        )
    trials = []
    for depth in depths:
        at = round(depth * (len(strings) - 1))
        others = rng.sample([each for each in strings if each != strings[at]], CANDIDATES - 1)
        trials.append(
            _Trial(
                *(tokenizer, context, depth, [strings[at], *others], ids),
                first=rows[at],
                last=rows[at + 1] - 1,
                question=ask(numbers[at])[1],
                pattern=r"\w+",
            )
        )
    return trials


class _Count:
    """Sums over the needles that one setting was asked for."""

    def __init__(self, name: str, setting: Candidate | None) -> None:
        self.name = name
        self._setting = setting
        self._answered: dict[int, dict[float, int]] = {}
        self._needles = 0
        self._ranked_first = 0
        self._log_probability = 0.0
        self._tokens = 0
        self._tokens_packed: list[int] = []
        self._needles_packed = 0

    def cache(self, reader: Reader) -> Any:
        """A context with a fresh cache."""
        if self._setting is None:
            return nullcontext(reader.own_cache())
        return self._setting.patched()

    def add(self, prompt: list[_Trial], reader: Reader, cache: Any) -> Iterator[None]:
        """Reads a prompt, and asks each of its questions."""
        reader.feed(prompt[0].ids, cache, last=True)
        for at, trial in enumerate(prompt, 1):
            own = copy.deepcopy(cache) if at < len(prompt) else cache
            self._ask(trial, reader, own)
            yield

    def _ask(self, trial: _Trial, reader: Reader, cache: Any) -> None:
        self._look_at(trial, reader, cache)
        logs = reader.feed(trial.question, cache, last=True)
        scores = [_log_probability(reader, logs, cache, ids) for ids in trial.continuations]
        answer = _generate(reader, logs, cache, len(trial.continuations[0]) + _EXTRA_TOKENS)
        self._needles += 1
        self._log_probability += scores[0]
        self._ranked_first += scores[0] > max(scores[1:])
        right = is_answer(trial.tokenizer.decode(answer), trial.codes[0], trial.pattern)
        row = self._answered.setdefault(trial.context, {})
        row[trial.depth] = row.get(trial.depth, 0) + right

    def _look_at(self, trial: _Trial, reader: Reader, cache: Any) -> None:
        self._tokens = max(self._tokens, len(trial.ids))
        if self._setting is not None:
            packed = cache.memory_report()["packed_tokens"]
            if packed == 0:
                self._refuse("token")
            self._tokens_packed.append(packed)
            self._needles_packed += any(
                _packs(layer, trial.first, trial.last) for layer in reader.compressed(cache)
            )

    def _refuse(self, what: str) -> None:
        raise ValueError(
            f"setting {self.name!r}: no packed {what} was read, so nothing was measured; give a "
            "longer context, other depths, or a shorter window"
        )

    def result(self) -> Recall:
        if self._setting is not None and self._needles_packed == 0:
            self._refuse("needle")
        depths: dict[float, int] = {}
        for row in self._answered.values():
            for depth, answered in row.items():
                depths[depth] = depths.get(depth, 0) + answered
        return Recall(
            setting=self.name,
            needles=self._needles,
            answered=sum(depths.values()),
            ranked_first=self._ranked_first,
            log_probability=self._log_probability / self._needles,
            depths=depths,
            grid=self._answered,
            tokens=self._tokens,
            tokens_packed=min(self._tokens_packed, default=0),
            needles_packed=self._needles_packed,
        )


def is_answer(text: str, code: str, pattern: str = r"\d+") -> bool:
    """Whether the first number, or what else is looked for, in what the model wrote is the code."""
    found = re.search(pattern, text)
    return found is not None and found[0] == code


def _packs(layer: Any, first: int, last: int) -> bool:
    """Whether all tokens from `first` to `last` of the layer's one row are held as codes."""
    core = layer.core
    start = core.first_token if layer.is_sliding else layer.settings.sink_tokens
    return start <= first and last < start + core.packed_tokens(0)


def _log_probability(reader: Reader, logs: np.ndarray, cache: Any, ids: list[int]) -> float:
    """Of tokens to follow what is in the cache, which stays as it is; logs: [1, vocabulary], of
    the first one."""
    if len(ids) > 1:
        logs = np.concatenate([logs, reader.feed(ids[:-1], copy.deepcopy(cache))])
    return float(logs[np.arange(len(ids)), ids].sum())


def _generate(reader: Reader, logs: np.ndarray, cache: Any, count: int) -> list[int]:
    """The likeliest tokens, one after the other; logs: [1, vocabulary], of the first one."""
    tokens = [int(logs.argmax())]
    while len(tokens) < count:
        tokens.append(int(reader.feed(tokens[-1:], cache, last=True).argmax()))
    return tokens
