from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from tqai import container

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions and links as on POSIX")


@pytest.fixture(params=[0o022, 0o077, 0o002, 0o000], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def write(path: Path, text: str = "new") -> None:
    """As safetensors does: to a file that nobody else may read, put in its place."""

    def make(partial: Path) -> None:
        partial.unlink()
        partial.touch(0o600)
        partial.write_text(text)

    container.write_whole(path, make)


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
    assert (tmp_path / "f").read_text() == "new"


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "f", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(Path("there") / "f")
    (tmp_path / "link to it").symlink_to("link")
    for path in (link, tmp_path / "link to it"):
        write(path, path.name)
        assert path.is_symlink() and target.read_text() == path.name
    target.unlink()
    write(link)
    assert link.is_symlink() and target.read_text() == "new"
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

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise error

    with pytest.raises(type(error)):
        container.write_whole(tmp_path / "f", fail)
    assert [each.name for each in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text() == "old"


@pytest.mark.parametrize("name", ["a", "ü 漢字", "x" * 250], ids=["short", "unicode", "long"])
def test_names(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    assert [each.name for each in tmp_path.iterdir()] == [name]


def header_text(text: str) -> dict[str, str]:
    return {**container.metadata_of({}), "header": text, "checksum": str(zlib.crc32(text.encode()))}


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
        container.header_of(Path("f"), header_text(text))


def test_a_header_comes_back() -> None:
    header = {"a": [1, None, "ü"], "b": {"c": 1.5}}
    assert container.header_of(Path("f"), container.metadata_of(header)) == header
    with pytest.raises(ValueError, match="format version None"):
        container.header_of(Path("f"), {"format": "tqai-cache"})
    with pytest.raises(ValueError, match="its header's checksum"):
        container.header_of(Path("f"), {**container.metadata_of(header), "checksum": "0"})
    with pytest.raises(ValueError, match="its header's checksum"):
        container.header_of(Path("f"), {"format": "tqai-cache", "version": "1"})
