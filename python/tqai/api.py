"""``patch``, ``unpatch`` and ``new_cache``: the public way in.

This module imports neither torch nor transformers, so that ``import tqai`` stays light.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tqai.settings import Bits
    from tqai.transformers.cache import TqaiCache
    from tqai.transformers.encoder_decoder import TqaiEncoderDecoderCache


def patch(
    model: PreTrainedModel,
    *,
    preset: str | None = None,
    bits_k: Bits | None = None,
    bits_v: Bits | None = None,
    sink_tokens: int = 4,
    residual_window: int = 128,
    rotation: str = "auto",
    centering: str = "auto",
    skip_layers: Iterable[int] = (),
    exact_prefill: bool = True,
    seed: int | None = None,
    backend: str = "auto",
    level: str | None = None,
    **unknown: Any,
) -> TqaiCache | TqaiEncoderDecoderCache:
    """Makes `model` keep its keys and values compressed from now on, and returns a fresh cache.

    Every later ``model.generate(...)`` and ``model(...)`` in eval mode gets a compressed cache of
    its own; the returned one may be passed as ``past_key_values``, to keep it over several calls.
    Patching a patched model replaces its settings; caches made before keep theirs.

    Args:
        model: a transformers model with a decoder, on any device; changed in place. Of an
            encoder-decoder model, what the decoder reads of the encoder is compressed as well.
        preset: "quality" (4 bits for keys and values), "balanced" (4 and 2, the default) or
            "small" (2 and 2); bits that are given as well take precedence.
        bits_k: bits per key coordinate, 1…8, by default 4: of every layer, a sequence with one
            number a layer, or a mapping {layer: bits}, the other layers having 4. Negative layers
            count from the end.
        bits_v: bits per value coordinate, as `bits_k`; by default 2.
        sink_tokens: first tokens of each row, kept exact for ever. Layers with a sliding window
            keep none.
        residual_window: last tokens of each row, kept exact.
        rotation: "auto", "hadamard" or "haar".
        centering: what is left out of the keys' codes: "mean", "rope" (the mean before rotary
            embedding, turned to each position), "none", or "auto": the best for each head.
        skip_layers: layers that stay uncompressed; negative numbers count from the end.
        exact_prefill: whether the tokens of one forward pass see each other exact, which costs
            nothing since they are there anyway. False: 64 at a time go through each layer, and what
            has left the window by then is read from its codes, as in decoding. For evaluators that
            score texts by forward passes (lm-eval-harness): they see the cache's true cost then.
        seed: of the rotations.
        backend: what computes: "auto", the C++ kernels for tensors on the CPU and torch operations
            for those on other devices; "torch-ops", torch operations everywhere.
        level: kernel level, "scalar", "neon", "avx2" or "avx512"; by default the best one here.

    Raises:
        TypeError: for a keyword that is none of these, naming the nearest.
        ValueError: for a setting out of range or a model without attention layers.
        NotImplementedError: for a model, layer or level that is not supported, naming it.
        The model is left as it was.
    """
    from tqai.settings import Settings
    from tqai.transformers import hooks

    if unknown:
        raise TypeError(_unknown_keyword(next(iter(unknown))))
    bits = {"bits_k": bits_k, "bits_v": bits_v}
    settings = Settings.named(
        preset,
        **{name: value for name, value in bits.items() if value is not None},
        sink_tokens=sink_tokens,
        residual_window=residual_window,
        rotation=rotation,
        centering=centering,
        skip_layers=skip_layers,
        exact_prefill=exact_prefill,
        seed=seed,
        backend=backend,
        level=level,
    )
    return hooks.install(model, settings)


def _unknown_keyword(name: str) -> str:
    known = list(patch.__kwdefaults__ or ())
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"tqai.patch() has no keyword argument {name!r}; {hint}it takes a model and "
        f"{', '.join(known)}"
    )


def new_cache(model: PreTrainedModel) -> TqaiCache | TqaiEncoderDecoderCache:
    """A fresh cache for a patched model, with the settings it was patched with.

    Raises:
        ValueError: when `model` is not patched.
    """
    from tqai.transformers import hooks

    return hooks.fresh_cache(model)


def unpatch(model: PreTrainedModel) -> None:
    """Puts `model` back as it was before ``patch``. Its compressed caches remain usable, slowly.

    Raises:
        ValueError: when `model` is not patched.
    """
    from tqai.transformers import hooks

    hooks.remove(model)
