"""Bytes that say what they are and what they go with: what packed caches travel in.

docs/format.md has them byte by byte. Whatever is wrong with some, and whatever they belong to, they
are either the payload that was sealed, for one with the same facts, or ``NotUsable``: a store, a
network or a disk may cut, flip, mix up and keep for years what it was given.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from tqai import _core

Buffer = bytes | bytearray | memoryview
Facts = Mapping[str, Any]
"""What a payload goes with, in JSON's kinds: the model, its heads, bits, seed, codebooks."""

VERSION = 1
_MAGIC = b"TQAIPACK"
_START = struct.Struct("<8sIIQI")
"""Magic, version, bytes of the header, bytes of the payload, CRC-32 of all but itself."""
_CHECKED = _START.size - 4
_MOST_HEADER = 1 << 24
ALIGNED = 64
"""Payloads begin at a multiple of so many bytes, counted from the envelope's first."""


class NotUsable(Exception):
    """What was read is not what is looked for: damaged, of another version, or of something else.

    Whoever looks for a cache goes on as if there were none.
    """


def size(kind: str, facts: Facts, payload: int) -> int:
    """Bytes of an envelope with `payload` bytes in it."""
    return _START.size + len(_header(kind, facts)) + payload


def sealed(kind: str, facts: Facts, parts: Sequence[Buffer]) -> bytearray:
    """An envelope around `parts`, one after another."""
    whole = bytearray(size(kind, facts, sum(map(_length, parts))))
    seal_into(memoryview(whole), kind, facts, parts)
    return whole


def seal_into(to: memoryview, kind: str, facts: Facts, parts: Sequence[Buffer]) -> int:
    """Writes an envelope to the start of `to`, of bytes, and returns how many it takes.

    Raises:
        ValueError: where there is no room.
    """
    header = _header(kind, facts)
    at = _START.size + len(header)
    payload = sum(map(_length, parts))
    if at + payload > len(to):
        raise ValueError(f"an envelope of {at + payload} bytes does not fit into {len(to)}")
    to[_START.size : at] = header
    for part in parts:
        end = at + _length(part)
        to[at:end] = memoryview(part).cast("B")
        at = end
    start = _START.pack(_MAGIC, VERSION, len(header), payload, 0)[:_CHECKED]
    to[:_CHECKED] = start
    to[_CHECKED : _START.size] = struct.pack("<I", _checksum(start, to[_START.size : at]))
    return at


def opened(data: Buffer, kind: str, facts: Facts) -> memoryview:
    """The payload of an envelope of this kind, sealed with these facts; a view of `data`.

    Bytes after the envelope's end are let be.

    Raises:
        NotUsable: for anything else, saying what it is.
    """
    view = memoryview(data).cast("B")
    if len(view) < _START.size:
        raise NotUsable(f"{len(view)} bytes are no envelope")
    magic, version, header_bytes, payload_bytes, checksum = _START.unpack_from(view)
    if magic != _MAGIC:
        raise NotUsable("they are no envelope of tqai's")
    end = _START.size + header_bytes + payload_bytes
    if version == VERSION and (header_bytes > _MOST_HEADER or end > len(view)):
        raise NotUsable(f"they are cut short: {len(view)} of {end} bytes")
    if version == VERSION and checksum != _checksum(view[:_CHECKED], view[_START.size : end]):
        raise NotUsable("their checksum does not fit: they are damaged")
    if version != VERSION:
        raise NotUsable(f"they are of version {version}; this tqai reads {VERSION}")
    header = bytes(view[_START.size : _START.size + header_bytes])
    if header != _header(kind, facts):
        raise NotUsable(_difference(header, kind, facts))
    return view[_START.size + header_bytes : end]


def codebooks(sides: Sequence[tuple[int, int]]) -> str:
    """What tells the codebooks of these dimensions and bits from those that other versions have."""
    return f"{zlib.crc32(b''.join(_levels(dim, bits) for dim, bits in sorted(set(sides)))):08x}"


@lru_cache(maxsize=64)
def _levels(dim: int, bits: int) -> bytes:
    # The step is a sum that machines round each in its own way; C++ compares it to 1e-5.
    return struct.pack("<ii", dim, bits) + _core.Codebook(dim, bits, "int8").levels.tobytes()


def _header(kind: str, facts: Facts) -> bytes:
    """As JSON with spaces after it, so that the payload is aligned."""
    text = json.dumps({"kind": kind, **facts}, sort_keys=True, separators=(",", ":")).encode()
    return text + b" " * (-(_START.size + len(text)) % ALIGNED)


def _difference(header: bytes, kind: str, facts: Facts) -> str:
    """What an envelope goes with, where that is something else."""
    try:
        found = json.loads(header)
        wanted = json.loads(_header(kind, facts))
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                return (
                    f"they go with another {name}: {_shown(found.get(name))}, not "
                    f"{_shown(wanted.get(name))}"
                )
    except (ValueError, AttributeError, RecursionError):
        pass
    return "they go with something else"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _checksum(start: Buffer, rest: Buffer) -> int:
    return zlib.crc32(rest, zlib.crc32(start))


def _length(part: Buffer) -> int:
    return memoryview(part).nbytes
