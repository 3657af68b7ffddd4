"""Compressed layers that hold something else beside keys and values, which stays exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tqai.settings import Settings
from tqai.stores.for_torch import Store
from tqai.transformers.cache.layer import TqaiLayer
from tqai.transformers.model.other_layers import (
    RECURRENT,
    has_index,
    has_states,
    is_croppable,
)


def layer_for(own: Any, index: int, settings: Settings, *known: Any) -> TqaiLayer:
    """The compressed layer that stands for `own`, an empty one of transformers'.

    known: what else ``TqaiLayer`` is made from.
    """
    if has_states(own):
        return StatesLayer(own, index, settings, *known)
    return (IndexedLayer if has_index(own) else TqaiLayer)(index, settings, *known)


class StatesLayer(TqaiLayer, RECURRENT or object):  # type: ignore[misc]
    """A layer with attention and recurrent states at once; these are as in transformers' own.

    A forward pass that does not end loses them, as in layers that hold nothing else.
    """

    def __init__(self, own: Any, index: int, settings: Settings, *known: Any) -> None:
        """`own`: a layer of transformers', whose states the layer takes."""
        super().__init__(index, settings, *known)
        assert RECURRENT is not None
        for name in vars(RECURRENT()):
            setattr(self, name, getattr(own, name))

    @property
    def batch_size(self) -> int:
        return super().batch_size

    @batch_size.setter
    def batch_size(self, rows: int) -> None:
        """Nothing: in some versions the states set it too, as transformers 5.13 does."""

    @property
    def is_croppable(self) -> bool:
        return is_croppable(self)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        if kwargs:  # of states, which are named
            RECURRENT.lazy_initialization(self, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        RECURRENT.crop(self, tokens_to_remove)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        RECURRENT.reset(self)

    def _select(self, rows: list[int]) -> None:
        super()._select(rows)
        RECURRENT.reorder_cache(self, torch.tensor(rows, device="cpu"))


class IndexedLayer(TqaiLayer):
    """A layer with an index, whose keys tell which tokens attention reads (sparse attention)."""

    indexer_keys: torch.Tensor | None = None
    """[batch, tokens, index_dim]."""
    indexer_position_ids: torch.Tensor | None = None
    """[sections, batch, tokens], in the layer where the model keeps them."""

    @property
    def is_indexer_initialized(self) -> bool:
        return self.indexer_keys is not None

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Adds keys of the index and returns all."""
        known = [] if self.indexer_keys is None else [self.indexer_keys]
        self.indexer_keys = torch.cat([*known, indexer_key_states], dim=1)
        return self.indexer_keys

    def reset(self) -> None:
        super().reset()
        self.indexer_keys = self.indexer_position_ids = None

    def truncate(self, tokens: int) -> None:
        super().truncate(tokens)
        self._cut(tokens)

    def put_back(self, store: Store, padding: list[int]) -> None:
        super().put_back(store, padding)
        self._cut(store.tokens)

    def _cut(self, tokens: int) -> None:
        # New tensors: copies of the layer have the old ones.
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[:, :tokens]
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., :tokens]

    def _select(self, rows: Sequence[int]) -> None:
        super()._select(list(rows))
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[list(rows)]
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[:, list(rows)]
