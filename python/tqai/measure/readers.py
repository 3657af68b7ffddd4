"""Models as measurements read texts with them, of one framework or the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import mlx.nn as nn
    from transformers import PreTrainedModel


class Reader(Protocol):
    """A model that reads tokens."""

    @property
    def item_size(self) -> int:
        """Bytes of an exact coordinate in the model's cache."""
        ...

    def own_cache(self) -> Any:
        """An empty cache of the model's own kind."""
        ...

    def tokenize(self, tokenizer: Any, text: str, special: bool) -> list[int]:
        """Token ids of a text; special: with the tokens that the tokenizer adds."""
        ...

    def decode(
        self, ids: list[int], prefill: int, chunk: int, cache: Any
    ) -> Iterator[tuple[bool, np.ndarray]]:
        """For each chunk after the prefill, which is read at once: whether the cache held packed
        tokens before it, and log-probabilities [chunk, vocabulary] float64 after its tokens. The
        last token is not fed."""
        ...


def reader_of(model: Any) -> Reader:
    """The reader for a model of either framework."""
    from tqai import api

    return MlxReader(model) if api.is_mlx(model) else TorchReader(model)


class TorchReader:
    """A transformers model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @property
    def item_size(self) -> int:
        return self._model.dtype.itemsize

    def own_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def tokenize(self, tokenizer: Any, text: str, special: bool) -> list[int]:
        return tokenizer(text, add_special_tokens=special, verbose=False).input_ids

    def decode(
        self, ids: list[int], prefill: int, chunk: int, cache: Any
    ) -> Iterator[tuple[bool, np.ndarray]]:
        import torch

        from tqai.transformers.model.devices import device_of
        from tqai.transformers.model.names import cache_argument

        model = self._model
        tokens = torch.tensor([ids], device="cpu").to(device_of(model))
        with torch.inference_mode():
            taken = cache_argument(model, cache)
            model(tokens[:, :prefill], use_cache=True, logits_to_keep=1, **taken)
        for part in tokens[:, prefill:-1].split(chunk, 1):
            packed = _is_packed(cache)
            with torch.inference_mode():
                logits = model(part, use_cache=True, **cache_argument(model, cache)).logits[0]
                logs = torch.log_softmax(logits.float(), -1).cpu()
            yield packed, logs.double().numpy()


class MlxReader:
    """A model of mlx-lm's."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property
    def item_size(self) -> int:
        import mlx.core as mx
        from mlx.utils import tree_flatten

        # Of weights that are not quantised: norms at least.
        floats = (
            array.dtype.size
            for _, array in tree_flatten(self._model.parameters())
            if mx.issubdtype(array.dtype, mx.floating)
        )
        return max(floats)

    def own_cache(self) -> Any:
        from mlx_lm.models.cache import make_prompt_cache

        return make_prompt_cache(self._model)

    def tokenize(self, tokenizer: Any, text: str, special: bool) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=special)

    def decode(
        self, ids: list[int], prefill: int, chunk: int, cache: Any
    ) -> Iterator[tuple[bool, np.ndarray]]:
        import mlx.core as mx

        tokens = mx.array([ids])
        self._model(tokens[:, :prefill], cache=cache)
        mx.eval([layer.state for layer in cache])
        for at in range(prefill, len(ids) - 1, chunk):
            packed = _is_packed(cache)
            part = tokens[:, at : min(at + chunk, len(ids) - 1)]
            logits = self._model(part, cache=cache)[0].astype(mx.float32)
            logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            yield packed, np.array(logs, np.float64)


def _is_packed(cache: Any) -> bool:
    return hasattr(cache, "memory_report") and cache.memory_report()["packed_tokens"] > 0
