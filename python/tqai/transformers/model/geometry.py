"""What a model looks like to a cache: its decoder, its attention layers and their heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import transformers
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tqai.settings import Settings
from tqai.shapes.heads import Heads, Latents, check_head_dim
from tqai.shapes.rope import Rope
from tqai.transformers.model.constants import constants_of
from tqai.transformers.model.find_rope import find_ropes
from tqai.transformers.model.names import cache_name, takes
from tqai.transformers.model.other_layers import (
    HYBRIDS,
    has_more,
    holds_nothing,
    is_recurrent,
)
from tqai.transformers.model.parts import check_parts, keeper_of
from tqai.transformers.weights.identity import State, watch_of

_ATTENTION_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class Geometry:
    """The shape of a model's cache; equal for models whose caches have the same shape."""

    model: str = field(compare=False)
    """Name of the model's class."""
    config: Any = field(compare=False, repr=False)
    """The decoder's configuration, that transformers builds its own cache from."""
    heads: tuple[Heads | None, ...]
    """Of each layer; None where the model's modules do not say."""
    ropes: tuple[Rope | None, ...] = field(compare=False)
    """The rotary embedding of each layer's keys; None where none was recognised."""
    latents: tuple[Latents, ...] = field(compare=False)
    """What each layer would cache if it cached latents."""
    constants: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What the model computes with beside its weights."""
    turns: Any = field(default=None, compare=False, repr=False)
    """The frequencies that the model's rotary modules had."""
    decoder: ref[torch.nn.Module] | None = field(default=None, compare=False, repr=False)
    """The module that it is the geometry of; None in what was pickled."""

    @property
    def identity(self) -> str:
        """Tells weights apart, also in other processes: a digest of all that the model has now.

        Raises:
            ValueError: where the model is gone.
        """
        return self.weights().identity(afresh=True).digest()

    def weights(self) -> State:
        """The weights that the model has now.

        Raises:
            ValueError: where the model is gone.
        """
        decoder = None if self.decoder is None else self.decoder()
        if decoder is None:
            raise ValueError(f"the {self.describe()} that this cache was made for is gone")
        return watch_of(decoder).now()

    def is_alive(self) -> bool:
        """Whether the model is there still."""
        return self.decoder is not None and self.decoder() is not None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "decoder": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Geometry:
        return self

    def describe(self) -> str:
        """As in "LlamaForCausalLM (4 layers, 2 key/value heads of 16)"."""
        text = f"{len(self.heads)} layers"
        known = [heads for heads in self.heads if heads is not None]
        if known:
            text += f", {known[0].count} key/value heads of {known[0].dim}"
        return f"{self.model} ({text})"


_geometries: WeakKeyDictionary[torch.nn.Module, Geometry] = WeakKeyDictionary()


def geometry_of(model: PreTrainedModel, afresh: bool = False) -> Geometry:
    """The geometry of `model`, or of the model that `model` is the decoder of.

    afresh: also where it is known, looks whether the rotary embedding is another one now.
    """
    known = _geometries.get(model)
    if known is not None and not afresh:  # a decoder, which is its own
        return known
    decoder = model if known is not None else decoder_of(model)
    watch_of(decoder).surround(model)
    known = _geometries.get(decoder)
    turns = watch_of(decoder).now().turns if afresh or known is None else known.turns
    if known is None or (turns is not None and turns != known.turns):
        config = config_of(model)
        name = type(keeper_of(model)).__name__
        layers = len(_own_layers(name, config))
        heads, ropes = _heads(decoder, layers), find_ropes(decoder, config, layers)
        latents = _latents(decoder, layers)
        constants = constants_of(config)
        _geometries[decoder] = Geometry(
            name, config, heads, ropes, latents, constants, turns, ref(decoder)
        )
    return _geometries[decoder]


