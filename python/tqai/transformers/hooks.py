"""What ``patch`` puts on a model, and how ``unpatch`` takes it off again.

- each distinct config of the model gets tqai's attention implementation;
- the model's ``_prepare_cache_for_generation`` makes a compressed cache in place of DynamicCache;
- a pre-hook on the decoder gives a compressed cache to a plain forward call, and refuses another
  model's;
- ``init_continuous_batching`` says that it does not go with a compressed cache.

All of it lives on the instance, in a way that ``copy.deepcopy(model)`` copies rightly; nothing is
serialised with the config.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from tqai.settings import Settings
from tqai.transformers import attention, names
from tqai.transformers.cache import TqaiCache
from tqai.transformers.encoder_decoder import TqaiEncoderDecoderCache
from tqai.transformers.geometry import check_model, decoder_of, geometry_of, is_encoder_decoder
from tqai.transformers.original_attention import original_name, patched_name

_STATE = "_tqai_patch"
_patched: WeakSet[PreTrainedModel] = WeakSet()


class _Patch(NamedTuple):
    """What a patched model carries."""

    settings: Settings
    configs: list[Any]
    """The configs whose attention implementation was changed."""
    overrides: list[str]
    """Methods that the instance shadows."""


def install(model: PreTrainedModel, settings: Settings) -> TqaiCache | TqaiEncoderDecoderCache:
    """Patches `model`, or gives a patched one new settings; returns a fresh cache.

    Raises:
        ValueError, NotImplementedError: see ``tqai.patch``; the model is as before.
    """
    check_model(model, settings)
    configs = _configs(model)
    names = [patched_name(config._attn_implementation) for config in configs]
    cache = make_cache(model, settings)

    if _state(model) is not None:
        remove(model)
    attention.register()
    for config, name in zip(configs, names, strict=True):
        config._attn_implementation_internal = name
    decoder_of(model).register_forward_pre_hook(_CacheHook(settings), with_kwargs=True)
    overrides = {
        "_prepare_cache_for_generation": _prepare_cache_for_generation,
        "init_continuous_batching": _refuse_continuous_batching,
    }
    overrides = {name: f for name, f in overrides.items() if hasattr(type(model), name)}
    for name, function in overrides.items():
        model.__dict__[name] = MethodType(function, model)
    model.__dict__[_STATE] = _Patch(settings, configs, list(overrides))
    _patched.add(model)
    return cache


def remove(model: PreTrainedModel) -> None:
    """Undoes ``install``.

    Raises:
        ValueError: when `model` is not patched.
    """
    state = _require_state(model)
    _patched.discard(model)
    for name in state.overrides:
        del model.__dict__[name]
    hooks = decoder_of(model)._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _CacheHook)]:
        del hooks[key]
        decoder_of(model)._forward_pre_hooks_with_kwargs.pop(key, None)
    # A config may serve several models; it stays tqai's while one of them is patched.
    others = [config for other in _patched for config in other.__dict__[_STATE].configs]
    for config in state.configs:
        if not any(config is other for other in others):
            config._attn_implementation_internal = original_name(config._attn_implementation)
    del model.__dict__[_STATE]


def fresh_cache(model: PreTrainedModel) -> TqaiCache | TqaiEncoderDecoderCache:
    """A cache with the settings that `model` was patched with.

    Raises:
        ValueError: when `model` is not patched.
    """
    return make_cache(model, settings_of(model))


def make_cache(
    model: PreTrainedModel, settings: Settings, sliding: bool = True
) -> TqaiCache | TqaiEncoderDecoderCache:
    """An empty cache of the kind that `model` takes, patched or not."""
    kind = TqaiEncoderDecoderCache if is_encoder_decoder(model) else TqaiCache
    return kind(geometry_of(model), settings, sliding)


def settings_of(model: PreTrainedModel) -> Settings:
    """The settings that `model` was patched with.

    Raises:
        ValueError: when `model` is not patched.
    """
    return _require_state(model).settings


def _state(model: Any) -> _Patch | None:
    return getattr(model, "__dict__", {}).get(_STATE)


def _require_state(model: Any) -> _Patch:
    state = _state(model)
    if state is None and not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"expected the transformers model that was patched; got {type(model).__name__}"
        )
    if state is None:
        raise ValueError(
            f"this {type(model).__name__} is not patched; call tqai.patch(model) first"
        )
    return state


def _configs(model: PreTrainedModel) -> list[Any]:
    """The distinct configs of the model's parts whose attention implementation can be chosen.

    Models whose attention does not go through the interface are left alone; there the views are
    dequantised.
    """
    if not type(model)._can_set_attn_implementation():
        return []
    configs = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) is not None:
            configs[id(config)] = config
    return list(configs.values())


class _CacheHook:
    """Forward pre-hook of a decoder: gives it a compressed cache where it would make its own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __call__(
        self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = names.given(decoder, args, kwargs)
        cache = given.get(str(names.cache_name(decoder)))
        cross = given.get("encoder_hidden_states") is not None
        if isinstance(cache, (TqaiCache, TqaiEncoderDecoderCache)):
            cache.check_model(geometry_of(decoder))
        if isinstance(cache, TqaiCache) and cross:
            raise ValueError(
                f"{type(decoder).__name__} reads an encoder's output, and a TqaiCache has no place "
                "for it: pass a tqai.TqaiEncoderDecoderCache, as tqai.new_cache(model) makes for "
                "an encoder-decoder model, or no cache"
            )
        if cache is not None or decoder.training or not _uses_cache(decoder, given):
            return None
        kind = TqaiEncoderDecoderCache if cross else TqaiCache
        fresh = kind(geometry_of(decoder), self.settings)
        return names.with_cache(decoder, args, kwargs, fresh)


def _uses_cache(decoder: torch.nn.Module, given: dict[str, Any]) -> bool:
    use_cache = given.get("use_cache")
    return bool(getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache)


def _prepare_cache_for_generation(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Replaces the DynamicCache that transformers makes, unless the user passed or chose one."""
    method = type(self)._prepare_cache_for_generation
    arguments = (*args, *kwargs.values())
    config = next(value for value in arguments if isinstance(value, GenerationConfig))
    model_kwargs = next(value for value in arguments if isinstance(value, dict))
    name = names.generate_name()
    given = model_kwargs.get(name)
    if given is not None:
        _check_given(self, given, config, model_kwargs)
    if isinstance(given, TqaiEncoderDecoderCache):
        # Some models' own methods replace the half that is the encoder's.
        method = GenerationMixin._prepare_cache_for_generation
    result = method(self, *args, **kwargs)
    made = model_kwargs.get(name)
    if given is not None:
        return result
    kind: type[TqaiCache] | type[TqaiEncoderDecoderCache] = TqaiCache
    if type(made) is EncoderDecoderCache:
        kind, made = TqaiEncoderDecoderCache, made.self_attention_cache
    if type(made) is DynamicCache and not made.offloading:
        # For rollbacks, transformers 4 makes a cache without a config, whose layers forget nothing.
        cache = kind(geometry_of(self), _require_state(self).settings, bool(made.layers))
        if getattr(config, "is_assistant", False):
            cache.activate_past_recording()
        model_kwargs[name] = cache
    return result


def _check_given(
    model: PreTrainedModel, cache: Any, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> None:
    """Raises ValueError for what cannot go on as `model`'s cache."""
    if not isinstance(cache, (Cache, tuple)):
        given = cache.__name__ if isinstance(cache, type) else repr(cache)
        raise ValueError(
            f"{names.generate_name()}={given}: expected a cache, as tqai.new_cache(model) makes "
            "them"
        )
    if not isinstance(cache, TqaiCache) or is_encoder_decoder(model):
        return
    # The ids are not at hand here; their mask is as long, or its length is known where all is seen.
    mask = model_kwargs.get("attention_mask")
    known = getattr(config, "_mask_length", None)
    length = mask.shape[-1] if isinstance(mask, torch.Tensor) and mask.ndim == 2 else known
    embeds = model_kwargs.get("inputs_embeds")
    if embeds is None and length is not None and 0 < length <= cache.get_seq_length():
        raise ValueError(
            f"the cache has read {cache.get_seq_length()} tokens and generate() got {length}: it "
            "takes all of them, those that the cache has read first, then new ones; for another "
            "text make a cache with tqai.new_cache(model)"
        )


def _refuse_continuous_batching(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(attention.CONTINUOUS_BATCHING)
