"""Document Lifecycle API: takes PDF and DOCX files, stores them, processes them in the background, serves the result.

    POST   /auth/login               user name and password for an access and a refresh token
    POST   /auth/refresh             a refresh token for a new pair
    POST   /auth/logout              ends the session
    POST   /documents/upload         one multipart part `file`
    POST   /documents/{id}/process   starts processing; idempotent by the document's state
    GET    /documents/{id}/status    ?wait=S answers when processing ends
    GET    /documents/{id}/result
    GET    /documents                the caller's, newest first
    GET    /documents/{id}           one of them
    GET    /documents/{id}/file      the stored bytes
    DELETE /documents/{id}
    GET    /healthz, /readyz

This is the only module that knows HTTP, the environment and the log."""
import argparse
import asyncio
import contextlib
import errno
import gc
import getpass
import json
import logging.config
import os
import random
import re
import resource
import secrets
import signal
import socket
import sqlite3
import sys
import time
import traceback
import unicodedata
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from email.errors import HeaderParseError
from email.header import decode_header
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NoReturn, cast
from urllib.parse import parse_qsl, quote, unquote_to_bytes

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import OAuth2PasswordBearer
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, Json, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, MultipartState, parse_options_header
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import auth
from db import Database, Document, InDoubt, RunEnded, Session, Status, Throttled, User, utc_now
from storage import (DOCX, MEDIA_TYPES, PDF, START_BYTES, BadDocument, Incoming, LocalStorage, Storage, check_is_whole,
                     fsync_folder, make_folder, private_opener)

# Settings


class Settings(BaseModel, frozen=True, populate_by_name=True, alias_generator=lambda name: f"DOCS_{name.upper()}"):
    """Each is read from the environment variable DOCS_ and its name in capitals."""

    # Empty becomes None, which is refused: Path("") is the current folder. Absolute, in case a pipeline calls chdir.
    data_dir: Annotated[Path, BeforeValidator(lambda path: os.path.expanduser(path) or None),
                        AfterValidator(Path.absolute)] = Field(Path("data"), validate_default=True)
    jwt_secret: bytes | None = Field(None, min_length=32, repr=False)
    admin_username: str = Field("admin", min_length=1, max_length=128)
    admin_password: str | None = Field(None, min_length=8, max_length=1024, repr=False)
    access_token_seconds: int = Field(900, ge=1, le=10**9)
    refresh_token_seconds: int = Field(604800, ge=1, le=10**9)
    max_upload_bytes: int = Field(52428800, ge=1, le=2**40)
    upload_idle_seconds: float = Field(30, gt=0, le=3600)
    process_workers: int = Field(4, ge=1, le=256)
    process_seconds: float = Field(2, ge=0, le=10**6)
    lease_seconds: float = Field(15, ge=0.5, le=3600)
    max_attempts: int = Field(3, ge=1, le=100)
    max_queue: int = Field(10000, ge=1, le=10**6)
    shutdown_seconds: float = Field(10, ge=0, le=3600)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """Raises ValueError: its text names the settings with a bad value and what they want, never the value."""
        try:
            return cls.model_validate({name: text for name, text in environment.items() if name.startswith("DOCS_")})
        except ValidationError as error:
            raise ValueError("; ".join(f"{each['loc'][0]}: {each['msg']}" for each in error.errors())) from None


# Log

log = logging.getLogger("documents")
request_id_of_context: ContextVar[str] = ContextVar("request_id", default="")


