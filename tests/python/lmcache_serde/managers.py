"""Chunks, and LMCache's managers with their places: what the tests around LMCache share."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lmcache.v1.distributed.api import (
    GroupedObjectKeys,
    MemoryLayoutDesc,
    ObjectKey,
    PrefetchTaskSpec,
)
from lmcache.v1.distributed.config import (
    EvictionConfig,
    L1ManagerConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.serde import AsyncSerdeProcessor, SerdeConfig, create_serde_processor
from lmcache.v1.distributed.storage_manager import StorageManager
from redis_server import Server, skip_without_redis
from tqai.exchange.envelope import NotUsable

LAYERS, TOKENS, HEADS, DIM = 4, 128, 2, 32
ROPE = {"inv_freq": [10000 ** (-2 * i / DIM) for i in range(DIM // 2)]}
SERDE = {"type": "tqai", "head_dim": DIM, "bits_k": 4, "bits_v": 4, "rope": ROPE, "model": "one"}


def shape(planes: int = 2) -> torch.Size:
    return torch.Size([planes, LAYERS, TOKENS, HEADS * DIM * (3 - planes)])


def layout(planes: int = 2, dtype: torch.dtype = torch.bfloat16) -> MemoryLayoutDesc:
    return MemoryLayoutDesc(shapes=[shape(planes)], dtypes=[dtype])


def key(number: int, **fields: Any) -> ObjectKey:
    rank = ObjectKey.ComputeKVRank(1, 0, 1, 0)
    return ObjectKey(
        **{"chunk_hash": bytes([number]) * 16, "model_name": "a/model", "kv_rank": rank, **fields}
    )


def chunk(number: int, planes: int = 2, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    chance = torch.Generator().manual_seed(number)
    return torch.randn(shape(planes), generator=chance).to(dtype)


def memory(tensor: torch.Tensor) -> Any:
    return SimpleNamespace(tensor=tensor)


def processor(**options: Any) -> AsyncSerdeProcessor:
    kwargs = {name: value for name, value in {**SERDE, **options}.items() if name != "type"}
    return create_serde_processor(SerdeConfig("tqai", kwargs))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).float().norm() / expected.float().norm()).item()


class Place:
    """Somewhere that managers of several processes put their chunks."""

    def __init__(self, spec: dict[str, Any], server: Server | None = None, port: int = 0) -> None:
        self.spec = spec
        self.server = server
        self.port = port

    def manager(self, **options: Any) -> StorageManager:
        spec = {**self.spec, "serde": {**SERDE, **options}}
        adapters = SimpleNamespace(l2_adapter=[json.dumps(spec)])
        room = L1MemoryManagerConfig(size_in_bytes=64 << 20, use_lazy=False, shm_name="")
        return StorageManager(
            StorageManagerConfig(
                l1_manager_config=L1ManagerConfig(memory_config=room),
                eviction_config=EvictionConfig(eviction_policy="LRU"),
                l2_adapter_config=parse_args_to_l2_adapters_config(adapters),
            )
        )

    def entries(self) -> dict[Any, bytes]:
        if self.server is not None:
            client = self.server.client()
            kept = [name for name in client.keys() if name not in BOOKS]
            return {name: client.get(name) for name in kept}
        folder = Path(self.spec.get("base_path", self.spec.get("url")))
        files = [file for kind in ("*.data", "*.tqai") for file in folder.rglob(kind)]
        return {file: file.read_bytes() for file in files}

    def entry_of(self, number: int, entries: dict[Any, bytes]) -> bytes:
        """Of these, the bytes of a chunk."""
        made = processor()
        for data in entries.values():
            room = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            try:
                into = torch.empty(shape(), dtype=torch.bfloat16)
                made._deserializer.deserialize(memory(room), memory(into), key(number))
            except NotUsable:
                continue
            return data
        raise AssertionError(f"chunk {number} is not there")

    def put(self, name: Any, data: bytes) -> None:
        if self.server is not None:
            self.server.client().set(name, data)
        else:
            name.write_bytes(data)


BOOKS = {f"{{tqai}}:{name}".encode() for name in ("order", "clock", "sizes", "used")}
"""What a shelf keeps in Redis beside entries."""
KINDS = ["LMCache's fs", "LMCache's Redis", "a folder", "Redis"]
"""LMCache's own adapters with the serde, and tqai's."""


@contextmanager
def place_of(kind: str, folder: Path) -> Iterator[Place]:
    """A place of one of ``KINDS``; the server, if it has one, listens meanwhile."""
    if kind == "LMCache's fs":
        (folder / "chunks").mkdir()
        yield Place({"type": "fs", "base_path": str(folder / "chunks")})
        return
    if kind == "a folder":
        yield Place({"type": "tqai", "url": str(folder / "chunks")})
        return
    skip_without_redis()
    server, port = Server(folder), free_port()
    server.start(port=port)
    own = {"type": "tqai", "url": f"redis://127.0.0.1:{port}/0"}
    theirs = {"type": "resp", "host": "127.0.0.1", "port": port, "num_workers": 2}
    try:
        yield Place({**(own if kind == "Redis" else theirs)}, server, port)
    finally:
        server.kill()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def offer(manager: StorageManager, numbers: range) -> None:
    """Chunks for the manager to store, sooner or later."""
    keys = [key(number) for number in numbers]
    rooms = manager.reserve_write(keys, layout())
    for number, each in zip(numbers, keys, strict=True):
        if each in rooms:  # else it has it
            rooms[each].tensor.copy_(chunk(number))
    manager.finish_write(list(rooms))


def store(manager: StorageManager, place: Place, numbers: range) -> None:
    """Chunks, until they are stored."""
    offer(manager, numbers)
    end = time.monotonic() + 20
    while len(place.entries()) < numbers.stop:
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.2)


def fetch(manager: StorageManager, numbers: range) -> dict[int, torch.Tensor]:
    """The chunks that are found, from the first on."""
    keys = [key(number) for number in numbers]
    row = GroupedObjectKeys(keys=keys, object_group_id=0, layout_desc=layout())
    handle = manager.submit_prefetch_task(PrefetchTaskSpec(key_groups=[row]))
    assert manager.wait_prefetch_status(handle, 20)
    result = manager.query_prefetch_status(handle)
    assert result is not None
    hits = [k for i, k in enumerate(keys) if result.hit_cells[0].test(i)]
    if not hits:
        return {}
    with manager.read_prefetched_results(hits) as objects:
        assert objects is not None
        found = {k.chunk_hash[0]: o.tensor.clone() for k, o in zip(hits, objects, strict=True)}
    manager.finish_read_prefetched(hits)
    return found


def check(found: dict[int, torch.Tensor], numbers: range) -> None:
    assert found.keys() == set(numbers)
    for number, each in found.items():
        assert error(each, chunk(number)) < 0.12
