"""``tqai bench store``: what keeping a prompt elsewhere costs, and what it brings."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from typing import Any

from tqai.cli.options import add_model, add_verb, use_threads
from tqai.cli.output import megabytes, print_json, print_table, progress_bar


def add(subjects: Any) -> None:
    parser = add_verb(
        subjects,
        "store",
        "Measures a prompt's keys and values in formats that go between processes and machines: "
        "bytes, error, speed; stores; the first token with and without a stored prefix; and from "
        "which links on fetching is faster than reading.",
        _run,
    )
    add_model(parser, device=False)
    for option, default, text in (
        ("--tokens", 4096, "of the prompt"),
        ("--chunk", 256, "tokens of a chunk"),
        ("--read", 64, "tokens after it, whose distributions are compared"),
        ("--rest", 128, "tokens after it that the reader reads, before such a comparison"),
        ("--rounds", 5, "of each format; the fastest counts"),
    ):
        parser.add_argument(
            option, type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--exact-first",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="also with so many first tokens of each chunk exact, where the default is 1",
    )
    parser.add_argument(
        "--urls",
        nargs="+",
        default=[],
        metavar="URL",
        help="stores to time beside a folder, as redis://localhost:6379/0",
    )


def _run(options: argparse.Namespace) -> None:
    from tqai.measure.time_store import LINKS, time_store

    use_threads(options)
    with progress_bar("step") as progress:
        result = time_store(
            options.model,
            options.dtype,
            options.tokens,
            read=options.read,
            rest=options.rest,
            chunk=options.chunk,
            urls=options.urls,
            exact_first=options.exact_first,
            rounds=options.rounds,
            progress=progress,
        )
    if options.json:
        print_json(asdict(result))
        return
    print(f"{result.tokens} tokens, {result.dtype}, {result.threads} threads\n")
    print_table(
        (
            "format",
            "bytes",
            "smaller",
            "encode GB/s",
            "decode GB/s",
            "KL",
            f"KL, {options.rest} on",
        ),
        [
            (
                row.name,
                megabytes(row.bytes),
                f"{row.times_smaller:.2f}×",
                f"{row.encode_gigabytes:.2f}" if row.encode_gigabytes else "–",
                f"{row.decode_gigabytes:.2f}" if row.decode_gigabytes else "–",
                f"{row.kl:.5f}",
                f"{row.later_kl:.5f}",
            )
            for row in result.formats
        ],
    )
    at_once, later = result.in_process_kl
    print(f"\nA cache of this process, K4/V2: KL {at_once:.5f}, {options.rest} on {later:.5f}\n")
    print_table(
        ("store", "put GB/s", "fetch GB/s"),
        [
            (each.url, f"{each.put_gigabytes:.2f}", f"{each.fetch_gigabytes:.2f}")
            for each in result.shelves
        ],
    )
    times = result.read_seconds / result.with_prefix_seconds
    print(
        f"\nFirst token: {result.read_seconds:.2f} s; with a stored prefix of "
        f"{result.prefix_tokens} tokens ({megabytes(result.prefix_bytes)}) "
        f"{result.with_prefix_seconds:.2f} s, {times:.1f} times as fast\n"
    )
    print_table(
        ("fetching, ms", *(f"{link} Gbit/s" for link in LINKS), "as fast as reading at"),
        [
            (
                row.name,
                *(f"{1e3 * row.fetch_seconds[link]:.1f}" for link in LINKS),
                f"{row.break_even:.3f} Gbit/s" if math.isfinite(row.break_even) else "none",
            )
            for row in result.formats
        ],
    )
    print(
        "\nGB/s: of bfloat16, on one core; of stores, of packed bytes. Fetching: bytes over the"
        "\nlink, and decoding on one core; computed."
    )
