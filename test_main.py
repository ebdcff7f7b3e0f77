"""Each rule of the service has a test that is named after it. They use the real app, files, SQLite and processes."""
import asyncio
import base64
import contextlib
import encodings
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import io
import itertools
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
import unicodedata
import uuid
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPMessage, HTTPResponse
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import quote

import httpx
import jwt
import pytest
import uvicorn

import auth
import main
import storage
from db import SESSION_SECONDS, Database, Document, InDoubt, write
from main import Settings, create_app
from storage import DOCX, BadDocument, LocalStorage, Storage, check_is_docx, check_is_whole, fsync_folder

pytestmark = pytest.mark.filterwarnings("error")

T = TypeVar("T")
Patch = pytest.MonkeyPatch
HERE = Path(__file__).parent
PASSWORD = "correct horse battery"
SECRET = "canary-key-0123456789-0123456789"
UPLOAD_LIMIT = 5_000_000
IO_ERROR, DISK_FULL, DATABASE_ERROR = OSError(errno.EIO, "broken"), OSError(errno.ENOSPC, "full"), sqlite3.Error()
sys.setrecursionlimit(20_000)
DEPTH = 300 if sys.version_info[:2] == (3, 12) else 2500  # more than SQLite's json() takes, and Python 3.12's
DEEP = json.loads("[" * DEPTH + "]" * DEPTH)
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
NOBODYS = "/documents/00000000-0000-4000-8000-000000000000"
PDF = b"%PDF-1.7\n1 0 obj << /Type /Catalog >> endobj\ntrailer << /Root 1 0 R >>\n%%EOF\n"
MAIN_PART = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
CONTENT_TYPES = ('<?xml version="1.0"?><Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
                 f'<Override PartName="/word/document.xml" ContentType="{MAIN_PART}"/></Types>')


def zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name)  # whose date is always the same
            info.extra = b"\xca\xfe\0\0"  # as some writers add behind a name, in both headers
            archive.writestr(info, content, compression)
    return file.getvalue()


def docx(main_part: str = MAIN_PART, compression: int = zipfile.ZIP_DEFLATED,
         entries: dict[str, bytes] | None = None) -> bytes:  # more of them, or other ones, by name
    types = CONTENT_TYPES.replace(MAIN_PART, main_part).encode()
    return zipped({"[Content_Types].xml": types, "word/document.xml": b"<document/>", **(entries or {})}, compression)


def until(condition: Callable[[], T], seconds: float = 30) -> T:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(FileNotFoundError):  # a file that is looked at may go
            if answer := condition():
                return answer
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="session", autouse=True)
def quick_passwords() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auth, "SCRYPT", "scrypt$64$8$5")
        patch.delattr("http.cookies._unquote")  # quadratic before Python 3.11.10: no request may lead there
        yield


def settings_in(folder: Path, **settings: Any) -> Settings:
    defaults = {"data_dir": folder / "data", "admin_password": PASSWORD, "process_seconds": 0}
    return Settings.model_validate(defaults | settings)


@contextlib.contextmanager
def running(settings: Settings, **options: Any) -> Iterator[httpx.Client]:
    """A client that is logged in as admin of a server in another thread."""
    server = uvicorn.Server(uvicorn.Config(create_app(settings, **options), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        host, port = server.servers[0].sockets[0].getsockname()
        with httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as client:
            password = settings.admin_password or (settings.data_dir / "initial-password").read_text()
            client.headers.update(bearer(log_in(client, password=password)))
            yield client
    finally:
        server.should_exit = True
        thread.join()
        assert not server.lifespan.should_exit, "the lifespan failed"
        assert server.lifespan.state["service"].open_uploads == 0


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Settings]]:
    """One server for all tests that need no other settings. They delete nothing there."""
    settings = settings_in(tmp_path_factory.mktemp("shared"), jwt_secret=SECRET, max_upload_bytes=UPLOAD_LIMIT,
                           upload_idle_seconds=0.5)
    with running(settings) as client:
        yield client, settings


@pytest.fixture
def client(shared: tuple[httpx.Client, Settings]) -> httpx.Client:
    return shared[0]


def stored_files(settings: Settings) -> list[str]:
    return sorted(os.listdir(settings.data_dir / "files"))


def log_in(client: httpx.Client, username: str = "admin", password: str = PASSWORD) -> dict[str, Any]:
    answer = client.post("/auth/login", data={"username": username, "password": password})
    assert answer.status_code == 200, answer.text
    return cast(dict[str, Any], answer.json())


def bearer(tokens: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {tokens['access_token']}"}


def upload(client: httpx.Client, content: bytes = PDF, filename: str = "a.pdf", **headers: str) -> httpx.Response:
    return client.post("/documents/upload", files={"file": (filename, content)}, headers=headers)


def uploaded(client: httpx.Client, content: bytes = PDF, filename: str = "a.pdf") -> str:
    answer = upload(client, content, filename)
    assert answer.status_code == 201, answer.text
    return str(answer.headers["Location"])


def id_in(path: str) -> str:
    return path.rpartition("/")[2]


def processed(client: httpx.Client, path: str) -> dict[str, Any]:
    assert client.post(f"{path}/process").status_code in (200, 202)
    until(lambda: client.get(f"{path}/status").json()["status"] != "PROCESSING")
    return cast(dict[str, Any], client.get(f"{path}/status").json())


def pages(client: httpx.Client, url: str) -> Iterator[list[dict[str, Any]]]:
    while url:
        answer = client.get(url)
        yield answer.json()
        url = answer.links.get("next", {}).get("url", "")


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json().get("code", "")


class Server:
    """`uvicorn main:app` on a free port, as a user starts it; stopped at the end of the `with` block."""

    def __init__(self, folder: Path, *arguments: str, app: str = "main:app", **environment: str) -> None:
        if not (folder / "data").exists() and environment.get("DOCS_JWT_SECRET", SECRET) == SECRET:
            add_user(settings_in(folder), "admin")  # whose password is hashed quickly
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        self.url, self.output_file = f"http://127.0.0.1:{port}", folder / f"output-{time.monotonic_ns()}"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DOCS_")}
        with self.output_file.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", app, "--port", port, *arguments], cwd=HERE, stdout=output,
                stderr=output, env=inherited | {
                    "DOCS_DATA_DIR": str(folder / "data"), "DOCS_ADMIN_PASSWORD": PASSWORD, **environment})

    def __enter__(self) -> "Server":
        with httpx.Client(base_url=self.url) as probe:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    probe.get("/healthz")
                    return self
                assert self.process.poll() is None, self.output()
                time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    def client(self) -> httpx.Client:
        with httpx.Client(base_url=self.url) as client:
            return httpx.Client(base_url=self.url, headers=bearer(log_in(client)), timeout=60)

    def output(self) -> str:
        return self.output_file.read_text()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output().splitlines()]


Process = tuple[Server, httpx.Client, Path]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A process behind a path prefix that waits a second for a silent client; its client; its data."""
    folder, settings = tmp_path_factory.mktemp("server"), {"DOCS_UPLOAD_IDLE_SECONDS": "1", "DOCS_LOG_LEVEL": "DEBUG",
                                                           "DOCS_PROCESS_SECONDS": "0", "DOCS_JWT_SECRET": SECRET}
    with Server(folder, "--root-path", "/api", **settings) as server, server.client() as client:
        yield server, client, folder / "data"


def sql(data: Path, statement: str, *values: Any) -> list[Any]:
    with contextlib.closing(sqlite3.connect(data / "documents.db", timeout=30)) as connection, connection:
        return connection.execute(statement, values).fetchall()


def test_importing_main_has_no_side_effects(tmp_path: Path) -> None:
    code = """if True:
        import logging, sys
        logging.basicConfig(stream=sys.stdout, format="%(process)d %(threadName)s %(message)s")
        state = lambda: [str(vars(logging.getLogger(name))) for name in ("", "uvicorn", "uvicorn.access")]
        before = state()
        import main
        assert before == state()
        logging.warning("hello")"""
    output = subprocess.check_output([sys.executable, "-B", "-W", "error", "-c", code], cwd=tmp_path, env={
        **os.environ, "PYTHONPATH": str(HERE), "DOCS_JWT_SECRET": "too short", "DOCS_MAX_QUEUE": "none"})
    assert re.fullmatch(rb"\d+ MainThread hello\n", output) and os.listdir(tmp_path) == []


def test_every_file_is_private_whatever_the_folder(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with contextlib.ExitStack() as stack:
        stack.callback(os.umask, os.umask(0))
        data.mkdir(mode=0o755)
        (data / ".gitkeep").touch(0o644)
        (data / "jwt-secret.part").touch(0o600)  # as a crash may leave it
        uploaded(stack.enter_context(running(settings_in(tmp_path, admin_password=None))))
        modes = {path.name: path.stat().st_mode & 0o777 for path in data.rglob("*")}
    assert (modes.pop(".gitkeep"), modes.pop("files"), {*modes.values()}) == (0o644, 0o700, {0o600})
    assert len(modes) == 7 and {"documents.db-wal", "documents.db.lock", "jwt-secret", "initial-password"} < {*modes}


@pytest.mark.parametrize("name, value", [
    ("ACCESS_TOKEN_SECONDS", "0"), ("REFRESH_TOKEN_SECONDS", "a week"), ("MAX_UPLOAD_BYTES", "-1"),
    ("UPLOAD_IDLE_SECONDS", "nan"), ("PROCESS_WORKERS", "1.5"), ("PROCESS_SECONDS", "inf"), ("LEASE_SECONDS", ""),
    ("MAX_ATTEMPTS", "0"), ("MAX_QUEUE", "many"), ("SHUTDOWN_SECONDS", "-1"), ("LOG_LEVEL", "LOUD"), ("DATA_DIR", ""),
    ("ADMIN_USERNAME", ""), ("ADMIN_PASSWORD", "canary7")])
def test_bad_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"^DOCS_{name}: .*(should|valid path)") as failure:
        Settings.from_environment({f"DOCS_{name}": value})
    assert "\n" not in str(failure.value) and "canary" not in str(failure.value)


def command(settings: Settings, *arguments: str, typed: str = "") -> tuple[int, str]:
    """What `python main.py` with these arguments returns and prints. `typed` is its standard input."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        patch.setenv("DOCS_DATA_DIR", str(settings.data_dir))
        patch.setattr(sys, "stdin", io.StringIO(typed))
        patch.setattr(sys, "argv", ["main.py", *arguments])
        return main.main(), output.getvalue()


def add_user(settings: Settings, username: str, password: str = PASSWORD) -> None:
    code, told = command(settings, "add-user", username, typed=f"{password}\n")
    assert code == 0, told


