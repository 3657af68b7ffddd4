"""``tqai eval``: what compression costs in fidelity."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqai.cli.options import add_model, add_settings, add_verb, settings_of
from tqai.cli.output import percent, print_json, print_table
from tqai.models import require


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "eval",
        "Compares the model's next-token distributions with and without compression, each token "
        "reading the packed ones before it.",
        run,
    )
    add_model(parser)
    parser.add_argument(
        "--setting",
        dest="names",
        nargs="+",
        default=["k4v4", "k4v2"],
        metavar="KxVy[,KEY=VALUE…]",
        help="bits of keys and values, and what differs from the options below: sinks=, window=, "
        "rotation=, centering=, seed=, level=, skip=0+1 (default: k4v4 k4v2)",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="default: Python's own manual")
    for option, default, text in (
        ("--prefill", 512, "tokens read at once and exactly, first"),
        ("--read", 256, "tokens fed one at a time after them"),
        ("--samples", 1, "stretches of the text"),
    ):
        parser.add_argument(
            option, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    add_settings(parser, bits=False)


def run(options: argparse.Namespace) -> None:
    require("torch", "transformers", "tqdm", extra="torch")
    from tqdm import tqdm

    from tqai.fidelity import evaluate
    from tqai.models import load

    # Checked before the model is loaded, since that takes a while.
    names = [_complete(name, settings_of(options)) for name in options.names]
    text = None if options.text is None else options.text.read_text(encoding="utf-8")
    model, tokenizer = load(options.model, options.dtype)
    with tqdm(unit="token") as bar:

        def progress(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_description(what, refresh=False)
            bar.update(done - bar.n)

        results = evaluate(
            model,
            tokenizer,
            text,
            names,
            prefill=options.prefill,
            read=options.read,
            samples=options.samples,
            progress=progress,
        )
    if options.json:
        print_json([asdict(result) for result in results])
        return
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


def _complete(name: str, given: dict[str, Any]) -> str:
    """A setting's name with what other options say and it does not."""
    from tqai.fidelity import SETTING_KEYS, parse_setting

    own = parse_setting(name)
    for key, (option, _) in SETTING_KEYS.items():
        if option in given and option not in own:
            value = given[option]
            name += f",{key}={'+'.join(map(str, value)) if isinstance(value, list) else value}"
    return name
