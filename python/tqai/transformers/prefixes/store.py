"""``tqai.PrefixStore``: prompts that were read once, for all processes that read them again."""

from __future__ import annotations

import copy
import inspect
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel

from tqai.exchange import envelope
from tqai.exchange.cache_bytes import TILE_TOKENS
from tqai.exchange.envelope import NotUsable
from tqai.exchange.shelf import ShelfError, shelf_at, without_password
from tqai.remarks import level_of_the_caller
from tqai.settings import Settings
from tqai.signals import is_of_a_handler
from tqai.transformers import hooks
from tqai.transformers.cache.cache import TqaiCache
from tqai.transformers.cache.encoder_decoder import TqaiEncoderDecoderCache
from tqai.transformers.cache.layer import TqaiLayer
from tqai.transformers.model import names
from tqai.transformers.model.geometry import decoder_of
from tqai.transformers.prefixes import chains
from tqai.transformers.prefixes.blocks import (
    Centres,
    LoadedBlock,
    StoredBlock,
    fill,
    stored_blocks,
)
from tqai.transformers.weights.held import adapters_of_rows

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_BYTES = 8 << 30
_PAUSE = 30.0
"""Seconds without a request after one has failed, so that a dead server does not slow all texts."""
_AT_ONCE = 32
"""Blocks that are asked for before it is known that there are more."""
_TENSORS = frozenset({"input_ids", "attention_mask"})
_OF_ALL = ("output_hidden_states", "output_attentions")
"""What ``generate`` gives of each token that it reads."""
_OWN_SHARE = 0.9
"""Of a store's bytes, what one text may take: without its beginning, nothing of it can be read."""
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")

_COUNTED = ("prompts", "hits", "loaded_tokens", "stored_blocks", "unusable_entries", "failures")


