"""What ``patch`` puts on an mlx-lm model, and how ``unpatch`` takes it off again.

- the model gets a ``make_cache`` of its own, which mlx-lm's ``make_prompt_cache`` asks, and so
  everything of mlx-lm's that generates; it has the settings, and so is what makes a model a patched
  one;
- it gets a class of its own, whose calls begin and end forward passes (``tqai.mlx.calls``);
- while any model is patched, tqai's attention function stands in the place of mlx-lm's, and a
  ``make_prompt_cache`` that knows what compressed caches cannot do in the place of that.
"""

from __future__ import annotations

import sys
from typing import Any
from weakref import ref

import mlx.nn as nn
from mlx_lm.models import cache as mlx_caches

from tqai.mlx import calls
from tqai.mlx.attention import functions, patching
from tqai.mlx.cache.prompt import TqaiPromptCache
from tqai.mlx.model.geometry import Geometry, geometry_of
from tqai.settings import Settings

_make_prompt_cache = mlx_caches.make_prompt_cache
_patched: dict[int, ref[_CacheMaker]] = {}
"""What stands in the place of models' ``make_cache``, by address; of copies of patched models from
their first cache on."""


class _CacheMaker:
    """In the place of a model's ``make_cache``."""

    def __init__(self, geometry: Geometry, settings: Settings, before: Any) -> None:
        self.geometry = geometry
        self.settings = settings
        self.before = before
        """What the model itself, not its class, had as ``make_cache``; None: nothing."""

    def compresses(self) -> bool:
        """Whether the caches have any compressed layer."""
        return self.geometry.compresses(self.settings)

    def __call__(self) -> TqaiPromptCache:
        _note(self)
        return TqaiPromptCache(self.geometry, self.settings)


def install(model: Any, settings: Settings) -> TqaiPromptCache:
    """Patches `model`, or gives a patched one new settings; returns a fresh cache.

    Raises:
        ValueError, NotImplementedError: see ``tqai.patch``; the model is as before.
    """
    settings = settings.without_bases()
    _check_settings(settings)
    maker = _maker_of(model)
    if maker is None:
        geometry = geometry_of(model, _own_caches(model))
        before = vars(model).get("make_cache")
    else:
        geometry, before = maker.geometry, maker.before
    geometry.check(settings)
    maker = _CacheMaker(geometry, settings, before)
    model.make_cache = maker
    calls.watch(model)
    return maker()


def _note(maker: _CacheMaker) -> None:
    """Has tqai's functions stand in the place of mlx-lm's as long as the maker is there."""
    key = id(maker)
    if key not in _patched:
        _patched[key] = ref(maker, lambda _: _forget(key))
    functions.install()
    patching.put(make_prompt_cache, _make_prompt_cache)


def _forget(key: int) -> None:
    """Called when a model is no longer patched, or no longer there."""
    _patched.pop(key, None)
    if not _patched and not sys.is_finalizing():
        functions.uninstall()
        patching.put(_make_prompt_cache, make_prompt_cache)


def remove(model: Any) -> None:
    """Undoes ``install``.

    Raises:
        ValueError: when `model` is not patched.
    """
    maker = _require_maker(model)
    calls.unwatch(model)
    del model.make_cache
    if maker.before is not None:
        model.make_cache = maker.before
    _forget(id(maker))


def fresh_cache(model: Any) -> TqaiPromptCache:
    """A cache with the settings that `model` was patched with.

    Raises:
        ValueError: when `model` is not patched.
    """
    return _require_maker(model)()


def settings_of(model: Any) -> Settings:
    """The settings that `model` was patched with.

    Raises:
        ValueError: when `model` is not patched.
    """
    return _require_maker(model).settings


def is_patched(model: Any) -> bool:
    """Whether `model` was patched; what is no model was not."""
    return _maker_of(model) is not None


def make_prompt_cache(model: nn.Module, max_kv_size: int | None = None) -> list[Any]:
    """mlx-lm's, for all models.

    Raises:
        NotImplementedError: for a size that a patched model's cache would not keep to.
    """
    maker = _maker_of(model)
    if maker is not None and max_kv_size is not None and not _makes_own(model, maker):
        raise NotImplementedError(
            f"max_kv_size={max_kv_size}: a compressed cache keeps all tokens; leave max_kv_size "
            "out, or call tqai.unpatch(model)"
        )
    return _make_prompt_cache(model, max_kv_size)


def _makes_own(model: nn.Module, maker: _CacheMaker) -> bool:
    """Whether the model would make its caches itself; those do not go by ``max_kv_size``."""
    return maker.before is not None or hasattr(type(model), "make_cache")


def _own_caches(model: Any) -> list[Any]:
    """The prompt cache that mlx-lm would make for a model that is not patched.

    Raises:
        ValueError: for what is no model of mlx-lm's.
    """
    if not isinstance(model, nn.Module) or not (
        hasattr(model, "make_cache") or hasattr(model, "layers")
    ):
        raise ValueError(
            f"tqai takes a model that mlx_lm.load() gives; {type(model).__name__} has neither "
            "make_cache() nor layers"
        )
    return _make_prompt_cache(model)


def _check_settings(settings: Settings) -> None:
    """Raises NotImplementedError for what only other frameworks have."""
    if settings.backend == "torch-ops":
        raise NotImplementedError(
            "backend='torch-ops' is for transformers models; for mlx-lm's use backend='auto', or "
            "'mlx-ops' for mlx operations everywhere"
        )
    if settings.learns_bases:
        raise NotImplementedError(
            f"codec={settings.codec!r} is for transformers models; for mlx-lm's use "
            "codec='trellis', or 'scalar'"
        )
    if not settings.exact_prefill:
        raise NotImplementedError(
            "exact_prefill=False is for transformers models; with mlx-lm pass "
            "prefill_step_size=64, so that all but 64 tokens at a time are read from codes"
        )


def _maker_of(model: Any) -> _CacheMaker | None:
    maker = vars(model).get("make_cache") if isinstance(model, nn.Module) else None
    return maker if isinstance(maker, _CacheMaker) else None


def _require_maker(model: Any) -> _CacheMaker:
    maker = _maker_of(model)
    if maker is None:
        raise ValueError(
            f"this {type(model).__name__} is not patched; call tqai.patch(model) first"
        )
    return maker
