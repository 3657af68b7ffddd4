"""The serde as LMCache uses it: what its own serdes are held to, and whole managers around it."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lmcache", reason="lmcache is not installed (scripts/test --lmcache does it)")

import tqai.lmcache
from conftest import make_model
from lmcache.v1.distributed.serde import (
    AsyncSerdeProcessor,
    SerdeConfig,
    create_serde_processor,
    get_registered_serde_types,
    serialized_layout_desc,
)
from lmcache.v1.platform import consume_fd
from managers import (
    KINDS,
    LAYERS,
    Place,
    check,
    chunk,
    error,
    fetch,
    key,
    layout,
    memory,
    place_of,
    processor,
    shape,
    store,
)


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


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with place_of(request.param, tmp_path) as made:
        yield made


@pytest.fixture
def filled(place: Place) -> Place:
    manager = place.manager()
    store(manager, place, range(3))
    manager.close()
    return place


def test_another_manager_finds_what_one_has_stored(filled: Place) -> None:
    made = processor()
    size = made.estimate_serialized_size(layout())
    made.close()
    assert [len(data) for data in filled.entries().values()] == 3 * [size]
    manager = filled.manager()
    check(fetch(manager, range(3)), range(3))
    manager.close()


def test_other_settings_and_models_miss(filled: Place) -> None:
    for options in ({"model": "another"}, {"bits_v": 3}, {"seed": 4}):
        manager = filled.manager(**options)
        assert fetch(manager, range(3)) == {}
        manager.close()
    manager = filled.manager()
    check(fetch(manager, range(3)), range(3))
    manager.close()


@pytest.mark.parametrize("bits", [[8, 4, 4, 8], {"0": 8, "3": 8}], ids=["list", "by layer"])
def test_layers_have_bits_of_their_own(place: Place, bits: Any) -> None:
    options = {"bits_k": bits, "bits_v": bits}
    manager = place.manager(**options)
    store(manager, place, range(2))
    manager.close()
    manager = place.manager(**options)
    found = fetch(manager, range(2))
    manager.close()
    assert found.keys() == {0, 1}
    for number, each in found.items():
        own = [error(each[:, layer], chunk(number)[:, layer]) for layer in range(LAYERS)]
        assert max(own[0], own[3]) < 0.02 < min(own[1], own[2]) < max(own) < 0.3
    manager = place.manager()
    assert fetch(manager, range(2)) == {}  # it reads other bits
    manager.close()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
