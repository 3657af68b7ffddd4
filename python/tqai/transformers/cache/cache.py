"""The compressed cache of a model: a list of layers, as transformers' DynamicCache is."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload
from weakref import ReferenceType
from weakref import ref as weak_ref

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tqai import _core
from tqai.settings import Options, Settings, signature_with_options
from tqai.transformers.attention import compiled
from tqai.transformers.attention import functions as attention
from tqai.transformers.attention.view import Update
from tqai.transformers.basis.bases import NONE, Bases, bases_of
from tqai.transformers.cache.beside import layer_for
from tqai.transformers.cache.layer import TqaiLayer, update_each
from tqai.transformers.cache.passes import Before, Passes, copy_of
from tqai.transformers.cache.report import report_of
from tqai.transformers.model.constants import difference
from tqai.transformers.model.geometry import (
    Geometry,
    check_model,
    geometry_of,
    is_compressible,
    is_encoder_decoder,
)
from tqai.transformers.model.other_layers import (
    WRONG_AFTER_CROP,
    can_go_back,
    forgets_its_past,
    has_states,
    holds_nothing,
    is_recurrent,
)
from tqai.transformers.model.positions import Turned
from tqai.transformers.weights.identity import State

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Unpack

# So that whoever has this module can name tqai's attention to a model before it has a cache.
attention.register()


class TqaiCache(Passes, DynamicCache):
    """Keys and values of a model, compressed, as ``tqai.patch(model)`` and ``new_cache`` make them.

    Pass it as ``past_key_values``; it belongs to the model that it was made for. Made by hand,
    ``TqaiCache(model, bits_k=4)`` goes with a model that is not patched: after
    ``model.set_attn_implementation("tqai")`` (or "tqai_eager", before the eager attention) it is
    read from its packed bytes, and with any other attention decompressed for it. ``copy.deepcopy``
    is cheap: copies share what is packed, and neither sees later changes of the other. ``pickle``
    works, also into a process with the same weights; ``tqai.save_cache`` writes files. Layers in
    ``skip_layers`` and layers without keys and values are transformers' own.

    A forward pass that does not end, because of Ctrl-C or of any error, leaves the cache as it was
    before the pass, unless there are recurrent states in it (hybrid models), which are lost then.
    While one thread generates, others may ask for ``memory_report()``, copy the cache and save it:
    copies and files have the tokens of the passes that have ended.
    """

    whole: ReferenceType[Passes] | None = None
    """The cache of an encoder-decoder model that this is one half of."""
    turned: Turned | None = None
    """What the forward pass that is under way turns its keys by."""
    rotated: Mapping[int, str]
    """Why layers are quantised in no basis where the settings ask for one, by their number."""
    weights: State | None = None
    """Those that its text was read with, by which other ones are noticed; None before that."""

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
        """An empty cache for `model`; the options are those of ``tqai.patch``.

        Or for what is known of a model, with settings; `sliding`: whether layers with a sliding
        window forget the tokens that have left it; `bases`: what keys are quantised in, None: what
        the settings say, learnt from the model if need be.

        Raises:
            TypeError: for an option that ``tqai.patch`` does not have.
            ValueError: for one out of range, and for an encoder-decoder model.
            NotImplementedError: for a model, layer or level that is not supported.
        """
        geometry, settings = described(type(self), model, settings, options)
        super().__init__(config=geometry.config)
        self.geometry = geometry
        self.settings = settings
        self.sliding = sliding
        # Assisted decoding by early exit asks for a cache of the first layers only.
        count = max(len(self.layers), len(geometry.heads))
        skipped = settings.skipped(count)
        if bases is None:
            bases = self._choose_bases(geometry)
            settings = self.settings
        self.rotated = bases.missing
        for index, layer in enumerate(self.layers):
            if index not in skipped and is_compressible(layer):
                window = getattr(layer, "sliding_window", None) if sliding else None
                own = settings.of_layer(index, count)
                basis = bases.found.get(index)
                self.layers[index] = self._make_layer(index, own, window, basis, layer)
            elif type(layer) is DynamicSlidingWindowLayer and not sliding:
                self.layers[index] = DynamicLayer()
        self._before: dict[int, Before] = {}
        self._changed_states = False
        self._lost_states = False
        self._make_lock()
        self.handle = compiled.handle_of(self)
        self.attach(self)

    def attach(self, owner: Passes) -> None:
        """Tells the layers what to undo where attention over what they hold fails."""
        for layer in self.layers:
            if isinstance(layer, TqaiLayer):
                layer.owner = weak_ref(owner)

    def _choose_bases(self, geometry: Geometry) -> Bases:
        """What the keys are quantised in at first; of the codec "auto", it says in the settings
        which one that is."""
        open_ = self.settings.codec == "auto"
        try:
            bases = self._find_bases(geometry)
        except NotImplementedError:
            if not open_:
                raise
            self.settings = self.settings.without_bases()
            return NONE
        if open_:
            self.settings = replace(self.settings, codec="adaptive")
        return bases

    def _find_bases(self, geometry: Geometry) -> Bases:
        """What the keys of the layers are quantised in, for a model of this geometry."""
        if not self.settings.learns_bases:
            return NONE
        layers = range(len(geometry.heads))
        skipped = self.settings.skipped(len(layers))
        return bases_of(geometry, self.settings, [i for i in layers if i not in skipped])

    def _renew_bases(self, geometry: Geometry) -> None:
        """Takes the bases of a model's weights as they are now, for an empty cache."""
        bases = self._find_bases(geometry)
        self.rotated = bases.missing
        for layer in self.layers:
            if isinstance(layer, TqaiLayer):
                layer.basis = bases.found.get(layer.index)

    def _make_layer(
        self,
        index: int,
        settings: Settings,
        sliding_window: int | None,
        basis: _core.KeyBasis | None,
        own: Any,
    ) -> TqaiLayer:
        """A compressed layer in place of `own`."""
        geometry = self.geometry
        heads, rope, latents = (
            known[index] for known in (geometry.heads, geometry.ropes, geometry.latents)
        )
        return layer_for(own, index, settings, sliding_window, heads, rope, latents, basis)

    def __getstate__(self) -> dict[str, Any]:
        """A copied half gets its own whole, and each forward pass has its own views."""
        layers = self.snapshot()
        state = dict(vars(self))
        for name in ("whole", "lock", "_call", "handle"):
            state.pop(name, None)
        state.pop("shared_layers", None)  # where Gemma 3n keeps them with transformers 4
        state.pop("turned", None)
        if self.is_empty():
            state.pop("weights", None)
        return {**state, "layers": layers, "_before": {}, "_changed_states": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_lock()
        self.handle = compiled.handle_of(self)
        self.attach(self)

    def snapshot(self) -> list[Any]:
        """Copies of the layers as they were before a forward pass that is under way.

        Cheap; they share what is packed, and see no later changes.

        Raises:
            RuntimeError: where that pass has changed recurrent states, which are not kept twice.
        """
        owner = self._owner()
        owner.undo_unfinished()
        with self.lock:
            before = self._before if owner.is_tracked() else {}
            if owner.is_tracked() and self._changed_states:
                raise RuntimeError(
                    "a forward pass over this cache is under way, and the recurrent states of "
                    f"{self.geometry.model} are not held as they were before it: copy or save the "
                    "cache between two passes"
                )
            return [
                before[index].copy_of(layer) if index in before else copy_of(layer)
                for index, layer in enumerate(self.layers)
            ]

    @property
    def is_initialized(self) -> bool:
        """Whether all layers with keys and values hold some, as DynamicCache's says.

        transformers counts the layers that can be set up early, which ours need not be.
        """
        layers = [
            layer
            for layer in self.layers
            if isinstance(layer, TqaiLayer) or getattr(layer, "supports_early_init", True)
        ]
        return bool(layers) and all(layer.is_initialized for layer in layers)

    def check_model(self, geometry: Geometry) -> None:
        """Looks whether this cache goes with the model described, as it is now.

        Raises:
            ValueError: where it does not: it is another model's, or has read its text with other
                weights than the model now has.
        """
        if geometry is not self.geometry and geometry != self.geometry:
            raise ValueError(
                f"this cache was made for {self.geometry.describe()}, not for "
                f"{geometry.describe()}; make one with tqai.new_cache(model)"
            )
        own = self.geometry.describe()
        if geometry is not self.geometry:
            differing = difference(self.geometry.constants, geometry.constants)
            if differing and not self.is_empty():
                raise ValueError(
                    f"this cache has read its text with another {own}, whose configuration has "
                    f"another constant ({differing}); make one with tqai.new_cache(model) and read "
                    "the text again"
                )
        now = geometry.weights()
        if now is self.weights:
            return
        # Of the model that it was made for, an empty cache takes whatever weights it has.
        others = geometry is not self.geometry and self.weights is None and self.geometry.is_alive()
        read_with = self.geometry.weights() if others else self.weights
        if (others or not self.is_empty()) and read_with and not now.is_same_as(read_with):
            if geometry is self.geometry:
                change = "trained, loaded, another adapter, or one switched off or merged"
                if not now.dtypes():
                    change = "they are in no memory now, as after disk_offload()"
                elif read_with.dtypes() != now.dtypes():
                    change = f"of {read_with.dtypes()} then, of {now.dtypes()} now"
                elif not read_with.turns_as(now):
                    change = "the frequencies of its rotary embedding"
                raise ValueError(
                    f"the weights of {own} have changed since this cache read its text ({change}): "
                    "put them back as they were, or make a cache with tqai.new_cache(model) and "
                    "read the text again"
                )
            raise ValueError(
                f"this cache was made for {own}, not for another {own} with other weights; make "
                "one with tqai.new_cache(model)"
            )
        if self.settings.learns_bases and self.is_empty():
            self._renew_bases(geometry)
        self.weights = now

    def is_empty(self) -> bool:
        """Whether it has read nothing."""
        return not any(
            int(layer.get_seq_length()) > 0
            for layer in self.layers
            if not (is_recurrent(layer) or holds_nothing(layer))
        )

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds tokens to a layer; see ``TqaiLayer.update``.

        Raises:
            ValueError: also for a layer that the cache's model does not have. As after any error
                here, the layers that the forward pass has updated forget its tokens.
        """
        if compiled.is_tracing():
            return self._update_traced(key_states, value_states, layer_idx, *args, **kwargs)
        owner = self._owner()
        with self.lock:
            if layer_idx in self._before and not owner.is_tracked():  # a new forward pass
                owner.end_pass()
            self._check_states()
            try:
                if not 0 <= layer_idx < len(self.layers):
                    raise ValueError(
                        f"layer {layer_idx} does not exist in this cache, which was made for "
                        f"{self.geometry.describe()}; make one with tqai.new_cache(model)"
                    )
                layer = self.layers[layer_idx]
                if layer_idx not in self._before:
                    tokens = key_states.shape[2] if key_states.ndim == 4 else 0
                    self._before[layer_idx] = Before(layer, tokens)
                if type(layer) is not TqaiLayer:
                    self._changed_states |= has_states(layer)
                if isinstance(layer, TqaiLayer):
                    layer.turned = self.turned
                    # transformers' own method does no more for layers that are all there.
                    return layer.update(key_states, value_states, *args, **kwargs)
                return super().update(key_states, value_states, layer_idx, *args, **kwargs)
            except BaseException:
                self.roll_back()
                raise

    def layer_for_one(self, layer_idx: int, like: tuple[Any, ...]) -> TqaiLayer | None:
        """The layer, where ``update_each`` can do this cache's next update of it in a pass that was
        told of; else ``update`` does."""
        layer = self.layers[layer_idx]
        if type(layer) is not TqaiLayer or layer_idx in self._before or self.turned is not None:
            return None
        self._check_states()
        return layer if layer.takes_like(like) else None

    def _update_traced(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``update`` as Dynamo sees it."""
        layer = self.layers[layer_idx]
        if type(layer) is TqaiLayer and (keys.shape[-2] == 1 or layer.settings.exact_prefill):
            return compiled.update(self, keys, values, layer_idx)
        if not isinstance(layer, TqaiLayer):
            compiled.note(self, layer_idx, keys)
            return super().update(keys, values, layer_idx, *args, **kwargs)
        return compiled.outside(self.update, keys, values, layer_idx, *args, **kwargs)

    def note_before(self, layer_idx: int, tokens: int) -> None:
        """Remembers how a layer is, before a traced update that brings it `tokens`."""
        with self.lock:
            if layer_idx not in self._before:
                self._before[layer_idx] = Before(self.layers[layer_idx], tokens)

    def update_conv_state(self, conv_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As transformers' cache does, for a layer with a recurrent state.

        Raises:
            RuntimeError: after a forward pass that did not end; see ``restore_before``.
        """
        self._check_states()
        self._changed_states = True
        return super().update_conv_state(conv_states, *args, **kwargs)

    def update_recurrent_state(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """See ``update_conv_state``."""
        self._check_states()
        self._changed_states = True
        return super().update_recurrent_state(states, *args, **kwargs)

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """As transformers' cache does, for a layer with an index."""
        if not compiled.is_tracing():
            self._owner().undo_unfinished()
            # Some models come here first, others after the layer's keys and values.
            self.note_before(layer_idx, indexer_key_states.shape[1])
        return super().update_indexer(indexer_key_states, layer_idx)

    def _check_states(self) -> None:
        if self._lost_states:
            raise RuntimeError(
                "a forward pass over this cache did not end, and the recurrent states of "
                f"{self.geometry.model} cannot be put back as they were before: reset() it, or "
                "make another with tqai.new_cache(model), and read the text again"
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that a layer holds."""
        self.undo_unfinished()
        return super().get_seq_length(layer_idx)

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """See ``TqaiLayer.get_mask_sizes``."""
        self.undo_unfinished()
        return super().get_mask_sizes(*args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens; a positive number is a length to keep.

        Raises:
            NotImplementedError: for a model with recurrent states, which cannot go back. Before
                transformers 5.14 those of convolutions stay as they are, with a warning.
            RuntimeError: see ``TqaiLayer.crop``.
        """
        for index, layer in enumerate(self.layers):
            if has_states(layer) and not can_go_back(layer):
                raise NotImplementedError(
                    f"layer {index} of {self.geometry.model} holds a recurrent state, which cannot "
                    "go back to an earlier token: copy.deepcopy the cache before the tokens that "
                    "are to be forgotten"
                )
        if any(forgets_its_past(layer) for layer in self.layers):
            warnings.warn(WRONG_AFTER_CROP, stacklevel=2)
        self._change_all(super().crop, tokens_to_remove)

    def reset(self) -> None:
        """Empties the cache."""
        self._lost_states = any(map(has_states, self.layers))  # these are emptied in place
        self._change_all(super().reset)
        self.forget_before()
        self._lost_states = False

    def activate_past_recording(self) -> None:
        """Makes sliding layers keep what ``crop`` may go back to; see ``TqaiLayer``."""
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def use_exact_arithmetic(self) -> None:
        """Makes attention dequantise the codes and leave the rest to torch, from now on.

        Slow: for measurements of what the kernels' integer arithmetic adds to the codes' own error.
        """
        for layer in self.layers:
            if isinstance(layer, TqaiLayer):
                layer.exact_arithmetic = True

    def _owner(self) -> Passes:
        """The cache that a forward pass takes."""
        whole = self.whole() if self.whole is not None else None
        return self if whole is None else whole

    def _parts(self) -> tuple[TqaiCache, ...]:
        return (self,)

    def roll_back(self) -> None:
        """Forgets what the forward pass that is under way has added, in both halves of a whole."""
        owner = self._owner()
        if owner is self:
            super().roll_back()
        else:
            owner.roll_back()

    def undo_unfinished(self) -> None:
        """Forgets what a forward pass that never ended has added, in both halves of a whole."""
        owner = self._owner()
        if owner is self:
            super().undo_unfinished()
        else:
            owner.undo_unfinished()

    def seal(self) -> None:
        """Compresses what has left the residual windows."""
        for layer in self.layers:
            if isinstance(layer, TqaiLayer):
                layer.seal()

    def expect_states(self) -> None:
        """Says that recurrent states are about to change: some models do that on their own."""
        others = (layer for layer in self.layers if type(layer) is not TqaiLayer)
        self._changed_states = any(map(has_states, others))

    def forget_before(self) -> None:
        """Forgets how the layers were before the pass."""
        self._before.clear()
        self._changed_states = False

    def restore_before(self) -> None:
        """Makes the layers as they were before the pass.

        Recurrent states are not kept twice for that: those of an empty cache become empty again,
        and otherwise the cache is of no use any more and says so when it is used.
        """
        if self._changed_states:
            if self._holds_tokens_before():
                self._lost_states = True
            else:
                for layer in filter(has_states, self.layers):
                    layer.reset()
            self._changed_states = False
        for index in list(self._before):
            if not has_states(self.layers[index]):
                self._before[index].restore(self.layers[index])
            del self._before[index]

    def _holds_tokens_before(self) -> bool:
        """Whether there were tokens before the pass."""
        before = self._before
        return any(
            before[index].length if index in before else int(layer.get_seq_length())
            for index, layer in enumerate(self.layers)
            if not (is_recurrent(layer) or holds_nothing(layer))
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds; ``memory_report()["total_bytes"]``."""
        return self.memory_report()["total_bytes"]

    def memory_report(self) -> dict[str, Any]:
        """What the cache holds, as its allocators handed it out.

        ``packed_bytes`` (codes and norms), ``exact_bytes`` (sinks, windows, tokens that wait to be
        sealed, uncompressed layers), ``overhead_bytes`` (headers, lists, centres) and their sum
        ``total_bytes``, ``mapped_bytes`` (tiles in pages of a file), ``basis_bytes`` (bases that
        keys are quantised in, which all caches of the model share) and ``uncompressed_bytes``, that
        the same tokens would take, none of which is in the total, are sums over the layers.
        ``tokens`` and ``packed_tokens`` are those of the layer that holds most, over all rows and
        without padding. ``layers`` has the same numbers layer by layer, ``centering`` counts the
        heads by what their keys are centred on, ``rotary`` the compressed layers by the layout of
        their rotary embedding, "unrecognised" where keys get no rotary centre, ``codecs`` by what
        keys are quantised in, "scalar: " and why where they are in no basis though the settings ask
        for one, ``value_codes`` and ``key_codes`` by what codes of values and of keys stand for,
        ``settings`` has the arguments of ``patch``. Tiles that caches share count in each of them.
        """
        self.undo_unfinished()
        kept = sum(before.nbytes for before in list(self._before.values()))
        return report_of(self.layers, self.settings, self.rotated, kept)

    def __repr__(self) -> str:
        report = self.memory_report()
        bases = report["basis_bytes"]
        return (
            f"TqaiCache({self.geometry.describe()}: {report['tokens']} tokens in "
            f"{report['total_bytes']} bytes, uncompressed {report['uncompressed_bytes']}"
            f"{f'; keys in bases of {bases} bytes, shared' if bases else ''})"
        )


def described(
    kind: type, model: PreTrainedModel | Geometry, settings: Settings | None, options: Options
) -> tuple[Geometry, Settings]:
    """What a cache of this kind is made from, from what its constructor was given."""
    if isinstance(model, Geometry) and settings is not None and not options:
        return model, settings
    name = f"tqai.{kind.__name__}"
    if settings is not None:
        raise TypeError(f"{name}() takes a model, and options by their names, as tqai.patch does")
    settings = Settings.of_options(name, options)
    check_model(model, settings)
    assert not isinstance(model, Geometry)
    if issubclass(kind, TqaiCache) == is_encoder_decoder(model):
        other, what = (
            ("TqaiEncoderDecoderCache", "is")
            if is_encoder_decoder(model)
            else ("TqaiCache", "is not")
        )
        raise ValueError(
            f"{type(model).__name__} {what} an encoder-decoder model: make a tqai.{other}(model)"
        )
    return geometry_of(model, afresh=True), settings


vars(TqaiCache.__init__)["__signature__"] = signature_with_options(TqaiCache.__init__)


def update_caches(
    caches: list[TqaiCache],
    layers: list[TqaiLayer],
    keys: torch.Tensor,
    values: torch.Tensor,
    layer_idx: int,
) -> list[Update]:
    """``TqaiCache.update`` of many caches of one row, by a token each; see ``update_each``.

    layers: what ``layer_for_one`` gave of each. After an error all of these layers are as before;
    where it is an interrupt, the other layers too forget the pass's tokens.
    """
    with contextlib.ExitStack() as stack:
        for cache in caches:
            stack.enter_context(cache.lock)
        try:
            for cache in caches:
                cache.note_before(layer_idx, 1)
            return update_each(layers, keys, values)
        except Exception:
            raise
        except BaseException:
            for cache in caches:
                cache.roll_back()
            raise
