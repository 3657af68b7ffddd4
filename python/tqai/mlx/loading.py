"""Loads the models that the command line works on, with mlx-lm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm

from tqai.settings import DTYPES, Dtype


def load(model: str | Path | None, dtype: Dtype = "float32") -> tuple[Any, Any]:
    """A model in `dtype`, one of `DTYPES`, and its tokenizer; `model`: a folder or hub id.

    Raises:
        ValueError: for what mlx-lm does not load.
        OSError: for what is not there.
    """
    check_name(model)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    loaded, tokenizer = mlx_lm.load(str(model), model_config=_rope_of_old(Path(str(model))))[:2]
    loaded.set_dtype(getattr(mx, dtype))
    mx.eval(loaded.parameters())
    return loaded, tokenizer


def check_name(model: str | Path | None) -> None:
    """Raises ValueError for what mlx-lm does not load, as far as the name tells."""
    if model is None or str(model).endswith(".gguf"):
        raise ValueError(
            "mlx-lm loads no .gguf files, as the default model is one: name a folder or hub id "
            "with --model"
        )
    path = Path(model)
    if not path.exists() and (path.is_absolute() or str(model).startswith((".", "~"))):
        raise ValueError(f"no such folder: {model}")


def _rope_of_old(folder: Path) -> dict[str, Any]:
    """What transformers 5 writes into a configuration as ``rope_parameters``, under the names of
    before, which mlx-lm's models read; they take a base of their own otherwise, and are wrong
    without a word. {}: for what is no folder, or has the old names, or a set for each kind of
    layer, of which Gemma 3's have mlx-lm's bases."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope or "rope_theta" in config:
        return {}
    renamed = {"rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        renamed["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return renamed
