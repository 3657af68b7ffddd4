"""Which weights a model computes with: whether they have changed, and what they are.

Whether anything has changed is asked at every forward pass, and answered from PyTorch's own
records without reading a number: which tensors a model holds, where their memory is, how often they
were written to, and which adapters are on (``Watch``). What the weights are is asked when a cache
goes into a file or comes from one, and answered from all of their bytes (``Identity``), which are
read at a few GB/s, and again only where something has changed.
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, compress, repeat
from operator import attrgetter, is_, is_not
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tqai.transformers.weights import digests
from tqai.transformers.weights.held import (
    Part,
    leaves_of,
    parts_around,
    parts_of,
    turns_of,
)

STATES = 8
"""States of a model that are remembered: adapters are switched back and forth."""


class Identity(NamedTuple):
    """What a model's weights are; equal in every process and on every device."""

    structure: str
    """A digest of their names, shapes and dtypes, and of the adapters' scaling."""
    names: tuple[str, ...]
    tensors: tuple[str | None, ...]
    """A digest of each one's numbers; None where these are nowhere."""
    around: Identity | None = None
    """Of what makes the decoder's input, an encoder or what reads images; None: not known."""

    @property
    def unread(self) -> int:
        """How many could not be read."""
        return self.tensors.count(None)

    def digest(self) -> str:
        """All of it in 16 characters."""
        around = None if self.around is None else self.around.digest()
        return digests.short(repr((self.structure, self.tensors, around)))

    def is_same_as(self, other: Identity) -> bool:
        """Whether nothing that is known of both differs."""
        if self.structure != other.structure or self.differing(other.tensors):
            return False
        return not (self.around and other.around) or self.around.is_same_as(other.around)

    def differing(self, tensors: Sequence[str | None]) -> list[str]:
        """Names of the tensors that are known to differ from those of the same structure."""
        pairs = zip(self.names, self.tensors, tensors, strict=True)
        return [name for name, a, b in pairs if None not in (a, b) and a != b]


class State:
    """The weights of a model between two changes; made by ``Watch.now``.

    Copies and pickles of what holds it are of the same weights.
    """

    def __init__(self, watch: Watch | None, held: _Held | None, identity: Identity | None) -> None:
        self._watch = None if watch is None else ref(watch)
        self.held = held
        self._identity = identity

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return State, (None, None, self.identity())

    def identity(self, afresh: bool = False) -> Identity:
        """What the weights are.

        afresh: also where it is known, looks for edits that PyTorch has no record of.

        Raises:
            ValueError: where they are no more, and were not read while they were.
        """
        watch = None if self._watch is None else self._watch()
        decoder = None if watch is None else watch.decoder()
        if watch is not None and decoder is not None and watch.now() is self:
            if self._identity is None or afresh:
                self._identity = watch.read(decoder)
        elif self._identity is None:
            gone = "changed" if decoder is not None else "gone with its model"
            raise ValueError(f"the weights that this cache has read its text with have {gone}")
        return self._identity

    def dtypes(self) -> str:
        """The dtypes of the weights, as in "torch.float32"; empty where they are not known."""
        leaves = () if self.held is None else self.held.leaves
        return ", ".join(sorted({str(leaf.dtype) for leaf in leaves if isinstance(leaf, _Leaf)}))

    @property
    def turns(self) -> list[Any] | None:
        """The frequencies of the rotary modules; None where they are not known."""
        return None if self.held is None else self.held.turns

    def turns_as(self, other: State) -> bool:
        """Whether keys go through rotary embeddings of the same frequencies, if that is known."""
        return None in (self.turns, other.turns) or self.turns == other.turns

    def is_same_as(self, other: State) -> bool:
        """Whether both are the same weights; reads them where that is not known yet."""
        if other is self:
            return True
        if not self.turns_as(other):
            return False
        try:
            theirs = other.identity()  # first: where it is not to be had, nothing need be read
            return self.identity().is_same_as(theirs)
        except ValueError:
            return False


