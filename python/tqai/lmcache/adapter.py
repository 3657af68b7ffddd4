"""An L2 adapter of LMCache's over tqai's own shelves: a folder, or a Redis server.

LMCache's adapters hand a whole request to a serde, which can only say yes or no to all of it, and
its connection to Redis does not outlive the server. This one goes chunk by chunk: what is damaged
is one chunk's miss, is taken away, and is stored anew by whoever reads that text next; a server
that was away is found again; and all of it is bounded in bytes.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import (
    L2AdapterConfigBase,
    register_l2_adapter_type,
)
from lmcache.v1.distributed.l2_adapters.factory import register_l2_adapter_factory
from lmcache.v1.distributed.serde import SerdeConfig
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.platform import create_event_notifier

from tqai.exchange.envelope import NotUsable
from tqai.exchange.shelf import Shelf, ShelfError, shelf_at, without_password
from tqai.lmcache.serde import NAME, TqaiDeserializer, TqaiSerializer, codec_and_workers

_log = logging.getLogger(__name__)
_PAUSE = 10.0
"""Seconds for which a store that failed is not asked again."""
_MAX_BYTES = 64 << 30
_FIELDS = ("type", "url", "max_bytes", "serde")


class TqaiL2AdapterConfig(L2AdapterConfigBase):
    """``{"type": "tqai", "url": …, "max_bytes": …, "serde": {"type": "tqai", …}}``."""

    def __init__(self, url: str, max_bytes: int, chunks: Mapping[str, Any]) -> None:
        self.url = url
        self.max_bytes = max_bytes
        self.chunks = dict(chunks)

    @property
    def serde_config(self) -> SerdeConfig | None:  # type: ignore[override]
        """None: LMCache wraps no serde around an adapter that has it inside."""
        return None

    @serde_config.setter
    def serde_config(self, given: SerdeConfig | None) -> None:  # type: ignore[override]
        pass  # from_dict has read it

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> TqaiL2AdapterConfig:
        """See ``L2AdapterConfigBase.from_dict``.

        Raises:
            ValueError: for a field that is missing or out of range, and another serde.
        """
        url, most, serde = d.get("url"), d.get("max_bytes", _MAX_BYTES), d.get("serde")
        if not isinstance(url, str) or not url:
            raise ValueError("adapter tqai needs url, a folder or redis://host:port/db")
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ValueError(f"max_bytes={most!r}: expected an integer of 1 or more")
        if not isinstance(serde, Mapping) or serde.get("type") != NAME:
            raise ValueError(f"adapter tqai needs its own serde: {{'type': {NAME!r}, …}}")
        chunks = {name: value for name, value in serde.items() if name != "type"}
        codec_and_workers(chunks)  # its complaints, before anything is started
        return cls(url, most, chunks)

    @classmethod
    def help(cls) -> str:
        return (
            "tqai L2 adapter config fields:\n"
            "- url (str): a folder, or redis://host:port/db (required)\n"
            "- max_bytes (int): the least recently used chunks leave beyond it (default 64 GiB)\n"
            '- serde (dict): {"type": "tqai", ...}, how chunks are written (required)'
        )


class TqaiL2Adapter(L2AdapterInterface):
    """See ``L2AdapterInterface``: each chunk is an entry of a shelf."""

    def __init__(self, config: TqaiL2AdapterConfig) -> None:
        super().__init__()
        codec, workers = codec_and_workers(config.chunks)
        self._url = without_password(config.url)
        self._shelf: Shelf = shelf_at(config.url, config.max_bytes)
        self._serializer, self._deserializer = TqaiSerializer(codec), TqaiDeserializer(codec)
        self._settings = repr(codec.options)
        self._pool = ThreadPoolExecutor(workers, "tqai-l2")
        # LMCache polls one descriptor for each kind of task.
        self._notifiers = {kind: create_event_notifier() for kind in ("store", "lookup", "load")}
        self._lock = threading.Lock()
        self._next_task = 0
        self._stored: dict[int, L2StoreResult] = {}
        self._found: dict[int, Bitmap] = {}
        self._loaded: dict[int, Bitmap] = {}
        self._sizes: dict[ObjectKey, int] = {}
        # Where nothing can be written, what is there can be read.
        self._paused_until = {"store": 0.0, "load": 0.0}
        self._has_failed: set[str] = set()

    def get_store_event_fd(self) -> int:
        return self._notifiers["store"].fileno()

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._notifiers["lookup"].fileno()

    def get_load_event_fd(self) -> int:
        return self._notifiers["load"].fileno()

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        def done(sizes: Sequence[int | None]) -> None:
            written = [(key, size) for key, size in zip(keys, sizes, strict=True) if size]
            with self._lock:
                fresh = [(key, size) for key, size in written if key not in self._sizes]
                self._sizes.update(fresh)
                whole = sum(size for _, size in fresh)
                self._stored[task] = L2StoreResult(len(written) == len(keys), whole)
            if fresh:
                self._notify_keys_stored([key for key, _ in fresh], [size for _, size in fresh])

        task = self._task()
        self._each("store", self._store, list(zip(keys, objects, strict=True)), done)
        return task

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        with self._lock:
            stored, self._stored = self._stored, {}
        return stored

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        """Nothing is locked: a chunk that leaves before it is loaded is a miss."""

        def done(held: Sequence[list[bool] | None]) -> None:
            with self._lock:
                self._found[task] = _bitmap(held[0] or [False] * len(keys))

        task = self._task()
        self._each("lookup", self._held, [(keys,)], done)
        return task

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        with self._lock:
            return self._found.pop(task_id, None)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        pass

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        def done(loaded: Sequence[bool | None]) -> None:
            hits = [key for key, is_there in zip(keys, loaded, strict=True) if is_there]
            with self._lock:
                self._loaded[task] = _bitmap([bool(each) for each in loaded])
            if hits:
                self._notify_keys_accessed(hits)

        task = self._task()
        self._each("load", self._load, list(zip(keys, objects, strict=True)), done)
        return task

    def query_load_result(self, task_id: int) -> Bitmap | None:
        with self._lock:
            return self._loaded.pop(task_id, None)

    def delete(self, keys: list[ObjectKey]) -> None:
        gone: list[ObjectKey] = []
        try:
            for key in keys:
                self._shelf.remove(self._name(key))
                gone.append(key)
        except ShelfError as error:
            self._failed("store", error)
        with self._lock:
            sizes = [self._sizes.pop(key, 0) for key in gone]
        self._notify_keys_deleted(gone, sizes)

    def report_status(self) -> dict[str, Any]:
        return {"is_healthy": not self._has_failed, "type": NAME, "url": self._url}

    def close(self) -> None:
        self._pool.shutdown()
        for notifier in self._notifiers.values():
            notifier.close()

    # What is done of one chunk, on a thread of the pool.

    def _store(self, key: ObjectKey, source: MemoryObj) -> int | None:
        """Bytes that the chunk takes."""
        layout = MemoryLayoutDesc(source.get_shapes(), source.get_dtypes())
        data = bytearray(self._serializer.estimate_serialized_size(layout))
        self._serializer.serialize(source, _memory(data), key)
        self._shelf.put(self._name(key), data)
        return len(data)

    def _held(self, keys: list[ObjectKey]) -> list[bool]:
        names = [self._name(key) for key in keys]
        held = self._shelf.held(names)
        with suppress(ShelfError):  # it may take no writes
            self._shelf.use([name for name, is_there in zip(names, held, strict=True) if is_there])
        return held

    def _load(self, key: ObjectKey, into: MemoryObj) -> bool:
        name = self._name(key)
        [entry] = self._shelf.fetch([name])
        if entry is None:
            return False
        try:
            self._deserializer.deserialize(_memory(bytearray(entry)), into, key)
        except NotUsable as error:
            _log.warning("a chunk in %s is not used, and taken away: %s", self._url, error)
            with suppress(ShelfError):
                self._shelf.remove(name)
            return False
        return True

    # Tasks.

    def _task(self) -> int:
        with self._lock:
            self._next_task += 1
            return self._next_task

    def _each(
        self,
        kind: str,
        work: Callable[..., Any],
        items: Sequence[tuple[Any, ...]],
        done: Callable[[Sequence[Any]], None],
    ) -> None:
        """Does `work` of each item on the pool; then `done` with all results, None for failures."""
        results: list[Any] = [None] * len(items)
        left = len(items)
        way = "store" if kind == "store" else "load"

        def one(at: int) -> None:
            nonlocal left
            if time.monotonic() >= self._paused_until[way]:
                try:
                    results[at] = work(*items[at])
                    self._has_failed.discard(way)
                except ShelfError as error:
                    self._failed(way, error)
                except Exception as error:  # whatever it is, LMCache waits for an answer
                    _log.warning("a chunk was not %s: %s", _DONE[kind], error)
            with self._lock:
                left -= 1
                is_last = left == 0
            if is_last:
                finish()

        def finish() -> None:
            done(results)
            self._notifiers[kind].notify()

        if not items:
            finish()
        for at in range(len(items)):
            self._pool.submit(one, at)

    def _failed(self, way: str, error: ShelfError) -> None:
        with self._lock:
            self._paused_until[way] = time.monotonic() + _PAUSE
            is_news = not self._has_failed
            self._has_failed.add(way)
        if is_news:
            what = "nothing is stored" if way == "store" else "chunks are misses"
            _log.warning(
                "the store of chunks failed (%s): %s, and it is asked again every %.0f s",
                error,
                what,
                _PAUSE,
            )

    def _name(self, key: ObjectKey) -> str:
        """Settings are in it, so that stores may be shared between them."""
        text = repr((key, self._settings))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


_DONE = {"store": "stored", "lookup": "looked up", "load": "loaded"}


def _memory(data: bytearray) -> Any:
    """Bytes as a memory object, as far as the serde looks at it."""
    whole = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return SimpleNamespace(tensor=whole)


def _bitmap(held: Sequence[bool]) -> Bitmap:
    bitmap = Bitmap(len(held))
    for at, is_there in enumerate(held):
        if is_there:
            bitmap.set(at)
    return bitmap


def _create(config: Any, l1_memory_desc: object = None) -> TqaiL2Adapter:
    return TqaiL2Adapter(config)


register_l2_adapter_type(NAME, TqaiL2AdapterConfig)
register_l2_adapter_factory(NAME, _create)
