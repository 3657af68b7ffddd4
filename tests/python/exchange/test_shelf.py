from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis_server import Server, skip_without_redis
from tqai.exchange.folder_shelf import FolderShelf
from tqai.exchange.shelf import Shelf, ShelfError, shelf_at, without_password

MOST = 10_000


class Place:
    """A kind of shelf, and ways to it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def shelf(self, most: int = MOST) -> Shelf:
        return shelf_at(self.url, most)


@pytest.fixture(params=["folder", "file URL", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param != "redis":
        path = tmp_path / "a folder" / "shelf"
        yield Place(str(path) if request.param == "folder" else path.as_uri())
        return
    skip_without_redis()
    server = Server(tmp_path)
    server.start()
    yield Place(server.url)
    server.kill()


def name(number: int) -> str:
    return f"{number:032x}"


def test_what_is_put_is_found_by_everybody_with_the_address(place: Place) -> None:
    one, other = place.shelf(), place.shelf()
    assert one.fetch([name(1), name(2)]) == [None, None]
    assert one.held([name(1)]) == [False]
    one.put(name(1), b"entry")
    assert other.fetch([name(2), name(1)]) == [None, b"entry"]
    assert other.held([name(1), name(2)]) == [True, False]
    assert other.used() == 5
    other.remove(name(1))
    other.remove(name(1))
    assert one.fetch([name(1)]) == [None]
    assert one.used() == 0


def test_an_entry_that_is_there_stays_as_it_is(place: Place) -> None:
    shelf = place.shelf()
    shelf.put(name(1), b"first")
    shelf.put(name(1), b"second")
    assert shelf.fetch([name(1)]) == [b"first"]
    assert shelf.used() == 5


def test_the_least_recently_used_leave_and_the_bound_holds(place: Place) -> None:
    shelf = place.shelf()
    for number in range(8):
        shelf.put(name(number), bytes(1200))
        time.sleep(0.002)
    assert shelf.used() == 9600
    shelf.use([name(0), name(1)])
    for number in range(8, 12):
        shelf.put(name(number), bytes(1200))
        time.sleep(0.002)
        assert shelf.used() <= MOST
    held = {number for number in range(12) if shelf.held([name(number)])[0]}
    assert {0, 1, 11} <= held
    assert not {2, 3, 4} & held


def test_of_names_used_together_the_last_leave_first(place: Place) -> None:
    shelf = place.shelf()
    for number in range(4):
        shelf.put(name(number), bytes(2400))
    shelf.use([name(2), name(3), name(0), name(1)])
    shelf.put(name(4), bytes(2400))
    assert shelf.held([name(1), name(2), name(3), name(4)]) == [False, True, True, True]


def test_an_entry_larger_than_all_the_room_takes_nothing_away(place: Place) -> None:
    shelf = place.shelf()
    shelf.put(name(1), bytes(9000))
    with pytest.raises(ShelfError, match="10001 bytes is more than the 10000"):
        shelf.put(name(2), bytes(MOST + 1))
    assert shelf.held([name(1)]) == [True]
    shelf.put(name(3), bytes(MOST))
    assert shelf.held([name(1), name(3)]) == [False, True]


def test_writers_in_many_threads_hold_the_bound_and_every_entry_is_whole(place: Place) -> None:
    def write(start: int) -> None:
        shelf = place.shelf()
        for number in range(start, start + 40):
            shelf.put(name(number), bytes([number % 251]) * 500)

    threads = [threading.Thread(target=write, args=(20 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shelf = place.shelf()
    assert 0 < shelf.used() <= MOST
    for number in range(100):
        [entry] = shelf.fetch([name(number)])
        assert entry in (None, bytes([number % 251]) * 500)


KILLED = """
import sys
from tqai.exchange.shelf import shelf_at
shelf = shelf_at(sys.argv[1], 1 << 30)
print("ready", flush=True)
number = 0
while True:
    shelf.put(f"{number:032x}", bytes([number % 251]) * 2_000_000)
    number += 1
