"""What goes wrong between LMCache and where its chunks are: each is a miss, and no more is lost.

LMCache's own adapters give a serde whole requests, so that one damaged chunk is a miss of its
request, and its connection to Redis stays out of step after a value of another length, and gone
after the server was: there a new manager stands for LMCache started anew. tqai's needs none.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("lmcache", reason="lmcache is not installed (scripts/test --lmcache does it)")

import tqai.lmcache
from managers import KINDS, Place, check, fetch, key, offer, place_of, store
from tqai.lmcache import adapter

OURS = ("a folder", "Redis")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(adapter, "_PAUSE", 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with place_of(request.param, tmp_path) as made:
        yield made


def is_ours(place: Place) -> bool:
    return place.spec["type"] == "tqai"


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings of tqai's adapter."""
    return [r.getMessage() for r in caplog.records if r.name == adapter.__name__]


DAMAGES = ("cut", "longer", "flipped", "another version", "another chunk's", "nothing")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_value_is_one_miss_and_is_stored_anew(
    place: Place, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    if damage == "nothing" and place.spec["type"] == "resp":
        pytest.skip("LMCache's connection waits for the rest of an empty value for ever")
    manager = place.manager()
    store(manager, place, range(3))
    manager.close()
    whole = place.entries()
    [name] = [name for name, data in whole.items() if data == place.entry_of(1, whole)]
    data = whole[name]
    damaged = {
        "cut": data[:-100],
        "longer": data + bytes(100),
        "flipped": data[:5000] + bytes([data[5000] ^ 4]) + data[5001:],
        "another version": data[:8] + b"\x09" + data[9:],
        "another chunk's": place.entry_of(0, whole),
        "nothing": b"",
    }[damage]
    place.put(name, damaged)
    caplog.set_level(logging.WARNING)
    manager = place.manager()
    found = fetch(manager, range(3))
    if is_ours(place):
        # What follows the end of an envelope is let be; LMCache takes what comes before a miss.
        assert found.keys() == ({0, 1, 2} if damage == "longer" else {0})
        assert len(said(caplog)) == (0 if damage == "longer" else 1)
        assert (name in place.entries()) == (damage == "longer")
        manager.delete_l1_keys([key(number) for number in range(3)])
        store(manager, place, range(3))
        assert place.entries()[name][: len(data)] == data
        manager.delete_l1_keys([key(number) for number in range(3)])
        check(fetch(manager, range(3)), range(3))
        manager.close()
        return
    assert found.keys() <= {0} or damage == "longer"
    check(found, range(len(found)))
    manager.close()
    for number in (0, 2):  # they lie there as before
        manager = place.manager()
        check(fetch(manager, range(number, number + 1)), range(number, number + 1))
        manager.close()


@pytest.mark.parametrize("kind", ["LMCache's Redis", "Redis"])
@pytest.mark.parametrize("what", ["fetching", "storing"])
def test_a_server_killed_in_mid_transfer_and_started_again(
    tmp_path: Path, kind: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    with place_of(kind, tmp_path) as place:
        server = place.server
        assert server is not None and server.process is not None
        client = server.client()
        client.config_set("appendfsync", "always")
        client.config_set("appendonly", "yes")  # what it held is there again afterwards
        manager = place.manager()
        store(manager, place, range(12))
        manager.delete_l1_keys([key(number) for number in range(12)])
        caplog.set_level(logging.WARNING)
        # Stopped, it takes what fits into its buffers, and answers half of nothing.
        os.kill(server.process.pid, signal.SIGSTOP)
        if what == "fetching":
            with killing(place, after=0.3):
                assert fetch(manager, range(12)) == {}
        else:
            with killing(place, after=0.3):
                offer(manager, range(12, 60))
        server.start("--appendonly", "yes", port=place.port)
        time.sleep(0.3)
        if not is_ours(place):
            manager.close()
            manager = place.manager()
        manager.delete_l1_keys([key(number) for number in range(60)])
        check(fetch(manager, range(12)), range(12))
        store(manager, place, range(60))
        manager.delete_l1_keys([key(number) for number in range(60)])
        check(fetch(manager, range(60)), range(60))
        manager.close()
        if is_ours(place):
            assert len(said(caplog)) == 1 and "the store of chunks failed" in said(caplog)[0]


@contextmanager
def killing(place: Place, after: float) -> Iterator[None]:
    """The server is killed while this is under way."""
    server = place.server
    assert server is not None and server.process is not None
    killer = subprocess.Popen(["sh", "-c", f"sleep {after}; kill -9 {server.process.pid}"])
    yield
    killer.wait()
    server.kill()


WRITER = """
import json, sys, time
from pathlib import Path
from managers import Place, offer
import tqai.lmcache
managers = [Place(spec).manager() for spec in json.loads(sys.argv[1])]
Path(sys.argv[2]).touch()
while not all(Path(name).exists() for name in sys.argv[2:]):
    time.sleep(0.001)
for manager in managers:
    offer(manager, range(20))
time.sleep(3)
for manager in managers:
    manager.close()
"""


def test_processes_that_write_the_same_chunks_at_once(tmp_path: Path) -> None:
    with places_of_all_kinds(tmp_path) as places:
        specs = json.dumps([place.spec for place in places])
        marks = [str(tmp_path / f"writer {number}") for number in range(2)]
        paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, specs, *order], env=environment)
            for order in (marks, marks[::-1])
        ]
        assert [writer.wait(120) for writer in writers] == [0, 0]
        for place in places:
            manager = place.manager()
            check(fetch(manager, range(20)), range(20))
            manager.close()


