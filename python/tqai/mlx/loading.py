"""Loads the models that the command line works on, with mlx-lm."""

from __future__ import annotations

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
    loaded, tokenizer = mlx_lm.load(str(model))[:2]
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