class PrefixStore:
    """Prefixes of texts, compressed, in a folder or a Redis server that processes share.

    After ``store.attach(model)``, each ``model.generate(...)`` takes the longest prefix of its
    prompt that any process has stored, reads only the rest, and stores what is new: 64 tokens at a
    time, by a hash of all tokens up to there, of the weights and of the settings, so that prompts
    share what they begin with in common, and nothing is ever taken from another model. Those who
    call the model themselves use ``load`` and ``save``.

    The last ``residual_window`` tokens of a prompt are always read again, as they are exact in a
    cache. A store that fails, whatever the reason, is never an error of ``generate``: there is one
    warning, and the prompt is read as without it. Thread-safe.
    """

    def __init__(self, url: str, *, max_bytes: int = MAX_BYTES) -> None:
        """`url`: a folder's path, "file:///path", or "redis://host:port/db" (also "rediss://" and
        "unix://"). `max_bytes`: what all entries of the store may take; the least recently used
        leave first.

        Raises:
            ValueError: for another kind of address, and a `max_bytes` that is no positive integer.
            ImportError: where the address is Redis's, and the package redis is not installed.
        """
        if not isinstance(url, str):
            raise ValueError(f"PrefixStore(url): expected a string, got {type(url).__name__}")
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes!r}: expected an integer of 1 or more")
        self.url = url
        self.max_bytes = max_bytes
        self._shelf = shelf_at(url, max_bytes)
        self._lock = threading.Lock()
        # Where nothing can be written, what is there can be read.
        self._paused_until = {"load": 0.0, "store": 0.0}
        self._said: set[str] = set()
        self._counts: Counter[str] = Counter(dict.fromkeys(_COUNTED, 0))

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (self.url, self.max_bytes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __repr__(self) -> str:
        return f"PrefixStore({without_password(self.url)!r}, max_bytes={self.max_bytes})"

    def attach(self, model: PreTrainedModel) -> None:
        """Makes ``model.generate`` use the store from now on, until ``detach`` or ``tqai.unpatch``.

        Reads the model's weights once, to tell them from others.

        Raises:
            ValueError: when `model` is not patched, or its weights are out of reach.
            NotImplementedError: for a model whose caches have other layers than compressed ones.
        """
        cache = _new_cache(model, hooks.settings_of(model))
        reason = chains.why_not(cache)
        if reason:
            raise NotImplementedError(f"a prefix store cannot serve this model: {reason}")
        chains.facts_of(cache)
        hooks.override(model, "generate", _Generate(self))

    def detach(self, model: PreTrainedModel) -> None:
        """Makes ``model.generate`` what it was before ``attach``.

        Raises:
            ValueError: where no store is attached.
        """
        attached = hooks.override_of(model, "generate")
        if not isinstance(attached, _Generate):
            raise ValueError(f"no prefix store is attached to this {type(model).__name__}")
        hooks.drop_override(model, "generate")

    def load(
        self, model: PreTrainedModel, input_ids: Any, attention_mask: torch.Tensor | None = None
    ) -> TqaiCache:
        """A cache that has read the longest prefix of these ids that the store has; empty: none.

        input_ids: [batch, tokens], or [tokens] of one row; attention_mask: [batch, tokens], 0 where
        rows begin with padding. At least one token of each row, and the last `residual_window`, are
        left to be read: pass the cache as ``past_key_values``, with the ids of all tokens.

        Raises:
            ValueError: when `model` is not patched; for ids and masks of other shapes.
            NotImplementedError: as ``attach``.
        """
        ids = _rows(input_ids)
        padding = _padding(ids, attention_mask)
        if padding is None:
            raise ValueError(
                "attention_mask: expected [batch, tokens] with zeros before the ones of each row"
            )
        cache = _new_cache(model, hooks.settings_of(model))
        reason = chains.why_not(cache)
        if reason:
            raise NotImplementedError(f"a prefix store cannot serve this model: {reason}")
        self._load(cache, model, ids, padding)
        return cache

    def save(
        self, cache: TqaiCache, input_ids: Any, attention_mask: torch.Tensor | None = None
    ) -> int:
        """Stores what `cache` holds of these texts in whole blocks; returns how many were new.

        input_ids and attention_mask: as for ``load``, of what the cache has read, or the first of
        it.

        Raises:
            ValueError: for something else than a cache of tqai's; for ids of other rows than the
                cache's, and a mask of another shape.
            NotImplementedError: as ``attach``.
        """
        if not isinstance(cache, (TqaiCache, TqaiEncoderDecoderCache)):
            raise ValueError(
                "save(cache, input_ids) takes a cache that tqai made (TqaiCache); got "
                f"{type(cache).__name__}"
            )
        ids = _rows(input_ids)
        padding = _padding(ids, attention_mask)
        if padding is None:
            raise ValueError(
                "attention_mask: expected [batch, tokens] with zeros before the ones of each row"
            )
        reason = chains.why_not(cache)
        if reason:
            raise NotImplementedError(f"a prefix store cannot hold this cache: {reason}")
        batch = _batch(cache)
        if batch not in (0, len(ids)):
            raise ValueError(f"input_ids have {len(ids)} rows; the cache has {batch}")
        return self._save(cache, ids, padding)

    def report(self) -> dict[str, int]:
        """What this process has had of the store: prompts looked up, hits (prompts of which a
        prefix was there), tokens that need not be read, blocks stored, entries that were not what
        they should be, requests that failed."""
        with self._lock:
            return dict(self._counts)

    def used_bytes(self) -> int:
        """Bytes that all entries of the store take, whoever has put them there.

        Raises:
            OSError: where the store cannot be reached.
        """
        try:
            return self._shelf.used()
        except ShelfError as error:
            raise OSError(str(error)) from error

    # What generate does.

    def before(
        self,
        model: PreTrainedModel,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> _Plan | None:
        """The cache for a call of ``generate``, and what there is to store afterwards.

        None: the call is none that the store can serve.
        """
        try:
            return self._planned(model, inspect.signature(method).bind(model, *args, **kwargs))
        except Exception as error:  # whatever it is, generate goes on without
            if is_of_a_handler(error):
                raise
            self._say("error", f"a prefix store did nothing: {type(error).__name__}: {error}")
            return None

    def after(self, plan: _Plan, result: Any) -> None:
        """Stores what a call of ``generate`` has read and, where rows are sequences, written."""
        try:
            self._store(plan, result)
        except Exception as error:
            if is_of_a_handler(error):
                raise
            self._say("error", f"a prefix store stored nothing: {type(error).__name__}: {error}")

    def _planned(self, model: PreTrainedModel, call: inspect.BoundArguments) -> _Plan | None:
        kwargs = call.arguments.get("kwargs", {})
        config = call.arguments.get("generation_config") or model.generation_config

        def option(name: str) -> Any:
            value = kwargs.get(name, call.arguments.get(name))
            return getattr(config, name, None) if value is None else value

        if (
            kwargs.get(names.generate_name()) is not None
            or kwargs.get("past_key_values") is not None
        ):
            return None
        if option("use_cache") is False or option("cache_implementation") is not None:
            return None
        if option("custom_generate") is not None:
            return None
        given = call.arguments.get("inputs")
        given = kwargs.get("input_ids") if given is None else given
        if not isinstance(given, torch.Tensor) or given.ndim != 2 or given.is_floating_point():
            return None
        own = call.signature.parameters.keys() | vars(GenerationConfig()).keys() | _TENSORS
        more = sorted(
            name for name, value in kwargs.items() if name not in own and value is not None
        )
        if more:
            self._say(
                "more",
                f"generate() was given {', '.join(more)}, which keys and values may depend on; a "
                "prefix store goes by tokens alone, and does nothing for this call",
            )
            return None
        if adapters_of_rows(decoder_of(model)):
            self._say(
                "rows",
                "generate() computes rows with adapters of their own (adapter_names), which keys "
                "and values depend on; a prefix store does nothing for this call",
            )
            return None
        ids, mask = given, kwargs.get("attention_mask")
        pad = option("pad_token_id")
        if mask is None and pad is not None and bool((ids == pad).any()):
            return None  # generate takes some of these for padding
        padding = _padding(ids, mask)
        if padding is None or option("token_healing"):
            return None
        repeats = max(option("num_beams") or 1, option("num_return_sequences") or 1)
        ids = ids.repeat_interleave(repeats, 0)
        padding = [count for count in padding for _ in range(repeats)]
        cache = _new_cache(model, hooks.settings_of(model))
        reason = chains.why_not(cache)
        if reason:
            self._say("why", f"a prefix store does nothing for this model: {reason}")
            return None
        # Over a part of the prompt, assisted decoding gives other tokens, with transformers' own
        # cache too; chunks begin with the first token in versions until 5.17 at least.
        anew = option("prefill_chunk_size") is not None or any(map(option, (*_ASSISTED, *_OF_ALL)))
        facts = self._facts(cache) if anew else self._load(cache, model, ids.cpu(), padding)
        if facts is None:
            return None
        plain = (option("num_beams") or 1) == 1 and not any(map(option, _ASSISTED))
        return _Plan(cache, facts, ids.cpu(), padding, plain)

    def _store(self, plan: _Plan, result: Any) -> None:
        ids = plan.ids
        sequences = (
            result if isinstance(result, torch.Tensor) else getattr(result, "sequences", None)
        )
        read = plan.cache.get_seq_length()
        if (
            plan.plain
            and isinstance(sequences, torch.Tensor)
            and sequences.shape[0] == len(ids)
            and read <= sequences.shape[1] <= read + 1
            and torch.equal(sequences[:, : ids.shape[1]].cpu(), ids)
        ):
            ids = sequences[:, :read].cpu()
        if read < plan.ids.shape[1] or _batch(plan.cache) != len(ids):
            return  # something else was read than the prompt
        self._save(plan.cache, ids, plan.padding, plan.facts)

    def _load(
        self, cache: TqaiCache, model: PreTrainedModel, ids: torch.Tensor, padding: list[int]
    ) -> dict[str, Any] | None:
        """Fills an empty cache; gives what its entries go with, or None where that is not known."""
        facts = self._facts(cache)
        if facts is None:
            return None
        self._count("prompts")
        settings, tokens = cache.settings, ids.shape[1]
        sinks, left = settings.sink_tokens, max(settings.residual_window, 1)
        most = [(tokens - first - sinks - left) // TILE_TOKENS for first in padding]
        if min(most, default=0) < 1 or not self._may_ask("load"):
            return facts
        texts = [tuple(row[first:].tolist()) for first, row in zip(padding, ids, strict=True)]
        try:
            chains_of: dict[Any, list[LoadedBlock]] = {}
            for text, count in zip(texts, most, strict=True):
                if text not in chains_of:
                    chains_of[text] = self._chain(facts, text, sinks, count)
            rows = [chains_of[text] for text in texts]
            # All rows of a cache have as many tokens, padding included.
            read = min(
                first + sinks + TILE_TOKENS * len(row)
                for first, row in zip(padding, rows, strict=True)
            )
            if all(row for row in rows) and all(read > first + sinks for first in padding):
                fill(cache, model, rows, padding, read)
                self._count("hits")
                self._count("loaded_tokens", sum(read - first for first in padding))
        except ShelfError as error:
            self._failed("load", error)
        except NotUsable as error:
            self._unusable(str(error))
        return facts

    def _chain(
        self, facts: dict[str, Any], ids: Sequence[int], sinks: int, most: int
    ) -> list[LoadedBlock]:
        """The blocks of a text that are there, from the first on, at most so many."""
        wanted = chains.names_of(facts, ids, sinks, most)
        layers = len(facts["heads"])
        blocks: list[LoadedBlock] = []
        centres: dict[str, Centres] = {}
        for start in range(0, most, _AT_ONCE):
            asked = wanted[start : start + _AT_ONCE]
            for name, entry in zip(asked, self._shelf.fetch(asked), strict=True):
                if entry is None:
                    break
                try:
                    payload = envelope.opened(entry, "block", {**facts, "name": name})
                    block = StoredBlock.of(payload, layers)
                    if block.centres not in centres:
                        centres[block.centres] = self._centres(facts, block.centres)
                    known = centres[block.centres]
                    blocks.append(LoadedBlock.of(name, not blocks, block, known))
                except _Gone:
                    break
                except NotUsable as error:
                    self._unusable(str(error))
                    self._take_away(name)
                    break
            else:
                continue
            break
        self._worked("load")
        with suppress(ShelfError):  # it may take no writes
            # Those that others need to be reached by leave last.
            self._shelf.use([*centres, *(block.name for block in blocks)])
        return blocks

    def _centres(self, facts: dict[str, Any], name: str) -> Centres:
        """Raises NotUsable for what is none, and _Gone where there is none."""
        [entry] = self._shelf.fetch([name])
        if entry is None:
            raise _Gone
        try:
            return Centres.of(envelope.opened(entry, "centres", {**facts, "name": name}))
        except NotUsable:
            self._take_away(name)
            raise

    def _take_away(self, name: str) -> None:
        with suppress(ShelfError):  # it may take no writes
            self._shelf.remove(name)

    def _save(
        self,
        cache: TqaiCache,
        ids: torch.Tensor,
        padding: list[int],
        facts: dict[str, Any] | None = None,
    ) -> int:
        """Stores blocks that are not there yet; returns how many."""
        if not self._may_ask("store") or cache.is_empty():
            return 0
        now = self._facts(cache)
        if now is None or (facts is not None and facts != now):
            return 0
        if cache.weights is None or not cache.weights.is_same_as(cache.geometry.weights()):
            return 0  # the model has others now than those that the text was read with
        cache = copy.copy(cache)  # of one moment, whatever other threads do
        sinks, stored, done = cache.settings.sink_tokens, 0, set()
        try:
            for row, first in enumerate(padding):
                text = tuple(ids[row, first:].tolist())
                if text in done:
                    continue
                done.add(text)
                count = min(_blocks_of(cache, row), max(len(text) - sinks, 0) // TILE_TOKENS)
                wanted = chains.names_of(now, text, sinks, count)
                held = self._shelf.held(wanted)
                if not all(held):
                    stored += self._put(cache, row, first, now, wanted, held)
            self._worked("store")
        except ShelfError as error:
            self._failed("store", error)
        self._count("stored_blocks", stored)
        return stored

    def _put(
        self,
        cache: TqaiCache,
        row: int,
        padding: int,
        facts: dict[str, Any],
        wanted: list[str],
        held: list[bool],
    ) -> int:
        centres, blocks = stored_blocks(cache, row, padding)
        if not blocks:
            return 0
        payload = centres.payload()
        own = chains.name_of_centres(facts, payload)
        entry = envelope.sealed("centres", {**facts, "name": own}, [payload])
        room = _OWN_SHARE * self.max_bytes - len(entry)
        self._shelf.put(own, entry)
        # Whatever leaves for what comes now is another text's.
        self._shelf.use(
            [own, *(name for name, is_there in zip(wanted, held, strict=True) if is_there)]
        )
        stored = 0
        for at, (name, is_there, block) in enumerate(zip(wanted, held, blocks, strict=False)):
            if is_there:
                continue
            parts = block._replace(centres=own).parts()
            entry = envelope.sealed("block", {**facts, "name": name}, parts)
            if (at + 1) * len(entry) > room:
                self._say(
                    "small",
                    f"the prefix store {without_password(self.url)} may hold {self.max_bytes} "
                    f"bytes, and a text of {len(blocks) * TILE_TOKENS} tokens takes about "
                    f"{len(blocks) * len(entry)}: only its first {at * TILE_TOKENS} are kept; "
                    "give the store more max_bytes",
                )
                break
            self._shelf.put(name, entry)
            stored += 1
        self._shelf.use([own, *wanted[: len(blocks)]])
        return stored

    def _facts(self, cache: TqaiCache) -> dict[str, Any] | None:
        try:
            return chains.facts_of(cache)
        except ValueError as error:
            self._say("facts", f"a prefix store does nothing for this model: {error}")
            return None

    # What it says, and when.

    def _may_ask(self, way: str) -> bool:
        return time.monotonic() >= self._paused_until[way]

    def _worked(self, way: str) -> None:
        """Another failure is said anew."""
        self._said.discard(way)

    def _failed(self, way: str, error: ShelfError) -> None:
        self._count("failures")
        ways = ("load", "store") if way == "load" else ("store",)
        for each in ways:
            self._paused_until[each] = time.monotonic() + _PAUSE
        if way == "store" and "load" in self._said:
            return  # said already
        what = "prompts are read as without it" if way == "load" else "nothing is stored"
        self._say(
            way,
            f"the prefix store failed ({error}): {what}, and it is asked again in {_PAUSE:.0f} s",
        )

    def _unusable(self, reason: str) -> None:
        self._count("unusable_entries")
        self._say(
            "unusable",
            f"an entry of the prefix store {without_password(self.url)} is not used: {reason}. "
            "What it stood for is read from the text",
        )

    def _say(self, kind: str, message: str) -> None:
        with self._lock:
            if kind in self._said:
                return
            self._said.add(kind)
        warnings.warn(message, stacklevel=level_of_the_caller())

    def _count(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._counts[name] += by


class _Gone(Exception):
    """An entry that another one needs has left."""


class _Plan(NamedTuple):
    """What there is to store after a call of ``generate``."""

    cache: TqaiCache
    facts: dict[str, Any]
    ids: torch.Tensor
    padding: list[int]
    plain: bool
    """Whether a row of the result is what a row of the cache has read."""


class _Generate:
    """Stands in the place of ``generate`` of a model with a store."""

    def __init__(self, store: PrefixStore) -> None:
        self.store = store

    def __call__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        kind: Any = type(model)
        method = kind.generate
        plan = self.store.before(model, method, args, kwargs)
        if plan is None:
            return method(model, *args, **kwargs)
        result = method(model, *args, **{**kwargs, names.generate_name(): plan.cache})
        self.store.after(plan, result)
        return result


def _remade(url: str, max_bytes: int) -> PrefixStore:
    return PrefixStore(url, max_bytes=max_bytes)


def _new_cache(model: PreTrainedModel, settings: Settings) -> Any:
    # Blocks are of all layers: those with a sliding window keep what others may begin from.
    return hooks.make_cache(model, settings, sliding=False)


def _rows(input_ids: Any) -> torch.Tensor:
    ids = torch.as_tensor(input_ids)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(
            f"input_ids of shape {tuple(ids.shape)} and {ids.dtype}; expected [batch, tokens] of "
            "integers"
        )
    return ids.cpu()


def _padding(ids: torch.Tensor, mask: Any) -> list[int] | None:
    """How many tokens each row begins with that are padding; None for any other mask."""
    if mask is None:
        return [0] * len(ids)
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        return None
    seen = mask.cpu() != 0
    counts = (~seen).long().cumprod(1).sum(1)
    return counts.tolist() if torch.equal(counts, (~seen).sum(1)) else None


def _batch(cache: TqaiCache) -> int:
    """Rows of a cache; 0: it is empty."""
    held = (layer.core for layer in cache.layers if isinstance(layer, TqaiLayer))
    return next((core.batch for core in held if core is not None), 0)


def _blocks_of(cache: TqaiCache, row: int) -> int:
    """Blocks of a row that all layers have, at most."""
    held = (layer.core for layer in cache.layers if isinstance(layer, TqaiLayer))
    return min(
        (core.packed_tokens(row) // TILE_TOKENS for core in held if core is not None), default=0
    )
