"""What a cache is called where it is handed on, read off the signatures of those that take it.

Forward methods and ``generate`` take a cache as ``past_key_values`` in older versions of
transformers and as ``cache`` in newer ones, which rename the older keyword where a call gives it.
A model whose code comes from elsewhere may keep to either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import transformers
from transformers import GenerationMixin
from transformers.cache_utils import Cache

_OLDER, _NEWER = "past_key_values", "cache"

Parameters = Mapping[str, inspect.Parameter]


def cache_name(module: torch.nn.Module) -> str | None:
    """The name by which the module's forward takes a cache; None where it takes none."""
    replaced = _replaced(module)
    return _cache_of_class(type(module)) if replaced is None else _cache_among(replaced)


@lru_cache(maxsize=1)
def generate_name() -> str:
    """The name of the cache among what ``generate`` hands from one forward pass to the next."""
    name = _cache_among(inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters)
    if name is None:
        raise NotImplementedError(
            f"transformers {transformers.__version__} hands on a cache in generate() by a name "
            f"that tqai does not know; it knows {_NEWER!r} and {_OLDER!r}"
        )
    return name


def cache_argument(module: torch.nn.Module, cache: Any) -> dict[str, Any]:
    """`cache` as a keyword argument for a call of `module`, or of what it hands arguments on to."""
    return {cache_name(module) or generate_name(): cache}


def takes(module: torch.nn.Module, name: str) -> bool:
    """Whether the module's forward has a parameter of that name."""
    return name in _parameters(module)


def given(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the module, by the names that its forward has for them."""
    arguments = {**dict(zip(_parameters(module), args, strict=False)), **kwargs}
    name = cache_name(module)
    if name == _NEWER and arguments.get(_NEWER) is None and _OLDER in arguments:
        arguments[_NEWER] = arguments.pop(_OLDER)
    if name == _OLDER and isinstance(arguments.get(_NEWER), Cache):  # it would be ignored
        raise ValueError(
            f"{type(module).__name__} got {_NEWER}=; with transformers {transformers.__version__} "
            f"it takes a cache as {_OLDER}="
        )
    return arguments


def with_cache(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of the module, with `cache` in place of none."""
    name = cache_name(module)
    assert name is not None
    position = list(_parameters(module)).index(name)
    kwargs = {key: value for key, value in kwargs.items() if key != _OLDER}
    if position < len(args):
        return (*args[:position], cache, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: cache}


def _cache_among(parameters: Parameters) -> str | None:
    """The parameter for a cache. Some models, as XLM, use the name for a dictionary of tensors."""
    for name in (_NEWER, _OLDER):
        if name in parameters and "dict[" not in str(parameters[name].annotation).lower():
            return name
    return None


def _parameters(module: torch.nn.Module) -> Parameters:
    """The parameters of the module's forward that have names, without ``self``.

    A forward that takes whatever comes, as wrappers do, is passed over for the one behind it.
    """
    replaced = _replaced(module)
    return _parameters_of_class(type(module)) if replaced is None else replaced


def _replaced(module: torch.nn.Module) -> Parameters | None:
    """Those of a forward that stands in the place of the class's, on this module alone."""
    own = vars(module).get("forward")
    return None if own is None else _named(own) or None


@lru_cache(maxsize=256)
def _cache_of_class(kind: type[torch.nn.Module]) -> str | None:
    return _cache_among(_parameters_of_class(kind))


@lru_cache(maxsize=256)
def _parameters_of_class(kind: type[torch.nn.Module]) -> Parameters:
    for parent in kind.__mro__:
        if "forward" in vars(parent):
            named = list(_named(vars(parent)["forward"]).items())[1:]
            if named:
                return dict(named)
    return {}


def _named(function: Callable[..., Any]) -> Parameters:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.items()
    return {name: parameter for name, parameter in parameters if parameter.kind not in variadic}
