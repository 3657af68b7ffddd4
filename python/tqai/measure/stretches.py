"""What is read while caches are compared, and what the uncompressed model makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tqai.measure.readers import Reader

Count = Callable[[int, str], None]
"""Of tokens that were read, and by what."""

_UNCOMPRESSED = "uncompressed"


@dataclass(frozen=True)
class Stretch:
    """Tokens, and what the uncompressed model says after each that follows the prefill."""

    ids: list[int]
    """The last one is only predicted."""
    prefill: int
    logs: np.ndarray
    """Log-probabilities [read, vocabulary] float32 of the next token."""
    temperature: float = 0.0
    seed: int = 0

    @property
    def targets(self) -> np.ndarray:
        """[read], the tokens that do come next."""
        return np.array(self.ids[self.prefill + 1 :])

    @classmethod
    def of_text(
        cls, reader: Reader, ids: list[int], prefill: int, chunk: int, count: Count
    ) -> Stretch:
        """Read as it stands, `chunk` tokens at a time."""
        logs: np.ndarray | None = None
        at = 0
        for _, part in reader.decode(ids, prefill, chunk, reader.own_cache()):
            if logs is None:
                logs = np.empty((len(ids) - prefill - 1, part.shape[1]), np.float32)
            logs[at : at + len(part)] = part
            at += len(part)
            count(len(part), _UNCOMPRESSED)
        assert logs is not None
        return cls(ids, prefill, logs)

    def choose(self, logs: np.ndarray, first: int) -> np.ndarray:
        """The tokens [n] that generation takes after log-probabilities [n, vocabulary], of which
        the first are those after token `first` of what was read."""
        if self.temperature > 0:
            places = range(first, first + len(logs))
            logs = np.array([_noisy(row, self, at) for row, at in zip(logs, places, strict=True)])
        return logs.argmax(-1)


def continued(
    reader: Reader,
    ids: list[int],
    prefill: int,
    read: int,
    temperature: float,
    seed: int,
    count: Count,
) -> Stretch:
    """The first `prefill` of `ids`, and what the model goes on with, step by step."""
    cache = reader.own_cache()
    row = reader.feed(ids[:prefill], cache, last=True)
    logs = np.empty((read, row.shape[1]), np.float32)
    stretch = Stretch(ids[:prefill], prefill, logs, temperature, seed)
    for at in range(read):
        stretch.ids.append(int(stretch.choose(row, at - 1)[0]))
        row = reader.feed(stretch.ids[-1:], cache, last=True)
        logs[at] = row[0]
        count(1, _UNCOMPRESSED)
    # As caches will be asked: of what is kept.
    stretch.ids.append(int(stretch.choose(logs[-1:], read - 1)[0]))
    return stretch


def _noisy(row: np.ndarray, stretch: Stretch, at: int) -> np.ndarray:
    """Log-probabilities whose largest is a sample: with Gumbel's noise, the same at each place."""
    random = np.random.default_rng((stretch.seed, at + 1))
    return row / stretch.temperature + random.gumbel(size=len(row))


def stretches_of(
    reader: Reader, tokenizer: Any, text: str, length: int, samples: int, bos: bool | None
) -> list[list[int]]:
    """length + 1 token ids each, spread evenly over the text."""
    tokens = reader.tokenize(tokenizer, text, False)
    # Some models (Gemma) make no sense of a text without its first token.
    first = [tokenizer.bos_token_id]
    if bos is None:
        bos = reader.tokenize(tokenizer, "a", True)[:1] == first
    elif bos and first == [None]:
        raise ValueError("bos: the tokenizer has no token to begin a text with")
    start = first if bos else []
    taken = length + 1 - len(start)
    if len(tokens) < taken:
        raise ValueError(f"the text has {len(tokens)} tokens: expected at least {taken}")
    stride = (len(tokens) - taken) // max(samples - 1, 1)
    return [start + tokens[sample * stride : sample * stride + taken] for sample in range(samples)]