def decoder_of(model: torch.nn.Module) -> torch.nn.Module:
    """The module whose forward takes the cache: the model without its head."""
    model = keeper_of(model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is not None and cache_name(decoder) is None:
        decoder = model.base_model  # some models call the layer before the vocabulary a decoder
    if decoder is None or decoder is model:
        # SpeechT5 calls what is inside a wrapper by itself.
        inside = [child for child in model.children() if isinstance(child, PreTrainedModel)]
        if len(inside) != 1 or cache_name(inside[0]) is None:
            return model
        decoder = inside[0]
    # What a composed model calls its decoder may be a whole model, with a head of its own.
    return decoder_of(decoder)


def config_of(model: PreTrainedModel) -> Any:
    """The configuration of the decoder, that its cache is built from."""
    model = keeper_of(model)
    # That of a whole encoder-decoder model may count the encoder's layers.
    owner = decoder_of(model) if is_encoder_decoder(model) else model
    return owner.config.get_text_config(decoder=True)


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Whether the model's decoder reads an encoder's output, and caches that too."""
    config = getattr(keeper_of(model), "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


def reads_encoder(decoder: torch.nn.Module) -> bool:
    """Whether the decoder has layers for an encoder's output, and takes it in its forward call."""
    if not takes(decoder, "encoder_hidden_states"):
        return False
    names = (name.rpartition(".")[2] for name, _ in decoder.named_modules())
    return any(name in ("crossattention", "cross_attn", "encoder_attn") for name in names)


def check_model(model: Any, settings: Settings) -> None:
    """Raises ValueError or NotImplementedError where `model` cannot be patched."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"tqai takes a transformers PreTrainedModel; got {type(model).__name__}{_advice(model)}"
        )
    if settings.backend == "mlx-ops":
        raise NotImplementedError(
            "backend='mlx-ops' is for mlx-lm's models; for transformers' use backend='auto', or "
            "'torch-ops' for torch operations everywhere"
        )
    check_parts(model)
    name = type(keeper_of(model)).__name__
    decoder = decoder_of(model)
    if not hasattr(decoder, "config"):
        raise NotImplementedError(
            f"{name}: its {type(decoder).__name__} has no configuration of its own, so tqai cannot "
            "tell what cache it needs"
        )
    split = getattr(model, "_tp_size", None)
    if isinstance(split, int) and split > 1:
        raise NotImplementedError(
            f"{name}: its heads are split over {split} processes (tensor parallelism), and tqai "
            "compresses caches of whole models; FSDP, which brings weights together, is fine"
        )
    config = config_of(model)
    if not _has_attention(model, decoder, config):
        raise ValueError(f"{name} has no causal attention layers; its layers are {_kinds(decoder)}")
    default_cache = getattr(type(model), "_supports_default_dynamic_cache", lambda: True)
    if cache_name(decoder) is None or not default_cache() or _is_early_hybrid(config):
        advice = ""
        if not HYBRIDS:
            advice = (
                f" with transformers {transformers.__version__}; those with recurrent layers have "
                "one that it can from transformers 5.5 on: pip install -U transformers"
            )
        raise NotImplementedError(
            f"{name} keeps a cache of its own kind, which tqai cannot replace{advice}"
        )
    _check_layers(name, decoder, config, settings)


def _is_early_hybrid(config: Any) -> bool:
    """Whether there are recurrent layers, and the version of transformers has no cache for them."""
    kinds = getattr(config, "layer_types", None) or ()
    return not HYBRIDS and any(kind not in _ATTENTION_TYPES for kind in kinds)


def _advice(model: Any) -> str:
    """What to do with something that is no model."""
    if isinstance(model, str):
        return f": load it first, AutoModelForCausalLM.from_pretrained({model!r})"
    if isinstance(getattr(model, "_orig_mod", None), PreTrainedModel):
        return ": patch the model before torch.compile"
    if isinstance(_base_model(model), PreTrainedModel):
        return ": patch the model inside, tqai.patch(model.get_base_model())"
    for name, value in {**getattr(model, "_modules", {}), **getattr(model, "__dict__", {})}.items():
        if isinstance(value, PreTrainedModel):
            return f": patch its .{name}"
    return ""


def _base_model(model: Any) -> Any:
    """What a PeftModel of any kind is around; its attributes depend on the kind."""
    return model.get_base_model() if hasattr(type(model), "get_base_model") else None


def _check_layers(name: str, decoder: torch.nn.Module, config: Any, settings: Settings) -> None:
    layers = _own_layers(name, config)
    skipped = settings.skipped(len(layers))
    unknown = [
        index
        for index, layer in enumerate(layers)
        if index not in skipped
        and not (is_compressible(layer) or is_recurrent(layer) or holds_nothing(layer))
    ]
    if unknown:
        kind = type(layers[unknown[0]]).__name__
        skip = sorted(skipped.union(unknown))
        rest = [index for index, layer in enumerate(layers) if is_compressible(layer)]
        if set(rest) <= skipped:
            advice = ", nor any other layer of it"
        else:
            advice = f": leave such layers exact with skip_layers={skip}"
        raise NotImplementedError(
            f"layer {unknown[0]} of {name} has a cache of type {kind}, which tqai cannot compress"
            f"{advice}"
        )
    for index, heads in enumerate(_heads(decoder, len(layers))):
        if heads is not None and index not in skipped:
            check_head_dim(index, "keys", heads.dim)


def _own_layers(name: str, config: Any) -> list[Any]:
    """The layers of the cache that transformers would make for a model of this configuration."""
    try:
        return DynamicCache(config=config).layers
    except KeyError as error:
        raise NotImplementedError(
            f"{name} has layers of type {error}, for which transformers has no dynamic cache"
        ) from error


def is_compressible(layer: Any) -> bool:
    """Whether a layer of transformers' DynamicCache is one that ``TqaiLayer`` replaces."""
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) or has_more(layer)