def log_event(event: str, level: int = logging.INFO, *, failure: BaseException | None = None, **fields: Any) -> None:
    log.log(level, event, exc_info=failure, extra={"fields": fields})


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII. Long texts are cut: lines longer than PIPE_BUF may mix in a pipe (pipe(7))."""
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "timestamp": utc_now(), "level": record.levelname, "logger": record.name,
            "event": record.getMessage().strip().rpartition("\n")[2]}  # uvicorn logs tracebacks: the last line
        if request_id := request_id_of_context.get():
            entry["request_id"] = request_id
        entry |= getattr(record, "fields", {})
        if record.exc_info and (failure := record.exc_info[1]):
            # An exception's text can hold what a client sent, unless it is the system's (errno) or SQLite's.
            text = f": {failure}" if getattr(failure, "errno", None) or isinstance(failure, sqlite3.Error) else ""
            entry["exception"] = type(failure).__name__ + text
            entry["stack"] = "".join(traceback.format_tb(failure.__traceback__, limit=-20))
        return json.dumps({name: value[-1500:] if isinstance(value, str) else value for name, value in entry.items()})


LOGGING = {  # for logging.config.dictConfig
    "version": 1, "disable_existing_loggers": False,
    "formatters": {"json": {"()": JsonFormatter}},
    "handlers": {"stdout": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "json"}},
    "root": {"handlers": ["stdout"], "level": "INFO"},
    # uvicorn's loggers lose their handlers, as none are named. `request` replaces its access log, which shows queries.
    "loggers": {"uvicorn": {"propagate": True}, "uvicorn.access": {"propagate": False}}}


# Models: what is sent and received

class Credentials(BaseModel):
    username: str = Field(min_length=1, max_length=128)
    password: str = Field(min_length=1, max_length=1024, json_schema_extra={"format": "password"})
    grant_type: Literal["password"] = "password"


class RefreshToken(BaseModel):
    refresh_token: str = Field(min_length=1, max_length=8192)
    grant_type: Literal["refresh_token"] = "refresh_token"


NOON = "2026-01-31T12:00:00.000000Z"
Timestamp = Annotated[str, Field(json_schema_extra={"format": "date-time"}, examples=[NOON])]


class Answer(BaseModel, from_attributes=True, json_schema_serialization_defaults_required=True,
             json_schema_extra=lambda schema: schema.update(example={
                 name: field["examples"][0] for name, field in schema["properties"].items()})):
    """What a success sends. The example in /docs is put together from those of the fields."""


class Tokens(Answer):
    access_token: str = Field(examples=["eyJhbGciOiJIUzI1NiIsInR5cCI6ImF0K2p3dCJ9.e30.c2ln"])
    token_type: Literal["bearer"] = Field(default="bearer", examples=["bearer"])
    expires_in: int = Field(description="seconds", examples=[900])
    refresh_token: str = Field(examples=["eyJhbGciOiJIUzI1NiIsInR5cCI6InJ0K2p3dCJ9.e30.c2ln"])
    refresh_expires_in: int = Field(description="seconds", examples=[604800])


class DocumentState(Answer):
    document_id: uuid.UUID = Field(examples=["5b0c1e3a-0b57-4a39-9d53-5a1d6f3f8a11"])
    status: Status = Field(examples=["UPLOADED"])


class DocumentOut(DocumentState):
    filename: str = Field(examples=["report.pdf"])
    media_type: str = Field(examples=[PDF])
    size: int = Field(description="bytes", examples=[80100])
    sha256: str = Field(examples=["69f6b7f493b1bc55d518942976cbeadc4ec0a36f6d8a6dc24feffc516d35b2c9"])
    created_at: Timestamp
    updated_at: Timestamp


class StatusOut(DocumentState):
    status: Status = Field(examples=["FAILED"])
    progress: int = Field(ge=0, le=100, examples=[0])
    message: str = Field(examples=["The PDF has no end-of-file marker."])
    attempts: int = Field(examples=[1])
    request_id: str | None = Field(description="of the request that started processing", examples=["8f14e45f"])
    created_at: Timestamp
    updated_at: Timestamp
    started_at: Timestamp | None = Field(examples=[NOON])
    finished_at: Timestamp | None = Field(examples=[NOON])
    error: Json[dict[Literal["code", "message", "retryable"], Any]] | None = Field(examples=[{
        "code": "damaged_document", "message": "The PDF has no end-of-file marker.", "retryable": False}])


class ResultOut(DocumentState):
    status: Status = Field(examples=["COMPLETED"])
    completed_at: Timestamp
    result: Any = Field(examples=[{"document_type": "PDF", "summary": "A simulated summary of report.pdf."}])


class Health(Answer):
    status: Literal["ok"] = Field(default="ok", examples=["ok"])


# Problems: every error that the app sends

RETRY_SOON = {"Retry-After": "1"}
BEARER = {"WWW-Authenticate": "Bearer"}
PROBLEMS: dict[str, tuple[int, str, dict[str, str]]] = {
    "malformed_body": (400, "The multipart body is malformed.", {}),
    "missing_token": (401, "Send an access token in the Authorization header: Bearer <token>.", BEARER),
    "invalid_token": (401, "The access token is invalid, has expired, or its session has ended.",
                      {"WWW-Authenticate": 'Bearer error="invalid_token"'}),
    "invalid_grant": (401, "Wrong user name or password, or an invalid or expired refresh token.", BEARER),
    "not_found": (404, "There is nothing here for you.", {}),
    "method_not_allowed": (405, "This path does not take this method.", {}),
    "upload_timeout": (408, "The body did not come in time.", {}),
    "not_processed": (409, "Processing has not been started.", {}),
    "still_processing": (409, "Processing has not ended yet.", RETRY_SOON),
    "processing_failed": (409, "Processing has failed.", {}),
    "too_large": (413, "The body, or a part of it, is too large.", {}),
    "unsupported_media_type": (415, "This media type is not supported.", {}),
    "validation_error": (422, "The request has parameters or fields that can't be used: see errors.", {}),
    "idempotency_key_reused": (422, "This Idempotency-Key was used for another file.", {}),
    "too_many_attempts": (429, "Too many logins. Try again later.", RETRY_SOON),
    "queue_full": (429, "Too many of your documents wait for processing. Try again later.", RETRY_SOON),
    "internal_error": (500, "Something went wrong here. The log knows more, under this request_id.", {}),
    "unavailable": (503, "This can't be done right now. Try again later.", RETRY_SOON),
    "insufficient_storage": (507, "There is no space left to store this.", {}),
}
PROBLEM_SCHEMA = {
    "title": "Problem", "description": "RFC 9457. `code` is for programs, `detail` for people.", "type": "object",
    "required": ["title", "status", "detail", "code", "request_id"], "properties": {
        "title": {"type": "string"}, "status": {"type": "integer"}, "detail": {"type": "string"},
        "code": {"type": "string", "enum": list(PROBLEMS), "description": ", ".join(
            f"{code} ({status})" for code, (status, *_) in PROBLEMS.items())},
        "request_id": {"type": "string"},
        "errors": {"description": "of a 422: `loc` and `msg` of each", "type": "array", "items": {"type": "object"}},
        "error": {"description": "why processing failed, or OAuth 2's code with `error_description`"}}}


class Problem(Exception):
    """A code of PROBLEMS, with a detail, headers and members of its own (RFC 9457), and the response made of them."""
    def __init__(self, code: str, detail: str | None = None, headers: Mapping[str, str] | None = None,
                 **members: Any) -> None:
        status, usual_detail, usual_headers = PROBLEMS[code]
        content = {
            "title": HTTPStatus(status).phrase, "status": status, "detail": detail or usual_detail, "code": code,
            "request_id": request_id_of_context.get(), **members}
        if code == "invalid_grant":  # OAuth 2's names for it (RFC 6749, 5.2)
            content |= {"error": code, "error_description": content["detail"]}
        self.response = Response(
            json.dumps(content), status, {**usual_headers, **(headers or {})}, "application/problem+json")


def unprocessable(msg: str, *loc: str, code: str = "validation_error") -> Problem:
    return Problem(code, errors=[{"loc": loc, "msg": msg}])


def problem_of(request: Request, failure: BaseException) -> Problem:
    """What an exception, be it ours or a library's, tells the client. What the operator has to know is logged."""
    match failure:
        case Problem():
            return failure
        case RequestValidationError():
            return Problem("validation_error", errors=[
                {"loc": error["loc"], "msg": error["msg"]} for error in failure.errors()])
        case BadDocument():
            return Problem("unsupported_media_type", str(failure))
        case FormParserError():
            return Problem("malformed_body")
        case auth.InvalidToken() | sqlite3.IntegrityError(sqlite_errorcode=sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY):
            return Problem("invalid_token")  # the foreign key fails when the user was removed during the upload
        case HTTPException(status_code=405):
            methods = {method for route in request.app.routes if route.matches(request.scope)[0] == Match.PARTIAL
                       for method in route.methods}
            allowed = methods | {"HEAD"} if "GET" in methods else methods
            return Problem("method_not_allowed", headers={"Allow": ", ".join(sorted(allowed))})
        case HTTPException(status_code=404):
            return Problem("not_found")
        case OSError() | sqlite3.Error():
            log_event("storage_error", logging.ERROR, failure=failure)
            no_space = (getattr(failure, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                        or getattr(failure, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL)
            only_reads = request.method in ("GET", "HEAD")  # like /readyz, which answers 503 whatever is wrong
            return Problem("insufficient_storage" if no_space and not only_reads else "unavailable")
        case asyncio.CancelledError():  # by uvicorn, when the grace of a shutdown is over
            return Problem("unavailable")
        case _:
            log_event("unhandled_error", logging.ERROR, failure=failure)
            return Problem("internal_error")


async def raise_again(_: Request, failure: Exception) -> NoReturn:  # so that RequestMiddleware answers all exceptions
    raise failure


# The request middleware

SMALL_BODY = 65536  # bytes: a login, what surrounds the file in a multipart body, a rest that is read before the answer
DRAIN_SECONDS, DRAIN_BYTES = 30.0, 2**28


class RequestMiddleware:
    """Gives each request an id and a line in the log, serves HEAD as GET, and makes an answer of every exception."""
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, request = time.perf_counter(), Request(scope)
        # Nobody reads cookies, but FastAPI parses them; a hostile one takes old Pythons seconds (CVE-2024-7592).
        scope["headers"] = [header for header in scope["headers"] if header[0] != b"cookie"]
        headers, state = dict(scope["headers"]), scope["state"]  # which routes see as `request.state`
        state["client"] = scope["client"][0] if scope.get("client") else "unknown"
        state["is_head"] = scope["method"] == "HEAD"
        sent_id = re.fullmatch(rb"[A-Za-z0-9._-]{1,64}", headers.get(b"x-request-id", b""))
        request_id_of_context.set(sent_id[0].decode() if sent_id else service_of(request).random.randbytes(16).hex())
        exchange = Exchange(headers, receive, send)
        # A path or method that no route has may hold a secret: it is not logged, and such a path is not even looked up.
        path = re.fullmatch("/[A-Za-z0-9_/.-]{,200}", scope["path"].removeprefix(scope["root_path"]))
        method = re.fullmatch("[A-Z]{1,9}", scope["method"])
        try:
            if not path:
                raise Problem("not_found")
            if exchange.body_unread and any(
                    coding.lower() != "identity" for coding in request.headers.getlist("content-encoding")):
                raise Problem("unsupported_media_type", "Send the body without a Content-Encoding.")
            await self.app({**scope, "method": "GET"} if state["is_head"] else scope, exchange.receive, exchange.send)
        except (Exception, asyncio.CancelledError) as failure:
            problem = problem_of(request, failure)  # first, as it logs what the operator has to know
            if exchange.status:  # the answer has begun; uvicorn cuts it off
                raise
            if isinstance(failure, asyncio.CancelledError):
                exchange.body_unread = False  # the grace is over: no time is left to read the rest
            await problem.response(scope, exchange.receive, exchange.send)
        finally:
            log_event("request", method=method[0] if method else "odd", path=path[0] if path else "odd",
                      status=exchange.status, duration_ms=round(1000 * (time.perf_counter() - start), 3),
                      client=state["client"], user=state.get("username"))


class Exchange:
    """`receive` and `send` for the app. A client that still sends while the connection is closed may lose the answer
    (RFC 9112, 9.6). So what the app leaves of a body is read and thrown away: up to 64 KiB, within 0.1 s, before the
    answer. If there is more, the answer says `Connection: close`, and up to DRAIN_BYTES, within DRAIN_SECONDS, are read
    between its content and its end, at which uvicorn closes."""
    def __init__(self, headers: Mapping[bytes, bytes], receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.status = 0  # of the answer, once that has begun
        self.body_unread = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        self._expects_100 = b"expect" in headers

    async def receive(self) -> Message:
        message = await self._receive()
        self.body_unread = message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._start(message)
        elif self.body_unread and not message.get("more_body", False):
            await self._end(message)
        else:
            await self._send(message)

    async def _start(self, message: Message) -> None:
        if self.body_unread and not self._expects_100:  # a client that waits for 100 sends nothing (RFC 9110, 10.1.1)
            await self._drain(0.1, SMALL_BODY)
        self.status, headers = message["status"], message["headers"]
        if b"cache-control" not in dict(headers):
            headers.append((b"cache-control", b"no-store"))
        if self.body_unread:
            headers.append((b"connection", b"close"))
        headers += [(b"x-request-id", request_id_of_context.get().encode()),
                    (b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY")]
        await self._send(message)

    async def _end(self, message: Message) -> None:
        await self._send({**message, "more_body": True})
        await self._drain(DRAIN_SECONDS, DRAIN_BYTES)
        await self._send({"type": "http.response.body"})

    async def _drain(self, seconds: float, most: int) -> None:
        drained = 0
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):  # uvicorn cancels when the grace is over
            async with asyncio.timeout(seconds):
                while self.body_unread and drained < most:
                    drained += len((await self.receive()).get("body", b""))


# The service and its dependencies

class Service:
    """What the routes work with; made by the lifespan, found by `service_of`."""
    def __init__(self, settings: Settings, storage: Storage | None, pipeline: "Pipeline | None") -> None:
        self.settings = settings
        self.db, self.storage = open_stores(settings, storage)
        self.db.loop = asyncio.get_running_loop()
        self.signer = auth.TokenSigner(
            settings.jwt_secret or secret_file(self.db, settings.data_dir / "jwt-secret").encode())
        # Threads of their own, so that publishing to a slow storage holds up no downloads. Nearly all they do is wait.
        self.publishers = ThreadPoolExecutor(8, "publisher")
        self.open_uploads = 0
        self.random = random.Random()  # for ids, which are no secrets: without a system call for each
        self.password_checks = asyncio.Semaphore(2)  # scrypt takes 16 MiB and a processor
        self.logins_under_way: list[str] = []  # the throttle key of each
        self.workers = Workers(self, pipeline or partial(simulated_pipeline, seconds=settings.process_seconds))

    async def remove_deleted_files(self) -> None:
        """Removes files of deleted documents. A failure ends the round; the next round begins with other files."""
        for document_id in self.db.deleted_files():
            await run_in_threadpool(self.storage.delete, document_id)
            await self.db.forget_file(document_id)  # the committer syncs the storage first, so the deletion is durable


def open_stores(settings: Settings, storage: Storage | None = None) -> tuple[Database, Storage]:
    """The database, and the storage of the documents' files: the one given, or the folder `files`."""
    try:
        make_folder(settings.data_dir)
        storage = storage or LocalStorage(settings.data_dir / "files")
    except OSError as error:
        raise ValueError(f"DOCS_DATA_DIR: should be a folder that can be used ({error.strerror})") from error
    return Database(settings.data_dir / "documents.db", storage.sync, storage.keys), storage


def secret_file(db: Database, path: Path) -> str:
    """The secret in this file, made when there is none. Of several processes at once, one makes it."""
    with db.lock():
        if not path.exists():
            part = path.with_suffix(".part")
            with open(part, "w", opener=private_opener) as file:
                print(secrets.token_urlsafe(32), end="", file=file, flush=True)
                os.fsync(file.fileno())
            part.replace(path)
            fsync_folder(path.parent)
        return path.read_text().strip()


def service_of(request: Request) -> Service:
    return cast(Service, request.scope["state"]["service"])


class SessionBearer(OAuth2PasswordBearer):
    """The user of the access token: its signature is checked first, then that its session still stands."""
    async def __call__(self, request: Request) -> User:  # type: ignore[override]
        token = await super().__call__(request)
        if token is None:
            raise Problem("missing_token")
        service = service_of(request)
        claims = service.signer.verify(auth.ACCESS, token)
        user = service.db.session_user(claims.sid, claims.sub)
        if user is None:
            raise auth.InvalidToken("the session has ended")
        request.state.username = user.username
        return user


signed_in = SessionBearer("auth/login", "OAuth2", refreshUrl="auth/refresh", auto_error=False)
CurrentUser = Annotated[User, Depends(signed_in)]


def own_document(request: Request, user: User, document_id: uuid.UUID) -> Document:
    """The document, if it is this user's; any other is unknown."""
    document = service_of(request).db.document(str(document_id), user.user_id)
    if document is None:
        raise Problem("not_found")
    return document


# Bodies and uploads

UPLOAD_SECONDS = 3600.0
# Bytes in memory: when a chunk comes, an upload that holds HELD_BY_ONE, or its share of HELD_BY_ALL, writes them.
HELD_BY_ONE, HELD_BY_ALL = 2 * 2**20, 24 * 2**20


async def body_chunks(request: Request, limit: int, seconds: float = 0) -> AsyncIterator[bytes]:
    """The body as it comes. Raises `upload_timeout` after the idle time without a piece, or when the whole takes longer
    than `seconds` (at least the idle time)."""
    if int(request.headers.get("content-length", 0)) > limit:
        raise Problem("too_large")
    idle_seconds = service_of(request).settings.upload_idle_seconds
    deadline, size, more = time.monotonic() + max(seconds, idle_seconds), 0, True
    while more:
        try:
            async with asyncio.timeout(min(idle_seconds, deadline - time.monotonic())):
                message = await request.receive()
        except TimeoutError:
            raise Problem("upload_timeout") from None
        if message["type"] == "http.disconnect":
            raise Problem("upload_timeout")  # for the log: nobody is left to read it
        more = message.get("more_body", False)
        size += len(message.get("body", b""))
        if size > limit:
            raise Problem("too_large")
        yield message.pop("body", b"")  # pop, so that an idle upload does not keep its last chunk in memory


async def read_fields(request: Request, model: type[BaseModel]) -> Any:
    """A small body, JSON or an HTML form, as an instance of this model."""
    media_type, _ = parse_options_header(request.headers.get("content-type"))
    if media_type not in (b"application/json", b"application/x-www-form-urlencoded"):
        raise Problem("unsupported_media_type", "Send application/json or application/x-www-form-urlencoded.")
    body = b"".join([chunk async for chunk in body_chunks(request, SMALL_BODY)])
    try:
        if media_type == b"application/json":
            return model.model_validate_json(body)
        return model.model_validate(dict(parse_qsl(body.decode(errors="replace"), keep_blank_values=True)))
    except ValidationError as failure:
        raise RequestValidationError([
            {**error, "loc": ("body", *error["loc"])} for error in failure.errors()]) from None


class MultipartFile(MultipartParser):
    """A multipart/form-data body (RFC 7578), whose part `file` goes to an Incoming as it comes."""
    def __init__(self, content_type: str | None, incoming: Incoming) -> None:
        media_type, options = parse_options_header(content_type)
        if media_type != b"multipart/form-data":
            raise Problem("unsupported_media_type", "Send multipart/form-data with a part named file.")
        boundary = options.get(b"boundary")
        if not boundary:
            raise FormParserError("no boundary")
        self._incoming = incoming
        self._header_name = bytearray()
        self._headers: defaultdict[bytes, bytearray] = defaultdict(bytearray)  # of the part: values by name
        super().__init__(boundary, {
            "on_part_begin": self._headers.clear, "on_header_begin": self._header_name.clear,
            "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end].lower()),
            "on_header_value": lambda data, start, end: self._headers[bytes(self._header_name)].extend(data[start:end]),
            "on_headers_finished": self._on_headers_finished},
            max_header_count=SMALL_BODY, max_header_size=SMALL_BODY)  # as `receive_file` bounds them together
        # The parser knows no preamble (RFC 2046, 5.1.1). After `--boundary CRLF CRLF` it takes one for the content of a
        # part without headers, which is dropped. The third CRLF lets the body begin with a boundary.
        self.write(b"--" + boundary + b"\r\n\r\n\r\n")

    def _on_headers_finished(self) -> None:
        self.set_callback("part_data", None)  # what parts other than the file hold is dropped
        disposition = bytes(self._headers[b"content-disposition"])
        # Renamed, as python-multipart drops `filename*` (RFC 7578), which older .NET and Python clients send.
        _, options = parse_options_header(re.sub(rb"(?i);\s*filename\*\s*=", b"; extended_filename=", disposition))
        if options.get(b"name") != b"file":
            return
        filename = shown_filename(decoded_filename(options))
        if not filename or self._incoming.filename:
            raise unprocessable("There has to be one part named file, with a filename.", "body", "file")
        self._incoming.filename = filename
        self._incoming.media_type = MEDIA_TYPES.get(filename[filename.rfind("."):].lower(), "")
        if not self._incoming.media_type:
            raise Problem("unsupported_media_type", "The filename has to end in .pdf or .docx.")
        self.set_callback("part_data", lambda data, start, end: self._incoming.feed(data[start:end]))


def decoded_filename(options: Mapping[bytes, bytes]) -> str:
    """`filename*` (RFC 8187), or `filename`: encoded words (RFC 2047) or UTF-8. What can't be decoded stays."""
    plain = options.get(b"filename", b"")[-4096:].decode(errors="replace")
    extended = options.get(b"extended_filename", b"")[-4096:].split(b"'", 2)
    with contextlib.suppress(ValueError, LookupError, HeaderParseError):
        if len(extended) == 3 and len(extended[0]) <= 40:  # Python keeps the name of an unknown charset for ever
            return unquote_to_bytes(extended[2]).decode(extended[0].decode()) or plain
        if re.fullmatch(r"(=\?[^?\s]{1,40}\?[BbQq]\?[^?\s]*\?=\s*)+", plain):
            return "".join(content.decode(charset) for content, charset in decode_header(plain))
    return plain


def shown_filename(name: str) -> str:
    """For show only: no folders, no control or direction-changing characters or surrogates, NFC, at most 255 bytes."""
    name = re.split(r"[/\\]", name[-1024:])[-1]  # short, as normalizing is quadratic
    name = re.sub("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", "", name)
    name = unicodedata.normalize("NFC", name).strip()
    stem, dot, extension = name.rpartition(".")
    stem = stem.encode()[:255 - len((dot + extension).encode())].decode(errors="ignore")
    return (stem or "document") + dot + extension if name else ""


async def receive_file(request: Request, incoming: Incoming) -> None:
    """Reads the body into `incoming`. When that holds more than its share of memory, a thread writes it."""
    form = MultipartFile(request.headers.get("content-type"), incoming)
    service, body_size = service_of(request), 0
    max_size = service.settings.max_upload_bytes
    async for chunk in body_chunks(request, max_size + SMALL_BODY, UPLOAD_SECONDS):
        form.write(chunk)
        body_size += len(chunk)
        del chunk  # so that it isn't kept while the next one is waited for
        if incoming.size > max_size or body_size - incoming.size > SMALL_BODY:
            raise Problem("too_large")
        share = min(HELD_BY_ONE, HELD_BY_ALL // service.open_uploads)
        if incoming.held_size >= share and incoming.size >= START_BYTES:  # the start was checked
            await run_in_threadpool(incoming.flush)
    if form.state != MultipartState.END:
        raise FormParserError
    if not incoming.size:
        raise unprocessable("There is no part named file, or it is empty.", "body", "file")


# Processing

Progress = Callable[[int, str], None]
Pipeline = Callable[[BinaryIO, Document, Progress], Any]


def simulated_pipeline(file: BinaryIO, document: Document, progress: Progress, *, seconds: float) -> Any:
    """Stands where OCR and a language model will: checks that the file is whole, takes its time, makes up a result.

    A pipeline returns what JSON can hold. Between steps it calls `progress(percent, message)`, which waits for the disk
    and raises RunEnded when the run has to end. Any other exception makes FAILED: BadDocument, with a text for people,
    when the file is damaged; after others, trying again may help."""
    check_is_whole(file, document.media_type)
    for percent, step in (0, "extracting text"), (25, "recognizing layout"), (50, "classifying"), (75, "summarizing"):
        progress(percent, step)
        time.sleep(seconds / 4)
    return {
        "document_type": "PDF" if document.media_type == PDF else "Word",
        "summary": f"A simulated summary of {document.filename}.", "sha256": document.sha256}


class Workers:
    """Runs queued documents. The queue is in the database, so any server process may run what another was asked to.
    What a pipeline raises makes its document FAILED. When the file can't be opened, or the database fails, the lease of
    the run ends, as if the process had died."""
    def __init__(self, service: Service, pipeline: Pipeline) -> None:
        self._db, self._storage, self._settings = service.db, service.storage, service.settings
        self._pipeline = pipeline
        self._pool = ThreadPoolExecutor(self._settings.process_workers, "worker")
        self._run_ids: set[str] = set()  # of the runs that go on here
        self.stopping, self._grace_end = False, float("inf")  # by time.monotonic()

    async def work(self) -> None:
        """Runs waiting documents until none waits. `process_workers` asyncio tasks repeat this, each with a thread."""
        while self._db.is_waiting() and not self.stopping:
            run_id = uuid.uuid4().hex
            self._run_ids.add(run_id)  # before the claim, so that its lease is renewed from the start
            try:
                if document := await self._db.claim(run_id):
                    await asyncio.get_running_loop().run_in_executor(self._pool, self._run, run_id, document)
            except RunEnded:
                pass  # the document was deleted or taken over, or the grace of a shutdown is over
            finally:
                self._run_ids.discard(run_id)

    async def keep_leases(self) -> None:
        """Renews the leases of the runs of this process, and takes over runs whose lease is over."""
        for document in await self._db.renew_and_take_over(
                list(self._run_ids), self._settings.lease_seconds, self._settings.max_attempts):
            event = "process_failed" if document.status == "FAILED" else "process_requeued"
            log_run(event, document, error="interrupted")

    def stop(self) -> None:
        """Claims no more documents. Runs have the grace; what is unfinished then is taken over after its lease."""
        self.stopping = True
        self._grace_end = min(self._grace_end, time.monotonic() + self._settings.shutdown_seconds)

    async def close(self) -> None:
        """Waits for the runs until the grace is over."""
        self.stop()
        while self._run_ids and time.monotonic() < self._grace_end:
            await asyncio.sleep(0.02)

    def _run(self, run_id: str, document: Document) -> None:
        request_id_of_context.set(document.request_id or "")  # for what is logged in this thread, by the pipeline too
        log_run("process_started", document)
        start = time.monotonic()

        def progress(percent: int, message: str) -> None:
            if time.monotonic() > self._grace_end:
                raise RunEnded
            percent = max(0, min(int(percent), 99))
            try:
                self._db.record_progress(run_id, document.document_id, percent, message).result()
            except (sqlite3.Error, OSError) as failure:  # no fault of the pipeline, and no harm: it is only logged
                log_event("storage_error", logging.ERROR, failure=failure)

        file = self._storage.open(document.document_id)  # not in the `try`: a failure here counts as an interruption
        try:
            with file:
                result = json.dumps(self._pipeline(file, document, progress), allow_nan=False)
        except RunEnded:
            raise
        except BaseException as failure:  # even a sys.exit of the pipeline makes FAILED
            damaged = isinstance(failure, BadDocument)
            code = "damaged_document" if damaged else "pipeline_error"
            message = str(failure) if damaged else f"Processing failed: {type(failure).__name__}."
            self._db.fail(run_id, document.document_id, code, message, retryable=not damaged).result()
            log_run("process_failed", document, start, failure=failure, error=code)
        else:
            self._db.complete(run_id, document.document_id, result).result()
            log_run("process_completed", document, start)


def log_run(event: str, document: Document, start: float | None = None, **fields: Any) -> None:
    if start is not None:
        fields["duration_ms"] = round(1000 * (time.monotonic() - start), 3)
    log_event(event, logging.WARNING if event == "process_failed" else logging.INFO, request_id=document.request_id,
              document_id=document.document_id, attempt=document.attempts, **fields)


# Routes

ERRORS: dict[int | str, dict[str, Any]] = {"default": {
    "description": "A problem. Its `code` says which one.",
    "content": {"application/problem+json": {"schema": PROBLEM_SCHEMA}}}}


class UploadRoute(APIRoute):
    """Calls its endpoint with the request and the user, as FastAPI would, but at 5 % less CPU for a small upload."""
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handle(request: Request) -> Response:
            return cast(Response, await self.endpoint(request, user=await signed_in(request)))
        return handle


uploads = APIRouter(prefix="/documents", tags=["documents"], responses=ERRORS, route_class=UploadRoute)
documents = APIRouter(prefix="/documents", tags=["documents"], responses=ERRORS)
sessions = APIRouter(prefix="/auth", tags=["auth"], responses=ERRORS)
health = APIRouter(tags=["health"], responses=ERRORS)
IDEMPOTENCY_KEY = "[!-~]{1,128}"
CURSOR = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z_[0-9a-f-]{36}$"  # created_at and id of the last document of a page
LOGINS_AT_ONCE = 10  # of one throttle key


@uploads.post(
    "/upload", summary="Upload a PDF or DOCX", status_code=201, response_model=DocumentOut, openapi_extra={
        "parameters": [{"name": "Idempotency-Key", "in": "header", "required": False, "description": "one for a file",
                        "schema": {"type": "string", "pattern": f"^{IDEMPOTENCY_KEY}$"}}],
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
            "type": "object", "required": ["file"],
            "properties": {"file": {"type": "string", "format": "binary", "description": "PDF or DOCX"}}}}}}})
async def upload(request: Request, user: CurrentUser) -> Response:
    """Stores one file, which after the 201 survives a crash or a power loss. With an `Idempotency-Key` a repeated
    upload answers the first document again. Errors: `malformed_body`, `upload_timeout`, `too_large`,
    `unsupported_media_type`, `idempotency_key_reused`, `insufficient_storage`."""
    service = service_of(request)
    idempotency_key = request.headers.get("idempotency-key")
    if idempotency_key is not None and not re.fullmatch(IDEMPOTENCY_KEY, idempotency_key):
        raise unprocessable("Use 1 to 128 visible ASCII characters.", "header", "Idempotency-Key")
    incoming = Incoming(service.storage, str(uuid.UUID(bytes=service.random.randbytes(16), version=4)))
    service.open_uploads += 1
    try:
        await receive_file(request, incoming)
        # The file, then its row: a crash between them leaves a file without a row, never a row without its file.
        await asyncio.get_running_loop().run_in_executor(service.publishers, incoming.finish)
        now = utc_now()
        document = await service.db.add_document(Document(
            incoming.key, user.user_id, incoming.filename, incoming.media_type, incoming.size,
            incoming.sha256.hexdigest(), "UPLOADED", created_at=now, updated_at=now, idempotency_key=idempotency_key))
    except InDoubt:  # the row may be there, so the file stays
        raise
    except Exception:  # certainly no row. Not for CancelledError: a publisher may still be at work on the file
        await run_in_threadpool(incoming.discard)
        raise
    finally:
        service.open_uploads -= 1
    headers = {"Location": request.scope["path"].removesuffix("upload") + document.document_id}
    if document.document_id == incoming.key:
        log_event("uploaded", document_id=incoming.key, size=incoming.size, media_type=incoming.media_type)
    elif document.sha256 == incoming.sha256.hexdigest():
        headers["Idempotency-Replayed"] = "true"
    else:
        raise unprocessable("It was for another file.", "header", "Idempotency-Key", code="idempotency_key_reused")
    return Response(DocumentOut.model_validate(document).model_dump_json(), 201, headers, "application/json")


@documents.post("/{document_id:uuid}/process", summary="Start processing a document", response_model=StatusOut,
                status_code=202, responses={200: {"description": "COMPLETED: the result stands", "model": StatusOut}})
async def process(document_id: uuid.UUID, request: Request, response: Response, user: CurrentUser) -> Document:
    """However many calls come, an UPLOADED or FAILED document is queued once. Errors: `not_found`, `queue_full`."""
    service, request_id = service_of(request), request_id_of_context.get()
    document = await service.db.enqueue(str(document_id), user.user_id, request_id, service.settings.max_queue)
    if document is None:
        raise Problem("not_found")
    if document.status in ("UPLOADED", "FAILED"):  # only a full queue leaves it so
        raise Problem("queue_full")
    if document.status == "COMPLETED":
        response.status_code = 200
    else:
        response.headers.update({**RETRY_SOON, "Location": request.scope["path"].removesuffix("process") + "status"})
    return document


@documents.get("/{document_id:uuid}/status", summary="See how processing goes", response_model=StatusOut)
async def get_status(document_id: uuid.UUID, request: Request, response: Response, user: CurrentUser,
                     wait: Annotated[float, Query(ge=0, le=30, description="seconds")] = 0) -> Document:
    """With `wait`, the answer comes when processing ends, after that time at the latest. Error: `not_found`."""
    end, workers = time.monotonic() + wait, service_of(request).workers
    document = own_document(request, user, document_id)
    while document.status == "PROCESSING" and time.monotonic() < end and not workers.stopping:
        await asyncio.sleep(0.1)
        document = own_document(request, user, document_id)
    if document.status == "PROCESSING":
        response.headers.update(RETRY_SOON)
    return document


@documents.get("/{document_id:uuid}/result", summary="Get the result of processing", response_model=ResultOut)
async def get_result(document_id: uuid.UUID, request: Request, user: CurrentUser) -> Response:
    """What the pipeline made of it. Errors: `not_found`, `not_processed`, `still_processing`, `processing_failed`."""
    document = own_document(request, user, document_id)
    if answer := service_of(request).db.result(document.document_id):  # none, too, when it was deleted meanwhile
        return Response(answer, media_type="application/json")
    if document.status == "FAILED":
        raise Problem("processing_failed", error=json.loads(document.error or "null"))
    raise Problem({"UPLOADED": "not_processed", "PROCESSING": "still_processing"}.get(document.status, "not_found"))


@documents.get("", summary="List your documents", response_model=list[DocumentOut])
async def list_documents(
        request: Request, response: Response, user: CurrentUser, limit: Annotated[int, Query(ge=1, le=200)] = 50,
        status: Status = Query(None),  # with None in the type, OpenAPI would say that null can be sent
        cursor: str = Query(None, pattern=CURSOR, description="of the Link header")) -> list[Document]:
    """Newest first. The header `Link: <...>; rel="next"` leads to the next page (RFC 8288)."""
    position = cursor.split("_") if cursor else ("~", "")  # "~" sorts after every time stamp
    found = service_of(request).db.documents(user.user_id, limit + 1, status, position)
    if len(found) > limit:
        last = found[limit - 1]
        query = f"limit={limit}&cursor={last.created_at}_{last.document_id}" + (f"&status={status}" if status else "")
        response.headers["Link"] = f'<{request.scope["path"]}?{query}>; rel="next"'
    return found[:limit]


@documents.get("/{document_id:uuid}", summary="Get one document", response_model=DocumentOut)
async def get_one(document_id: uuid.UUID, request: Request, user: CurrentUser) -> Document:
    """The same as the upload answered, with the document's present status. Error: `not_found`."""
    return own_document(request, user, document_id)


@documents.get("/{document_id:uuid}/file", summary="Download the stored file", response_class=StreamingResponse,
               responses={200: {"description": "The stored bytes", "content": dict.fromkeys(
                              ("application/octet-stream", PDF, DOCX),
                              {"schema": {"type": "string", "format": "binary"}, "example": "%PDF-1.7 ..."})},
                          304: {"description": "The client has this file already: see If-None-Match"}})
async def get_file(document_id: uuid.UUID, request: Request, user: CurrentUser) -> Response:
    """The bytes that were uploaded, with their SHA-256 as ETag. Errors: `not_found`, `unavailable`."""
    document = own_document(request, user, document_id)
    headers = {"ETag": f'"{document.sha256}"', "Cache-Control": "private, no-cache"}
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    file = await run_in_threadpool(service_of(request).storage.open, document.document_id)
    chunks = [] if request.state.is_head else iter(partial(file.read, 65536), b"")
    plain, quoted = re.sub(r'[^ -~]|["\\%]', "_", document.filename), quote(document.filename, safe="")
    return StreamingResponse(chunks, background=BackgroundTask(file.close), headers=headers | {
        "Content-Type": document.media_type, "Content-Length": str(document.size),
        "Content-Disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quoted}"})


@documents.delete("/{document_id:uuid}", summary="Delete a document", status_code=204, response_class=Response)
async def delete(document_id: uuid.UUID, request: Request, user: CurrentUser) -> None:
    """Removes document, file and result, also while it is being processed. Error: `not_found`."""
    if not await service_of(request).db.delete(str(document_id), user.user_id):
        raise Problem("not_found")
    log_event("deleted", document_id=str(document_id))


def form_or_json(model: type[BaseModel]) -> dict[str, Any]:
    return {  # openapi-python-client makes a broken client for a route with a body and without parameters
        "parameters": [{"name": "X-Request-ID", "in": "header", "required": False, "schema": {"type": "string"}}],
        "requestBody": {"required": True, "content": dict.fromkeys(
            ("application/x-www-form-urlencoded", "application/json"), {"schema": model.model_json_schema()})}}


def tokens_of(service: Service, session: Session) -> Tokens:
    """A new access token, and the session's refresh token. The latter is made only of the session's row and settings:
    that is why repeated refreshes within REFRESH_GRACE get the same successor."""
    now, settings = time.time(), service.settings
    access_exp = min(now + settings.access_token_seconds, session.expires_at)
    refresh_exp = min(session.rotated_at + settings.refresh_token_seconds, session.expires_at)
    claims = partial(auth.Claims, sub=session.user_id, sid=session.session_id)
    access = claims(jti=str(uuid.uuid4()), iat=now, exp=access_exp)
    refresh = claims(jti=session.refresh_jti, iat=session.rotated_at, exp=refresh_exp)
    return Tokens(
        access_token=service.signer.issue(auth.ACCESS, access), expires_in=round(access_exp - now),
        refresh_token=service.signer.issue(auth.REFRESH, refresh), refresh_expires_in=round(refresh_exp - now))


@sessions.post("/login", summary="Log in with user name and password", openapi_extra=form_or_json(Credentials))
async def login(request: Request) -> Tokens:
    """Gives an access and a refresh token (OAuth 2 password grant). Errors: `invalid_grant`, `too_many_attempts`."""
    credentials: Credentials = await read_fields(request, Credentials)
    service, client = service_of(request), request.state.client
    throttle_key, name_hash = auth.throttle_key(client), service.signer.name_hash(credentials.username)
    if service.logins_under_way.count(throttle_key) >= LOGINS_AT_ONCE:
        raise Problem("too_many_attempts")
    user = service.db.user(credentials.username)
    name = user.username if user else None  # an unknown one may be a password in the wrong field: it is not logged
    service.logins_under_way.append(throttle_key)
    try:
        async with service.password_checks:
            if await request.is_disconnected():  # the client is gone: no scrypt for it
                raise Problem("upload_timeout")
            service.db.check_throttle(name_hash, throttle_key)
            right = await asyncio.to_thread(  # not in `run_in_threadpool`, whose threads may all wait for the storage
                auth.verify_password, credentials.password, user.password_hash if user else None)
            session = await service.db.record_login(user if right else None, name_hash, throttle_key)
    except Throttled as throttled:
        log_event("login_throttled", logging.WARNING, user=name, client=client)
        raise Problem("too_many_attempts", headers={"Retry-After": str(int(throttled.args[0]) + 1)}) from None
    finally:
        service.logins_under_way.remove(throttle_key)
    if session is None:
        log_event("login_failed", logging.WARNING, user=name, client=client)
        raise Problem("invalid_grant")
    request.state.username = name
    log_event("login_succeeded", user=name, client=client)
    return tokens_of(service, session)


@sessions.post("/refresh", summary="Exchange a refresh token for new tokens", openapi_extra=form_or_json(RefreshToken))
async def refresh(request: Request) -> Tokens:
    """Replaces the refresh token. The old token gives the same successor for 10 seconds more, unless the successor was
    used. Any later use, until it expires, ends the session (RFC 9700, 4.14.2). Error: `invalid_grant`."""
    body: RefreshToken = await read_fields(request, RefreshToken)
    service = service_of(request)
    try:
        claims = service.signer.verify(auth.REFRESH, body.refresh_token)
    except auth.InvalidToken:
        raise Problem("invalid_grant") from None
    session = await service.db.rotate(claims.sid, claims.sub, claims.jti)
    if session and session.ended_by_reuse:
        log_event("token_reused", logging.WARNING, user=session.username, client=request.state.client)
    if session is None or session.ended_by_reuse:
        raise Problem("invalid_grant")
    request.state.username = session.username
    return tokens_of(service, session)


@sessions.post("/logout", summary="Log out", status_code=204, response_class=Response,
               openapi_extra=form_or_json(RefreshToken))
async def logout(request: Request) -> None:
    """Ends the session: its access and refresh tokens stop working at once."""
    body: RefreshToken = await read_fields(request, RefreshToken)
    service = service_of(request)
    with contextlib.suppress(auth.InvalidToken):  # 204 all the same (RFC 7009, 2.2)
        claims = service.signer.verify(auth.REFRESH, body.refresh_token, allow_expired=True)
        if username := await service.db.end_session(claims.sid, claims.sub):
            log_event("logged_out", user=username, client=request.state.client)


@health.get("/healthz", summary="Is the process alive?")
async def healthz() -> Health:
    """Answers as long as the process serves."""
    return Health()


@health.get("/readyz", summary="Can documents be taken?")
async def readyz(request: Request) -> Health:
    """Writes to the database and to the file store. Error: `unavailable`."""
    service = service_of(request)
    await run_in_threadpool(service.storage.check)
    await service.db.check_writable()
    return Health()


# The application

DESCRIPTION = """**Authorize** (by default `admin` and the text of `data/initial-password`), **upload a PDF or DOCX**,
**start processing** with its `document_id`, **see how processing goes** with `wait` = 10, and **get the result**."""


def create_app(settings: Settings | None = None, *, storage: Storage | None = None,
               pipeline: Pipeline | None = None) -> FastAPI:
    """The service; by default with the settings of the environment, the local disk and the simulated pipeline."""
    if not logging.getLogger().handlers:  # else somebody configured it: gunicorn, `--log-config` with a root logger
        logging.config.dictConfig(LOGGING)
    return FastAPI(
        title="Document Lifecycle API", version="1.0.0", description=DESCRIPTION, redoc_url=None,
        lifespan=lambda _: running_service(settings or Settings.from_environment(os.environ), storage, pipeline),
        redirect_slashes=False, telemetry={"tracing": False, "metrics": False, "logs": False},  # nobody collects it
        exception_handlers={HTTPException: raise_again, RequestValidationError: raise_again},
        middleware=[Middleware(RequestMiddleware)],
        # Not by `include_router`, which would match each path twice.
        routes=[*uploads.routes, *documents.routes, *sessions.routes, *health.routes])


@contextlib.asynccontextmanager
async def running_service(
        settings: Settings, storage: Storage | None, pipeline: Pipeline | None) -> AsyncIterator[dict[str, Any]]:
    """The service, from its start to its end. What it yields is in the state of each request. After SIGTERM:

    1. `follow_uvicorn` stops the workers within 0.1 s: no more claims, long polls are answered, the grace begins.
    2. uvicorn waits for open requests. At the end of the grace (set at the start) it cancels them: they get 503.
    3. This function goes on after its `yield`. Runs have what is left of the grace, then writes have a second.
    4. uvicorn raises the signal again: the process ends. (As process 1, or at Ctrl-C, it first waits for threads.)"""
    log.setLevel(settings.log_level)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS allows less than its hard limit says
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 65536)), hard))  # an upload takes two of them
    gc.set_threshold(10_000)  # full collections, which stop everything for 20 ms, doubled the p99 of small uploads
    service = Service(settings, storage, pipeline)
    if not service.db.has_users():
        file = settings.data_dir / "initial-password"
        password = settings.admin_password or secret_file(service.db, file)
        if await service.db.add_first_user(settings.admin_username, auth.hash_password(password)):
            log_event("first_user_added", user=settings.admin_username,
                      password_file=None if settings.admin_password else str(file))
    tasks = [asyncio.create_task(work) for work in (
        follow_uvicorn(service), repeat(service.workers.keep_leases, min(1.0, settings.lease_seconds / 4)),
        repeat(service.remove_deleted_files, 0.5),
        *(repeat(service.workers.work, 0.1) for _ in range(settings.process_workers)))]
    yield {"service": service}
    await service.workers.close()
    for task in tasks:
        task.cancel()
    service.db.close()