class Watch:
    """Tells when the weights of `decoder` are others than they were; keeps none of them alive.

    Seen are writing to a tensor, replacing tensors and modules, and switching, merging and adding
    adapters. Of edits through ``tensor.data`` PyTorch keeps no record: those of whole tensors are
    seen in the CPU's memory, by a word of each, those of whole rows when a file is saved or loaded.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = ref(decoder)
        self._model: ref[nn.Module] | None = None
        self._seen: tuple[_Glance, State] | None = None
        self._states: deque[State] = deque(maxlen=STATES)
        """Latest first."""
        self._read: dict[int, _Read] = {}
        self._lock = threading.RLock()

    def surround(self, model: nn.Module) -> None:
        """Watches also what of `model`, whose decoder this is, makes the decoder's input."""
        if self.model() is None and model is not self.decoder():
            self._model, self._seen = ref(model), None

    def model(self) -> nn.Module | None:
        """What was told to surround the decoder, if that is still there."""
        return None if self._model is None else self._model()

    def _around(self, decoder: nn.Module) -> list[Part]:
        model = self.model()
        return [] if model is None else list(parts_around(model, decoder))

    @torch.compiler.disable
    def now(self) -> State:
        """The weights as they are: the same object as long as they are the same.

        Costs microseconds where nothing was touched, else milliseconds.
        """
        seen = self._seen
        if seen is not None and seen[0].is_current():
            return seen[1]
        decoder = self.decoder()
        assert decoder is not None
        with self._lock:
            parts = [*parts_of(decoder), *self._around(decoder)]
            held = _Held.of(parts)
            state = next((s for s in self._states if s.held and s.held.is_still(held)), None)
            if state is None:
                state = State(self, held, None)
            else:
                self._states.remove(state)
                state.held = held
            self._states.appendleft(state)
            self._seen = _Glance(parts), state
        return state

    def read(self, decoder: nn.Module) -> Identity:
        """Reads the weights, but for those that were read before and have not changed."""
        with self._lock:
            return self._read_all(decoder)

    def _read_all(self, decoder: nn.Module) -> Identity:
        before, self._read = self._read, {}
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            own = self._read_parts(parts_of(decoder), before, pool)
            around = self._read_parts(self._around(decoder), before, pool)
        return own._replace(around=around) if around.names else own

    def _read_parts(
        self, parts: Iterable[Part], before: dict[int, _Read], pool: ThreadPoolExecutor
    ) -> Identity:
        described: list[str] = []
        names: list[str] = []
        found: list[str | None] = []
        for part in parts:
            effect = None if part.adapter is None else part.adapter.effect()
            if effect is not None:
                described.append(f"{part.name} {effect}")
            for name, value in part.values():
                described.append(f"{name} {digests.describe(value)}")
                names.append(name)
                found.append(self._digest(value, before, pool))
        order = sorted(range(len(names)), key=names.__getitem__)
        return Identity(
            digests.short("\n".join(sorted(described))),
            tuple(names[at] for at in order),
            tuple(found[at] for at in order),
        )

    def _digest(self, value: Any, before: dict[int, _Read], pool: ThreadPoolExecutor) -> str | None:
        if not isinstance(value, torch.Tensor):
            return digests.digest(value, pool)
        leaves = [_Leaf.of(leaf) for leaf in leaves_of(value)]
        # Some are made for this call alone, and the next one may have the same address.
        for known in (self._read, before):
            read = known.get(id(value))
            if read is not None and read.is_still(leaves):
                break
        else:
            read = _Read(leaves, _looks(leaves), digests.digest(value, pool))
        self._read[id(value)] = read
        return read.digest


_watches: WeakKeyDictionary[nn.Module, Watch] = WeakKeyDictionary()


def watch_of(decoder: nn.Module) -> Watch:
    """The watch over the weights of `decoder`."""
    watch = _watches.get(decoder)
    if watch is None:
        watch = _watches[decoder] = Watch(decoder)
    return watch


