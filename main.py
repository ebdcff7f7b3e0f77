"""Document Lifecycle API: takes PDF and DOCX files, stores them, processes them in the background, serves the result.

    POST   /auth/login               user name and password for an access and a refresh token
    POST   /auth/refresh             a refresh token for a new pair; each works once
    POST   /auth/logout              ends the session
    POST   /documents/upload         one multipart part `file`
    GET    /documents                the caller's, newest first
    GET    /documents/{id}           one of them
    GET    /documents/{id}/file      the stored bytes
    DELETE /documents/{id}
    POST   /documents/{id}/process   starts one run, however often it is called
    GET    /documents/{id}/status    ?wait=S answers when processing ends
    GET    /documents/{id}/result
    GET    /healthz, /readyz

This is the only module that knows HTTP, the environment and the log. It is written in the order of a request's way.
"""
import argparse
import asyncio
import base64
import contextlib
import copy
import errno
import functools
import gc
import getpass
import hashlib
import itertools
import json
import logging
import math
import os
import random
import re
import secrets
import select
import signal
import socket
import sqlite3
import struct
import sys
import threading
import time
import traceback
import unicodedata
import uuid
import zipfile
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from datetime import datetime, timezone
from http import HTTPStatus
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Annotated, Any, BinaryIO, ClassVar, Literal, NoReturn, TypeVar, cast
from urllib.parse import parse_qsl, quote, urlencode
from xml.parsers import expat

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import OAuth2PasswordBearer
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route, request_response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import auth
from db import (Database, Document, OwnerGone, QueueFull, Refused, RunLost, Status, UnusableDatabase, User, batches,
                utc_now, utc_text)
from storage import LocalStorage, Storage, Writer, fsync_folder

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Settings


class UnusableSetting(Exception):
    """A setting has a bad value; the text names it and says what it wants, never the value."""


class Settings(BaseModel, frozen=True):
    """Each is read from the environment as `DOCS_` and its name in capitals."""

    data_dir: Path = Path("data")
    jwt_secret: Annotated[str | None, Field(repr=False)] = None
    admin_username: Annotated[str, Field(min_length=1, max_length=128)] = "admin"
    admin_password: Annotated[str | None, Field(min_length=1, max_length=1024, repr=False)] = None
    access_token_seconds: Annotated[int, Field(ge=1, le=10**9)] = 900
    refresh_token_seconds: Annotated[int, Field(ge=1, le=10**9)] = 604800
    max_upload_bytes: Annotated[int, Field(ge=1, le=2**40)] = 52428800
    upload_idle_seconds: Annotated[float, Field(gt=0, le=3600)] = 30
    process_workers: Annotated[int, Field(ge=1, le=256)] = 4
    process_seconds: Annotated[float, Field(ge=0, le=10**6)] = 2
    lease_seconds: Annotated[float, Field(ge=0.5, le=3600)] = 15
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    max_queue: Annotated[int, Field(ge=1, le=10**6)] = 10000
    shutdown_seconds: Annotated[float, Field(ge=0, le=3600)] = 10
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        names = {f"DOCS_{field.upper()}": field for field in cls.model_fields}
        try:
            settings = cls.model_validate({field: environment[name] for name, field in names.items()
                                           if name in environment})
        except ValidationError as error:
            raise UnusableSetting("; ".join(
                f"DOCS_{str(problem['loc'][0]).upper()}: {problem['msg']}" for problem in error.errors())) from None
        if environment.get("DOCS_DATA_DIR") == "":
            raise UnusableSetting("DOCS_DATA_DIR: should be a folder")
        return settings


# Logging

log = logging.getLogger("documents")
request_id_of_context: ContextVar[str | None] = ContextVar("request_id", default=None)


def log_event(event: str, level: int = logging.INFO, *, failure: BaseException | None = None, **fields: Any) -> None:
    log.log(level, event, exc_info=failure, extra={"fields": fields})


LINE_LIMIT = 4096  # what a Linux pipe takes whole (PIPE_BUF, pipe(7))
to_json = json.JSONEncoder(default=str).encode


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII, shorter than LINE_LIMIT: of texts that are too long it keeps the end."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "timestamp": utc_text(datetime.fromtimestamp(record.created, timezone.utc)),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage(),
        }
        if request_id := request_id_of_context.get():
            entry["request_id"] = request_id
        entry.update(getattr(record, "fields", {}))
        if record.exc_info and (failure := record.exc_info[1]):
            # An exception's text can hold what a client sent; its type and stack can't. Nor do these two quote values.
            entry["exception"] = type(failure).__name__
            if isinstance(failure, (OSError, sqlite3.Error)):
                entry["exception"] += f": {failure}"
            entry["stack"] = "".join(traceback.format_tb(failure.__traceback__))
        line, longest = to_json(entry), LINE_LIMIT
        while len(line) >= LINE_LIMIT and longest > 1:
            longest //= 2
            line = to_json({
                key: "..." + value[-longest:] if isinstance(value, str) and len(value) > longest else value
                for key, value in entry.items()})
        return line


