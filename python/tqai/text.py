"""English prose for measurements, from what every Python carries."""

from __future__ import annotations


def prose() -> str:
    """The running text of `pydoc_data.topics`: headings, lists, code and grammar left out.

    About 170 000 characters; it differs a little between versions of Python.
    """
    from pydoc_data.topics import topics

    paragraphs = []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            lines = paragraph.strip("\n").split("\n")
            plain = not any(line.startswith(tuple(" *-=+|[~")) for line in lines)
            if plain and len(paragraph) >= 80 and "::=" not in paragraph:
                paragraphs.append(" ".join(line.strip() for line in lines))
    return "\n\n".join(paragraphs)