async def repeat(action: Callable[[], Awaitable[None]], seconds: float) -> None:
    while True:
        try:
            await action()
        except Exception as failure:  # the next round may get over it
            log_event("background_error", logging.ERROR, failure=failure)
            await asyncio.sleep(1)
        await asyncio.sleep(seconds)


async def follow_uvicorn(service: Service) -> None:
    """Gives uvicorn's server the grace, and at SIGTERM stops workers and long polls: the lifespan ends only later."""
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)  # uvicorn's handler is a method of its server
    if not isinstance(server, uvicorn.Server):
        return  # other servers have settings of their own for the grace
    server.config.timeout_graceful_shutdown = service.settings.shutdown_seconds  # type: ignore[assignment]
    while not server.started:
        await asyncio.sleep(0.05)
    set_socket_options(server, service.settings.upload_idle_seconds)
    while not server.should_exit:
        await asyncio.sleep(0.1)
    service.workers.stop()


def set_socket_options(server: uvicorn.Server, idle_seconds: float) -> None:
    """Connections inherit them (tcp(7)). Without TCP_NODELAY, which asyncio leaves out when uvicorn runs several
    workers, answers may wait 40 ms. TCP_USER_TIMEOUT ends a connection whose client takes nothing."""
    for listening in [sock for each in server.servers for sock in each.sockets]:
        with contextlib.suppress(OSError, AttributeError):  # a Unix socket; macOS has no TCP_USER_TIMEOUT
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * idle_seconds) or 1)