class StdoutHandler(logging.Handler):
    """Writes each line with one call, so those of several workers never mix, and drops lines while nobody reads, so
    a stuck log reader can't stop the service. The next line that gets through counts the lost ones."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stdout is None:  # closed before the start
            return
        if self._lost:
            record.fields = {**getattr(record, "fields", {}), "lines_lost_before": self._lost}
        try:
            line = self.format(record).encode() + b"\n"
            output = sys.stdout.fileno()
            writable = os.name != "posix" or select.select([], [output], [], 0 if self._lost else 1)[1]
            if writable and os.write(output, line) == len(line):
                self._lost = 0
                return
        except (OSError, ValueError):
            pass  # nowhere left to say it
        self._lost += 1


def set_log_level(level: str) -> None:
    logging.getLogger().setLevel(level)
    for handler in logging.getLogger().handlers:  # uvicorn's loggers have a level of their own
        if isinstance(handler, StdoutHandler):
            handler.setLevel(level)


def configure_logging() -> None:
    """Takes over uvicorn's loggers, which have handlers of their own and don't propagate. Done when the app is made,
    not when it starts, since uvicorn logs before that; a root logger that is configured already is left alone."""
    logging.basicConfig(handlers=[StdoutHandler()], level=logging.INFO)
    # What no line tells isn't looked up for each of them (Logging HOWTO, Optimization).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.getLogger("uvicorn").handlers.clear()
    logging.getLogger("uvicorn").propagate = True
    access = logging.getLogger("uvicorn.access")  # the `request` event says it better, and without the query
    access.handlers.clear()
    access.propagate = False


# Models: what is sent and received


class Credentials(BaseModel):
    username: str = Field(min_length=1, max_length=128)
    password: str = Field(min_length=1, max_length=1024, json_schema_extra={"format": "password"})
    grant_type: Literal["password"] = "password"


class RefreshToken(BaseModel):
    refresh_token: str = Field(min_length=1, max_length=8192)
    grant_type: Literal["refresh_token"] = "refresh_token"


Timestamp = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class Answer(BaseModel):
    """What a route answers; EXAMPLE is the one in the OpenAPI document."""

    model_config = ConfigDict(from_attributes=True, json_schema_serialization_defaults_required=True)
    EXAMPLE: ClassVar[dict[str, Any]]


class Tokens(Answer):
    access_token: str
    token_type: Literal["bearer"] = "bearer"
    expires_in: int = Field(description="seconds")
    refresh_token: str
    refresh_expires_in: int = Field(description="seconds")
    EXAMPLE = {"access_token": "eyJhbGciOiJIUzI1NiIsInR5cCI6ImF0K2p3dCJ9.e30.c2ln", "token_type": "bearer",
               "expires_in": 900, "refresh_token": "eyJhbGciOiJIUzI1NiIsInR5cCI6InJ0K2p3dCJ9.e30.c2ln",
               "refresh_expires_in": 604800}


class DocumentOut(Answer):
    document_id: uuid.UUID
    filename: str
    media_type: str
    size: int = Field(description="bytes")
    sha256: str
    status: Status
    created_at: Timestamp
    updated_at: Timestamp
    EXAMPLE = {"document_id": "5b0c1e3a-0b57-4a39-9d53-5a1d6f3f8a11", "filename": "report.pdf",
               "media_type": "application/pdf", "size": 80100, "status": "UPLOADED",
               "sha256": "69f6b7f493b1bc55d518942976cbeadc4ec0a36f6d8a6dc24feffc516d35b2c9",
               "created_at": "2026-01-31T12:00:00.000000Z", "updated_at": "2026-01-31T12:00:00.000000Z"}


class ProcessingError(BaseModel):
    code: str
    message: str
    retryable: bool


class StatusOut(Answer):
    document_id: uuid.UUID
    status: Status
    progress: int = Field(ge=0, le=100)
    message: str
    attempts: int
    request_id: str | None = Field(description="of the request that started the run")
    created_at: Timestamp
    updated_at: Timestamp
    started_at: Timestamp | None
    finished_at: Timestamp | None
    error: ProcessingError | None = Field(description="only when FAILED")
    EXAMPLE = {"document_id": "5b0c1e3a-0b57-4a39-9d53-5a1d6f3f8a11", "status": "PROCESSING", "progress": 50,
               "message": "classifying", "attempts": 1, "request_id": "8f14e45f",
               "created_at": "2026-01-31T12:00:00.000000Z", "updated_at": "2026-01-31T12:00:01.000000Z",
               "started_at": "2026-01-31T12:00:01.000000Z", "finished_at": None, "error": None}


class ResultOut(Answer):
    document_id: uuid.UUID
    status: Status
    completed_at: Timestamp
    result: Any
    EXAMPLE = {"document_id": "5b0c1e3a-0b57-4a39-9d53-5a1d6f3f8a11", "status": "COMPLETED",
               "completed_at": "2026-01-31T12:00:03.000000Z", "result": {"summary": "A simulated summary."}}


class Health(Answer):
    status: Literal["ok"] = "ok"
    EXAMPLE = {"status": "ok"}


class ProblemOut(BaseModel):
    """RFC 9457. `code` is stable, for programs; `detail` is for people."""

    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[dict[str, Any]] | None = Field(None, description="of a 422: loc and msg of each, never the input")
    error: Any = Field(None, description="OAuth 2 error code of a failed login; why processing failed")
    error_description: str | None = None


# Errors: every one that a client can see


PROBLEMS: dict[str, tuple[int, str]] = {
    "malformed_body": (400, "The multipart body is malformed."),
    "missing_token": (401, "Send an access token in the Authorization header: Bearer <token>."),
    "invalid_token": (401, "The access token is invalid, has expired, or its session has ended."),
    "invalid_grant": (401, "Wrong user name or password, or a refresh token that is not good (any more)."),
    "not_found": (404, "There is nothing here for you."),
    "file_missing": (404, "The stored file of this document is gone."),
    "method_not_allowed": (405, "This path does not take this method."),
    "upload_timeout": (408, "The client was silent for too long."),
    "not_processed": (409, "Processing has not been started."),
    "still_processing": (409, "Processing has not ended yet."),
    "processing_failed": (409, "Processing has failed."),
    "too_large": (413, "The body is too large."),
    "unsupported_media_type": (415, "This is not a media type that is taken here."),
    "validation_error": (422, "The request has parameters or fields that can't be used: see errors."),
    "idempotency_key_reused": (422, "This Idempotency-Key was used for another file."),
    "too_many_attempts": (429, "Too many failed logins. Try again later."),
    "queue_full": (429, "Too many documents wait for processing. Try again later."),
    "internal_error": (500, "Something went wrong here. The log knows more, under this request_id."),
    "unavailable": (503, "The database or the file store can't be used right now. Try again later."),
    "shutting_down": (503, "The server is shutting down. Try again."),
    "insufficient_storage": (507, "There is no space left to store this."),
}
CODE_OF_STATUS = {status: code for code, (status, _) in reversed(PROBLEMS.items())}
BEARER = {"WWW-Authenticate": "Bearer"}
BAD_BEARER = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
SOON = {"Retry-After": "1"}


class Problem(Exception):
    """An answer that is an error: a code of PROBLEMS, with headers and members of its own."""

    def __init__(self, code: str, detail: str | None = None, headers: Mapping[str, str] | None = None,
                 **members: Any) -> None:
        super().__init__(code)
        self.code, self.detail, self.headers, self.members = code, detail, headers, members


def problem_response(problem: Problem) -> Response:
    status, detail = PROBLEMS[problem.code]
    content = {
        "title": HTTPStatus(status).phrase, "status": status, "detail": problem.detail or detail,
        "code": problem.code, "request_id": request_id_of_context.get(), **problem.members}
    return Response(json.dumps(content), status, problem.headers, "application/problem+json")


def invalid(msg: str, *loc: str | int) -> Problem:
    return Problem("validation_error", errors=[{"loc": loc, "msg": msg}])


def loc_and_msg(failure: RequestValidationError | ValidationError) -> list[dict[str, Any]]:
    return [{"loc": error["loc"], "msg": error["msg"]} for error in failure.errors()]


def problem_of(request: Request, failure: Exception) -> Problem:
    """The table from exceptions, ours and those of the libraries, to answers."""
    match failure:
        case Problem():
            return failure
        case RequestValidationError():
            return Problem("validation_error", errors=loc_and_msg(failure))
        case HTTPException(status_code=405):
            methods = {method for route in router.routes if isinstance(route, Route)
                       and route.path_regex.match(request.scope["path"]) for method in route.methods or ()}
            return Problem("method_not_allowed", headers={"Allow": ", ".join(sorted(methods or {"GET", "HEAD"}))})
        case HTTPException():
            return Problem(CODE_OF_STATUS.get(failure.status_code, "internal_error"), headers=failure.headers)
        case OSError() | sqlite3.Error():
            full = (failure.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if isinstance(failure, OSError)
                    else getattr(failure, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL)
            log_event("storage_error", logging.ERROR, failure=failure)
            return Problem("insufficient_storage") if full else Problem("unavailable", headers=SOON)
    raise failure


async def answer_problem(request: Request, failure: Exception) -> Response:
    return problem_response(problem_of(request, failure))


EXAMPLE_MEMBERS: dict[str, dict[str, Any]] = {
    "invalid_grant": {"error": "invalid_grant", "error_description": PROBLEMS["invalid_grant"][1]},
    "validation_error": {"errors": [{"loc": ["query", "limit"], "msg": "Input should be less than or equal to 200"}]},
    "idempotency_key_reused": {"errors": [
        {"loc": ["header", "Idempotency-Key"], "msg": "It was used for another file."}]},
    "processing_failed": {"error": {
        "code": "damaged_document", "message": "The PDF has no end-of-file marker.", "retryable": False}},
}


def answers(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route for the OpenAPI document."""
    documented: dict[int | str, dict[str, Any]] = {}
    for code in (*codes, "internal_error", "unavailable", "shutting_down"):
        status, detail = PROBLEMS[code]
        answer = documented.setdefault(status, {
            "description": HTTPStatus(status).phrase,
            "content": {"application/problem+json": {
                "schema": {"$ref": "#/components/schemas/ProblemOut"}, "examples": {}}}})
        answer["content"]["application/problem+json"]["examples"][code] = {"value": {
            "title": HTTPStatus(status).phrase, "status": status, "detail": detail, "code": code,
            "request_id": "8f14e45f", **EXAMPLE_MEMBERS.get(code, {})}}
    return documented


REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestMiddleware:
    """What holds for every request: its id, its line in the log, nosniff, and the last-resort 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, short_startup_failure(send))
        start, status = time.perf_counter(), 0
        request = Request(scope)
        request_id = request.headers.get("x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = str(uuid.UUID(int=random.getrandbits(128), version=4))  # without a system call
        request_id_of_context.set(request_id)

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] != "http.response.start":
                return await send(message)
            status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode()),
                                  (b"x-content-type-options", b"nosniff")]
            try:
                await send(message)
            except Exception as failure:  # what came was no HTTP any more, and uvicorn has given up the connection
                log_event("connection_given_up", logging.DEBUG, failure=failure)
                while (await receive())["type"] != "http.disconnect":
                    pass
                raise ClientDisconnect from failure

        try:
            await self.app(scope, receive, send_with_headers)
        except ClientDisconnect:
            status = 499  # nobody is left to answer; what nginx logs
        except asyncio.CancelledError:  # uvicorn, when the grace of a shutdown is over
            if status:
                raise
            closing = Problem("shutting_down", headers={**SOON, "Connection": "close"})
            await problem_response(closing)(scope, receive, send_with_headers)
        except Exception as failure:
            log_event("unhandled_error", logging.ERROR, failure=failure)
            if status:
                raise
            await problem_response(Problem("internal_error"))(scope, receive, send_with_headers)
        finally:
            log_event("request", method=request.method, path=scope["path"], status=status,
                      duration_ms=round(1000 * (time.perf_counter() - start), 3), client=client_address(request),
                      user=scope.get("state", {}).get("username"))


def short_startup_failure(send: Send) -> Send:
    """Starlette tells the server the whole traceback of what stopped the start; its last line is for people."""
    async def send_short(message: Message) -> None:
        if message["type"] == "lifespan.startup.failed":
            message["message"] = message["message"].strip().rpartition("\n")[2]
        await send(message)
    return send_short


def client_address(request: Request) -> str:
    """uvicorn believes the X-Forwarded-For of its own machine, unless FORWARDED_ALLOW_IPS says whom to trust. Without
    that no made-up address may dodge the throttle or lock another address out: it counts as this machine's."""
    host = request.client.host if request.client else "unknown"
    server, _ = request.scope.get("server") or ("", None)
    forwarded = ",".join(request.headers.getlist("x-forwarded-for"))
    made_up = host in forwarded and server in ("127.0.0.1", "::1") and "FORWARDED_ALLOW_IPS" not in os.environ
    return server if made_up else host


# Dependencies


T = TypeVar("T")
WRITE_SECONDS = 10.0


