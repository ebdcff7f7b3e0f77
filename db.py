"""Every line of SQL: users and sessions, the life of a document, and the queue, which is the documents table itself.

One thread writes, the committer. It puts all writes that wait into one transaction (group commit), so that they share
its fsyncs. Methods marked with `write` return a Write, to wait for. The others read over a second connection, which
never waits for writers (WAL)."""
import asyncio
import contextlib
import fcntl
import functools
import json
import os
import queue
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from datetime import datetime, timezone
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Status = Literal["UPLOADED", "PROCESSING", "COMPLETED", "FAILED"]
WAITING = "status = 'PROCESSING' AND run_id IS NULL"  # the two kinds of PROCESSING
RUNNING = "status = 'PROCESSING' AND run_id IS NOT NULL"

SCHEMA_VERSION = 3  # as PRAGMA user_version
SCHEMA = f"""
CREATE TABLE users (
    user_id TEXT PRIMARY KEY, username TEXT NOT NULL UNIQUE, password_hash TEXT NOT NULL,
    last_claim INTEGER NOT NULL  -- serial number of the latest claim of one of the user's documents
) STRICT;
CREATE INDEX users_by_last_claim ON users (last_claim);
CREATE TABLE sessions (
    session_id TEXT PRIMARY KEY, user_id TEXT NOT NULL REFERENCES users ON DELETE CASCADE,
    refresh_jti TEXT NOT NULL,  -- the current refresh token
    expires_at REAL NOT NULL,
    previous_jti TEXT,          -- the refresh token before the current one
    rotated_at REAL NOT NULL    -- when the current refresh token was issued
) STRICT;
CREATE INDEX sessions_of_user ON sessions (user_id);
CREATE TABLE login_failures (name_hash TEXT NOT NULL, client TEXT NOT NULL, failed_at REAL NOT NULL) STRICT;
CREATE INDEX login_failures_of ON login_failures (name_hash, client, failed_at);
CREATE INDEX login_failures_at ON login_failures (failed_at);
CREATE TABLE documents (
    document_id TEXT PRIMARY KEY, owner_id TEXT NOT NULL REFERENCES users ON DELETE CASCADE,
    filename TEXT NOT NULL, media_type TEXT NOT NULL, size INTEGER NOT NULL, sha256 TEXT NOT NULL, idempotency_key TEXT,
    status TEXT NOT NULL CHECK (status IN ('UPLOADED', 'PROCESSING', 'COMPLETED', 'FAILED')),
    created_at TEXT NOT NULL, updated_at TEXT NOT NULL,
    request_id TEXT, queued_at TEXT,  -- of the request that queued it
    run_id TEXT,                      -- a run is one claim by a worker; NULL unless a worker has the document
    beat_at REAL,                     -- last sign of life of the run's process
    attempts INTEGER NOT NULL, progress INTEGER NOT NULL, message TEXT NOT NULL, started_at TEXT, finished_at TEXT,
    error TEXT                        -- JSON: code, message, retryable
) STRICT;
CREATE UNIQUE INDEX documents_by_key ON documents (owner_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX documents_newest ON documents (owner_id, created_at, document_id);
CREATE INDEX documents_by_status ON documents (owner_id, status, created_at, document_id);
CREATE INDEX documents_waiting ON documents (owner_id, queued_at) WHERE {WAITING};
CREATE INDEX documents_running ON documents (beat_at) WHERE {RUNNING};
CREATE TABLE results (document_id TEXT PRIMARY KEY REFERENCES documents ON DELETE CASCADE, result TEXT NOT NULL) STRICT;
CREATE TABLE deleted_files (document_id TEXT PRIMARY KEY) STRICT;  -- to be removed from the storage
CREATE TRIGGER document_deleted AFTER DELETE ON documents BEGIN
    INSERT OR IGNORE INTO deleted_files VALUES (old.document_id);
END;
"""

FAILURE_LIMIT, FAILURE_WINDOW = 5, 15 * 60.0  # failed logins, seconds
SESSION_SECONDS, MAX_SESSIONS = 30 * 86400.0, 50  # of one user
REFRESH_GRACE = 10.0  # seconds in which a refresh token may be used again
WRITE_SECONDS = 30.0  # how long a request waits for its write to be on disk
INTERRUPTED = {"code": "interrupted", "message": "Every attempt was interrupted.", "retryable": True}


class InDoubt(sqlite3.Error):
    """Nobody can tell whether the write is there: the commit failed half-way, or did not end in time."""