# Commands

def main(storage: Storage | None = None) -> int:
    """The command line: users, and a check of the files. The server is `uvicorn main:app`."""
    parser = argparse.ArgumentParser(description="Users and files of the Document Lifecycle API.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("add-user", help="add a user, or set a new password").add_argument("name")
    commands.add_parser("remove-user", help="remove a user and that user's documents").add_argument("name")
    commands.add_parser("check", help="list stored files without a document, and documents without a file")
    chosen = parser.parse_args()
    try:
        settings = Settings.from_environment(os.environ)
        if chosen.command == "add-user":
            password = getpass.getpass("Password: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
            if sys.stdin.isatty() and getpass.getpass("Once more: ") != password:
                raise ValueError("the two passwords differ")
            if not (1 <= len(chosen.name) <= 128 and 8 <= len(password) <= 1024):
                raise ValueError("a name has 1 to 128 characters, a password 8 to 1,024")
        elif not (settings.data_dir / "documents.db").exists():
            raise ValueError(f"there is no database in {settings.data_dir}")
        db, _ = open_stores(settings, storage)
        with contextlib.closing(db):
            if chosen.command == "check":
                strays, lost = db.compare_files()
                found = [f"no document has the file {key}" for key in strays] + [
                    f"the document {document_id} has no file" for document_id in lost]
                print(*found, f"{len(found)} files and documents lack each other in {settings.data_dir}", sep="\n")
                return 1 if found else 0
            if chosen.command == "add-user":
                db.set_user(chosen.name, auth.hash_password(password)).result()
            elif not db.remove_user(chosen.name).result():
                raise ValueError(f"there is no user {chosen.name} in {settings.data_dir}")
        print(f"{chosen.command} {chosen.name}: done in {settings.data_dir}")
        return 0
    except (ValueError, OSError, sqlite3.Error, EOFError, KeyboardInterrupt) as error:
        print(f"{chosen.command}: {str(error) or 'stopped'}", file=sys.stderr)
        return 1


app = create_app()

if __name__ == "__main__":
    sys.exit(main())
