"""The cache of an encoder-decoder model: the decoder's tokens, and what it reads of the encoder.

Both are compressed. The encoder's keys and values are written in the first pass, and read in each
later one without another ``update``: the model asks the layer for its ``keys`` and ``values``.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload
from weakref import ref as weak_ref

import torch
from transformers.cache_utils import EncoderDecoderCache

from tqai import _core
from tqai.reports import COUNTS
from tqai.settings import Options, Settings, signature_with_options
from tqai.transformers.attention.view import TqaiView, Update
from tqai.transformers.basis.bases import Bases
from tqai.transformers.cache.cache import TqaiCache, described
from tqai.transformers.cache.layer import TqaiLayer
from tqai.transformers.cache.passes import Passes
from tqai.transformers.model.geometry import Geometry

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Unpack


class CrossLayer(TqaiLayer):
    """Keys and values that a layer of a decoder has for the encoder's output.

    All queries see all tokens. Of these the first and the last are kept exact as in any layer.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the encoder's keys and values, once; see ``TqaiLayer.update``.

        Raises:
            ValueError: also for a layer that has some already.
        """
        if self.core is not None:
            raise ValueError(
                f"layer {self.index}: this cache holds another encoder output already; a cache "
                "goes with one input: make a fresh one with tqai.new_cache(model)"
            )
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        assert isinstance(keys, TqaiView) and self.core is not None
        keys.update.queries = 0
        if not self.settings.exact_prefill:
            self.core.seal()
            keys.update.fresh = None
        return keys, values

    def _visible(self, which: int) -> torch.Tensor | None:
        view = super()._visible(which)
        if view is None or not torch.is_grad_enabled():
            return view
        assert isinstance(view, TqaiView) and self.core is not None
        # Where autograd records, a backward pass that comes here raises.
        like = self._like(view.shape[-1], view.dtype).requires_grad_()
        return view.update.views(like, like)[which]

    def _read(self) -> Update:
        assert self.core is not None
        # Families outside the attention interface never say that the first pass is over.
        self.core.seal()
        return super()._read()


class CrossCache(TqaiCache):
    """What all layers of a decoder have for the encoder's output."""

    def __init__(self, geometry: Geometry, settings: Settings) -> None:
        # The encoder's tokens are all seen for ever, whatever window the decoder's own have.
        super().__init__(geometry, settings, sliding=False)

    def _find_bases(self, geometry: Geometry) -> Bases:
        """None: what an encoder makes of its input cannot be had from random tokens of a text."""
        layers = range(len(geometry.heads)) if self.settings.learns_bases else ()
        return Bases({}, dict.fromkeys(layers, "it reads an encoder's output"))

    def _make_layer(
        self,
        index: int,
        settings: Settings,
        sliding_window: int | None,
        basis: _core.KeyBasis | None,
        own: Any,
    ) -> TqaiLayer:
        if settings.centering == "rope":  # these keys have no positions
            settings = replace(settings, centering="mean")
        return CrossLayer(index, settings, None, self.geometry.heads[index])


class TqaiEncoderDecoderCache(Passes, EncoderDecoderCache):
    """The compressed cache of an encoder-decoder model, as ``TqaiCache`` is of a decoder.

    ``self_attention_cache`` and ``cross_attention_cache`` are its two halves; the same settings
    hold for both, ``skip_layers`` too. It goes with one encoder input. ``copy.deepcopy``,
    ``pickle`` and ``tqai.save_cache`` work as they do with ``TqaiCache``, and so does what happens
    in a forward pass that fails.
    """

    self_attention_cache: TqaiCache
    cross_attention_cache: CrossCache

    @overload
    def __init__(self, model: PreTrainedModel, **options: Unpack[Options]) -> None: ...
    @overload
    def __init__(
        self,
        model: Geometry,
        settings: Settings,
        sliding: bool = True,
        bases: Bases | None = None,
    ) -> None: ...
    def __init__(
        self,
        model: PreTrainedModel | Geometry,
        settings: Settings | None = None,
        sliding: bool = True,
        bases: Bases | None = None,
        **options: Unpack[Options],
    ) -> None:
        """See ``TqaiCache``; a ValueError for a model that is no encoder-decoder one."""
        geometry, settings = described(type(self), model, settings, options)
        own = TqaiCache(geometry, settings, sliding, bases)
        super().__init__(own, CrossCache(geometry, own.settings))
        self._attach()

    def _attach(self) -> None:
        self._make_lock()
        for half in self.halves:
            half.whole = weak_ref(self)
            half.attach(self)
            half.lock = self.lock

    def __getstate__(self) -> dict[str, Any]:
        self.undo_unfinished()
        with self.lock:
            state = dict(vars(self))
            for name in ("lock", "_call"):
                state.pop(name, None)
            # Both of one moment.
            halves = ("self_attention_cache", "cross_attention_cache")
            copies = {name: copy.copy(state[name]) for name in halves}
            return {**state, **copies}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._attach()
        self.mark_updated()

    @property
    def halves(self) -> tuple[TqaiCache, CrossCache]:
        return self.self_attention_cache, self.cross_attention_cache

    @property
    def geometry(self) -> Geometry:
        return self.self_attention_cache.geometry

    @property
    def settings(self) -> Settings:
        return self.self_attention_cache.settings

    @property
    def sliding(self) -> bool:
        return self.self_attention_cache.sliding

    def check_model(self, geometry: Geometry) -> None:
        """Raises ValueError where this is the cache of another model than the one described."""
        self.self_attention_cache.check_model(geometry)

    def activate_past_recording(self) -> None:
        """Makes sliding layers keep what ``crop`` may go back to."""
        self.self_attention_cache.activate_past_recording()

    def use_exact_arithmetic(self) -> None:
        """See ``TqaiCache.use_exact_arithmetic``."""
        for half in self.halves:
            half.use_exact_arithmetic()

    def _parts(self) -> tuple[TqaiCache, ...]:
        return self.halves

    def roll_back(self) -> None:
        """Forgets what the forward pass that is under way has added."""
        super().roll_back()
        self.mark_updated()

    def mark_updated(self) -> None:
        """Tells the model which layers have read the encoder's output."""
        cross = self.cross_attention_cache
        self.is_updated = {
            index: int(layer.get_seq_length()) > 0 for index, layer in enumerate(cross.layers)
        }

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds; ``memory_report()["total_bytes"]``."""
        return self.memory_report()["total_bytes"]

    def memory_report(self) -> dict[str, Any]:
        """What both halves hold together, and the report of each by the half's name.

        See ``TqaiCache.memory_report``; ``tokens`` and ``packed_tokens`` are the decoder's and the
        encoder's tokens together.
        """
        reports = {
            "self_attention_cache": self.self_attention_cache.memory_report(),
            "cross_attention_cache": self.cross_attention_cache.memory_report(),
        }
        report: dict[str, Any] = {
            name: sum(half[name] for half in reports.values()) for name in COUNTS
        }
        return {**report, **reports, "settings": reports["self_attention_cache"]["settings"]}

    def __repr__(self) -> str:
        report = self.memory_report()
        return (
            f"TqaiEncoderDecoderCache({self.geometry.describe()}: {report['tokens']} tokens of "
            f"decoder and encoder in {report['total_bytes']} bytes, uncompressed "
            f"{report['uncompressed_bytes']})"
        )


vars(TqaiEncoderDecoderCache.__init__)["__signature__"] = signature_with_options(
    TqaiEncoderDecoderCache.__init__
)