@contextmanager
def places_of_all_kinds(folder: Path) -> Iterator[list[Place]]:
    folders = [folder / str(number) for number in range(len(KINDS))]
    for each in folders:
        each.mkdir()
    with (
        place_of(KINDS[0], folders[0]) as fs,
        place_of(KINDS[1], folders[1]) as theirs,
        place_of(KINDS[2], folders[2]) as own,
        place_of(KINDS[3], folders[3]) as redis,
    ):
        yield [fs, theirs, own, redis]


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writing more into a file fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def full(place: Place) -> Iterator[None]:
    if place.server is None:
        with no_file_above(10_000):
            yield
        return
    client = place.server.client()
    client.config_set("maxmemory", client.info("memory")["used_memory"])
    yield
    client.config_set("maxmemory", 0)


def test_no_room_left_is_said_and_nothing_is_half(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    manager = place.manager()
    store(manager, place, range(2))
    before = place.entries()
    with full(place):
        offer(manager, range(2, 5))
        time.sleep(1)
    assert place.entries() == before
    manager.close()
    if is_ours(place):
        assert len(said(caplog)) == 1 and "the store of chunks failed" in said(caplog)[0]
    manager = place.manager()
    check(fetch(manager, range(2)), range(2))
    store(manager, place, range(5))
    manager.close()
    manager = place.manager()
    check(fetch(manager, range(5)), range(5))
    manager.close()


@pytest.mark.parametrize("kind", ["LMCache's fs", "a folder"])
def test_a_full_file_system(tmp_path: Path, kind: str) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        with place_of(kind, small) as place:
            manager = place.manager()
            offer(manager, range(8))
            time.sleep(1)
            manager.close()
            held = len(place.entries())
            assert 0 < held < 8
            manager = place.manager()
            found = [number for number in range(8) if fetch(manager, range(number, number + 1))]
            assert len(found) == held
            manager.close()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_shelf_of_chunks_is_bounded(tmp_path: Path) -> None:
    place = Place({"type": "tqai", "url": str(tmp_path / "chunks"), "max_bytes": 100_000})
    manager = place.manager()
    for number in range(12):
        offer(manager, range(number, number + 1))
        time.sleep(0.05)
    time.sleep(0.5)
    assert 0 < sum(map(len, place.entries().values())) <= 100_000
    manager.delete_l1_keys([key(number) for number in range(12)])
    check(fetch(manager, range(11, 12)), range(11, 12))
    manager.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": ""}, "needs url"),
        ({"max_bytes": 0}, "max_bytes=0"),
        ({"serde": {"type": "fp8"}}, "its own serde"),
        ({"serde": {"type": "tqai"}}, "needs head_dim"),
    ],
)
def test_configurations_of_the_adapter_that_are_none(change: dict, message: str) -> None:
    given = {"type": "tqai", "url": "/x", "serde": {"type": "tqai", "head_dim": 64}, **change}
    with pytest.raises(ValueError, match=message):
        tqai.lmcache.TqaiL2AdapterConfig.from_dict(given)
