"""The serde as LMCache uses it: what its own serdes are held to, and whole managers around it."""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lmcache", reason="lmcache is not installed (scripts/test --lmcache does it)")

import tqai.lmcache
from conftest import make_model
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
from lmcache.v1.distributed.serde import (
    AsyncSerdeProcessor,
    SerdeConfig,
    create_serde_processor,
    get_registered_serde_types,
    serialized_layout_desc,
)
from lmcache.v1.distributed.storage_manager import StorageManager
from lmcache.v1.platform import consume_fd
from redis_server import Server, skip_without_redis

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


def test_the_serde_is_registered_under_its_name_once() -> None:
    assert "tqai" in get_registered_serde_types()
    tqai.lmcache.register()
    assert get_registered_serde_types().count("tqai") == 1
    made = processor()
    assert isinstance(made, AsyncSerdeProcessor)
    made.close()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "needs head_dim"),
        ({"head_dim": 64, "bitsk": 4}, "no 'bitsk'"),
        ({"head_dim": 64, "max_workers": 0}, "max_workers=0"),
        ({"head_dim": 64, "bits_v": 0}, "bits_v=0"),
    ],
)
def test_configurations_that_are_none_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_serde_processor(SerdeConfig("tqai", kwargs))


@pytest.mark.parametrize("planes", [2, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sizes_are_known_beforehand_exactly(planes: int, dtype: torch.dtype) -> None:
    made = processor()
    described = serialized_layout_desc(layout(planes, dtype), made)
    assert described.dtypes == [torch.uint8]
    room = torch.zeros(described.shapes[0], dtype=torch.uint8)
    used = made._serializer.serialize(memory(chunk(1, planes, dtype)), memory(room), key(1))
    assert [used] == list(described.shapes[0]) and isinstance(used, int)
    found = torch.zeros(shape(planes), dtype=dtype)
    made._deserializer.deserialize(memory(room), memory(found), key(1))
    assert error(found, chunk(1, planes, dtype)) < 0.12
    made.close()


def wait(descriptor: int) -> None:
    assert select.select([descriptor], [], [], 20)[0]
    consume_fd(descriptor)


@pytest.mark.parametrize("workers", [1, 3])
def test_tasks_are_submitted_signalled_and_asked_for_once(workers: int) -> None:
    made = processor(max_workers=workers)
    assert made.get_serialize_event_fd() != made.get_deserialize_event_fd()
    size = made.estimate_serialized_size(layout())
    numbers = range(6)
    rooms = [torch.zeros(size, dtype=torch.uint8) for _ in numbers]
    found = [torch.zeros(shape(), dtype=torch.bfloat16) for _ in numbers]
    keys = [key(number) for number in numbers]
    sources = [memory(chunk(number)) for number in numbers]
    task = made.submit_serialize(sources, list(map(memory, rooms)), keys)
    wait(made.get_serialize_event_fd())
    assert made.query_serialize_result(task) is True
    assert made.query_serialize_result(task) is None
    task = made.submit_deserialize(list(map(memory, rooms)), list(map(memory, found)), keys)
    wait(made.get_deserialize_event_fd())
    assert made.query_deserialize_result(task) is True
    assert max(error(found[number], chunk(number)) for number in numbers) < 0.12
    task = made.submit_deserialize([memory(rooms[0])], [memory(found[0])], [key(1)])
    wait(made.get_deserialize_event_fd())
    assert made.query_deserialize_result(task) is False  # another key's
    task = made.submit_serialize([memory(chunk(0) * torch.nan)], [memory(rooms[0])], [key(0)])
    wait(made.get_serialize_event_fd())
    assert made.query_serialize_result(task) is False
    made.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"model_name": "another/model"},
        {"chunk_hash": b"x" * 16},
        {"kv_rank": 7},
        {"object_group_id": 1},
        {"cache_salt": "somebody"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_an_entry_goes_with_its_key_alone(fields: dict[str, Any]) -> None:
    made = processor()
    room = torch.zeros(made.estimate_serialized_size(layout()), dtype=torch.uint8)
    made._serializer.serialize(memory(chunk(1)), memory(room), key(1))
    found = torch.zeros(shape(), dtype=torch.bfloat16)
    with pytest.raises(tqai.lmcache.serde.NotUsable):
        made._deserializer.deserialize(memory(room), memory(found), key(1, **fields))
    made.close()


def test_objects_without_tensors_are_refused() -> None:
    made = processor()
    with pytest.raises(ValueError, match="memory objects with tensors"):
        made._serializer.serialize(memory(None), memory(torch.zeros(9)), key(1))
    made.close()


def test_a_model_describes_itself() -> None:
    described = tqai.lmcache.describe(make_model("qwen3"))
    described = json.loads(json.dumps(described))
    assert described["type"] == "tqai" and described["head_dim"] == 32
    assert len(described["rope"]["inv_freq"]) == 16 and len(described["model"]) == 16
    made = create_serde_processor(
        SerdeConfig("tqai", {name: v for name, v in described.items() if name != "type"})
    )
    made.close()
    assert tqai.lmcache.describe(make_model("qwen3", seed=2))["model"] != described["model"]


def test_the_package_is_not_imported_without_being_asked_for() -> None:
    code = "import sys, tqai; assert not {'lmcache', 'redis', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


# Whole managers.


class Place:
    """Somewhere that managers of several processes put their chunks."""

    def __init__(self, spec: dict[str, Any], server: Server | None = None) -> None:
        self.spec = spec
        self.server = server

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
            return {name: client.get(name) for name in client.keys()}
        files = Path(self.spec["base_path"]).rglob("*.data")
        return {file: file.read_bytes() for file in files}

    def put(self, name: Any, data: bytes) -> None:
        if self.server is not None:
            self.server.client().set(name, data)
        else:
            name.write_bytes(data)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(params=["fs", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "fs":
        (tmp_path / "chunks").mkdir()
        yield Place({"type": "fs", "base_path": str(tmp_path / "chunks")})
        return
    skip_without_redis()
    server, port = Server(tmp_path), free_port()
    server.start(port=port)
    yield Place({"type": "resp", "host": "127.0.0.1", "port": port, "num_workers": 2}, server)
    server.kill()


def store(manager: StorageManager, place: Place, numbers: range) -> None:
    keys = [key(number) for number in numbers]
    rooms = manager.reserve_write(keys, layout())
    for number, each in zip(numbers, keys, strict=True):
        rooms[each].tensor.copy_(chunk(number))
    manager.finish_write(keys)
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


@pytest.fixture
def filled(place: Place) -> Place:
    manager = place.manager()
    store(manager, place, range(3))
    manager.close()
    return place


def check(found: dict[int, torch.Tensor], numbers: range) -> None:
    assert found.keys() == set(numbers)
    for number, each in found.items():
        assert error(each, chunk(number)) < 0.12


def test_another_manager_finds_what_one_has_stored(filled: Place) -> None:
    made = processor()
    size = made.estimate_serialized_size(layout())
    made.close()
    assert [len(data) for data in filled.entries().values()] == 3 * [size]
    manager = filled.manager()
    check(fetch(manager, range(3)), range(3))
    manager.close()


@pytest.mark.parametrize("damage", ["cut", "flipped", "another version", "another chunk's"])
def test_a_damaged_value_is_a_miss_and_nothing_else_is_lost(filled: Place, damage: str) -> None:
    entries = dict(sorted(filled.entries().items(), key=str))
    name, data = list(entries.items())[1]
    changed = {
        "cut": data[:-100],
        "flipped": data[:5000] + bytes([data[5000] ^ 4]) + data[5001:],
        "another version": data[:8] + b"\x09" + data[9:],
        "another chunk's": list(entries.values())[0],
    }[damage]
    filled.put(name, changed)
    manager = filled.manager()
    assert 1 not in fetch(manager, range(1, 2))
    if damage == "cut" and filled.server is not None:
        manager.close()  # LMCache's connection is out of step after a value of another size
        manager = filled.manager()
    check(fetch(manager, range(1)), range(1))
    check(fetch(manager, range(2, 3)), range(2, 3))
    manager.close()


def test_other_settings_and_models_miss(filled: Place) -> None:
    for options in ({"model": "another"}, {"bits_v": 3}, {"seed": 4}):
        manager = filled.manager(**options)
        assert fetch(manager, range(3)) == {}
        manager.close()
    manager = filled.manager()
    check(fetch(manager, range(3)), range(3))
    manager.close()


def test_two_writers_of_one_chunk(place: Place) -> None:
    managers = [place.manager() for _ in range(2)]
    for manager in managers:
        store(manager, place, range(2))
        manager.close()
    manager = place.manager()
    check(fetch(manager, range(2)), range(2))
    manager.close()


def test_a_server_killed_in_between_and_started_again(tmp_path: Path) -> None:
    skip_without_redis()
    server, port = Server(tmp_path), free_port()
    server.start(port=port)
    place = Place({"type": "resp", "host": "127.0.0.1", "port": port, "num_workers": 2}, server)
    manager = place.manager()
    store(manager, place, range(2))
    server.kill()
    manager.delete_l1_keys([key(0), key(1)])
    assert fetch(manager, range(2)) == {}
    manager.close()
    server.start(port=port)
    try:
        manager = place.manager()
        assert fetch(manager, range(2)) == {}
        store(manager, place, range(2))
        manager.close()
        manager = place.manager()
        check(fetch(manager, range(2)), range(2))
        manager.close()
    finally:
        server.kill()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
