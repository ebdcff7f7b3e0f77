"""Bytes under keys: the `Storage` protocol and its local disk.

This module knows neither SQL nor HTTP nor the names that clients give their files. Another store (S3, GCS) is two more
classes with these methods; `test_storage_*` is the contract as tests, to be run over it too.
"""
import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol, Self


KEY = re.compile(r"[A-Za-z0-9-]{1,64}")
O_BINARY = getattr(os, "O_BINARY", 0)  # Windows


class Writer(Protocol):
    """One new object. Leaving the `with` block without `commit` drops it. Used by one thread at a time."""

    def write(self, data: bytes) -> None:
        """Appends. OSError with ENOSPC when the store is full."""

    def commit(self) -> None:
        """Publishes the object under its key, whole. After the next `Storage.sync` it survives a power loss."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class Storage(Protocol):
    """A flat store of immutable objects. Keys are 1-64 of `A-Z a-z 0-9 -`, made by the server, never used twice.

    Whatever goes wrong is an OSError. Safe to use from several threads and processes at once.
    """

    def create(self, key: str) -> Writer:
        """Starts a new object, invisible to `open` until its commit."""

    def sync(self) -> None:
        """After the return all objects that were committed before survive a power loss: one call for many."""

    def open(self, key: str) -> BinaryIO:
        """A seekable reader; FileNotFoundError when there is no such object. A reader outlives a `delete`."""

    def delete(self, key: str) -> None:
        """Removes the object, finished or not. Nothing there is no error, so a delete can be repeated."""

    def keys(self, older_than: float) -> Iterator[str]:
        """Keys of the objects, unfinished ones too, that were last written more than this many seconds ago."""

    def check(self) -> None:
        """OSError when objects can't be written now."""


class LocalStorage:
    """`Storage` in one folder of a local disk: the file `<key>`, or `<key>.part` before its commit."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, exist_ok=True)
        fsync_folder(folder.parent)

    def create(self, key: str) -> "LocalWriter":
        return LocalWriter(self._path(key))

    def sync(self) -> None:
        fsync_folder(self._folder)

    def open(self, key: str) -> BinaryIO:
        return self._path(key).open("rb")

    def delete(self, key: str) -> None:
        path = self._path(key)
        path.unlink(missing_ok=True)
        path.with_suffix(".part").unlink(missing_ok=True)

    def keys(self, older_than: float) -> Iterator[str]:
        limit = time.time() - older_than
        with os.scandir(self._folder) as entries:
            for entry in entries:
                key = entry.name.removesuffix(".part")
                with contextlib.suppress(FileNotFoundError):  # deleted or renamed meanwhile
                    if KEY.fullmatch(key) and entry.is_file() and entry.stat().st_mtime < limit:
                        yield key

    def check(self) -> None:
        probe = self._folder / f"probe-{os.getpid()}.part"  # one that is left behind is swept like any other
        probe.write_bytes(b"ready?")
        probe.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise ValueError("not a storage key")
        return self._folder / key


class LocalWriter:
    def __init__(self, path: Path) -> None:
        self._path, self._part, self._committed = path, path.with_suffix(".part"), False
        self._descriptor = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | O_BINARY, 0o600)

    def write(self, data: bytes) -> None:
        written = os.write(self._descriptor, data)
        while written < len(data):
            written += os.write(self._descriptor, data[written:])

    def commit(self) -> None:
        os.fsync(self._descriptor)
        self._close()
        os.replace(self._part, self._path)
        self._committed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if not self._committed:
            self._part.unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1  # a close that fails has closed it (close(2))
            os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Makes the names in this folder survive a power loss (fsync(2)); a no-op where folders can't be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
