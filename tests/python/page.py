"""The tables of docs/transformers.md, which tests make, each between two marks.

With ``TQAI_WRITE_DOCS=1`` what differs is written; the text around the tables is written by hand.
"""

from __future__ import annotations

import os
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"


def made(name: str) -> str:
    """What stands between the marks of `name`.

    Raises:
        ValueError: where the page has none.
    """
    _, found, rest = PAGE.read_text(encoding="utf-8").partition(_begin(name))
    inside, closed, _ = rest.partition(_end(name))
    if not found or not closed:
        raise ValueError(f"{PAGE} has no place for {name!r}: {_begin(name)}{_end(name)}")
    return inside


def is_to_say(name: str, text: str) -> bool:
    """Whether `text` stands there already, or is to be written."""
    return is_written() or text in made(name)


def is_written() -> bool:
    return bool(os.environ.get("TQAI_WRITE_DOCS"))


def check(name: str, text: str) -> None:
    """Asserts that `text` stands between the marks of `name`, or puts it there."""
    old, new = made(name), f"\n{text.strip()}\n\n"
    if is_written() and old != new:
        whole = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(
            whole.replace(_begin(name) + old + _end(name), _begin(name) + new + _end(name)),
            encoding="utf-8",
        )
    assert made(name) == new, f"{PAGE} is out of date; TQAI_WRITE_DOCS=1 writes it"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown of a table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def _begin(name: str) -> str:
    return f"<!-- {name}: made by tests, TQAI_WRITE_DOCS=1 writes it -->\n"


def _end(name: str) -> str:
    return f"<!-- end of {name} -->\n"
