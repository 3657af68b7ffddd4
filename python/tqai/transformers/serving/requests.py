"""The compressed caches of requests that are served together.

A pass of continuous batching has the new tokens of all requests one after another, in one row.
Each request has a ``TqaiCache``, so that it gets what it gets alone: its own sinks, window,
positions and centres. It joins with its first tokens and leaves when transformers frees what it
holds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tqai.transformers.attention.functions import Sequence
from tqai.transformers.cache.cache import TqaiCache


class Span(NamedTuple):
    """A request's tokens in a pass."""

    request: str
    first: int
    tokens: int


class Requests:
    """Caches by request, and which of them the next pass is of."""

    def __init__(self, make_cache: Callable[[], TqaiCache]) -> None:
        self._make_cache = make_cache
        self.caches: dict[str, TqaiCache] = {}
        self.spans: list[Span] = []

    def begin_batch(self) -> None:
        """Says that a pass of other requests follows."""
        self.spans = []

    def expect(self, request: str, past: int, count: int) -> None:
        """Adds the next `count` tokens of a request that has `past` to the pass.

        Raises:
            RuntimeError: for a request whose cache does not hold these.
        """
        if past == 0:
            self.caches[request] = self._make_cache()
        cache = self.caches.get(request)
        held = None if cache is None else cache.get_seq_length()
        if held != past:
            raise RuntimeError(
                f"request {request!r} goes on at token {past}, and its compressed cache holds "
                f"{'nothing' if held is None else held}: it was freed or changed meanwhile"
            )
        first = self.spans[-1].first + self.spans[-1].tokens if self.spans else 0
        self.spans.append(Span(request, first, count))

    def begin_pass(self, decoder: torch.nn.Module) -> None:
        """See ``Passes.begin_pass``."""
        for span in self.spans:
            self.caches[span.request].begin_pass(decoder)

    def end_pass(self) -> None:
        """See ``Passes.end_pass``."""
        for span in self.spans:
            self.caches[span.request].end_pass()

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> list[Sequence]:
        """Adds the pass's tokens to a layer; keys, values: [1, kv_heads, tokens, dim].

        Raises:
            ValueError: where the pass has other tokens than was said.
        """
        told = sum(span.tokens for span in self.spans)
        if keys.shape[0] != 1 or keys.shape[2] != told:
            raise ValueError(
                f"layer {layer}: keys of shape {tuple(keys.shape)} for {len(self.spans)} requests "
                f"with {told} tokens; needed: one row of as many"
            )
        sequences = []
        for span in self.spans:
            own = slice(span.first, span.first + span.tokens)
            key, value = self.caches[span.request].update(keys[:, :, own], values[:, :, own], layer)
            sequences.append(Sequence(span.first, span.tokens, key, value))
        return sequences

    def fork(self, request: str, copies: list[str], tokens: int) -> None:
        """Makes copies of a request that share its tiles, of its first `tokens` tokens."""
        for name in copies:
            made = copy.deepcopy(self.caches[request])
            if made.get_seq_length() > tokens:
                made.crop(tokens - made.get_seq_length())
            self.caches[name] = made

    def free(self, request: str) -> None:
        """Lets a request go; one that is not there is let be."""
        self.caches.pop(request, None)

    def free_all(self) -> None:
        """Lets all requests go."""
        self.caches.clear()
        self.spans = []

    def nbytes(self) -> int:
        """Bytes that the caches hold."""
        return sum(cache.nbytes for cache in self.caches.values())


def requests_of(cache: Any) -> Requests | None:
    """Those whose tokens a paged cache of tqai's holds; None of any other cache."""
    requests = getattr(cache, "tqai_requests", None)
    return requests if isinstance(requests, Requests) else None
