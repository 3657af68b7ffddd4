"""``tqai memory``: the bytes of a filled cache, by its own account, by its allocator's and by the
system's."""

from __future__ import annotations

import argparse
from typing import Any

from tqai.cli.options import (
    add_framework,
    add_model,
    add_settings,
    add_verb,
    load_model,
    settings_of,
    use_threads,
)
from tqai.cli.output import percent, print_json, print_table
from tqai.cli.process import run_fresh
from tqai.measure.resident import resident_bytes
from tqai.measure.text import prose

_CHUNK = 1024


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "memory",
        "Fills a model's compressed cache with text and compares its report with the allocator and "
        "the growth of the process.",
        run,
    )
    add_model(parser)
    add_framework(parser)
    parser.add_argument(
        "--context", type=int, default=8192, metavar="N", help="tokens (default: %(default)s)"
    )
    add_settings(parser)


def run(options: argparse.Namespace) -> None:
    result = run_fresh(fill, options)
    if options.json:
        print_json(result)
    else:
        _print(result)


def fill(options: argparse.Namespace) -> dict[str, Any]:
    """Reads `options.context` tokens of prose into a compressed cache. Meant for a fresh process:
    the growth is that of the resident memory between two moments when the model has just run, all
    free memory is given back to the system, and only the cache differs."""
    from tqdm import tqdm

    import tqai
    from tqai import _core
    from tqai.measure.readers import reader_of

    if options.framework == "transformers":
        use_threads(options)
    model, tokenizer = load_model(options)
    reader = reader_of(model)
    tokens = reader.tokenize(tokenizer, prose(), True)
    if not 1 < options.context <= len(tokens):
        raise ValueError(f"--context {options.context}: expected 2 to {len(tokens)}")
    ids = tokens[: options.context]
    cache = tqai.patch(model, **settings_of(options))

    def read(ids: list[int], cache: Any, what: str) -> None:
        with tqdm(total=len(ids), desc=what, unit="token") as bar:
            reader.read(ids, cache, _CHUNK, bar.update)

    # Everything that runs for the first time does so now.
    read(ids[: 2 * _CHUNK], tqai.new_cache(model), "warming up")
    before = resident_bytes()
    read(ids, cache, "filling")
    after = resident_bytes()
    report = cache.memory_report()
    del report["layers"]
    sealed = reader.packed_vectors(cache)
    coordinates = report["uncompressed_bytes"] // reader.item_size
    return {
        "context": options.context,
        "dtype": options.dtype,
        "report": report,
        "bytes_per_sealed_token_layer_head": report["packed_bytes"] / sealed if sealed else None,
        "bfloat16_bytes": 2 * coordinates,
        "float32_bytes": 4 * coordinates,
        "allocated_bytes": _core.allocated_bytes(),
        "growth_bytes": None if before is None or after is None else after - before,
    }


def _print(result: dict[str, Any]) -> None:
    report, growth = result["report"], result["growth_bytes"]
    total, settings = report["total_bytes"], report["settings"]
    print(
        f"{report['tokens']} tokens at K{settings['bits_k']}/V{settings['bits_v']}, "
        f"{report['packed_tokens']} of them packed, the rest exact in {result['dtype']}\n"
    )
    per_head = result["bytes_per_sealed_token_layer_head"]
    if per_head is not None:
        print(f"A sealed token takes {per_head:g} bytes a layer and head.\n")
    allocated = result["allocated_bytes"]
    rows = [
        ["packed", report["packed_bytes"], ""],
        ["exact: sinks, window, waiting", report["exact_bytes"], ""],
        ["overhead", report["overhead_bytes"], ""],
        ["whole cache by its report", total, ""],
        ["by the allocator", allocated, f"{allocated - total:+} bytes from the report"],
    ]
    if report["basis_bytes"]:
        rows.append(["bases of keys, beside it", report["basis_bytes"], "shared by all caches"])
    if growth is not None:
        off = f"{100 * (growth / total - 1):+.1f} % from the report"
        rows.append(["growth of the process", growth, off])
    for dtype in ("bfloat16", "float32"):
        size = result[f"{dtype}_bytes"]
        rows.append([f"a {dtype} cache", size, f"of which the report is {percent(total / size)}"])
    print_table(["", "bytes", ""], [[name, f"{size:,}", note] for name, size, note in rows])
    print(
        "\nGrowth: resident memory after the fill less that before it; the model has run before "
        "both, and\nmemory that is free is given back to the system first."
    )
