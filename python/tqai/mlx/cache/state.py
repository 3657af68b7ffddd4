"""What a compressed cache gives mlx-lm as its state, to be saved, and is made from again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import numpy as np

from tqai.mlx.cache import store
from tqai.mlx.cache.weights import Weights
from tqai.mlx.model.geometry import LayerShape
from tqai.settings import Settings
from tqai.shapes.rope import Rope

VERSION = 1


class State(dict[str, Any]):
    """A sequence of items, by their numbers, that are made when they are read.

    mlx-lm asks for the state of every cache after each part of a prompt, only to have its arrays
    evaluated: ``mx.eval`` finds none in here. Who reads the items, to save them or to make a cache
    of them, gets them.
    """

    def __init__(self, make: Callable[[], list[Any]]) -> None:
        super().__init__()
        self._make = make

    def items(self) -> Any:
        return {str(at): item for at, item in enumerate(self._make())}.items()

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.items())

    def __len__(self) -> int:
        return len(self.items())

    def __getitem__(self, name: str) -> Any:
        return dict(self.items())[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (items_of(self),)


def items_of(state: Any) -> list[Any]:
    """The items of a state, as a cache gave it or as a file had it."""
    return [item for _, item in state.items()] if isinstance(state, State) else list(state)


def header(shape: LayerShape, settings: Settings, weights: Weights | None, **more: Any) -> str:
    """What a cache is, beside its tokens, as a string that a state can hold."""
    known = None if weights is None else weights.digest()
    own = {"shape": asdict(shape), "settings": asdict(settings), "weights": known}
    return json.dumps({"version": VERSION, **own, **more})


def weights_of(held: dict[str, Any]) -> Weights | None:
    """The weights that the rest of a header names, which older ones do not."""
    known = held.get("weights")
    return None if known is None else Weights(known)


def read_header(text: str) -> tuple[LayerShape, Settings, dict[str, Any]]:
    """The inverse.

    Raises:
        ValueError: for a state of another kind or of a newer tqai's.
    """
    try:
        held = json.loads(text)
        version = held.pop("version")
        shape, settings = held.pop("shape"), held.pop("settings")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"not the state of a compressed cache: {error}") from None
    if version != VERSION:
        raise ValueError(
            f"a state of version {version}; this tqai reads version {VERSION}: save it again with "
            "the tqai that reads it"
        )
    rope = shape.pop("rope")
    if rope is not None:
        rope = Rope(
            tuple(rope["inv_freq"]), rope["layout"], tuple(rope["sections"]), rope["changes"]
        )
    # A level that this machine lacks would be of no use; the best one gives the same results.
    settings["level"] = None
    return LayerShape(**shape, rope=rope), Settings(**settings), held


def packed(held: store.Store | None) -> mx.array | None:
    """A store's bytes, uint8."""
    return None if held is None else mx.array(np.frombuffer(held.serialize(), np.uint8))


def unpacked(data: mx.array | None, settings: Settings) -> store.Store | None:
    """The store that ``packed`` was given.

    Raises:
        ValueError: for bytes that are none.
    """
    return None if data is None else store.read(data, settings)
