"""``patch``, ``unpatch`` and ``new_cache``: the public way in.

This module imports neither torch nor transformers, so that ``import tqai`` stays light.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tqai.cache import TqaiCache


def patch(
    model: PreTrainedModel,
    *,
    bits_k: int = 4,
    bits_v: int = 2,
    sink_tokens: int = 4,
    residual_window: int = 128,
    rotation: str = "auto",
    centering: str = "auto",
    skip_layers: Iterable[int] = (),
    seed: int | None = None,
    level: str | None = None,
) -> TqaiCache:
    """Makes `model` keep its keys and values compressed from now on, and returns a fresh cache.

    Every later ``model.generate(...)`` and ``model(...)`` in eval mode gets a compressed cache of
    its own; the returned one may be passed as ``past_key_values``, to keep it over several calls.
    Patching a patched model replaces its settings; caches made before keep theirs.

    Args:
        model: a decoder-only transformers model on the CPU; changed in place.
        bits_k: bits per key coordinate, 1…8.
        bits_v: bits per value coordinate, 1…8.
        sink_tokens: first tokens of each row, kept exact for ever. Layers with a sliding window
            keep none.
        residual_window: last tokens of each row, kept exact.
        rotation: "auto", "hadamard" or "haar".
        centering: what keys are centred on: "auto", "mean" or "none".
        skip_layers: layers that stay uncompressed; negative numbers count from the end.
        seed: of the rotations.
        level: kernel level, "scalar", "avx2" or "avx512"; by default the best one here.

    Raises:
        ValueError: for a setting out of range or a model without attention layers.
        NotImplementedError: for a model, layer or level that is not supported, naming it.
        The model is left as it was.
    """
    from tqai import hooks
    from tqai.settings import Settings

    settings = Settings(
        bits_k=bits_k,
        bits_v=bits_v,
        sink_tokens=sink_tokens,
        residual_window=residual_window,
        rotation=rotation,
        centering=centering,
        skip_layers=skip_layers,  # type: ignore[arg-type]  # made a tuple by Settings
        seed=seed,
        level=level,
    )
    return hooks.install(model, settings)


def new_cache(model: PreTrainedModel) -> TqaiCache:
    """A fresh cache for a patched model, with the settings it was patched with.

    Raises:
        ValueError: when `model` is not patched.
    """
    from tqai import hooks

    return hooks.fresh_cache(model)


def unpatch(model: PreTrainedModel) -> None:
    """Puts `model` back as it was before ``patch``. Its compressed caches remain usable, slowly.

    Raises:
        ValueError: when `model` is not patched.
    """
    from tqai import hooks

    hooks.remove(model)
