"""``tqai bench``: times beside those of uncompressed caches, of one layer or of a whole model."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tqai.cli import bench_prefill, bench_requests, bench_store
from tqai.cli.options import (
    add_framework,
    add_model,
    add_settings,
    add_verb,
    settings_of,
    use_threads,
)
from tqai.cli.output import megabytes, percent, print_json, print_table, progress_bar
from tqai.cli.plot import add_plot, figure_for
from tqai.cli.process import fresh_process
from tqai.settings import DTYPES, LEVELS, Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tqai.measure.decoder import Variant
    from tqai.measure.time_kernels import KernelTime, KernelTimes
    from tqai.measure.time_model import ModelTime


def add(verbs: Any) -> None:
    help = "Times attention over packed tokens, or a whole model, beside uncompressed ones."
    parser = verbs.add_parser("bench", help=help, description=help)
    subjects = parser.add_subparsers(metavar="WHAT", required=True)
    _add_kernels(subjects)
    _add_model(subjects)
    bench_prefill.add(subjects)
    bench_store.add(subjects)
    bench_requests.add(subjects)


def _add_numbers(parser: Any, *options: tuple[str, Any, str], **how: Any) -> None:
    for option, default, text in options:
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        parser.add_argument(
            option, default=default, metavar="N", help=f"{text} (default: {shown})", **how
        )


def _add_kernels(subjects: Any) -> None:
    parser = add_verb(
        subjects,
        "kernels",
        "Times one layer's attention over packed tokens, called from Python, beside torch's over "
        "the uncompressed ones: every combination of the shapes given.",
        _run_kernels,
    )
    _add_numbers(
        parser,
        ("--dim", [128], "coordinates of a head"),
        ("--group", [4], "query heads for each kv head"),
        ("--tokens", [1024, 8192, 32768], "tokens in the past"),
        ("--queries", [1], "queries for each head; more than one come with a token each"),
        type=int,
        nargs="+",
    )
    parser.add_argument(
        "--bits",
        nargs="+",
        default=["k4v4", "k4v2"],
        metavar="KxVy",
        help="bits of keys and values, or presets (default: k4v4 k4v2)",
    )
    parser.add_argument(
        "--level",
        nargs="+",
        choices=LEVELS,
        help="kernel levels (default: the best here)",
    )
    parser.add_argument(
        "--centering",
        nargs="+",
        choices=("mean", "rope"),
        default=["mean", "rope"],
        help="what keys are centred on (default: both)",
    )
    _add_numbers(
        parser,
        ("--kv-heads", 8, "key/value heads"),
        ("--layers", 1, "layers, read in turn, as in a model"),
        ("--rounds", 15, "turns of each, at most"),
        type=int,
    )
    _add_numbers(
        parser, ("--seconds", 4.0, "for the turns of a shape; three are taken anyway"), type=float
    )
    add_plot(parser, "time against tokens")


def _add_model(subjects: Any) -> None:
    parser = add_verb(
        subjects,
        "model",
        "Times a model's decoding, and its cache's memory, against the context's length. Each "
        "cache has a process with a model of its own, all at once.",
        _run_model,
    )
    add_model(parser, dtype=False)
    add_framework(parser)
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=["float32", "bfloat16"],
        help="of the model (default: float32 bfloat16)",
    )
    parser.add_argument(
        "--caches",
        nargs="+",
        choices=("dynamic", "quantized", "tqai"),
        default=["dynamic", "quantized", "tqai"],
        help="transformers' DynamicCache and QuantizedCache, or mlx-lm's KVCache and "
        "QuantizedKVCache of 4 bits, and tqai's (default: all)",
    )
    _add_numbers(
        parser,
        ("--contexts", [1024, 4096, 16384], "tokens in the cache"),
        type=int,
        nargs="+",
    )
    _add_numbers(
        parser,
        ("--tokens", 16, "tokens to decode at each context"),
        ("--prefill", 1024, "tokens that are really read; longer contexts repeat them"),
        type=int,
    )
    add_plot(parser, "time and memory against the context")
    add_settings(parser)


def _figure(options: argparse.Namespace) -> Figure | None:
    return None if options.plot is None else figure_for(options.plot, (11, 4.8))


def _run_kernels(options: argparse.Namespace) -> None:
    from tqai.measure.time_kernels import Shape, time_kernels
    from tqai.measure.timing import keep_freed_memory

    kept = keep_freed_memory()
    figure = _figure(options)
    use_threads(options)
    shapes = [
        Shape(dim, group, options.kv_heads, tokens, queries, options.layers)
        for dim, group, queries, tokens in itertools.product(
            options.dim, options.group, options.queries, options.tokens
        )
    ]
    with progress_bar("round") as progress:
        results = list(
            time_kernels(
                shapes,
                options.bits,
                levels=options.level or [None],
                centerings=options.centering,
                rounds=options.rounds,
                seconds=options.seconds,
                progress=progress,
            )
        )
    if options.json:
        print_json([asdict(result) for result in results])
    else:
        _print_kernels(results, kept)
    if figure is not None:
        _draw_kernels(figure, results)
        figure.savefig(options.plot)


def _label(row: KernelTime) -> str:
    parts = (row.name, row.bits, row.centering, row.level, row.dtype)
    return " ".join(part for part in parts if part)


def _print_kernels(results: list[KernelTimes], kept: bool) -> None:
    for result in results:
        first = result.rows[0]
        shape = first.shape
        print(
            f"d={shape.dim} G={shape.group} kv_heads={shape.kv_heads} tokens={shape.tokens} "
            f"layers={shape.layers} queries={shape.queries} threads={first.threads}; "
            f"memory reads at {result.bandwidth / 1e9:.1f} GB/s; {first.rounds} rounds"
        )
        print_table(
            ["", "µs", "ns/token·head", "MB read", "GB/s", "of memory's", "× best torch"],
            [
                [
                    _label(row),
                    f"{row.microseconds:.1f}",
                    f"{row.nanoseconds_per_token_head:.2f}",
                    f"{row.bytes_read / 1e6:.2f}",
                    f"{row.gigabytes_per_second:.2f}",
                    percent(row.bandwidth_share),
                    f"{row.times_best_torch:.2f}" + (" (best)" if row.is_best_torch else ""),
                ]
                for row in result.rows
            ],
        )
        print()
    print(
        "Medians of whole calls from Python, divided by the layers, all of them in turn. × best "
        "torch: how many\ntimes as fast, the median of the rounds' ratios. The past is packed, in "
        "tiles of 64 tokens; a single query\nreads it, and more bring a token each. MB read: keys "
        "and values, each counted once. Rows: the query heads of\na kv head as rows of one "
        "product; else as transformers calls SDPA, with enable_gqa. Memory: torch's sum over\n"
        "256 MB, by as many threads, in the same rounds; shares above 100 % are of what stayed in "
        "the processor's caches.\n"
        + (
            "What is freed is kept by the process, so that temporaries are not cleared by the "
            "system in each call."
            if kept
            else "Temporaries may be cleared by the system in each call: this C library cannot be "
            "told to keep them."
        )
    )


def _draw_kernels(figure: Figure, results: list[KernelTimes]) -> None:
    """Time of a token and head against tokens: one plot for each of the other numbers."""

    def kind(result: KernelTimes) -> tuple[int, int, int]:
        shape = result.rows[0].shape
        return shape.dim, shape.group, shape.queries

    first = results[0].rows[0]
    kinds = list(dict.fromkeys(map(kind, results)))
    plots = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, (dim, group, queries) in zip(plots, kinds, strict=True):
        series: dict[str, list[KernelTime]] = {}
        for result in results:
            if kind(result) == (dim, group, queries):
                for row in result.rows:
                    series.setdefault(_label(row), []).append(row)
        for (label, rows), marker in zip(series.items(), itertools.cycle("os^Dv<>")):  # noqa: B905
            rows.sort(key=lambda row: row.shape.tokens)
            axes.plot(
                [row.shape.tokens for row in rows],
                [row.nanoseconds_per_token_head for row in rows],
                marker + ("-" if rows[0].bits else ":"),
                fillstyle="none",
                label=label,
            )
        axes.set(
            title=f"d={dim}, G={group}, queries={queries}, layers={first.shape.layers}, "
            f"threads={first.threads}",
            xlabel="tokens",
            ylabel="ns a token and kv head",
            xscale="log",
            yscale="log",
        )
        axes.grid(alpha=0.3)
    # The same labels in every plot, and too many to lie in one.
    figure.legend(*plots[0].get_legend_handles_labels(), loc="outside right upper")


def _variants(options: argparse.Namespace) -> tuple[list[Variant], list[str]]:
    """What is asked for and can be had, and what to say about the rest."""
    from tqai.measure.decoder import KINDS, Variant

    notes = []
    framework = options.framework
    plain, quantized, compressed = KINDS[framework]
    caches: dict[str, Callable[[str], Variant]] = {
        "dynamic": lambda dtype: Variant(plain, dtype, framework=framework),
        "tqai": lambda dtype: Variant(compressed, dtype, settings_of(options), framework),
    }
    if "quantized" in options.caches:
        how: dict[str, Any] = {"nbits": 4}
        if framework == "transformers":
            from tqai.measure.torch_decoder import quantized_backend

            how["backend"] = quantized_backend()
        if how.get("backend", framework) is None:
            notes.append(
                "QuantizedCache: not measured, as neither of its back ends, optimum-quanto and "
                "hqq, is installed."
            )
        else:
            caches["quantized"] = lambda dtype: Variant(quantized, dtype, how, framework)
    kinds = [cache for cache in dict.fromkeys(options.caches) if cache in caches]
    dtypes = dict.fromkeys(options.dtypes)
    found = [caches[kind](dtype) for dtype in dtypes for kind in kinds]
    if not found:
        raise ValueError(notes[0])
    return found, notes


def _run_model(options: argparse.Namespace) -> None:
    from tqai.measure.time_model import time_model

    if options.framework == "mlx":
        _check_mlx(options)
    figure = _figure(options)
    given = settings_of(options)
    Settings.named(given.pop("preset", None), **given)  # raises before models are loaded
    variants, notes = _variants(options)
    with progress_bar("token") as progress:
        results = list(
            time_model(
                variants,
                sorted(set(options.contexts)),
                fresh_process,
                model=options.model,
                prefill=options.prefill,
                tokens=options.tokens,
                threads=options.threads,
                device=options.device,
                progress=progress,
            )
        )
    rows = [row for result in results for row in result]
    if options.json:
        print_json({"rows": [asdict(row) for row in rows], "notes": notes})
    else:
        _print_model(rows, notes, options.framework)
    if figure is not None:
        _draw_model(figure, rows)
        figure.savefig(options.plot)


def _check_mlx(options: argparse.Namespace) -> None:
    """Raises ValueError for what mlx-lm does not take, before any process is started."""
    from tqai.mlx.loading import check_name

    if options.device is not None:
        raise ValueError(f"--device {options.device} goes with --framework transformers")
    check_name(options.model)


def _cache_name(row: ModelTime) -> str:
    return " ".join(part for part in (row.cache, row.bits, row.level, row.dtype) if part)


def _print_model(rows: list[ModelTime], notes: list[str], framework: str) -> None:
    def size(count: int | None) -> str:
        return "–" if count is None else megabytes(count)

    first = rows[0]
    plain = "KVCache" if framework == "mlx" else "DynamicCache"
    print(
        f"{os.path.basename(first.model)}, {first.threads} threads, median of {first.steps} tokens"
    )
    print_table(
        [
            "",
            "context",
            "ms/token",
            f"× {plain.removesuffix('Cache')}",
            "packed",
            "cache",
            "process",
            "peak",
        ],
        [
            [
                _cache_name(row),
                str(row.context),
                f"{row.milliseconds:.1f}",
                "–" if row.times_dynamic is None else f"{row.times_dynamic:.2f}",
                "" if row.packed_tokens is None else str(row.packed_tokens),
                size(row.cache_bytes),
                size(row.growth_bytes),
                size(row.peak_bytes),
            ]
            for row in rows
        ],
    )
    print(
        f"\n× {plain.removesuffix('Cache')}: how many times as fast as {plain} of the same dtype, "
        "the median of the rounds'\nratios; the caches decode in turn. Cache: by its own account. "
        "Process: its resident memory over the\nmodel's own, with the cache; peak: the most while "
        "it decoded."
    )
    repeated = {row.context: row.repeated for row in rows if row.repeated}
    for context, count in repeated.items():
        print(
            f"Context {context}: {context - count} tokens were read by the model; "
            f"{count} repeat their keys and values."
        )
    for note in notes:
        print(note)


def _draw_model(figure: Figure, rows: list[ModelTime]) -> None:
    series: dict[str, list[ModelTime]] = {}
    for row in rows:
        series.setdefault(_cache_name(row), []).append(row)
    left, right = figure.subplots(1, 2)
    for (name, each), marker in zip(series.items(), itertools.cycle("os^Dv<>")):  # noqa: B905
        contexts = [row.context for row in each]
        style = {"marker": marker, "fillstyle": "none", "label": name}
        left.plot(contexts, [row.milliseconds for row in each], **style)
        held = [(row.context, row.cache_bytes / 1e6) for row in each if row.cache_bytes is not None]
        if held:
            right.plot(*zip(*held, strict=True), **style)
    model, threads = os.path.basename(rows[0].model), rows[0].threads
    left.set(title=f"{model}, decoding, {threads} threads", ylabel="ms a token", yscale="log")
    right.set(title="Cache", ylabel="MB", yscale="log")
    for axes in (left, right):
        axes.set(xlabel="tokens in the cache", xscale="log")
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
