"""``tqai demo``: a real model answers a long prompt, with its own cache and with the compressed."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

from tqai.cli import demo_mlx
from tqai.cli.demo_prompt import QUESTION, WARM_UP_TOKENS, check_length, prompt_ids
from tqai.cli.options import (
    add_framework,
    add_model,
    add_settings,
    add_verb,
    settings_of,
    use_threads,
)
from tqai.cli.output import megabytes, percent, print_json, print_table
from tqai.cli.process import run_fresh
from tqai.measure.resident import resident_bytes


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "demo",
        "A model answers a long prompt with its own cache and with the compressed one.",
        run,
    )
    add_model(parser)
    add_framework(parser)
    for option, default, text in (
        ("--context", 4096, "tokens of the prompt"),
        ("--tokens", 64, "tokens to generate, at most"),
    ):
        parser.add_argument(
            option, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    add_settings(parser)


def run(options: argparse.Namespace) -> None:
    if options.tokens < 1:
        raise ValueError(f"--tokens {options.tokens}: expected at least 1")
    # Each in a process of its own, one after the other: none sees another's memory or load.
    given = settings_of(options)
    quantized = None
    if options.framework == "mlx":
        plain = run_fresh(demo_mlx.generate, options, "plain", given)
        quantized = run_fresh(demo_mlx.generate, options, "quantized", given)
        compressed = run_fresh(demo_mlx.generate, options, "compressed", given, plain["tokens"])
    else:
        plain = run_fresh(generate, options, None)
        compressed = run_fresh(generate, options, given, plain["tokens"])
    equal = [a == b for a, b in zip(plain["tokens"], compressed["tokens"], strict=False)]
    length = max(len(plain["tokens"]), len(compressed["tokens"]))
    result = {
        "model": options.model,
        "prompt_tokens": plain["prompt_tokens"],
        "dtype": options.dtype,
        "threads": compressed["threads"],
        "level": compressed["level"],
        "settings": compressed["report"]["settings"],
        "plain": plain,
        "compressed": compressed,
        "tokens_equal": sum(equal),
        "tokens_compared": length,
        "tokens_equal_from_start": equal.index(False) if False in equal else len(equal),
        "tokens_equal_given_same_text": compressed.pop("foreseen"),
    }
    if quantized is not None:
        result["quantized"] = quantized
    if options.json:
        print_json(result)
    else:
        _print(result)


def generate(
    options: argparse.Namespace,
    settings: dict[str, Any] | None,
    others: list[int] | None = None,
) -> dict[str, Any]:
    """Generates greedily; with the model's own cache where `settings` is None. Meant for a fresh
    process, whose growth it measures. Of the tokens `others`, counts those that this model too
    would have chosen after the ones before them."""
    import torch
    from tqdm import tqdm
    from transformers import DynamicCache

    import tqai
    from tqai.transformers.loading import load
    from tqai.transformers.model.names import cache_argument, generate_name

    use_threads(options)
    name = "own cache" if settings is None else "compressed cache"
    model, tokenizer = load(options.model, options.dtype, options.device)
    ids = torch.tensor([prompt_ids(tokenizer, options.context)], device=model.device)
    check_length(options, getattr(model.config, "max_position_embeddings", None))

    if settings is not None:
        tqai.patch(model, **settings)

    def fresh_cache() -> Any:
        return DynamicCache(config=model.config) if settings is None else tqai.new_cache(model)

    def answer(ids: torch.Tensor, tokens: int, cache: Any, clock: _Clock) -> list[int]:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=[clock],
            **{generate_name(): cache},
        )
        return out[0, ids.shape[1] :].tolist()

    answer(ids[:, -WARM_UP_TOKENS:], 2, fresh_cache(), _Clock())
    cache = fresh_cache()
    before = resident_bytes()
    with tqdm(total=options.tokens, desc=name, unit="token") as bar:
        clock = _Clock(bar.update)
        tokens = answer(ids, options.tokens, cache, clock)
    after = resident_bytes()

    result = {
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "tokens": tokens,
        "prompt_tokens": ids.shape[1],
        "cached_tokens": cache.get_seq_length(),
        "growth_bytes": None if before is None or after is None else after - before,
        "prefill_seconds": clock.times[1] - clock.times[0],
        "decode_tokens_per_second": None,
        "threads": torch.get_num_threads(),
    }
    if len(tokens) > 1:
        steps = [after - before for before, after in itertools.pairwise(clock.times[1:])]
        result["decode_tokens_per_second"] = 1 / statistics.median(steps)
    if settings is None:
        result["cache_bytes"] = sum(
            layer.keys.nbytes + layer.values.nbytes for layer in cache.layers
        )
    else:
        report = cache.memory_report()
        del report["layers"]
        result["cache_bytes"] = cache.nbytes
        result["report"] = report
        result["level"] = cache.settings.arithmetic
    if others is not None:
        cache.crop(ids.shape[1] - 1)
        text = torch.tensor([[ids[0, -1].item(), *others[:-1]]], device=ids.device)
        with torch.inference_mode():
            chosen = model(text, **cache_argument(model, cache)).logits[0].argmax(-1)
        result["foreseen"] = int((chosen.cpu() == torch.tensor(others, device="cpu")).sum())
    return result


class _Clock:
    """A stopping criterion that never stops, but notes the time of the start and of each token."""

    def __init__(self, on_token: Any = None) -> None:
        self.times = [time.perf_counter()]
        self._on_token = on_token

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        self.times.append(time.perf_counter())
        if self._on_token is not None:
            self._on_token()
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def _print(result: dict[str, Any]) -> None:
    plain, compressed = result["plain"], result["compressed"]
    report = compressed["report"]
    settings = result["settings"]
    print(f"Prompt of {result['prompt_tokens']} tokens, ending in: {QUESTION}\n")
    print(f"With the model's own cache:\n{plain['text'].strip()}\n")
    print(f"With the compressed cache:\n{compressed['text'].strip()}\n")
    print(
        f"Equal tokens: {result['tokens_equal']} of {result['tokens_compared']}, the first "
        f"{result['tokens_equal_from_start']} in a row. Given the first text, the compressed model "
        f"chooses the same next token at {result['tokens_equal_given_same_text']} of "
        f"{len(plain['tokens'])} places.\n"
    )

    def growth(run: dict[str, Any]) -> str:
        return "unknown" if run["growth_bytes"] is None else megabytes(run["growth_bytes"])

    def speed(run: dict[str, Any]) -> str:
        rate = run["decode_tokens_per_second"]
        return "–" if rate is None else f"{rate:.1f} tokens/s"

    bits = f"K{settings['bits_k']}/V{settings['bits_v']}"
    runs = {f"own cache, {result['dtype']}": plain}
    quantized = result.get("quantized")
    if quantized is not None and "refused" not in quantized:
        runs["mlx-lm's of 4 bits"] = quantized
    runs[f"compressed, {bits}"] = compressed
    blank = [""] * (len(runs) - 1)
    print_table(
        ["", *runs],
        [
            ["cache", *(megabytes(each["cache_bytes"]) for each in runs.values())],
            ["  packed tokens", *blank, megabytes(report["packed_bytes"])],
            ["  exact tokens", *blank, megabytes(report["exact_bytes"])],
            ["  overhead", *blank, megabytes(report["overhead_bytes"])],
            *(
                [["bases of keys, beside it", *blank, megabytes(report["basis_bytes"])]]
                if report["basis_bytes"]
                else []
            ),
            ["growth of the process", *map(growth, runs.values())],
            ["prefill", *(f"{each['prefill_seconds']:.2f} s" for each in runs.values())],
            ["decoding, median", *map(speed, runs.values())],
        ],
    )
    if quantized is not None and "refused" in quantized:
        print(f"\nWithout mlx-lm's quantised cache: {quantized['refused']}.")
    share = compressed["cache_bytes"] / plain["cache_bytes"]
    print(
        f"\nThe compressed cache takes {percent(share)} of the model's own. "
        f"{report['packed_tokens']} of {report['tokens']} tokens are packed. "
        f"{result['model'] or 'The default model'}, {result['threads']} threads, {result['level']} "
        "kernels."
    )