class Service:
    """What the routes work with; made by the lifespan, found in `request.state.service`."""

    def __init__(self, settings: Settings, storage: Storage | None, pipeline: "Pipeline | None") -> None:
        """Whatever it raises stops the start."""
        self.settings = settings
        folder = settings.data_dir
        prepare_folder(folder)
        secret = settings.jwt_secret or secret_file(folder / "jwt-secret")
        try:
            self.signer = auth.TokenSigner(secret.encode(errors="surrogateescape"))
        except ValueError as error:
            raise UnusableSetting(f"DOCS_JWT_SECRET: {error}, also in {folder / 'jwt-secret'}") from None
        self.storage = storage or LocalStorage(folder / "files")
        database = folder / "documents.db"
        if not (database.exists() and database.stat().st_size) and next(self.storage.keys(-math.inf), None):
            raise UnusableDatabase("there are stored files but no database: was documents.db lost?")
        self.db = Database(database)
        self.passwords = ThreadPoolExecutor(2, "password")  # so that scrypt takes its memory twice at most
        self.files = ThreadPoolExecutor(8, "file")  # enough for parallel fsyncs, too few to fight over the GIL
        self.intake = Intake(self.db, self.storage)
        self.worker = Worker(self.db, self.storage, pipeline or functools.partial(
            simulated_pipeline, seconds=settings.process_seconds), settings)
        self.watch = Watch(self.db)
        self.held, self.held_lock = 0, threading.Lock()  # bytes of all uploads, see HELD_BY_ALL
        self.exit_by: float | None = None  # monotonic
        self._ready_until = 0.0
        if not self.db.has_users():
            self._add_first_user()

    def _add_first_user(self) -> None:
        name, file = self.settings.admin_username, self.settings.data_dir / "initial-password"
        password = self.settings.admin_password or secret_file(file)
        if self.db.add_first_user(name, auth.hash_password(password)).result():
            where = "DOCS_ADMIN_PASSWORD" if self.settings.admin_password else str(file)
            log_event("first_user_added", user=name, password_is_in=where)

    async def check_writable(self) -> None:
        """OSError or sqlite3.Error when documents can't be taken. That they can is believed for a second."""
        if time.monotonic() > self._ready_until:
            await run_in_threadpool(self.storage.check)
            await written(self.db.check())
            self._ready_until = time.monotonic() + 1

    def begin_exit(self) -> None:
        """On the signal: no new runs, no more long polls; what runs has its grace from now on."""
        if self.exit_by is None:
            self.exit_by = time.monotonic() + self.settings.shutdown_seconds
            self.worker.stop_claiming()
            self.watch.close()

    def close(self) -> None:
        """After `begin_exit`."""
        self.worker.stop(self.exit_by or 0.0)
        self.intake.close()
        for pool in (self.passwords, self.files):
            pool.shutdown(wait=False, cancel_futures=True)
        self.db.close()


def prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not any(folder.iterdir()):  # else it may be somebody's home, or /tmp
            with contextlib.suppress(PermissionError):  # a mounted volume of another owner
                folder.chmod(0o700)
        fsync_folder(folder.parent)
    except OSError as error:
        raise UnusableSetting(f"DOCS_DATA_DIR: should be a folder that can be used ({error.strerror})") from error


def secret_file(path: Path) -> str:
    """The secret in this file; made first when there is none. Of several processes at once, one makes it."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(FileExistsError):
        if not path.exists():
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(32))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(draft, path)
            finally:
                draft.unlink()
            fsync_folder(path.parent)
    return path.read_text().strip()


async def written(future: Future[T]) -> T:
    """What a write to the database returned. TimeoutError, an OSError, when another process does not let go of it."""
    async with asyncio.timeout(WRITE_SECONDS):
        return await asyncio.wrap_future(future)


def remove_file(storage: Storage, key: str) -> None:
    """Of a document that is gone or never was. What can't be removed now will be with a sweep."""
    try:
        storage.delete(key)
    except OSError as failure:
        log_event("storage_error", logging.ERROR, failure=failure)


def service_of(request: Request) -> Service:
    service: Service = request.state.service
    return service


class SessionBearer(OAuth2PasswordBearer):
    """The user of the access token: its signature is checked first, then that its session still stands."""

    async def __call__(self, request: Request) -> User:  # type: ignore[override]
        token = await super().__call__(request)
        if token is None:
            raise Problem("missing_token", headers=BEARER)
        if len(request.headers.getlist("authorization")) > 1:
            raise Problem("invalid_token", "Send one Authorization header.", headers=BAD_BEARER)
        service = service_of(request)
        try:
            claims = service.signer.verify(auth.ACCESS, token)
        except auth.InvalidToken:
            raise Problem("invalid_token", headers=BAD_BEARER) from None
        user = service.db.session_user(claims.session_id)
        if user is None:
            raise Problem("invalid_token", headers=BAD_BEARER)
        request.state.username = user.username
        return user


signed_in = SessionBearer("auth/login", refreshUrl="auth/refresh", auto_error=False)
CurrentUser = Annotated[User, Depends(signed_in)]


async def get_document(document_id: uuid.UUID, request: Request, user: CurrentUser) -> Document:
    """The caller's document. Somebody else's is as unknown as one that never was."""
    return found(service_of(request).db.document(str(document_id), user.user_id))


def found(document: Document | None) -> Document:
    if document is None:
        raise Problem("not_found")
    return document


OwnDocument = Annotated[Document, Depends(get_document)]


# Bodies