class Throttled(Exception):
    """Too many logins failed. `args[0]` is the number of seconds until the next login is looked at."""


class RunEnded(BaseException):  # like asyncio.CancelledError, so that no `except Exception` of a pipeline stops it
    """The run has to end: its document was deleted or taken over, or the grace of a shutdown is over."""


class User(NamedTuple):
    user_id: str
    username: str
    password_hash: str


class Session(NamedTuple):
    session_id: str
    user_id: str
    username: str
    expires_at: float
    refresh_jti: str  # of the current refresh token
    rotated_at: float  # when that token was issued
    previous_jti: str | None = None  # of the refresh token before it
    ended_by_reuse: bool = False  # of a refresh token that was replaced


class Document(NamedTuple):
    document_id: str
    owner_id: str
    filename: str
    media_type: str
    size: int
    sha256: str
    status: Status
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


COLUMNS = ", ".join(Document._fields)


def utc_now() -> str:
    """RFC 3339 with microseconds and Z; sorts by time as text."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")[:26] + "Z"


def first_row(make: Callable[..., T], rows: sqlite3.Cursor) -> T | None:
    """`make(*row)` of the first row; None when there is no row."""
    row = rows.fetchone()
    return make(*row) if row else None


class Write(Future[T]):
    """A call of a method marked with `write`, on its way to the disk. A coroutine awaits it. A thread takes its
    `result()`, which needs no event loop."""
    def __init__(self, operation: Callable[[], T]) -> None:
        super().__init__()
        self.operation = operation
        self.outcome: Any = None  # of the operation; it becomes the result once it is on disk
        self.ended = asyncio.Event()  # what coroutines wait for

    def __await__(self) -> Generator[Any, None, T]:
        return self._on_disk().__await__()

    async def _on_disk(self) -> T:
        """Raises InDoubt after WRITE_SECONDS; the write goes on then, as it does when the coroutine is cancelled."""
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await self.ended.wait()
        except TimeoutError:
            raise InDoubt("the write took too long") from None
        return self.result()


def write(method: Callable[Concatenate["Database", P], T]) -> Callable[Concatenate["Database", P], Write[T]]:
    """A call only submits the method: the committer runs its body, in a transaction, with the connection `_writer`."""
    @functools.wraps(method)
    def submit(self: "Database", /, *args: P.args, **kwargs: P.kwargs) -> Write[T]:
        new = Write(functools.partial(method, self, *args, **kwargs))
        self._submitted.put(new)
        return new
    return submit


class Database:
    def __init__(self, path: Path, sync: Callable[[], None], keys: Callable[[], Iterator[str]]) -> None:
        """Opens or creates the file. Each commit comes after a `sync` of the storage; `keys` lists the stored files.
        Raises ValueError when the database is not ours or was lost; sqlite3.Error; OSError."""
        self._sync, self._keys = sync, keys
        self.loop: asyncio.AbstractEventLoop | None = None  # of the coroutines that await writes
        self._submitted: SimpleQueue[Write[Any]] = SimpleQueue()
        self._lock_path = path.with_name(path.name + ".lock")
        with self.lock():
            is_new = self._is_new(path)
            path.touch(0o600)  # SQLite gives its other files the same mode
            self._writer, self._reader = (
                sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False) for _ in range(2))
            self._writer.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
                                       " PRAGMA foreign_keys = ON; PRAGMA temp_store = MEMORY;")
            if is_new:
                self._writer.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        threading.Thread(target=self._commit_forever, name="committer", daemon=True).start()

    def _is_new(self, path: Path) -> bool:
        """Whether the tables are still to be made. Raises ValueError when the database is not ours, or was lost."""
        version, tables = 0, set[str]()
        if path.exists() and path.stat().st_size:
            with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema")}
        if tables and not (version == SCHEMA_VERSION and "sessions" in tables):
            raise ValueError(f"{path} belongs to another program or to another version of this one")
        if not tables and next(self._keys(), None):
            raise ValueError(f"there are stored files, but {path} is missing or has no tables: was it lost?")
        return not tables

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lets one thread of one process in at a time. SQLite's own lock is not enough: those that wait for it poll,
        and before version 3.51.3 two processes that checkpoint at the same moment can damage the database."""
        with open(self._lock_path, "ab", buffering=0, opener=functools.partial(os.open, mode=0o600)) as lock_file:
            fcntl.flock(lock_file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(lock_file, fcntl.LOCK_UN)  # closing is not enough: a forked child may have it open too

    def close(self) -> None:
        """Closes the connections, under the lock, when all writes have ended, unless those take over a second."""
        with contextlib.suppress(TimeoutError):
            self.check_writable().exception(timeout=1)  # this write ends after those that were submitted before it
            with self.lock():  # since closing a connection checkpoints too
                self._reader.close()
                self._writer.close()

    # The committer

    def _commit_forever(self) -> None:
        batch: list[Write[Any]] = []
        while True:
            batch = self._next_batch(len(batch))
            self._commit(batch)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                if self.loop:  # one call for the batch, as one for each write would slow down small uploads
                    self.loop.call_soon_threadsafe(self._wake, batch)

    def _next_batch(self, last_size: int) -> list[Write[Any]]:
        """Waits for a write. Then up to 50 ms until the batch is as large as the last, as clients that were answered
        together write together again. It gives up when none has come for 15 ms."""
        batch = [self._submitted.get()]
        deadline = time.monotonic() + 0.05
        with contextlib.suppress(queue.Empty):
            while True:
                may_wait = len(batch) < last_size and time.monotonic() < deadline
                batch.append(self._submitted.get(may_wait, timeout=0.015))
        return batch

    @staticmethod
    def _wake(batch: list[Write[Any]]) -> None:
        """Lets the coroutines that wait for these writes go on. It runs in their event loop."""
        for pending in batch:
            pending.ended.set()

    def _commit(self, batch: list[Write[Any]]) -> None:
        """Makes the files durable, then the rows, all in one transaction. When the COMMIT itself fails, the rows may be
        stored or not: InDoubt. (Only if the disk was full, they are certainly not stored.)"""
        in_doubt = False
        try:
            self._sync()  # not retried: after a failed fsync, a second one may succeed though a name is lost
            with self.lock(), self._writer:  # `with self._writer` rolls back after an exception
                self._writer.execute("BEGIN IMMEDIATE")
                for pending in batch:
                    self._apply(pending)
                in_doubt = True
                self._writer.execute("COMMIT")
        except BaseException as error:
            if in_doubt and getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_FULL:
                error = InDoubt(str(error))
            for pending in batch:
                if not pending.done():
                    pending.set_exception(error)
        else:
            for pending in batch:
                if not pending.done():
                    pending.set_result(pending.outcome)

    def _apply(self, pending: Write[Any]) -> None:
        """Runs the operation of one write. If it fails, it is undone alone, and the others of its batch go on."""
        self._writer.execute("SAVEPOINT operation")
        try:
            pending.outcome = pending.operation()
        except BaseException as error:
            if not self._writer.in_transaction:  # SQLite has rolled back the whole batch, as when the disk is full
                raise
            self._writer.execute("ROLLBACK TO operation")
            pending.set_exception(error)
        self._writer.execute("RELEASE operation")  # also after ROLLBACK TO, which keeps the savepoint

    @write
    def check_writable(self) -> None:
        """Writes a row without changing it. Raises sqlite3.Error when nothing can be written now."""
        self._writer.execute("UPDATE users SET username = username WHERE rowid = (SELECT min(rowid) FROM users)")

    # Users and sessions

    def user(self, username: str) -> User | None:
        return first_row(User, self._reader.execute(
            "SELECT user_id, username, password_hash FROM users WHERE username = ?", (username,)))

    def session_user(self, session_id: str, user_id: str) -> User | None:
        """None unless that user has this session and it has not ended."""
        return first_row(User, self._reader.execute(
            "SELECT user_id, username, password_hash FROM sessions JOIN users USING (user_id)"
            " WHERE session_id = ? AND user_id = ? AND expires_at > ?", (session_id, user_id, time.time())))

    def has_users(self) -> bool:
        return self._reader.execute("SELECT 1 FROM users LIMIT 1").fetchone() is not None

    @write
    def add_first_user(self, username: str, password_hash: str) -> bool:
        """Whether it was added: only where there is no user at all."""
        return self._writer.execute(
            "INSERT INTO users SELECT ?, ?, ?, 0 WHERE NOT EXISTS (SELECT 1 FROM users)",
            (str(uuid.uuid4()), username, password_hash)).rowcount == 1

    @write
    def set_user(self, username: str, password_hash: str) -> None:
        """Adds the user, or sets a new password and ends that user's sessions."""
        (user_id,) = self._writer.execute(
            "INSERT INTO users VALUES (?, ?, ?, 0)"
            " ON CONFLICT (username) DO UPDATE SET password_hash = excluded.password_hash RETURNING user_id",
            (str(uuid.uuid4()), username, password_hash)).fetchone()
        self._writer.execute("DELETE FROM sessions WHERE user_id = ?", (user_id,))

    @write
    def remove_user(self, username: str) -> bool:
        """Removes the user with sessions and documents, whose files the trigger lists. False: there is no such user."""
        return self._writer.execute("DELETE FROM users WHERE username = ?", (username,)).rowcount == 1

    def check_throttle(self, name_hash: str, throttle_key: str, connection: sqlite3.Connection | None = None) -> None:
        """Raises Throttled when too many logins with this name from this address have failed."""
        now = time.time()
        failures = (connection or self._reader).execute(
            "SELECT failed_at FROM login_failures WHERE name_hash = ? AND client = ? AND failed_at BETWEEN ? AND ?"
            " ORDER BY failed_at DESC LIMIT ?",
            (name_hash, throttle_key, now - FAILURE_WINDOW, now, FAILURE_LIMIT)).fetchall()
        if len(failures) == FAILURE_LIMIT:
            raise Throttled(failures[-1][0] + FAILURE_WINDOW - now)

    @write
    def record_login(self, user: User | None, name_hash: str, throttle_key: str) -> Session | None:
        """Opens a session for a user whose password was right; None if it was changed meanwhile. `user=None` records a
        failed login. Raises Throttled, as parallel guesses may have passed `check_throttle` together."""
        self.check_throttle(name_hash, throttle_key, self._writer)
        now = time.time()
        if user is None:
            self._writer.execute(
                "DELETE FROM login_failures WHERE failed_at < ? OR failed_at > ?", (now - FAILURE_WINDOW, now))
            self._writer.execute("INSERT INTO login_failures VALUES (?, ?, ?)", (name_hash, throttle_key, now))
            return None
        new = Session(str(uuid.uuid4()), user.user_id, user.username, now + SESSION_SECONDS, str(uuid.uuid4()), now)
        opened = self._writer.execute(
            "INSERT INTO sessions (session_id, user_id, refresh_jti, rotated_at, expires_at)"
            " SELECT ?, user_id, ?, ?, ? FROM users WHERE user_id = ? AND password_hash = ?",
            (new.session_id, new.refresh_jti, now, new.expires_at, user.user_id, user.password_hash)).rowcount
        self._writer.execute("DELETE FROM login_failures WHERE name_hash = ? AND client = ?", (name_hash, throttle_key))
        self._writer.execute(
            "DELETE FROM sessions WHERE rowid IN (SELECT rowid FROM sessions WHERE user_id = ?"
            " ORDER BY rowid DESC LIMIT -1 OFFSET ?)", (user.user_id, MAX_SESSIONS))
        return new if opened else None

    @write
    def rotate(self, session_id: str, user_id: str, used_jti: str) -> Session | None:
        """Exchanges the refresh token with this `jti`, or ends its session. None when the session had ended before."""
        session = first_row(Session, self._writer.execute(
            "SELECT session_id, user_id, username, expires_at, refresh_jti, rotated_at, previous_jti"
            " FROM sessions JOIN users USING (user_id) WHERE session_id = ? AND user_id = ?", (session_id, user_id)))
        if session is None:
            return None
        if used_jti == session.refresh_jti:  # the current token: it gets a successor
            new = session._replace(refresh_jti=str(uuid.uuid4()), rotated_at=time.time())
            self._writer.execute(
                "UPDATE sessions SET refresh_jti = ?, rotated_at = ?, previous_jti = ? WHERE session_id = ?",
                (new.refresh_jti, new.rotated_at, used_jti, session_id))
            return new
        if used_jti == session.previous_jti and abs(time.time() - session.rotated_at) < REFRESH_GRACE:
            return session  # used again by another tab, or after a lost answer: it gets the same successor
        self._writer.execute("DELETE FROM sessions WHERE session_id = ?", (session_id,))  # it may be stolen
        return session._replace(ended_by_reuse=True)

    @write
    def end_session(self, session_id: str, user_id: str) -> str | None:
        """The name of the user whose session has ended now; None when there was no such session."""
        return first_row(str, self._writer.execute(
            "DELETE FROM sessions WHERE session_id = ? AND user_id = ? RETURNING"
            " (SELECT username FROM users WHERE users.user_id = sessions.user_id)", (session_id, user_id)))

    # Documents

    @write
    def add_document(self, new: Document) -> Document:
        """Adds the document, whose file is published. The result is this document; or the one that the owner uploaded
        under the same Idempotency-Key before, and then the new file is listed for removal."""
        known = None if new.idempotency_key is None else self._find(
            self._writer, "owner_id = ? AND idempotency_key = ?", new.owner_id, new.idempotency_key)
        if known:
            self._writer.execute("INSERT INTO deleted_files VALUES (?)", (new.document_id,))
            return known
        self._writer.execute(f"INSERT INTO documents ({COLUMNS}) VALUES ({', '.join('?' * len(new))})", new)
        return new

    def _find(self, connection: sqlite3.Connection, where: str, *values: Any) -> Document | None:
        return first_row(Document, connection.execute(f"SELECT {COLUMNS} FROM documents WHERE {where}", values))

    def document(self, document_id: str, owner_id: str) -> Document | None:
        return self._find(self._reader, "document_id = ? AND owner_id = ?", document_id, owner_id)

    def documents(self, owner_id: str, limit: int, status: Status | None, position: Sequence[str]) -> list[Document]:
        """A page, newest first, of what sorts below `position`, a created_at and a document_id: an index seek."""
        where, values = "owner_id = ? AND (created_at, document_id) < (?, ?)", [owner_id, *position]
        if status:
            where += " AND status = ?"
            values.append(status)
        return [Document(*row) for row in self._reader.execute(
            f"SELECT {COLUMNS} FROM documents WHERE {where} ORDER BY created_at DESC, document_id DESC LIMIT ?",
            (*values, limit))]

    def compare_files(self) -> tuple[list[str], list[str]]:
        """Keys of files without a document, and ids of documents without a file, but for what changes just now."""
        def ids(table: str) -> set[str]:
            return {document_id for (document_id,) in self._reader.execute(f"SELECT document_id FROM {table}")}

        before, keys = ids("documents"), set(self._keys())
        time.sleep(1)  # in which the rows of files that were just published are written
        after = ids("documents")
        strays = keys - before - after - ids("deleted_files")
        return sorted(strays & set(self._keys())), sorted((before & after) - keys)

    @write
    def delete(self, document_id: str, owner_id: str) -> bool:
        """Whether there was such a document. The trigger `document_deleted` lists its file in `deleted_files`."""
        return self._writer.execute(
            "DELETE FROM documents WHERE document_id = ? AND owner_id = ?", (document_id, owner_id)).rowcount == 1

    def deleted_files(self) -> list[str]:
        """Some ids whose files are to go, at random, so that a file that can't be removed holds up no others."""
        return [document_id for (document_id,) in self._reader.execute(
            "SELECT document_id FROM deleted_files ORDER BY random() LIMIT 1000")]

    @write
    def forget_file(self, document_id: str) -> None:
        self._writer.execute("DELETE FROM deleted_files WHERE document_id = ?", (document_id,))

    def result(self, document_id: str) -> str | None:
        """The document's state and what the pipeline returned, as a JSON object; None unless it is COMPLETED."""
        return first_row(str, self._reader.execute(  # the result is text here: SQLite's json() nests less than Python's
            "SELECT rtrim(json_object('document_id', document_id, 'status', status, 'completed_at', finished_at), '}')"
            " || ',\"result\":' || result || '}' FROM results JOIN documents USING (document_id)"
            " WHERE document_id = ?", (document_id,)))

    # The queue: PROCESSING without a run_id waits for a worker

    @write
    def enqueue(self, document_id: str, owner_id: str, request_id: str, max_queue: int) -> Document | None:
        """Lets an UPLOADED or FAILED document wait for a run. Returns the document, which is unchanged when `max_queue`
        documents of the owner wait already; None when there is no such document."""
        now = utc_now()
        queued = first_row(Document, self._writer.execute(
            "UPDATE documents SET status = 'PROCESSING', request_id = ?, queued_at = ?, updated_at = ?,"
            " attempts = 0, progress = 0, message = 'waiting for a worker', started_at = NULL, finished_at = NULL,"
            " error = NULL WHERE document_id = ? AND owner_id = ? AND status IN ('UPLOADED', 'FAILED')"
            f" AND (SELECT count(*) FROM documents WHERE {WAITING} AND owner_id = ?) < ? RETURNING {COLUMNS}",
            (request_id, now, now, document_id, owner_id, owner_id, max_queue)))
        return queued or self._find(self._writer, "document_id = ? AND owner_id = ?", document_id, owner_id)

    @write
    def claim(self, run_id: str) -> Document | None:
        """Gives this run the oldest waiting document of the owner whose last claim is the oldest; None when none waits.
        (CROSS JOIN fixes the order of the tables, so that their indexes do the sorting.)"""
        now = utc_now()
        claimed = first_row(Document, self._writer.execute(
            "UPDATE documents SET run_id = ?, beat_at = ?, attempts = attempts + 1, progress = 0, message = 'started',"
            " started_at = ?, updated_at = ? WHERE document_id = (SELECT document_id FROM users CROSS JOIN documents"
            f" ON owner_id = user_id WHERE {WAITING} ORDER BY last_claim, users.rowid, queued_at LIMIT 1)"
            f" RETURNING {COLUMNS}", (run_id, time.time(), now, now)))
        if claimed:
            self._writer.execute(
                "UPDATE users SET last_claim = (SELECT 1 + max(last_claim) FROM users) WHERE user_id = ?",
                (claimed.owner_id,))
        return claimed

    @write
    def record_progress(self, run_id: str, document_id: str, percent: int, message: str) -> None:
        message = message.encode(errors="replace").decode()  # a lone surrogate fits no database
        self._update_run(run_id, document_id, "progress = ?, message = ?", percent, message)

    @write
    def complete(self, run_id: str, document_id: str, result: str) -> None:
        self._update_run(
            run_id, document_id, "status = 'COMPLETED', run_id = NULL, progress = 100, message = 'completed',"
            " finished_at = ?", utc_now())
        self._writer.execute("INSERT INTO results VALUES (?, ?)", (document_id, result))

    @write
    def fail(self, run_id: str, document_id: str, code: str, message: str, retryable: bool) -> None:
        message = message.encode(errors="replace").decode()
        error = json.dumps({"code": code, "message": message, "retryable": retryable})
        self._update_run(
            run_id, document_id, "status = 'FAILED', run_id = NULL, message = ?, error = ?, finished_at = ?",
            message, error, utc_now())

    def _update_run(self, run_id: str, document_id: str, assignments: str, *values: Any) -> None:
        """Raises RunEnded, and writes nothing, unless the document still belongs to this run."""
        if not self._writer.execute(
                f"UPDATE documents SET {assignments}, updated_at = ? WHERE document_id = ? AND run_id = ?",
                (*values, utc_now(), document_id, run_id)).rowcount:
            raise RunEnded

    @write
    def renew_and_take_over(self, run_ids: Sequence[str], lease: float, max_attempts: int) -> list[Document]:
        """Renews the leases of these runs. Ends runs whose last sign of life is further than a lease away, also in the
        future (the clock was set back). Returns their documents: waiting again or, after the last attempt, FAILED."""
        expired = f"{RUNNING} AND beat_at NOT BETWEEN :now - :lease AND :now + :lease"
        values = {"now": time.time(), "stamp": utc_now(), "lease": lease, "max_attempts": max_attempts,
                  "run_ids": json.dumps(run_ids), "message": INTERRUPTED["message"], "error": json.dumps(INTERRUPTED)}
        self._writer.execute(
            f"UPDATE documents SET beat_at = :now WHERE {RUNNING}"
            " AND run_id IN (SELECT value FROM json_each(:run_ids))", values)
        failed = self._writer.execute(
            "UPDATE documents SET status = 'FAILED', run_id = NULL, message = :message, error = :error,"
            f" finished_at = :stamp, updated_at = :stamp WHERE {expired} AND attempts >= :max_attempts"
            f" RETURNING {COLUMNS}", values).fetchall()
        requeued = self._writer.execute(
            "UPDATE documents SET run_id = NULL, progress = 0, started_at = NULL, message = 'waiting for a worker',"
            f" updated_at = :stamp WHERE {expired} AND attempts < :max_attempts RETURNING {COLUMNS}", values).fetchall()
        # After a clock was set back, stamps of the future would let their documents wait behind all others.
        self._writer.execute(f"UPDATE documents SET queued_at = :stamp WHERE {WAITING} AND queued_at > :stamp", values)
        return [Document(*row) for row in failed + requeued]

    def is_waiting(self) -> bool:
        return self._reader.execute(f"SELECT 1 FROM documents WHERE {WAITING} LIMIT 1").fetchone() is not None
