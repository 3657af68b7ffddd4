from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from tqai import _core, container

GOLDEN = Path(__file__).parents[1] / "golden"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions and links as on POSIX")


@pytest.fixture(params=[0o022, 0o077, 0o002, 0o000], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def write(path: Path, text: str = "new") -> None:
    container.write(path, {}, [("text", "U8", None, text.encode)])


def read(path: Path) -> str:
    file, _ = container.opened(path)
    return container.bytes_of(file, "text").tobytes().decode()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_has_the_permissions_that_new_files_have(tmp_path: Path, umask: int) -> None:
    write(tmp_path / "f")
    assert mode(tmp_path / "f") == 0o666 & ~umask


@pytest.mark.parametrize("given", [0o600, 0o644, 0o664, 0o440])
def test_a_replaced_file_s_permissions_stay(tmp_path: Path, given: int) -> None:
    (tmp_path / "f").write_text("old")
    (tmp_path / "f").chmod(given)
    write(tmp_path / "f")
    assert mode(tmp_path / "f") == given
    assert read(tmp_path / "f") == "new"


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "f", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(Path("there") / "f")
    (tmp_path / "link to it").symlink_to("link")
    for path in (link, tmp_path / "link to it"):
        write(path, path.name)
        assert path.is_symlink() and read(target) == path.name
    target.unlink()
    write(link)
    assert link.is_symlink() and read(target) == "new"
    assert [each.name for each in target.parent.iterdir()] == ["f"]


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="could not be written"):
        write(tmp_path / "a")
    assert {each.name for each in tmp_path.iterdir()} == {"a", "b"}


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(OSError, match=f"{name} could not be written"):
            write(tmp_path / name)
    assert {each.name for each in tmp_path.iterdir()} == {"folder", "pipe"}
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_folders_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none/f could not be written: No such file"):
        write(tmp_path / "none" / "f")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file/f could not be written"):
        write(tmp_path / "file" / "f")
    with pytest.raises(OSError, match="could not be written: File name too long"):
        write(tmp_path / ("x" * 300))


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="f could not be written"):
            write(tmp_path / "f")
    finally:
        tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), RuntimeError("no")])
def test_nothing_is_left_of_a_file_that_was_not_finished(
    tmp_path: Path, error: BaseException
) -> None:
    (tmp_path / "f").write_text("old")

    def fail() -> bytes:
        raise error

    with pytest.raises(type(error)):
        container.write(
            tmp_path / "f", {}, [("a", "U8", None, b"half".upper), ("b", "U8", None, fail)]
        )
    assert [each.name for each in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text() == "old"


@pytest.mark.parametrize("name", ["a", "ü 漢字", "x" * 250], ids=["short", "unicode", "long"])
def test_names(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    assert [each.name for each in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "its header is a list"),
        ("3", "its header is a int"),
    ],
    ids=["empty", "cut off", "deep", "list", "number"],
)
def test_headers_that_are_none(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"^f: .*{says}"):
        container.header_of(Path("f"), text)


def test_a_header_comes_back(tmp_path: Path) -> None:
    header = {"a": [1, None, "ü"], "b": {"c": 1.5}}
    container.write(tmp_path / "f", header, [])
    file, got = container.opened(tmp_path / "f")
    assert got == header and file.version == 3 and file.tensors == {}


