"""``tqai bench prefill``: what compressing a prompt adds to reading it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from tqai.cli.options import add_model, add_settings, add_verb, settings_of, use_threads
from tqai.cli.output import percent, print_json, print_table, progress_bar


def add(subjects: Any) -> None:
    parser = add_verb(
        subjects,
        "prefill",
        "Times the reading of a prompt with transformers' DynamicCache and with tqai's, in turns, "
        "and sealing alone.",
        _run,
    )
    add_model(parser)
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[1024, 2048],
        metavar="N",
        help="lengths of the prompt (default: 1024 2048)",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="of each length (default: 5)"
    )
    add_settings(parser)


def _run(options: argparse.Namespace) -> None:
    from tqai.measure.time_prefill import time_prefill

    use_threads(options)
    with progress_bar("round") as progress:
        rows = list(
            time_prefill(
                options.model,
                options.dtype,
                options.tokens,
                settings_of(options),
                rounds=options.rounds,
                device=options.device,
                progress=progress,
            )
        )
    if options.json:
        print_json([asdict(row) for row in rows])
        return
    print(f"{rows[0].dtype}, {rows[0].bits}, {rows[0].threads} threads, {rows[0].rounds} rounds")
    print_table(
        ("tokens", "packed", "DynamicCache ms", "tqai ms", "tqai / Dynamic", "sealing ms", "share"),
        [
            (
                str(row.tokens),
                str(row.packed_tokens),
                f"{row.dynamic_milliseconds:.1f}",
                f"{row.tqai_milliseconds:.1f}",
                f"{row.times_dynamic:.3f}",
                f"{row.sealing_milliseconds:.1f}",
                percent(row.sealing_share),
            )
            for row in rows
        ],
    )
    print(
        "\nMedians. Sealing: handing the prompt's keys and values to the caches of all layers and"
        "\ncompressing them; share: of the prefill with DynamicCache."
    )
