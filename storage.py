"""Documents as bytes: what makes a file a PDF or DOCX, a file on its way in, and `Storage` with its local disk. Another
store (S3, GCS) is one more class like `LocalStorage`, tested by `test_storage_*`."""
import contextlib
import errno
import functools
import hashlib
import os
import re
import struct
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn, Protocol, cast
from urllib.parse import unquote
from xml.parsers import expat

PDF = "application/pdf"
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
MEDIA_TYPES = {".pdf": PDF, ".docx": DOCX}

private_opener = functools.partial(os.open, mode=0o600)  # of files that only their owner may read
KEY = re.compile(r"[A-Za-z0-9-]{1,64}")
START_BYTES = 1024  # `%PDF-` comes within them


class BadDocument(Exception):
    """The content is not a good PDF or DOCX. The text says why, for people."""


class Storage(Protocol):
    """A flat store of immutable objects. A key has 1 to 64 letters, digits and hyphens; the server makes it and never
    uses it twice. Whatever goes wrong is an OSError. Several threads and processes may use a storage at once."""
    def create(self, key: str) -> BinaryIO:
        """A new file to write, seek and read. It is not visible in the store until `publish`."""

    def publish(self, key: str, file: BinaryIO) -> None:
        """Makes the object out of the file and closes the file. The object is durable after the next `sync`."""

    def sync(self) -> None:
        """Makes all that was published or deleted before survive a power loss. Called before each commit of rows."""

    def open(self, key: str) -> BinaryIO:
        """A seekable reader; FileNotFoundError when there is no such object. A reader outlives a `delete`."""

    def delete(self, key: str) -> None:
        """Removes the object, published or not. An object that is not there is no error: a delete can be repeated."""

    def keys(self) -> Iterator[str]:
        """The keys of all published objects."""

    def check(self) -> None:
        """OSError when objects can't be written now."""


class LocalStorage:
    """`Storage` in one folder of a local disk: the file `<key>`, or `<key>.part` before `publish`."""
    def __init__(self, folder: Path) -> None:
        self._folder = os.fspath(folder)
        make_folder(folder)
        for path in folder.glob("*.part"):
            with contextlib.suppress(FileNotFoundError):  # another process removed or published it
                if abs(time.time() - path.stat().st_mtime) > 86400:  # a day: no upload takes more than an hour
                    path.unlink()

    def create(self, key: str) -> BinaryIO:
        # Unbuffered: a buffered open costs four more system calls, and a small upload is a single write.
        return cast(BinaryIO, open(self._path(key) + ".part", "x+b", buffering=0, opener=private_opener))

    def publish(self, key: str, file: BinaryIO) -> None:
        with file:
            os.fsync(file.fileno())
        os.replace(self._path(key) + ".part", self._path(key))

    def sync(self) -> None:
        fsync_folder(self._folder)

    def open(self, key: str) -> BinaryIO:
        return open(self._path(key), "rb")

    def delete(self, key: str) -> None:
        for suffix in ("", ".part"):
            Path(self._path(key) + suffix).unlink(missing_ok=True)

    def keys(self) -> Iterator[str]:
        return (name for name in os.listdir(self._folder) if KEY.fullmatch(name) and os.path.isfile(self._path(name)))

    def check(self) -> None:
        with tempfile.TemporaryFile(dir=self._folder, suffix=".part", buffering=0) as file:
            file.write(b"ready?")

    def _path(self, key: str) -> str:
        if not KEY.fullmatch(key):
            raise ValueError("not a storage key")
        return os.path.join(self._folder, key)


def make_folder(folder: Path) -> None:
    """Makes the folder, and those above it that are missing, for their owner alone; the names survive a power loss."""
    for each in reversed([folder, *folder.parents]):
        if each == folder or not each.exists():  # `folder` always: an earlier start may have crashed before the sync
            each.mkdir(mode=0o700, exist_ok=True)
            with contextlib.suppress(PermissionError):  # the parent may be entered but not listed
                fsync_folder(each.parent)


