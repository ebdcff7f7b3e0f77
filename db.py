"""Every line of SQL: users and sessions, the life of a document, and the queue, which is the documents table itself.

One thread owns the one connection that writes, and commits what waits in one transaction (group commit): the more
writers wait, the fewer fsyncs each pays for. Methods marked `@write` run there and return a Future; the others read
on their caller's thread, always the same one. Readers never wait for writers (WAL).
"""
import contextlib
import functools
import json
import mmap
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from enum import StrEnum
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar

try:
    import fcntl
except ImportError:  # Windows: one process at a time
    fcntl = None  # type: ignore[assignment]

P = ParamSpec("P")
T = TypeVar("T")
Task = tuple[Future[Any], Callable[[], Any]]

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE users (
    user_id TEXT PRIMARY KEY,
    username TEXT NOT NULL UNIQUE,
    password_hash TEXT NOT NULL
) STRICT;
CREATE TABLE sessions (
    session_id TEXT PRIMARY KEY,
    user_id TEXT NOT NULL REFERENCES users ON DELETE CASCADE,
    refresh_jti TEXT NOT NULL,  -- the one refresh token that is good now
    expires_at REAL NOT NULL
) STRICT;
CREATE INDEX sessions_of_user ON sessions (user_id);
CREATE TABLE login_failures (username TEXT NOT NULL, client TEXT NOT NULL, failed_at REAL NOT NULL) STRICT;
CREATE INDEX login_failures_of ON login_failures (username, client, failed_at);
CREATE INDEX login_failures_at ON login_failures (failed_at);
CREATE TABLE documents (
    document_id TEXT PRIMARY KEY,
    owner_id TEXT NOT NULL REFERENCES users ON DELETE CASCADE,
    filename TEXT NOT NULL,
    media_type TEXT NOT NULL,
    size INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    idempotency_key TEXT,
    status TEXT NOT NULL DEFAULT 'UPLOADED' CHECK (status IN ('UPLOADED', 'PROCESSING', 'COMPLETED', 'FAILED')),
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    -- The latest `process` request, and the run that works for it.
    request_id TEXT,
    queued_at TEXT,
    run_id TEXT,     -- new for each claim; NULL: waits for a worker
    beat_at REAL,    -- last sign of life of the run
    attempts INTEGER NOT NULL DEFAULT 0,
    progress INTEGER NOT NULL DEFAULT 0,
    message TEXT NOT NULL DEFAULT '',
    started_at TEXT,
    finished_at TEXT,
    error TEXT       -- JSON: code, message, retryable
) STRICT;
CREATE UNIQUE INDEX documents_by_key ON documents (owner_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX documents_newest ON documents (owner_id, created_at, document_id);
CREATE INDEX documents_by_status ON documents (owner_id, status, created_at, document_id);
CREATE INDEX documents_in_work ON documents (run_id, queued_at) WHERE status = 'PROCESSING';
CREATE TABLE results (
    document_id TEXT PRIMARY KEY REFERENCES documents ON DELETE CASCADE,
    result TEXT NOT NULL
) STRICT;
"""


FAILURE_LIMIT, FAILURE_WINDOW = 5, 15 * 60.0  # failed logins, seconds


class UnusableDatabase(Exception):
    """The file is no database, or of a later version of this program."""


class Refused(Exception):
    """What was asked for can't be; nothing was written."""


class KeyReused(Refused):
    """The idempotency key was used before, with another file."""


class QueueFull(Refused):
    """Too many documents wait for a worker."""


class OwnerGone(Refused):
    """The user was removed."""


class RunLost(Refused):
    """The run is no longer the document's: deleted, taken over or handed back. It can write nothing any more."""


class Status(StrEnum):
    UPLOADED = "UPLOADED"
    PROCESSING = "PROCESSING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"


@dataclass(frozen=True)
class User:
    user_id: str
    username: str
    password_hash: str


@dataclass(frozen=True)
class Document:
    document_id: str
    owner_id: str
    filename: str
    media_type: str
    size: int
    sha256: str
    status: str  # a Status
    created_at: str
    updated_at: str
    request_id: str | None = None
    attempts: int = 0
    progress: int = 0
    message: str = ""
    started_at: str | None = None
    finished_at: str | None = None
    error: str | None = None
    idempotency_key: str | None = None


COLUMNS = ", ".join(field.name for field in fields(Document))


def utc_text(moment: datetime) -> str:
    """RFC 3339 with microseconds and Z, of a moment in UTC; sorts by time as text."""
    return moment.isoformat(timespec="microseconds")[:26] + "Z"


def utc_now() -> str:
    return utc_text(datetime.now(timezone.utc))


class _ProcessLock:
    """`flock` on a file: one process at a time, the others wait in the kernel.

    SQLite's own lock would make them sleep and retry. And no two connections may write or checkpoint at the same
    moment before SQLite 3.51.3 (the WAL-reset bug, sqlite.org/wal.html).
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("a+b")
        if self._file.tell() < 8:
            self._file.write(bytes(8))
            self._file.flush()
        # A number in memory that all processes share; who holds the lock may change it.
        self.commits = memoryview(mmap.mmap(self._file.fileno(), 8)).cast("Q")

    def __enter__(self) -> None:
        if fcntl:
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        if fcntl:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        self._file.close()


def batches(queue: SimpleQueue[T | None], at_most: int) -> Iterator[list[T]]:
    """What waits in the queue, so many together, until a None comes."""
    taken: list[T | None] = []
    while None not in taken:
        taken = [queue.get()]
        with contextlib.suppress(Empty):
            while len(taken) < at_most:
                taken.append(queue.get_nowait())
        yield [item for item in taken if item is not None]


def write(method: Callable[Concatenate["Database", P], T]) -> Callable[Concatenate["Database", P], Future[T]]:
    """Runs the method on the writer's thread, all or nothing; its Future is done once the commit is on disk."""
    def submit(self: "Database", /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return self._submit(functools.partial(method, self, *args, **kwargs))
    functools.update_wrapper(submit, method)
    return submit


class Database:
    def __init__(self, path: Path) -> None:
        """Opens or creates the file. UnusableDatabase when it is not ours to use; sqlite3.Error when it can't be."""
        if sqlite3.sqlite_version_info < (3, 37):
            raise UnusableDatabase(f"SQLite 3.37 or newer is needed, this Python has {sqlite3.sqlite_version}")
        self._lock = _ProcessLock(path.with_name(path.name + ".lock"))
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()  # None: the last one
        self._closed = False
        self._submitting = threading.Lock()  # nothing comes behind the None
        with contextlib.ExitStack() as opened, self._lock:
            opened.callback(self._lock.close)
            self._w = opened.enter_context(contextlib.closing(sqlite3.connect(
                path, timeout=10, isolation_level=None, check_same_thread=False)))
            self._prepare(path)
            self._r = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
            opened.pop_all()
        self._r.execute("PRAGMA query_only = ON")
        self._rows = functools.lru_cache(maxsize=1024)(lambda sql, values: self._r.execute(sql, values).fetchone())
        self._rows_at = self.version()
        self._thread = threading.Thread(target=self._write_forever, name="database-writer", daemon=True)
        self._thread.start()

    def _prepare(self, path: Path) -> None:
        """Makes the schema where there is none; changes nothing in a file that is not ours."""
        try:
            (version,) = self._w.execute("PRAGMA user_version").fetchone()
            others = version == 0 and self._w.execute("SELECT 1 FROM sqlite_schema").fetchone()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise UnusableDatabase(f"{path}: {error}") from error
        if others:
            raise UnusableDatabase(f"{path} belongs to another program")
        if version > SCHEMA_VERSION:
            raise UnusableDatabase(f"{path} has schema version {version}, this program knows {SCHEMA_VERSION}")
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "temp_store = MEMORY"):
            self._w.execute(f"PRAGMA {pragma}")
        if version == 0:
            self._w.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")

    def close(self) -> None:
        """Finishes what was submitted. Under the lock, since closing a connection checkpoints too."""
        with self._submitting:
            self._closed = True
            self._tasks.put(None)
        self._thread.join()
        with self._lock:
            self._r.close()
            self._w.close()
        self._lock.close()

    def _submit(self, operation: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._submitting:
            if self._closed:
                raise sqlite3.ProgrammingError("the database is closed")
            self._tasks.put((future, operation))
        return future

    def _write_forever(self) -> None:
        for batch in batches(self._tasks, 500):
            self._commit([task for task in batch if task[0].set_running_or_notify_cancel()])

    def _commit(self, batch: Sequence[Task]) -> None:
        """One transaction for all. When one of them breaks it, each gets a transaction of its own."""
        try:
            results = self._transaction([operation for _, operation in batch])
        except BaseException as error:  # raised again by the Future, where the caller waits
            if len(batch) == 1:
                batch[0][0].set_exception(error)
            else:
                for task in batch:
                    self._commit([task])
        else:
            for (future, _), result in zip(batch, results):
                if isinstance(result, Refused):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _transaction(self, operations: Sequence[Callable[[], Any]]) -> list[Any]:
        results: list[Any] = []
        with self._lock:
            try:
                self._w.execute("BEGIN IMMEDIATE")
                for operation in operations:
                    try:
                        results.append(operation())
                    except Refused as refusal:
                        results.append(refusal)
                self._w.execute("COMMIT")
                return results
            finally:
                if self._w.in_transaction:
                    self._w.execute("ROLLBACK")
                self._lock.commits[0] += 1  # before anybody is told

    @write
    def check(self) -> None:
        """sqlite3.Error when nothing can be written now."""
        self._w.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")  # writes a page

    # Users and sessions

    def user(self, username: str) -> User | None:
        row = self._r.execute(
            "SELECT user_id, username, password_hash FROM users WHERE username = ?", (username,)).fetchone()
        return User(*row) if row else None

    def session_user(self, session_id: str) -> User | None:
        """Whose session this is, or None when it has ended."""
        row = self._row(
            "SELECT user_id, username, password_hash, expires_at FROM sessions JOIN users USING (user_id)"
            " WHERE session_id = ?", session_id)
        return User(*row[:3]) if row and row[3] > time.time() else None

    def _row(self, sql: str, *values: str) -> tuple[Any, ...] | None:
        """The row, or None. What was read stays true until something is committed, by any process."""
        if (version := self.version()) != self._rows_at:
            self._rows.cache_clear()
            self._rows_at = version
        row: tuple[Any, ...] | None = self._rows(sql, values)
        return row

    def has_users(self) -> bool:
        return self._r.execute("SELECT 1 FROM users LIMIT 1").fetchone() is not None

    @write
    def add_first_user(self, username: str, password_hash: str) -> bool:
        """Whether it was added: only where there is no user at all."""
        return self._w.execute(
            "INSERT INTO users SELECT ?, ?, ? WHERE NOT EXISTS (SELECT 1 FROM users)",
            (str(uuid.uuid4()), username, password_hash)).rowcount == 1

    @write
    def set_user(self, username: str, password_hash: str) -> None:
        """Adds the user, or sets a new password and ends that user's sessions."""
        self._w.execute(
            "INSERT INTO users VALUES (?, ?, ?)"
            " ON CONFLICT (username) DO UPDATE SET password_hash = excluded.password_hash",
            (str(uuid.uuid4()), username, password_hash))
        self._w.execute(
            "DELETE FROM sessions WHERE user_id = (SELECT user_id FROM users WHERE username = ?)", (username,))

    @write
    def remove_user(self, username: str) -> list[str] | None:
        """Removes user, sessions and documents; the ids of the documents whose files can go now. None: no such user."""
        documents = self._w.execute(
            "SELECT document_id FROM documents JOIN users ON user_id = owner_id WHERE username = ?",
            (username,)).fetchall()
        if not self._w.execute("DELETE FROM users WHERE username = ?", (username,)).rowcount:
            return None
        return [document_id for (document_id,) in documents]

    def throttled_for(self, username: str, client: str) -> float:
        """Seconds until this user name may be tried again from this address; 0: now."""
        return self._throttled_for(self._r, username, client)

    @staticmethod
    def _throttled_for(connection: sqlite3.Connection, username: str, client: str) -> float:
        now = time.time()
        failures = connection.execute(
            "SELECT failed_at FROM login_failures WHERE username = ? AND client = ? AND failed_at > ?"
            " ORDER BY failed_at DESC LIMIT ?", (username, client, now - FAILURE_WINDOW, FAILURE_LIMIT)).fetchall()
        return failures[-1][0] + FAILURE_WINDOW - now if len(failures) == FAILURE_LIMIT else 0.0

    @write
    def login_failed(self, username: str, client: str) -> float:
        """Notes a failure. Like `throttled_for` before it: of attempts made in parallel only the first few count."""
        now = time.time()
        wait = self._throttled_for(self._w, username, client)
        if not wait:
            self._w.execute("INSERT INTO login_failures VALUES (?, ?, ?)", (username, client, now))
            self._w.execute("DELETE FROM login_failures WHERE failed_at < ?", (now - FAILURE_WINDOW,))
        return wait

    @write
    def login_succeeded(self, user: User, client: str, session_id: str, jti: str, expires_at: float) -> float | None:
        """Opens the session and forgets the failures: 0. Else how long this user name is throttled from this
        address, so that a guess made in parallel with wrong ones isn't told apart; None: the password has changed."""
        if wait := self._throttled_for(self._w, user.username, client):
            return wait
        opened = self._w.execute(
            "INSERT INTO sessions SELECT ?, user_id, ?, ? FROM users WHERE user_id = ? AND password_hash = ?",
            (session_id, jti, expires_at, user.user_id, user.password_hash)).rowcount
        self._w.execute("DELETE FROM sessions WHERE expires_at < ?", (time.time(),))
        self._w.execute(
            "DELETE FROM login_failures WHERE username = ? AND client = ?", (user.username, client))
        return 0.0 if opened else None

    @write
    def rotate(self, session_id: str, used_jti: str, new_jti: str) -> tuple[float | None, str | None]:
        """Exchanges the refresh token: (end of the session, user name). One that was used before ends the session:
        (None, user name). (None, None): there is no such session."""
        row: tuple[float, str] | None = self._w.execute(
            "UPDATE sessions SET refresh_jti = ? WHERE session_id = ? AND refresh_jti = ? RETURNING expires_at,"
            " (SELECT username FROM users WHERE users.user_id = sessions.user_id)",
            (new_jti, session_id, used_jti)).fetchone()
        return row or (None, self._end_session(session_id))

    @write
    def end_session(self, session_id: str) -> str | None:
        """The name of the user whose session has ended now."""
        return self._end_session(session_id)

    def _end_session(self, session_id: str) -> str | None:
        row = self._w.execute(
            "DELETE FROM sessions WHERE session_id = ? RETURNING"
            " (SELECT username FROM users WHERE users.user_id = sessions.user_id)", (session_id,)).fetchone()
        return row[0] if row else None

    # Documents

    @write
    def add_documents(self, new: Callable[[], Sequence[Document | None]]) -> list[Document | Refused | None]:
        """Adds those that `new` tells when the transaction has begun; None is one that was withdrawn meanwhile. For
        each that document, or the one that its owner uploaded under its key before; KeyReused when that one has
        another content; OwnerGone."""
        return [document and self._add_document(document) for document in new()]

    def _add_document(self, new: Document) -> Document | Refused:
        try:
            added = self._w.execute(
                "INSERT INTO documents (document_id, owner_id, filename, media_type, size, sha256, status, created_at,"
                " updated_at, idempotency_key) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (owner_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING",
                (new.document_id, new.owner_id, new.filename, new.media_type, new.size, new.sha256, new.status,
                 new.created_at, new.updated_at, new.idempotency_key)).rowcount
        except sqlite3.IntegrityError as error:  # which undoes this statement, not the transaction
            if error.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
                raise
            return OwnerGone()
        if added:
            return new
        known = Document(*self._w.execute(
            f"SELECT {COLUMNS} FROM documents WHERE owner_id = ? AND idempotency_key = ?",
            (new.owner_id, new.idempotency_key)).fetchone())
        return known if known.sha256 == new.sha256 else KeyReused()

    def document(self, document_id: str, owner_id: str) -> Document | None:
        row = self._row(
            f"SELECT {COLUMNS} FROM documents WHERE document_id = ? AND owner_id = ?", document_id, owner_id)
        return Document(*row) if row else None

    def documents(self, owner_id: str, limit: int, status: Status | None,
                  before: tuple[str, str] | None) -> list[Document]:
        """Newest first, from behind (created_at, document_id) on: an index seek, however long the list is."""
        where, values = "owner_id = ?", [owner_id]
        if status:
            where, values = f"{where} AND status = ?", [*values, status]
        if before:
            where, values = f"{where} AND (created_at, document_id) < (?, ?)", [*values, *before]
        rows = self._r.execute(
            f"SELECT {COLUMNS} FROM documents WHERE {where} ORDER BY created_at DESC, document_id DESC LIMIT ?",
            (*values, limit))
        return [Document(*row) for row in rows]

    @write
    def delete(self, document_id: str, owner_id: str) -> bool:
        """Whether there was such a document. Its file is to be removed afterwards, never before."""
        return self._w.execute(
            "DELETE FROM documents WHERE document_id = ? AND owner_id = ?", (document_id, owner_id)).rowcount == 1

    @write
    def without_document(self, document_ids: Sequence[str]) -> list[str]:
        """Those of the ids that no document has. On the writer's thread, since the sweep is not on the reader's."""
        rows = self._w.execute(
            "SELECT value FROM json_each(?) WHERE value NOT IN (SELECT document_id FROM documents)",
            (json.dumps(document_ids),))
        return [document_id for (document_id,) in rows]

    def result(self, document_id: str) -> str | None:
        """What the pipeline returned, as JSON; None when the document is not COMPLETED or has just been deleted."""
        row = self._r.execute("SELECT result FROM results WHERE document_id = ?", (document_id,)).fetchone()
        return row[0] if row else None

    # The queue: PROCESSING without a run_id waits for a worker

    @write
    def enqueue(self, document_id: str, owner_id: str, request_id: str, max_queue: int) -> Document | None:
        """Starts a run of an UPLOADED or FAILED document; any other is left as it is. None: no such document.
        QueueFull when a run would have to start and `max_queue` documents wait already."""
        find = f"SELECT {COLUMNS} FROM documents WHERE document_id = ? AND owner_id = ?"
        row = self._w.execute(find, (document_id, owner_id)).fetchone()
        if not row or Document(*row).status in (Status.PROCESSING, Status.COMPLETED):
            return Document(*row) if row else None
        if self._queued(max_queue) == max_queue:
            raise QueueFull
        now = utc_now()
        self._w.execute(
            "UPDATE documents SET status = 'PROCESSING', request_id = ?, queued_at = ?, updated_at = ?, run_id = NULL,"
            " attempts = 0, progress = 0, message = 'waiting for a worker', started_at = NULL, finished_at = NULL,"
            " error = NULL WHERE document_id = ?", (request_id, now, now, document_id))
        return Document(*self._w.execute(find, (document_id, owner_id)).fetchone())

    def _queued(self, at_most: int) -> int:
        (count,) = self._w.execute(
            "SELECT count(*) FROM (SELECT 1 FROM documents WHERE status = 'PROCESSING' AND run_id IS NULL LIMIT ?)",
            (at_most,)).fetchone()
        return int(count)

    @write
    def claim(self, run_id: str) -> Document | None:
        """Gives the document that waits longest to this new run and counts the attempt. None: nothing waits."""
        now = utc_now()
        row = self._w.execute(
            "UPDATE documents SET run_id = ?, beat_at = ?, attempts = attempts + 1, progress = 0, message = 'started',"
            " started_at = ?, updated_at = ? WHERE document_id = (SELECT document_id FROM documents"
            " WHERE status = 'PROCESSING' AND run_id IS NULL ORDER BY queued_at LIMIT 1)"
            f" RETURNING {COLUMNS}", (run_id, time.time(), now, now)).fetchone()
        return Document(*row) if row else None

    @write
    def progress(self, run_id: str, document_id: str, percent: int, message: str) -> None:
        self._update_run(run_id, document_id, "progress = ?, message = ?, beat_at = ?", percent, message, time.time())

    @write
    def complete(self, run_id: str, document_id: str, result: str) -> None:
        self._update_run(
            run_id, document_id, "status = 'COMPLETED', run_id = NULL, progress = 100, message = 'completed',"
            " finished_at = ?", utc_now())
        self._w.execute("INSERT INTO results VALUES (?, ?)", (document_id, result))

    @write
    def fail(self, run_id: str, document_id: str, code: str, message: str, retryable: bool) -> None:
        error = json.dumps({"code": code, "message": message, "retryable": retryable})
        self._update_run(
            run_id, document_id, "status = 'FAILED', run_id = NULL, message = ?, error = ?, finished_at = ?",
            message, error, utc_now())

    def _update_run(self, run_id: str, document_id: str, assignments: str, *values: Any) -> None:
        """RunLost, and nothing written, unless the document still belongs to this run."""
        if not self._w.execute(
                f"UPDATE documents SET {assignments}, updated_at = ? WHERE document_id = ? AND run_id = ?",
                (*values, utc_now(), document_id, run_id)).rowcount:
            raise RunLost

    @write
    def hand_back(self, run_ids: Sequence[str]) -> list[Document]:
        """Puts runs that have to stop back into the queue, as if they had not been tried."""
        rows = self._w.execute(
            "UPDATE documents SET run_id = NULL, attempts = attempts - 1, progress = 0, started_at = NULL,"
            " message = 'waiting for a worker', updated_at = ? WHERE run_id IN (SELECT value FROM json_each(?))"
            f" AND status = 'PROCESSING' RETURNING {COLUMNS}", (utc_now(), json.dumps(run_ids)))
        return [Document(*row) for row in rows]

    @write
    def keep_leases(self, run_ids: Sequence[str], lease: float, max_attempts: int) -> tuple[list[Document], int]:
        """The keeper's round: a sign of life for these runs; runs of others that have been silent for the lease go
        back to the queue, or FAILED after the last attempt. Those documents, and how many wait (up to 1000)."""
        now, stamp, interrupted = time.time(), utc_now(), "The worker died while it ran, each time."
        self._w.execute(
            "UPDATE documents SET beat_at = ? WHERE status = 'PROCESSING'"
            " AND run_id IN (SELECT value FROM json_each(?))", (now, json.dumps(run_ids)))
        silent = "WHERE status = 'PROCESSING' AND run_id IS NOT NULL AND beat_at < ? AND attempts"
        failed = self._w.execute(
            "UPDATE documents SET status = 'FAILED', run_id = NULL, finished_at = ?, updated_at = ?, message = ?,"
            f" error = ? {silent} >= ? RETURNING {COLUMNS}", (
                stamp, stamp, interrupted,
                json.dumps({"code": "interrupted", "message": interrupted, "retryable": True}),
                now - lease, max_attempts)).fetchall()
        requeued = self._w.execute(
            "UPDATE documents SET run_id = NULL, progress = 0, started_at = NULL, updated_at = ?,"
            f" message = 'waiting for a worker' {silent} < ? RETURNING {COLUMNS}",
            (stamp, now - lease, max_attempts)).fetchall()
        return [Document(*row) for row in (*failed, *requeued)], self._queued(1000)

    def version(self) -> int:
        """Another number whenever anything was committed, by any process of this program."""
        return self._lock.commits[0]

    def not_processing(self, document_ids: Sequence[str]) -> list[str]:
        """Those of the ids whose processing has ended, or that are gone."""
        rows: Iterator[tuple[str]] = self._r.execute(
            "SELECT value FROM json_each(?) LEFT JOIN documents ON document_id = value"
            " WHERE status IS NOT 'PROCESSING'", (json.dumps(document_ids),))
        return [document_id for (document_id,) in rows]
