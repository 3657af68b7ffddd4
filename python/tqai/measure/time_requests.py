"""Continuous batching timed with compressed caches and with transformers' paged cache, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from tqai import api
from tqai.measure.text import prose
from tqai.measure.timing import ratio
from tqai.settings import Dtype
from tqai.transformers.loading import load
from tqai.transformers.serving.paged import check_supported

PAGED, COMPRESSED = "paged", "tqai"
_PAGE = 32


@dataclass(frozen=True)
class RequestsTime:
    """What serving the requests took; medians of the rounds."""

    lengths: list[int]
    """Of the prompts."""
    new_tokens: int
    dtype: str
    threads: int
    bits: str
    rounds: int
    paged_tokens_per_second: float
    """With transformers' paged cache, from when all requests have their first token to the end."""
    tqai_tokens_per_second: float
    times_paged: float
    """The second over the first; the median of the rounds' ratios."""
    paged_seconds: float
    """All of it, the prompts too."""
    tqai_seconds: float
    same_tokens: int
    """Requests that got the same tokens from both."""


def time_requests(
    model: str | None = None,
    dtype: Dtype = "float32",
    lengths: Iterable[int] = (250, 300, 350, 400, 450, 500, 550, 600),
    options: dict[str, Any] | None = None,
    *,
    new_tokens: int = 32,
    rounds: int = 3,
    device: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> RequestsTime:
    """Serves a request of each length of prompt, all at once, by greedy decoding.

    Args:
        model, dtype, device: as for ``tqai.transformers.loading.load``.
        lengths: of the prompts, which follow one another in a text.
        options: arguments of ``tqai.patch``.
        new_tokens: that each request gets, at least 2.
        rounds: of both caches each; a first, of few tokens, is not counted.
        progress: called after each with rounds done, all rounds, and what it was.

    Raises:
        ValueError: for numbers out of range, and for more tokens than the text has.
        NotImplementedError: with a transformers before 5.24.
    """
    check_supported()
    sizes = list(lengths)
    if not sizes or min(sizes) < 1 or new_tokens < 2 or rounds < 1:
        raise ValueError(
            f"lengths={sizes}, new_tokens={new_tokens}, rounds={rounds}: expected at least one "
            "length, 2 new tokens, and at least 1 of the others"
        )
    loaded, tokenizer = load(model, dtype, device)
    ids = tokenizer(prose(), verbose=False).input_ids
    if sum(sizes) > len(ids):
        raise ValueError(f"lengths={sizes}: expected at most {len(ids)} tokens in all, the text's")
    prompts = [ids[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
    served: dict[str, list[_Served]] = {PAGED: [], COMPRESSED: []}
    bits = ""
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name in (PAGED, COMPRESSED):
                if name == COMPRESSED:
                    cache = api.patch(loaded, **options or {})
                    bits = f"K{cache.settings.bits_k}/V{cache.settings.bits_v}"
                try:
                    result = _serve(loaded, prompts, new_tokens if turn > 0 else 2)
                finally:
                    if name == COMPRESSED:
                        api.unpatch(loaded)
                if turn > 0:
                    served[name].append(result)
                if progress is not None:
                    progress(2 * turn + (name == COMPRESSED), 2 * rounds + 1, name)
    paged, packed = ([each.tokens_per_second for each in served[name]] for name in served)
    return RequestsTime(
        lengths=sizes,
        new_tokens=new_tokens,
        dtype=dtype,
        threads=torch.get_num_threads(),
        bits=bits,
        rounds=rounds,
        paged_tokens_per_second=statistics.median(paged),
        tqai_tokens_per_second=statistics.median(packed),
        times_paged=ratio(packed, paged),
        paged_seconds=statistics.median(each.seconds for each in served[PAGED]),
        tqai_seconds=statistics.median(each.seconds for each in served[COMPRESSED]),
        same_tokens=sum(map(list.__eq__, served[PAGED][0].tokens, served[COMPRESSED][0].tokens)),
    )


@dataclass(frozen=True)
class _Served:
    seconds: float
    tokens_per_second: float
    tokens: list[list[int]]


def _serve(model: Any, prompts: list[list[int]], new_tokens: int) -> _Served:
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    longest = sum(-(-(len(prompt) + new_tokens) // _PAGE) for prompt in prompts)
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=2 * longest,
            page_size=_PAGE,
            max_batch_tokens=max(512, len(prompts)),
            use_async_batching=False,
        ),
    )
    manager.start()
    try:
        begun = time.perf_counter()
        names = [
            manager.add_request(prompt, max_new_tokens=new_tokens, streaming=True)
            for prompt in prompts
        ]
        tokens: dict[str, list[int]] = {}
        unfinished = set(names)
        decoding: tuple[float, int] | None = None
        now = begun
        while unfinished:
            result = manager.get_result(timeout=1)
            now = time.perf_counter()
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("continuous batching has stopped before its requests ended")
                continue
            if result.error is not None:
                raise RuntimeError(f"a request failed: {result.error}")
            tokens[result.request_id] = list(result.generated_tokens)
            if result.is_finished():
                unfinished.discard(result.request_id)
            if decoding is None and len(tokens) == len(names):
                decoding = now, sum(map(len, tokens.values()))
        assert decoding is not None
    finally:
        manager.stop(block=True, timeout=20)
        manager.destroy()
    done = sum(map(len, tokens.values())) - decoding[1]
    return _Served(now - begun, done / (now - decoding[0]), [tokens[name] for name in names])
