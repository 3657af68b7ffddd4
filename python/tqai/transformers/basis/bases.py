"""The key bases of a model, learnt when they are first asked for and then kept.

They belong to the weights: after these have changed, others are learnt. So the same weights have
the same bases in every process of a machine, and a file need only name them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from tqai import _core
from tqai.settings import Settings
from tqai.transformers.basis.learn import SEED, Moments, learn_moments
from tqai.transformers.model.geometry import Geometry
from tqai.transformers.weights.identity import State

LAST_POSITION = 32768
"""Position up to which bases are made to be good where a model does not say how far it reads."""
FARTHEST_POSITION = 131072
"""The same, of a model that reads farther yet."""
NEAR_POSITION = 2048
"""The same, of a layer that sees a window of at most so many tokens, wherever these stand."""
KEPT = 4
"""Of a model, by seed and bits."""
_DELAY = 1.0
"""Seconds after which progress is shown."""
_BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"


@dataclass(frozen=True)
class Bases:
    """What a cache's layers are quantised in, by their number."""

    found: Mapping[int, _core.KeyBasis]
    missing: Mapping[int, str]
    """Why a layer that is compressed has none; its keys are rotated."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Bases:
        return self


NONE = Bases({}, {})

_Key = tuple[int, tuple[tuple[int, int], ...]]
"""Seed, and bits by layer."""

_learnt: WeakKeyDictionary[State, dict[_Key, Bases]] = WeakKeyDictionary()
_lock = threading.RLock()


def bases_of(geometry: Geometry, settings: Settings, layers: Sequence[int]) -> Bases:
    """The bases of these layers of a model, as it is now.

    Learns them where nobody has before, and remembers them as long as the weights are these.

    Raises:
        NotImplementedError: for a model that they cannot be learnt from, or where no layer has one.
        ValueError: where the model is gone.
    """
    if not layers:
        return NONE
    state = geometry.weights()  # raises where the model is gone
    count = len(geometry.heads)
    bits: dict[int, int] = {}
    for layer in layers:
        own = settings.of_layer(layer, count).bits_k
        assert isinstance(own, int)
        bits[layer] = own
    seed = SEED if settings.seed is None else settings.seed
    key = seed, tuple(bits.items())
    with _lock:
        known = _learnt.setdefault(state, {})
        if key not in known:
            bases = _learn(geometry, seed, bits)
            while len(known) >= KEPT:
                del known[next(iter(known))]
            known[key] = bases
        bases = known[key]
    return bases


def _learn(geometry: Geometry, seed: int, bits: Mapping[int, int]) -> Bases:
    assert geometry.decoder is not None
    decoder = geometry.decoder()
    assert decoder is not None
    _check_weights(geometry, decoder)
    with logging.tqdm(
        total=2 * len(bits), desc="Learning key bases", delay=_DELAY, bar_format=_BAR
    ) as bar:

        def progress(share: float) -> None:
            bar.update(share * len(bits))

        moments = learn_moments(geometry, decoder, seed, progress)
        last = _last_positions(geometry)

        def learn(layer: int) -> _core.KeyBasis | str:
            known: Moments = moments[layer]
            basis = known
            if isinstance(known, _core.KeyMoments):
                try:
                    basis = _core.KeyBasis.learn(known, bits[layer], last[layer])
                except ValueError as error:  # nobody reads its keys, or they are no numbers
                    basis = str(error)
            bar.update()
            return basis

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            results = dict(zip(bits, pool.map(learn, bits), strict=True))
    found = {layer: each for layer, each in results.items() if isinstance(each, _core.KeyBasis)}
    missing = {layer: each for layer, each in results.items() if isinstance(each, str)}
    if not found:
        layer, reason = next(iter(missing.items()))
        raise NotImplementedError(
            f"codec='adaptive' finds no layer of {geometry.model} to learn a basis for (layer "
            f"{layer}: {reason}): use codec='scalar'"
        )
    return Bases(found, missing)


def _last_positions(geometry: Geometry) -> list[int]:
    """Of each layer, up to where its basis is to be good."""
    reads = getattr(geometry.config, "max_position_embeddings", None) or LAST_POSITION
    farthest = min(int(reads), FARTHEST_POSITION)
    own = DynamicCache(config=geometry.config).layers
    windows = [getattr(layer, "sliding_window", None) for layer in own]
    windows += [None] * (len(geometry.heads) - len(windows))
    return [
        farthest if window is None else min(max(int(window), NEAR_POSITION), farthest)
        for window in windows
    ]


def _check_weights(geometry: Geometry, decoder: torch.nn.Module) -> None:
    """Raises NotImplementedError where there are weights that are nowhere."""
    for name, weight in decoder.named_parameters():
        if weight.device.type == "meta":
            raise NotImplementedError(
                f"codec='adaptive' learns by running the model, and {name} of {geometry.model} is "
                "not in memory (offloaded, or on the device 'meta'): use codec='trellis', or load "
                "all of the model"
            )
