"""A shelf in a folder: a file an entry, made beside its place and renamed.

Files are as old as their last use. Writers take turns by a lock on one of the files, which goes
with a process that is killed; readers need none.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from tqai.exchange.shelf import ShelfError, said, too_large

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_ENTRY, _UNFINISHED = ".tqai", ".part"
_LOCK, _LEDGER = "lock", "used"
_PATIENCE = 10.0
"""Seconds that a writer waits for its turn."""
_ABANDONED = 600.0
"""Seconds after which nobody is still writing a file that was begun."""
_ROOM = 0.05
"""Share of the room that is made beyond what is needed, so that files are not counted each time."""


class FolderShelf:
    """See ``Shelf``; ``OSError`` of any kind is a ``ShelfError``."""

    def __init__(self, path: str | os.PathLike[str], max_bytes: int) -> None:
        self.path = Path(path)
        self.max_bytes = max_bytes

    def fetch(self, names: Sequence[str]) -> list[bytes | None]:
        with self._said():
            return [self._read(name) for name in names]

    def held(self, names: Sequence[str]) -> list[bool]:
        with self._said():
            return [self._file(name).exists() for name in names]

    def use(self, names: Sequence[str]) -> None:
        now = time.time_ns()
        for age, name in enumerate(names):
            # It may have left meanwhile, or be somebody else's.
            with suppress(OSError):
                used = now - 1000 * age
                os.utime(self._file(name), ns=(used, used))

    def put(self, name: str, entry: bytes | bytearray) -> None:
        if len(entry) > self.max_bytes:
            raise too_large(len(entry), self.max_bytes)
        with self._said(), self._turn():
            place = self._file(name)
            if place.exists():
                self.use([name])
                return
            self._make_room(len(entry))
            place.parent.mkdir(exist_ok=True)
            begun = place.with_name(f"{name}.{os.getpid()}.{secrets.token_hex(4)}{_UNFINISHED}")
            try:
                with open(begun, "xb") as file:
                    file.write(entry)
                os.replace(begun, place)
            except BaseException:
                begun.unlink(missing_ok=True)
                raise

    def remove(self, name: str) -> None:
        with self._said():
            self._file(name).unlink(missing_ok=True)

    def used(self) -> int:
        with self._said():
            return sum(size for _, size, _ in self._entries())

    def _file(self, name: str) -> Path:
        return self.path / name[:2] / f"{name}{_ENTRY}"

    def _read(self, name: str) -> bytes | None:
        try:
            return self._file(name).read_bytes()
        except FileNotFoundError:
            return None

    def _make_room(self, size: int) -> None:
        """Takes the oldest entries away, where there is no room for `size` more bytes.

        The sum that is written down counts what is about to be written: after a writer was killed
        it is too large rather than too small, until it is counted anew.
        """
        ledger = self.path / _LEDGER
        try:
            used = int(ledger.read_text())
        except (FileNotFoundError, ValueError):
            used = self.max_bytes  # not known
        if used + size > self.max_bytes:
            entries = sorted(self._entries(clean=True))
            used = sum(held for _, held, _ in entries)
            aim = max(self.max_bytes - size - int(_ROOM * self.max_bytes), 0)
            if used + size <= self.max_bytes:
                entries = []
            for _, held, path in entries:
                if used <= aim:
                    break
                try:
                    path.unlink(missing_ok=True)
                except PermissionError:  # somebody is reading it, on Windows
                    continue
                used -= held
            if used + size > self.max_bytes:
                raise ShelfError(f"{self.path}: what is there cannot be taken away")
        ledger.write_text(str(used + size))

    def _entries(self, clean: bool = False) -> Iterator[tuple[int, int, Path]]:
        """When each entry was last used, its bytes, and where it is."""
        if not self.path.is_dir():
            return
        for folder in self.path.iterdir():
            if len(folder.name) != 2 or not folder.is_dir():
                continue
            for file in folder.iterdir():
                try:
                    found = file.stat()
                except FileNotFoundError:
                    continue
                if file.suffix == _ENTRY:
                    yield found.st_mtime_ns, found.st_size, file
                elif clean and file.suffix == _UNFINISHED:
                    if time.time() - found.st_mtime > _ABANDONED:
                        file.unlink(missing_ok=True)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One writer at a time."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / _LOCK, "ab") as file:
            end = time.monotonic() + _PATIENCE
            while fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise ShelfError(
                            f"{self.path}: another process has been writing for {_PATIENCE:.0f} s"
                        ) from None
                    time.sleep(0.005)
            yield

    def _said(self) -> AbstractContextManager[None]:
        return said(str(self.path), OSError)
