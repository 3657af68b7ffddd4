"""Whether a model with a compressed cache still finds a fact that was hidden in a long text."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tqai.measure.named_settings import NamedSetting, named_settings
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
    tokens: int
    """In the cache when the question was read."""
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
    context: int = 1024,
    depths: Sequence[float] = (0.1, 0.5, 0.8),
    needles: int = 2,
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
        context: tokens of the whole prompt.
        depths: shares of the text that come before the needle, which is put at the end of a
            sentence.
        needles: for each depth.
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
    reader = reader_of(model)
    tokenizer, limit = reader.tokenizer(tokenizer), reader.limit
    if limit is not None and context > limit:
        raise ValueError(f"context={context}: the model was made for {limit} tokens")
    counts = [
        _Count("uncompressed", None),
        *(_Count(named.name, named) for named in named_settings(model, settings)),
    ]
    tokens = tokenizer(
        prose() if text is None else text, add_special_tokens=False, verbose=False
    ).input_ids
    # The same stretches and codes at every depth, so that depths can be compared.
    trials = [
        _Trial(tokenizer, tokens, context, depth, random.Random(f"{seed} {at}"))
        for depth in dict.fromkeys(depths)
        for at in range(needles)
    ]
    done = 0
    for trial in trials:
        for count in counts:
            with count.cache(reader) as cache:
                count.add(trial, reader, cache)
            done += 1
            if progress is not None:
                progress(done, len(trials) * len(counts), count.name)
    return [count.result() for count in counts]


class _Trial:
    """A needle in its text, and what is asked."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: list[int],
        context: int,
        depth: float,
        rng: random.Random,
    ) -> None:
        self.tokenizer = tokenizer
        self.depth = depth
        self.codes = [str(code) for code in rng.sample(range(10_000, 100_000), CANDIDATES)]
        """The right one, then others."""
        fact = f"The secret code of the {rng.choice(_COLOURS)} {rng.choice(_PLACES)} is"
        question = f"What is {fact[0].lower()}{fact[1:].removesuffix(' is')}?"
        head, self.question = frame(tokenizer, question, fact)
        sentence = self._ids(f" {fact} {self.codes[0]}.")
        length = context - len(head) - len(sentence) - len(self.question)
        if not 1 <= length <= len(text):
            shortest = context - length + 1
            raise ValueError(
                f"context={context}: expected {shortest} to {shortest - 1 + len(text)} tokens, "
                f"with a text of {len(text)}"
            )
        start = rng.randrange(len(text) - length + 1)
        body = text[start : start + length]
        place = self._sentence_end(body, round(depth * length))
        self.first = len(head) + place
        self.last = self.first + len(sentence) - 1
        """Places of the needle in `ids`."""
        self.ids = head + body[:place] + sentence + body[place:]
        """The prompt up to the question."""

    @cached_property
    def continuations(self) -> list[list[int]]:
        """Token ids of each code, as the answer's beginning goes on."""
        return [self._ids(f" {code}") for code in self.codes]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _sentence_end(self, tokens: list[int], place: int) -> int:
        """The last place up to `place` that follows a full stop; `place` where there is none."""
        for end in range(place, 0, -1):
            if self.tokenizer.decode(tokens[end - 1 : end]).endswith("."):
                return end
        return place


class _Count:
    """Sums over the needles that one setting was asked for."""

    def __init__(self, name: str, setting: NamedSetting | None) -> None:
        self.name = name
        self._setting = setting
        self._answered: dict[float, int] = {}
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

    def add(self, trial: _Trial, reader: Reader, cache: Any) -> None:
        reader.feed(trial.ids, cache, last=True)
        self._look_at(trial, reader, cache)
        logs = reader.feed(trial.question, cache, last=True)
        scores = [_log_probability(reader, logs, cache, ids) for ids in trial.continuations]
        answer = _generate(reader, logs, cache, len(trial.continuations[0]) + _EXTRA_TOKENS)
        self._needles += 1
        self._log_probability += scores[0]
        self._ranked_first += scores[0] > max(scores[1:])
        right = is_answer(trial.tokenizer.decode(answer), trial.codes[0])
        self._answered[trial.depth] = self._answered.get(trial.depth, 0) + right

    def _look_at(self, trial: _Trial, reader: Reader, cache: Any) -> None:
        self._tokens = len(trial.ids)
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
        return Recall(
            setting=self.name,
            needles=self._needles,
            answered=sum(self._answered.values()),
            ranked_first=self._ranked_first,
            log_probability=self._log_probability / self._needles,
            depths=self._answered,
            tokens=self._tokens,
            tokens_packed=min(self._tokens_packed, default=0),
            needles_packed=self._needles_packed,
        )


def is_answer(text: str, code: str) -> bool:
    """Whether the first number in what the model wrote is the code."""
    number = re.search(r"\d+", text)
    return number is not None and number[0] == code


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
