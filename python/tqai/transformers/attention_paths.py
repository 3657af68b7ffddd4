"""How attention over packed tokens is computed in each layer of a model, found out by trying.

The model is built from its configuration, as large as it is but without weights (``shadow`` has
constants in their place), patched, and reads a tile of tokens and one more: layers whose codes that
one made come out decompressed are "dequantised", the others went through the kernel.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from tqai.settings import Settings
from tqai.transformers import hooks
from tqai.transformers.cache.layer import TqaiLayer
from tqai.transformers.model.devices import device_of
from tqai.transformers.model.names import cache_argument
from tqai.transformers.model.other_layers import is_recurrent
from tqai.transformers.model.shadow import with_constants

_TOKENS = 64
"""A tile."""
# What makes no difference to attention, and most of a model.
_VOCABULARY = 256
_WIDTH = 64
_WIDTHS = re.compile(r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|expert_dim)(_mlp)?|n_inner")


def attention_paths(config: Any, settings: Settings) -> list[str]:
    """Of each layer of the cache: "kernel", "dequantised", "exact" (left uncompressed),
    "recurrent" (it holds no keys and values) or "unused".

    `config`: of a causal language model. Costs a second or so, whatever the model's size.

    Raises:
        ValueError, NotImplementedError: as ``tqai.patch``.
        RuntimeError: for a model that cannot be run like this, saying why.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    _narrow(config.get_text_config(decoder=True))
    with _explained(config), _without_weights(), torch.random.fork_rng([]):
        model = with_constants(AutoModelForCausalLM.from_config(config).eval())
    # There are no weights that a codec could learn from; all codecs' keys are read alike.
    settings = replace(settings, sink_tokens=0, residual_window=0, codec="scalar")
    cache = hooks.install(model, settings)
    with _explained(config):
        return _read(model, cache)


def _narrow(config: Any) -> None:
    """Makes what is not attention small."""
    config.pad_token_id = 0
    for name, value in list(vars(config).items()):
        if name.startswith("vocab_size"):
            setattr(config, name, _VOCABULARY)
        if _WIDTHS.fullmatch(name):
            if isinstance(value, int) and value > _WIDTH:
                setattr(config, name, _WIDTH)
            elif isinstance(value, (list, tuple)) and value:  # layer by layer
                setattr(config, name, [_WIDTH] * len(value))


@contextmanager
def _explained(config: Any) -> Iterator[None]:
    """Whatever a model's own code makes of weights that are not there is a RuntimeError."""
    try:
        yield
    except Exception as error:
        message = next(iter(str(error).splitlines()), type(error).__name__)
        raise RuntimeError(f"{type(config).__name__}: {message}") from error


@torch.no_grad()
def _read(model: Any, cache: Any) -> list[str]:
    text = torch.ones(1, _TOKENS, dtype=torch.long, device=device_of(model))
    model(text, **cache_argument(model, cache))
    decompressed: set[int] = set()
    tokens = [_tokens(layer) for layer in cache.layers]
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, TqaiLayer):
            _note_gathers(layer, index, decompressed)
    model(text[:, :1], **cache_argument(model, cache))

    def path(index: int, layer: Any) -> str:
        if is_recurrent(layer):
            return "recurrent"
        if not isinstance(layer, TqaiLayer):
            return "exact"
        if _tokens(layer) == tokens[index]:
            return "unused"
        return "dequantised" if index in decompressed else "kernel"

    return [path(index, layer) for index, layer in enumerate(cache.layers)]


def _tokens(layer: Any) -> int:
    return int(layer.get_seq_length()) if isinstance(layer, TqaiLayer) else 0


def _note_gathers(layer: TqaiLayer, index: int, decompressed: set[int]) -> None:
    gather = layer.gather

    def noting(*args: Any, **kwargs: Any) -> Any:
        decompressed.add(index)
        return gather(*args, **kwargs)

    vars(layer)["gather"] = noting


@contextmanager
def _without_weights() -> Iterator[None]:
    """Parameters of modules that are made inside have shapes alone; buffers have numbers."""

    def to_meta(module: Any, name: str, parameter: Any) -> Any:
        if parameter is None or parameter.device.type == "meta":
            return None
        return torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()
