"""The compressed caches of requests that are served together.

A pass of continuous batching has the new tokens of all requests one after another, in one row.
Each request has a ``TqaiCache``, so that it gets what it gets alone: its own sinks, window,
positions and centres. It joins with its first tokens and leaves when transformers frees what it
holds. What cannot be cached, as NaN, is its own error: the others of the pass go on.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from tqai.transformers.attention.functions import Sequence, Sequences, Single
from tqai.transformers.cache.cache import TqaiCache, update_caches
from tqai.transformers.cache.layer import TqaiLayer, like_one, seal_each


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
        self.failed: dict[str, Exception] = {}
        """Requests whose tokens a pass could not add or read, until somebody takes note of it."""

    def begin_batch(self) -> None:
        """Says that a pass of other requests follows."""
        self.spans = []

    def expect(self, request: str, past: int, count: int) -> None:
        """Adds the next `count` tokens of a request that has `past` to the pass; a request whose
        cache does not hold these has failed."""
        if past == 0:
            self.caches[request] = self._make_cache()
        cache = self.caches.get(request)
        held = None if cache is None else cache.get_seq_length()
        if held != past:
            self._fail(
                request,
                RuntimeError(
                    f"request {request!r} goes on at token {past}, and its compressed cache holds "
                    f"{'nothing' if held is None else held}: it was freed or changed meanwhile"
                ),
            )
        first = self.spans[-1].first + self.spans[-1].tokens if self.spans else 0
        self.spans.append(Span(request, first, count))

    def begin_pass(self, decoder: torch.nn.Module) -> None:
        """See ``Passes.begin_pass``."""
        for span in self._going_on():
            self.caches[span.request].begin_pass(decoder)

    def end_pass(self) -> None:
        """See ``Passes.end_pass``; what all requests' layers seal is sealed side by side."""
        going_on = self._going_on()
        caches = [self.caches[span.request] for span in going_on]
        layers = [each for cache in caches for each in cache.layers if type(each) is TqaiLayer]
        # Where one cannot be, none was, and ``end_pass`` of its cache says so.
        with contextlib.suppress(ValueError, MemoryError):
            seal_each(layers)
        for span, cache in zip(going_on, caches, strict=True):
            try:
                cache.end_pass()
            except Exception as error:
                self._fail(span.request, error)

    def _going_on(self) -> list[Span]:
        return [span for span in self.spans if span.tokens and span.request not in self.failed]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> Sequences:
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
        sequences = Sequences()
        done: set[str] = set()
        together = self._taking_one(keys, values, layer)
        if len(together) > 1:
            spans, caches, layers = zip(*together, strict=True)
            places = [span.first for span in spans]
            new = keys, values
            if len(places) < told:
                at = torch.tensor(places, device=keys.device)
                new = keys.index_select(2, at), values.index_select(2, at)
            # Where one cannot be, none was, and which one it is comes out below.
            with contextlib.suppress(Exception):
                updates = update_caches(list(caches), list(layers), *new, layer)
                for span, update in zip(spans, updates, strict=True):
                    fail = partial(self._fail, span.request)
                    sequences.together.append(Single(span.first, update, fail))
                    done.add(span.request)
        for request, first, tokens in self.spans:
            if request in done or not tokens:  # the prompt may be empty
                continue
            own = slice(first, first + tokens)
            key, value = keys[:, :, own], values[:, :, own]
            if request not in self.failed:
                try:
                    key, value = self.caches[request].update(key, value, layer)
                except Exception as error:  # whatever its numbers make a layer raise
                    self._fail(request, error)
            # Of one that has failed, nobody reads what attention over these tokens alone gives.
            fail = partial(self._fail, request)
            sequences.alone.append(Sequence(first, tokens, key, value, fail))
        return sequences

    def _taking_one(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> list[tuple[Span, TqaiCache, TqaiLayer]]:
        """Requests that get one more token, with what ``update_caches`` takes of them."""
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            return []
        found = []
        like = like_one(keys, values)
        for span in self._going_on():
            if span.tokens == 1:
                cache = self.caches[span.request]
                of_layer = cache.layer_for_one(layer, like)
                if of_layer is not None:
                    found.append((span, cache, of_layer))
        return found

    def _fail(self, request: str, error: Exception) -> None:
        self.failed[request] = error
        self.caches.pop(request, None)

    def take_failed(self) -> dict[str, Exception]:
        """Those that have failed since this was asked before, and why."""
        failed, self.failed = self.failed, {}
        return failed

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
        self.failed.clear()
        self.spans = []

    def nbytes(self) -> int:
        """Bytes that the caches hold."""
        return sum(cache.nbytes for cache in self.caches.values())


def requests_of(cache: Any) -> Requests | None:
    """Those whose tokens a paged cache of tqai's holds; None of any other cache."""
    requests = getattr(cache, "tqai_requests", None)
    return requests if isinstance(requests, Requests) else None
