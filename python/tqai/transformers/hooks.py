"""What ``patch`` puts on a model, and how ``unpatch`` takes it off again.

- a pre-hook on the decoder gives a compressed cache to a plain forward call, and refuses another
  model's; it has the settings, and so is what makes a model a patched one;
- a pre-hook on its rotary modules sees the positions that keys are turned by;
- each distinct config of the decoder gets tqai's attention implementation, at ``patch`` and, where
  the model or its user has chosen another since, before each pass;
- the model's ``_prepare_cache_for_generation`` makes a compressed cache in place of DynamicCache;
- ``init_continuous_batching`` gives each request a compressed cache (``serving``).

A model and the model inside it that is its decoder have one patch: either may be patched, patched
again with other settings, and unpatched. ``generate`` makes compressed caches once the model that
has it is patched; where it calls an inner model's (``parts``), that one is patched.

All of it lives on the instance, in a way that ``copy.deepcopy(model)`` and ``pickle`` copy rightly;
nothing is serialised with the config.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakSet, ref

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from tqai.remarks import remark_on
from tqai.settings import Settings
from tqai.transformers.attention import compiled
from tqai.transformers.attention import functions as attention
from tqai.transformers.attention.original import (
    PATCHED_NAMES,
    PatchedName,
    configs_of,
    learn,
    original_name,
    patched_name,
)
from tqai.transformers.basis.bases import Bases
from tqai.transformers.cache.cache import TqaiCache
from tqai.transformers.cache.encoder_decoder import TqaiEncoderDecoderCache
from tqai.transformers.model import names
from tqai.transformers.model.geometry import (
    check_model,
    decoder_of,
    geometry_of,
    is_encoder_decoder,
    reads_encoder,
)
from tqai.transformers.model.parts import parts_of
from tqai.transformers.model.positions import ARGUMENT, MASK, Turned, TurnWatch
from tqai.transformers.serving.requests import requests_of

_patched: WeakSet[torch.nn.Module] = WeakSet()
"""The decoders that have a hook."""
_overridden: WeakSet[PreTrainedModel] = WeakSet()
"""The models that have methods of ours."""
_lock = threading.Lock()
"""Of these two: threads may patch models of their own. What is in them may be half made, as models
are that another thread copies."""


def install(model: PreTrainedModel, settings: Settings) -> TqaiCache | TqaiEncoderDecoderCache:
    """Patches `model`, or gives a patched one new settings; returns a fresh cache.

    Raises:
        ValueError, NotImplementedError: see ``tqai.patch``; the model is as before.
    """
    parts = parts_of(model)
    for part in parts[1:]:
        check_model(part, settings)
    check_model(model, settings)
    caches = [make_cache(part, settings) for part in parts]
    configs = [configs_of(decoder_of(part)) for part in parts]  # raises for what has no kernel
    for part, own, cache in zip(parts, configs, caches, strict=True):
        _install(part, cache.settings, own, inner=part is not model)
    return caches[0]


def _install(model: PreTrainedModel, settings: Settings, configs: list[Any], inner: bool) -> None:
    decoder = decoder_of(model)
    before = _hook_of(decoder)
    if before is not None:
        before.remove()
    hook = _CacheHook(settings, configs, decoder)
    hook.said = set() if inner else None
    try:
        hook.install()
        hook.set_names()
    except BaseException:  # an interrupt
        hook.remove()
        if before is not None:
            before.install()
            before.set_names()
        raise
    for name, function in _OVERRIDES.items():
        if hasattr(type(model), name):
            model.__dict__[name] = _Override(name, function, model)
    _drop_manager(model)


def remove(model: PreTrainedModel) -> None:
    """Undoes ``install``, of `model` and of any model around the same decoder.

    Raises:
        ValueError: when `model` is not patched.
    """
    _require_hook(model)
    for part in parts_of(model):
        hook = _hook_of(decoder_of(part))
        if hook is not None:
            _remove(hook)


def _remove(hook: _CacheHook) -> None:
    with _lock:
        overridden = list(_overridden)
    for model in overridden:
        try:
            decoder = decoder_of(model)
        except AttributeError:  # half made
            continue
        if decoder is hook.decoder:
            _drop_manager(model)
            for name in [name for name, own in vars(model).items() if isinstance(own, _Override)]:
                del vars(model)[name]
            with _lock:
                _overridden.discard(model)
    hook.remove()


def _drop_manager(model: PreTrainedModel) -> None:
    """Ends the manager of continuous batching that a model keeps (``persistent_manager``): its
    requests have caches of the kind that the model had then."""
    if vars(model).get("_cached_continuous_batching_manager") is not None:
        model.destroy_cached_continuous_batching_manager()


def override(model: PreTrainedModel, name: str, function: Callable[..., Any]) -> None:
    """Puts `function`, which takes the model first, in the place of a patched model's method, until
    it is dropped or the model unpatched.

    Raises:
        ValueError: when `model` is not patched.
    """
    _require_hook(model)
    model.__dict__[name] = _Override(name, function, model)


def override_of(model: PreTrainedModel, name: str) -> Callable[..., Any] | None:
    """What stands in the place of a method; None: the method itself."""
    own = vars(model).get(name)
    return own.function if isinstance(own, _Override) else None


def drop_override(model: PreTrainedModel, name: str) -> None:
    """Takes away what ``override`` put in the place of a method."""
    if override_of(model, name) is not None:
        del vars(model)[name]


def fresh_cache(model: PreTrainedModel) -> TqaiCache | TqaiEncoderDecoderCache:
    """A cache with the settings that `model` was patched with.

    Raises:
        ValueError: when `model` is not patched.
    """
    return make_cache(model, settings_of(model))


def make_cache(
    model: PreTrainedModel, settings: Settings, sliding: bool = True, bases: Bases | None = None
) -> TqaiCache | TqaiEncoderDecoderCache:
    """An empty cache of the kind that `model` takes, patched or not.

    bases: what keys are quantised in; None: what the settings say.
    """
    cross = is_encoder_decoder(model) or reads_encoder(decoder_of(model))
    kind = TqaiEncoderDecoderCache if cross else TqaiCache
    return kind(geometry_of(model, afresh=True), settings, sliding, bases)


def settings_of(model: PreTrainedModel) -> Settings:
    """The settings that `model` was patched with.

    Raises:
        ValueError: when `model` is not patched.
    """
    return _require_hook(model).settings


def is_patched(model: Any) -> bool:
    """Whether `model` was patched; what is no model was not."""
    return isinstance(model, PreTrainedModel) and _hook_of(decoder_of(model)) is not None


def _hook_of(decoder: torch.nn.Module) -> _CacheHook | None:
    hooks = list(vars(decoder).get("_forward_pre_hooks", {}).values())
    return next((hook for hook in hooks if isinstance(hook, _CacheHook)), None)


def _require_hook(model: Any) -> _CacheHook:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"expected the transformers model that was patched; got {type(model).__name__}"
        )
    hook = _hook_of(decoder_of(model))
    if hook is None:
        raise ValueError(
            f"this {type(model).__name__} is not patched; call tqai.patch(model) first"
        )
    return hook


class _CacheHook:
    """Forward pre-hook of a decoder: gives it a compressed cache where it would make its own."""

    def __init__(self, settings: Settings, configs: list[Any], decoder: torch.nn.Module) -> None:
        self.settings = settings
        self.configs = configs
        """Those whose attention implementation is tqai's."""
        self.named: list[str | None] = [None] * len(configs)
        """tqai's own name, of those whose user has given it, for caches made by hand."""
        self._decoder = ref(decoder)
        self.said: set[str] | None = None
        """Kinds of caches remarked on, where each is once enough: a model around this one may call
        its ``generate`` for each token."""
        self.turns = TurnWatch()

    @property
    def decoder(self) -> torch.nn.Module:
        """The module that has this hook: it is held by that, and would keep it alive otherwise."""
        decoder = self._decoder()
        assert decoder is not None
        return decoder

    def install(self) -> None:
        self.turns.install(self.decoder)
        self.decoder.register_forward_pre_hook(self, with_kwargs=True)
        self.decoder.register_forward_hook(_end_pass, prepend=True, with_kwargs=True)
        self._make_known()
        for module in self.decoder.modules():
            implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
            if implementation in PATCHED_NAMES and hasattr(module, "layer_idx"):
                learn(original_name(implementation), module)

    def remove(self) -> None:
        """Takes the hook off, and puts the configs back as they were."""
        with _lock:
            _patched.discard(self.decoder)
        self.turns.remove(self.decoder)
        hooks = self.decoder._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key]
            self.decoder._forward_pre_hooks_with_kwargs.pop(key, None)
        after = self.decoder._forward_hooks
        for key in [key for key, hook in after.items() if hook is _end_pass]:
            del after[key]
            self.decoder._forward_hooks_with_kwargs.pop(key, None)
        # A config may serve several models; it stays tqai's while one of them is patched.
        with _lock:
            patched = list(_patched)
        hooked = map(_hook_of, patched)
        others = [config for hook in hooked if hook is not None for config in hook.configs]
        for config, named in zip(self.configs, self.named, strict=True):
            if not any(config is other for other in others):
                name = named or original_name(config._attn_implementation)
                config._attn_implementation_internal = name

    def set_names(self) -> None:
        """Makes tqai stand before the attention that the configs ask for.

        Raises:
            NotImplementedError: where that is one that tqai does not stand before.
        """
        for at, config in enumerate(self.configs):
            name = config._attn_implementation
            if type(name) is not PatchedName:
                self.named[at] = name if name in PATCHED_NAMES.values() else None
                if str(name).startswith("paged|"):
                    raise NotImplementedError(attention.CONTINUOUS_BATCHING)
                config._attn_implementation_internal = patched_name(name)

    def _make_known(self) -> None:
        attention.register()
        with _lock:
            _patched.add(self.decoder)
        self.handle = compiled.handle_of(self)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        del state["handle"]
        state["_decoder"] = self.decoder
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For a copied model, and for one that comes from another process."""
        vars(self).update(state, _decoder=ref(state["_decoder"]))
        self._make_known()

    def __call__(
        self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if compiled.is_tracing():
            return self._traced(decoder, args, kwargs)
        if _is_transformed():  # its tensors have no numbers to be kept
            return None
        self.set_names()
        given = names.given(decoder, args, kwargs)
        cache = given.get(str(names.cache_name(decoder)))
        cross = given.get("encoder_hidden_states") is not None
        turned = self.turns.begin(given.get(ARGUMENT), given.get(MASK))
        if isinstance(cache, (TqaiCache, TqaiEncoderDecoderCache)):
            cache.check_model(geometry_of(decoder))
        if isinstance(cache, TqaiCache) and cross:
            raise ValueError(
                f"{type(decoder).__name__} reads an encoder's output, and a TqaiCache has no place "
                "for it: pass a tqai.TqaiEncoderDecoderCache, as tqai.new_cache(model) makes for "
                "an encoder-decoder model, or no cache"
            )
        if isinstance(cache, (TqaiCache, TqaiEncoderDecoderCache)):
            cache.begin_pass(decoder)
        requests = requests_of(cache)
        if requests is not None:
            requests.begin_pass(decoder)
            return None
        if any(kind.__name__ == "PagedAttentionCache" for kind in type(cache).__mro__):
            raise NotImplementedError(attention.CONTINUOUS_BATCHING)
        if cache is not None and not decoder.training and not _is_compressed(cache):
            remark_on(
                cache,
                f"{type(decoder).__name__} was given a {type(cache).__name__}",
                f"Leave {names.cache_name(decoder)} out, or pass tqai.new_cache(model). Where "
                "generate() of a model around this one made it, patch that model; prefix tuning "
                "always brings a cache of its own.",
                self.said,
            )
        _hand_over(cache, turned)
        if cache is not None or decoder.training or not _uses_cache(decoder, given):
            return None
        kind = TqaiEncoderDecoderCache if cross else TqaiCache
        fresh = kind(geometry_of(decoder, afresh=True), self.settings)
        fresh.begin_pass(decoder)
        _hand_over(fresh, turned)
        return names.with_cache(decoder, args, kwargs, fresh)

    def _traced(
        self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """As Dynamo sees it: what goes with the model is looked at when the graph runs."""
        caches = [given for given in (*args, *kwargs.values()) if type(given) is TqaiCache]
        if len(caches) == 1 and kwargs.get("encoder_hidden_states") is None:
            compiled.begin(caches[0], self, kwargs.get(ARGUMENT), kwargs.get(MASK))
            return None
        if decoder.training or kwargs.get("use_cache") is False:
            return None
        return compiled.outside(self, decoder, args, kwargs)

    def begin(
        self, cache: TqaiCache, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> None:
        """What a compiled pass over `cache` begins with."""
        self.set_names()
        cache.check_model(geometry_of(self.decoder))
        cache.begin_pass(self.decoder)
        cache.turned = self.turns.begin(positions, mask)


def _end_pass(
    decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Forward hook of a decoder: tells the cache that the pass has ended."""
    if compiled.is_tracing():
        for given in (*args, *kwargs.values()):
            if type(given) is TqaiCache:
                compiled.end(given)
        return
    cache = names.given(decoder, args, kwargs).get(str(names.cache_name(decoder)))
    if isinstance(cache, (TqaiCache, TqaiEncoderDecoderCache)):
        cache.end_pass()
    requests = requests_of(cache)
    if requests is not None:
        requests.end_pass()


