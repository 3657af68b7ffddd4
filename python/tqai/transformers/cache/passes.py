"""Forward passes over a cache: which one is under way, and what is undone of one that never ended.

Ctrl-C, or any error, may come between two layers. Some of them then hold tokens that others do not,
and whatever is read next is silently wrong. So the cache knows how each layer was before the pass,
and whether the call of the decoder that makes the pass is still on its thread's stack. Where it is
not and has not ended, its tokens are forgotten before anything else is done with the cache.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any
from weakref import ref as weak_ref

import torch
from transformers.cache_utils import DynamicLayer

from tqai.stores import for_torch as stores
from tqai.transformers.cache.layer import TqaiLayer
from tqai.transformers.model.other_layers import has_states

_CALL = torch.nn.Module._call_impl.__code__


class Call:
    """A call of a module, by the thread that makes this object."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = weak_ref(module)
        self._thread = threading.get_ident()

    def is_of_this_thread(self) -> bool:
        """Whether it is the caller's thread that makes it."""
        return self._thread == threading.get_ident()

    def is_under_way(self) -> bool:
        """Whether the thread is still in the call."""
        frame: FrameType | None
        if self.is_of_this_thread():
            frame = sys._getframe()
        else:
            frame = sys._current_frames().get(self._thread)
        module = self._module()
        while frame is not None:
            if frame.f_code is _CALL and frame.f_locals.get("self") is module:
                return True
            frame = frame.f_back
        return False


class Before:
    """How a layer was before an update."""

    _store: stores.Store | None = None
    _state: dict[str, Any] | None = None

    def __init__(self, layer: Any, tokens: int) -> None:
        """`tokens`: how many the update brings."""
        self.length = int(layer.get_seq_length())
        if isinstance(layer, TqaiLayer):
            self._padding = layer.padding
            if layer.core is not None and self.length > 0 and layer.seals_at_once(tokens):
                self._store = stores.snapshot(layer.core)
        elif type(layer) is not DynamicLayer or self.length == 0:
            # It may forget old tokens, and so cannot be cropped back. An update changes no tensor.
            self._state = dict(vars(layer))

    @property
    def nbytes(self) -> int:
        """Bytes that are held for no other reason."""
        kept = 0 if self._store is None else self._store.memory()["exact_bytes"]
        tensors = [] if self._state is None else self._state.values()
        return kept + sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor))

    def restore(self, layer: Any) -> None:
        """Makes `layer` as it was. May be called again where it was interrupted."""
        if isinstance(layer, TqaiLayer):
            if self.length == 0:
                layer.reset()
            elif self._store is not None:
                layer.put_back(self._store, self._padding)
            else:
                layer.truncate(self.length)
        elif self._state is not None:
            layer.__dict__ = dict(self._state)
        else:  # an interrupt may have come when it had new keys and old values
            layer.keys = layer.keys[..., : self.length, :]
            layer.values = layer.values[..., : self.length, :]

    def copy_of(self, layer: Any) -> Any:
        """A copy of `layer` as it was; see ``copy_of``."""
        copied = copy_of(layer)
        if isinstance(copied, TqaiLayer) and self._store is not None:
            copied.put_back(self._store.copy(), self._padding)
        else:
            self.restore(copied)
        return copied


def copy_of(layer: Any) -> Any:
    """A copy of a layer that does not see later changes and shares what is never changed."""
    if has_states(layer):
        return copy.deepcopy(layer)
    copied = copy.copy(layer)
    if isinstance(copied, TqaiLayer) and copied.core is not None:
        copied.core = copied.core.copy()
    return copied


class Passes:
    """What a cache does about forward passes; of an encoder-decoder's, the whole does it.

    Stands before a cache class of transformers', whose operations on rows it makes happen in all
    layers or in none.
    """

    _call: Call | None = None
    """Makes the pass that is under way, where a patched decoder's hook told of it."""

    def _parts(self) -> tuple[Any, ...]:
        """The caches that a pass adds tokens to."""
        raise NotImplementedError

    def _make_lock(self) -> None:
        # What other threads ask for must not come from a layer that is being changed.
        self.lock = threading.RLock()

    def begin_pass(self, decoder: torch.nn.Module) -> None:
        """Says that a call of `decoder` is about to add tokens; undoes a pass that never ended.

        Raises:
            RuntimeError: where another thread is in the midst of one.
        """
        if torch.compiler.is_compiling():
            return
        with self.lock:
            before = self._call
            if before is None:
                self._keep()
            elif before.is_of_this_thread() or not before.is_under_way():
                self.roll_back()
            else:
                raise RuntimeError(
                    "another thread's forward pass over this cache is under way: give each thread "
                    "a cache of its own, by tqai.new_cache(model) or as a copy.deepcopy"
                )
            for part in self._parts():
                part.expect_states()
            call = Call(decoder)
            # In a compiled model the call may have no frame of its own.
            self._call = call if call.is_under_way() else None

    def end_pass(self) -> None:
        """Makes what the forward passes so far have added lasting."""
        if torch.compiler.is_compiling():
            return
        self._keep()
        for part in self._parts():
            part.seal()

    def _keep(self) -> None:
        with self.lock:
            self._call = None
            for part in self._parts():
                part.forget_before()

    def roll_back(self) -> None:
        """Forgets what the forward pass that is under way has added."""
        with self.lock:
            for part in self._parts():
                part.restore_before()
            self._call = None

    def undo_unfinished(self) -> None:
        """Forgets what a forward pass that never ended has added."""
        call = self._call
        if call is None or call.is_under_way():
            return
        with self.lock:
            # It may have ended meanwhile, in another thread.
            if self._call is call and not call.is_under_way():
                self.roll_back()

    def is_tracked(self) -> bool:
        """Whether a pass is under way whose end will be told."""
        self.undo_unfinished()
        return self._call is not None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Makes row i what row beam_idx[i] was."""
        self._change_all(super().reorder_cache, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        self._change_all(super().batch_repeat_interleave, repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows at `indices`."""
        self._change_all(super().batch_select_indices, indices)

    def _change_all(self, change: Callable[..., None], *args: Any) -> None:
        """Calls `change`, which goes through the layers one by one, and undoes half of it."""
        self.undo_unfinished()
        # Not a context manager: these can be interrupted on the way out, with all done.
        with self.lock:
            layers = [layer for part in self._parts() for layer in part.layers]
            kept = [_kept_state(layer) for layer in layers]
            try:
                change(*args)
            except BaseException:
                for layer, state in zip(layers, kept, strict=True):
                    if isinstance(layer, TqaiLayer):
                        state["version"] = layer.version + 1
                    layer.__dict__ = state
                raise


def _kept_state(layer: Any) -> dict[str, Any]:
    state = {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in vars(layer).items()
    }
    if isinstance(layer, TqaiLayer) and layer.core is not None:
        state["core"] = stores.snapshot(layer.core)
    return state
