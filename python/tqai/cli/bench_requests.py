"""``tqai bench requests``: continuous batching beside transformers' paged cache."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from tqai.cli.options import add_model, add_settings, add_verb, settings_of, use_threads
from tqai.cli.output import print_json, print_table, progress_bar


def add(subjects: Any) -> None:
    parser = add_verb(
        subjects,
        "requests",
        "Serves requests of different lengths together (transformers' continuous batching), "
        "with the plain paged cache and with tqai's caches in turns.",
        _run,
    )
    add_model(parser)
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[250, 300, 350, 400, 450, 500, 550, 600],
        metavar="N",
        help="tokens of each request's prompt (default: 250 300 … 600, eight of them)",
    )
    parser.add_argument(
        "--tokens", type=int, default=32, metavar="N", help="that each request gets (default: 32)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="of both caches (default: 3)"
    )
    add_settings(parser)


def _run(options: argparse.Namespace) -> None:
    from tqai.measure.time_requests import time_requests

    use_threads(options)
    with progress_bar("round") as progress:
        times = time_requests(
            options.model,
            options.dtype,
            options.lengths,
            settings_of(options),
            new_tokens=options.tokens,
            rounds=options.rounds,
            device=options.device,
            progress=progress,
        )
    if options.json:
        print_json(asdict(times))
        return
    print(
        f"{len(times.lengths)} requests, {times.new_tokens} tokens each, {times.dtype}, "
        f"{times.bits}, {times.threads} threads, {times.rounds} rounds"
    )
    print_table(
        ("", "tokens/s", "seconds, with prompts"),
        [
            ("paged", f"{times.paged_tokens_per_second:.1f}", f"{times.paged_seconds:.2f}"),
            ("tqai", f"{times.tqai_tokens_per_second:.1f}", f"{times.tqai_seconds:.2f}"),
        ],
    )
    print(
        f"\ntqai / paged: {times.times_paged:.2f}, the median of the rounds' ratios, of tokens/s "
        "from when all requests\nhave their first token. "
        f"{times.same_tokens} of {len(times.lengths)} requests got the same tokens from both."
    )