async def body_chunks(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body as it comes. Problem: too_large, before the first byte when the length is declared; upload_timeout."""
    if int(request.headers.get("content-length", 0)) > limit:
        raise Problem("too_large")
    size, more, idle_seconds = 0, True, service_of(request).settings.upload_idle_seconds
    while more:
        try:
            async with asyncio.timeout(idle_seconds):
                message = await request.receive()
        except TimeoutError:
            raise Problem("upload_timeout", headers={"Connection": "close"}) from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        more, chunk = message.get("more_body", False), message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise Problem("too_large")
        del message
        yield chunk
        del chunk  # a thousand that wait for the next one would hold a lot


Model = TypeVar("Model", bound=BaseModel)


async def read_fields(request: Request, model: type[Model]) -> Model:
    """A small body, JSON or an HTML form, as this model; Problem when it does not fit."""
    media_type, _ = parse_options_header(request.headers.get("content-type"))
    if media_type not in (b"application/json", b"application/x-www-form-urlencoded"):
        raise Problem("unsupported_media_type", "Send application/json or application/x-www-form-urlencoded.")
    body = b"".join([chunk async for chunk in body_chunks(request, SMALL_BODY)])
    try:
        if media_type == b"application/json":
            return model.model_validate_json(body)
        pairs = parse_qsl(body.decode(), keep_blank_values=True, errors="strict")
        for name in model.model_fields:
            if sum(name == sent for sent, _ in pairs) > 1:  # RFC 6749, 3.2
                raise invalid("The field is there twice.", name)
        return model.model_validate(dict(pairs))
    except ValidationError as failure:
        raise Problem("validation_error", errors=loc_and_msg(failure)) from None
    except ValueError:
        raise invalid("The form can't be read.", "body") from None


SMALL_BODY = 65536  # bytes: also what a multipart body may have around its file
HELD_BY_ALL, HELD_BY_ONE = 12 * 2**20, 2**20  # bytes of their files that uploads hold before they write them
PIECE = 256  # bytes that a piece counts for at least: a tiny one is a Python object too
SMALL_FILE = 2**18  # bytes, up to which the intake thread writes the whole file
AT_ONCE, SIDE_BY_SIDE = 64, 4  # uploads of a batch, which are open together; threads that wait for the disk for it
FRESH_SECONDS = 120.0  # after that no row is added for a file: a process that was stopped may have lost it to a sweep
PDF = "application/pdf"
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
MEDIA_TYPES = {".pdf": PDF, ".docx": DOCX}


class Upload:
    """The one file of a multipart body on its way into the storage: parsed and checked as it comes, held in memory,
    hashed and written when that has become much, has waited long, or is all.

    `feed` and `end` run on the event loop, the others in a thread once there is something to write, one at a time: a
    `discard` waits for a `finish` that goes on although its request was cancelled. What was not finished leaves no
    trace behind `discard`.
    """

    def __init__(self, request: Request, owner_id: str, idempotency_key: str | None) -> None:
        service = self._service = service_of(request)
        media_type, options = parse_options_header(request.headers.get("content-type"))
        if media_type != b"multipart/form-data":
            raise Problem("unsupported_media_type", "Send multipart/form-data with a part named file.")
        self.filename = self.media_type = ""
        self.size, self.max_size = 0, service.settings.max_upload_bytes
        self.sha256 = hashlib.sha256()
        self.document_id, self._owner_id, self._idempotency_key = str(uuid.uuid4()), owner_id, idempotency_key
        self.committing_since = math.inf  # monotonic
        self._writer: Writer | None = None
        self._one_at_a_time, self._discarded = threading.RLock(), False
        self.in_threads = False  # from the first time on that one is to work on it
        self.finished_at = math.inf  # monotonic
        self._head = b""
        self._start_is_right = False  # that the content begins as its type does
        self._pending, self._held, self._flushed = list[bytes](), 0, time.monotonic()
        self._parts, self._in_file, self._ended = 0, False, False
        # The sweep takes a file for abandoned that was not written for ten idle times.
        self._idle_seconds, self._last_piece = service.settings.upload_idle_seconds, time.monotonic()
        self._header, self._value, self._disposition = b"", b"", b""
        try:
            if not options.get(b"boundary"):
                raise FormParserError("no boundary")
            self._parser = MultipartParser(options[b"boundary"], {
                "on_part_begin": self._on_part_begin, "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value, "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished, "on_part_data": self._on_part_data,
                "on_end": self._on_end}, max_header_size=SMALL_BODY)
        except FormParserError:
            raise Problem("malformed_body", "The Content-Type has no usable boundary.") from None

    def feed(self, chunk: bytes) -> bool:
        """Takes a piece of the body; whether it is time for a `flush`."""
        try:
            self._parser.write(chunk)
        except FormParserError:
            raise Problem("malformed_body") from None
        if (now := time.monotonic()) > self._last_piece + 5 * self._idle_seconds:  # other parts, without an end
            raise Problem("upload_timeout", headers={"Connection": "close"})
        if self.size > self.max_size:
            raise Problem("too_large", f"The file is larger than {self.max_size} bytes.")
        self._check_start(complete=False)
        waiting = self._start_is_right and bool(self._pending) and not self._ended
        due = waiting and (self._held > HELD_BY_ONE or self._service.held > HELD_BY_ALL
                           or now > self._flushed + self._idle_seconds)
        self.in_threads |= due
        return due

    def _hold(self, size: int) -> None:
        with self._service.held_lock:
            self._held += size
            self._service.held += size

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > 16:
            raise Problem("malformed_body", "More than 16 parts.")
        self._in_file, self._header, self._disposition = False, b"", b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if options.get(b"name") != b"file":
            return
        if self.filename:
            raise invalid("There are two parts named file.", "body", "file")
        self._in_file = True
        self.filename = shown_filename(options.get(b"filename", b"").decode(errors="replace"))
        if not self.filename:
            raise invalid("The part named file has no filename.", "body", "file")
        extension = os.path.splitext(self.filename)[1].lower()
        if extension not in MEDIA_TYPES:
            raise Problem("unsupported_media_type", "The filename has to end in .pdf or .docx.")
        self.media_type = MEDIA_TYPES[extension]

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            piece = data[start:end]
            self.size += len(piece)
            self._hold(max(len(piece), PIECE))
            self._pending.append(piece)
            self._last_piece = time.monotonic()
            if not self._start_is_right:
                self._head = (self._head + piece)[:1024]

    def _on_end(self) -> None:
        self._ended = True

    def _check_start(self, complete: bool) -> None:
        if not self._head:
            return
        if self.media_type == PDF:
            self._start_is_right, decided = b"%PDF-" in self._head, len(self._head) == 1024
        else:
            self._start_is_right, decided = self._head.startswith(b"PK\x03\x04"), len(self._head) >= 8
        if decided and self._head.startswith(OLE_MAGIC):
            raise Problem("unsupported_media_type", "This Office file is encrypted (or of the old .doc format).")
        if (decided or complete) and not self._start_is_right:
            raise Problem("unsupported_media_type", "The content is not what the extension says.")
        if self._start_is_right:
            self._head = b""

    def end(self) -> None:
        """Problem unless the body had one good file, as far as can be told without a look into a DOCX."""
        if not self._ended:
            raise Problem("malformed_body", "The multipart body is not closed.")
        if not self.filename:
            raise invalid("There is no part named file.", "body", "file")
        if not self.size:
            raise invalid("The file is empty.", "body", "file")
        self._check_start(complete=True)
        self.in_threads = True

    @property
    def takes_long(self) -> bool:
        """Whether `finish` may take so long that the others of a batch should not wait for it."""
        return self.size > 2 * HELD_BY_ONE or self.media_type == DOCX

    def flush(self) -> None:
        with self._one_at_a_time:
            if self._discarded:
                raise ClientDisconnect
            if self._writer is None:
                self._writer = self._service.storage.create(self.document_id)
            for piece in self._pending:
                self.sha256.update(piece)
                self._writer.write(piece)
            self._pending.clear()
            self._hold(-self._held)
            self._flushed = time.monotonic()

    def flush_small(self) -> None:
        """Of a larger file hashing and writing are long enough to be done side by side: by `finish`."""
        if self.size <= SMALL_FILE:
            self.flush()

    def finish(self) -> None:
        """After the return the next `Storage.sync` makes the file durable. Problem: it is no DOCX."""
        with self._one_at_a_time:
            try:
                self.flush()
                assert self._writer is not None
                self._writer.commit()
            finally:
                self.discard()
            self._writer = None
        if self.media_type == DOCX:
            try:
                with self._service.storage.open(self.document_id) as file:
                    check_is_docx(file)
            except BaseException:
                self._service.storage.delete(self.document_id)
                raise
        self.finished_at = time.monotonic()

    @property
    def finished(self) -> bool:
        return self.finished_at < math.inf

    def discard(self) -> None:
        with self._one_at_a_time:
            self._discarded = True
            self._pending.clear()
            self._hold(-self._held)
            if self._writer is not None:
                self._writer.__exit__(None, None, None)

    def row(self) -> Document:
        now = utc_now()
        return Document(
            self.document_id, self._owner_id, self.filename, self.media_type, self.size, self.sha256.hexdigest(),
            Status.UPLOADED, now, now, idempotency_key=self._idempotency_key)


Waiting = tuple[Upload, "asyncio.Future[Document]"]


class Intake:
    """Makes uploads durable, together those that wait together: one sync of the storage, one transaction and one word
    to the event loop for all of them. One thread does it, since threads that each do a little cost more in passing on
    Python's lock than they save; a few help it where Python's lock is free for long: to wait for the disk, and to write
    larger files. What `takes_long` the file pool has finished before."""

    def __init__(self, db: Database, storage: Storage) -> None:
        self._db, self._storage = db, storage
        self._helpers = ThreadPoolExecutor(SIDE_BY_SIDE - 1, "intake")  # its own: no large file is before a small one
        self._waiting: SimpleQueue[Waiting | None] = SimpleQueue()  # None: the last one
        threading.Thread(target=self._run, name="intake", daemon=True).start()

    async def store(self, upload: Upload) -> Document:
        """What `Database.add_documents` says of it, once that and its file would survive a power loss. Any other
        exception: as in `written` when it is of the commit, else of the storage, and there is no file any more."""
        stored: asyncio.Future[Document] = asyncio.get_running_loop().create_future()
        self._waiting.put((upload, stored))
        try:
            while not stored.done() and (
                    left := WRITE_SECONDS - max(0.0, time.monotonic() - upload.committing_since)) > 0:
                await asyncio.wait([stored], timeout=left)
            if not stored.done():
                raise TimeoutError
            return stored.result()
        finally:
            stored.cancel()  # withdrawn, unless its transaction has begun

    def close(self) -> None:
        self._waiting.put(None)
        self._helpers.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        for batch in batches(self._waiting, AT_ONCE):
            for upload, stored in batch:
                if stored.cancelled() and upload.finished:
                    remove_file(self._storage, upload.document_id)
            if wanted := [waiting for waiting in batch if not waiting[1].cancelled()]:
                self._store(wanted)

    def _store(self, batch: list[Waiting]) -> None:
        """Each exception is raised again by the future, where the request waits."""
        try:
            going_on = self._each(Upload.flush_small, [waiting for waiting in batch if not waiting[0].finished])
            others = [self._helpers.submit(self._each, Upload.finish, going_on[start::SIDE_BY_SIDE])
                      for start in range(1, min(SIDE_BY_SIDE, len(going_on)))]
            self._each(Upload.finish, going_on[::SIDE_BY_SIDE])
            for other in others:
                other.result()
            finished = [waiting for waiting in batch if waiting[0].finished]
            if not finished:
                return
            self._storage.sync()
            for upload, _ in finished:
                upload.committing_since = time.monotonic()
            rows = self._db.add_documents(lambda: [
                None if stored.cancelled() or time.monotonic() > upload.finished_at + FRESH_SECONDS else upload.row()
                for upload, stored in finished])
        except BaseException as failure:
            for upload, _ in batch:
                remove_file(self._storage, upload.document_id)
            self._tell(batch, failure)
        else:  # meanwhile this thread goes on to the next files
            rows.add_done_callback(lambda done: self._tell(finished, done.exception() or done.result()))

    def _each(self, step: Callable[[Upload], None], batch: list[Waiting]) -> list[Waiting]:
        """Those of the batch that took this step. Who waits for the others has been told, or has given up."""
        return [waiting for waiting in batch if self._take(step, *waiting)]

    def _take(self, step: Callable[[Upload], None], upload: Upload, stored: "asyncio.Future[Document]") -> bool:
        try:
            if not stored.cancelled():
                step(upload)
                return True
        except BaseException as failure:
            self._tell([(upload, stored)], failure)
        return False

    @staticmethod
    def _tell(batch: Sequence[Waiting], outcome: BaseException | Sequence[Document | BaseException | None]) -> None:
        def settle() -> None:
            outcomes = itertools.repeat(outcome) if isinstance(outcome, BaseException) else outcome
            for (_, future), each in zip(batch, outcomes):
                if future.done() or each is None:  # nobody waits any more
                    continue
                if isinstance(each, BaseException):  # a copy, since a raise adds to the traceback
                    future.set_exception(copy.copy(each).with_traceback(each.__traceback__))
                else:
                    future.set_result(each)

        with contextlib.suppress(RuntimeError):  # the event loop has ended
            batch[0][1].get_loop().call_soon_threadsafe(settle)


def shown_filename(name: str) -> str:
    """For show only: no folders, no control or direction-changing characters, NFC, at most 255 bytes."""
    name = re.split(r"[/\\]", name)[-1]
    name = re.sub("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]", "", name)
    name = unicodedata.normalize("NFC", name).strip()
    stem, dot, extension = name.rpartition(".")
    if not dot or len(extension) > 16:
        return name.encode()[:255].decode(errors="ignore")
    stem = stem.encode()[:255 - len((dot + extension).encode())].decode(errors="ignore")
    return (stem or "document") + dot + extension


# Formats

OLE_MAGIC = bytes.fromhex("d0cf11e0a1b11ae1")
PACKAGE = "http://schemas.openxmlformats.org/package/2006/content-types"
MAX_ENTRIES = 10_000
MAX_DIRECTORY = 2 * 2**20  # bytes, for 10,000 entries; also of [Content_Types].xml
MAX_UNPACKED = 512 * 2**20  # bytes of a whole document


class UnreadableDocument(Exception):
    """The text says why, for people."""


class BoundedReads:
    """A file for `zipfile`, which else takes a directory of whatever size the file claims into memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.tell, self.seekable = file, file.tell, file.seekable

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError, OverflowError) as error:
            raise zipfile.BadZipFile("seek outside of the file") from error

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(MAX_DIRECTORY + 1 if size < 0 else min(size, MAX_DIRECTORY + 1))
        if len(data) > MAX_DIRECTORY:
            raise zipfile.BadZipFile("more than a DOCX needs at once")
        return data