"""


def test_a_killed_writer_leaves_nothing_half_and_nobody_waits_for_it(place: Place) -> None:
    shelf = place.shelf(1 << 30)
    for delay in (0.0, 0.01, 0.03):
        writer = subprocess.Popen(
            [sys.executable, "-c", KILLED, place.url], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        writer.wait()
        writer.stdout.close()
        for number in range(300):
            [entry] = shelf.fetch([name(number)])
            assert entry is None or entry == bytes([number % 251]) * 2_000_000
            shelf.remove(name(number))
        shelf.put(name(1000), b"after")
        assert shelf.fetch([name(1000)]) == [b"after"]
        shelf.remove(name(1000))


def test_what_a_killed_writer_had_begun_is_cleared_away(tmp_path: Path) -> None:
    shelf = FolderShelf(tmp_path, MOST)
    shelf.put(name(1), bytes(6000))
    old, new = (tmp_path / "00" / f"{name(2)}.{n}.part" for n in (1, 2))
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (0, 0))
    shelf.put(name(3), bytes(6000))
    assert not old.exists() and new.exists()


def test_a_folder_whose_sum_is_lost_or_wrong_is_counted_anew(tmp_path: Path) -> None:
    shelf = FolderShelf(tmp_path, MOST)
    shelf.put(name(1), bytes(6000))
    for text in ("", "nonsense", "9999"):
        (tmp_path / "used").write_text(text)
        shelf.put(name(2), bytes(3000))
        assert shelf.held([name(1), name(2)]) == [True, True]
        shelf.remove(name(2))


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    shelf = shelf_at(str(tmp_path / "file"), MOST)
    with pytest.raises(ShelfError, match="file"):
        shelf.put(name(1), b"entry")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = FolderShelf(tmp_path, 1 << 20)
    shelf.put(name(1), b"before")
    opened = open

    def full(file: object, mode: str = "r", *args: object) -> object:
        return opened("/dev/full", "wb", 0) if mode == "xb" else opened(file, mode, *args)

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(ShelfError, match="No space left"):
        shelf.put(name(2), bytes(10000))
    monkeypatch.undo()
    assert shelf.fetch([name(1), name(2)]) == [b"before", None]


@pytest.mark.parametrize("url", ["http://host/", "s3://bucket", "file://elsewhere/folder"])
def test_other_addresses_are_refused_by_name(url: str) -> None:
    with pytest.raises(ValueError, match=url):
        shelf_at(url, MOST)


@pytest.mark.parametrize("url", ["", "file://", "file://localhost"])
def test_an_address_that_names_nothing_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="empty|names no folder"):
        shelf_at(url, MOST)


@pytest.mark.parametrize(
    "url", ["valkey://:s3cret@host:1/0", "http://me:s3cret@host", "file://me:s3cret@host/folder"]
)
def test_an_address_that_is_refused_is_shown_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match="host") as error:
        shelf_at(url, MOST)
    assert "s3cret" not in str(error.value)


def test_a_server_that_is_gone_is_said_without_its_password_and_found_again(tmp_path: Path) -> None:
    skip_without_redis()
    with pytest.raises(ShelfError, match="…@localhost:1") as said:
        shelf_at("redis://user:secret@localhost:1/0", MOST).used()
    assert "secret" not in str(said.value)
    server = Server(tmp_path)
    server.start()
    shelf = shelf_at(server.url, MOST)
    shelf.put(name(1), b"entry")
    server.kill()
    with pytest.raises(ShelfError):
        shelf.fetch([name(1)])
    server.start()
    try:
        assert shelf.fetch([name(1)]) == [None]
        shelf.put(name(1), b"entry")
        assert shelf.used() == 5
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:se@cret@host:1/0", "redis://…@host:1/0"),
        ("unix:///a/b.sock?db=1&password=secret", "unix:///a/b.sock?db=1&password=…"),
        ("rediss://host/0?username=me&password=secret", "rediss://host/0?username=…&password=…"),
        ("/a/folder@home/x", "/a/folder@home/x"),
    ],
)
def test_addresses_are_shown_without_their_passwords(url: str, shown: str) -> None:
    assert without_password(url) == shown


@pytest.mark.parametrize("way", ["port", "socket"])
def test_a_server_with_a_password(tmp_path: Path, way: str) -> None:
    skip_without_redis()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(tmp_path)
    server.start(port=port)
    try:
        server.client().config_set("requirepass", "se/cret")
        url = {
            "port": "redis://:{}@127.0.0.1:" + f"{port}/0",
            "socket": f"unix://{server.socket}?password=" + "{}",
        }[way]
        shelf = shelf_at(url.format("se%2Fcret"), MOST)
        shelf.put(name(1), b"entry")
        assert shelf.fetch([name(1)]) == [b"entry"]
        with pytest.raises(ShelfError) as said:
            shelf_at(url.format("wrong"), MOST).fetch([name(1)])
        assert "wrong" not in str(said.value)
    finally:
        server.kill()


def test_entries_that_cannot_be_taken_away_are_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = FolderShelf(tmp_path, MOST)
    for number in range(3):
        shelf.put(name(number), bytes(3000))
    removed = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith(name(0)):  # somebody reads it, on Windows
            raise PermissionError(path)
        removed(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    shelf.use([name(2), name(1), name(0)])
    os.utime(tmp_path / name(0)[:2] / f"{name(0)}.tqai", (0, 0))
    shelf.put(name(3), bytes(3000))
    assert shelf.held([name(n) for n in range(4)]) == [True, False, True, True]
    with pytest.raises(ShelfError, match="cannot be taken away"):
        shelf.put(name(4), bytes(9000))


def test_names_of_files_are_such_as_every_system_takes(tmp_path: Path) -> None:
    deep = tmp_path / ("a" * 200) / ("b" * 200)
    shelf = FolderShelf(deep, MOST)
    shelf.put(name(1), b"entry")
    assert shelf.fetch([name(1)]) == [b"entry"]
    for path in deep.rglob("*"):
        assert re.fullmatch(r"[a-z0-9]{2,40}(\.tqai)?", path.name)
    with pytest.raises(ShelfError, match="(?i)name too long"):
        FolderShelf(tmp_path / ("c" * 300), MOST).put(name(1), b"entry")


def test_a_server_that_drops_entries_itself_is_counted_right(tmp_path: Path) -> None:
    skip_without_redis()
    server = Server(tmp_path)
    server.start()
    try:
        shelf = shelf_at(server.url, MOST)
        shelf.put(name(1), bytes(4000))
        server.client().delete(f"{{tqai}}:{name(1)}")
        shelf.put(name(1), bytes(3000))
        assert shelf.used() == 3000
    finally:
        server.kill()


def test_what_others_have_put_in_the_place_of_a_server_s_entries_is_replaced(
    tmp_path: Path,
) -> None:
    skip_without_redis()
    server = Server(tmp_path)
    server.start()
    try:
        shelf = shelf_at(server.url, MOST)
        shelf.put(name(1), bytes(4000))
        server.client().hset(f"{{tqai}}:{name(2)}", "field", "value")
        shelf.put(name(2), bytes(3000))
        assert shelf.fetch([name(2)]) == [bytes(3000)]
        server.client().set("{tqai}:used", "many")
        shelf.put(name(3), bytes(1000))
        assert shelf.used() == 8000
    finally:
        server.kill()


def test_a_server_without_memory_says_so(tmp_path: Path) -> None:
    skip_without_redis()
    server = Server(tmp_path)
    server.start("--maxmemory", "1mb")
    try:
        with pytest.raises(ShelfError, match="(?i)maxmemory|oom"):
            for number in range(10):
                shelf_at(server.url, 1 << 30).put(name(number), bytes(400_000))
    finally:
        server.kill()


def test_a_server_killed_in_mid_transfer_is_an_error_and_nothing_comes_half(tmp_path: Path) -> None:
    skip_without_redis()
    server = Server(tmp_path)
    server.start()
    shelf = shelf_at(server.url, 1 << 30)
    whole = bytes(range(250)) * 40_000
    for number in range(8):
        shelf.put(name(number), whole)
    failed = threading.Event()

    def fetch() -> None:
        try:
            while True:
                found = shelf_at(server.url, 1 << 30).fetch([name(n) for n in range(8)])
                assert all(entry == whole for entry in found)
        except ShelfError:
            failed.set()

    readers = [threading.Thread(target=fetch) for _ in range(3)]
    for reader in readers:
        reader.start()
    time.sleep(0.1)
    server.kill()
    for reader in readers:
        reader.join()
    assert failed.is_set()
