"""The models inside a model that generate for it.

The ``generate`` of some models calls an inner model's: BLIP-2 that of a language model, CSM and
Moshi that of a small decoder for each step of their own. The cache is then the inner model's, and
so is what makes one. transformers says nowhere which models these are; their source does.
"""

from __future__ import annotations

import inspect
import re
import sys
from functools import lru_cache
from typing import Any

from transformers import GenerationMixin, PreTrainedModel

_INNER = re.compile(r"\bself\.(\w+)\.generate\(")
_OWN = re.compile(
    r"\bsuper\(\)\.generate\(|\bGenerationMixin\.generate\(|\bself\._sample\("
    r"|\bself\._prepare_cache_for_generation\("
)


def parts_of(model: Any) -> list[Any]:
    """The models that keep a cache when `model` generates: itself, unless it only calls others."""
    own, names = _calls(type(model))
    inner = [getattr(model, name, None) for name in names]
    inner = [part for part in inner if isinstance(part, PreTrainedModel) and part.can_generate()]
    return [model, *inner] if own or not inner else inner


def keeper_of(model: Any) -> Any:
    """The one model that keeps a cache when `model` generates, or the first of them."""
    return parts_of(model)[0]


def check_parts(model: PreTrainedModel) -> None:
    """Raises NotImplementedError where several models inside generate, and `model` does not."""
    parts = parts_of(model)
    if parts[0] is model or len(parts) == 1:
        return
    _, names = _calls(type(model))
    inside = [name for name in names if any(getattr(model, name, None) is part for part in parts)]
    calls = " and ".join(f"tqai.patch(model.{name})" for name in inside)
    raise NotImplementedError(
        f"{type(model).__name__} generates by its {' and its '.join(inside)}, each with a cache of "
        f"its own: patch them, {calls}"
    )


@lru_cache(maxsize=256)
def _calls(kind: type) -> tuple[bool, tuple[str, ...]]:
    """Whether models of a class generate by themselves, and by which attributes they do."""
    own_bases = (PreTrainedModel, GenerationMixin)
    parents = [one for one in kind.__mro__ if issubclass(one, own_bases) and one not in own_bases]
    source = "".join(map(_source, parents))
    names = tuple(dict.fromkeys(_INNER.findall(source)))
    inherited = getattr(kind, "generate", None) is getattr(GenerationMixin, "generate", None)
    return inherited or _OWN.search(source) is not None, names


def _source(kind: type) -> str:
    """The source of a class; empty where it has none or nothing in its file generates."""
    try:
        file = inspect.getsource(sys.modules[kind.__module__])
        return inspect.getsource(kind) if _INNER.search(file) else ""
    except (KeyError, OSError, TypeError):  # defined at a prompt
        return ""
