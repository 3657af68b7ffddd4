"""``tqai demo --framework mlx``: the same of mlx-lm's models, its quantised cache beside."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

from tqai.cli.demo_prompt import WARM_UP_TOKENS, check_length, prompt_ids
from tqai.cli.options import load_model
from tqai.measure.resident import resident_bytes

PREFILL_STEP = 2048


def generate(
    options: argparse.Namespace,
    kind: str,
    settings: dict[str, Any],
    others: list[int] | None = None,
) -> dict[str, Any]:
    """Generates greedily with the model's own cache, kind "plain", with mlx-lm's of 4 bits,
    "quantized", or with tqai's, "compressed". Meant for a fresh process, whose growth it measures.

    Of the tokens `others`, counts those that this model too would have chosen after the ones before
    them. Of a model whose caches mlx-lm cannot quantise, only says why, as ``refused``.
    """
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
    from tqdm import tqdm

    import tqai
    from tqai import _core
    from tqai.measure.mlx_decoder import quantised_together
    from tqai.measure.readers import MlxReader

    model, tokenizer = load_model(options)
    reader = MlxReader(model)
    ids = prompt_ids(reader.tokenizer(tokenizer), options.context)
    check_length(options, reader.limit)
    how: dict[str, Any] = {"prefill_step_size": PREFILL_STEP}
    if kind == "quantized":
        cache = make_prompt_cache(model)
        reader.read(ids[:2], cache, 1, lambda _: None)
        try:
            group = quantised_together(cache)
        except NotImplementedError as error:
            return {"refused": str(error)}
        how |= {"kv_bits": 4, "kv_group_size": group, "quantized_kv_start": 0}
    elif kind == "compressed":
        tqai.patch(model, **settings)

    def answer(ids: list[int], tokens: int, cache: Any, times: list[float]) -> list[int]:
        found: list[int] = []
        times.append(time.perf_counter())
        given = {"max_tokens": tokens, "prompt_cache": cache, **how}
        for token, _ in generate_step(mx.array(ids), model, **given):
            times.append(time.perf_counter())
            bar.update()
            found.append(token)
            if token in tokenizer.eos_token_ids:
                break
        return found

    with tqdm(total=options.tokens + 2, desc=f"{kind} cache", unit="token") as bar:
        answer(ids[-WARM_UP_TOKENS:], 2, make_prompt_cache(model), [])
        mx.clear_cache()
        cache = make_prompt_cache(model)
        before = resident_bytes()
        times: list[float] = []
        tokens = answer(ids, options.tokens, cache, times)
    mx.clear_cache()
    after = resident_bytes()
    result = {
        "text": tokenizer.decode([each for each in tokens if each not in tokenizer.eos_token_ids]),
        "tokens": tokens,
        "prompt_tokens": len(ids),
        "cached_tokens": len(ids) + len(tokens),
        "growth_bytes": None if before is None or after is None else after - before,
        "prefill_seconds": times[1] - times[0],
        "decode_tokens_per_second": None,
        "threads": _core.openmp_threads() or 1,
        "cache_bytes": sum(layer.nbytes for layer in cache),
    }
    if len(tokens) > 1:
        steps = [after - before for before, after in itertools.pairwise(times[1:])]
        result["decode_tokens_per_second"] = 1 / statistics.median(steps)
    if kind == "compressed":
        report = cache.memory_report()
        del report["layers"]
        result["report"] = report
        result["level"] = cache.settings.arithmetic
    if others is not None:
        held = max(layer.offset for layer in cache if hasattr(layer, "offset"))
        if can_trim_prompt_cache(cache):
            trim_prompt_cache(cache, held - len(ids) + 1)
        else:  # a sliding window that has moved on
            cache = make_prompt_cache(model)
            for at in range(0, len(ids) - 1, PREFILL_STEP):
                model(mx.array([ids[:-1][at : at + PREFILL_STEP]]), cache=cache)
                mx.eval([layer.state for layer in cache])
        chosen = model(mx.array([[ids[-1], *others[:-1]]]), cache=cache)[0].argmax(-1).tolist()
        result["foreseen"] = sum(a == b for a, b in zip(chosen, others, strict=True))
    return result
