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

from tqai.transformers.attention.functions import Sequence, Sequences
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
        """See ``Passes.end_pass``; what all requests' layers seal is sealed side by side."""
        caches = [self.caches[span.request] for span in self.spans]
        seal_each([each for cache in caches for each in cache.layers if type(each) is TqaiLayer])
        for cache in caches:
            cache.end_pass()

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
        alone = self.spans
        together = self._taking_one(keys, values, layer)
        if len(together) > 1:
            spans, caches, layers = zip(*together, strict=True)
            places = [span.first for span in spans]
            new = keys, values
            if len(places) < told:
                at = torch.tensor(places, device=keys.device)
                new = keys.index_select(2, at), values.index_select(2, at)
            updates = update_caches(list(caches), list(layers), *new, layer)
            sequences.together = list(zip(places, updates, strict=True))
            done = set(spans)
            alone = [span for span in self.spans if span not in done]
        for span in alone:
            own = slice(span.first, span.first + span.tokens)
            key, value = self.caches[span.request].update(keys[:, :, own], values[:, :, own], layer)
            sequences.alone.append(Sequence(span.first, span.tokens, key, value))
        return sequences

    def _taking_one(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> list[tuple[Span, TqaiCache, TqaiLayer]]:
        """Requests that get one more token, with what ``update_caches`` takes of them."""
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            return []
        found = []
        like = like_one(keys, values)
        for span in self.spans:
            if span.tokens == 1:
                cache = self.caches[span.request]
                of_layer = cache.layer_for_one(layer, like)
                if of_layer is not None:
                    found.append((span, cache, of_layer))
        return found

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