@contextlib.contextmanager
def open_docx(file: BinaryIO) -> Iterator[zipfile.ZipFile]:
    """The ZIP archive; UnreadableDocument for whatever is wrong with it, also inside of the `with` block."""
    try:
        with zipfile.ZipFile(cast(BinaryIO, BoundedReads(file))) as archive:
            if len(archive.infolist()) > MAX_ENTRIES:
                raise UnreadableDocument(f"The ZIP archive has more than {MAX_ENTRIES} entries.")
            if sum(entry.compress_size for entry in archive.infolist()) > file.seek(0, os.SEEK_END):
                raise UnreadableDocument("The entries of the ZIP archive overlap.")
            if any(entry.flag_bits & 1 for entry in archive.infolist()):
                raise UnreadableDocument("The ZIP archive is encrypted.")
            if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                   for entry in archive.infolist()):  # zipfile unpacks the other methods without a bound
                raise UnreadableDocument("The ZIP archive uses a compression that a DOCX can't have.")
            yield archive
    except (zipfile.BadZipFile, zlib.error, expat.ExpatError, EOFError, ValueError, OverflowError, LookupError,
            struct.error, RuntimeError) as error:  # all that zipfile and expat are known to raise on hostile input
        raise UnreadableDocument("The content is not a readable DOCX (ZIP) file.") from error


def check_is_docx(file: BinaryIO) -> None:
    """Problem unless it is a ZIP whose [Content_Types].xml declares a WordprocessingML main part (ECMA-376-2)."""
    try:
        with open_docx(file) as archive:
            found = [entry for entry in archive.infolist() if entry.filename.lower() == "[content_types].xml"]
            if len(found) != 1:
                raise UnreadableDocument("A DOCX has one [Content_Types].xml.")
            with archive.open(found[0]) as entry:
                xml = entry.read(MAX_DIRECTORY + 1)
            if len(xml) > MAX_DIRECTORY:
                raise UnreadableDocument("[Content_Types].xml is too large.")
            declared = content_types(xml)
    except UnreadableDocument as error:
        raise Problem("unsupported_media_type", str(error)) from None
    if f"{DOCX}.main+xml" not in declared:
        raise Problem("unsupported_media_type", "This Office file is not a Word document (DOCX).")
    if any("vbaproject" in declaration for declaration in declared):
        raise Problem("unsupported_media_type", "Documents with macros are not accepted.")


def content_types(xml: bytes) -> set[str]:
    declared = set()

    def on_element(name: str, attributes: dict[str, str]) -> None:
        if name in (f"{PACKAGE} Default", f"{PACKAGE} Override"):
            declared.add(attributes.get("ContentType", "").partition(";")[0].strip().lower())

    def on_doctype(*_: object) -> NoReturn:  # OPC forbids DTDs; without one there are no entities to expand
        raise UnreadableDocument("[Content_Types].xml has a DTD.")

    def on_declaration(_: str, encoding: str | None, __: int) -> None:
        if (encoding or "UTF-8").upper() not in ("UTF-8", "UTF-16"):  # else expat asks Python's codecs
            raise UnreadableDocument("[Content_Types].xml is neither in UTF-8 nor in UTF-16.")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.XmlDeclHandler = on_declaration
    parser.StartElementHandler = on_element
    parser.StartDoctypeDeclHandler = on_doctype
    parser.Parse(xml, True)
    return declared


def check_is_whole(file: BinaryIO, media_type: str) -> None:
    """UnreadableDocument when a PDF has no end-of-file marker, or an entry of a DOCX fails its checksum."""
    if media_type == PDF:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))
        if b"%%EOF" not in file.read():
            raise UnreadableDocument("The PDF has no end-of-file marker.")
        return
    unpacked = 0
    with open_docx(file) as archive:
        for info in archive.infolist():
            with archive.open(info) as entry:  # checks the CRC when it comes to the end
                while data := entry.read(65536):
                    unpacked += len(data)
                    if unpacked > MAX_UNPACKED:
                        raise UnreadableDocument(f"The DOCX unpacks to more than {MAX_UNPACKED} bytes.")


# Processing

Progress = Callable[[int, str], None]
Pipeline = Callable[[BinaryIO, Document, Progress], Any]


class ProcessingFailed(Exception):
    """What a pipeline raises to say what went wrong and whether trying again can help."""

    def __init__(self, code: str, message: str, retryable: bool) -> None:
        super().__init__(code)
        self.code, self.message, self.retryable = code, message, retryable


