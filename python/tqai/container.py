"""The file that a cache lies in: safetensors, with a header of JSON in its metadata.

What the header and the tensors mean is the framework's, which also reads and writes the tensors;
here is what holds for all: that a file is whole, is one of ours, of a version that is known, and
that its parts belong together. Reading executes nothing.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

FORMAT = "tqai-cache"
VERSION = 2
"""Of what is written."""
READ = ("1", "2")
"""Versions that are read. The first tells weights apart by a sample of them."""


def checksum(data: Any) -> int:
    """Of a tensor's bytes, given as a buffer."""
    return zlib.crc32(data)


def metadata_of(header: Mapping[str, Any]) -> dict[str, str]:
    """A file's metadata with `header` in it."""
    text = json.dumps(header)
    return {
        "format": FORMAT,
        "version": str(VERSION),
        "header": text,
        "checksum": str(zlib.crc32(text.encode())),
    }


def header_of(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The header in a file's metadata.

    Raises:
        ValueError: for a file of another kind or version, or a damaged one.
    """
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not one of tqai.save_cache")
    if metadata.get("version") not in READ:
        raise ValueError(
            f"{path} is of format version {metadata.get('version')}; this tqai reads versions "
            f"{', '.join(READ)}: save the cache again, or use the tqai that wrote it"
        )
    text = metadata.get("header", "")
    if str(zlib.crc32(text.encode())) != metadata.get("checksum"):
        raise ValueError(f"{path} is damaged: its header's checksum does not fit; save it again")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its header is not JSON ({error}); save it again") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its header is a {type(header).__name__}; save it again")
    return header


@contextmanager
def opened(path: Path, framework: str) -> Iterator[Any]:
    """safetensors' view of a file, whose tensors are those of `framework`.

    Raises:
        ValueError: for what is no safetensors file, or is cut off.
        OSError: where the file cannot be read.
    """
    with path.open("rb"):  # safetensors' own errors do not tell a missing file from a damaged one
        pass
    try:
        with safe_open(path, framework) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no file of tqai.save_cache, or damaged ({error}); save the cache again"
        ) from error


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` make a file beside `path`, and puts it in its place when it is on the disk.

    A link stays, and what it points to is replaced. The file gets the permissions of the one that
    it replaces; a new one, those that the process gives new files.

    Raises:
        OSError: where that is not possible, naming `path`; what was there is still there.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        mode = _mode(target, partial)
        write(partial)
        os.chmod(partial, mode)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno is None:
            raise OSError(f"{path} could not be written: {reason}") from error
        raise OSError(error.errno, f"{path} could not be written: {reason}") from error
    finally:
        _remove(partial)


def _mode(target: Path, partial: Path) -> int:
    """The permissions that the file is to have; makes `partial`, empty, to see that it can be."""
    made = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        given = os.fstat(made).st_mode
    finally:
        os.close(made)
    try:
        held = os.stat(target).st_mode
    except FileNotFoundError:
        return stat.S_IMODE(given)
    if stat.S_ISDIR(held):
        raise IsADirectoryError("it is a folder")
    if not stat.S_ISREG(held):
        raise OSError("it is no file that can be replaced")
    return stat.S_IMODE(held)


def _remove(partial: Path) -> None:
    try:
        partial.unlink()
    except OSError:  # replaced already, or never made, which has been said
        pass
