"""The file that a cache lies in: safetensors, with a header of JSON in its metadata.

The library in C++ writes and reads it (docs/format.md); what the header and the tensors mean is the
framework's.
Here is what holds for all of these. Reading executes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tqai import _core

Source = _core.KvCache | Callable[[], Any]
"""A tensor's bytes: a cache's, or what gives a buffer of them when it is their turn."""


def write(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    tensors: Iterable[tuple[str, str, tuple[int, ...] | None, Source]],
) -> None:
    """Writes a file, whole or not at all, and with no more of it in memory than one tensor.

    tensors: each (name, dtype as safetensors has it, shape, source); shape None: as many bytes as
    come. A link stays, and what it points to is replaced. The file gets the permissions of the one
    that it replaces; a new one, those that the process gives new files.

    Raises:
        OSError: where that is not possible, naming `path`; what was there is still there.
    """
    entries = [
        (name, dtype, None if shape is None else list(shape), source)
        for name, dtype, shape, source in tensors
    ]
    _core.write_file(_named(path), entries, json.dumps(header))


def opened(path: Path) -> tuple[_core.CacheFile, dict[str, Any]]:
    """The file and its header.

    Raises:
        ValueError: for a file of another kind or version, or a damaged one.
        OSError: where it cannot be read.
    """
    file = _core.CacheFile(_named(path))
    return file, header_of(path, file.header)


def _named(path: str | os.PathLike[str]) -> str:
    """A path as the library takes it.

    Raises:
        ValueError: for a name that no file has.
    """
    name = os.fsdecode(path)
    if "\0" in name:
        raise ValueError(f"{name!r} is no name of a file: there is a zero byte in it")
    return name


def header_of(path: Path, text: str) -> dict[str, Any]:
    """The header in a file's metadata.

    Raises:
        ValueError: for what is no JSON object.
    """
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its header is not JSON ({error}); save it again") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its header is a {type(header).__name__}; save it again")
    return header


def bytes_of(file: _core.CacheFile, name: str) -> np.ndarray:
    """A tensor's bytes, in memory of their own.

    Raises:
        ValueError: where they are not those that were written.
    """
    data = np.empty(file.tensors[name][2], dtype=np.uint8)
    file.read_all(name, data)
    return data


def first_bytes_of(file: _core.CacheFile, name: str, most: int) -> np.ndarray:
    """The first `most` of a tensor's bytes, or all where there are fewer, whatever they are."""
    data = np.empty(min(file.tensors[name][2], most), dtype=np.uint8)
    file.read_into(name, data)
    return data


def layers(
    path: str | os.PathLike[str], *, level: str | None = None, mapped: bool = False
) -> dict[int, _core.KvCache]:
    """The compressed layers of a file by their number, whoever wrote it, without a model.

    mapped: tiles stay in the file's pages, which the system reads when they are used; as long as
    such a layer lives, nobody may shorten the file or change it in place.

    Raises:
        ValueError: for a file of another kind or version, or a damaged one.
        OSError: where it cannot be read.
    """
    file = _core.CacheFile(_named(path))
    numbers = {}
    for name in file.tensors:
        part, _, rest = name.partition(".")
        number, _, kind = rest.partition(".")
        if part == "layers" and kind == "packed" and number.isdecimal():
            numbers[int(number)] = name
    return {
        number: file.load(name, level=level, mapped=mapped)
        for number, name in sorted(numbers.items())
    }
