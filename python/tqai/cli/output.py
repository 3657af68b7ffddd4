"""How results are printed: a table or JSON on stdout; progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
