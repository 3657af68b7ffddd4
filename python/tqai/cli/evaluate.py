"""``tqai eval``: what compression costs in fidelity."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict
from pathlib import Path
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
_COMPARISON: tuple[tuple[str, int, str], ...] = (
    ("--prefill", 512, "tokens read at once and exactly, first"),
    ("--read", 256, "tokens fed after them"),
    ("--chunk", 1, "tokens fed at a time, at most a window of them"),
    ("--samples", 1, "stretches of the text"),
)
_SEARCH: tuple[tuple[str, int, str], ...] = (
    ("--context", 1024, "tokens of the whole prompt"),
    ("--needles", 2, "needles for each depth"),
    ("--needle-seed", 0, "of the codes and of the stretches of the text"),
)
_DEPTHS = (0.1, 0.5, 0.8)


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
    add_plot(parser, "mean KL against bits")

    def add_numbers(group: Any, numbers: tuple[tuple[str, int, str], ...]) -> None:
        for option, default, text in numbers:
            group.add_argument(option, type=int, metavar="N", help=f"{text} (default: {default})")

    comparison = parser.add_argument_group("comparison")
    add_numbers(comparison, _COMPARISON)
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
    add_numbers(search, _SEARCH)
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

    for option in ("--depths", *(option for option, *_ in _SEARCH)):
        if _value(options, option) is not None:
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
            bos=options.bos,
            progress=progress,
        )
    if options.json:
        print_json([asdict(result) for result in results])
    else:
        _print_comparison(results)
    if figure is not None:
        _draw(figure, results)
        figure.savefig(options.plot)


def _search(options: argparse.Namespace, text: str | None, names: list[str]) -> None:
    from tqai.measure.recall import needle

    for option in ("--plot", "--bos", *(option for option, *_ in _COMPARISON)):
        if _value(options, option) is not None:
            raise ValueError(f"{option} goes without --needle")
    numbers = _numbers(options, _SEARCH)
    seed = numbers.pop("needle_seed")
    depths = _DEPTHS if options.depths is None else options.depths
    model, tokenizer = load_model(options)
    with progress_bar("answer") as progress:
        results = needle(
            model, tokenizer, text, names, depths=depths, seed=seed, **numbers, progress=progress
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
    options: argparse.Namespace, numbers: tuple[tuple[str, int, str], ...]
) -> dict[str, int]:
    return {
        _name(option): default if _value(options, option) is None else _value(options, option)
        for option, default, _ in numbers
    }


def _print_comparison(results: list[Fidelity]) -> None:
    print_table(
        ["setting", "mean KL", "median", "max", "top-1", "perplexity", "bits", "bits, all"],
        [
            [
                result.setting,
                f"{result.kl_mean:.5f}",
                f"{result.kl_median:.5f}",
                f"{result.kl_max:.4f}",
                percent(result.top1_agreement),
                f"{result.perplexity:.3f}",
                f"{result.bits_per_coordinate:.3f}",
                f"{result.bits_per_coordinate_whole:.3f}",
            ]
            for result in results
        ],
    )
    print(f"\nUncompressed perplexity {results[0].perplexity_uncompressed:.3f}.")
    for result in results:
        print(
            f"{result.setting}: {result.tokens_read_packed} of {result.tokens_read} tokens read "
            f"packed ones; at the end {percent(result.packed_share)} of the context was packed."
        )
    print("KL(p‖q) in nats; bits per coordinate of packed tokens, and of the whole cache.")


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
    print(
        "\nRight: greedy generation gave the code, in all and at each depth. Likeliest: of ten "
        "codes. log p: of the\nright code, mean, in nats. Packed: of about "
        f"{results[0].tokens} tokens, those that were packed before the question was read;\n"
        "needles: those that lay wholly in them."
    )


def _draw(figure: Figure, results: list[Fidelity]) -> None:
    """Mean KL, on a logarithmic scale, against bits: a named point for each setting."""
    axes = figure.subplots()
    # Hollow and of several shapes, so that settings that come out alike can be told apart.
    for result, marker in zip(results, itertools.cycle("os^Dv<>"), strict=False):
        axes.plot(
            result.bits_per_coordinate,
            result.kl_mean,
            marker,
            fillstyle="none",
            markersize=8,
            label=result.setting,
        )
    axes.set(
        title="Divergence from the uncompressed model",
        xlabel="bits a coordinate of packed tokens, codes and norms",
        ylabel="mean KL(p‖q), nats",
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