def _has_attention(model: PreTrainedModel, decoder: torch.nn.Module, config: Any) -> bool:
    if not getattr(config, "num_attention_heads", None):
        return False
    layers = _own_layers(type(model).__name__, config)
    if all(is_recurrent(layer) or holds_nothing(layer) for layer in layers):
        return False
    causal = any(getattr(module, "is_causal", False) is True for module in decoder.modules())
    return causal or model.can_generate()


def _kinds(decoder: torch.nn.Module) -> str:
    """The classes of the decoder's layers, as in "2 × MambaBlock"."""
    lists = [m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 0]
    longest = max(lists, key=len, default=decoder.children())
    counts = Counter(type(layer).__name__ for layer in longest)
    return ", ".join(f"{count} × {kind}" for kind, count in counts.items())


def _heads(decoder: torch.nn.Module, layers: int) -> tuple[Heads | None, ...]:
    """The key/value heads of each layer, read off attention modules of the usual make."""
    found: dict[int, set[Heads | None]] = {}
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        dim = getattr(module, "head_dim", None)
        width = getattr(getattr(module, "k_proj", None), "out_features", None)
        if isinstance(index, int) and isinstance(dim, int) and isinstance(width, int):
            whole = dim > 0 and width % dim == 0
            found.setdefault(index, set()).add(Heads(width // dim, dim) if whole else None)
    candidates = (found.get(index, set()) for index in range(layers))
    return tuple(next(iter(heads)) if len(heads) == 1 else None for heads in candidates)


def _latents(decoder: torch.nn.Module, layers: int) -> tuple[Latents, ...]:
    """Widths of the latent and the rotary key that each layer may cache.

    Such a layer has one projection that makes both, and another that makes keys and values of the
    latent. Which pair of its projections that is, if any, the shapes of what it caches will tell.
    """
    outputs: list[set[int]] = [set() for _ in range(layers)]
    inputs: list[set[int]] = [set() for _ in range(layers)]
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        if type(index) is not int or not 0 <= index < layers:
            continue
        for child in module.children():
            width, latent = (
                getattr(child, "out_features", None),
                getattr(child, "in_features", None),
            )
            if isinstance(width, int) and isinstance(latent, int):
                outputs[index].add(width)
                inputs[index].add(latent)
    return tuple(
        frozenset((latent, width - latent) for width in wide for latent in narrow if latent < width)
        for wide, narrow in zip(outputs, inputs, strict=True)
    )
