"""How results are printed: a table or JSON on stdout; progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def print_json(result: Any) -> None:
    print(json.dumps(result, indent=2, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """First column to the left, numbers to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int, str], None] | None]:
    """A progress bar's callback, for steps done, all steps and what is being done; None where tqdm,
    which transformers brings, is missing."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield None
        return
    # The delay keeps a user's error the only line.
    with tqdm(unit=unit, delay=0.1) as bar:

        def progress(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_description(what, refresh=False)
            bar.update(done - bar.n)

        yield progress