def _is_compressed(cache: Any) -> bool:
    # The user may have put a compressed one into transformers' pair.
    return isinstance(getattr(cache, "self_attention_cache", cache), TqaiCache)


def _hand_over(cache: Any, turned: Turned | None) -> None:
    """Tells a compressed cache what the pass that begins turns its keys by."""
    cache = getattr(cache, "self_attention_cache", cache)
    if isinstance(cache, TqaiCache):
        cache.turned = turned


def _is_transformed() -> bool:
    """Whether one of torch.func's transforms runs, as grad and vmap, which no public function of
    PyTorch's tells."""
    functorch = getattr(torch._C, "_functorch", None)
    innermost = getattr(functorch, "peek_interpreter_stack", lambda: None)
    return innermost() is not None


def _uses_cache(decoder: torch.nn.Module, given: dict[str, Any]) -> bool:
    use_cache = given.get("use_cache")
    return bool(getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache)


class _Override:
    """A function in the place of a method of one model.

    Unlike a bound method it can be pickled: those are found by name in their model's class. The
    model holds it, and would be kept alive by it otherwise.
    """

    def __init__(self, name: str, function: Callable[..., Any], model: PreTrainedModel) -> None:
        self.name = name
        self.function = function
        self._model = ref(model)
        with _lock:
            _overridden.add(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        if model is None:
            raise ValueError(
                f"{self.name} is of a model that is gone, and this is a copy.copy() of it: call "
                "tqai.patch(model) with the copy"
            )
        if _hook_of(decoder_of(model)) is None:  # a copy.copy() of it has been unpatched
            return getattr(type(model), self.name)(model, *args, **kwargs)
        return self.function(model, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "function": self.function, "model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.name, self.function = state["name"], state["function"]
        self._model = ref(state["model"])
        with _lock:
            _overridden.add(state["model"])


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
        if not _is_compressed(given):
            advice = f"Leave {name} out, or pass tqai.new_cache(model)."
            remark_on(given, f"generate() was given a {type(given).__name__}", advice)
        return result
    kind: type[TqaiCache] | type[TqaiEncoderDecoderCache] = TqaiCache
    if type(made) is EncoderDecoderCache:
        kind, made = TqaiEncoderDecoderCache, made.self_attention_cache
    elif model_kwargs.get("encoder_hidden_states") is not None:
        kind = TqaiEncoderDecoderCache
    if type(made) is DynamicCache and not made.offloading:
        # For rollbacks, transformers 4 makes a cache without a config, whose layers forget nothing.
        cache = kind(geometry_of(self, afresh=True), settings_of(self), bool(made.layers))
        if getattr(config, "is_assistant", False):
            cache.activate_past_recording()
        model_kwargs[name] = cache
    elif made is not None:
        chosen = getattr(config, "cache_implementation", None)
        what, advice = f"generate() made a {type(made).__name__}", "Pass tqai.new_cache(model)."
        if chosen is not None:
            what += f" for cache_implementation={chosen!r}"
            advice = "Leave that out, in the call and in model.generation_config."
        hook = _hook_of(decoder_of(self))
        remark_on(model_kwargs[name], what, advice, None if hook is None else hook.said)
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


def _init_continuous_batching(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """As transformers', with a compressed cache for each request."""
    from tqai.transformers.serving import paged  # transformers' part of it takes a while to import

    if is_encoder_decoder(self) or reads_encoder(decoder_of(self)):
        raise NotImplementedError(
            f"continuous batching has no place for an encoder's output, which "
            f"{type(self).__name__} reads: call generate()"
        )
    return paged.init_continuous_batching(lambda: fresh_cache(self), self, *args, **kwargs)


def _reorder_cache(self: PreTrainedModel, cache: Any, beam_idx: torch.Tensor) -> Any:
    """Reorders a compressed cache where a model's own method would make another of its tensors."""
    if not isinstance(cache, (TqaiCache, TqaiEncoderDecoderCache)):
        method = inspect.getattr_static(type(self), "_reorder_cache").__get__(self, type(self))
        return method(cache, beam_idx)
    # RAG has as many rows of a beam as documents.
    layers = getattr(cache, "self_attention_cache", cache).layers
    rows = next(layer.batch_size for layer in layers if hasattr(layer, "batch_size"))
    group = rows // len(beam_idx)
    within = torch.arange(group, device=beam_idx.device)
    cache.reorder_cache((beam_idx[:, None] * group + within).flatten())
    return cache


_OVERRIDES: dict[str, Callable[..., Any]] = {
    "_prepare_cache_for_generation": _prepare_cache_for_generation,
    "init_continuous_batching": _init_continuous_batching,
    "_reorder_cache": _reorder_cache,
}