def test_users_are_added_changed_and_removed_while_the_server_runs(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with running(settings) as client:
        add_user(settings, "eve", "the first")
        as_eve = bearer(log_in(client, "eve", "the first"))
        path = upload(client, PDF, "a.pdf", **as_eve).headers["Location"]
        add_user(settings, "eve", "the second")
        assert client.get(path, headers=as_eve).status_code == 401  # her sessions have ended
        assert guess(client, "the first", "eve") == 401
        as_eve = bearer(log_in(client, "eve", "the second"))
        assert client.get(path, headers=as_eve).status_code == 200  # her documents are still hers
        assert command(settings, "remove-user", "eve")[0] == 0
        assert client.get(path, headers=as_eve).status_code == 401
        for *arguments, typed in (["remove-user", "eve", ""], ["add-user", "eve", ""], ["add-user", "eve", "7 chars"],
                                  ["add-user", "eve", "canary" * 200], ["add-user", "e" * 129, PASSWORD]):
            code, told = command(settings, *arguments, typed=f"{typed}\n")
            assert code == 1 and re.fullmatch(f"{arguments[0]}: .+\n", told) and (not typed or typed[:7] not in told)


def test_commands_tell_the_folder(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = Settings.model_construct(data_dir=Path("~/x"))
    assert command(settings, "add-user", "eve", typed="7 chars")[0] == 1
    for arguments, status in (("remove-user eve", 1), ("add-user eve", 0), ("remove-user eve", 0)):
        code, told = command(settings, *arguments.split(), typed="8 chars.\n")
        assert (code, (tmp_path / "x").exists()) == (status, status == 0) and str(tmp_path / "x") in told


def test_no_file_is_removed_because_the_database_does_not_know_it(tmp_path: Path, monkeypatch: Patch) -> None:
    settings = settings_in(tmp_path, lease_seconds=0.5)
    with running(settings) as client:
        kept, lost = uploaded(client), uploaded(client)
    folder = settings.data_dir / "files"
    (folder / "a-stray").write_bytes(PDF)
    os.utime(folder / "a-stray", (0, 0))
    with running(settings) as client:
        assert client.delete(deleted := uploaded(client)).status_code == 204
        until(lambda: id_in(deleted) not in stored_files(settings))
        assert stored_files(settings) == sorted(["a-stray", id_in(kept), id_in(lost)])
        (folder / id_in(lost)).unlink()
        assert code_of(client.get(f"{lost}/file")) == (503, "unavailable")
        status = processed(client, lost)
        assert (status["attempts"], status["error"]["code"], status["error"]["retryable"]) == (3, "interrupted", True)
    code, told = command(settings, "check")
    assert code == 1 and str(settings.data_dir) in told
    assert ["a-stray" in told, *(id_in(path) in told for path in (lost, kept, deleted))] == [True, True, False, False]
    keys = {id_in(kept), "old", "new"}

    def delete_new(_: float) -> None:  # between the two looks
        sql(settings.data_dir, "INSERT INTO deleted_files VALUES ('new')")

    def slow_keys(_: LocalStorage) -> Iterator[str]:
        yield from keys
        keys.discard("old")
        for table in ("documents", "deleted_files"):  # as if a server had deleted the documents and files meanwhile
            sql(settings.data_dir, f"DELETE FROM {table}")
    monkeypatch.setattr(LocalStorage, "keys", slow_keys)
    monkeypatch.setattr(time, "sleep", delete_new)
    assert command(settings, "check")[0] == 0


def make_database(file: Path, version: int, *tables: str) -> None:
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.executescript(f"PRAGMA user_version = {version};" + "".join(f"CREATE TABLE {t} (x);" for t in tables))


@pytest.mark.parametrize("spoil, told", [
    (lambda file: None, "there are stored files, but .* is missing"),
    (lambda file: make_database(file, 0), "there are stored files, but .* has no tables"),
    (lambda file: file.write_bytes(b"This is no database. " * 1000), "not a database"),
    (lambda file: make_database(file, 2, "sessions"), "another version"),
    (lambda file: make_database(file, 3, "x"), "another"), (Path.mkdir, "I/O error|directory")], ids=itertools.count())
def test_an_unusable_database_is_left_as_it_is(tmp_path: Path, spoil: Callable[[Path], Any], told: str) -> None:
    file, stored = tmp_path / "data" / "documents.db", tmp_path / "data" / "files" / "precious"
    stored.parent.mkdir(parents=True)
    stored.touch()
    spoil(file)
    before = file.exists() and (file.is_dir() or file.read_bytes())
    code, output = command(settings_in(tmp_path), "add-user", "eve", typed=PASSWORD)
    assert code == 1 and re.search(told, output, re.IGNORECASE) and output.count("\n") == 1
    assert (file.exists() and (file.is_dir() or file.read_bytes())) == before and stored.exists()


def test_a_refused_start_touches_nothing(tmp_path: Path) -> None:
    crashed = settings_in(tmp_path / "crashed")
    with running(settings_in(tmp_path)) as client:
        path = uploaded(client)
        shutil.copytree(tmp_path / "data", crashed.data_dir)
    database = (crashed.data_dir / "documents.db").rename(tmp_path / "moved")  # its write-ahead log stays behind
    with pytest.raises(ValueError, match="is missing"):
        main.open_stores(crashed)
    database.rename(crashed.data_dir / "documents.db")
    with running(crashed) as client:
        assert client.get(path).status_code == 200


def test_a_setting_that_is_unusable_stops_the_start_with_one_line(tmp_path: Path) -> None:
    server = Server(tmp_path, DOCS_JWT_SECRET="canary-0123456789-0123456789-01")
    assert server.process.wait(30) != 0
    error, _ = [line["event"] for line in server.lines() if line["level"] == "ERROR"]  # the other one is uvicorn's
    assert error.startswith("ValueError: DOCS_JWT_SECRET: ") and "canary" not in server.output()
    assert not (tmp_path / "data" / "documents.db").exists()


def test_a_start_asks_no_more_of_the_disk_than_it_needs(tmp_path: Path, monkeypatch: Patch) -> None:
    def refuse(name: str, error: int, refused: Callable[[Any], bool], real: Callable[..., Any]) -> None:
        def call(first: Any, *rest: Any, **options: Any) -> Any:
            if refused(first):
                raise OSError(error, "refused")
            return real(first, *rest, **options)
        monkeypatch.setattr(os, name, call)

    def is_folder(descriptor: int) -> bool:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        return stat.S_ISDIR(os.fstat(descriptor).st_mode)
    fsync, synced, settings = os.fsync, set[str](), settings_in(tmp_path / "new" / "deep")
    monkeypatch.delattr(os, "link")
    refuse("open", errno.EACCES, lambda path: Path(path) == tmp_path, os.open)  # may be entered but not listed
    for error in (errno.EINVAL, errno.ENOTSUP):
        refuse("fsync", error, is_folder, fsync)
        with running(settings) as client:
            uploaded(client)
    made = settings.data_dir, settings.data_dir.parent
    assert {str(folder) for folder in (*made, tmp_path / "new")} <= synced
    assert {folder.stat().st_mode & 0o777 for folder in made} == {0o700}
    refuse("fsync", errno.EIO, is_folder, fsync)
    with pytest.raises(OSError, match="refused"):
        fsync_folder(tmp_path.parent)


def test_request_id_is_the_clients_own_when_it_is_plain(client: httpx.Client) -> None:
    for sent in ("a", "x" * 64, "A.b_c-9"):
        assert client.get("/healthz", headers={"X-Request-ID": sent}).headers["X-Request-ID"] == sent
    for bad in (b"", b"x" * 65, b"a b", b'a"', b"a\xe4"):
        assert uuid.UUID(client.get("/healthz", headers={b"X-Request-ID": bad}).headers["X-Request-ID"])


def test_a_422_names_the_field_and_never_echoes_the_input(client: httpx.Client) -> None:
    answer = client.post("/auth/login", json={"username": "canary-name", "password": ["canary-password"]})
    assert (answer.status_code, "canary" in answer.text) == (422, False)
    assert answer.json()["errors"] == [{"loc": ["body", "password"], "msg": "Input should be a valid string"}]
    for query in ("limit=canary", "status=canary", "cursor=canary"):
        answer = client.get(f"/documents?{query}")
        assert (answer.json()["errors"][0]["loc"], "canary" in answer.text) == (["query", query[:-7]], False)
    assert client.post("/documents/upload", files={"x": PDF}).json()["errors"][0]["loc"] == ["body", "file"]


def test_every_answer_says_who_may_keep_or_frame_it_and_head_says_the_same(tmp_path: Path, monkeypatch: Patch) -> None:
    with running(settings_in(tmp_path)) as client:
        path = uploaded(client)
        gets = [client.get(url) for url in (path, f"{path}/status", f"{path}/result", "/documents",
                "/documents?limit=0", "/docs", "/openapi.json", "/healthz", "/readyz", "/auth/login", "/nowhere")]
        files = [client.get(f"{path}/file")]
        for got in gets + files:
            head = client.head(got.url)
            assert (head.status_code, head.content, head.headers.keys()) == (got.status_code, b"", got.headers.keys())
            assert all(head.headers[name] == got.headers[name] for name in {*got.headers} - {"date", "x-request-id"})
            assert path not in str(got.url) or client.head(got.url, headers={"Authorization": ""}).status_code == 401
        files.append(client.get(files[0].url, headers={"If-None-Match": files[0].headers["ETag"]}))
        bodies: list[Any] = [{"username": "admin", "password": PASSWORD}, {"refresh_token": "x"}, []]
        answers = [client.post(f"/auth/{route}", json=body) for route in ("login", "refresh", "logout")
                   for body in bodies]
        answers += [upload(client), upload(client, b"", "a.exe"), client.put(path), client.post(f"{path}/process"),
                    client.delete(path), client.get(path), client.get(path, headers={"Authorization": "Bearer x"})]
        monkeypatch.setattr(Database, "documents", None)
        answers += [client.get("/documents"), *gets, *files]
        statuses = {200, 201, 202, 204, 304, 401, 404, 405, 409, 415, 422, 500}
        assert {answer.status_code for answer in answers} == statuses
        for answer in answers:
            told = [answer.headers.get(name) for name in ("X-Frame-Options", "X-Content-Type-Options", "Cache-Control")]
            assert told == ["DENY", "nosniff", "private, no-cache" if answer in files else "no-store"], answer.url


def test_paths_are_right_behind_a_prefix(server: Process) -> None:
    client, locations = server[1], [upload(server[1], Host=host).headers["Location"] for host in ("x", "evil/x?")]
    assert all(re.fullmatch("/api/documents/[0-9a-f-]{36}", location) for location in locations)
    path = locations[0].removeprefix("/api")  # as the proxy does
    assert client.post(f"{path}/process").headers["Location"] == f"{locations[0]}/status"
    link = client.get("/documents?limit=1").headers["Link"].partition(">")[0]
    assert link.startswith("</api/") and client.get(link[5:]).json()[0]["document_id"] == path[-36:]
    for url, allow in (("/documents/upload", "POST"), (path, "DELETE, GET, HEAD"), ("/documents", "GET, HEAD")):
        answer = client.put(url)
        assert (answer.status_code, answer.headers["Allow"]) == (405, allow)
    paths = {line["path"] for line in server[0].lines() if line["event"] == "request"}
    assert {"/documents/upload", f"{path}/process"} <= paths and not any("/api" in logged for logged in paths)


def guess(client: httpx.Client, password: str, username: str = "admin", **headers: str) -> int:
    return client.post("/auth/login", data={"username": username, "password": password}, headers=headers).status_code


def test_login_takes_form_and_json(client: httpx.Client) -> None:
    fields, began = {"username": "admin", "password": PASSWORD, "grant_type": "password"}, time.time()
    for answer in (client.post("/auth/login", data=fields), client.post("/auth/login", json=fields)):
        assert (answer.status_code, answer.headers["Cache-Control"]) == (200, "no-store")
        assert list(answer.json().values())[1:3] == ["bearer", 900] and answer.json()["refresh_expires_in"] == 604800
        for token, life in ((answer.json()["access_token"], 900), (answer.json()["refresh_token"], 604800)):
            assert began <= claims_of(token)["exp"] - life <= time.time()  # to the part of a second


def test_an_unknown_user_costs_the_work_of_a_wrong_password(client: httpx.Client, monkeypatch: Patch) -> None:
    work, scrypt = list[dict[str, Any]](), hashlib.scrypt

    def counted(secret: bytes, **options: Any) -> bytes:
        work.append({**options, "salt": len(options["salt"])})
        return scrypt(secret, **options)
    monkeypatch.setattr(hashlib, "scrypt", counted)
    answers = [client.post("/auth/login", data={"username": name, "password": "wrong"}) for name in ("nobody", "admin")]
    assert guess(client, PASSWORD) == 200
    assert len(work) == 3 and all(done == work[0] for done in work)
    problems = [{**answer.json(), "request_id": None} for answer in answers]
    assert problems[0] == problems[1] and code_of(answers[0]) == (401, problems[0]["error"]) == (401, "invalid_grant")


def test_five_failures_throttle_one_name_from_one_address(tmp_path: Path) -> None:
    with running(settings_in(tmp_path)) as client:
        for _ in range(2):  # a login forgets the failures before it
            assert [guess(client, "wrong") for _ in range(4)] == [401] * 4
            assert log_in(client)
        assert [guess(client, "wrong") for _ in range(20)] == [401] * 5 + [429] * 15
        answer = client.post("/auth/login", data={"username": "admin", "password": PASSWORD})
        assert code_of(answer) == (429, "too_many_attempts") and 800 < int(answer.headers["Retry-After"]) <= 900
        assert guess(client, "wrong", "other") == 401
        elsewhere = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(base_url=client.base_url, transport=elsewhere) as other_address:
            assert log_in(other_address)


def test_of_parallel_guesses_only_five_are_answered(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with running(settings) as client, running(settings) as other_process, ThreadPoolExecutor(10) as pool:
        answers = pool.map(lambda i: guess((client, other_process)[i % 2], f"wrong {i}"), range(30))
        assert sorted(answers) == [401] * 5 + [429] * 25
        assert guess(client, PASSWORD) == 429


def test_a_right_guess_among_wrong_ones_is_not_told_apart(tmp_path: Path, monkeypatch: Patch) -> None:
    verify, arrived, go = auth.verify_password, threading.Event(), threading.Event()

    def held(password: str, password_hash: str | None) -> bool:
        if password == PASSWORD:
            arrived.set()
            assert go.wait(30)
        return verify(password, password_hash)
    with running(settings_in(tmp_path)) as client, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(auth, "verify_password", held)
        right = pool.submit(guess, client, PASSWORD)
        assert arrived.wait(30)  # it was let in before there was any failure
        assert [guess(client, "wrong") for _ in range(6)] == [401] * 5 + [429]
        go.set()
        assert right.result() == 429


def test_guesses_from_one_ipv6_network_are_throttled(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "127.0.0.1")
    with running(settings_in(tmp_path)) as client:
        for addresses in (["2001:db8::1", "2001:db8::2:1", "2001:db8:0:0:ffff:ffff:ffff:ffff"] * 2,
                          ["192.0.2.1", "::ffff:192.0.2.1", "::ffff:c000:201"] * 2):
            statuses = [guess(client, "wrong", **{"X-Forwarded-For": address}) for address in addresses]
            assert statuses == [401] * 5 + [429]
        assert guess(client, PASSWORD, **{"X-Forwarded-For": "2001:db8:0:1::1"}) == 200


def test_few_logins_of_one_address_wait_and_none_whose_client_has_gone(tmp_path: Path, monkeypatch: Patch) -> None:
    checked, go, verify = list[str](), threading.Event(), auth.verify_password

    def slow(password: str, password_hash: str | None) -> bool:
        checked.append(password)
        return go.wait(30) and verify(password, password_hash)
    with running(settings_in(tmp_path)) as client, ThreadPoolExecutor(25) as pool, httpx.Client(
            base_url=client.base_url, transport=httpx.HTTPTransport(local_address="127.0.0.2")) as elsewhere:
        monkeypatch.setattr(auth, "verify_password", slow)
        try:
            attempts = [pool.submit(guess, client, PASSWORD) for _ in range(24)]
            until(lambda: sum(attempt.done() for attempt in attempts) == 14)  # the others wait
            assert client.post("/auth/login", data={"username": "x", "password": "x"}).headers["Retry-After"] == "1"
            for _ in range(5):
                with pytest.raises(httpx.TimeoutException):  # and closes the connection
                    elsewhere.post("/auth/login", data={"username": "gone", "password": "gone"}, timeout=0.05)
            attempts.append(pool.submit(guess, elsewhere, PASSWORD))
            assert client.get("/documents").status_code == 200 and 0 < len(checked) < 11
        finally:
            go.set()
        assert sorted(attempt.result() for attempt in attempts) == [200] * 11 + [429] * 14
        assert guess(client, PASSWORD) == 200 and checked == [PASSWORD] * 12  # there is room again


def refresh(client: httpx.Client, token: str) -> httpx.Response:
    return client.post("/auth/refresh", json={"refresh_token": token})


def allowed(client: httpx.Client, tokens: dict[str, Any]) -> bool:
    return client.get("/documents?limit=1", headers=bearer(tokens)).status_code == 200


@pytest.mark.parametrize("seconds, times, good", [(-8, 1, True), (-11, 1, False), (11, 1, False), (0, 2, False)])
def test_a_refresh_token_is_good_for_ten_seconds_more_unless_its_successor_was_used(
        shared: tuple[httpx.Client, Settings], seconds: float, times: int, good: bool) -> None:
    client, settings = shared
    tokens = [log_in(client)]
    for _ in range(times):
        tokens.append(refresh(client, tokens[-1]["refresh_token"]).json())
    assert len({each["refresh_token"] for each in tokens}) == times + 1
    assert all(allowed(client, each) for each in tokens)
    sql(settings.data_dir, "UPDATE sessions SET rotated_at = rotated_at + ? WHERE session_id = ?", seconds,
        claims_of(tokens[0]["access_token"])["sid"])
    again = refresh(client, tokens[0]["refresh_token"])
    assert (again.status_code, again.json().get("code")) == ((200, None) if good else (401, "invalid_grant"))
    assert not good or claims_of(again.json()["refresh_token"])["iat"] < time.time() - 7  # it is no new one
    assert {allowed(client, each) for each in tokens} == {good}
    assert refresh(client, tokens[-1]["refresh_token"]).status_code == again.status_code


def test_parallel_refreshes_get_the_same_successor_from_all_processes(server: Process, tmp_path: Path) -> None:
    with running(settings_in(tmp_path, data_dir=server[2], jwt_secret=SECRET)) as other, ThreadPoolExecutor(8) as pool:
        tokens = [log_in(other)]
        for _ in range(2):
            used = tokens[-1]["refresh_token"]
            answers = list(pool.map(lambda client: refresh(client, used).json(), [server[1], other] * 8))
            assert len({answer["refresh_token"] for answer in answers} | {used}) == 2
            tokens += answers
        assert all(allowed(client, each) for each in tokens for client in (server[1], other))


def test_a_user_keeps_the_newest_fifty_sessions(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with running(settings) as client:
        add_user(settings, "eve")
        eve, tokens = log_in(client, "eve"), [log_in(client) for _ in range(51)]
        assert [allowed(client, each) for each in [eve, *tokens]] == [True, False] + [True] * 50
        assert refresh(client, tokens[0]["refresh_token"]).status_code == 401
        assert sql(settings.data_dir, "SELECT count(*) FROM sessions") == [(51,)]


def test_logout_ends_the_session_at_once_at_all_processes_and_is_never_refused(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with running(settings) as client, running(settings) as other_process:
        tokens, other = log_in(client), log_in(client)
        assert allowed(other_process, tokens) and allowed(client, tokens)
        for token in (tokens["refresh_token"], tokens["refresh_token"], tokens["access_token"], "rubbish"):
            assert client.post("/auth/logout", data={"refresh_token": token}).status_code == 204
            assert not allowed(other_process, tokens) and not allowed(client, tokens)
        assert refresh(client, tokens["refresh_token"]).status_code == 401
        assert allowed(client, other)
        assert client.post("/auth/logout", json={}).status_code == 422


def test_a_session_outlives_no_refresh_past_its_end(client: httpx.Client, monkeypatch: Patch) -> None:
    assert SESSION_SECONDS == 30 * 86400
    monkeypatch.setattr("db.SESSION_SECONDS", 60)
    tokens = refresh(client, log_in(client)["refresh_token"]).json()
    assert max(tokens["expires_in"], tokens["refresh_expires_in"]) <= 60
    monkeypatch.setattr("db.SESSION_SECONDS", 0.5)
    tokens = log_in(client)
    until(lambda: not allowed(client, tokens))
    assert refresh(client, tokens["refresh_token"]).status_code == 401


PROTECTED = [("POST", "/documents/upload"), ("GET", "/documents"), *((method, NOBODYS + rest) for method, rest in [
    ("GET", ""), ("DELETE", ""), ("GET", "/file"), ("POST", "/process"), ("GET", "/status"), ("GET", "/result")])]


def test_every_route_of_documents_wants_a_token(client: httpx.Client) -> None:
    for method, path in PROTECTED:
        missing = client.request(method, path, headers={"Authorization": "Basic YTpi"})
        assert (*code_of(missing), missing.headers["WWW-Authenticate"]) == (401, "missing_token", "Bearer")
        bad = client.request(method, path, headers={"Authorization": "Bearer x.y.z"})
        assert (*code_of(bad), bad.headers["WWW-Authenticate"]) == (
            401, "invalid_token", 'Bearer error="invalid_token"')


def test_somebody_elses_document_is_as_unknown_as_none(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with running(settings) as client:
        theirs = uploaded(client)
        add_user(settings, "eve")
        as_eve = bearer(log_in(client, "eve"))
        assert client.get("/documents", headers=as_eve).json() == []
        for method, path in PROTECTED[2:]:
            answers = [client.request(method, path.replace(NOBODYS, of), headers=as_eve) for of in (theirs, NOBODYS)]
            problems = [{**answer.json(), "request_id": None} for answer in answers]
            assert problems[0] == problems[1] and code_of(answers[0]) == (404, "not_found")
        assert client.get(theirs).json()["status"] == "UPLOADED"


# Hostile input: tokens, requests byte by byte, and files that are not what they say


def jws(header: dict[str, Any], payload: dict[str, Any], digest: str = "sha256", secret: str = SECRET) -> str:
    """Any token, signed with HMAC; None leaves out a field. No digest: no signature."""
    def encoded(data: bytes) -> bytes:
        return base64.urlsafe_b64encode(data).rstrip(b"=")
    parts = [{name: value for name, value in fields.items() if value is not None} for fields in (header, payload)]
    signed = b".".join(encoded(json.dumps(fields).encode()) for fields in parts)
    return b".".join((signed, encoded(hmac.digest(secret.encode(), signed, digest) if digest else b""))).decode()


FORGED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {  # changes of header and payload, signature
    "another key": ({}, {}, "sha256", "x" * 32), "empty key": ({}, {}, "sha256", ""),
    **{f"alg {alg}": ({"alg": alg}, {}, "", SECRET) for alg in ("none", "None", "NONE", "nOnE", "", "HS256")},
    **{f"alg {alg}, signed": ({"alg": alg}, {}, digest, SECRET) for alg, digest in (
        ("none", "sha256"), ("hs256", "sha256"), ("RS256", "sha256"), ("HS384", "sha384"), ("HS512", "sha512"))},
    **{f"{claim} {value}": ({}, {claim: value}, "sha256", SECRET) for claim, value in (
        ("exp", 1), ("exp", "never"), ("nbf", 1), ("iss", "x"), ("aud", "x"), ("aud", [auth.ISSUER, "x"]),
        ("sid", NOBODYS[11:]), *((claim, None) for claim in ("iss", "aud", "sub", "iat", "exp", "jti", "sid")))},
    **{f"{name} {value}": ({name: value}, {}, "sha256", SECRET) for name, value in (
        ("typ", auth.REFRESH), ("typ", "JWT"), ("typ", None), ("alg", None), ("kid", "../../dev/null"), ("b64", False),
        ("jku", "http://127.0.0.1/keys"), ("jwk", {"kty": "oct", "k": ""}), ("crit", ["exp"]))}}


def challenge(client: httpx.Client, token: str) -> tuple[int, str | None]:
    answer = client.get("/documents?limit=1", headers={"Authorization": f"Bearer {token}"})
    return answer.status_code, answer.headers.get("WWW-Authenticate")


REFUSED = (401, 'Bearer error="invalid_token"')
KINDS = ((auth.ACCESS, "access_token"), (auth.REFRESH, "refresh_token"))
claims_of = functools.partial(jwt.decode, options={"verify_signature": False})


def test_a_forged_token_is_refused(client: httpx.Client) -> None:
    tokens = log_in(client)
    encoded = tokens["access_token"].split(".")[:2]
    header, payload = (json.loads(base64.urlsafe_b64decode(part + "==")) for part in encoded)
    good = jws(header, payload)
    assert challenge(client, good) == (200, None)  # so it is the change that makes it bad
    for name, (other_header, other_payload, digest, secret) in FORGED.items():
        assert challenge(client, jws(header | other_header, payload | other_payload, digest, secret)) == REFUSED, name
    other = jws(header, payload | {"sub": "x"})
    first, second, signature = good.split(".")
    for token in (f"{first}.{other.split('.')[1]}.{signature}", good[:-1], f"{first}.{second}.", f"{first}.{second}",
                  f"{good}.{signature}", f"{good}=", f"{first}=.{second}.{signature}",
                  f"{first}.{second}.{'B' if signature[0] == 'A' else 'A'}{signature[1:]}", tokens["refresh_token"]):
        assert challenge(client, token) == REFUSED, token
    for token in (tokens["access_token"], jws(header | {"typ": auth.REFRESH}, payload | {"exp": 1})):
        assert code_of(refresh(client, token)) == (401, "invalid_grant")
    assert refresh(client, tokens["refresh_token"]).status_code == 200  # no harm was done


def test_claims_of_an_odd_type_are_refused(shared: tuple[httpx.Client, Settings]) -> None:
    client, settings = shared
    tokens, anything = log_in(client), list[Any]([math.nan, math.inf, -math.inf, True, [], {}, None, ["x"]])
    add_user(settings, "mallory")
    (mallory,), = sql(settings.data_dir, "SELECT user_id FROM users WHERE username = 'mallory'")
    changes: list[dict[str, Any]] = [
        {"extra": 1}, {"exp": 1}, {"exp": "2000000000"}, {"sid": ""}, {"sid": "\ud800"}, {"sub": mallory},
        *({name: value} for name in ("exp", "iat", "sid", "sub", "jti") for value in anything)]
    for odd, (kind, name) in itertools.product(changes, KINDS):
        header, claims = {"alg": "HS256", "typ": kind}, claims_of(tokens[name]) | odd
        for token in (jws(header, claims), jwt.encode(claims, SECRET, "HS256", header)):  # None: missing, null
            if kind == auth.ACCESS:
                assert challenge(client, token) == REFUSED, odd
            else:
                assert refresh(client, token).json().get("code") == "invalid_grant", odd
    assert allowed(client, tokens) and refresh(client, tokens["refresh_token"]).status_code == 200


def test_stamps_of_the_future_are_void(tmp_path: Path) -> None:
    settings, future = settings_in(tmp_path, jwt_secret=SECRET), time.time() + 86400
    with running(settings) as client:
        path, tokens = uploaded(client), log_in(client)
    sql(settings.data_dir, "UPDATE documents SET status = 'PROCESSING', run_id = 'of a killed process', attempts = 1,"
        " queued_at = '2999-01-01T00:00:00.000000Z', beat_at = ?", future)
    for _ in range(9):
        sql(settings.data_dir, "INSERT INTO login_failures VALUES (?, '127.0.0.1', ?)",
            auth.TokenSigner(SECRET.encode()).name_hash("admin"), future)
    access_token, refresh_token = (jws({"alg": "HS256", "typ": kind}, claims_of(tokens[name]) | {"iat": int(future)})
                                   for kind, name in KINDS)
    with running(settings) as client:  # which logs in
        assert client.get(f"{path}/status?wait=30").json()["status"] == "COMPLETED"
        assert [guess(client, "wrong") for _ in range(6)] == [401] * 5 + [429]
        assert challenge(client, access_token)[0] == refresh(client, refresh_token).status_code == 200


def connected(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 80), 30)


def answer_on(connection: socket.socket) -> tuple[int, HTTPMessage, dict[str, Any]]:
    answer = HTTPResponse(connection)
    answer.begin()
    body = answer.read()
    return answer.status, answer.headers, json.loads(body) if body.startswith(b"{") else {"code": body.decode()}


def exchange(client: httpx.Client, request: bytes) -> tuple[int, HTTPMessage, dict[str, Any]]:
    """The answer to these bytes. TOKEN in them becomes the client's."""
    with connected(client) as connection:
        connection.sendall(with_token(client, request))
        return answer_on(connection)


def with_token(client: httpx.Client, request: bytes) -> bytes:
    return request.replace(b"TOKEN", client.headers["Authorization"].removeprefix("Bearer ").encode())


def wire(line: str, body: bytes = b"", /, **headers: str | None) -> bytes:
    """A request. None leaves out one of the usual headers."""
    usual = {"Host": "x", "Authorization": "Bearer TOKEN", "Content-Length": str(len(body))}
    fields = usual | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{line} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items() if value is not None), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def part(content: bytes = PDF, disposition: bytes = b'form-data; name="file"; filename="a.pdf"') -> bytes:
    return b"--b\r\nContent-Disposition: " + disposition + b"\r\n\r\n" + content + b"\r\n"


def sent(body: bytes, **headers: str | None) -> bytes:
    return wire("POST /documents/upload", body, **{"Content_Type": "multipart/form-data; boundary=b", **headers})


def file(name: str, content: bytes = PDF) -> bytes:
    """An upload. `name` as it stands between the quotes; surrogates are bytes that are no UTF-8."""
    raw = name.encode(errors="surrogateescape")
    return sent(part(content, b'form-data; name="file"; filename="' + raw + b'"') + b"--b--\r\n")


def chunked(body: bytes, size: int = 65536) -> bytes:
    pieces = [body[i:i + size] for i in range(0, len(body), size)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])
    return sent(framed, Transfer_Encoding="chunked", Content_Length=None)


def login(body: str | bytes, media_type: str = "application/json") -> bytes:
    raw = body if isinstance(body, bytes) else body.encode(errors="surrogatepass")
    return wire("POST /auth/login", raw, Content_Type=media_type, Authorization=None)


form = functools.partial(login, media_type="application/x-www-form-urlencoded")


def with_fields(name: str, entries: dict[str, bytes] | None = None, **fields: int) -> bytes:
    packed = io.BytesIO(docx(entries=entries, compression=zipfile.ZIP_STORED))
    with zipfile.ZipFile(packed, "a") as archive:
        for field, value in fields.items():
            setattr(archive.getinfo(name), field, value)
        archive.writestr(zipfile.ZipInfo("last"), b"")  # so that the directory is written again
    return packed.getvalue()


def bomb(name: str, megabytes: int) -> bytes:
    deflate, checksum, zeros = zlib.compressobj(9, zlib.DEFLATED, -15), 0, bytes(2**20)
    piece = deflate.compress(zeros) + deflate.flush(zlib.Z_FULL_FLUSH)
    for _ in range(megabytes):
        checksum = zlib.crc32(zeros, checksum)
    return with_fields(name, {name: piece * megabytes + deflate.flush()}, compress_type=zipfile.ZIP_DEFLATED,
                       file_size=megabytes * 2**20, CRC=checksum)


def typed(xml: str, encoding: str = "utf-8") -> bytes:
    return docx(entries={"[Content_Types].xml": xml.encode(encoding)})


ENTITIES = "<!DOCTYPE Types [<!ENTITY a 'x'>" + "".join(
    f"<!ENTITY {name} '{f'&{of};' * 10}'>" for of, name in zip("abcdefgh", "bcdefghi")) + "]>"
EXPANDED = CONTENT_TYPES.replace("?>", f"?>{ENTITIES}").replace("/word", "&i;/word")
MACROS = '<Default Extension="bin" ContentType="application/vnd.ms-office.vbaProject"/>'
OLE_MAGIC = bytes.fromhex("d0cf11e0a1b11ae1")

Expected = tuple[int, str]  # the filename for a 201, else the code
BAD_BODY, UNSUPPORTED, TOO_LARGE = (400, "malformed_body"), (415, "unsupported_media_type"), (413, "too_large")
INVALID, UNKNOWN, TIMEOUT = (422, "validation_error"), (404, "not_found"), (408, "upload_timeout")
NO_TOKEN, BAD_TOKEN, NO_METHOD = (401, "missing_token"), (401, "invalid_token"), (405, "method_not_allowed")
TAKEN, NOT_HTTP = (201, "a.pdf"), (400, "Invalid HTTP request received.")  # the latter is uvicorn's own answer
WHOLE, FIELD = part() + b"--b--", part(b"x", b'form-data; name="x"')
FIELDS, AROUND, MORE = (part(bytes(n), b'form-data; name="f"') * (100 // n or 1) for n in (1, 30_000, 35_000))
EXE, END = b'form-data; name="file"; filename="a.exe"', b"--b--\r\n"
BIG, JSON = PDF.ljust(8_000_000), {"Content-Type": "application/json"}  # more than the buffers of both sides take
MARKS, MOST = "\u0301" * 15_500 + "\u0323" * 15_500, "\u0323" * 125 + ".pdf"
WORD, FLAGS = b"word/document.xml", (b"PK\x03\x04\x14\0\0\0", b"PK\x03\x04\x14\0\0\x08")  # bare, UTF-8
ACCENT = docx(entries={"é": b"<a/>", "[Content_Types].xml": CONTENT_TYPES.replace("word/document.xml", "é").encode()})


def answered(expected: Expected, requests: dict[str, bytes]) -> dict[str, tuple[bytes, Expected]]:
    return {name: (request, expected) for name, request in requests.items()}


HOSTILE: dict[str, tuple[bytes, Expected]] = {
    **answered(TAKEN, {
        "a plain upload": file("a.pdf"), "chunks of a byte": chunked(WHOLE, 1), "fields": sent(FIELD * 1000 + WHOLE),
        "chunks and a length": chunked(WHOLE).replace(b"Host: x", b"Host: x\r\nContent-Length: 9"),
        "exactly the limit": file("a.pdf", PDF.ljust(UPLOAD_LIMIT))}),
    **answered(BAD_BODY, {
        **{f"Content-Type: {media_type[:40]}": sent(WHOLE, Content_Type=media_type) for media_type in (
            "multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=c",
            "multipart/form-data; boundary=" + "b" * 300)},
        "boundary of two hyphens": sent(WHOLE.replace(b"--b", b"--"), Content_Type="multipart/form-data; boundary="),
        "no body": sent(b""), "not closed": sent(part()), "ends in the header": sent(part()[:40]),
        "header of 100 KB": sent(part(disposition=b"form-data; name=" + b"x" * 100_000) + b"--b--"),
        "header name of 100 KB": sent(b"--b\r\n" + b"x" * 100_000 + b": y\r\n\r\n"),
        "length too small": sent(WHOLE, Content_Length="100"), "line break": file("a\r\nX-Evil: 1\r\n.pdf")}),
    **answered(TIMEOUT, {
        "length too large": sent(WHOLE, Content_Length="1000"),
        "silent after 3 MB": sent(part(PDF.ljust(3_000_000)), Content_Length="4000000"),
        "silent at login": wire("POST /auth/login", Content_Type="application/json", Content_Length="9")}),
    **answered(TOO_LARGE, {
        "length over the limit": sent(b"", Content_Length=str(UPLOAD_LIMIT + 10**6)),
        "length of 19 digits": sent(b"", Content_Length="9" * 19), "2,000 fields": sent(FIELD * 2000 + WHOLE),
        "one more than the limit": file("a.pdf", PDF.ljust(UPLOAD_LIMIT + 1)),
        "chunks over the limit": chunked(part(PDF.ljust(UPLOAD_LIMIT + 1))),
        "another part over the limit": chunked(part(bytes(UPLOAD_LIMIT), b'form-data; name="x"')),
        "login of 1 MB": login('{"username": "x", "password": "' + "x" * 10**6 + '"}')}),
    **answered(INVALID, {
        "closed at once": sent(b"--b--\r\n"), "two files": sent(part() * 2 + b"--b--"), "no filename": file(""),
        "file as text": sent(part(disposition=b'form-data; name="file"') + b"--b--"),
        "another name": sent(part(disposition=b'form-data; name="x"; filename="a.pdf"') + b"--b--"),
        "filename: folder": file("a.pdf/"), "empty file": file("a.pdf", b""),
        **{f"key: {key[:9]}": sent(WHOLE, Idempotency_Key=key) for key in ("", "a b", "x" * 129)},
        **{f"login: {body[:30]!r}": login(body) for body in (
            '{"username": NaN, "password": Infinity}', '{"username": "\\ud800", "password": "x"}',
            '{"username": "\ud800", "password": "x"}', b'{"username": "\xff", "password": "x"}',
            '{"username": "x", "password": "x"}'.encode("utf-16"), b"[" * 50_000, b'{"password": ' + b"[" * 50_000,
            '["x", "x"]', '{"username": ["x"], "password": {"x": "x"}}', '{"password": ' + "9" * 5000 + "}",
            '{"username": "x", "password": 1e999999999}', "null", "", '{"username": "x')},
        **{f"form: {body[:30]}": form(body) for body in ("username=x&password=", "username=x&password=" + "x" * 1025)},
        **{f"query: {query[:30]}": wire(f"GET /documents?{query}") for query in (
            "limit=0", "limit=201", "limit=x", "limit=1e1", "limit=-1", "limit=9223372036854775808",
            "limit=" + "9" * 5000, "limit=%EF%BC%91", "limit=1%00", "status=DONE", "status=uploaded'--", "cursor=x",
            "cursor=%FF%00", "cursor=2026-01-31T12:00:00.000000Z_" + "'" * 36, "cursor=" + "A" * 60_000)}}),
    **answered(UNSUPPORTED, {
        "no multipart": sent(WHOLE, Content_Type="application/pdf"), "no type": sent(WHOLE, Content_Type=None),
        "gzip": sent(WHOLE, Content_Encoding="gzip"), "login without a type": wire("POST /auth/login"),
        **{f"filename: {name!r}": file(name) for name in ("pdf", "a.exe", "a.pdf.exe", "a.pdf\0.exe", "../..")},
        "login as text": login("{}", "text/plain"), "no PDF, no end": sent(part(bytes(1100)), Content_Length="1000000"),
        **{f"PDF: {name}": file("a.pdf", content) for name, content in {
            "EXE": b"MZ\x90\0".ljust(1024), "DOCX": docx(), "behind 1,024 bytes": bytes(1024) + PDF}.items()},
        **{f"DOCX: {name}": file("a.docx", content) for name, content in {
            "PDF": PDF, "Excel": docx(MAIN_PART.replace("wordprocessingml.document", "spreadsheetml.sheet")),
            "template": docx(MAIN_PART.replace(".document.", ".template.")),
            "ODT": zipped({"mimetype": b"application/vnd.oasis.opendocument.text", "content.xml": b"<x/>"}),
            "macro-enabled": docx("application/vnd.ms-word.document.macroEnabled.main+xml"),
            "with macros": typed(CONTENT_TYPES.replace("</", f"{MACROS}</")), "encrypted": OLE_MAGIC + bytes(2000),
            "encrypted ZIP": with_fields("[Content_Types].xml", flag_bits=1),
            "unknown compression": with_fields("[Content_Types].xml", compress_type=14), "truncated": docx()[:-30],
            "the start of one": docx()[:8], "not from the start": b"x" + docx(),
            "1000:1": bomb("[Content_Types].xml", 3), "size": with_fields("[Content_Types].xml", file_size=10),
            "10,001 entries": docx(entries={str(i): b"" for i in range(9999)}, compression=zipfile.ZIP_STORED),
            "entries before the file": docx()[:-6] + b"\xff\xff\0\0" + docx()[-2:],
            "lying offset": with_fields("[Content_Types].xml", header_offset=2**31),
            "two content types": docx(entries={"[Content_Types].xmm": b"<x/>"}).replace(b".xmm", b".xml"),
            "two, in other letters": docx(entries={"[CONTENT_TYPES].XML": b"<x/>"}),
            "no XML": typed(CONTENT_TYPES[:-1]), "entity bomb": typed(EXPANDED),
            "UTF-16 bomb": typed(EXPANDED, "utf-16"), "UTF-32": typed(CONTENT_TYPES, "utf-32"),
            "DTD in UTF-16 without its mark": typed("<!DOCTYPE a>" + CONTENT_TYPES.partition("?>")[2], "utf-16-le"),
            "extern": typed(CONTENT_TYPES.replace("?>", "?><!DOCTYPE Types SYSTEM 'file:///etc/passwd'>"))}.items()}}),
    **{f"filename: {name[:20]!a}": (file(name), (201, shown)) for name, shown in {
        "a\0b.pdf\0.exe.pdf": "ab.pdf.exe.pdf", "../../etc/cron.d/a.pdf": "a.pdf", "..\\..\\a.pdf": "a.pdf",
        "C:\\fake\\a.pdf": "a.pdf", "../.pdf": "document.pdf", "x" * 10_000 + ".pdf": "x" * 251 + ".pdf",
        "\u00e4" * 300 + ".pdf": "\u00e4" * 125 + ".pdf", "a\u202efdp.exe\u202c.pdf": "afdp.exe.pdf",
        "e\u0301.pdf": "\u00e9.pdf", "a\x1b\x7f\u0085b.pdf": "ab.pdf", "\u2067\u200f.pdf": "document.pdf",
        "\udcff\udcc0\udcae.pdf": "\ufffd\ufffd\ufffd.pdf", "\udced\udca0\udc80.pdf": "\ufffd\ufffd\ufffd.pdf",
        'a\\"; filename=\\"b.exe\\".pdf': 'a"; filename="b.exe".pdf', "a\nX-Evil: 1.pdf": "aX-Evil: 1.pdf"}.items()},
    **answered(UNKNOWN, {f"GET {path[:40]}": wire(f"GET {path}") for path in (
        "/nowhere", "/documents/", "/documents/1", "/documents/00000000-0000-4000-8000-00000000000g",
        "/documents/../../etc/passwd", "/documents/..%2f..%2fdocuments.db", f"{NOBODYS}%2ffile", "/documents/%ff%c0%ae",
        "/documents/%00", "/healthz%0a", "/documents%0a", "/documents/" + "a" * 60_000)}),
    **answered(NO_METHOD, {"unknown method": wire("BREW /documents"), "another method": wire("PUT /documents")}),
    **answered(NOT_HTTP, {
        **{f"Content-Length: {length[:20]!r}": sent(b"", Content_Length=length) for length in (
            "9" * 5000, "-1", "1\r\nContent-Length: 2")},
        "no chunk": sent(b"no size\r\n", Transfer_Encoding="chunked", Content_Length=None),
        "raw byte": wire("GET /documents/\xff"),
        "no end": wire("GET /documents", X="x" * 16_329, Authorization=None)[:-4]}),  # a byte more than h11 takes
    **{f"token: {given[:40]}": (wire("GET /documents", Authorization=given), expected) for given, expected in {
        "Basic TOKEN": NO_TOKEN, "Basic YTpi\r\nAuthorization: Bearer TOKEN": NO_TOKEN, "Bearer": BAD_TOKEN,
        "Bearer TOKEN=": BAD_TOKEN, "Bearer TOKEN x": BAD_TOKEN, "Bearer x." + "A" * 60_000 + ".x": BAD_TOKEN,
        "Bearer \xe9.\xe9.\xe9": BAD_TOKEN}.items()},
    **answered(NO_TOKEN, {
        "no token": wire("GET /documents", Authorization=None),
        "token in the query": wire("GET /documents?access_token=TOKEN&token=TOKEN", Authorization=None),
        "token in a cookie": wire("GET /documents", Authorization=None, Cookie="access_token=TOKEN"),
        "no token, before the body": sent(b"", Authorization=None, Content_Type=None, Content_Length=str(10**12))}),
}


@pytest.mark.parametrize("request_bytes, expected", HOSTILE.values(), ids=HOSTILE.keys())
def test_every_error_is_a_problem_and_leaves_no_trace(
        shared: tuple[httpx.Client, Settings], request_bytes: bytes, expected: Expected) -> None:
    client, settings = shared
    before = stored_files(settings)
    status, headers, body = exchange(client, request_bytes)
    assert (status, body.get("code", body.get("filename"))) == expected
    if status == 201:
        before = sorted([*before, body["document_id"]])
        answer = client.get(f"/documents/{body['document_id']}/file")
        assert answer.status_code == 200 and "X-Evil" not in answer.headers
        assert re.fullmatch(r"attachment; filename=\"[ !#-~]+\"; filename\*=UTF-8''[\w.~%-]+",
                            answer.headers["Content-Disposition"])
    elif expected != NOT_HTTP:
        assert (headers["Content-Type"], body["status"]) == ("application/problem+json", status)
        assert body["title"] and body["detail"] and body["request_id"] == headers["X-Request-ID"]
        assert (headers["X-Content-Type-Options"], headers["X-Frame-Options"]) == ("nosniff", "DENY")
        assert (status == 405) == ("Allow" in headers) and headers.get("Allow", "GET, HEAD") == "GET, HEAD"
        assert ("encrypted" in body["detail"]) == (OLE_MAGIC in request_bytes)
    assert (stored_files(settings), client.get("/healthz").status_code) == (before, 200)


@pytest.mark.parametrize("path, headers, body, code", [
    ("/documents/upload", {"Authorization": None}, BIG, "missing_token"), ("/nowhere", {}, BIG, "not_found"),
    ("/documents/upload", {"Authorization": "Bearer x", "Expect": "100-continue"}, BIG, "invalid_token"),
    ("/documents/upload", {}, part(BIG), "too_large"), ("/healthz", {}, BIG, "method_not_allowed"),
    ("/documents/upload", {}, part(BIG[:4_900_000], EXE), "unsupported_media_type"),
    ("/documents/upload", {"Idempotency-Key": "x" * 129}, BIG, "validation_error"),
    ("/auth/login", {}, BIG, "unsupported_media_type"), ("/auth/login", JSON, BIG, "too_large")], ids=itertools.count())
def test_an_early_refusal_reaches_a_client_that_closes(
        client: httpx.Client, path: str, headers: dict[str, str | None], body: bytes, code: str) -> None:
    usual = {"Content-Type": "multipart/form-data; boundary=b", "Connection": "close"} | headers
    request = wire(f"POST {path}", body, **usual)
    chunk = wire(f"POST {path}", b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body), **usual, Transfer_Encoding="chunked")
    for each in (request, request.replace(b"1.1", b"1.0", 1), chunk.replace(b"Content-Length", b"X")):  # 1.0: nginx
        assert exchange(client, each)[2]["code"] == code


def test_a_client_that_waits_for_100_continue_is_answered_at_once(client: httpx.Client, monkeypatch: Patch) -> None:
    monkeypatch.setattr(main, "DRAIN_SECONDS", 3600)  # so whoever waits for a body waits in vain
    good = part(PDF.ljust(9000)) + END
    head = sent(b"", Expect="100-continue", Content_Length=str(len(good)))
    with connected(client) as refused, connected(client) as taken, connected(client) as bad:
        refused.sendall(head)
        assert refused.recv(12, socket.MSG_WAITALL | socket.MSG_PEEK) == b"HTTP/1.1 401"
        assert (answer := answer_on(refused))[0] == 401 and answer[1]["Connection"] == "close"  # no request may follow
        for connection, body, expected in ((taken, good, (201, None)), (bad, part(bytes(2000)), (415, "close"))):
            connection.sendall(with_token(client, head))
            assert connection.recv(25, socket.MSG_WAITALL) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(body)
            assert ((answer := answer_on(connection))[0], answer[1]["Connection"]) == expected


@pytest.mark.parametrize("piece, seconds, most", [(b"x" * 65536, 3600, 2**22), (b"x", 0.3, 2**28)], ids=range(2))
def test_a_client_that_sends_on_for_ever_is_cut_off(
        client: httpx.Client, monkeypatch: Patch, piece: bytes, seconds: float, most: int) -> None:
    monkeypatch.setattr(main, "DRAIN_SECONDS", seconds)
    monkeypatch.setattr(main, "DRAIN_BYTES", most)
    with connected(client) as connection:
        connection.sendall(sent(b"", Content_Length=None, Transfer_Encoding="chunked", Authorization=None))
        assert answer_on(connection)[2]["code"] == "missing_token"  # which it can read while it sends
        with pytest.raises(ConnectionError):
            for _ in range(10**6 // (len(piece) // 64 or 1)):
                connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))


def test_a_small_unread_rest_keeps_the_connection(client: httpx.Client) -> None:
    with connected(client) as connection:
        for request, status in ((sent(bytes(2000), Authorization=None), 401), (wire("GET /healthz"), 200)) * 2:
            connection.sendall(request)
            answer, headers, _ = answer_on(connection)
            assert (answer, headers["Connection"]) == (status, None)


@pytest.mark.parametrize("head, seconds", [(login(b""), 3600), (sent(b""), 0.5)], ids=["login", "upload"])
def test_a_body_that_dribbles_gets_408(client: httpx.Client, monkeypatch: Patch, head: bytes, seconds: float) -> None:
    monkeypatch.setattr(main, "UPLOAD_SECONDS", seconds)
    monkeypatch.setattr(main, "DRAIN_SECONDS", 1)
    with connected(client) as connection:
        connection.sendall(with_token(client, head).replace(b"Length: 0", b"Length: 99") + b"--b\r\n")
        while not select.select([connection], [], [], 0.1)[0]:
            connection.sendall(b"x")  # for ten seconds, if it may
        for _ in range(3):  # as a client that reads no answer before it has sent all
            time.sleep(0.1)
            connection.sendall(b"x")
        status, headers, body = answer_on(connection)
        with contextlib.suppress(ConnectionResetError):  # for what was sent meanwhile
            assert connection.recv(1) == b""
    assert (status, body["code"], headers["Connection"]) == (408, "upload_timeout", "close")


@pytest.mark.parametrize("parameters, shown", {
    'filename="é.pdf"': "é.pdf", 'filename="=?utf-8?B?w6kucGRm?="': "é.pdf", 'filename="=?UTF-8?b?w6kucGRm?="': "é.pdf",
    'filename="=?utf-8?Q?=C3=A9_b.pdf?="': "é b.pdf", 'filename="=?iso-8859-1?q?=E9.pdf?="': "é.pdf",
    'filename="=?koi8-r?Q?=D6?= =?utf-8?Q?.pdf?="': "ж.pdf", 'filename="=?iso-2022-jp?B?GyRCOEAbKEIucGRm?="': "言.pdf",
    'filename="=?utf-8?B?w6kucGRm?="; filename*=utf-8\'\'%C3%A9b.pdf': "éb.pdf", "filename*=utf-8''a.pdf": "a.pdf",
    "filename*=utf-8''a.pdf; filename=b.pdf": "a.pdf", "FileName*=iso-8859-1'en'%E9's.pdf": "é's.pdf",
    **{f"filename=b.pdf; filename*={name}": "b.pdf" for name in ("utf-8''", "utf-8''%FF.pdf", "nope''x", "zip''a.pdf")},
    'filename="filename*=b.pdf"': "filename*=b.pdf", 'filename="=?nope?Q?a?=.pdf"': "=?nope?Q?a?=.pdf",
    'filename="=?utf-8?Q?=FF.pdf?="': None, 'filename="=?utf-8?B?x?="': None, 'filename="=?rot13?Q?n.cqs?="': None,
    'filename="=?zip?B?eJxLzCtISQMABgoCDQ==?="': None, "filename*=utf-7''%2B2AA-a.pdf": "a.pdf",
    'filename="=?utf-7?Q?+2AA-a.pdf?="': "a.pdf", 'filename="=?utf-8?Q?..=2F..=2Fetc=5Ca.pdf?="': "a.pdf",
    "filename*=utf-8''..%2F..%5Ca.pdf": "a.pdf", f'filename="{MARKS[:9000]}/a.pdf"': "a.pdf",
    'filename="=?utf-8?Q?a=0D=0AX-Evil=3A_=00=E2=80=AE1.pdf?="': "aX-Evil: 1.pdf", 'filename="=?nope?Q?a.pdf?="': None,
    f'filename="a{MARKS}.pdf"': MOST, f"filename*=utf-8''{quote(MARKS[-600:])}.pdf": MOST, "filename=..pdf": "..pdf",
    f"filename=b.pdf; filename*=utf-8''a{quote(MARKS[15_000:16_200])}.pdf": "b.pdf",
    f'filename="=?utf-8?B?{base64.b64encode(MARKS[5_000:25_000].encode()).decode()}?="': None,
    f'filename="=?utf-8?Q?{quote(MARKS[-600:]).replace("%", "=")}.pdf?="': MOST}.items(), ids=itertools.count())
def test_file_names_are_taken_as_real_clients_send_them(
        client: httpx.Client, monkeypatch: Patch, parameters: str, shown: str | None) -> None:
    normalize = unicodedata.normalize
    monkeypatch.setattr(main, "HELD_BY_ONE", 0)  # even so, nothing is written before the start of the file was checked
    monkeypatch.setattr(unicodedata, "normalize", lambda form, text: normalize(form, text) if len(text) < 1025 else "")
    status, _, body = exchange(client, sent(part(PDF, b'form-data; name="file"; ' + parameters.encode()) + END))
    assert (status, body.get("filename")) == ((201, shown) if shown else (415, None))


@pytest.mark.parametrize("body, encoding, outcome", [
    (b"It is in parts.\r\n--bb\r\n\r\n" + part() + END, None, "UPLOADED"), (b"Parts.\r\n", None, "malformed_body"),
    (b"\r\n" + part() + END + b"That was it.\r\n--b", None, "UPLOADED"),
    (part()[3:] + part().replace(b"--b", b"--b \t") + b"--b-- \t\r\n", None, "UPLOADED"),
    (part().replace(b"C", b"X-Y: z\r\n" * 999 + b"C", 1) + END, None, "UPLOADED"),
    (FIELDS + part() + FIELDS + END, "identity", "UPLOADED"), (AROUND + part() + AROUND + END, None, "UPLOADED"),
    (MORE + part() + MORE + END, None, "too_large"), (part() + END + bytes(70_000), None, "too_large"),
    (bytes(70_000) + b"\r\n" + part() + END, None, "too_large"), (part() + END, "gzip", "unsupported_media_type")],
    ids=itertools.count())
def test_multipart_is_as_rfc_2046_allows(client: httpx.Client, body: bytes, encoding: str | None, outcome: str) -> None:
    encodings = encoding and f"{encoding}\r\nContent-Encoding: Identity"
    answer = exchange(client, sent(body, Content_Encoding=encodings))[2]
    assert answer.get("code", answer.get("status")) == outcome
    for path in ("/auth/login", f"{NOBODYS}/process"):
        detail = client.post(path, json={}, headers={"Content-Encoding": encoding or "identity"}).json()["detail"]
        assert (detail == answer.get("detail")) == ("Content-Encoding" in detail) == (encoding == "gzip")


@pytest.mark.parametrize("filename, content", [
    ("a.pdf", PDF[:-7]), ("changed.docx", docx(compression=zipfile.ZIP_STORED).replace(b"<document/>", b"<dOcument/>")),
    ("encrypted.docx", with_fields("word/document.xml", flag_bits=1)),
    ("no deflate.docx", with_fields("word/document.xml", compress_type=zipfile.ZIP_DEFLATED)),
    ("size.docx", with_fields("word/document.xml", file_size=5)), ("crc.docx", with_fields("word/document.xml", CRC=1)),
    ("no main part.docx", typed(CONTENT_TYPES.replace("/word/document.xml", "/elsewhere.xml")))])
def test_a_damaged_document_ends_failed(client: httpx.Client, filename: str, content: bytes) -> None:
    path = uploaded(client, content, filename)
    status = processed(client, path)
    assert (status["status"], status["error"]["code"], status["error"]["retryable"]) == (
        "FAILED", "damaged_document", False)
    result = client.get(f"{path}/result")
    assert (*code_of(result), result.json()["error"]) == (409, "processing_failed", status["error"])
    assert client.post(f"{path}/process").status_code == 202  # FAILED may be tried again


@pytest.mark.parametrize("filename, content, outcome", [
    ("NULs.pdf", PDF + bytes(40_000), "COMPLETED"), ("HTML.pdf", PDF + b"<p>a log</p>\n" * 6000, "COMPLETED"),
    ("MiB.pdf", PDF + b" " * (2**20 - 6), "COMPLETED"), ("more.pdf", PDF + b" " * 2**20, "FAILED"),
    *((f"{number}.docx", content, "COMPLETED") for number, content in enumerate((
        docx(entries={"customXml/i.xml": b"<a/>"}).replace(b"customXml/i", b"customXML/i", 1),
        docx().replace(WORD, WORD.upper(), 1), docx().replace(WORD, b"word\\document.xml", 1),
        docx().replace(b"[Content_Types]", b"[\xffontent_Types]", 1).replace(*FLAGS, 1), docx().replace(*FLAGS, 2),
        ACCENT, ACCENT.replace(*FLAGS[::-1], 1), docx().replace(WORD, WORD.title()),
        docx().replace(WORD, b"word\\document.xml"), typed(CONTENT_TYPES.replace("/word", "/%77ord")),
        typed(CONTENT_TYPES.replace('Override PartName="/word/document.xml"', 'Default Extension="XML"'))))),
    ("a.docx", typed(CONTENT_TYPES.ljust(2**18)), "COMPLETED"), ("a.docx", typed(CONTENT_TYPES.ljust(2**18 + 1)), 415)],
    ids=itertools.count())
def test_what_every_reader_opens_is_whole(
        client: httpx.Client, filename: str, content: bytes, outcome: str | int) -> None:
    answer = upload(client, content, filename)
    path = answer.headers.get("Location")
    assert outcome == (processed(client, path)["status"] if path else answer.status_code)


def test_reading_a_bomb_is_bounded(monkeypatch: Patch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(storage, "MAX_MAIN_PART", 2**26)
    bombs = [io.BytesIO(bomb("[Content_Types].xml", 10)), io.BytesIO(bomb("word/document.xml", 65))]
    request.addfinalizer(tracemalloc.stop)
    tracemalloc.start()
    with pytest.raises(BadDocument):
        check_is_docx(bombs[0])
    check_is_docx(bombs[1])
    names = f"xmlns:p='{'u' * 100_000}' " + " ".join(f"p:a{number}=''" for number in range(500))
    check_is_docx(io.BytesIO(typed(CONTENT_TYPES.replace("</", f"<x {names}/></"))))
    with pytest.raises(BadDocument):
        check_is_whole(bombs[1], DOCX)
    pieces = storage.Incoming(MemoryStorage(), "key")
    assert not any(map(pieces.feed, (bytes(bytearray(b"PK\3\4")) for _ in range(9999))))
    assert pieces.held_size > sum(map(sys.getsizeof, (pieces.held, *pieces.held)))
    assert tracemalloc.get_traced_memory()[1] < 16 * 2**20


def test_long_names_of_made_up_encodings_are_not_kept(client: httpx.Client) -> None:
    made = "made" * 20
    for name in (f"filename*={made}''a.pdf", f'filename="=?{made}?Q?a.pdf?="'):
        exchange(client, sent(part(PDF, b'form-data; name="file"; ' + name.encode()) + END))
    upload(client, typed(CONTENT_TYPES.replace("?>", f" encoding='{made}'?>")), "a.docx")
    assert not [name for name in getattr(encodings, "_cache") if name.startswith("made")]


def test_a_client_that_goes_leaves_nothing(shared: tuple[httpx.Client, Settings]) -> None:
    client, settings = shared
    before = stored_files(settings)
    gc.collect()
    with connected(client) as connection:
        connection.sendall(with_token(client, sent(part(PDF.ljust(3 * 10**6)), Content_Length=str(4 * 10**6))))
        until(lambda: any(name.endswith(".part") for name in stored_files(settings)))
    until(lambda: stored_files(settings) == before)
    assert not any(each.held for each in gc.get_objects() if type(each) is storage.Incoming)


@pytest.mark.parametrize("filename, content, media_type", [
    ("a.pdf", PDF, "application/pdf"), ("a.PDF", b"junk" * 200 + PDF, "application/pdf"), ("b.docx", docx(), DOCX),
    ("c.docx", docx(compression=zipfile.ZIP_STORED), DOCX),
    ("Word Online.docx", zipped({"[Content_Types].xml": CONTENT_TYPES.replace("/document.", "/document22.").encode(),
                                 "word/document22.xml": b"<document/>"}), DOCX)])
def test_pdf_and_docx_are_accepted(client: httpx.Client, filename: str, content: bytes, media_type: str) -> None:
    document = upload(client, content, filename).json()
    assert (document["filename"], document["media_type"], document["size"]) == (filename, media_type, len(content))
    assert document["sha256"] == hashlib.sha256(content).hexdigest()
    assert client.get(f"/documents/{document['document_id']}").json() == document
    assert TIME.fullmatch(document["created_at"]) and TIME.fullmatch(document["updated_at"])
    assert processed(client, f"/documents/{document['document_id']}")["status"] == "COMPLETED"


def test_the_same_idempotency_key_answers_the_first_document(tmp_path: Path) -> None:
    key, settings = {"Idempotency-Key": "key-1"}, settings_in(tmp_path)
    with running(settings) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: upload(client, PDF, f"{i}.pdf", **key), range(16)))
        first, *again = sorted(answers, key=lambda answer: "Idempotency-Replayed" in answer.headers)
        assert "Idempotency-Replayed" not in first.headers and {answer.status_code for answer in again} == {201}
        assert {(each.text, each.headers["Location"]) for each in again} == {(first.text, first.headers["Location"])}
        other = upload(client, PDF + b"\n", "a.pdf", **key)
        assert code_of(other) == (422, "idempotency_key_reused")
        until(lambda: len(stored_files(settings)) == 1)
        assert other.json()["errors"][0]["loc"] == ["header", "Idempotency-Key"]


def test_list_is_newest_first_in_pages(tmp_path: Path) -> None:
    with running(settings_in(tmp_path)) as client:
        paths = [uploaded(client) for _ in range(5)]
        processed(client, paths[2])
        for query, expected in (("limit=2", [[4, 3], [2, 1], [0]]), ("limit=3&status=UPLOADED", [[4, 3, 1], [0]]),
                                ("status=COMPLETED", [[2]])):
            found = [[each["document_id"] for each in page] for page in pages(client, f"/documents?{query}")]
            assert found == [[id_in(paths[i]) for i in page] for page in expected]


def test_file_is_the_stored_bytes(client: httpx.Client) -> None:
    name = 'r\u00e9sum\u00e9 "1";.docx'
    path = upload(client, docx(), name.replace('"', "%22")).headers["Location"]
    answer = client.get(f"{path}/file")
    assert answer.content == docx()
    etag, names = f'"{hashlib.sha256(docx()).hexdigest()}"', ("ETag", "Content-Type", "Content-Length")
    assert [answer.headers[name] for name in names] == [etag, DOCX, str(len(docx()))]
    assert answer.headers["Content-Disposition"] == (
        "attachment; filename=\"r_sum_ _221_22;.docx\"; filename*=UTF-8''r%C3%A9sum%C3%A9%20%25221%2522%3B.docx")
    for known, status in ((etag, 304), (f'W/{etag}', 304), (f'"x", {etag}', 304), ('"x"', 200)):
        assert client.get(f"{path}/file", headers={"If-None-Match": known}).status_code == status


def test_a_download_that_nobody_reads_is_cut_off(server: Process) -> None:
    process, client, _ = server
    path, descriptors = uploaded(client, PDF.ljust(30_000_000))[4:], Path(f"/proc/{process.process.pid}/fd")
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            stalled = stack.enter_context(connected(client))
            stalled.sendall(with_token(client, wire(f"GET {path}/file")))
        until(lambda: any(path[-36:] in os.path.realpath(each) for each in descriptors.iterdir()))  # the file is open
        assert len(client.get(f"{path}/file").content) == 30_000_000  # who reads is served
        until(lambda: not any(path[-36:] in os.path.realpath(each) for each in descriptors.iterdir()))


class Gate:  # a pipeline that waits in the middle until it is told to go on
    def __init__(self) -> None:
        self.runs: list[str] = []
        self.begun, self.go = threading.Semaphore(0), threading.Event()

    def __call__(self, file: BinaryIO, document: Document, progress: main.Progress) -> Any:
        self.runs.append(document.document_id)
        progress(50, "half of it")
        self.begun.release()
        assert self.go.wait(30)
        progress(90, "nearly")
        return {"read": len(file.read())}


def test_process_is_idempotent_by_state(tmp_path: Path) -> None:
    gate = Gate()
    with running(settings_in(tmp_path, process_workers=1), pipeline=gate) as client:
        path = uploaded(client)
        assert code_of(client.get(f"{path}/result")) == (409, "not_processed")
        with ThreadPoolExecutor(16) as pool:
            ask = functools.partial(client.post, f"{path}/process")
            answers = list(pool.map(lambda i: ask(headers={"X-Request-ID": f"run-{i}"}), range(100)))
        assert {(answer.status_code, answer.headers["Retry-After"], answer.headers["Location"])
                for answer in answers} == {(202, "1", f"{path}/status")}
        gate.begun.acquire()
        status, still = client.get(f"{path}/status"), client.get(f"{path}/result")
        assert status.headers["Retry-After"] == still.headers["Retry-After"] == "1"
        assert [status.json()[field] for field in ("status", "progress", "message", "attempts", "finished_at")] == [
            "PROCESSING", 50, "half of it", 1, None]
        assert code_of(still) == (409, "still_processing")
        gate.go.set()
        ended = client.get(f"{path}/status?wait=30").json()
        assert [ended[field] for field in ("status", "progress", "attempts", "error")] == ["COMPLETED", 100, 1, None]
        assert re.fullmatch("run-[0-9]+", ended["request_id"])
        again = client.post(f"{path}/process")
        assert (again.status_code, again.json()["status"], "Location" in again.headers) == (200, "COMPLETED", False)
        assert client.get(f"{path}/result").json() == {
            "document_id": id_in(path), "status": "COMPLETED", "completed_at": ended["finished_at"],
            "result": {"read": len(PDF)}}
        assert (gate.runs, sql(tmp_path / "data", "DELETE FROM results")) == ([id_in(path)], [])
        assert client.get(f"{path}/result").status_code == 404  # as if it was deleted after its row was read


def test_whatever_a_pipeline_raises_makes_failed(tmp_path: Path) -> None:
    def pipeline(*_: Any) -> Any:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome
    damaged, outcome = BadDocument("No text: \ud800"), cast(Any, None)
    with running(settings_in(tmp_path), pipeline=pipeline) as client:
        path = uploaded(client)
        for outcome in (ValueError("canary"), SystemExit(), float("nan"), {"x": object()}, damaged):
            error = processed(client, path)["error"]
            assert (error["code"], error["retryable"]) == (
                ("damaged_document", False) if outcome is damaged else ("pipeline_error", True))
            assert "canary" not in str(error)
        outcome = {"odd": ["\ud800", DEEP, 2**70]}
        status = processed(client, path)
        assert (status["status"], status["attempts"], status["error"]) == ("COMPLETED", 1, None)
        assert client.get(f"{path}/result").json()["result"] == outcome


def test_a_deleted_document_is_gone_at_once_and_its_file_soon(tmp_path: Path) -> None:
    gate, settings = Gate(), settings_in(tmp_path, process_workers=1)
    with running(settings, pipeline=gate) as client:
        path = uploaded(client)
        client.post(f"{path}/process")
        gate.begun.acquire()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.get, f"{path}/status?wait=30")
            assert client.delete(path).status_code == 204
            for answer in (waiting.result(), client.delete(path), *map(client.get, (path, f"{path}/result"))):
                assert code_of(answer) == (404, "not_found")
        gate.go.set()
        other = uploaded(client)
        assert processed(client, other)["status"] == "COMPLETED"  # the one worker is free again
        until(lambda: stored_files(settings) == [id_in(other)])


def test_the_oldest_request_is_processed_first_and_a_full_queue_is_told(tmp_path: Path) -> None:
    gate = Gate()
    with running(settings_in(tmp_path, process_workers=1, max_queue=3), pipeline=gate) as client:
        paths = [uploaded(client) for _ in range(5)]
        assert client.post(f"{paths[0]}/process").status_code == 202
        gate.begun.acquire()
        for path in (paths[3], paths[2], paths[1], paths[2], paths[0]):  # the last two have their place
            assert client.post(f"{path}/process").status_code == 202
        full = client.post(f"{paths[4]}/process")
        assert (*code_of(full), full.headers["Retry-After"]) == (429, "queue_full", "1")
        assert client.get(f"{paths[4]}/status").json()["status"] == "UPLOADED"
        sql(tmp_path / "data", "UPDATE documents SET queued_at = '2999' WHERE document_id = ?", id_in(paths[3]))
        until(lambda: not sql(tmp_path / "data", "SELECT 1 FROM documents WHERE queued_at = '2999'"))  # it is void
        gate.go.set()
        assert processed(client, paths[3])["status"] == "COMPLETED"
        assert gate.runs == [id_in(paths[i]) for i in (0, 2, 1, 3)]


def test_each_owner_has_a_queue_and_owners_take_turns(tmp_path: Path) -> None:
    runs, begun, go = list[str](), threading.Semaphore(0), threading.Semaphore(0)

    def pipeline(file: BinaryIO, document: Document, progress: main.Progress) -> None:
        runs.append(f"/documents/{document.document_id}")
        begun.release()
        assert go.acquire(timeout=30)
    settings = settings_in(tmp_path, process_workers=1, max_queue=3)
    with running(settings, pipeline=pipeline) as client:
        add_user(settings, "eve")
        eve = bearer(log_in(client, "eve"))
        paths = [uploaded(client) for _ in range(5)]
        hers = [upload(client, PDF, "a.pdf", **eve).headers["Location"] for _ in range(2)]
        for path in paths:
            assert client.post(f"{path}/process").status_code == (429 if path == paths[4] else 202)
            assert path != paths[0] or begun.acquire(timeout=30)
        for path in hers:  # hers were asked for last
            assert client.post(f"{path}/process", headers=eve).status_code == 202
        for _ in range(5):
            go.release()
            assert begun.acquire(timeout=30)
        go.release()
        assert runs == [paths[0], hers[0], paths[1], hers[1], *paths[2:4]]


def test_a_long_poll_costs_no_thread_and_ends_with_the_run(tmp_path: Path) -> None:
    gate = Gate()
    with running(settings_in(tmp_path, lease_seconds=0.5), pipeline=gate) as client, ThreadPoolExecutor(60) as pool:
        path = uploaded(client)
        assert client.get(f"{path}/status?wait=30").json()["status"] == "UPLOADED"  # nothing to wait for
        client.post(f"{path}/process")
        assert client.get(f"{path}/status?wait=0.05").json()["status"] == "PROCESSING"
        gate.begun.acquire()
        waiting = [pool.submit(client.get, f"{path}/status?wait=30") for _ in range(60)]  # anyio has 40 threads
        time.sleep(1.2)  # longer than the lease
        gate.go.set()
        assert {(future.result().json()["status"], len(gate.runs)) for future in waiting} == {("COMPLETED", 1)}
        assert {client.get(f"{path}/status?wait={wait}").status_code for wait in ("-1", "31", "nan", "x")} == {422}


def test_two_processes_make_one_run(tmp_path: Path) -> None:
    with Server(tmp_path, "--workers", "2", DOCS_PROCESS_SECONDS="0.2") as server, server.client() as client:
        client.headers["Connection"] = "close"  # either worker may take the next request
        paths = [uploaded(client) for _ in range(5)]
        with ThreadPoolExecutor(20) as pool:
            answers = pool.map(lambda i: client.post(f"{paths[i % 5]}/process").status_code, range(100))
            assert set(answers) <= {200, 202}
        assert [client.get(f"{path}/status?wait=30").json()["attempts"] for path in paths] == [1] * 5
        assert {client.get(f"{path}/result").status_code for path in paths} == {200}
    assert server.output().count('"process_started"') == server.output().count('"process_completed"') == 5


def test_openapi_tells_what_each_route_takes_and_answers(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    operations = {(method.upper(), path): operation for path, methods in document["paths"].items()
                  for method, operation in methods.items()}
    assert set(operations) == {
        ("POST", "/auth/login"), ("POST", "/auth/refresh"), ("POST", "/auth/logout"), ("GET", "/healthz"),
        ("GET", "/readyz"), *((verb, path.replace(NOBODYS, "/documents/{document_id}")) for verb, path in PROTECTED)}
    for (_, path), operation in operations.items():
        assert operation["summary"] and operation["description"]
        assert bool(operation.get("security")) == path.startswith("/documents")
        problem = operation["responses"].pop("default")["content"]
        codes = problem.pop("application/problem+json")["schema"]["properties"]["code"]
        assert set(codes["enum"]) == set(main.PROBLEMS) and all(code in codes["description"] for code in codes["enum"])
        for status, answer in operation["responses"].items():
            assert status < "400" and (answer.get("content") or status in ("204", "304")) and not problem
            if content := answer.get("content", {}).get("application/json"):
                schema = content["schema"].get("items", content["schema"])
                assert document["components"]["schemas"][id_in(schema["$ref"])]["example"]
    assert set(operations["POST", "/documents/{document_id}/process"]["responses"]) == {"200", "202"}
    upload_operation = operations["POST", "/documents/upload"]  # whose parts are written by hand
    assert [(header["name"], header["in"], header["required"]) for header in upload_operation["parameters"]] == [
        ("Idempotency-Key", "header", False)]
    fields = upload_operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert fields["required"] == ["file"] and fields["properties"]["file"]["format"] == "binary"


def live_on(client: httpx.Client, path: str) -> None:
    """What makes the other events of the log, after the upload of the document at this path."""
    client.post(f"{path}/process", headers={"X-Request-ID": "the-run"})
    client.get(f"{path}/status?wait=30")
    processed(client, uploaded(client, PDF[:-7]))
    first = log_in(client)["refresh_token"]
    refresh(client, refresh(client, first).json()["refresh_token"])
    refresh(client, first)
    client.post("/auth/logout", data={"refresh_token": log_in(client)["refresh_token"]})
    assert [guess(client, "canary-password") for _ in range(6)] == [401] * 5 + [429]
    assert guess(client, "canary-password", "canary-user\n{") == 401
    client.delete(path)


def test_every_line_of_the_log_is_json_and_tells_the_whole_life(tmp_path: Path) -> None:
    names = ['\r\n{"event": "forged"}', "\u2028\u2029\x85", "\x1b[2J", "\U0001f600", '"\\', "\0"]
    with Server(tmp_path, DOCS_PROCESS_SECONDS="0") as server, server.client() as client:
        hostile = {b"X-Request-ID": b'a"} {"', b"User-Agent": b"x\xff[31m", b"X-Forwarded-For": b'1.1.1.1"\x85{\xe2'}
        path = client.post("/documents/upload", headers=hostile, files={
            "file": ('a\n{"event": "forged"}\u2028\x00.pdf', PDF)}).headers["Location"]
        client.get('/%0a{"event":"forged"}%00%ff%e2%80%a8?canary-query', headers=hostile)
        live_on(client, path)
        for name in names:
            add_user(settings_in(tmp_path), name)
            assert guess(client, PASSWORD, name) == 200
        for target in (*(f"/%{byte:02x}" for byte in range(256)), "/" + "%0a" * 5_000):  # h11 takes 16 KiB
            assert exchange(client, wire(f"GET {target}"))[0] in (404, 405)
        for request in ("GET /healthz", "POST /auth/login", "POST /documents/upload", "GET /nowhere"):
            broken = wire(request, b"no size\r\n", Transfer_Encoding="chunked", Content_Length=None, Authorization=None)
            assert exchange(client, broken)[2] == {"code": NOT_HTTP[1]}
    for line in (lines := server.lines()):
        assert {"timestamp", "level", "logger", "event"} <= set(line) and TIME.fullmatch(line["timestamp"])
        assert line["level"] != "ERROR"  # also not for a client that breaks the protocol
    assert "canary" not in server.output() and PASSWORD not in server.output()
    told = {line["event"]: line for line in lines}
    run = {"document_id", "attempt"}
    fields = {
        "request": {"method", "path", "status", "duration_ms", "client", "user"},
        "uploaded": {"document_id", "size", "media_type"}, "process_started": run,
        "process_completed": run | {"duration_ms"}, "process_failed": run | {"duration_ms", "error"},
        "deleted": {"document_id"}, **dict.fromkeys(
            ("login_succeeded", "login_failed", "login_throttled", "token_reused", "logged_out"), {"user", "client"})}
    for event, expected in fields.items():
        assert expected | {"request_id"} <= set(told[event]), event
    assert told["process_completed"]["request_id"] == "the-run"
    assert "forged" not in told and any(line["event"].startswith("Uvicorn running on") for line in lines)
    assert {line["user"] for line in lines if "user" in line} == {"admin", *names, None}  # only users that exist
    assert told["login_throttled"]["user"] == "admin" and told["login_failed"]["user"] is None
    output = server.output_file.read_bytes()
    assert max(map(len, output.split(b"\n"))) < 4096 and not re.search(rb"[^\x20-\x7e\n]", output)


def test_secrets_and_contents_reach_neither_log_nor_error(server: Process) -> None:
    canary, fields, (process, client, _) = "canary-4711", "application/x-www-form-urlencoded", server
    content = canary.encode()
    requests = [
        login(f'{{"username": "x", "password": "{canary}"}}'), login(f'{{"username": 1, "password": "{canary}"}}'),
        login(f'{{"{canary}": {canary}'), login(f'["{canary}"]'), form(f"username=x&password={canary}"),
        form(f"username=x&password={canary}&password={canary}"), form(f"{canary}=%FF"),
        *(wire(f"POST /auth/{name}", b"refresh_token=" + content, Content_Type=fields) for name in (
            "refresh", "logout")),
        *(wire(f"GET /{path}{canary}") for path in (
            "?", "%3F", "%253F", "documents?", "documents?limit=", "documents?cursor=", "documents?status=", "docs?")),
        wire(f"PUT /documents?{canary}"), wire(f"GET /documents?access_token={canary}", Authorization=None),
        *(wire("GET /documents", Authorization=f"{scheme}{canary}") for scheme in ("", "Basic ", "Bearer ")),
        wire("GET /documents", Cookie=canary, X_Api_Key=canary), wire("GET /", b"", **{canary: "\0"}), wire(canary),
        sent(content), sent(b"--b\r\n\xff" + content), sent(part(PDF + content)[:-5]), wire(f"GET a+b://{canary}@x/"),
        sent(part(disposition=b"form-data; name=" + content) + part(content) + b"--b--"),
        sent(b"", Content_Type=f"multipart/form-data; boundary={canary * 30}"), wire(f"GET //{canary}@x/"),
        sent(part() + b"--b--", Idempotency_Key=f"{canary} \xff"), wire(f"GET http://{canary}@x/"), wire(f"{canary} /"),
        file("a.pdf", content), file("a.docx", b"PK\3\4" + content), file("a.docx", typed(f"<{canary}>"))]
    damaged = docx(entries={"word/document.xml": content}, compression=zipfile.ZIP_STORED)
    damaged = damaged.replace(content, content[::-1])
    answers = [exchange(client, request) for request in requests]
    assert {status // 100 for status, _, _ in answers} == {2, 4}
    assert not any(canary in f"{headers} {body}" for _, headers, body in answers)
    for document, filename in ((damaged, "a.docx"), (PDF[:-7] + content, "a.pdf")):
        status = processed(client, uploaded(client, document, filename).removeprefix("/api"))
        assert status["status"] == "FAILED" and canary not in json.dumps(status)
    tokens = log_in(client)
    refreshed = refresh(client, tokens["refresh_token"]).json()
    secrets = [canary, PASSWORD, SECRET, client.headers["Authorization"][7:], *(
        sent[f"{kind}_token"] for sent in (tokens, refreshed) for kind in ("access", "refresh"))]
    assert '"request"' in process.output() and not [secret for secret in secrets if secret in process.output()]


def test_the_log_names_no_unknown_user_and_the_table_keeps_a_hash(server: Process) -> None:
    (process, client, data), begin = server, len(server[0].lines())
    assert [guess(client, "x", "canary: my passw0rd") for _ in range(6)] == [401] * 5 + [429]
    assert (guess(client, "x", "canary" * 99), guess(client, "wrong"), guess(client, PASSWORD)) == (422, 401, 200)
    failures = [line for line in process.lines()[begin:] if line["event"] in ("login_failed", "login_throttled")]
    assert [line["user"] for line in failures] == [None] * 6 + ["admin"]
    stored = [path.read_bytes() for path in (*data.glob("documents.db*"), process.output_file)]
    assert len(stored) > 4 and not any(b"canary" in content for content in stored)
    assert all(re.fullmatch("[0-9a-f]{64}", name) for name, in sql(data, "SELECT name_hash FROM login_failures"))


class MemoryStorage:
    """The protocol in memory: what another store would be."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.sync = self.check = lambda: None

    def create(self, key: str) -> BinaryIO:
        return io.BytesIO()

    def publish(self, key: str, file: BinaryIO) -> None:
        self.objects[key] = cast(io.BytesIO, file).getvalue()
        file.close()

    def open(self, key: str) -> BinaryIO:
        if key not in self.objects:
            raise FileNotFoundError(key)
        return io.BytesIO(self.objects[key])

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def keys(self) -> Iterator[str]:
        return iter(list(self.objects))


@pytest.mark.parametrize("make", [LocalStorage, lambda folder: MemoryStorage()], ids=["local", "memory"])
def test_storage_object_is_there_whole_from_publish_to_delete(tmp_path: Path, make: Callable[[Path], Storage]) -> None:
    storage = make(tmp_path / "files")
    file, unfinished = storage.create("key-1"), storage.create("key-2")
    file.writelines([b"one ", b"two"])
    assert (file.seek(0), file.read(), list(storage.keys())) == (0, b"one two", [])
    with pytest.raises(FileNotFoundError):
        storage.open("key-1")
    storage.publish("key-1", file)
    storage.sync()
    assert file.closed and list(storage.keys()) == ["key-1"]
    with storage.open("key-1") as reader:
        reader.seek(-3, os.SEEK_END)
        assert (reader.read(), reader.seek(0)) == (b"two", 0)
        for key in ("key-1", "key-2") * 2:  # published or not; and a delete can be repeated
            storage.delete(key)
        assert reader.read() == b"one two"  # a reader outlives it
    unfinished.close()
    with pytest.raises(FileNotFoundError):
        storage.open("key-1")
    storage.check()
    assert list(storage.keys()) == []


def test_local_storage_keeps_to_its_own_files(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    LocalStorage(folder)
    (folder / "lost+found").mkdir()
    for name, age in [("old.part", 9e4), ("young.part", 8e4), ("done", 1e6), (".nfs0001", 1e6), ("x.txt", 1e6)]:
        (folder / name).touch()
        os.utime(folder / name, (0, time.time() - age))
    storage = LocalStorage(folder)
    storage.check()
    assert sorted(os.listdir(folder)) == [".nfs0001", "done", "lost+found", "x.txt", "young.part"]
    assert list(storage.keys()) == ["done"]
    for key in ("", "../x", "a/b", ".", "a.part", "\x00", "x" * 65):
        for method in (storage.create, storage.open, storage.delete):
            with pytest.raises(ValueError):
                method(key)


def test_another_storage_serves_the_whole_app(tmp_path: Path) -> None:
    memory = MemoryStorage()
    with running(settings_in(tmp_path), storage=memory) as client:
        path = uploaded(client, docx(), "a.docx")
        assert upload(client, docx()[:-30], "a.docx").status_code == 415
        assert client.get(f"{path}/file").content == docx()
        assert processed(client, path)["status"] == "COMPLETED"
        assert (client.get("/readyz").status_code, list(memory.objects)) == (200, [id_in(path)])
        assert client.delete(path).status_code == 204
        until(lambda: memory.objects == {})
    assert not (tmp_path / "data" / "files").exists()


def told(name: str) -> Any:
    """The method of this name of LocalStorage, which tells that it begins and that it is done."""
    def step(self: "Steps", *arguments: Any) -> Any:
        self.tell(name)
        result = getattr(LocalStorage, name)(self, *arguments)
        self.tell(f"{name} done")
        return result
    return step


class Steps(LocalStorage):
    """A service and its storage that call `tell` at each step towards the disk; it may raise what goes wrong there."""
    create, publish, sync, open, delete = map(told, ("create", "publish", "sync", "open", "delete"))

    def __init__(self, folder: Path) -> None:
        self.heal()
        self.settings, self.connections = settings_in(folder), list[sqlite3.Connection]()
        self.settings.data_dir.mkdir()
        super().__init__(self.settings.data_dir / "files")

    def heal(self) -> None:
        self.tell: Callable[[str], object] = lambda step: None

    def break_at(self, step: str, outcomes: Iterable[Exception | None]) -> None:
        """The next times that this step is reached, these go wrong."""
        left = iter(outcomes)

        def tell(now: str) -> None:
            if now == step and (outcome := next(left, None)):
                raise outcome
        self.tell = tell

    def _authorize(self, action: int, name: str | None, *_: str | None) -> int:
        """SQLite asks this before it prepares a statement (sqlite3_set_authorizer)."""
        try:
            if action == sqlite3.SQLITE_TRANSACTION and name in ("BEGIN", "COMMIT"):
                self.tell(name)
            return sqlite3.SQLITE_OK
        except sqlite3.Error:
            return sqlite3.SQLITE_DENY

    @contextlib.contextmanager
    def running(self, **options: Any) -> Iterator[httpx.Client]:
        connect = sqlite3.connect

        def connected(*arguments: Any, **options: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = connect(*arguments, cached_statements=0, **options)  # prepares each again
            connection.set_authorizer(self._authorize)
            self.connections.append(connection)
            return connection
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sqlite3, "connect", connected)
            with running(self.settings, storage=self, **options) as client:
                patch.undo()
                yield client
                self.heal()


@pytest.fixture
def steps(tmp_path: Path) -> Steps:
    return Steps(tmp_path)


def test_a_user_removed_during_an_upload_gets_401_and_leaves_no_file(steps: Steps) -> None:
    with steps.running() as client:
        add_user(steps.settings, "eve")
        eve = bearer(log_in(client, "eve"))
        steps.tell = lambda step: step == "create" and command(steps.settings, "remove-user", "eve")
        assert code_of(upload(client, PDF, "a.pdf", **eve)) == (401, "invalid_token")
        assert not stored_files(steps.settings)


def test_every_answer_comes_after_what_it_promises(steps: Steps, monkeypatch: Patch) -> None:
    committed = ["sync", "fsync folder", "sync done", "BEGIN", "COMMIT"]
    promised = ["create", "publish", "fsync file", "rename", "publish done", *committed]
    seen, fsync, replace = list[str](), os.fsync, os.replace

    def seen_fsync(descriptor: int) -> None:
        seen.append("fsync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        fsync(descriptor)

    def seen_replace(*names: str) -> None:
        seen.append("rename")
        replace(*names)

    def in_order(steps: list[str]) -> bool:  # among others, of writes in the background
        left = iter(seen)
        return all(step in left for step in steps)
    with steps.running() as client:
        monkeypatch.setattr(os, "fsync", seen_fsync)
        monkeypatch.setattr(os, "replace", seen_replace)
        steps.tell = seen.append
        for content, filename in ((PDF, "a.pdf"), (PDF.ljust(5_000_000), "b.pdf"), (docx(), "c.docx")):
            seen.clear()
            path = uploaded(client, content, filename)
            assert in_order(promised), seen
        seen.clear()
        assert client.post(f"{path}/process").status_code == 202 and in_order(committed)
        processed(client, path)
        seen.clear()
        assert client.delete(path).status_code == 204
        assert next(step for step in seen if step in ("COMMIT", "delete")) == "COMMIT"
        for connection in steps.connections:
            assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: a commit waits for the disk


def test_an_unexpected_error_is_told_to_the_log_alone(steps: Steps, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any, text: str = "canary", kinds: list[type[Exception]] = [RuntimeError, OSError]) -> Any:
        raise kinds.pop()(text) from ValueError(text)
    with steps.running(pipeline=broken) as client:
        path = uploaded(client)
        assert processed(client, path)["status"] == "FAILED"
        steps.tell = lambda step: step == "open" and broken()
        answer = client.get(f"{path}/file")
    assert code_of(answer) == (500, "internal_error") and not re.search("canary|RuntimeError", answer.text)
    lines = [main.JsonFormatter().format(record) for record in caplog.records if record.exc_info]
    assert ["process_failed" in lines[0], "unhandled_error" in lines[1]] == [True, True] and "canary" not in str(lines)
    assert [json.loads(line)["exception"] for line in lines if "in broken" in line] == ["OSError", "RuntimeError"]


@pytest.mark.parametrize("fault, expected", [("publish", {200: 1, 201: 20, 507: 1}), ("sync", {201: 1, 507: 21})])
def test_uploads_that_wait_together_share_one_sync_and_its_failure(
        steps: Steps, fault: str, expected: Counter[int], monkeypatch: Patch) -> None:
    """They wait while another one's sync goes on. A failed sync is not repeated. Of DOCX, one is checked at a time."""
    def check(file: BinaryIO) -> None:
        seen.append("check")
        time.sleep(0.001)
        seen.append("checked")
    monkeypatch.setattr(storage, "check_is_docx", check)
    monkeypatch.setattr(main, "repeat", lambda *_: asyncio.sleep(0))  # no writes in the background
    go, seen, faults = threading.Event(), list[str](), [OSError(errno.ENOSPC, "full")]

    def tell(step: str) -> None:
        seen.append(step)
        if step == "sync" and seen.count("sync") == 1:
            assert go.wait(30)
        elif step == fault and "sync" in seen and faults:
            raise faults.pop()
    with steps.running() as client, ThreadPoolExecutor(22) as pool:
        steps.tell = tell
        first = pool.submit(upload, client)
        until(lambda: "sync" in seen)
        login = pool.submit(guess, client, PASSWORD)  # its session waits with the rows of the uploads
        others = [pool.submit(upload, client, docx(), "a.docx") for _ in range(20)]
        until(lambda: seen.count("publish") == 21 and seen.count("publish done") == 20 + len(faults))
        go.set()
        assert Counter([login.result(), *(each.result().status_code for each in (first, *others))]) == expected
        assert (seen.count("sync"), [step for step in seen if "check" in step]) == (2, ["check", "checked"] * 20)
        until(lambda: stored_files(steps.settings) == sorted(
            document["document_id"] for document in client.get("/documents").json()))


def test_a_write_that_breaks_changes_nothing(tmp_path: Path) -> None:
    db, _ = main.open_stores(settings_in(tmp_path))
    with contextlib.closing(db), (tmp_path / "data" / "documents.db.lock").open() as lock:
        sql(tmp_path / "data", "INSERT INTO deleted_files VALUES ('a')")
        fcntl.flock(lock, fcntl.LOCK_EX)
        db.check_writable()  # waits for the lock; then the others share a transaction
        broken = write(lambda db: db._writer.execute("DELETE FROM deleted_files").execute("no SQL"))(db)
        good = db.set_user("bob", "hash")
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert "syntax error" in str(broken.exception())
        assert good.result() is None and (bob := db.user("bob")) and db.deleted_files() == ["a"]
        assert db.record_login(bob._replace(password_hash="of the old password"), "", "").result() is None
        fcntl.flock(lock, fcntl.LOCK_EX)
        db.check_writable()
        doubtful = write(lambda db: [db._writer.execute(sql) for sql in (  # its COMMIT fails
            "PRAGMA defer_foreign_keys = ON", "INSERT INTO results VALUES ('of no document', '')")])(db)
        broken = write(lambda db: db._writer.execute("no SQL"))(db)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert (type(doubtful.exception()), type(broken.exception())) == (InDoubt, sqlite3.OperationalError)
        assert db.remove_user("bob").result()


def test_a_page_of_the_list_is_an_index_seek(steps: Steps) -> None:
    with steps.running() as client:
        assert uploaded(client) != uploaded(client)
        cursor, reads = client.get("/documents?limit=1").links["next"]["url"], list[str]()
        for connection in steps.connections:
            connection.set_trace_callback(lambda sql: reads.append(sql) if "LIMIT" in sql else None)
        assert [len(client.get(url).json()) for url in (cursor, f"{cursor}&status=FAILED")] == [1, 0]
        assert len(listings := [sql for sql in reads if "DESC" in sql]) == 2
        for statement in listings:
            plan = " ".join(row[3] for row in steps.connections[0].execute(f"EXPLAIN QUERY PLAN {statement}"))
            assert plan.startswith("SEARCH documents USING INDEX") and "TEMP B-TREE" not in plan, plan


# Crashes, and workers that die, stall or have to stop


def settled(client: httpx.Client, data: Path) -> dict[str, dict[str, Any]]:
    """All documents by id, once every run has ended by itself, with all that holds then."""
    until(lambda: client.get("/documents?status=PROCESSING").json() == [])
    documents = {each["document_id"]: each for page in pages(client, "/documents?limit=200") for each in page}
    for document_id, document in documents.items():
        content = (data / "files" / document_id).read_bytes()
        assert hashlib.sha256(content).hexdigest() == document["sha256"]
        if document["status"] == "COMPLETED":
            assert document["sha256"] in client.get(f"/documents/{document_id}/result").text
    assert (sql(data, "PRAGMA integrity_check"), sql(data, "PRAGMA foreign_key_check")) == ([("ok",)], [])
    return documents


class Load:
    """Threads that upload, process and delete, and a ledger of what was answered and what is in doubt."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}  # of all uploads that were sent, by Idempotency-Key
        self.uploaded: dict[str, str] = {}  # answered with 201: the Idempotency-Key by id
        self.started: set[str] = set()  # `process` was answered
        self.deleting: set[str] = set()
        self.deleted: set[str] = set()  # DELETE was answered
        self.ended: dict[str, str] = {}  # when a run ended

    @contextlib.contextmanager
    def on(self, client: httpx.Client) -> Iterator[None]:
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                with contextlib.suppress(httpx.TransportError):
                    self._one_document(client)
        with ThreadPoolExecutor(4) as pool:
            threads = [pool.submit(work) for _ in range(4)]
            yield
            stop.set()
            assert not any(thread.result() for thread in threads)

    def _one_document(self, client: httpx.Client) -> None:
        key = uuid.uuid4().hex
        self.contents[key] = b"%PDF-1.7" + os.urandom(random.randrange(40_000)) + b"%%EOF"
        path = self._upload(client, key).headers["Location"]
        if random.random() < 0.7:
            assert client.post(f"{path}/process").status_code == 202
            self.started.add(id_in(path))
        if random.random() < 0.4:
            self.deleting.add(id_in(path))
            assert client.delete(path).status_code == 204
            self.deleted.add(id_in(path))

    def _upload(self, client: httpx.Client, key: str) -> httpx.Response:
        answer = upload(client, self.contents[key], **{"Idempotency-Key": key})
        assert answer.status_code == 201, answer.text
        self.uploaded[id_in(answer.headers["Location"])] = key
        return answer

    def check(self, client: httpx.Client, data: Path) -> None:
        """That all is there which was answered, and that what is in doubt happened wholly or not at all."""
        documents = settled(client, data)
        self.deleted |= self.deleting - set(documents)
        assert not self.deleted & set(documents) and set(self.uploaded) - self.deleting <= set(documents)
        until(lambda: not self.deleted & set(os.listdir(data / "files")))
        for key in set(self.contents) - set(self.uploaded.values()):  # the client that got no answer asks again
            answer = self._upload(client, key)
            assert ("Idempotency-Replayed" in answer.headers) == (answer.json()["document_id"] in documents)
        assert set(documents) <= set(self.uploaded)  # no document that nobody sent
        for document_id, document in documents.items():
            assert document["sha256"] == hashlib.sha256(self.contents[self.uploaded[document_id]]).hexdigest()
            if document_id in self.started:
                assert document["status"] == "COMPLETED"
                assert self.ended.setdefault(document_id, document["updated_at"]) == document["updated_at"]


KILL_ROUNDS = int(os.environ.get("KILL_ROUNDS", "1"))
QUICK = {"DOCS_LEASE_SECONDS": "0.5", "DOCS_PROCESS_SECONDS": "0.1", "DOCS_PROCESS_WORKERS": "16",
         "DOCS_ACCESS_TOKEN_SECONDS": "86400"}


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_answered_is_lost_when_a_process_is_killed(tmp_path: Path, workers: int) -> None:
    load, token, completed = Load(), dict[str, str](), Counter[str]()
    for number in range(rounds := 1 + max(1, KILL_ROUNDS // workers)):
        with (Server(tmp_path, "--workers", str(workers), **QUICK) as server,
              httpx.Client(base_url=server.url, timeout=60) as client):
            token = token or bearer(log_in(client))
            client.headers.update(token)  # a session too outlives the crash
            load.check(client, tmp_path / "data")
            if number < rounds - 1:
                until(lambda: server.output().count("Application startup complete") == workers)
                pids = re.findall(r"Started server process \[(\d+)\]", server.output())
                client.headers["Connection"] = "close"  # either worker may take the next request
                with load.on(client):
                    time.sleep(random.uniform(0.05, 0.3))
                    os.kill(int(random.choice(pids)), signal.SIGKILL)
                    time.sleep(random.uniform(0, 0.1) * workers)
        completed.update(re.findall(r'"process_completed".*"document_id": "([^"]+)"', server.output()))
    assert set(completed.values()) <= {1}  # no run has ended twice; on a slow machine none had begun


def restart_after_crash(folder: Path, told_last: str, content: bytes, key: dict[str, str]) -> None:
    with running(settings_in(folder, lease_seconds=0.5)) as client:
        documents = settled(client, folder / "data")
        statuses = [document["status"] for document in documents.values()]
        assert statuses in {"uploaded": (["UPLOADED"], ["COMPLETED"]), "processing": (["COMPLETED"],),
                            "deleted": ([],)}.get(told_last, ([], ["UPLOADED"], ["COMPLETED"]))
        if told_last == "deleted":
            until(lambda: os.listdir(folder / "data" / "files") == [])
            return
        again = upload(client, content, "a.docx", **key)  # by the client that got no answer
        assert again.status_code == 201 and not documents or id_in(again.headers["Location"]) in documents
        assert processed(client, again.headers["Location"])["status"] == "COMPLETED"
        assert len(settled(client, folder / "data")) == 1


def test_a_crash_at_any_step_loses_nothing_that_was_answered(steps: Steps, tmp_path: Path) -> None:
    """A copy made in the middle of a step is what the start after a crash there finds."""
    data, content, crashes, known = steps.settings.data_dir, docx(), dict[Path, str](), "nothing"
    lock, key = data / "documents.db.lock", {"Idempotency-Key": "key"}

    def crash(step: str) -> None:
        folder = tmp_path / f"{len(crashes)} {step}"
        crashes[folder] = known
        with lock.open() as file:
            if step not in ("BEGIN", "COMMIT"):  # else the writer has the lock already
                fcntl.flock(file, fcntl.LOCK_EX)
            shutil.copytree(data, folder / "data")
    with steps.running() as client:
        steps.tell = crash
        path = upload(client, content, "a.docx", **key).headers["Location"]
        known = "uploaded"
        assert client.post(f"{path}/process").status_code == 202
        known = "processing"
        assert processed(client, path)["status"] == "COMPLETED"
        known = "being deleted"
        assert client.delete(path).status_code == 204
        known = "deleted"
        until(lambda: any(folder.name.endswith("delete done") for folder in crashes))
    same = ("create done", "publish", "sync", "sync done", "open done")  # as after the step before
    assert {*same, "BEGIN", "COMMIT", "delete done"} <= {folder.name.partition(" ")[2] for folder in crashes}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda folder: restart_after_crash(folder, crashes[folder], content, key),
                      [folder for folder in crashes if not folder.name.endswith(same)]))


def test_a_fault_at_any_step_of_an_upload_is_answered(steps: Steps, caplog: pytest.LogCaptureFixture) -> None:
    with steps.running() as client:
        for step, failure, code in [
                *((step, failure, code) for step in ("create", "publish", "publish done", "sync")
                  for failure, code in ((IO_ERROR, "unavailable"), (DISK_FULL, "insufficient_storage"))),
                ("BEGIN", DATABASE_ERROR, "unavailable"), ("COMMIT", DATABASE_ERROR, "unavailable")]:
            for content, filename in ((PDF, "a.pdf"), (docx(), "a.docx")):
                caplog.clear()
                steps.break_at(step, itertools.repeat(failure))
                assert upload(client, content, filename).json()["code"] == code, step
                steps.heal()
                assert "storage_error" in caplog.messages and client.get("/documents").json() == []
        strays = stored_files(steps.settings)  # a COMMIT that failed may have written the row, so the file stays
        told = command(steps.settings, "check")[1].splitlines()
        assert len(strays) == 2 and told[:2] == [f"no document has the file {stray}" for stray in strays]
        assert upload(client, PDF, "a.pdf", **{"Idempotency-Key": "key"}).status_code == 201
        steps.break_at("COMMIT", itertools.repeat(DATABASE_ERROR))
        assert upload(client, PDF + b"\n", "a.pdf", **{"Idempotency-Key": "key"}).json()["code"] == "unavailable"
        assert upload(client, docx()[:60], "a.docx").status_code == 415  # it adds no row


def test_a_fault_at_any_step_of_a_run_is_got_over(steps: Steps, caplog: pytest.LogCaptureFixture) -> None:
    steps.settings = settings_in(steps.settings.data_dir.parent, lease_seconds=0.5)
    with steps.running() as client:
        for step, good_times, failure in [("open", 0, IO_ERROR), *(
                (step, good_times, DATABASE_ERROR) for good_times in range(7) for step in ("BEGIN", "COMMIT"))]:
            path = uploaded(client)
            caplog.clear()
            steps.break_at(step, [None] * good_times + [failure])
            until(lambda: client.post(f"{path}/process").status_code != 503)
            until(lambda: {"storage_error", "background_error"} & set(caplog.messages))
            assert client.get(f"{path}/status?wait=30").json()["status"] == "COMPLETED", (step, good_times)


def test_a_fault_at_any_step_of_a_deletion_is_got_over(steps: Steps, caplog: pytest.LogCaptureFixture) -> None:
    with steps.running() as client:
        for step, failure, status in (
                ("BEGIN", DATABASE_ERROR, 503), ("COMMIT", DATABASE_ERROR, 503), ("delete", IO_ERROR, 204)):
            path = uploaded(client)
            caplog.clear()
            steps.break_at(step, itertools.repeat(failure))
            assert client.delete(path).status_code == status, step
            until(lambda: {"storage_error", "background_error"} & set(caplog.messages))
            steps.heal()
            assert client.delete(path).status_code == (404 if status == 204 else 204), step
    with running(steps.settings) as client:  # which removes at once what could not be removed
        until(lambda: id_in(path) not in stored_files(steps.settings))
        assert set(settled(client, steps.settings.data_dir)) <= set(stored_files(steps.settings))


ODD_PIPELINE = """
import contextlib, main, os, pathlib, time
gate = pathlib.Path(os.environ["GATE"])
publish = main.LocalStorage.publish
def publish_slowly(*arguments):
    while gate.with_suffix(".hold").exists():
        time.sleep(0.01)
    publish(*arguments)
main.LocalStorage.publish = publish_slowly
def pipeline(file, document, progress):
    if document.filename == "poison.pdf":
        os._exit(1)
    try:
        while not gate.exists():
            with contextlib.suppress(Exception):  # as frameworks do, which try again
                progress(50, "half of it")
            time.sleep(0.005)
    except main.RunEnded:
        gate.with_suffix(".lost").touch()
        if document.filename != "stubborn.pdf":
            raise
    return {"from": gate.name}
app = main.create_app(pipeline=pipeline)
"""


def odd_server(folder: Path, gate: str, *arguments: str, **environment: str) -> Server:
    """Its pipeline waits for the file `gate`, ends the process for `poison.pdf`, and is deaf for `stubborn.pdf`."""
    (folder / "odd.py").write_text(ODD_PIPELINE)
    return Server(folder, "--app-dir", str(folder), *arguments, app="odd:app", GATE=str(folder / gate), **environment)


def half_done(client: httpx.Client, path: str, attempt: int = 1) -> bool:
    status = client.get(f"{path}/status").json()
    return bool(status["attempts"] == attempt and status["progress"] == 50)


def test_a_process_that_was_stopped_past_its_lease_changes_nothing(tmp_path: Path) -> None:
    with (odd_server(tmp_path, "first", DOCS_LEASE_SECONDS="0.5") as first, first.client() as client,
          contextlib.ExitStack() as stack):
        path = uploaded(client, PDF, "stubborn.pdf")
        client.post(f"{path}/process")
        until(lambda: half_done(client, path))
        with (tmp_path / "data" / "documents.db.lock").open() as lock:  # not while it holds the lock of all processes
            fcntl.flock(lock, fcntl.LOCK_EX)
            first.process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, first.process.pid, os.WSTOPPED)
        stack.callback(first.process.send_signal, signal.SIGCONT)
        second = stack.enter_context(odd_server(tmp_path, "second", DOCS_LEASE_SECONDS="0.5"))
        client = stack.enter_context(second.client())
        until(lambda: half_done(client, path, attempt=2))
        first.process.send_signal(signal.SIGCONT)
        until((tmp_path / "first.lost").exists)  # it learns that, and returns its result all the same
        first.process.terminate()
        first.process.wait(30)
        assert half_done(client, path, attempt=2)
        (tmp_path / "second").touch()
        assert processed(client, path)["attempts"] == 2
        assert client.get(f"{path}/result").json()["result"] == {"from": "second"}
        assert '"process_completed"' not in first.output()
        assert second.output().count('"process_requeued"') == second.output().count('"process_completed"') == 1


def test_a_document_that_kills_its_process_ends_failed_and_the_service_stays_up(tmp_path: Path) -> None:
    settings = {"DOCS_LEASE_SECONDS": "0.5", "DOCS_MAX_ATTEMPTS": "2"}
    with odd_server(tmp_path, "gate", "--workers", "2", **settings) as server, server.client() as client:
        (tmp_path / "gate").touch()
        path = uploaded(client, PDF, "poison.pdf")
        with contextlib.suppress(httpx.TransportError):  # the process may die before it has answered
            client.post(f"{path}/process")

        def failed() -> Any:
            with contextlib.suppress(httpx.TransportError):  # of a process that dies
                return (status := client.get(f"{path}/status").json())["status"] == "FAILED" and status
        status = until(failed)
        assert (status["attempts"], status["error"]["code"], status["error"]["retryable"]) == (2, "interrupted", True)
        assert processed(client, uploaded(client))["status"] == "COMPLETED"
    assert len(re.findall(f'"process_started".*{id_in(path)}', server.output())) == 2


def test_a_job_may_end_within_the_grace(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, process_seconds=0.4)
    with running(settings) as client:
        path = uploaded(client)
        client.post(f"{path}/process")
        until(lambda: client.get(f"{path}/status").json()["progress"])
    with running(settings) as client:
        status = client.get(f"{path}/status").json()
        assert (status["status"], status["attempts"]) == ("COMPLETED", 1)


def test_exit_is_bounded_and_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    big, hold = PDF[:9] + bytes(16_000_000) + PDF[9:], tmp_path / "never.hold"
    with (odd_server(tmp_path, "never", DOCS_SHUTDOWN_SECONDS="0.5", DOCS_PROCESS_WORKERS="2") as server,
          server.client() as client, contextlib.ExitStack() as stack):
        paths = [uploaded(client) for _ in range(3)]  # the last waits
        assert [client.post(f"{path}/process").status_code for path in paths] == [202] * 3
        until(lambda: half_done(client, paths[0]) and half_done(client, paths[1]))

        def send(request: bytes) -> socket.socket:
            connection = stack.enter_context(connected(client))
            connection.sendall(with_token(client, request))
            return connection
        send(b"")  # open, and silent
        polling = send(wire(f"GET {paths[0]}/status?wait=30"))
        send(wire(f"GET {uploaded(client, big)}/file"))  # and nobody takes it
        hold.touch()
        uploads = [send(sent(part(big[:3_000_000]), Content_Length="9999999")), send(file("a.pdf"))]
        until(lambda: len(os.listdir(tmp_path / "data" / "files")) == 6)
        server.process.terminate()
        assert answer_on(polling)[2]["status"] == "PROCESSING"
        assert [answer_on(uploading)[2]["code"] for uploading in uploads] == ["unavailable"] * 2
        until((tmp_path / "never.lost").exists)
        hold.unlink()
        server.process.wait(10)
    with running(settings_in(tmp_path, lease_seconds=0.5)) as client:
        ended = [processed(client, path) for path in paths]
        assert [status["attempts"] for status in ended] == [2, 2, 1]
        assert len(settled(client, tmp_path / "data")) == 4
    requeued = [main.JsonFormatter().format(each) for each in caplog.records if each.msg == "process_requeued"]
    about = f'"request_id": "{ended[0]["request_id"]}", "document_id": "{id_in(paths[0])}", "attempt": 1'
    assert len(requeued) == 2 and about in str(requeued) and '"status": 503' in server.output()


def test_exit_is_bounded_while_nobody_can_write(tmp_path: Path) -> None:
    settings = {"DOCS_SHUTDOWN_SECONDS": "0", "DOCS_PROCESS_SECONDS": "0.2"}
    for running in (False, True):
        with Server(tmp_path, **settings) as server, (tmp_path / "data/documents.db.lock").open() as lock:
            with server.client() as client:
                assert not running or client.post(f"{uploaded(client)}/process").status_code == 202
            fcntl.flock(lock, fcntl.LOCK_EX)  # as a process does that was stopped in the middle of a commit
            time.sleep(0.2)  # a running document waits for the lock then
            server.process.send_signal(signal.SIGINT)
            if running:
                until(lambda: "Finished server process" in server.output())
                fcntl.flock(lock, fcntl.LOCK_UN)
            server.process.wait(10)
            assert "Traceback" not in server.output()  # the committer has nobody left to wake


@pytest.mark.parametrize("slow_step, threads", [("open", 40), ("publish", 4)])  # of Starlette, and publishers
def test_a_slow_storage_holds_up_no_login_and_no_download(steps: Steps, slow_step: str, threads: int) -> None:
    go, waiting = threading.Event(), threading.Semaphore(threads)
    with steps.running() as client, ThreadPoolExecutor(50) as pool:
        path = uploaded(client)
        steps.tell = lambda step: step == slow_step and (waiting.acquire(blocking=False), go.wait(90))
        send = (lambda: client.get(f"{path}/file")) if slow_step == "open" else (lambda: upload(client))
        requests = [pool.submit(send) for _ in range(50)]
        until(lambda: not waiting._value)
        assert guess(client, PASSWORD) == 200 and (slow_step == "open" or client.get(f"{path}/file").content == PDF)
        go.set()
        assert all(request.result().content == PDF or request.result().status_code == 201 for request in requests)


def test_a_full_disk_is_told_and_got_over(tmp_path: Path) -> None:
    files, content = tmp_path / "data" / "files", PDF[:9] + bytes(40_000) + PDF[9:]
    with Server(tmp_path, DOCS_PROCESS_SECONDS="0", DOCS_LEASE_SECONDS="0.5") as server, server.client() as client:
        path, other, pid = uploaded(client), uploaded(client), server.process.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        for file in ((PDF, "a.pdf"), (content, "a.pdf"), (PDF.ljust(2_500_000), "a.pdf"), (docx(), "a.docx")):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (len(file[0]) // 2, hard))  # after half of it: EFBIG
            assert code_of(upload(client, *file)) == (507, "insufficient_storage")
        assert [client.get(f"/{probe}").json().get("code") for probe in ("readyz", "healthz")] == ["unavailable", None]
        for answer in (client.post(f"{path}/process"), client.delete(path)):
            assert answer.status_code in (503, 507)
        assert client.get(f"{path}/file").content == PDF
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
        assert client.get("/readyz").status_code == 200
        assert processed(client, path)["status"] == "COMPLETED"
        assert client.delete(other).status_code == 204
        assert client.get(f"{uploaded(client, content)}/file").content == content
        until(lambda: sorted(os.listdir(files)) == sorted(settled(client, tmp_path / "data")))  # no trace of the others


def test_a_held_lock_makes_others_answer_503_but_to_readers(tmp_path: Path, monkeypatch: Patch) -> None:
    with running(settings_in(tmp_path)) as client, (tmp_path / "data" / "documents.db.lock").open() as lock:
        path = uploaded(client)
        monkeypatch.setattr("db.WRITE_SECONDS", 0.1)
        fcntl.flock(lock, fcntl.LOCK_EX)
        for answer in (httpx.get(f"{client.base_url}/readyz"), client.post(f"{path}/process")):
            assert (*code_of(answer), answer.headers["Retry-After"]) == (503, "unavailable", "1")
        assert client.get(f"{path}/status").json()["status"] == "UPLOADED"
        fcntl.flock(lock, fcntl.LOCK_UN)
        monkeypatch.undo()
        assert client.get("/readyz").status_code == 200
        assert settled(client, tmp_path / "data")[id_in(path)]["status"] == "COMPLETED"  # in spite of the 503


def test_an_upload_that_takes_too_long_is_stored_all_the_same(steps: Steps, monkeypatch: Patch) -> None:
    go = threading.Event()
    with steps.running() as client:
        for slow_step in ("sync", "BEGIN", "COMMIT"):
            with monkeypatch.context() as patch:
                patch.setattr("db.WRITE_SECONDS", 0.1)
                steps.tell = lambda step: step == slow_step and go.wait(30)
                assert code_of(upload(client)) == (503, "unavailable")
            go.set()
            until(lambda: len(client.get("/documents").json()) == len(stored_files(steps.settings)))
            go.clear()
        assert len(settled(client, steps.settings.data_dir)) == 3


def test_a_full_database_is_told_and_got_over(steps: Steps) -> None:
    with steps.running() as client:
        for connection in steps.connections:
            connection.execute("PRAGMA max_page_count = 1")  # SQLite makes that the size it has
        answers = [upload(client).status_code for _ in range(100)]
        assert set(answers) == {201, 507} and len(stored_files(steps.settings)) == answers.count(201)
        for connection in steps.connections:
            connection.execute("PRAGMA max_page_count = 1000000")
        assert processed(client, uploaded(client))["status"] == "COMPLETED"
        documents = settled(client, steps.settings.data_dir)
        assert len(documents) == answers.count(201) + 1
        until(lambda: stored_files(steps.settings) == sorted(documents))
