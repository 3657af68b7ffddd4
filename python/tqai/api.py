"""``patch``, ``unpatch`` and what goes with them: the public way in.

This module imports neither torch nor transformers, so that ``import tqai`` stays light.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, overload

from tqai.requirements import needs_transformers
from tqai.settings import Settings, signature_with_options

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from transformers import (
        BartForConditionalGeneration,
        EncoderDecoderModel,
        M2M100ForConditionalGeneration,
        MarianMTModel,
        MBartForConditionalGeneration,
        MT5ForConditionalGeneration,
        PegasusForConditionalGeneration,
        PreTrainedModel,
        SpeechEncoderDecoderModel,
        T5ForConditionalGeneration,
        T5GemmaForConditionalGeneration,
        VisionEncoderDecoderModel,
        WhisperForConditionalGeneration,
    )
    from typing_extensions import Unpack

    from tqai.settings import Options
    from tqai.transformers.cache.cache import TqaiCache
    from tqai.transformers.cache.encoder_decoder import TqaiEncoderDecoderCache

    # transformers' types do not tell an encoder-decoder model from others; these are known by name.
    EncoderDecoder = (
        BartForConditionalGeneration
        | EncoderDecoderModel
        | M2M100ForConditionalGeneration
        | MarianMTModel
        | MBartForConditionalGeneration
        | MT5ForConditionalGeneration
        | PegasusForConditionalGeneration
        | SpeechEncoderDecoderModel
        | T5ForConditionalGeneration
        | T5GemmaForConditionalGeneration
        | VisionEncoderDecoderModel
        | WhisperForConditionalGeneration
    )


@overload
def patch(model: EncoderDecoder, **options: Unpack[Options]) -> TqaiEncoderDecoderCache: ...
@overload
def patch(model: PreTrainedModel, **options: Unpack[Options]) -> TqaiCache: ...
def patch(
    model: PreTrainedModel, **options: Unpack[Options]
) -> TqaiCache | TqaiEncoderDecoderCache:
    """Makes `model` keep its keys and values compressed from now on, and returns a fresh cache.

    Every later ``model.generate(...)`` and ``model(...)`` in eval mode gets a compressed cache of
    its own; the returned one may be passed as ``past_key_values``, to keep it over several calls.
    Patching a patched model replaces its settings; caches made before keep theirs.

    Type checkers take a model for one with a decoder alone unless its class is an encoder-decoder's
    that they know by name; of other such models, annotate what is returned.

    Args:
        model: a transformers model with a decoder, on any device; changed in place. Of an
            encoder-decoder model, what the decoder reads of the encoder is compressed as well.
        preset: "quality" (4 bits for keys and values), "balanced" (4 and 2, the default) or
            "small" (2 and 2); bits that are given as well take precedence.
        bits_k: bits per key coordinate, 1…8, by default 4: of every layer, a sequence with one
            number a layer, or a mapping {layer: bits}, the other layers having the default's.
            Negative layers count from the end.
        bits_v: bits per value coordinate, as `bits_k`; by default 2. Layers that cache latents
            (DeepSeek) have bits of their own; see docs/transformers.md.
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
        ImportError: without torch or transformers, or with a transformers that is too old.
        The model is left as it was.
    """
    needs_transformers()
    from tqai.transformers import hooks

    return hooks.install(model, Settings.of_options("tqai.patch", options))


@overload
def patched(
    model: EncoderDecoder, **options: Unpack[Options]
) -> AbstractContextManager[TqaiEncoderDecoderCache]: ...
@overload
def patched(
    model: PreTrainedModel, **options: Unpack[Options]
) -> AbstractContextManager[TqaiCache]: ...
def patched(
    model: PreTrainedModel, **options: Unpack[Options]
) -> AbstractContextManager[TqaiCache | TqaiEncoderDecoderCache]:
    """``with tqai.patched(model, …) as cache``: patched inside, and afterwards as it was before.

    Takes what ``patch`` takes and gives the cache that it returns. A model that was patched before
    gets its settings back.

    Raises:
        as ``patch``.
    """
    needs_transformers()
    return _patched(model, Settings.of_options("tqai.patched", options))


@contextmanager
def _patched(model: PreTrainedModel, settings: Settings) -> Iterator[Any]:
    from tqai.transformers import hooks

    before = hooks.settings_of(model) if is_patched(model) else None
    cache = hooks.install(model, settings)
    try:
        yield cache
    finally:
        if before is not None:
            hooks.install(model, before)
        elif is_patched(model):  # not where it has been unpatched inside
            hooks.remove(model)


def is_patched(model: object) -> bool:
    """Whether `model` is one that keeps its keys and values compressed."""
    # Whoever has patched something has imported it.
    hooks = sys.modules.get("tqai.transformers.hooks")
    return hooks is not None and hooks.is_patched(model)


@overload
def new_cache(model: EncoderDecoder) -> TqaiEncoderDecoderCache: ...
@overload
def new_cache(model: PreTrainedModel) -> TqaiCache: ...
def new_cache(model: PreTrainedModel) -> TqaiCache | TqaiEncoderDecoderCache:
    """A fresh cache for a patched model, with the settings it was patched with.

    Raises:
        ValueError: when `model` is not patched.
    """
    needs_transformers()
    from tqai.transformers import hooks

    return hooks.fresh_cache(model)


def unpatch(model: PreTrainedModel) -> None:
    """Puts `model` back as it was before ``patch``. Its compressed caches remain usable, slowly.

    Raises:
        ValueError: when `model` is not patched.
    """
    needs_transformers()
    from tqai.transformers import hooks

    hooks.remove(model)


# Help and notebooks list the options.
for _function in (patch, patched):
    vars(_function)["__signature__"] = signature_with_options(_function)
del _function
