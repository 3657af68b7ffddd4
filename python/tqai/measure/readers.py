"""Models as measurements read texts with them, of one framework or the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import mlx.nn as nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        tokens before it, and log-probabilities [chunk, vocabulary] float32 after its tokens. The
        last token is not fed."""
        ...

    def read(self, ids: list[int], cache: Any, chunk: int, progress: Callable[[int], Any]) -> None:
        """Reads tokens, `chunk` at a time and the last alone, as in decoding; `progress` is called
        with how many, each time. Memory of the framework's own is given back."""
        ...

    def packed_vectors(self, cache: Any) -> int:
        """Keys that a compressed cache holds as codes, over all layers and heads."""
        ...

    @property
    def limit(self) -> int | None:
        """Tokens that the model was made for; None: unknown."""
        ...

    def tokenizer(self, given: Any) -> PreTrainedTokenizerBase:
        """transformers' tokenizer in what the framework takes for one."""
        ...

    def feed(self, ids: list[int], cache: Any, last: bool = False) -> np.ndarray:
        """Reads tokens at once: log-probabilities [tokens, or 1 if `last`, vocabulary] float64 of
        the next ones."""
        ...

    def compressed(self, cache: Any) -> list[Any]:
        """The compressed layers of a cache, with ``core`` and ``settings``."""
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
            yield packed, logs.numpy()

    def read(self, ids: list[int], cache: Any, chunk: int, progress: Callable[[int], Any]) -> None:
        import torch

        from tqai.transformers.model.names import cache_argument

        model = self._model
        tokens = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            for part in (*tokens[:, :-1].split(chunk, dim=1), tokens[:, -1:]):
                model(part, use_cache=True, logits_to_keep=1, **cache_argument(model, cache))
                progress(part.shape[1])

    def packed_vectors(self, cache: Any) -> int:
        return sum(map(_packed_vectors, self.compressed(cache)))

    @property
    def limit(self) -> int | None:
        return getattr(self._model.config, "max_position_embeddings", None)

    def tokenizer(self, given: Any) -> PreTrainedTokenizerBase:
        return given

    def feed(self, ids: list[int], cache: Any, last: bool = False) -> np.ndarray:
        import torch

        from tqai.transformers.model.devices import device_of
        from tqai.transformers.model.names import cache_argument

        taken = {**cache_argument(self._model, cache), **({"logits_to_keep": 1} if last else {})}
        with torch.inference_mode():
            tokens = torch.tensor([ids], device=device_of(self._model))
            logits = self._model(tokens, use_cache=True, **taken).logits[0]
            return torch.log_softmax(logits.float(), -1).cpu().double().numpy()

    def compressed(self, cache: Any) -> list[Any]:
        return [layer for layer in cache.layers if getattr(layer, "core", None) is not None]


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
            yield packed, np.array(logs, np.float32)

    def read(self, ids: list[int], cache: Any, chunk: int, progress: Callable[[int], Any]) -> None:
        import mlx.core as mx

        tokens = mx.array([ids])
        ends = [*range(chunk, len(ids) - 1, chunk), len(ids) - 1, len(ids)]
        for start, end in zip([0, *ends], ends, strict=False):
            mx.eval(self._model(tokens[:, start:end], cache=cache)[:, -1:])
            mx.eval([layer.state for layer in cache])
            mx.clear_cache()
            progress(end - start)

    def packed_vectors(self, cache: Any) -> int:
        return sum(map(_packed_vectors, self.compressed(cache)))

    @property
    def limit(self) -> int | None:
        return getattr(self._model.args, "max_position_embeddings", None)

    def tokenizer(self, given: Any) -> PreTrainedTokenizerBase:
        from mlx_lm.tokenizer_utils import TokenizerWrapper

        return given._tokenizer if isinstance(given, TokenizerWrapper) else given

    def feed(self, ids: list[int], cache: Any, last: bool = False) -> np.ndarray:
        import mlx.core as mx

        logits = self._model(mx.array([ids]), cache=cache)[0]
        logits = (logits[-1:] if last else logits).astype(mx.float32)
        logs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True), np.float64)
        mx.eval([layer.state for layer in cache])
        return logs

    def compressed(self, cache: Any) -> list[Any]:
        from tqai.mlx.model.probe import parts_of

        parts = (part for layer in cache for part in parts_of(layer))
        return [part for part in parts if getattr(part, "core", None) is not None]


def _packed_vectors(layer: Any) -> int:
    store = layer.core
    return store.kv_heads * sum(map(store.packed_tokens, range(store.batch)))


def _is_packed(cache: Any) -> bool:
    return hasattr(cache, "memory_report") and cache.memory_report()["packed_tokens"] > 0
