"""``tqai eval``: what compression costs in fidelity."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict
from pathlib import Path
from statistics import stdev
from typing import TYPE_CHECKING, Any

from tqai.cli.options import (
    add_framework,
    add_model,
    add_settings,
    add_verb,
    load_model,
    settings_of,
)
from tqai.cli.output import percent, print_json, print_table, progress_bar
from tqai.cli.plot import add_plot, figure_for
from tqai.measure.named_settings import ARITHMETICS, SETTING_KEYS, parse_setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tqai.measure.fidelity import Fidelity
    from tqai.measure.recall import Recall

# Option, default, what it means: of the comparison, and of the search for needles.
_COMPARISON: tuple[tuple[str, int | str, str], ...] = (
    ("--prefill", 512, "tokens read at once and exactly, first"),
    ("--read", "256; with --own 1024", "tokens fed after them"),
    ("--chunk", "16, or the window", "tokens fed at a time, at most a window of them"),
    ("--samples", "4; with --own 2", "stretches of the text"),
    ("--seeds", 1, "seeds of the rotations for each setting"),
)
_SEARCH: tuple[tuple[str, int | str, str], ...] = (
    ("--needles", 2, "needles for each depth and context"),
    ("--needle-seed", 0, "of the codes and of the stretches of the text"),
)
_DEPTHS = (0.1, 0.5, 0.8)
_CONTEXT = (1024,)
# Options of the search that are no numbers.
_OWN_OF_SEARCH = ("--context", "--depths", "--together", "--table")


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "eval",
        "Compares the model's next-token distributions with and without compression, each token "
        "reading the packed ones before it; or, with --needle, whether it finds what was hidden "
        "in a long text.",
        run,
    )
    add_model(parser)
    add_framework(parser)
    parser.add_argument(
        "--setting",
        dest="names",
        nargs="+",
        default=["k4v4", "k4v2"],
        metavar="KxVy[,KEY=VALUE…]",
        help="bits of keys and values, or a preset, and what differs from the options below: "
        "sink_tokens=, residual_window=, codec=, rotation=, centering=, seed=, backend=, level=, "
        "skip_layers=0+1, arithmetic= (default: k4v4 k4v2)",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="default: Python's own manual")
    add_plot(parser, "mean KL against the bytes that caches hold")

    def add_numbers(group: Any, numbers: tuple[tuple[str, int | str, str], ...]) -> None:
        for option, default, text in numbers:
            group.add_argument(option, type=int, metavar="N", help=f"{text} (default: {default})")

    comparison = parser.add_argument_group("comparison")
    add_numbers(comparison, _COMPARISON)
    comparison.add_argument(
        "--own",
        action="store_true",
        help="read what the model itself goes on with after the prefill, in place of the text",
    )
    comparison.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="of what it goes on with (default: 0, the likeliest tokens)",
    )
    windows = comparison.add_mutually_exclusive_group()
    windows.add_argument(
        "--tails",
        type=int,
        nargs="+",
        metavar="N",
        help="measure each setting with each of these residual windows",
    )
    windows.add_argument(
        "--equal-bytes",
        action="store_true",
        help="give each setting but the first, which is to be the largest, the window that "
        "makes its cache as large as the first one's",
    )
    comparison.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin each stretch with the tokenizer's first token (default: as the tokenizer does, "
        "which one out of a GGUF file may have forgotten)",
    )
    search = parser.add_argument_group("needles")
    search.add_argument(
        "--needle",
        action="store_true",
        help="hide a sentence with a code in a long text and ask for it, in place of comparing",
    )
    search.add_argument(
        "--context",
        type=int,
        nargs="+",
        metavar="N",
        help=f"tokens of the whole prompt, or of several (default: {_CONTEXT[0]})",
    )
    add_numbers(search, _SEARCH)
    search.add_argument(
        "--together",
        action="store_true",
        help="hide the needles of all depths in one text, which is read once; they are harder "
        "to tell apart",
    )
    search.add_argument(
        "--table",
        action="store_true",
        help="ask for rows of a table of random strings, in place of sentences in a text",
    )
    search.add_argument(
        "--depths",
        type=float,
        nargs="+",
        metavar="SHARE",
        help=f"of the text before the needle, 0…1 (default: {' '.join(map(str, _DEPTHS))})",
    )
    add_settings(parser, bits=False)
    parser.add_argument(
        "--arithmetic",
        choices=ARITHMETICS,
        default=argparse.SUPPRESS,
        help="exact: torch's attention over the same codes, dequantised (default: kernel)",
    )


def run(options: argparse.Namespace) -> None:
    # All checked before the model is loaded, since that takes a while.
    given = settings_of(options)
    if hasattr(options, "arithmetic"):
        given["arithmetic"] = options.arithmetic
    names = [_complete(name, given) for name in options.names]
    text = None if options.text is None else options.text.read_text(encoding="utf-8")
    (_search if options.needle else _compare)(options, text, names)


def _compare(options: argparse.Namespace, text: str | None, names: list[str]) -> None:
    from tqai.measure.fidelity import evaluate

    for option in (*_OWN_OF_SEARCH, *(option for option, *_ in _SEARCH)):
        if _value(options, option) not in (None, False):
            raise ValueError(f"{option} goes with --needle")
    figure = None if options.plot is None else figure_for(options.plot, (7, 5))
    model, tokenizer = load_model(options)
    with progress_bar("token") as progress:
        results = evaluate(
            model,
            tokenizer,
            text,
            names,
            **_numbers(options, _COMPARISON),
            own=options.own,
            temperature=options.temperature or 0.0,
            tails=options.tails or (),
            equal_bytes=options.equal_bytes,
            bos=options.bos,
            progress=progress,
        )
    if options.json:
        print_json([asdict(result) for result in results])
    else:
        print_comparison(results)
    if figure is not None:
        _draw(figure, results)
        figure.savefig(options.plot)


def _search(options: argparse.Namespace, text: str | None, names: list[str]) -> None:
    from tqai.measure.recall import needle

    own = ("--plot", "--bos", "--own", "--temperature", "--tails", "--equal-bytes")
    for option in (*own, *(option for option, *_ in _COMPARISON)):
        if _value(options, option) not in (None, False):
            raise ValueError(f"{option} goes without --needle")
    numbers = _numbers(options, _SEARCH)
    seed = numbers.pop("needle_seed")
    if options.table and text is not None:
        raise ValueError("--text goes without --table")
    model, tokenizer = load_model(options)
    with progress_bar("answer") as progress:
        results = needle(
            model,
            tokenizer,
            text,
            names,
            context=options.context or _CONTEXT,
            depths=_DEPTHS if options.depths is None else options.depths,
            together=options.together,
            table=options.table,
            seed=seed,
            **numbers,
            progress=progress,
        )
    if options.json:
        print_json([asdict(result) for result in results])
    else:
        _print_search(results)


def _name(option: str) -> str:
    return option[2:].replace("-", "_")


def _value(options: argparse.Namespace, option: str) -> Any:
    return getattr(options, _name(option))


def _numbers(
    options: argparse.Namespace, numbers: tuple[tuple[str, int | str, str], ...]
) -> dict[str, int]:
    """Those that were given, or have one default."""
    values = {
        _name(option): default if _value(options, option) is None else _value(options, option)
        for option, default, _ in numbers
    }
    return {name: value for name, value in values.items() if isinstance(value, int)}


def print_comparison(results: list[Fidelity]) -> None:
    print_table(
        [
            *("setting", "mean KL", "±", "median", "99.9 %", "max", "top-1", "perplexity"),
            *("bits", "MB", "of"),
        ],
        [
            [
                result.setting,
                f"{result.kl_mean:.5f}",
                _half_width(result),
                f"{result.kl_median:.5f}",
                f"{result.kl_p999:.4f}",
                f"{result.kl_max:.4f}",
                percent(result.top1_agreement),
                f"{result.perplexity:.3f}",
                f"{result.bits_per_coordinate:.3f}",
                f"{(result.bytes_held + result.bytes_shared) / 1e6:.2f}",
                f"{result.bytes_uncompressed / 1e6:.2f}",
            ]
            for result in results
        ],
    )
    first = results[0]
    print(f"\nUncompressed perplexity {first.perplexity_uncompressed:.3f}.")
    for result in results:
        print(
            f"{result.setting}: {result.tokens_read_packed} of {result.tokens_read} tokens read "
            f"packed ones, {result.chunk} at a time; at the end {percent(result.packed_share)} of "
            f"the context was packed."
        )
    if first.own:
        print("\nTokens that the model goes on with before the first one that is another:")
        for result in results:
            assert result.equal_tokens is not None
            print(f"{result.setting}: {', '.join(map(str, result.equal_tokens))}")
    if first.own:
        print("Mean KL along what was read, in equal parts:")
        for result in results:
            print(f"{result.setting}: {', '.join(f'{mean:.5f}' for mean in result.kl_along)}")
    if len(first.kl_by_seed) > 1:
        print(f"\nMean KL over {len(first.kl_by_seed)} seeds: least, most, standard deviation:")
        for result in results:
            each = result.kl_by_seed
            print(f"{result.setting}: {min(each):.5f}, {max(each):.5f}, {stdev(each):.5f}")
    print(
        "\nKL(p‖q) in nats, and 95 % of its mean over stretches (Student's t); bits a coordinate of"
    )
    print("packed tokens; megabytes of the cache and what it shares, of those of the model's own.")


def _half_width(result: Fidelity) -> str:
    if result.kl_interval is None:
        return ""
    low, high = result.kl_interval
    return f"{(high - low) / 2:.5f}"


def _print_search(results: list[Recall]) -> None:
    print_table(
        [
            "setting",
            "right",
            *(f"at {depth:g}" for depth in results[0].depths),
            "likeliest",
            "log p",
            "packed",
            "needles",
        ],
        [
            [
                result.setting,
                f"{result.answered}/{result.needles}",
                *map(str, result.depths.values()),
                f"{result.ranked_first}/{result.needles}",
                f"{result.log_probability:.3f}",
                str(result.tokens_packed),
                str(result.needles_packed),
            ]
            for result in results
        ],
    )
    grid = results[0].grid
    if len(grid) > 1:
        each = results[0].needles // sum(map(len, grid.values()))
        print(f"\nRight, of {each} in each place, by tokens of the prompt:")
        print_table(
            ["setting", "tokens", *(f"at {depth:g}" for depth in results[0].depths), "all"],
            [
                [result.setting, str(tokens), *map(str, row.values()), str(sum(row.values()))]
                for result in results
                for tokens, row in result.grid.items()
            ],
        )
    print(
        "\nRight: greedy generation gave the code, in all and at each depth. Likeliest: of ten "
        "codes. log p: of the\nright code, mean, in nats. Packed: of about "
        f"{results[0].tokens} tokens, those that were packed before the question was read;\n"
        "needles: those that lay wholly in them."
    )


def _draw(figure: Figure, results: list[Fidelity]) -> None:
    """Mean KL, on a logarithmic scale, against bytes: a named point for each setting."""
    axes = figure.subplots()
    # Hollow and of several shapes, so that settings that come out alike can be told apart.
    for result, marker in zip(results, itertools.cycle("os^Dv<>"), strict=False):
        low, high = result.kl_interval or (result.kl_mean, result.kl_mean)
        axes.errorbar(
            (result.bytes_held + result.bytes_shared) / 1e6,
            result.kl_mean,
            # An interval that reaches 0 has no place on this scale.
            yerr=[[result.kl_mean - max(low, result.kl_mean / 10)], [high - result.kl_mean]],
            fmt=marker,
            fillstyle="none",
            markersize=8,
            elinewidth=0.8,
            label=result.setting,
        )
    own = "its own continuation" if results[0].own else "a text"
    whole = results[0].bytes_uncompressed / 1e6
    axes.set(
        title=f"Divergence from the uncompressed model, along {own}",
        xlabel=f"megabytes that the cache holds (the model's own: {whole:.1f})",
        ylabel="mean KL(p‖q), nats, and 95 % of it",
        yscale="log",
    )
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    axes.legend()


def _complete(name: str, given: dict[str, Any]) -> str:
    """A setting's name with what other options say and it does not."""
    own = parse_setting(name)
    for key in SETTING_KEYS:
        if key in given and key not in own:
            value = given[key]
            name += f",{key}={'+'.join(map(str, value)) if isinstance(value, list) else value}"
    return name