def simulated_pipeline(file: BinaryIO, document: Document, progress: Progress, *, seconds: float) -> Any:
    """Stands where OCR and a language model will: checks that the file is whole, takes its time, makes up a result.

    A pipeline gets the open file, the document, and `progress(percent, message)`, to be called between its steps: it
    raises RunLost when the run has to end. It returns what JSON can hold; whatever it raises makes FAILED.
    """
    try:
        check_is_whole(file, document.media_type)
    except UnreadableDocument as error:
        raise ProcessingFailed("damaged_document", str(error), retryable=False) from error
    steps = ("extracting text", "recognizing layout", "classifying", "summarizing")
    for number, step in enumerate(steps):
        progress(100 * number // len(steps), step)
        time.sleep(seconds / len(steps))
    return {
        "document_type": "PDF" if document.media_type == PDF else "Word",
        "summary": f"A simulated summary of {document.filename}.",
        "keywords": ["simulated", "document", "lifecycle"],
        "source": {"size": document.size, "sha256": document.sha256},
    }


class Worker:
    """Runs queued documents in a thread pool, and keeps the leases of those runs from one more thread.

    The queue is the database's, shared by all processes. `wake` only says that something waits; the keeper looks
    by itself too, so nothing depends on the process that queued it.
    """

    def __init__(self, db: Database, storage: Storage, pipeline: Pipeline, settings: Settings) -> None:
        self._db, self._storage, self._pipeline, self._settings = db, storage, pipeline, settings
        self._pool = ThreadPoolExecutor(settings.process_workers, "worker")
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._changed = threading.Condition()  # guards what follows
        self._run_ids: set[str] = set()
        self._unstarted = 0  # claimers in the pool that have not looked yet
        self._stopping = False
        self._stopped = threading.Event()

    def start(self) -> None:
        self._keeper.start()

    def wake(self) -> None:
        """Something waits. A claimer that has not looked yet will see it, so one a thread is enough."""
        with self._changed:
            if self._unstarted < self._settings.process_workers and not self._stopping:
                self._pool.submit(self._claim_all)
                self._unstarted += 1

    def stop_claiming(self) -> None:
        with self._changed:
            self._stopping = True

    def stop(self, deadline: float) -> None:
        """Lets running jobs finish until `deadline` (monotonic), then hands them back."""
        self.stop_claiming()
        with self._changed:
            self._changed.wait_for(lambda: not self._run_ids, max(0.0, deadline - time.monotonic()))
            run_ids = list(self._run_ids)
        try:
            for document in self._db.hand_back(run_ids).result():
                self._log("process_requeued", document, attempt=document.attempts + 1)
        except sqlite3.Error as failure:  # their leases will run out
            log_event("storage_error", logging.ERROR, failure=failure)
        self._stopped.set()
        self._keeper.join()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _claim_all(self) -> None:
        with self._changed:
            self._unstarted -= 1
        while self._claim_one():
            pass

    def _claim_one(self) -> bool:
        run_id = uuid.uuid4().hex
        with self._changed:
            if self._stopping:
                return False
            self._run_ids.add(run_id)  # before the claim, so that `stop` misses none
        try:
            document = self._db.claim(run_id).result()
            if document is None:
                return False
            request_id_of_context.set(document.request_id)
            self._run(run_id, document)
        except (sqlite3.Error, OSError) as failure:  # what can't be written now is tried again after the lease
            log_event("storage_error", logging.ERROR, failure=failure)
            return False
        finally:
            request_id_of_context.set(None)
            with self._changed:
                self._run_ids.discard(run_id)
                self._changed.notify_all()
        return True

    def _run(self, run_id: str, document: Document) -> None:
        document_id, start = document.document_id, time.monotonic()
        self._log("process_started", document)
        try:
            try:
                result = self._call_pipeline(run_id, document)
            except ProcessingFailed as failure:
                self._db.fail(run_id, document_id, failure.code, failure.message, failure.retryable).result()
                self._log("process_failed", document, start, failure=failure.__cause__, error=failure.code)
            else:
                self._db.complete(run_id, document_id, result).result()
                self._log("process_completed", document, start)
        except RunLost:  # deleted, taken over or handed back: whoever did that has logged it
            pass

    def _call_pipeline(self, run_id: str, document: Document) -> str:
        """The result as JSON, or ProcessingFailed; RunLost."""
        def progress(percent: int, message: str) -> None:
            if self._stopped.is_set():
                raise RunLost
            try:
                self._db.progress(run_id, document.document_id, max(0, min(int(percent), 99)), message).result()
            except sqlite3.Error as failure:  # no fault of the pipeline, and no harm
                log_event("storage_error", logging.ERROR, failure=failure)

        try:
            file = self._storage.open(document.document_id)
        except FileNotFoundError as failure:
            raise ProcessingFailed("file_missing", "The stored file is gone.", retryable=False) from failure
        except OSError as failure:
            raise ProcessingFailed("file_unreadable", "The stored file can't be read.", retryable=True) from failure
        try:
            with file:
                result = json.dumps(self._pipeline(file, document, progress), allow_nan=False, ensure_ascii=False)
            result.encode()  # no lone surrogates
            return result
        except (RunLost, ProcessingFailed):
            raise
        except BaseException as failure:  # the pipeline's: even its sys.exit makes FAILED
            reason = f"The pipeline raised {type(failure).__name__}."
            raise ProcessingFailed("pipeline_error", reason, retryable=True) from failure

    def _keep(self) -> None:
        interval = min(1.0, self._settings.lease_seconds / 4)
        while not self._stopped.wait(interval):
            with self._changed:
                run_ids = list(self._run_ids)
            try:
                ended, waiting = self._db.keep_leases(
                    run_ids, self._settings.lease_seconds, self._settings.max_attempts).result()
            except (sqlite3.Error, OSError) as failure:
                log_event("storage_error", logging.ERROR, failure=failure)
                continue
            for document in ended:
                if document.status == Status.FAILED:
                    self._log("process_failed", document, error="interrupted")
                else:
                    self._log("process_requeued", document)
            for _ in range(min(waiting, self._settings.process_workers)):
                self.wake()

    @staticmethod
    def _log(event: str, document: Document, start: float | None = None, *, attempt: int | None = None,
             failure: BaseException | None = None, **fields: Any) -> None:
        if start is not None:
            fields["duration_ms"] = round(1000 * (time.monotonic() - start), 3)
        log_event(event, logging.INFO, failure=failure, request_id=document.request_id,
                  document_id=document.document_id, attempt=attempt or document.attempts, **fields)


class Watch:
    """Long polls wait here: one task looks whether anything was committed, by whatever process, and wakes them."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._somebody = asyncio.Event()
        self.closing = False

    @contextlib.contextmanager
    def of(self, document_id: str) -> Iterator[asyncio.Event]:
        """An event that is set when the document is no longer PROCESSING, or the server shuts down."""
        event = asyncio.Event()
        self._waiting.setdefault(document_id, set()).add(event)
        self._somebody.set()
        if self.closing:
            event.set()
        try:
            yield event
        finally:
            self._waiting[document_id].discard(event)
            if not self._waiting[document_id]:
                del self._waiting[document_id]

    async def run(self) -> None:
        seen = -1
        while True:
            await self._somebody.wait()
            await asyncio.sleep(0.02)
            try:
                version = self._db.version()
                if version != seen:
                    self._wake(self._db.not_processing(list(self._waiting)))
                seen = version
            except sqlite3.Error as failure:
                log_event("storage_error", logging.ERROR, failure=failure)
            if not self._waiting:
                self._somebody.clear()

    def close(self) -> None:
        self.closing = True
        self._wake(list(self._waiting))

    def _wake(self, document_ids: list[str]) -> None:
        for document_id in document_ids:
            for event in self._waiting.get(document_id, ()):
                event.set()


# Routes

router = APIRouter()
SIGNED_IN = ("missing_token", "invalid_token")
SESSION_SECONDS = 30 * 86400


def form_or_json(model: type[BaseModel]) -> dict[str, Any]:
    """The request body of `read_fields` for the OpenAPI document."""
    content = {"schema": model.model_json_schema()}
    return {"requestBody": {"required": True, "content": {
        "application/x-www-form-urlencoded": content, "application/json": content}}}


def sign_tokens(service: Service, response: Response, user_id: str, session_id: str, jti: str,
                session_end: float) -> Tokens:
    """`session_end` and the ends of both tokens: seconds since the epoch."""
    now, settings = time.time(), service.settings
    access_end = min(now + settings.access_token_seconds, session_end)
    refresh_end = min(now + settings.refresh_token_seconds, session_end)
    response.headers["Cache-Control"] = "no-store"
    return Tokens(
        access_token=service.signer.issue(
            auth.ACCESS, auth.Claims(user_id, session_id, str(uuid.uuid4())), access_end),
        expires_in=round(access_end - now),
        refresh_token=service.signer.issue(auth.REFRESH, auth.Claims(user_id, session_id, jti), refresh_end),
        refresh_expires_in=round(refresh_end - now))


def invalid_grant(detail: str) -> Problem:
    """RFC 6749, 5.2, in the same words whatever was wrong."""
    return Problem("invalid_grant", detail, BEARER, error="invalid_grant", error_description=detail)


@router.post("/auth/login", tags=["auth"], response_model=Tokens, openapi_extra=form_or_json(Credentials),
             responses=answers("invalid_grant", "upload_timeout", "too_large", "unsupported_media_type",
                               "validation_error", "too_many_attempts", "insufficient_storage"))
async def login(request: Request, response: Response) -> Tokens:
    """Exchanges user name and password for an access and a refresh token (OAuth 2 password grant)."""
    service = service_of(request)
    credentials = await read_fields(request, Credentials)
    db, name, client = service.db, credentials.username, client_address(request)
    wait = db.throttled_for(name, client)
    if not wait:
        user = db.user(name)
        correct = await asyncio.get_running_loop().run_in_executor(
            service.passwords, auth.verify_password, credentials.password, user.password_hash if user else None)
        if user and correct:
            session_id, jti, end = str(uuid.uuid4()), str(uuid.uuid4()), time.time() + SESSION_SECONDS
            outcome = await written(db.login_succeeded(user, client, session_id, jti, end))
            if outcome == 0:
                request.state.username = name
                log_event("login_succeeded", user=name, client=client)
                return sign_tokens(service, response, user.user_id, session_id, jti, end)
            wait = outcome or 0.0
        else:
            wait = await written(db.login_failed(name, client))
    log_event("login_throttled" if wait else "login_failed", logging.WARNING, user=name, client=client)
    if wait:
        raise Problem("too_many_attempts", headers={"Retry-After": str(math.ceil(wait))})
    raise invalid_grant("Wrong user name or password.")


@router.post("/auth/refresh", tags=["auth"], response_model=Tokens, openapi_extra=form_or_json(RefreshToken),
             responses=answers("invalid_grant", "upload_timeout", "too_large", "unsupported_media_type",
                               "validation_error", "insufficient_storage"))
async def refresh(request: Request, response: Response) -> Tokens:
    """Exchanges a refresh token for two new tokens. Using one twice ends the session (RFC 9700, 4.14.2)."""
    service, sent = service_of(request), await read_fields(request, RefreshToken)
    refused = invalid_grant("The refresh token is invalid, expired, revoked or was used before.")
    try:
        claims = service.signer.verify(auth.REFRESH, sent.refresh_token)
    except auth.InvalidToken:
        raise refused from None
    jti = str(uuid.uuid4())
    end, username = await written(service.db.rotate(claims.session_id, claims.jti, jti))
    if end is None:
        if username:
            log_event("token_reused", logging.WARNING, user=username, client=client_address(request))
        raise refused
    request.state.username = username
    return sign_tokens(service, response, claims.user_id, claims.session_id, jti, end)


@router.post("/auth/logout", tags=["auth"], status_code=204, response_class=Response,
             openapi_extra=form_or_json(RefreshToken), responses=answers(
                 "upload_timeout", "too_large", "unsupported_media_type", "validation_error", "insufficient_storage"))
async def logout(request: Request) -> None:
    """Ends the session: its access and refresh tokens stop working at once."""
    service, sent = service_of(request), await read_fields(request, RefreshToken)
    with contextlib.suppress(auth.InvalidToken):  # 204 all the same (RFC 7009, 2.2)
        claims = service.signer.verify(auth.REFRESH, sent.refresh_token, allow_expired=True)
        if username := await written(service.db.end_session(claims.session_id)):
            log_event("logged_out", user=username, client=client_address(request))


class RawRoute(APIRoute):
    """A route that FastAPI documents and Starlette serves: the function gets the request and makes the response.
    Dependencies to solve and a response to validate would take a tenth of the time of a small upload."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.app = request_response(self.endpoint)


IDEMPOTENCY_KEY = "[!-~]{1,128}"


async def upload(request: Request) -> Response:
    """Stores a PDF or DOCX. After the 201 it survives a crash or a power loss.

    With an `Idempotency-Key` a repeated upload answers the first document again.
    """
    user, service = await signed_in(request), service_of(request)
    idempotency_key = request.headers.get("idempotency-key")
    if idempotency_key is not None and not re.fullmatch(IDEMPOTENCY_KEY, idempotency_key):
        raise invalid("Use 1 to 128 visible ASCII characters.", "header", "Idempotency-Key")
    in_thread = functools.partial(asyncio.get_running_loop().run_in_executor, service.files)
    incoming = Upload(request, user.user_id, idempotency_key)
    try:
        async for chunk in body_chunks(request, service.settings.max_upload_bytes + SMALL_BODY):
            if incoming.feed(chunk):
                await in_thread(incoming.flush)
            del chunk
        incoming.end()
        if incoming.takes_long:
            await in_thread(incoming.finish)
        document = await service.intake.store(incoming)
    except Refused as refusal:
        await run_in_threadpool(remove_file, service.storage, incoming.document_id)
        if isinstance(refusal, OwnerGone):
            raise Problem("invalid_token", headers=BAD_BEARER) from None
        raise Problem("idempotency_key_reused", errors=[
            {"loc": ["header", "Idempotency-Key"], "msg": "It was used for another file."}]) from None
    except BaseException:
        # Nothing that is finished: a commit that failed may yet be found done after a crash. Else the sweep takes it.
        if incoming.in_threads:
            await in_thread(incoming.discard)
        else:  # nor does an answer wait for a disk that hangs
            incoming.discard()
        raise
    headers = {}
    if document.document_id == incoming.document_id:
        log_event("uploaded", document_id=document.document_id, size=document.size, media_type=document.media_type)
    else:
        await run_in_threadpool(remove_file, service.storage, incoming.document_id)
        headers["Idempotency-Replayed"] = "true"
    headers["Location"] = f"/documents/{document.document_id}"
    return Response(DocumentOut.model_validate(document).model_dump_json(), 201, headers, "application/json")


router.add_api_route(
    "/documents/upload", upload, methods=["POST"], tags=["documents"], status_code=201, response_model=DocumentOut,
    route_class_override=RawRoute, openapi_extra={
        "security": [{signed_in.scheme_name: []}],
        "parameters": [{"name": "Idempotency-Key", "in": "header", "required": False,
                        "schema": {"type": "string", "pattern": f"^{IDEMPOTENCY_KEY}$"}}],
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
            "type": "object", "required": ["file"],
            "properties": {"file": {"type": "string", "format": "binary", "description": "PDF or DOCX"}}}}}}},
    responses=answers(*SIGNED_IN, "malformed_body", "upload_timeout", "too_large", "unsupported_media_type",
                      "validation_error", "idempotency_key_reused", "insufficient_storage"))