def fsync_folder(folder: str | Path) -> None:
    """Makes the names in this folder survive a power loss (fsync(2)), as far as the file system offers that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


class Incoming:
    """One file on its way into the storage. Its start is checked when START_BYTES, or all, have come. `feed` never
    blocks; the other methods wait for the storage, so they are called in a thread. One call at a time."""
    def __init__(self, storage: Storage, key: str) -> None:
        self.key, self.size = key, 0
        self.filename = self.media_type = ""  # to be set before the first `feed`
        self.sha256 = hashlib.sha256()
        self.held: list[bytes] = []  # pieces that have come, and are not written yet
        self.held_size = 0  # bytes of memory that these pieces take
        self._storage = storage
        self._file: BinaryIO | None = None

    def feed(self, piece: bytes) -> None:
        """Takes the next piece. Raises BadDocument when the file does not begin as its media type does."""
        self.size += len(piece)
        self.held.append(piece)
        self.held_size += len(piece) + 64  # with the piece's share of Python's memory
        if self.size - len(piece) < START_BYTES <= self.size:
            self._check_start()

    def _check_start(self) -> None:
        start = b"".join(self.held)[:START_BYTES]
        is_good = b"%PDF-" in start if self.media_type == PDF else start.startswith(b"PK\x03\x04")
        if not is_good:
            raise BadDocument("This Office file is encrypted (or of the old .doc format)."
                              if start.startswith(OLE_MAGIC) else "The content is not what the extension says.")

    def flush(self) -> BinaryIO:
        """Writes what is held, and returns the file. Not to be called before the start was checked."""
        content = b"".join(self.held)
        self.held, self.held_size = [], 0
        if self._file is None:
            self._file = self._storage.create(self.key)
        self.sha256.update(content)
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest):]  # an unbuffered file may write only a part
        return self._file

    def finish(self) -> None:
        """Writes the rest of the file and publishes it. Raises BadDocument unless it is a PDF or DOCX."""
        if self.size < START_BYTES:
            self._check_start()
        file = self.flush()
        if self.media_type == DOCX:
            with ONE_CHECK:
                check_is_docx(file)
        self._storage.publish(self.key, file)

    def discard(self) -> None:
        """Forgets what is held, and removes what was written, published or not."""
        self.held.clear()
        if self._file is not None:
            self._file.close()
            self._storage.delete(self.key)


# Formats

OLE_MAGIC = bytes.fromhex("d0cf11e0a1b11ae1")
MAIN_PART = f"{DOCX}.main+xml"
CONTENT_TYPES = "/[content_types].xml"
MAX_ENTRIES, MAX_DIRECTORY = 10_000, 2**21  # of a ZIP directory: number, bytes
MAX_CONTENT_TYPES, MAX_MAIN_PART = 2**18, 512 * 2**20  # bytes, unpacked
ONE_CHECK = threading.Lock()  # held while an upload's DOCX is checked: each thread that parses slows the event loop


class BoundedReads:
    """Cuts reads at MAX_DIRECTORY, so that zipfile refuses a larger directory. It calls `read()` for 64 KiB at most."""
    def __init__(self, file: BinaryIO) -> None:
        self._file, self.seek, self.tell, self.seekable = file, file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        return self._file.read(min(size, MAX_DIRECTORY))


@contextlib.contextmanager
def open_docx(file: BinaryIO) -> Iterator[zipfile.ZipFile]:
    """The ZIP archive. Raises BadDocument for whatever is wrong with it, also inside of the `with` block."""
    try:
        with zipfile.ZipFile(cast(BinaryIO, BoundedReads(file))) as archive:
            if len(archive.infolist()) > MAX_ENTRIES:
                raise BadDocument(f"The ZIP archive has more than {MAX_ENTRIES} entries.")
            yield archive
    except (BadDocument, OSError):  # an OSError is the storage's fault
        raise
    except Exception as error:  # zipfile and expat raise a dozen kinds
        raise BadDocument("The content is not a readable DOCX (ZIP) file.") from error


def unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most: int) -> Iterator[bytes]:
    """The bytes of an entry, whose CRC is checked at the end. Raises BadDocument when there may be more than `most`.
    (zipfile bounds what it gives by `file_size` for stored and deflated entries only, so others are refused.)"""
    is_encrypted = entry.flag_bits & 1
    if is_encrypted or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.file_size > most:
        raise BadDocument("A part of the DOCX is packed otherwise, or unpacks to more, than a DOCX needs.")
    if not 0 <= entry.header_offset < archive.start_dir:  # a seek to there may raise an OSError, as if the disk failed
        raise BadDocument("The ZIP archive has an entry outside of the file.")
    # The data follows the local header. `archive.open` refuses an entry whose name differs there, but Word does not.
    file = cast(BinaryIO, archive.fp)
    file.seek(entry.header_offset)
    name_length, extra_length = struct.unpack("<26xHH", file.read(30))
    file.seek(name_length + extra_length, os.SEEK_CUR)
    with zipfile.ZipExtFile(file, "r", entry) as content:
        while data := content.read(65536):
            yield data


def part_name(name: str) -> str:
    """As part names are compared: in lower case (ECMA-376-2), with slashes where a writer used backslashes."""
    return "/" + unquote(name).replace("\\", "/").lstrip("/").lower()


def content_types(archive: zipfile.ZipFile) -> dict[str, str]:
    """What [Content_Types].xml declares: content types by `/part/name` or `/.extension`, all in lower case."""
    (types_entry,) = [  # else a ValueError: a DOCX has exactly one
        entry for entry in archive.infolist() if part_name(entry.filename) == CONTENT_TYPES]
    declared: dict[str, str] = {}

    def on_element(_: str, attributes: dict[str, str]) -> None:
        name = part_name(attributes.get("PartName", "." + attributes.get("Extension", "")))
        declared.setdefault(name, attributes.get("ContentType", "").partition(";")[0].strip().lower())

    def on_doctype(*_: object) -> NoReturn:  # OPC forbids DTDs; without one there are no entities to expand
        raise BadDocument("[Content_Types].xml has a DTD.")

    content = b"".join(unpacked(archive, types_entry, MAX_CONTENT_TYPES))
    # OPC has these two encodings. The name of any other, however long, would stay in Python's memory.
    parser = expat.ParserCreate("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    parser.StartElementHandler = on_element
    parser.StartDoctypeDeclHandler = on_doctype
    parser.Parse(content, True)
    return declared


def check_is_docx(file: BinaryIO) -> None:
    """Raises BadDocument unless [Content_Types].xml has a WordprocessingML main part and no macros (ECMA-376-2)."""
    with open_docx(file) as archive:
        declared = content_types(archive).values()
    if MAIN_PART not in declared or any("vbaproject" in content_type for content_type in declared):
        raise BadDocument("This Office file is no Word document (DOCX), or it has macros.")


def check_is_whole(file: BinaryIO, media_type: str) -> None:
    """Raises BadDocument when a PDF has no `%%EOF` within its last MiB, or the main part of a DOCX does not unpack."""
    if media_type == PDF:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**20))
        if b"%%EOF" not in file.read():
            raise BadDocument("The PDF has no end-of-file marker.")
        return
    with open_docx(file) as archive:
        declared = content_types(archive)
        for entry in archive.infolist():
            name = part_name(entry.filename)
            by_extension = declared.get("/" + os.path.splitext(name)[1])
            if name != CONTENT_TYPES and declared.get(name, by_extension) == MAIN_PART:
                for _ in unpacked(archive, entry, MAX_MAIN_PART):
                    pass
                return
    raise BadDocument("The main part of the DOCX is missing.")
