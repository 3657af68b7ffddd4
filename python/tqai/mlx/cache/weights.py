"""Which weights a cache goes with."""

from __future__ import annotations

import hashlib
from weakref import ref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

_SAMPLES = 64
"""Coordinates of each array that are looked at, spread over it evenly."""


class Weights:
    """Those that a model has when they are first asked for, or that a file's digest speaks of."""

    def __init__(self, of: nn.Module | str) -> None:
        self._digest = of if isinstance(of, str) else None
        self._model = None if isinstance(of, str) else ref(of)

    def is_of(self, model: nn.Module) -> bool:
        """Whether they are those of `model`, as far as samples tell; of a model that is gone,
        nothing is known."""
        if self._model is not None and self._model() is model:
            return True
        own = self.digest()
        return own is None or own == digest(model)

    def digest(self) -> str | None:
        """See ``digest``; None where the model is gone."""
        model = None if self._model is None else self._model()
        if self._digest is None and model is not None:
            self._digest = digest(model)
        return self._digest


def digest(model: nn.Module) -> str:
    """Of the names, shapes and dtypes of a model's weights, and of a sample of their bits: equal
    for copies, and, but for changes of few weights, different for others."""
    arrays = sorted(tree_flatten(model.parameters()))
    samples = []
    for _, array in arrays:
        count = min(_SAMPLES, array.size)
        places = np.linspace(0, max(array.size - 1, 0), count).astype(np.int64)
        samples.append(array.reshape(-1)[mx.array(places)].view(mx.uint8))
    mx.eval(samples)
    known = hashlib.sha256()
    for (name, array), sample in zip(arrays, samples, strict=True):
        known.update(f"{name} {array.shape} {array.dtype};".encode())
        known.update(np.array(sample).tobytes())
    return known.hexdigest()
