"""English prose for measurements, from what every Python carries, and questions about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def frame(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str = ""
) -> tuple[list[int], list[int]]:
    """Token ids to put before and after a text, so that a user gives it and asks the question.

    In the model's chat template, if it has one. `answer`: what the answer begins with.
    """
    mark = "@text@"
    whole = f"{mark}\n\n{question}"
    if tokenizer.chat_template:
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": whole}], tokenize=False, add_generation_prompt=True
        )
    elif answer:
        whole += " "
    head, _, tail = (whole + answer).partition(mark)
    # A template has the special tokens of its own.
    before = tokenizer(head, add_special_tokens=not tokenizer.chat_template).input_ids
    return before, tokenizer(tail, add_special_tokens=False).input_ids
