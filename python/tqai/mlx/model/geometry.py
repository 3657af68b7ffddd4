"""What a model looks like to its caches: the layers of its prompt cache, and how each is used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.models import cache as mlx_caches

from tqai.mlx.model.probe import Use, is_replaced, parts_of, uses_of
from tqai.settings import Settings
from tqai.shapes.heads import check_head_dim
from tqai.shapes.rope import Rope


@dataclass(frozen=True)
class LayerShape:
    """A layer of a prompt cache that can be compressed."""

    index: int
    """Its place in the prompt cache."""
    kv_heads: int
    head_dim: int
    value_head_dim: int
    max_size: int | None = None
    """Tokens that a query sees, its own among them; None: all."""
    reads: int = 1
    """How often attention reads what one update brings."""
    is_packed: bool = True
    """Whether attention reads it through mlx-lm's function, and so packed. Else it is dequantised
    at each update."""
    rope: Rope | None = None
    """What its keys have gone through; None: unknown, or nothing."""
    is_latent: bool = False
    """Whether it caches latents, of which the model makes keys and values, and rotary keys beside
    them in the values' place."""
    has_exact_siblings: bool = False
    """Whether it has a window, and other layers that have one stay exact."""

    def describe(self) -> str:
        """As in "2 key/value heads of 64"."""
        return f"{self.kv_heads} key/value heads of {self.head_dim}"


@dataclass(frozen=True)
class Geometry:
    """The prompt cache of a model."""

    model: str
    """Name of the model's module, as in "llama"."""
    templates: tuple[Any, ...]
    """An empty cache of the model's own for each layer; those that are left alone are copied."""
    shapes: tuple[tuple[LayerShape | None, ...], ...]
    """Of each layer, of each of the caches that its own may be a list of; None for what is no
    growing one of keys and values."""
    problems: tuple[str | None, ...]
    """Why each layer cannot be compressed, where it holds keys and values all the same."""

    def check(self, settings: Settings) -> None:
        """Raises where a model of this geometry cannot be patched with these settings.

        Raises:
            ValueError: for layers that do not exist, or where none is left to compress.
            NotImplementedError: for a layer that cannot be compressed, naming it.
        """
        count = len(self.shapes)
        skipped = settings.skipped(count)
        for index, problem in enumerate(self.problems):
            if problem is not None and index not in skipped:
                others = {i for i, other in enumerate(self.problems) if other is not None}
                skip = sorted(skipped | others)
                advice = "" if len(skip) == count else f": leave it exact with skip_layers={skip}"
                raise NotImplementedError(f"layer {index} of {self.model} {problem}{advice}")
        for index, shape in self._compressed(count, skipped):
            settings.of_layer(index, count)
            check_head_dim(index, "keys", shape.head_dim)
            check_head_dim(index, "values", shape.value_head_dim)
            if settings.centering == "rope" and shape.rope is None:
                raise ValueError(
                    f"layer {index}: centering='rope' needs a rotary embedding that tqai "
                    "recognises; the model has none there: use centering='auto'"
                )
        if not any(shape is not None for own in self.shapes for shape in own):
            kinds = sorted({type(template).__name__ for template in self.templates})
            raise ValueError(f"{self.model} has no attention layers; its caches are {kinds}")

    def compresses(self, settings: Settings) -> bool:
        """Whether any layer is compressed with these settings."""
        count = len(self.shapes)
        return any(self._compressed(count, settings.skipped(count)))

    def _compressed(self, count: int, skipped: frozenset[int]) -> Iterator[tuple[int, LayerShape]]:
        for index in range(count):
            for shape in self.shapes[index]:
                if shape is not None and index not in skipped:
                    yield index, shape


def geometry_of(model: nn.Module, templates: list[Any]) -> Geometry:
    """The geometry of `model`, whose own caches, empty, are `templates`.

    The model is run on four tokens; since mlx is lazy, most of it is not computed.

    Raises:
        NotImplementedError: where it cannot be run on tokens and a cache alone.
    """
    name = type(model).__module__.rpartition(".")[2]
    if any(is_replaced(part) for template in templates for part in parts_of(template)):
        uses = uses_of(model, templates)
    else:
        uses = [[None] * len(parts_of(template)) for template in templates]
    shapes: list[tuple[LayerShape | None, ...]] = []
    problems: list[str | None] = []
    for index, (template, own) in enumerate(zip(templates, uses, strict=True)):
        parts = list(zip(parts_of(template), own, strict=True))
        problem = next(filter(None, (_problem(part, use) for part, use in parts)), None)
        problems.append(problem)
        shapes.append(
            tuple(
                None if use is None or problem else _shape(index, part, use) for part, use in parts
            )
        )
    return Geometry(name, tuple(templates), tuple(shapes), tuple(problems))


def _problem(template: Any, use: Use | None) -> str | None:
    """Why a cache cannot be compressed; None where it can be, or holds no keys and values."""
    kind = type(template).__name__
    if use is None:
        if isinstance(template, mlx_caches.ArraysCache):
            return None
        return f"has a cache of type {kind}, which tqai does not compress"
    if getattr(template, "keep", 0):
        return f"has a {kind} that keeps its first {template.keep} tokens, which tqai's does not"
    if use.touched:
        return f"takes .{use.touched} from its cache, which a compressed one does not have"
    if use.keys is None or use.values is None:
        return "was not used when the model was tried on tokens alone"
    return None


def _shape(index: int, template: Any, use: Use) -> LayerShape:
    assert use.keys is not None and use.values is not None
    _, heads, _, head_dim = use.keys
    return LayerShape(
        index,
        heads,
        head_dim,
        use.values[3],
        getattr(template, "max_size", None),
        max(use.reads, 1),
        use.reads > 0,
        use.rope,
        use.turns_values,
    )