@router.get("/documents", tags=["documents"], response_model=list[DocumentOut],
            responses=answers(*SIGNED_IN, "validation_error"))
async def list_documents(request: Request, response: Response, user: CurrentUser,
                         limit: Annotated[int, Query(ge=1, le=200)] = 50, status: Status | None = None,
                         cursor: Annotated[str | None, Query(max_length=256, description="of the Link header")] = None,
                         ) -> list[Document]:
    """The caller's documents, newest first. `Link: <...>; rel="next"` leads to the next page (RFC 8288)."""
    before = read_cursor(cursor) if cursor else None
    documents = service_of(request).db.documents(user.user_id, limit + 1, status, before)
    if len(documents) > limit:
        last = documents[limit - 1]
        following = base64.urlsafe_b64encode(f"{last.created_at} {last.document_id}".encode()).decode()
        query = {"limit": limit, **({"status": status.value} if status else {}), "cursor": following}
        response.headers["Link"] = f'</documents?{urlencode(query)}>; rel="next"'
    return documents[:limit]


def read_cursor(cursor: str) -> tuple[str, str]:
    try:
        created_at, document_id = base64.urlsafe_b64decode(cursor).decode().split(" ")
        datetime.fromisoformat(created_at)
        uuid.UUID(document_id)
        return created_at, document_id
    except ValueError:
        raise invalid("Use the cursor of a Link header, unchanged.", "query", "cursor") from None


@router.get("/documents/{document_id:uuid}", tags=["documents"], response_model=DocumentOut,
            responses=answers(*SIGNED_IN, "not_found"))
async def get_one(document: OwnDocument) -> Document:
    return document


@router.get("/documents/{document_id:uuid}/file", tags=["documents"], response_class=StreamingResponse, responses={
    200: {"description": "The stored bytes", "content": {
        PDF: {"schema": {"type": "string", "format": "binary"}, "example": "%PDF-1.7 ..."},
        DOCX: {"schema": {"type": "string", "format": "binary"}, "example": "PK..."}}},
    304: {"description": "Not Modified"}, **answers(*SIGNED_IN, "not_found", "file_missing")})
async def get_file(document: OwnDocument, request: Request,
                   if_none_match: Annotated[list[str] | None, Header(alias="If-None-Match")] = None) -> Response:
    """The stored bytes, with the SHA-256 as ETag."""
    etag, known = f'"{document.sha256}"', ",".join(if_none_match or ())
    if re.search(rf'(^|,)\s*(\*|(W/)?{etag})\s*(,|$)', known):
        return Response(status_code=304, headers={"ETag": etag})
    try:
        file = await run_in_threadpool(service_of(request).storage.open, document.document_id)
    except FileNotFoundError:
        raise Problem("file_missing") from None

    async def chunks() -> AsyncIterator[bytes]:
        with file:
            while data := await run_in_threadpool(file.read, 262144):
                yield data

    plain, quoted = re.sub(r'[^ -~]|["\\%]', "_", document.filename), quote(document.filename, safe="")
    return StreamingResponse(chunks(), headers={
        "Content-Type": document.media_type, "Content-Length": str(document.size), "ETag": etag,
        "Content-Disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quoted}"})


@router.delete("/documents/{document_id:uuid}", tags=["documents"], status_code=204, response_class=Response,
               responses=answers(*SIGNED_IN, "not_found", "insufficient_storage"))
async def delete(document_id: uuid.UUID, request: Request, user: CurrentUser) -> None:
    """Removes the document, also while it is being processed."""
    service = service_of(request)
    if not await written(service.db.delete(str(document_id), user.user_id)):
        raise Problem("not_found")
    log_event("deleted", document_id=str(document_id))
    await run_in_threadpool(remove_file, service.storage, str(document_id))


@router.post("/documents/{document_id:uuid}/process", tags=["processing"], status_code=202, response_model=StatusOut,
             responses={200: {"description": "COMPLETED already: the result stands", "model": StatusOut},
                        **answers(*SIGNED_IN, "not_found", "queue_full", "insufficient_storage")})
async def process(document_id: uuid.UUID, request: Request, response: Response,
                  user: CurrentUser) -> StatusOut:
    """Starts processing an UPLOADED or FAILED document. Idempotent: however many calls come, one run starts."""
    service = service_of(request)
    try:
        document = found(await written(service.db.enqueue(
            str(document_id), user.user_id, request_id_of_context.get() or "", service.settings.max_queue)))
    except QueueFull:
        raise Problem("queue_full", headers=SOON) from None
    if document.status == Status.COMPLETED:
        response.status_code = 200
    else:
        service.worker.wake()
        response.headers["Location"] = f"/documents/{document_id}/status"
        response.headers["Retry-After"] = "1"
    return status_of(document)


def status_of(document: Document) -> StatusOut:
    error = ProcessingError.model_validate_json(document.error) if document.error else None
    return StatusOut.model_validate({**vars(document), "error": error})


@router.get("/documents/{document_id:uuid}/status", tags=["processing"], response_model=StatusOut,
            responses=answers(*SIGNED_IN, "not_found", "validation_error"))
