"""What the demo asks a model, whatever the framework."""

from __future__ import annotations

import argparse
from typing import Any

from tqai.measure.text import frame, prose

QUESTION = "Explain, in a few sentences, what the assert statement does."
# More than sinks, window and a tile hold by default, so that nothing runs for the first time later.
WARM_UP_TOKENS = 320


def check_length(options: argparse.Namespace, limit: int | None) -> None:
    """Raises ValueError where prompt and answer are more than `limit`, what a model is for."""
    if limit is not None and options.context + options.tokens > limit:
        raise ValueError(
            f"--context {options.context} and --tokens {options.tokens} together: the model was "
            f"made for {limit} tokens"
        )


def prompt_ids(tokenizer: Any, length: int) -> list[int]:
    """`length` token ids: prose and a question about its beginning, as the model's chat template
    has it."""
    first, last = frame(tokenizer, QUESTION)
    text = tokenizer(prose(), add_special_tokens=False, verbose=False).input_ids
    count = length - len(first) - len(last)
    if not 1 <= count <= len(text):
        raise ValueError(
            f"--context {length}: expected {len(first) + len(last) + 1} to "
            f"{len(first) + len(last) + len(text)}"
        )
    return first + text[:count] + last