def append(cache: _core.KvCache, keys: np.ndarray, values: np.ndarray) -> None:
    tensors = []
    for array in (keys, values):
        strides = tuple(stride // 4 for stride in array.strides)
        tensors.append((array.ctypes.data, _core.DType.float32, array.shape, strides))
    cache.append(*tensors)
    cache.seal()


def filled(bits: int) -> _core.KvCache:
    cache = _core.KvCache(batch=1, kv_heads=2, head_dim=16, bits_k=bits, residual_window=16)
    numbers = np.random.default_rng(bits).standard_normal((1, 2, 200, 16)).astype(np.float32)
    append(cache, numbers, numbers)
    return cache


@pytest.mark.parametrize("mapped", [False, True])
def test_layers_are_read_without_a_model(tmp_path: Path, mapped: bool) -> None:
    caches = {0: filled(4), 2: filled(3), 10: filled(8)}
    entries = [(f"layers.{i}.packed", "U8", None, cache) for i, cache in caches.items()]
    exact = np.arange(6, dtype=np.float32)
    entries.append(("layers.1.keys", "F32", (2, 3), lambda: exact.view(np.uint8)))
    entries.append(("layers.4.packed", "U8", None, lambda: filled(2).serialize()))
    container.write(tmp_path / "f", {"model": "none"}, entries)
    got = container.layers(tmp_path / "f", mapped=mapped)
    assert list(got) == [0, 2, 4, 10]
    for number, cache in caches.items():
        assert got[number].serialize() == cache.serialize()
        memory = got[number].memory()
        assert (memory["mapped_bytes"] > 0, memory["packed_bytes"] > 0) == (mapped, not mapped)
    with safe_open(tmp_path / "f", "np") as file:  # safetensors' own reader
        assert np.array_equal(file.get_tensor("layers.1.keys"), exact.reshape(2, 3))
        packed = file.get_tensor("layers.2.packed")
        assert packed.tobytes() == caches[2].serialize()


READ_WHAT_IS_SHORTENED = """
import sys
from tqai import container
layer = container.layers(sys.argv[1], mapped=True)[0]
with open(sys.argv[1], "r+b") as file:
    file.truncate(4096)
print("still here", flush=True)
layer.serialize()
print("went on", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what other systems do is their own affair")
def test_a_file_that_is_shortened_while_it_is_mapped_ends_the_process(tmp_path: Path) -> None:
    """As docs/files.md says: no library can keep that from happening."""
    cache = filled(8)
    container.write(tmp_path / "f", {"x": " " * 8192}, [("layers.0.packed", "U8", None, cache)])
    done = subprocess.run(
        [sys.executable, "-c", READ_WHAT_IS_SHORTENED, str(tmp_path / "f")],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "still here\n"), done.stderr


def test_damage_is_found(tmp_path: Path) -> None:
    container.write(tmp_path / "f", {}, [("layers.0.packed", "U8", None, filled(4))])
    data = bytearray((tmp_path / "f").read_bytes())
    data[-1] ^= 1
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(ValueError, match='f is damaged: the checksum of "layers.0.packed"'):
        container.layers(tmp_path / "f")
    with pytest.raises(FileNotFoundError, match="none could not be read: No such file"):
        container.layers(tmp_path / "none")


def fixed(salt: int) -> np.ndarray:
    """Numbers that look random, with no library's generator: tests/cpp/golden_test.cpp has them
    too."""
    i = np.arange(72 * 16, dtype=np.int64)
    numbers = (i * i * 40503 + i * salt) % 65521 % 257 - 128
    return (numbers / 64).astype(np.float32).reshape(1, 1, 72, 16)


def golden() -> tuple[list[_core.KvCache], np.ndarray]:
    """What file_2 and file_3 of tests/golden hold: layers of all widths, and keys of another."""
    keys, values = fixed(7) + np.arange(16, dtype=np.float32) % 4, fixed(11)
    layers = []
    for bits_k, bits_v in ((2, 3), (4, 5), (6, 7), (8, 2)):
        cache = _core.KvCache(
            batch=1,
            kv_heads=1,
            head_dim=16,
            bits_k=bits_k,
            bits_v=bits_v,
            sink_tokens=2,
            residual_window=4,
        )
        append(cache, keys, values)
        assert cache.packed_tokens(0) == 64
        layers.append(cache)
    return layers, keys[:, :, :4].astype(np.float16)


@pytest.mark.parametrize("version", [2, 3])
def test_golden_files_hold_what_they_held(version: int) -> None:
    path = GOLDEN / f"file_{version}.safetensors"
    layers, keys = golden()
    file, header = container.opened(path)
    assert file.version == version and header["model"] == "none ü"
    for mapped in (False, True):
        got = container.layers(path, mapped=mapped)
        assert list(got) == list(range(len(layers)))
        for number, layer in enumerate(layers):
            assert got[number].serialize() == layer.serialize()
    assert container.bytes_of(file, "layers.4.keys").tobytes() == keys.tobytes()
    assert np.array_equal(load_file(path)["layers.4.keys"], keys)


def test_the_newest_golden_file_is_written_alike(tmp_path: Path) -> None:
    layers, keys = golden()
    entries = [(f"layers.{i}.packed", "U8", None, layer) for i, layer in enumerate(layers)]
    entries.append(("layers.4.keys", "F16", keys.shape, lambda: keys.reshape(-1).view(np.uint8)))
    container.write(tmp_path / "f", {"model": "none ü"}, entries)
    assert (tmp_path / "f").read_bytes() == (GOLDEN / "file_3.safetensors").read_bytes()
