"""Where envelopes lie, by name, as several processes share it, bounded in bytes.

A folder or a Redis server. What was not used for longest leaves first. Each entry is there whole or
not at all, whatever happens to its writer; an entry that is there is left as it is, for its name
says all that it depends on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol
from urllib.parse import unquote, urlsplit

from tqai.requirements import needs
from tqai.signals import is_of_a_handler

REDIS = ("redis", "rediss", "unix")
"""Schemes of addresses of Redis servers."""


class ShelfError(Exception):
    """The shelf cannot be reached, or takes nothing: the message says why."""


class Shelf(Protocol):
    """Entries by name, of hexadecimal digits. Each method may raise ``ShelfError``."""

    def fetch(self, names: Sequence[str]) -> list[bytes | None]:
        """The entries of these names, None for what is not there."""
        ...

    def held(self, names: Sequence[str]) -> list[bool]:
        """Which of these are there."""
        ...

    def use(self, names: Sequence[str]) -> None:
        """Says that these are in use; of them the last ones leave first."""
        ...

    def put(self, name: str, entry: bytes | bytearray) -> None:
        """Adds an entry, and takes others away until there is room.

        Raises:
            ShelfError: also where it is larger than all the room.
        """
        ...

    def remove(self, name: str) -> None:
        """Takes an entry away, if it is there."""
        ...

    def used(self) -> int:
        """Bytes of all entries."""
        ...


def shelf_at(url: str, max_bytes: int) -> Shelf:
    """The shelf at an address: a folder's path, "file://…", or "redis://host:port/db".

    Raises:
        ValueError: for another kind of address.
        ImportError: without the package redis, where the address asks for it.
    """
    if not url:
        raise ValueError("the address of a store is empty; expected a folder, or redis://…")
    address = urlsplit(url)
    if address.scheme in REDIS:
        needs("redis", what="a store in Redis")
        from tqai.exchange.redis_shelf import RedisShelf

        return RedisShelf(url, max_bytes)
    from tqai.exchange.folder_shelf import FolderShelf

    if address.scheme == "file":
        if address.netloc not in ("", "localhost"):
            raise ValueError(
                f"{without_password(url)!r}: a folder of another machine; expected file:///path"
            )
        if not address.path:
            raise ValueError(f"{url!r} names no folder; expected file:///path")
        return FolderShelf(unquote(address.path), max_bytes)
    if "://" in url:
        raise ValueError(
            f"{without_password(url)!r}: expected a folder, or an address that begins with "
            f"{', '.join(f'{scheme}://' for scheme in ('file', *REDIS))}"
        )
    return FolderShelf(url, max_bytes)


@contextmanager
def said(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of these kinds into ``ShelfError``, but for a signal handler's."""
    try:
        yield
    except kinds as error:
        if is_of_a_handler(error):
            raise
        raise ShelfError(f"{what}: {type(error).__name__}: {error}") from error


def without_password(url: str) -> str:
    """An address as it may be shown: with "…" for a user, a password, and either in its query."""
    start, at, rest = url.rpartition("@")
    scheme, is_url, _ = start.partition("://")
    shown = f"{scheme}://…@{rest}" if at and is_url else url
    return re.sub(r"(?<=[?&])(username|password)=[^&]*", r"\1=…", shown)


def too_large(size: int, max_bytes: int) -> ShelfError:
    return ShelfError(f"an entry of {size} bytes is more than the {max_bytes} that it may hold")
