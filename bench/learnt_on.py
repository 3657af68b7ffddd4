"""What it matters which text bases of keys are learnt on, measured as `tqai eval` measures.

    PYTHONPATH=python python bench/learnt_on.py FOLDER [--setting k4v2 k2v2] [--prefill 512]
        [--read 256] [--samples 4] [--rows 128] [--json]

A model reads Python code from one cache after another: by rotation (codec="trellis"), in bases that
are learnt on what the model itself writes (codec="adaptive", as `tqai.patch` has it), on English
prose and on other Python code. Of the texts, as many rows of 8 tokens are read as the model would
write itself, from all over the text. Both are of the Python that runs this.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import tokenize
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
from tqai.cli.evaluate import print_comparison
from tqai.cli.output import print_json, progress_bar
from tqai.measure.fidelity import evaluate
from tqai.measure.named_settings import NamedSetting
from tqai.measure.text import prose
from tqai.transformers.basis import bases, learn
from tqai.transformers.loading import load

_LEARNT = (argparse, tokenize)
"""Modules whose source bases are learnt on."""
_READ = (logging, subprocess)


class LearntOn(NamedSetting):
    """A setting of codec="adaptive" whose bases are learnt on rows of token ids [rows, tokens]."""

    def __init__(self, model: Any, setting: str, text: str, ids: torch.Tensor) -> None:
        self._ids = ids
        super().__init__(model, f"{setting},codec=adaptive")
        self.name = f"{setting}, learnt on {text}"

    @contextmanager
    def patched(self) -> Iterator[Any]:
        """See ``Candidate``."""
        bases._learnt.clear()  # which knows nothing of texts
        with (
            mock.patch.object(learn, "_writer_of", return_value=None),
            mock.patch.object(learn, "_random_ids", return_value=self._ids),
        ):
            with super().patched() as cache:
                yield cache
        bases._learnt.clear()


def rows_of(tokenizer: Any, text: str, rows: int) -> torch.Tensor:
    """Token ids [rows, tokens] from all over a text, after what the model's texts begin with."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    length = learn.ROW_TOKENS - len(first)
    stride = (len(ids) - length) // rows
    return torch.tensor([first + ids[at * stride : at * stride + length] for at in range(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--setting", nargs="+", default=["k4v2", "k2v2"], help="bits")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--read", type=int)
    parser.add_argument("--samples", type=int)
    counting = learn.ROW_TOKENS - learn.SINK_TOKENS
    parser.add_argument("--rows", type=int, default=learn.TOKENS // counting)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model, tokenizer = load(options.folder, "float32", None)
    learnt = {
        text: rows_of(tokenizer, whole, options.rows)
        for text, whole in (("prose", prose()), ("code", _sources(_LEARNT)))
    }
    settings: list[Any] = []
    for bits in options.setting:
        settings += [f"{bits},codec=trellis", f"{bits},codec=adaptive"]
        settings += [LearntOn(model, bits, text, ids) for text, ids in learnt.items()]
    with progress_bar("token") as progress:
        results = evaluate(
            model,
            tokenizer,
            _sources(_READ),
            settings,
            prefill=options.prefill,
            read=options.read,
            samples=options.samples,
            chunk=32,
            progress=progress,
        )
    if options.json:
        print_json([asdict(result) for result in results])
    else:
        print_comparison(results)


def _sources(modules: Iterable[Any]) -> str:
    texts = []
    for module in modules:
        with tokenize.open(module.__file__) as file:
            texts.append(file.read())
    return "\n".join(texts)


if __name__ == "__main__":
    main()