async def get_status(document: OwnDocument, request: Request, response: Response,
                     wait: Annotated[float, Query(ge=0, le=30, description="seconds")] = 0) -> StatusOut:
    """Where the document stands. With `wait` it answers as soon as PROCESSING ends, else after that time."""
    if wait and document.status == Status.PROCESSING:
        service = service_of(request)
        with service.watch.of(document.document_id) as ended, contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await ended.wait()
        document = found(service.db.document(document.document_id, document.owner_id))
    if document.status == Status.PROCESSING:
        response.headers["Retry-After"] = "1"
    return status_of(document)


@router.get("/documents/{document_id:uuid}/result", tags=["processing"], response_model=ResultOut,
            responses=answers(*SIGNED_IN, "not_found", "not_processed", "still_processing", "processing_failed"))
async def get_result(document: OwnDocument, request: Request) -> dict[str, Any]:
    """What the pipeline made of a COMPLETED document."""
    match document.status:
        case Status.UPLOADED:
            raise Problem("not_processed")
        case Status.PROCESSING:
            raise Problem("still_processing", headers=SOON)
        case Status.FAILED:
            raise Problem("processing_failed", error=json.loads(document.error or "null"))
    result = service_of(request).db.result(document.document_id)
    if result is None:  # deleted a moment ago
        raise Problem("not_found")
    return {"document_id": document.document_id, "status": document.status, "completed_at": document.finished_at,
            "result": json.loads(result)}


@router.get("/healthz", tags=["health"], response_model=Health, responses=answers())
async def healthz() -> Health:
    return Health()


@router.get("/readyz", tags=["health"], response_model=Health, responses=answers())
async def readyz(request: Request) -> Health:
    """Whether documents can be taken: writes to the database and to the file store, at most once a second."""
    try:
        await service_of(request).check_writable()
    except (OSError, sqlite3.Error) as failure:
        log_event("storage_error", logging.ERROR, failure=failure)
        raise Problem("unavailable", headers=SOON) from None
    return Health()


# The application

DESCRIPTION = """Takes PDF and DOCX files, stores them, processes them in the background and serves the result.

**Try it:** Authorize with user `admin` and the password in `data/initial-password`, upload a file, start `process`,
ask for `status?wait=10`, then for the `result`."""


class Api(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """FastAPI's, with our errors in place of its own, the examples, and no parameter that could be null."""
        document = super().openapi()
        schemas = document["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        schemas["ProblemOut"] = ProblemOut.model_json_schema()
        examples = {f"#/components/schemas/{model.__name__}": model.EXAMPLE for model in Answer.__subclasses__()}
        for operation in (operation for path in document["paths"].values() for operation in path.values()):
            if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                del operation["responses"]["422"]
            for answer in operation["responses"].values():
                if content := answer.get("content", {}).get("application/json"):
                    one = examples.get(content["schema"].get("$ref"))
                    content["example"] = one or [examples[content["schema"]["items"]["$ref"]]]
            for parameter in operation.get("parameters", ()):
                parameter["schema"].update(*parameter["schema"].pop("anyOf", ())[:1])
        return document


def create_app(settings: Settings | None = None, *, storage: Storage | None = None,
               pipeline: Pipeline | None = None) -> FastAPI:
    """The service. Settings are those of the environment at the start, storage is the local disk in the data
    directory, and the pipeline is the simulated one, unless given here."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        used = settings or Settings.from_environment(os.environ)
        set_log_level(used.log_level)
        raise_open_files_limit()
        service = Service(used, storage, pipeline)
        service.worker.start()
        tasks = [asyncio.create_task(service.watch.run()), asyncio.create_task(sweep(service))]
        if server := uvicorn_server():
            tasks.append(asyncio.create_task(set_no_delay(server)))
            gc.collect()
            gc.freeze()  # the process is ours: no collection has to look through the modules again
        with exit_signals(server, service):
            yield {"service": service}
            for task in tasks:
                task.cancel()
            service.begin_exit()
            await run_in_threadpool(service.close)

    configure_logging()
    application = Api(
        title="Document Lifecycle API", version="1.0.0", description=DESCRIPTION, lifespan=lifespan,
        redirect_slashes=False, redoc_url=None, telemetry={"tracing": False, "metrics": False, "logs": False},
        exception_handlers={
            kind: answer_problem for kind in (Problem, RequestValidationError, HTTPException, OSError, sqlite3.Error)})
    application.add_middleware(RequestMiddleware)
    application.router.routes[:0] = router.routes  # `include_router` would match each request twice
    return application


def uvicorn_server() -> uvicorn.Server | None:
    """The server that runs this app: its signal handler is one of its methods."""
    if threading.current_thread() is not threading.main_thread():
        return None
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return server if isinstance(server, uvicorn.Server) else None


@contextlib.contextmanager
def exit_signals(server: uvicorn.Server | None, service: Service) -> Iterator[None]:
    """uvicorn tells of a shutdown only once the last connection has ended, and waits for that without a limit. So
    hear its signals together with it, give its connections the grace that jobs have, and see to the end of the process
    when something holds it up after that: a pipeline that doesn't look up, or a disk that doesn't answer."""
    if server is None:
        yield
        return
    loop, grace, handlers = asyncio.get_running_loop(), service.settings.shutdown_seconds, dict[int, Any]()

    def on_signal(number: int, frame: FrameType | None) -> None:
        last_resort = threading.Timer(grace + 1.5, os._exit, [1])
        last_resort.daemon = True
        last_resort.start()
        loop.call_soon_threadsafe(service.begin_exit)
        handlers[number](number, frame)

    server.config.timeout_graceful_shutdown = min(
        server.config.timeout_graceful_shutdown or math.inf, grace)  # type: ignore[assignment]
    for each in (signal.SIGINT, signal.SIGTERM):
        handlers[each] = signal.signal(each, on_signal)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


async def set_no_delay(server: uvicorn.Server) -> None:
    """The sockets that uvicorn opens for several workers lack TCP_NODELAY (its issue 3149), so that many an answer
    would wait 40 ms for an acknowledgement. On Linux connections inherit it."""
    while not server.started:
        await asyncio.sleep(0.05)
    for listener in server.servers:
        for sock in listener.sockets:
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def sweep(service: Service) -> None:
    """Removes files without a document, of uploads and deletes that were cut short: at the start, again when those are
    old enough that were too young then, and every hour. An upload writes or ends within the idle time; ten of them,
    or five minutes, are more than its last fsync and commit can take."""
    age = max(300.0, 10 * service.settings.upload_idle_seconds)
    for pause in itertools.chain((0.0, age), itertools.repeat(3600.0)):
        await asyncio.sleep(pause)
        try:
            await run_in_threadpool(remove_orphans, service, age)
        except (OSError, sqlite3.Error) as failure:
            log_event("storage_error", logging.ERROR, failure=failure)


def remove_orphans(service: Service, age: float) -> None:
    keys = service.storage.keys(age)
    while some := list(itertools.islice(keys, 1000)):
        for key in service.db.without_document(some).result():
            service.storage.delete(key)
            log_event("orphan_removed", key=key)


def raise_open_files_limit() -> None:
    """An upload takes two descriptors; the usual soft limit of 1,024 would end at 500 of them."""
    if resource:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(arguments: list[str] | None = None) -> int:
    """The command line: users. The server is `uvicorn main:app`."""
    parser = argparse.ArgumentParser(prog="main.py", description="Users of the Document Lifecycle API.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("add-user", help="add a user, or set a new password").add_argument("name")
    commands.add_parser("remove-user", help="remove a user and that user's documents").add_argument("name")
    chosen = parser.parse_args(arguments)
    try:
        settings = Settings.from_environment(os.environ)
        credentials = Credentials(username=chosen.name, password=(
            read_password() if chosen.command == "add-user" else "-"))
        prepare_folder(settings.data_dir)
        db = Database(settings.data_dir / "documents.db")
        try:
            if chosen.command == "add-user":
                db.set_user(credentials.username, auth.hash_password(credentials.password)).result()
                print(f"{chosen.name} can log in now.")
                return 0
            documents = db.remove_user(credentials.username).result()
        finally:
            db.close()
        if documents is None:
            raise LookupError(f"There is no user {chosen.name}.")
        storage = LocalStorage(settings.data_dir / "files")
        for document_id in documents:
            storage.delete(document_id)
        print(f"{chosen.name} is removed, with {len(documents)} documents.")
        return 0
    except ValidationError as error:
        print(f"{chosen.command}: {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}", file=sys.stderr)
    except (UnusableSetting, UnusableDatabase, LookupError, OSError, sqlite3.Error) as error:
        print(f"{chosen.command}: {error}", file=sys.stderr)
    return 1


def read_password() -> str:
    if sys.stdin is None or not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n") if sys.stdin else ""
    try:
        password = getpass.getpass("Password: ")
        if getpass.getpass("Once more: ") != password:
            raise LookupError("The two passwords differ.")
        return password
    except (EOFError, KeyboardInterrupt):
        raise LookupError("No password was given.") from None


app = create_app()

if __name__ == "__main__":
    sys.exit(main())
