"""``patch``, ``unpatch`` and what goes with them: the public way in.

This module imports neither torch nor transformers, nor mlx, so that ``import tqai`` stays light.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, overload

from tqai.requirements import needs_mlx_lm, needs_transformers
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

    from tqai.mlx.cache.prompt import TqaiPromptCache
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


class MlxModel(Protocol):
    """A model that ``mlx_lm.load`` gives, an ``mlx.nn.Module``."""

    def load_weights(self, file_or_weights: Any, strict: bool = True) -> Any: ...


@overload
def patch(model: EncoderDecoder, **options: Unpack[Options]) -> TqaiEncoderDecoderCache: ...
@overload
def patch(model: PreTrainedModel, **options: Unpack[Options]) -> TqaiCache: ...
@overload
def patch(model: MlxModel, **options: Unpack[Options]) -> TqaiPromptCache: ...
def patch(
    model: PreTrainedModel | MlxModel, **options: Unpack[Options]
) -> TqaiCache | TqaiEncoderDecoderCache | TqaiPromptCache:
    """Makes `model` keep its keys and values compressed from now on, and returns a fresh cache.

    Every later ``model.generate(...)`` and ``model(...)`` in eval mode gets a compressed cache of
    its own; the returned one may be passed as ``past_key_values``, to keep it over several calls.
    Patching a patched model replaces its settings; caches made before keep theirs.

    Of an mlx-lm model, the prompt caches that mlx-lm makes for it are compressed; the returned one
    may be passed as ``prompt_cache`` (docs/mlx.md).

    Type checkers take a model for one with a decoder alone unless its class is an encoder-decoder's
    that they know by name; of other such models, annotate what is returned.

    Args:
        model: a transformers model with a decoder, on any device, or one that ``mlx_lm.load``
            gives; changed in place. Of an
            encoder-decoder model, what the decoder reads of the encoder is compressed as well.
        preset: "quality" (4 bits for keys and values, codec="auto"), "balanced" (4 and 2,
            codec="scalar": the default) or "small" (2 and 2, codec="auto"); bits and a codec that
            are given as well take precedence.
        bits_k: bits per key coordinate, 1…8, by default 4: of every layer, a sequence with one
            number a layer, or a mapping {layer: bits}, the other layers having the default's.
            Negative layers count from the end.
        bits_v: bits per value coordinate, as `bits_k`; by default 2. Layers that cache latents
            (DeepSeek) have bits of their own; see docs/transformers.md.
        sink_tokens: first tokens of each row, kept exact for ever. Layers with a sliding window
            keep none.
        residual_window: last tokens of each row, kept exact.
        codec: how codes are chosen, at the same bytes. "scalar": each coordinate by itself.
            "trellis": values of up to 4 bits in trellis codes, which take a third of their squared
            error away. "adaptive": those, and keys in a basis that is learnt from the model here,
            once, in the time of a prompt of 1 000 tokens or a few of them (large vocabularies),
            which takes the error of scores to a fraction; the report of a cache says which layers
            have one. "auto": as "adaptive" where the model can be run for that, else as "trellis";
            ``settings.codec`` of the cache says which.
        rotation: "auto", "hadamard" or "haar"; of values, and of keys that are in no basis.
        centering: what is left out of the keys' codes: "mean", "rope" (the mean before rotary
            embedding, turned to each position), "none", or "auto": the best for each head.
        skip_layers: layers that stay uncompressed; negative numbers count from the end.
        exact_prefill: whether the tokens of one forward pass see each other exact, which costs
            nothing since they are there anyway. False: 64 at a time go through each layer, and what
            has left the window by then is read from its codes, as in decoding. For evaluators that
            score texts by forward passes (lm-eval-harness): they see the cache's true cost then.
        seed: of the rotations, and of the random tokens that bases are learnt from.
        backend: what computes: "auto", the C++ kernels on the CPU and the framework's operations on
            other devices; "torch-ops" or "mlx-ops", its operations everywhere.
        level: kernel level, "scalar", "neon", "avx2", "avx_vnni", "avx512_vnni" or "avx512"; by
            default the best one here.

    Raises:
        TypeError: for a keyword that is none of these, naming the nearest.
        ValueError: for a setting out of range or a model without attention layers.
        NotImplementedError: for a model, layer or level that is not supported, naming it.
        ImportError: without torch or transformers, or with a transformers that is too old; for
            an mlx model, without mlx-lm, or with one that is too old.
        The model is left as it was.
    """
    hooks = _hooks_for(model)
    return hooks.install(model, Settings.of_options("tqai.patch", options))


@overload
def patched(
    model: EncoderDecoder, **options: Unpack[Options]
) -> AbstractContextManager[TqaiEncoderDecoderCache]: ...
@overload
def patched(
    model: PreTrainedModel, **options: Unpack[Options]
) -> AbstractContextManager[TqaiCache]: ...
@overload
def patched(
    model: MlxModel, **options: Unpack[Options]
) -> AbstractContextManager[TqaiPromptCache]: ...
def patched(
    model: PreTrainedModel | MlxModel, **options: Unpack[Options]
) -> AbstractContextManager[TqaiCache | TqaiEncoderDecoderCache | TqaiPromptCache]:
    """``with tqai.patched(model, …) as cache``: patched inside, and afterwards as it was before.

    Takes what ``patch`` takes and gives the cache that it returns. A model that was patched before
    gets its settings back.

    Raises:
        as ``patch``.
    """
    hooks = _hooks_for(model)
    return _patched(hooks, model, Settings.of_options("tqai.patched", options))


@contextmanager
def _patched(hooks: ModuleType, model: Any, settings: Settings) -> Iterator[Any]:
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
    framework = "mlx" if is_mlx(model) else "transformers"
    hooks = sys.modules.get(f"tqai.{framework}.hooks")
    return hooks is not None and hooks.is_patched(model)


@overload
def new_cache(model: EncoderDecoder) -> TqaiEncoderDecoderCache: ...
@overload
def new_cache(model: PreTrainedModel) -> TqaiCache: ...
@overload
def new_cache(model: MlxModel) -> TqaiPromptCache: ...
def new_cache(
    model: PreTrainedModel | MlxModel,
) -> TqaiCache | TqaiEncoderDecoderCache | TqaiPromptCache:
    """A fresh cache for a patched model, with the settings it was patched with.

    Raises:
        ValueError: when `model` is not patched.
    """
    return _hooks_for(model).fresh_cache(model)


def unpatch(model: PreTrainedModel | MlxModel) -> None:
    """Puts `model` back as it was before ``patch``. Its compressed caches remain usable, slowly.

    Raises:
        ValueError: when `model` is not patched.
    """
    _hooks_for(model).remove(model)


def is_mlx(model: object) -> bool:
    """Whether `model` is one of mlx's; who has one has imported it."""
    nn = sys.modules.get("mlx.nn")
    return nn is not None and isinstance(model, nn.Module)


def _hooks_for(model: object) -> ModuleType:
    """The seam into the framework that `model` belongs to.

    Raises:
        ImportError: where that is not installed, or too old.
    """
    if is_mlx(model):
        needs_mlx_lm()
        from tqai.mlx import hooks
    else:
        needs_transformers()
        from tqai.transformers import hooks
    return hooks


# Help and notebooks list the options.
for _function in (patch, patched):
    vars(_function)["__signature__"] = signature_with_options(_function)
del _function