class _Leaf(NamedTuple):
    """Where a tensor is, and how often it was written to."""

    tensor: ref[torch.Tensor]
    version: int
    address: int
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage: StorageWeakRef | None
    word: int
    """One of its words, where it can be looked at quickly."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Leaf:
        has_memory = tensor.layout == torch.strided and tensor.device.type != "meta"
        storage = StorageWeakRef(tensor.untyped_storage()) if has_memory else None
        version, address = _record(tensor)
        word = _word(tensor)
        value = 0 if word is None else word.value
        strides = tensor.stride() if tensor.layout == torch.strided else ()
        shape = tuple(tensor.shape)
        return cls(
            ref(tensor),
            version,
            address,
            tensor.dtype,
            tensor.device,
            shape,
            strides,
            storage,
            value,
        )

    def is_still(self, now: _Leaf) -> bool:
        """Whether `now` has the same numbers for sure: the same memory, which nobody has written to
        since, or a tensor that was moved to another device, or into memory that processes share."""
        mine, other = ((leaf.version, leaf.dtype, leaf.shape, leaf.strides) for leaf in (self, now))
        if mine[:3] != other[:3] or now.tensor() is None:
            return False
        # The memory that is given back may be handed out again at the same address.
        kept = self.address == now.address and not (self.storage and self.storage.expired())
        if (kept or self._is_shared_as(now)) and self.device == now.device:
            return mine == other and self.word == now.word
        return self.device != now.device and self.tensor() is now.tensor()

    def _is_shared_as(self, now: _Leaf) -> bool:
        """Whether `now` is the same tensor after its memory was shared, as a tensor's is that is
        sent to another process."""
        tensor = now.tensor()
        if tensor is None or self.storage is None or self.storage.expired():
            return False
        return self.storage == now.storage and tensor.is_shared()


def _record(tensor: torch.Tensor) -> tuple[int, int]:
    """How often a tensor was written to, as far as PyTorch counts that, and where it is."""
    strided = tensor.layout == torch.strided
    return -1 if tensor.is_inference() else tensor._version, tensor.data_ptr() if strided else 0


def _word(tensor: torch.Tensor) -> ctypes.c_int64 | None:
    """A view of eight bytes in the middle of a tensor in the CPU's memory, alive only as that is.

    Reading it costs a hundredth of what an operation of PyTorch's does.
    """
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.nbytes < 8:
        return None
    if not tensor.is_contiguous():
        return None
    middle = min(tensor.nbytes // 2, tensor.nbytes - 8) // 8 * 8
    return ctypes.c_int64.from_address(tensor.data_ptr() + middle)


class _Read(NamedTuple):
    """A tensor that was read, and what says that it need not be again."""

    leaves: list[_Leaf]
    looks: list[int]
    digest: str | None

    def is_still(self, leaves: list[_Leaf]) -> bool:
        return (
            len(leaves) == len(self.leaves)
            and all(mine.is_still(now) for mine, now in zip(self.leaves, leaves, strict=True))
            and self.looks == _looks(leaves)
        )


def _looks(leaves: list[_Leaf]) -> list[int]:
    tensors = (leaf.tensor() for leaf in leaves)
    return [0 if t is None or t.device.type == "meta" else digests.look(t) for t in tensors]


class _Held(NamedTuple):
    """What a model computes with, by name, and what its adapters do."""

    names: list[str]
    leaves: list[_Leaf | int]
    """An int for what is no tensor."""
    effects: list[Any]
    turns: list[Any] | None
    """The rotary frequencies: no weights, but no text is read on with others. None: nowhere."""

    @classmethod
    def of(cls, parts: list[Part]) -> _Held:
        named = list(_named(parts))
        effects = [(part.name, part.adapter.effect()) for part in parts if part.adapter is not None]
        effects = [(name, effect) for name, effect in effects if effect is not None]
        turns = [(part.name, _numbers(part.module)) for part in parts if turns_of(part.module)]
        known = None if any(numbers is None for _, numbers in turns) else turns
        return cls([name for name, _ in named], [leaf for _, leaf in named], effects, known)

    def is_still(self, now: _Held) -> bool:
        if (self.names, self.effects) != (now.names, now.effects):
            return False
        if self.turns != now.turns and None not in (self.turns, now.turns):
            return False
        return all(
            mine.is_still(other)
            if isinstance(mine, _Leaf) and isinstance(other, _Leaf)
            else mine == other
            for mine, other in zip(self.leaves, now.leaves, strict=True)
        )


def _numbers(module: nn.Module) -> list[Any] | None:
    """The frequencies of a rotary module; None where they are nowhere."""
    turns = turns_of(module)
    if any(buffer.device.type == "meta" for buffer in turns.values()):
        return None
    return [(key, buffer.tolist()) for key, buffer in turns.items()]


def _named(parts: list[Part]) -> Iterator[tuple[str, Any]]:
    for part in parts:
        for key, name, tensor in part.tensors():
            at_hand = part.at_hand(key, tensor)
            if at_hand is None:
                yield name, 0
            else:
                yield from ((name, _Leaf.of(leaf)) for leaf in leaves_of(at_hand))
        if part.packed() is not None:
            yield part.name, id(part.packed())


class _Glance:
    """What is looked at to see that nothing was touched; quick, as each forward pass does it.

    Modules and tensors are told apart by their addresses, which may be handed out again: not while
    the memory of the tensors that were there is still theirs.
    """

    def __init__(self, parts: list[Part]) -> None:
        usual = [part for part in parts if _is_usual(part)]
        self._parents = [ref(part.module) for part in parts if part.module._modules]
        self._owners = [ref(part.module) for part in usual if part.module._parameters]
        self._buffers = [
            (ref(part.module), keys) for part in usual if (keys := _counted(part.module))
        ]
        self._others = [_Other(part) for part in parts if not _is_usual(part)]
        self._adapters = [
            (ref(part.module), copy.deepcopy(_switches(part.module)))
            for part in parts
            if part.adapter is not None
        ]
        self._children = list(map(id, _values(self._parents, _CHILDREN) or ()))
        places = self._tensors() or []
        self._ids = list(map(id, places))
        self._taken = [tensor is not None for tensor in places]
        tensors = list(compress(places, self._taken))
        leaves = [leaf for tensor in tensors for leaf in leaves_of(tensor)]
        self._leaves = [ref(leaf) for leaf in leaves]
        self._are_tensors = all(map(is_, leaves, tensors)) and len(leaves) == len(tensors)
        self._versions = list(map(_VERSION, leaves))
        self._addresses = list(map(_ADDRESS, leaves))
        self._storages = [StorageWeakRef(leaf.untyped_storage()) for leaf in leaves]
        self._storage_ids = [storage.cdata for storage in self._storages]
        self._words = [word for word in map(_word, leaves) if word is not None]
        self._values = list(map(_VALUE, self._words))

    def _tensors(self) -> list[Any] | None:
        """What the usual modules hold now, a None for each tensor that they do without; or None
        where a module is gone."""
        tensors = _values(self._owners, _PARAMETERS)
        for reference, keys in self._buffers:
            module = reference()
            if tensors is None or module is None:
                return None
            tensors += [module._buffers.get(key) for key in keys]
        return tensors

    def is_current(self) -> bool:
        # All of it is done by functions in C, without a step of Python's for each tensor.
        places = self._tensors()
        if places is None or list(map(id, places)) != self._ids:
            return False
        leaves = list(compress(places, self._taken))
        if not self._are_tensors:
            leaves = [reference() for reference in self._leaves]
            if any(leaf is None for leaf in leaves):
                return False
        return (
            list(map(_VERSION, leaves)) == self._versions
            and list(map(_ADDRESS, leaves)) == self._addresses
            and not any(map(torch.UntypedStorage._expired, self._storage_ids))
            # The memory of the words is there still, by the above.
            and list(map(_VALUE, self._words)) == self._values
            and (children := _values(self._parents, _CHILDREN)) is not None
            and list(map(id, children)) == self._children
            and all(other.is_current() for other in self._others)
            and all(_is_set(*each) for each in self._adapters)
        )


_CHILDREN, _PARAMETERS = attrgetter("_modules"), attrgetter("_parameters")
_VALUE = attrgetter("value")
_VERSION, _ADDRESS = torch.Tensor._version.__get__, torch.Tensor.data_ptr


def _values(references: list[ref[nn.Module]], collection: Callable[..., Any]) -> list[Any] | None:
    """All that is in a collection of these modules; None where one is gone."""
    modules = list(map(ref.__call__, references))
    if not all(map(is_not, modules, repeat(None))):
        return None
    return list(chain.from_iterable(map(dict.values, map(collection, modules))))


def _saved(module: nn.Module) -> tuple[str, ...]:
    """Names of the buffers that are saved with a module."""
    hidden = module._non_persistent_buffers_set
    return tuple(
        k for k, buffer in module._buffers.items() if buffer is not None and k not in hidden
    )


def _counted(module: nn.Module) -> tuple[str, ...]:
    """Names of the buffers that a cache depends on."""
    saved = _saved(module)
    return saved + tuple(key for key in turns_of(module) if key not in saved)


def _is_usual(part: Part) -> bool:
    """Whether a part holds tensors in memory alone, all of which count, or nothing."""
    module = part.module
    if part.packed() is not None or (
        part.only is not None and (module._parameters or module._buffers)
    ):
        return False
    tensors = [*module._parameters.values(), *(module._buffers[key] for key in _counted(module))]
    return all(
        leaf.layout == torch.strided and leaf.device.type != "meta" and not leaf.is_inference()
        for tensor in tensors
        if tensor is not None
        for leaf in leaves_of(tensor)
    )


class _Other:
    """What is looked at of a module that holds more than ordinary parameters."""

    def __init__(self, part: Part) -> None:
        self._part = part._replace(module=ref(part.module))
        self._seen = self._look()

    def _look(self) -> list[Any] | None:
        module = self._part.module()
        if module is None:
            return None
        seen: list[Any] = [
            (name, id(leaf.tensor()), *leaf[1:]) if isinstance(leaf, _Leaf) else (name, leaf)
            for name, leaf in _named([self._part._replace(module=module)])
        ]
        return [*seen, _numbers(module)]

    def is_current(self) -> bool:
        return self._look() == self._seen


def _switches(module: nn.Module) -> tuple[Any, ...]:
    """What an adapter layer is set to, as it stands there."""
    state = vars(module)
    return tuple(map(state.get, ("_disable_adapters", "_active_adapter", "merged_adapters"))) + (
        state.get("scaling"),
    )


def _is_set(reference: ref[nn.Module], switches: tuple[Any, ...]) -> bool:
    module = reference()
    return module is not None and _switches(module) == switches


def sampled_fingerprint(decoder: nn.Module) -> str:
    """What stood for the weights in files of version 1: a sample, read as it was then.

    Names, shapes, dtypes and the start of each parameter's middle row.
    """
    digest = hashlib.sha256()
    for name, parameter in decoder.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        if parameter.device.type == "meta":  # offloaded
            continue
        row = parameter.detach()
        while row.ndim > 1:
            row = row[row.shape[0] // 2]
        digest.update(row[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
