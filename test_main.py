"""Each rule of the service has a test that is named after it. They use the real app, files, SQLite and processes."""
import asyncio
import base64
import contextlib
import errno
import fcntl
import functools
import hashlib
import hmac
import http.client
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import traceback
import uuid
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import pytest
import uvicorn

import auth
import main
import storage as storage_module
from db import Database, Document, Status
from main import Settings, create_app
from storage import LocalStorage, Storage, Writer

pytestmark = pytest.mark.filterwarnings("error")

HERE = Path(__file__).parent
PASSWORD = "correct horse battery"
PDF = b"%PDF-1.7\n1 0 obj << /Type /Catalog >> endobj\ntrailer << /Root 1 0 R >>\n%%EOF\n"
MAIN_PART = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"


CONTENT_TYPES = ('<?xml version="1.0"?><Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
                 f'<Override PartName="/word/document.xml" ContentType="{MAIN_PART}"/></Types>')


def docx(main_part: str = MAIN_PART, compression: int = zipfile.ZIP_DEFLATED,
         entries: dict[str, bytes] | None = None) -> bytes:
    """A small DOCX. More entries, or other ones, by name."""
    types = CONTENT_TYPES.replace(MAIN_PART, main_part).encode()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        all_entries = {"[Content_Types].xml": types, "word/document.xml": b"<document/>", **(entries or {})}
        for name, content in all_entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """What the condition answers when that is true at last."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return answer


# The service in this process: real sockets, the app through its lifespan, and storage and pipeline to choose


@pytest.fixture(scope="session", autouse=True)
def quick_passwords() -> Iterator[None]:
    """In this process; those that the tests start hash as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auth, "SCRYPT_N", 2**6)
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
            client.headers["Authorization"] = f"Bearer {log_in(client, password=password)['access_token']}"
            yield client
    finally:
        server.should_exit = True
        thread.join()
        assert not server.lifespan.should_exit, "the lifespan failed"
        assert server.lifespan.state["service"].held == 0  # no upload leaves anything in memory


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Settings]]:
    settings = settings_in(tmp_path_factory.mktemp("shared"))
    with running(settings) as client:
        yield client, settings


@pytest.fixture
def client(shared: tuple[httpx.Client, Settings]) -> httpx.Client:
    """Logged in as admin, of one server for all tests that need no other settings."""
    return shared[0]


def log_in(client: httpx.Client, username: str = "admin", password: str = PASSWORD) -> dict[str, Any]:
    answer = client.post("/auth/login", data={"username": username, "password": password})
    assert answer.status_code == 200, answer.text
    tokens: dict[str, Any] = answer.json()
    return tokens


def upload(client: httpx.Client, content: bytes = PDF, filename: str = "a.pdf", **headers: str) -> httpx.Response:
    return client.post("/documents/upload", files={"file": (filename, content)}, headers=headers)


def uploaded(client: httpx.Client, content: bytes = PDF, filename: str = "a.pdf") -> str:
    """The path of a new document."""
    answer = upload(client, content, filename)
    assert answer.status_code == 201, answer.text
    return str(answer.headers["Location"])


def processed(client: httpx.Client, path: str) -> dict[str, Any]:
    """Its status when processing has ended."""
    assert client.post(f"{path}/process").status_code in (200, 202)
    for _ in range(2):
        status: dict[str, Any] = client.get(f"{path}/status?wait=30").json()
        if status["status"] != "PROCESSING":
            return status
    raise AssertionError(f"still {status}")


def stored_files(settings: Settings) -> list[str]:
    return sorted(os.listdir(settings.data_dir / "files"))


# The service as a process of its own


class Server:
    """`uvicorn main:app` on a free port, as a user starts it; stopped at the end of the `with` block. `stdout`: a
    descriptor for the log in place of `output_file`, or None for no standard output at all."""

    def __init__(self, folder: Path, *arguments: str, app: str = "main:app", stdout: Any = -1,
                 **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.output_file = folder / f"output-{self.port}-{time.monotonic_ns()}"
        command = [sys.executable, "-m", "uvicorn", app, "--port", str(self.port), *arguments]
        if stdout is None:  # uvicorn looks for a terminal there, unless it is told not to
            command = ["sh", "-c", 'exec "$0" "$@" >&-', *command, "--no-use-colors"]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DOCS_")}
        with self.output_file.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=HERE, stdout=output if stdout == -1 else stdout, stderr=output, env=inherited | {
                    "DOCS_DATA_DIR": str(folder / "data"), "DOCS_ADMIN_PASSWORD": PASSWORD, **environment})

    def __enter__(self) -> "Server":
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{self.url}/healthz")
                return self
            assert self.process.poll() is None, self.output()
            time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(30)

    @contextlib.contextmanager
    def client(self) -> Iterator[httpx.Client]:
        """Logged in as admin."""
        with httpx.Client(base_url=self.url, timeout=60) as client:
            client.headers["Authorization"] = f"Bearer {log_in(client)['access_token']}"
            yield client

    def output(self) -> str:
        return self.output_file.read_text()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output().splitlines()]


# The life of a document


def test_a_document_goes_from_upload_to_result(client: httpx.Client) -> None:
    answer = upload(client, docx(), "report.docx")
    assert answer.status_code == 201
    document = answer.json()
    path = answer.headers["Location"]
    assert path == f"/documents/{document['document_id']}"
    assert document["status"] == "UPLOADED"
    started = client.post(f"{path}/process", headers={"X-Request-ID": "the-run"})
    assert (started.status_code, started.headers["Location"]) == (202, f"{path}/status")
    status = client.get(f"{path}/status?wait=30").json()
    assert (status["status"], status["progress"], status["request_id"]) == ("COMPLETED", 100, "the-run")
    assert (status["attempts"], status["error"]) == (1, None)
    result = client.get(f"{path}/result").json()
    assert result["completed_at"] == status["finished_at"]
    assert result["result"]["source"] == {"size": document["size"], "sha256": document["sha256"]}


# Start and settings


def test_importing_main_has_no_side_effects(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import main"
    subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, check=True,
                   env={**os.environ, "DOCS_JWT_SECRET": "too short", "DOCS_MAX_QUEUE": "none"})
    assert os.listdir(tmp_path) == []


def test_generated_secrets_are_private_and_kept(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    files = [settings.data_dir / name for name in ("jwt-secret", "initial-password")]
    with running(settings) as client:
        tokens = log_in(client, password=files[1].read_text())
    assert [file.stat().st_mode & 0o777 for file in (settings.data_dir, *files)] == [0o700, 0o600, 0o600]
    with running(settings) as client:
        assert allowed(client, tokens)


@pytest.mark.parametrize("name, value", [
    ("DOCS_ACCESS_TOKEN_SECONDS", "0"),
    ("DOCS_REFRESH_TOKEN_SECONDS", "a week"), ("DOCS_MAX_UPLOAD_BYTES", "-1"), ("DOCS_UPLOAD_IDLE_SECONDS", "nan"),
    ("DOCS_PROCESS_WORKERS", "1.5"), ("DOCS_PROCESS_SECONDS", "inf"), ("DOCS_LEASE_SECONDS", ""),
    ("DOCS_MAX_ATTEMPTS", "0"), ("DOCS_MAX_QUEUE", "0"), ("DOCS_SHUTDOWN_SECONDS", "-1"),
    ("DOCS_LOG_LEVEL", "LOUD"), ("DOCS_DATA_DIR", ""), ("DOCS_ADMIN_USERNAME", ""), ("DOCS_ADMIN_PASSWORD", "")])
def test_bad_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(main.UnusableSetting, match=f"^{name}: .*should") as failure:
        Settings.from_environment({name: value})
    assert "\n" not in str(failure.value) and "canary" not in str(failure.value)


@pytest.mark.parametrize("name, value", [
    ("DOCS_MAX_QUEUE", "many"), ("DOCS_JWT_SECRET", "canary-0123456789-0123456789-01"),
    ("DOCS_DATA_DIR", "/dev/null/x")])
def test_bad_setting_stops_the_start_with_one_line(tmp_path: Path, name: str, value: str) -> None:
    server = Server(tmp_path, **{name: value})
    assert server.process.wait(30) != 0
    errors = [line["event"] for line in server.lines() if line["level"] == "ERROR"]
    assert errors[0].startswith(f"main.UnusableSetting: {name}: ") and "\n" not in errors[0]
    assert "canary" not in server.output() and not (tmp_path / "data" / "documents.db").exists()


def test_users_are_added_changed_and_removed_while_the_server_runs(tmp_path: Path) -> None:
    def command(*arguments: str, password: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "main.py", *arguments], cwd=HERE, input=password, text=True,
                              capture_output=True, env={**os.environ, "DOCS_DATA_DIR": str(tmp_path / "data")})

    with running(settings_in(tmp_path)) as client:
        assert command("add-user", "eve", password="first\n").returncode == 0
        tokens = log_in(client, "eve", "first")
        as_eve = {"Authorization": f"Bearer {tokens['access_token']}"}
        path = upload(client, PDF, "a.pdf", **as_eve).headers["Location"]
        assert command("add-user", "eve", password="second\n").returncode == 0
        assert client.get(path, headers=as_eve).status_code == 401  # her sessions have ended
        assert client.post("/auth/login", data={"username": "eve", "password": "first"}).status_code == 401
        as_eve = {"Authorization": f"Bearer {log_in(client, 'eve', 'second')['access_token']}"}
        assert client.get(path, headers=as_eve).status_code == 200  # her documents are still hers
        assert command("remove-user", "eve").returncode == 0
        assert client.get(path, headers=as_eve).status_code == 401
        assert os.listdir(tmp_path / "data" / "files") == []
        unknown = command("remove-user", "eve")
        assert (unknown.returncode, unknown.stderr) == (1, "remove-user: There is no user eve.\n")
        assert command("add-user", "eve", password="\n").returncode == 1


# Rules for every answer


def test_request_id_is_the_clients_own_when_it_is_plain(client: httpx.Client) -> None:
    for sent in ("a", "x" * 64, "A.b_c-9"):
        assert client.get("/healthz", headers={"X-Request-ID": sent}).headers["X-Request-ID"] == sent
    for bad in (b"", b"x" * 65, b"a b", b'a"', b"a\xe4"):
        answer = client.get("/healthz", headers={b"X-Request-ID": bad})
        assert re.fullmatch(r"[0-9a-f-]{36}", answer.headers["X-Request-ID"])


@pytest.mark.parametrize("method, path, status, code", [
    ("GET", "/nowhere", 404, "not_found"), ("GET", "/documents/", 404, "not_found"),
    ("PUT", "/documents", 405, "method_not_allowed"), ("GET", "/documents/upload", 405, "method_not_allowed"),
    ("GET", "/documents?limit=0", 422, "validation_error"), ("POST", "/auth/login", 415, "unsupported_media_type")])
def test_every_error_is_a_problem(client: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    answer = client.request(method, path)
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    problem = answer.json()
    assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code)
    assert problem["request_id"] == answer.headers["X-Request-ID"]
    assert problem["title"] and problem["detail"]


def test_405_names_all_allowed_methods(client: httpx.Client) -> None:
    assert client.put(uploaded(client)).headers["Allow"] == "DELETE, GET"


def test_a_422_never_echoes_the_input(client: httpx.Client) -> None:
    answer = client.post("/auth/login", json={"username": "canary-name", "password": ["canary-password"]})
    assert (answer.status_code, "canary" in answer.text) == (422, False)
    assert answer.json()["errors"] == [{"loc": ["password"], "msg": "Input should be a valid string"}]


def test_a_500_tells_nothing_of_the_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("canary")

    with running(settings_in(tmp_path)) as client:
        monkeypatch.setattr(Database, "documents", broken)
        answer = client.get("/documents")
        assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
        assert "canary" not in answer.text and "RuntimeError" not in answer.text
        assert client.get("/healthz").status_code == 200


# Logging in


def test_login_takes_form_and_json(client: httpx.Client) -> None:
    fields = {"username": "admin", "password": PASSWORD, "grant_type": "password"}
    for answer in (client.post("/auth/login", data=fields), client.post("/auth/login", json=fields)):
        assert (answer.status_code, answer.headers["Cache-Control"]) == (200, "no-store")
        tokens = answer.json()
        assert (tokens["token_type"], tokens["expires_in"], tokens["refresh_expires_in"]) == ("bearer", 900, 604800)


def test_unknown_user_and_wrong_password_get_the_same_answer(client: httpx.Client) -> None:
    answers = [client.post("/auth/login", data={"username": name, "password": "x"}) for name in ("nobody", "admin")]
    problems = [{**answer.json(), "request_id": None} for answer in answers]
    assert problems[0] == problems[1]
    assert [answer.status_code for answer in answers] == [401, 401]
    assert problems[0]["code"] == problems[0]["error"] == "invalid_grant"


def test_an_unknown_user_costs_as_much_as_a_wrong_password(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    scrypt = hashlib.scrypt

    def counted(*arguments: Any, **options: Any) -> bytes:
        calls.append({**options, "salt": len(options["salt"])})
        return scrypt(*arguments, **options)

    hashed = auth.hash_password("right")
    monkeypatch.setattr(hashlib, "scrypt", counted)
    assert not auth.verify_password("wrong", hashed) and not auth.verify_password("wrong", None)
    assert calls[0] == calls[1]


def test_five_failures_throttle_one_name_from_one_address(tmp_path: Path) -> None:
    with running(settings_in(tmp_path)) as client:
        wrong = {"username": "admin", "password": "wrong"}
        assert [client.post("/auth/login", data=wrong).status_code for _ in range(6)] == [401] * 5 + [429]
        answer = client.post("/auth/login", data={**wrong, "password": PASSWORD})
        assert (answer.status_code, answer.json()["code"]) == (429, "too_many_attempts")
        assert 800 < int(answer.headers["Retry-After"]) <= 900
        assert client.post("/auth/login", data={**wrong, "username": "other"}).status_code == 401
        elsewhere = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(base_url=client.base_url, transport=elsewhere) as other_address:
            assert log_in(other_address)


def test_a_login_forgets_the_failures_before_it(tmp_path: Path) -> None:
    with running(settings_in(tmp_path)) as client:
        for _ in range(2):
            for _ in range(4):
                client.post("/auth/login", data={"username": "admin", "password": "wrong"})
            assert log_in(client)


def refresh(client: httpx.Client, token: str) -> httpx.Response:
    return client.post("/auth/refresh", json={"refresh_token": token})


def allowed(client: httpx.Client, tokens: dict[str, Any]) -> bool:
    answer = client.get("/documents?limit=1", headers={"Authorization": f"Bearer {tokens['access_token']}"})
    return answer.status_code == 200


def test_a_refresh_token_works_once_and_reuse_ends_the_session(client: httpx.Client) -> None:
    first = log_in(client)
    second = refresh(client, first["refresh_token"]).json()
    assert allowed(client, first) and allowed(client, second)
    reused = refresh(client, first["refresh_token"])
    assert (reused.status_code, reused.json()["code"]) == (401, "invalid_grant")
    assert not allowed(client, first) and not allowed(client, second)
    assert refresh(client, second["refresh_token"]).status_code == 401


def test_of_parallel_uses_of_a_refresh_token_one_wins(client: httpx.Client) -> None:
    token = log_in(client)["refresh_token"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: refresh(client, token).status_code, range(8)))
    assert sorted(answers) == [200] + [401] * 7


def test_logout_ends_the_session_at_once_and_is_never_refused(client: httpx.Client) -> None:
    tokens, other = log_in(client), log_in(client)
    for token in (tokens["refresh_token"], tokens["refresh_token"], tokens["access_token"], "rubbish"):
        assert client.post("/auth/logout", data={"refresh_token": token}).status_code == 204
    assert not allowed(client, tokens) and refresh(client, tokens["refresh_token"]).status_code == 401
    assert allowed(client, other)
    assert client.post("/auth/logout", json={}).status_code == 422


def test_a_session_that_is_ended_at_one_process_has_ended_at_all(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with running(settings) as client, running(settings) as elsewhere:
        for _ in range(3):
            tokens = log_in(client)
            assert allowed(elsewhere, tokens) and allowed(client, tokens)
            assert client.post("/auth/logout", data={"refresh_token": tokens["refresh_token"]}).status_code == 204
            assert not allowed(elsewhere, tokens) and not allowed(client, tokens)


def test_a_session_outlives_no_refresh_past_its_end(tmp_path: Path) -> None:
    with running(settings_in(tmp_path, refresh_token_seconds=30 * 86400)) as client:
        tokens = log_in(client)
        with contextlib.closing(sqlite3.connect(tmp_path / "data" / "documents.db")) as database, database:
            database.execute("UPDATE sessions SET expires_at = ?", (time.time() + 60,))
        refreshed = refresh(client, tokens["refresh_token"]).json()
        assert (refreshed["expires_in"], refreshed["refresh_expires_in"]) == (60, 60)
        with contextlib.closing(sqlite3.connect(tmp_path / "data" / "documents.db")) as database, database:
            database.execute("UPDATE sessions SET expires_at = ?", (time.time(),))
        assert not allowed(client, refreshed)


def test_tokens_expire(tmp_path: Path) -> None:
    with running(settings_in(tmp_path, access_token_seconds=1, refresh_token_seconds=1)) as client:
        tokens = log_in(client)
        until(lambda: not allowed(client, tokens))
        assert refresh(client, tokens["refresh_token"]).status_code == 401


PROTECTED = [("POST", "/documents/upload"), ("GET", "/documents"), *(
    (method, "/documents/00000000-0000-4000-8000-000000000000" + rest) for method, rest in [
        ("GET", ""), ("DELETE", ""), ("GET", "/file"), ("POST", "/process"), ("GET", "/status"), ("GET", "/result")])]


@pytest.mark.parametrize("method, path", PROTECTED)
def test_token_required(client: httpx.Client, method: str, path: str) -> None:
    missing = client.request(method, path, headers={"Authorization": "Basic YTpi"})
    assert (missing.status_code, missing.headers["WWW-Authenticate"]) == (401, "Bearer")
    bad = client.request(method, path, headers={"Authorization": "Bearer x.y.z"})
    assert (bad.status_code, bad.headers["WWW-Authenticate"]) == (401, 'Bearer error="invalid_token"')
    assert bad.json()["code"] == "invalid_token"


@pytest.mark.parametrize("method, path", PROTECTED[2:])
def test_somebody_elses_document_is_unknown(client: httpx.Client, method: str, path: str, tmp_path: Path) -> None:
    with running(settings_in(tmp_path)) as other:
        database = Database(tmp_path / "data" / "documents.db")
        database.set_user("eve", auth.hash_password("eve")).result()
        database.close()
        theirs = uploaded(other)
        other.headers["Authorization"] = f"Bearer {log_in(other, 'eve', 'eve')['access_token']}"
        answers = [other.request(method, path.replace(PROTECTED[2][1], of)) for of in (theirs, PROTECTED[2][1])]
        problems = [{**answer.json(), "request_id": None} for answer in answers]
        assert problems[0] == problems[1] and answers[0].status_code == 404
        assert other.get("/documents").json() == []


def test_the_token_is_checked_before_the_body_is_read(client: httpx.Client) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), 30) as connection:
        connection.sendall(b"POST /documents/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
                           b"Content-Type: multipart/form-data; boundary=b\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 401"


# Uploading


@pytest.mark.parametrize("filename, content, media_type", [
    ("a.pdf", PDF, main.PDF), ("a.PDF", b"junk" * 200 + PDF, main.PDF), ("b.docx", docx(), main.DOCX),
    ("c.docx", docx(compression=zipfile.ZIP_STORED), main.DOCX)])
def test_pdf_and_docx_are_accepted(client: httpx.Client, filename: str, content: bytes, media_type: str) -> None:
    document = upload(client, content, filename).json()
    assert (document["filename"], document["media_type"], document["size"]) == (filename, media_type, len(content))
    assert document["sha256"] == hashlib.sha256(content).hexdigest()
    assert client.get(f"/documents/{document['document_id']}").json() == document
    for field in ("created_at", "updated_at"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", document[field])


@pytest.mark.parametrize("filename, content", [
    ("a.txt", PDF), ("a", PDF), ("pdf", PDF), ("a.pdf.exe", PDF), ("a.pdf", docx()), ("a.docx", PDF),
    ("a.pdf", b"x" * 1024 + PDF), ("a.docx", b"PK\x03\x04 and no more"), ("a.docx", docx()[:-30]),
    ("a.docx", docx("application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml")),
    ("a.docx", docx("application/vnd.openxmlformats-officedocument.wordprocessingml.template.main+xml")),
    ("a.docx", docx("application/vnd.ms-word.document.macroEnabled.main+xml"))])
def test_other_content_is_unsupported(client: httpx.Client, filename: str, content: bytes) -> None:
    answer = upload(client, content, filename)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


def test_an_encrypted_office_file_is_told(client: httpx.Client) -> None:
    answer = upload(client, bytes.fromhex("d0cf11e0a1b11ae1") + bytes(1000), "a.docx")
    assert (answer.status_code, "encrypted" in answer.json()["detail"]) == (415, True)


def test_the_main_part_of_a_docx_may_have_any_name(client: httpx.Client) -> None:
    types = CONTENT_TYPES.replace("/word/document.xml", "/word/document22.xml").encode()
    assert upload(client, docx(entries={"[Content_Types].xml": types}), "a.docx").status_code == 201


def test_upload_without_a_usable_file_part(client: httpx.Client) -> None:
    for files in ([("other", ("a.pdf", PDF))], [("file", (None, PDF))], [("file", ("", PDF))],
                  [("file", ("a.pdf", b""))], [("file", ("a.pdf", PDF)), ("file", ("b.pdf", PDF))]):
        answer = client.post("/documents/upload", files=files)
        assert (answer.status_code, answer.json()["code"]) == (422, "validation_error"), files
        assert answer.json()["errors"][0]["loc"] == ["body", "file"]


def test_the_size_limit_is_the_files_own(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, max_upload_bytes=2_000_000)
    with running(settings) as client:
        for size, status in ((2_000_000, 201), (2_000_001, 413), (3_000_000, 413)):
            answer = upload(client, PDF.ljust(size))
            assert answer.status_code == status
        assert answer.json()["code"] == "too_large"
        request = client.build_request("POST", "/documents/upload", files={"file": ("a.pdf", PDF.ljust(6_000_000))})
        body = request.read()
        pieces = (body[i:i + 9999] for i in range(0, len(body), 9999))
        headers = {"Content-Type": request.headers["Content-Type"]}
        assert client.post("/documents/upload", content=pieces, headers=headers).status_code == 413
        assert len(stored_files(settings)) == 1


def test_a_silent_client_gets_408(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, upload_idle_seconds=0.2)
    with running(settings) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port or 80), 30) as connection:
            body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.pdf"\r\n\r\n' + PDF.ljust(2**21)
            connection.sendall(
                b"POST /documents/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\nAuthorization: "
                + client.headers["Authorization"].encode()
                + b"\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n" + body)
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 408") and b'"upload_timeout"' in answer
        assert stored_files(settings) == []


@pytest.mark.parametrize("pieces, idle_seconds, held_by_all", [(30, 0.3, 10**9), (4, 30, 1000)],
                         ids=["a long time", "many uploads"])
def test_an_upload_is_written_before_it_is_whole(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int, idle_seconds: float, held_by_all: int) -> None:
    settings, written = settings_in(tmp_path, upload_idle_seconds=idle_seconds), list[bool]()

    def body() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.pdf"\r\n\r\n' + PDF
        for _ in range(pieces):
            time.sleep(0.04)
            yield b"x"
        written.extend(until(lambda: [name.endswith(".part") for name in stored_files(settings)], 10))
        yield b"\r\n--x--\r\n"

    monkeypatch.setattr(main, "HELD_BY_ALL", held_by_all)
    with running(settings) as client:
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = client.post("/documents/upload", content=body(), headers=headers)
        assert (answer.status_code, answer.json()["size"], written) == (201, len(PDF) + pieces, [True])


def test_an_upload_may_not_dribble_on_behind_its_file(tmp_path: Path) -> None:
    """Else the sweep of another process could take the file, not written for long, for abandoned."""
    with running(settings_in(tmp_path, upload_idle_seconds=0.2)) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port or 80), 30) as connection:
            connection.sendall(sent(part() + b"--b--", Content_Length="9999").replace(
                b"TOKEN", client.headers["Authorization"].removeprefix("Bearer ").encode()))
            connection.settimeout(0.1)
            answer = b""
            while not answer:
                connection.sendall(b"x")
                with contextlib.suppress(TimeoutError):
                    answer = connection.recv(12)
            assert answer == b"HTTP/1.1 408"
        assert stored_files(settings_in(tmp_path)) == []


def test_an_upload_of_a_removed_user_is_refused_without_a_trace(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, commit = settings_in(tmp_path), main.Upload.finish

    def finish_and_remove(incoming: main.Upload) -> None:
        commit(incoming)
        with contextlib.closing(Database(settings.data_dir / "documents.db")) as database:
            database.remove_user("admin").result()

    with running(settings) as client:
        monkeypatch.setattr(main.Upload, "finish", finish_and_remove)
        answer = upload(client)
        assert (answer.status_code, answer.json()["code"]) == (401, "invalid_token")
        assert stored_files(settings) == []


def test_the_same_idempotency_key_answers_the_first_document(client: httpx.Client) -> None:
    key = {"Idempotency-Key": "key-1"}
    first = upload(client, PDF, "a.pdf", **key)
    again = upload(client, PDF, "b.pdf", **key)
    assert (again.status_code, again.json()) == (201, first.json())
    assert (again.headers["Idempotency-Replayed"], again.headers["Location"]) == ("true", first.headers["Location"])
    assert "Idempotency-Replayed" not in first.headers
    other = upload(client, PDF + b"\n", "a.pdf", **key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert other.json()["errors"][0]["loc"] == ["header", "Idempotency-Key"]
    for bad in ("", "x" * 129, "a b"):
        refused = upload(client, PDF, "a.pdf", **{"Idempotency-Key": bad})
        assert (refused.status_code, refused.json()["code"]) == (422, "validation_error")
        assert refused.json()["errors"][0]["loc"] == ["header", "Idempotency-Key"]


def test_parallel_uploads_under_one_key_make_one_document(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with running(settings) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: upload(client, PDF, "a.pdf", **{"Idempotency-Key": "k"}), range(16)))
        assert {answer.status_code for answer in answers} == {201}
        assert len({answer.json()["document_id"] for answer in answers}) == 1
        assert len(client.get("/documents").json()) == len(stored_files(settings)) == 1


@pytest.mark.parametrize("sent, shown", [
    ("/etc/passwd.pdf", "passwd.pdf"), ("..\\..\\a.pdf", "a.pdf"), ("C:\\fake\\a.pdf", "a.pdf"),
    ("../.pdf", "document.pdf"),
    ("a\x00\x1b\x7f\u0085b.pdf", "ab.pdf"), ("invoice\u202efdp.pdf", "invoicefdp.pdf"), ("e\u0301.pdf", "\u00e9.pdf"),
    ("\u2067\u200f.pdf", "document.pdf"), ("\u00e4" * 300 + ".docx", "\u00e4" * 125 + ".docx"), ("  a.pdf ", "a.pdf"),
    ("\u65e5\u672c.pdf", "\u65e5\u672c.pdf"), ("x" * 400, "x" * 255)])
def test_filename_is_for_show(sent: str, shown: str) -> None:
    assert main.shown_filename(sent) == shown
    assert len(shown.encode()) <= 255


# Listing, reading and deleting


def test_list_is_newest_first_in_pages(tmp_path: Path) -> None:
    with running(settings_in(tmp_path)) as client:
        paths = [uploaded(client) for _ in range(5)]
        processed(client, paths[2])
        url, pages = "/documents?limit=2", []
        while url:
            answer = client.get(url)
            pages.append([f"/documents/{document['document_id']}" for document in answer.json()])
            url = answer.links.get("next", {}).get("url", "")
        assert pages == [paths[4:2:-1], paths[2:0:-1], paths[:1]]
        for status, expected in (("COMPLETED", paths[2:3]), ("FAILED", [])):
            documents = client.get("/documents", params={"status": status}).json()
            assert [f"/documents/{document['document_id']}" for document in documents] == expected
        filtered = client.get("/documents?status=UPLOADED&limit=3")
        assert "status=UPLOADED" in filtered.links["next"]["url"]
        assert len(client.get(filtered.links["next"]["url"]).json()) == 1


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", "limit=1e1", "limit=9223372036854775808",
                                   "status=DONE", "cursor=rubbish", "cursor=%00", "cursor=YSBi", "cursor=" + "x" * 300])
def test_bad_list_parameters(client: httpx.Client, query: str) -> None:
    answer = client.get(f"/documents?{query}")
    assert (answer.status_code, answer.json()["errors"][0]["loc"]) == (422, ["query", query.partition("=")[0]])


def test_a_page_of_the_list_is_an_index_seek(tmp_path: Path) -> None:
    database = Database(tmp_path / "documents.db")
    statements: list[str] = []
    database._r.set_trace_callback(statements.append)
    for status in (None, Status.FAILED):
        database.documents("owner", 50, status, ("2026", "id"))
    database._r.set_trace_callback(None)
    for statement in statements:
        plan = " ".join(row[3] for row in database._r.execute(f"EXPLAIN QUERY PLAN {statement}"))
        assert plan.startswith("SEARCH documents USING INDEX documents_") and "TEMP B-TREE" not in plan, plan
    database.close()
    assert len(statements) == 2


def test_file_is_the_stored_bytes(client: httpx.Client) -> None:
    name = 'r\u00e9sum\u00e9 "1";.docx'
    path = upload(client, docx(), name.replace('"', "%22")).headers["Location"]
    answer = client.get(f"{path}/file")
    assert answer.content == docx()
    etag = f'"{hashlib.sha256(docx()).hexdigest()}"'
    assert (answer.headers["ETag"], answer.headers["Content-Type"]) == (etag, main.DOCX)
    assert answer.headers["Content-Length"] == str(len(docx()))
    assert answer.headers["Content-Disposition"] == (
        "attachment; filename=\"r_sum_ _221_22;.docx\"; filename*=UTF-8''r%C3%A9sum%C3%A9%20%25221%2522%3B.docx")
    for known in (etag, f'W/{etag}', f'"x", {etag}', "*"):
        assert client.get(f"{path}/file", headers={"If-None-Match": known}).status_code == 304
    assert client.get(f"{path}/file", headers={"If-None-Match": '"x"'}).status_code == 200
    two_lines = [("If-None-Match", etag), ("If-None-Match", '"x"')]
    assert client.get(f"{path}/file", headers=two_lines).status_code == 304


def test_a_deleted_document_is_gone_with_its_file(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with running(settings) as client:
        path = uploaded(client)
        processed(client, path)
        assert client.delete(path).status_code == 204
        assert stored_files(settings) == []
        for answer in (client.delete(path), client.get(path), client.get(f"{path}/result"), client.get(f"{path}/file")):
            assert answer.status_code == 404


# Processing


class Gate:
    """A pipeline that waits in the middle until it is told to go on."""

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
        not_yet = client.get(f"{path}/result")
        assert (not_yet.status_code, not_yet.json()["code"]) == (409, "not_processed")
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: client.post(f"{path}/process").status_code, range(100)))
        assert answers == [202] * 100
        gate.begun.acquire()
        status = client.get(f"{path}/status")
        assert status.headers["Retry-After"] == "1"
        assert [status.json()[field] for field in ("status", "progress", "message", "attempts", "finished_at")] == [
            "PROCESSING", 50, "half of it", 1, None]
        still = client.get(f"{path}/result")
        assert (still.status_code, still.json()["code"], still.headers["Retry-After"]) == (409, "still_processing", "1")
        gate.go.set()
        assert client.get(f"{path}/status?wait=30").json()["status"] == "COMPLETED"
        again = client.post(f"{path}/process")
        assert (again.status_code, again.json()["status"], "Location" in again.headers) == (200, "COMPLETED", False)
        assert client.get(f"{path}/result").json()["result"] == {"read": len(PDF)}
        assert gate.runs == [path.rpartition("/")[2]]


@pytest.mark.parametrize("filename, content", [
    ("a.pdf", PDF[:-7]), ("a.docx", docx(compression=zipfile.ZIP_STORED).replace(b"<document/>", b"<dOcument/>"))])
def test_a_damaged_document_fails(client: httpx.Client, filename: str, content: bytes) -> None:
    path = uploaded(client, content, filename)
    status = processed(client, path)
    assert (status["status"], status["error"]["code"], status["error"]["retryable"]) == (
        "FAILED", "damaged_document", False)
    result = client.get(f"{path}/result")
    assert (result.status_code, result.json()["code"], result.json()["error"]) == (
        409, "processing_failed", status["error"])
    assert client.post(f"{path}/process").status_code == 202  # FAILED may be tried again


@pytest.mark.parametrize("outcome", [ValueError("canary"), SystemExit(), float("nan"), {"x": object()}, "\ud800",
                                     {1: "x", "y": {1, 2}}], ids=repr)
def test_whatever_a_pipeline_raises_makes_failed(tmp_path: Path, outcome: Any) -> None:
    outcomes = [outcome, {"fine": True}]

    def pipeline(*_: Any) -> Any:
        if isinstance(result := outcomes.pop(0), BaseException):
            raise result
        return result

    with running(settings_in(tmp_path), pipeline=pipeline) as client:
        path = uploaded(client)
        status = processed(client, path)
        assert (status["error"]["code"], status["error"]["retryable"]) == ("pipeline_error", True)
        assert "canary" not in str(status)
        status = processed(client, path)
        assert (status["status"], status["attempts"], status["error"]) == ("COMPLETED", 1, None)


def test_a_pipeline_names_its_own_failures(tmp_path: Path) -> None:
    def pipeline(*_: Any) -> Any:
        raise main.ProcessingFailed("no_text", "The document has no text.", retryable=False)

    with running(settings_in(tmp_path), pipeline=pipeline) as client:
        assert processed(client, uploaded(client))["error"] == {
            "code": "no_text", "message": "The document has no text.", "retryable": False}


def test_a_document_deleted_while_it_is_processed_leaves_nothing(tmp_path: Path) -> None:
    gate, settings = Gate(), settings_in(tmp_path, process_workers=1)
    with running(settings, pipeline=gate) as client:
        path = uploaded(client)
        client.post(f"{path}/process")
        gate.begun.acquire()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.get, f"{path}/status?wait=30")
            assert client.delete(path).status_code == 204
            assert waiting.result().status_code == 404
        gate.go.set()
        assert processed(client, uploaded(client))["status"] == "COMPLETED"  # the one worker is free again
        assert len(stored_files(settings)) == 1


def test_a_full_queue_is_told(tmp_path: Path) -> None:
    gate = Gate()
    with running(settings_in(tmp_path, process_workers=1, max_queue=1), pipeline=gate) as client:
        paths = [uploaded(client) for _ in range(3)]
        assert client.post(f"{paths[0]}/process").status_code == 202
        gate.begun.acquire()
        assert client.post(f"{paths[1]}/process").status_code == 202
        full = client.post(f"{paths[2]}/process")
        assert (full.status_code, full.json()["code"], full.headers["Retry-After"]) == (429, "queue_full", "1")
        assert client.get(f"{paths[2]}/status").json()["status"] == "UPLOADED"
        assert [client.post(f"{path}/process").status_code for path in paths[:2]] == [202, 202]  # they have a place
        gate.go.set()
        assert processed(client, paths[1])["status"] == "COMPLETED"


def test_the_oldest_request_is_processed_first(tmp_path: Path) -> None:
    gate = Gate()
    with running(settings_in(tmp_path, process_workers=1), pipeline=gate) as client:
        paths = [uploaded(client) for _ in range(4)]
        for path in (order := [paths[i] for i in (2, 0, 3, 1)]):
            client.post(f"{path}/process")
        gate.go.set()
        for path in order:
            processed(client, path)
        assert [f"/documents/{document_id}" for document_id in gate.runs] == order


def test_a_long_poll_costs_no_thread_and_ends_with_the_run(tmp_path: Path) -> None:
    gate = Gate()
    with running(settings_in(tmp_path), pipeline=gate) as client, ThreadPoolExecutor(60) as pool:
        path = uploaded(client)
        assert client.get(f"{path}/status?wait=30").json()["status"] == "UPLOADED"  # nothing to wait for
        client.post(f"{path}/process")
        assert client.get(f"{path}/status?wait=0.05").json()["status"] == "PROCESSING"
        gate.begun.acquire()
        waiting = [pool.submit(client.get, f"{path}/status?wait=30") for _ in range(60)]  # anyio has 40 threads
        assert client.get("/healthz").status_code == 200
        gate.go.set()
        assert {future.result().json()["status"] for future in waiting} == {"COMPLETED"}
        for wait in ("-1", "31", "nan", "x"):
            assert client.get(f"{path}/status?wait={wait}").status_code == 422


def test_two_processes_make_one_run(tmp_path: Path) -> None:
    with Server(tmp_path, "--workers", "2", DOCS_PROCESS_SECONDS="0.2") as server, server.client() as client:
        paths = [uploaded(client) for _ in range(5)]
        with ThreadPoolExecutor(20) as pool:
            def start(i: int) -> int:  # a connection of its own: either worker may take it
                return httpx.post(f"{server.url}{paths[i % 5]}/process", headers=client.headers, timeout=30).status_code
            assert set(pool.map(start, range(100))) <= {200, 202}
        for path in paths:
            assert httpx.get(f"{server.url}{path}/status?wait=30", headers=client.headers, timeout=60).json()[
                "attempts"] == 1
            assert client.get(f"{path}/result").status_code == 200
    lines = server.output().splitlines()
    started = [json.loads(line) for line in lines if '"process_started"' in line]
    assert len(started) == len({line["document_id"] for line in started}) == 5


# Health


def test_ready_means_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    with running(settings_in(tmp_path)) as client:
        del client.headers["Authorization"]
        monkeypatch.setattr(LocalStorage, "check", full)
        unready = client.get("/readyz")
        assert (unready.status_code, unready.json()["code"]) == (503, "unavailable")
        assert client.get("/healthz").json() == {"status": "ok"}
        monkeypatch.undo()
        assert client.get("/readyz").json() == {"status": "ok"}


# Storage: the contract of the protocol, over each implementation


class MemoryStorage:
    """The protocol in memory: what another store would be."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes | None, float]] = {}  # None: not committed

    def create(self, key: str) -> "MemoryWriter":
        self.objects[key] = None, time.time()
        return MemoryWriter(self, key)

    def sync(self) -> None:
        pass

    def open(self, key: str) -> BinaryIO:
        content, _ = self.objects.get(key, (None, 0.0))
        if content is None:
            raise FileNotFoundError(key)
        return io.BytesIO(content)

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def keys(self, older_than: float) -> Iterator[str]:
        return iter([key for key, (_, written) in self.objects.items() if written < time.time() - older_than])

    def check(self) -> None:
        pass


class MemoryWriter:
    def __init__(self, storage: MemoryStorage, key: str) -> None:
        self._storage, self._key, self._content = storage, key, b""

    def write(self, data: bytes) -> None:
        self._content += data

    def commit(self) -> None:
        self._storage.objects[self._key] = self._content, time.time()

    def __enter__(self) -> "MemoryWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._storage.objects.get(self._key, (b"", 0))[0] is None:
            self._storage.delete(self._key)


@pytest.fixture(params=[LocalStorage, MemoryStorage])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    made: Storage = request.param(tmp_path / "files") if request.param is LocalStorage else MemoryStorage()
    return made


def test_storage_object_is_there_whole_from_its_commit_on(storage: Storage) -> None:
    with storage.create("key-1") as writer:
        writer.write(b"one ")
        writer.write(b"two")
        with pytest.raises(FileNotFoundError):
            storage.open("key-1")
        writer.commit()
    with storage.open("key-1") as file:
        file.seek(-3, os.SEEK_END)
        assert (file.read(), file.seek(0), file.read()) == (b"two", 0, b"one two")


def test_storage_drops_what_is_not_committed(storage: Storage) -> None:
    with pytest.raises(KeyError), storage.create("key-1") as writer:
        writer.write(b"data")
        raise KeyError
    assert list(storage.keys(-1)) == []
    with pytest.raises(FileNotFoundError):
        storage.open("key-1")


def test_storage_delete_can_be_repeated_and_spares_readers(storage: Storage) -> None:
    with storage.create("key-1") as writer:
        writer.write(b"data")
        writer.commit()
    with storage.open("key-1") as file:
        for _ in range(2):
            storage.delete("key-1")
        assert file.read() == b"data"
    with pytest.raises(FileNotFoundError):
        storage.open("key-1")


def test_storage_keys_tells_old_objects_finished_or_not(storage: Storage) -> None:
    with storage.create("done") as writer:
        writer.commit()
    unfinished = storage.create("unfinished")
    assert sorted(storage.keys(-60)) == ["done", "unfinished"]
    assert list(storage.keys(60)) == []
    storage.delete("unfinished")
    assert list(storage.keys(-60)) == ["done"]
    unfinished.__exit__(None, None, None)
    storage.check()
    assert list(storage.keys(-60)) == ["done"]


def test_local_storage_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "files")
    (tmp_path / "files" / "lost+found").mkdir()
    (tmp_path / "files" / "folder").mkdir()
    (tmp_path / "files" / ".nfs0001").touch()
    assert list(storage.keys(-60)) == []


@pytest.mark.parametrize("key", ["", "../x", "a/b", ".", "a.part", "\x00", "x" * 65])
def test_local_storage_takes_no_path_as_a_key(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError):
        LocalStorage(tmp_path / "files").create(key)


def test_another_storage_serves_the_whole_app(tmp_path: Path) -> None:
    memory = MemoryStorage()
    with running(settings_in(tmp_path), storage=memory) as client:
        path = uploaded(client, docx(), "a.docx")
        assert upload(client, docx()[:-30], "a.docx").status_code == 415
        assert client.get(f"{path}/file").content == docx()
        assert processed(client, path)["status"] == "COMPLETED"
        assert client.get("/readyz").status_code == 200
        assert [f"/documents/{key}" for key in memory.objects] == [path]
        assert client.delete(path).status_code == 204
    assert memory.objects == {}
    assert not (tmp_path / "data" / "files").exists()


# OpenAPI


def test_openapi_lists_what_routes_answer(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    operations = {(method.upper(), path): operation for path, methods in document["paths"].items()
                  for method, operation in methods.items()}
    assert set(operations) == {(method, path) for method, path in [
        ("POST", "/auth/login"), ("POST", "/auth/refresh"), ("POST", "/auth/logout"), ("GET", "/healthz"),
        ("GET", "/readyz"), *((method, path.replace(PROTECTED[2][1], "/documents/{document_id}"))
                              for method, path in PROTECTED)]}
    assert set(operations["POST", "/documents/upload"]["responses"]) == {
        "201", "400", "401", "408", "413", "415", "422", "500", "503", "507"}
    assert set(operations["POST", "/documents/{document_id}/process"]["responses"]) == {
        "200", "202", "401", "404", "429", "500", "503", "507"}
    upload_operation = operations["POST", "/documents/upload"]  # whose parts are written by hand
    assert upload_operation["security"] == operations["GET", "/documents"]["security"] != []
    assert [(header["name"], header["in"], header["required"]) for header in upload_operation["parameters"]] == [
        ("Idempotency-Key", "header", False)]
    form = upload_operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["file"] and form["properties"]["file"]["format"] == "binary"
    for operation in operations.values():
        for status, answer in operation["responses"].items():
            for media_type, content in answer.get("content", {}).items():
                assert content["schema"] and (content.get("example") or content["examples"])
                assert status < "400" or media_type == "application/problem+json"
    assert "HTTPValidationError" not in json.dumps(document)


# The log


def test_every_line_of_the_log_is_json_and_tells_the_whole_life(tmp_path: Path) -> None:
    with Server(tmp_path, DOCS_PROCESS_SECONDS="0") as server, server.client() as client:
        hostile = {b"X-Request-ID": b'a"} {"', b"User-Agent": b"x\xff[31m", b"X-Forwarded-For": b'1.1.1.1"\x85{\xe2'}
        path = client.post("/documents/upload", headers=hostile, files={
            "file": ('a\n{"event": "forged"}\u2028\x00.pdf', PDF)}).headers["Location"]
        client.get('/%0a{"event":"forged"}%00%ff%e2%80%a8?canary-query', headers=hostile)
        client.post(f"{path}/process", headers={"X-Request-ID": "the-run"})
        client.get(f"{path}/status?wait=30")
        damaged = uploaded(client, PDF[:-7])
        processed(client, damaged)
        tokens = log_in(client)
        refresh(client, tokens["refresh_token"])
        refresh(client, tokens["refresh_token"])
        client.post("/auth/logout", data={"refresh_token": log_in(client)["refresh_token"]})
        for _ in range(6):
            client.post("/auth/login", data={"username": "eve\n{", "password": "canary-password"})
        client.delete(path)
    lines = server.lines()
    for line in lines:
        assert {"timestamp", "level", "logger", "event"} <= set(line)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["timestamp"])
    assert "canary" not in server.output() and PASSWORD not in server.output()
    told = {line["event"]: line for line in lines}
    fields = {
        "request": {"method", "path", "status", "duration_ms", "client", "user"},
        "uploaded": {"document_id", "size", "media_type"}, "process_started": {"document_id", "attempt"},
        "process_completed": {"document_id", "attempt", "duration_ms"},
        "process_failed": {"document_id", "attempt", "duration_ms", "error"}, "deleted": {"document_id"},
        "login_succeeded": {"user", "client"}, "login_failed": {"user", "client"},
        "login_throttled": {"user", "client"},
        "token_reused": {"user", "client"}, "logged_out": {"user", "client"}}
    for event, expected in fields.items():
        assert expected | {"request_id"} <= set(told[event]), event
    assert told["process_completed"]["request_id"] == "the-run"
    assert "forged" not in told and any(line["event"].startswith("Uvicorn running on") for line in lines)
    assert {line["user"] for line in lines if line["event"] == "request"} >= {"admin", None}


# Hostile input: requests byte by byte, and files that are not what they say


SECRET = "canary-key-0123456789-0123456789"
UPLOAD_LIMIT = 5_000_000
Target = tuple[httpx.Client, Settings]


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    settings = settings_in(tmp_path_factory.mktemp("target"), jwt_secret=SECRET, max_upload_bytes=UPLOAD_LIMIT,
                           upload_idle_seconds=1)
    with running(settings) as client:
        yield client, settings


@contextlib.contextmanager
def unharmed(target: Target) -> Iterator[None]:
    """Afterwards the server answers as before, and nothing new is on disk."""
    client, settings = target
    before = stored_files(settings)
    yield
    assert client.get("/healthz").status_code == 200
    assert stored_files(settings) == before


@contextlib.contextmanager
def connected(client: httpx.Client) -> Iterator[socket.socket]:
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), 30) as connection:
        yield connection


def exchange(client: httpx.Client, request: bytes) -> tuple[int, dict[str, Any]]:
    """Status and body of the answer to these bytes. TOKEN in them becomes the client's."""
    token = client.headers["Authorization"].removeprefix("Bearer ").encode()
    with connected(client) as connection:
        connection.sendall(request.replace(b"TOKEN", token))
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        body = answer.read()
    return answer.status, json.loads(body) if body.startswith(b"{") else {"code": body.decode()}


def wire(line: str, body: bytes = b"", /, **headers: str | None) -> bytes:
    """A request. None leaves out one of the usual headers."""
    usual = {"Host": "x", "Authorization": "Bearer TOKEN", "Content-Length": str(len(body))}
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{line} HTTP/1.1", *(f"{name}: {value}" for name, value in {**usual, **given}.items()
                                   if value is not None), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def part(content: bytes = PDF, disposition: bytes = b'form-data; name="file"; filename="a.pdf"') -> bytes:
    return b"--b\r\nContent-Disposition: " + disposition + b"\r\n\r\n" + content + b"\r\n"


def sent(body: bytes, **headers: str | None) -> bytes:
    return wire("POST /documents/upload", body, **{"Content_Type": "multipart/form-data; boundary=b", **headers})


def file(name: str | bytes, content: bytes = PDF) -> bytes:
    """An upload. `name` as it stands between the quotes."""
    raw = name if isinstance(name, bytes) else name.encode()
    return sent(part(content, b'form-data; name="file"; filename="' + raw + b'"') + b"--b--\r\n")


def chunked(body: bytes, size: int = 65536) -> bytes:
    pieces = [body[i:i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])


def login(body: str | bytes, media_type: str = "application/json") -> bytes:
    raw = body if isinstance(body, bytes) else body.encode(errors="surrogatepass")
    return wire("POST /auth/login", raw, Content_Type=media_type, Authorization=None)


def form(body: str) -> bytes:
    return login(body, "application/x-www-form-urlencoded")


def archive_of(entries: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return packed.getvalue()


def tampered(change: Callable[[zipfile.ZipFile], object], entries: dict[str, bytes] | None = None) -> bytes:
    """A DOCX whose directory has been changed."""
    packed = io.BytesIO(docx(entries=entries, compression=zipfile.ZIP_STORED))
    with zipfile.ZipFile(packed, "a") as archive:
        change(archive)
        archive.writestr("last", b"")  # so that the directory is written again
    return packed.getvalue()


def with_fields(name: str, entries: dict[str, bytes] | None = None, **fields: int) -> bytes:
    """A DOCX whose directory tells these things of one of its entries."""
    def change(archive: zipfile.ZipFile) -> None:
        for field, value in fields.items():
            setattr(archive.getinfo(name), field, value)
    return tampered(change, entries)


def bomb(name: str, megabytes: int) -> bytes:
    """A DOCX with an entry of zeros, deflated a thousand to one."""
    deflate, checksum, zeros = zlib.compressobj(9, zlib.DEFLATED, -15), 0, bytes(2**20)
    piece = deflate.compress(zeros) + deflate.flush(zlib.Z_FULL_FLUSH)
    for _ in range(megabytes):
        checksum = zlib.crc32(zeros, checksum)
    return with_fields(name, {name: piece * megabytes + deflate.flush()}, compress_type=zipfile.ZIP_DEFLATED,
                       file_size=megabytes * 2**20, CRC=checksum)


def listed_again(times: int) -> bytes:
    """A DOCX whose directory lists one entry so many times more: it would unpack to that many times its size."""
    return tampered(lambda archive: archive.filelist.extend([archive.filelist[-1]] * times), {"a": bytes(1000)})


def typed(xml: str, encoding: str = "utf-8") -> bytes:
    return docx(entries={"[Content_Types].xml": xml.encode(encoding)})


ENTITIES = "<!DOCTYPE Types [<!ENTITY a 'x'>" + "".join(
    f"<!ENTITY {name} '{f'&{of};' * 10}'>" for of, name in zip("abcdefgh", "bcdefghi")) + "]>"
EXPANDED = CONTENT_TYPES.replace("?>", f"?>{ENTITIES}").replace("/word", "&i;/word")
SPREADSHEET = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"
TEMPLATE = "application/vnd.openxmlformats-officedocument.wordprocessingml.template.main+xml"
MACROS = '<Default Extension="bin" ContentType="application/vnd.ms-office.vbaProject"/>'
DEEP = b"[" * 50_000

BAD_BODY, UNSUPPORTED, TOO_LARGE = (400, "malformed_body"), (415, "unsupported_media_type"), (413, "too_large")
INVALID, UNKNOWN = (422, "validation_error"), (404, "not_found")
NO_TOKEN, BAD_TOKEN = (401, "missing_token"), (401, "invalid_token")
NOT_HTTP = (400, "Invalid HTTP request received.")  # uvicorn's own answer, before there is a request

HOSTILE: dict[str, tuple[bytes, tuple[int, str]]] = {  # a 201 tells the filename, any other its code
    "multipart: fine": (file("a.pdf"), (201, "a.pdf")),
    "multipart: not it": (sent(part() + b"--b--", Content_Type="application/pdf"), UNSUPPORTED),
    "multipart: no type": (sent(part() + b"--b--", Content_Type=None), UNSUPPORTED),
    "multipart: no boundary": (sent(part() + b"--b--", Content_Type="multipart/form-data"), BAD_BODY),
    "multipart: empty boundary": (sent(part() + b"--b--", Content_Type="multipart/form-data; boundary="), BAD_BODY),
    "multipart: wrong boundary": (sent(part() + b"--b--", Content_Type="multipart/form-data; boundary=c"), BAD_BODY),
    "multipart: boundary of 300": (
        sent(part() + b"--b--", Content_Type="multipart/form-data; boundary=" + "b" * 300), BAD_BODY),
    "multipart: no body": (sent(b""), BAD_BODY),
    "multipart: not closed": (sent(part()), BAD_BODY),
    "multipart: closed at once": (sent(b"--b--\r\n"), INVALID),
    "multipart: ends in the header": (sent(part()[:40]), BAD_BODY),
    "multipart: header of 100 KB": (
        sent(part(disposition=b'form-data; name="file"; filename="a.pdf"; x=' + b"x" * 100_000) + b"--b--"), BAD_BODY),
    "multipart: header name of 100 KB": (sent(b"--b\r\n" + b"x" * 100_000 + b": y\r\n\r\n"), BAD_BODY),
    "multipart: 2,000 headers": (sent(b"--b\r\n" + b"x: y\r\n" * 2000 + b"\r\n\r\n--b--"), BAD_BODY),
    "multipart: 2,000 parts": (sent(part(b"x", b'form-data; name="x"') * 2000 + part() + b"--b--"), BAD_BODY),
    "multipart: two files": (sent(part() * 2 + b"--b--"), INVALID),
    "multipart: file as text": (sent(part(disposition=b'form-data; name="file"') + b"--b--"), INVALID),
    "multipart: no file": (sent(part(disposition=b'form-data; name="x"; filename="a.pdf"') + b"--b--"), INVALID),
    "multipart: extended filename": (
        sent(part(disposition=b"form-data; name=\"file\"; filename*=utf-8''a.pdf") + b"--b--"), INVALID),
    "multipart: silent client": (sent(part(), Content_Length="1000"), (408, "upload_timeout")),
    "filename: NUL": (file("a\0b.pdf\0.exe.pdf"), (201, "ab.pdf.exe.pdf")),
    "filename: NUL before another": (file("a.pdf\0.exe"), UNSUPPORTED),
    "filename: ../": (file("../../../etc/cron.d/a.pdf"), (201, "a.pdf")),
    "filename: ..\\": (file("..\\..\\windows\\a.pdf"), (201, "a.pdf")),
    "filename: dots": (file("../.."), UNSUPPORTED),
    "filename: folder": (file("a.pdf/"), INVALID),
    "filename: 10,000 characters": (file("x" * 10_000 + ".pdf"), (201, "x" * 251 + ".pdf")),
    "filename: right-to-left": (file("a\u202efdp.exe\u202c.pdf"), (201, "afdp.exe.pdf")),
    "filename: no UTF-8": (file(b"\xff\xc0\xae.pdf"), (201, "\ufffd\ufffd\ufffd.pdf")),
    "filename: surrogate": (file(b"\xed\xa0\x80.pdf"), (201, "\ufffd\ufffd\ufffd.pdf")),
    "filename: quotes": (file('a\\"; filename=\\"b.exe\\".pdf'), (201, 'a"; filename="b.exe".pdf')),
    "filename: line break": (file("a\r\nX-Evil: 1\r\n.pdf"), BAD_BODY),
    "filename: line feed": (file("a\nX-Evil: 1.pdf"), (201, "aX-Evil: 1.pdf")),
    "filename: escaped line break": (file("a%0d%0aX-Evil: 1.pdf"), (201, "a%0d%0aX-Evil: 1.pdf")),
    "length: too small": (sent(part() + b"--b--", Content_Length="100"), BAD_BODY),
    "length: too large": (sent(part() + b"--b--", Content_Length="1000"), (408, "upload_timeout")),
    "length: over the limit": (sent(b"", Content_Length=str(UPLOAD_LIMIT + 10**6)), TOO_LARGE),
    "length: of 19 digits": (sent(b"", Content_Length="9" * 19), TOO_LARGE),
    "length: of 5,000 digits": (sent(b"", Content_Length="9" * 5000), NOT_HTTP),
    "length: negative": (sent(b"", Content_Length="-1"), NOT_HTTP),
    "length: two of them": (sent(b"", Content_Length="1\r\nContent-Length: 2"), NOT_HTTP),
    "length: exactly the limit": (file("a.pdf", PDF.ljust(UPLOAD_LIMIT)), (201, "a.pdf")),
    "length: one more": (file("a.pdf", PDF.ljust(UPLOAD_LIMIT + 1)), TOO_LARGE),
    "chunked: fine": (sent(chunked(part() + b"--b--", 1), Transfer_Encoding="chunked", Content_Length=None),
                      (201, "a.pdf")),
    "chunked: over the limit": (
        sent(chunked(part(PDF.ljust(UPLOAD_LIMIT + 1))), Transfer_Encoding="chunked", Content_Length=None), TOO_LARGE),
    "chunked: another part over the limit": (
        sent(chunked(part(bytes(UPLOAD_LIMIT + 10**6), b'form-data; name="x"')), Transfer_Encoding="chunked",
             Content_Length=None), TOO_LARGE),
    "chunked: with a length": (sent(chunked(part() + b"--b--"), Transfer_Encoding="chunked"), (201, "a.pdf")),
    "chunked: not": (sent(b"no size\r\n", Transfer_Encoding="chunked", Content_Length=None), NOT_HTTP),

    "file: empty": (file("a.pdf", b""), INVALID),
    "file: EXE as PDF": (file("a.pdf", b"MZ\x90\0" + bytes(2000)), UNSUPPORTED),
    "file: EXE as DOCX": (file("a.docx", b"MZ\x90\0" + bytes(2000)), UNSUPPORTED),
    "file: EXE": (file("a.exe"), UNSUPPORTED),
    "file: PDF as DOCX": (file("a.docx", PDF), UNSUPPORTED),
    "file: DOCX as PDF": (file("a.pdf", docx()), UNSUPPORTED),
    "file: PDF behind 1,024 bytes": (file("a.pdf", bytes(1024) + PDF), UNSUPPORTED),
    "file: no PDF, and no end": (sent(part(bytes(1100)), Content_Length="1000000"), UNSUPPORTED),
    "file: XLSX": (file("a.docx", docx(SPREADSHEET)), UNSUPPORTED),
    "file: ODT": (file("a.docx", archive_of({
        "mimetype": b"application/vnd.oasis.opendocument.text", "content.xml": b"<x/>"})), UNSUPPORTED),
    "file: macro-enabled": (
        file("a.docx", docx("application/vnd.ms-word.document.macroEnabled.main+xml")), UNSUPPORTED),
    "file: macros all the same": (file("a.docx", typed(CONTENT_TYPES.replace("</", f"{MACROS}</"))), UNSUPPORTED),
    "file: template": (file("a.docx", docx(TEMPLATE)), UNSUPPORTED),
    "file: encrypted": (file("a.docx", bytes.fromhex("d0cf11e0a1b11ae1") + bytes(2000)), UNSUPPORTED),
    "file: encrypted ZIP": (file("a.docx", with_fields("word/document.xml", flag_bits=1)), UNSUPPORTED),
    "file: unknown compression": (file("a.docx", with_fields("word/document.xml", compress_type=14)), UNSUPPORTED),
    "file: truncated": (file("a.docx", docx()[:-30]), UNSUPPORTED),
    "file: the start of one": (file("a.docx", docx()[:8]), UNSUPPORTED),
    "file: not from the start": (file("a.docx", b"x" + docx()), UNSUPPORTED),
    "file: 1000:1 content types": (file("a.docx", bomb("[Content_Types].xml", 3)), UNSUPPORTED),
    "file: overlapping entries": (file("a.docx", listed_again(100)), UNSUPPORTED),
    "file: 10,001 entries": (
        file("a.docx", docx(entries={str(i): b"" for i in range(9999)}, compression=zipfile.ZIP_STORED)), UNSUPPORTED),
    "file: 100,000 entries": (file("a.docx", listed_again(99_997)), UNSUPPORTED),
    "file: lying size": (file("a.docx", with_fields("[Content_Types].xml", file_size=10)), UNSUPPORTED),
    "file: lying packed size": (file("a.docx", with_fields("[Content_Types].xml", compress_size=2**31)), UNSUPPORTED),
    "file: lying offset": (file("a.docx", with_fields("[Content_Types].xml", header_offset=2**31)), UNSUPPORTED),
    "file: two content types": (
        file("a.docx", docx(entries={"[Content_Types].xmm": b"<x/>"}).replace(b".xmm", b".xml")), UNSUPPORTED),
    "file: two, in other letters": (file("a.docx", docx(entries={"[CONTENT_TYPES].XML": b"<x/>"})), UNSUPPORTED),
    "file: no XML": (file("a.docx", typed(CONTENT_TYPES[:-1])), UNSUPPORTED),
    "file: entity bomb": (file("a.docx", typed(EXPANDED)), UNSUPPORTED),
    "file: entity bomb in UTF-16": (file("a.docx", typed(EXPANDED, "utf-16")), UNSUPPORTED),
    "file: external entity": (file("a.docx", typed(CONTENT_TYPES.replace(
        "?>", "?><!DOCTYPE Types SYSTEM 'file:///etc/passwd'>"))), UNSUPPORTED),
    "file: encoding that only Python knows": (file("a.docx", typed(CONTENT_TYPES.replace(
        "?>", " encoding='unicode_escape'?>"))), UNSUPPORTED),

    "JSON: NaN": (login('{"username": NaN, "password": Infinity}'), INVALID),
    "JSON: lone surrogate": (login('{"username": "\\ud800", "password": "x"}'), INVALID),
    "JSON: raw surrogate": (login('{"username": "\ud800", "password": "x"}'), INVALID),
    "JSON: no UTF-8": (login(b'{"username": "\xff", "password": "x"}'), INVALID),
    "JSON: UTF-16": (login('{"username": "x", "password": "x"}'.encode("utf-16")), INVALID),
    "JSON: 50,000 nested arrays": (login(DEEP), INVALID),
    "JSON: 50,000 nested in a field": (login(b'{"username": "x", "password": ' + DEEP), INVALID),
    "JSON: array for an object": (login('["x", "x"]'), INVALID),
    "JSON: array for a string": (login('{"username": ["x"], "password": {"x": "x"}}'), INVALID),
    "JSON: 5,000-digit number": (login('{"username": "x", "password": ' + "9" * 5000 + "}"), INVALID),
    "JSON: huge exponent": (login('{"username": "x", "password": 1e999999999}'), INVALID),
    "JSON: null": (login("null"), INVALID),
    "JSON: empty": (login(""), INVALID),
    "JSON: truncated": (login('{"username": "x'), INVALID),
    "JSON: as text": (login('{"username": "x", "password": "x"}', "text/plain"), UNSUPPORTED),
    "form: surrogate": (form("username=%ED%A0%80&password=x"), INVALID),
    "form: no UTF-8": (form("username=%FF&password=x"), INVALID),
    "form: a field twice": (form("username=x&username=y&password=x"), INVALID),
    "form: 7,000 fields": (
        form("username=x&password=x" + "".join(f"&x{i}=x" for i in range(7000))), (401, "invalid_grant")),
    "form: multipart": (login(part() + b"--b--", "multipart/form-data; boundary=b"), UNSUPPORTED),
    "query: 2^63": (wire("GET /documents?limit=9223372036854775808"), INVALID),
    "query: 5,000 digits": (wire("GET /documents?limit=" + "9" * 5000), INVALID),
    "query: negative": (wire("GET /documents?limit=-1"), INVALID),
    "query: huge": (wire("GET /documents?limit=1000000000"), INVALID),
    "query: other digits": (wire("GET /documents?limit=%EF%BC%91"), INVALID),
    "query: NUL": (wire("GET /documents?limit=1%00"), INVALID),
    "query: status": (wire("GET /documents?status=uploaded'--"), INVALID),
    "query: broken cursor": (wire("GET /documents?cursor=%FF%00"), INVALID),
    "query: forged cursor": (wire("GET /documents?cursor=MjAyNiAnIE9SIDE9MQ=="), INVALID),
    "query: cursor of 60 KB": (wire("GET /documents?cursor=" + "A" * 60_000), INVALID),
    "path: no UUID": (wire("GET /documents/1"), UNKNOWN),
    "path: nearly one": (wire("GET /documents/00000000-0000-4000-8000-00000000000g"), UNKNOWN),
    "path: ..": (wire("GET /documents/../../etc/passwd"), UNKNOWN),
    "path: escaped slash": (wire("GET /documents/..%2f..%2fdocuments.db"), UNKNOWN),
    "path: escaped slash for one": (wire(f"GET {PROTECTED[2][1]}%2ffile"), UNKNOWN),
    "path: no UTF-8": (wire("GET /documents/%ff%c0%ae"), UNKNOWN),
    "path: NUL": (wire("DELETE /documents/%00"), UNKNOWN),
    "path: raw byte": (wire("GET /documents/\xff"), NOT_HTTP),
    "path: of 60 KB": (wire("GET /documents/" + "a" * 60_000), UNKNOWN),
    "method: unknown": (wire("BREW /documents"), (405, "method_not_allowed")),
    "header: without an end": (wire("GET /documents", X="x" * 65_500)[:-4], NOT_HTTP),

    "token: none": (wire("GET /documents", Authorization=None), NO_TOKEN),
    "token: Basic": (wire("GET /documents", Authorization="Basic TOKEN"), NO_TOKEN),
    "token: nothing behind Bearer": (wire("GET /documents", Authorization="Bearer"), BAD_TOKEN),
    "token: in the query": (wire("GET /documents?access_token=TOKEN&token=TOKEN", Authorization=None), NO_TOKEN),
    "token: in a cookie": (wire("GET /documents", Authorization=None, Cookie="access_token=TOKEN"), NO_TOKEN),
    "token: trailing =": (wire("GET /documents", Authorization="Bearer TOKEN="), BAD_TOKEN),
    "token: blank in it": (wire("GET /documents", Authorization="Bearer TOKEN x"), BAD_TOKEN),
    "token: two headers": (
        wire("GET /documents", Authorization="Bearer TOKEN\r\nAuthorization: Bearer TOKEN"), BAD_TOKEN),
    "token: Basic before it": (
        wire("GET /documents", Authorization="Basic YTpi\r\nAuthorization: Bearer TOKEN"), NO_TOKEN),
    "token: 60 KB": (wire("GET /documents", Authorization="Bearer x." + "A" * 60_000 + ".x"), BAD_TOKEN),
    "token: no ASCII": (wire("GET /documents", Authorization="Bearer \xe9.\xe9.\xe9"), BAD_TOKEN),
    "token: before the body": (
        sent(b"", Authorization=None, Content_Type=None, Content_Length=str(10**12)), NO_TOKEN),
    "login: password of 1 MB": (login('{"username": "x", "password": "' + "x" * 10**6 + '"}'), TOO_LARGE),
    "login: form of 1 MB": (form("username=x&password=" + "x" * 10**6), TOO_LARGE),
    "login: password of 1,025": (form("username=x&password=" + "x" * 1025), INVALID),
    "login: no password": (form("username=x&password="), INVALID),
    "login: silent client": (wire("POST /auth/login", Content_Type="application/json", Content_Length="9"),
                             (408, "upload_timeout")),
    "refresh: 60 KB": (wire("POST /auth/refresh", b'{"refresh_token": "%b"}' % (b"A" * 60_000),
                            Content_Type="application/json"), INVALID),
}


@pytest.mark.parametrize("request_bytes, expected", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_input(target: Target, request_bytes: bytes, expected: tuple[int, str]) -> None:
    client = target[0]
    with unharmed(target):
        status, body = exchange(client, request_bytes)
        assert (status, body.get("code", body.get("filename"))) == expected
        if status == 201:
            answer = client.get(f"/documents/{body['document_id']}/file")
            assert answer.status_code == 200 and "X-Evil" not in answer.headers
            assert re.fullmatch(r"attachment; filename=\"[ !#-~]+\"; filename\*=UTF-8''[\w.~%-]+",
                                answer.headers["Content-Disposition"])
            assert client.delete(f"/documents/{body['document_id']}").status_code == 204


DAMAGED: dict[str, tuple[str, bytes]] = {
    "truncated PDF": ("a.pdf", PDF[:-7]),
    "lying size": ("a.docx", with_fields("word/document.xml", file_size=5)),
    "wrong checksum": ("a.docx", with_fields("word/document.xml", CRC=1)),
    "no deflate": ("a.docx", with_fields("word/document.xml", compress_type=zipfile.ZIP_DEFLATED)),
    "another name inside": ("a.docx", docx().replace(b"word/document.xml", b"word/documint.xml", 1)),
}


@pytest.mark.parametrize("filename, content", DAMAGED.values(), ids=DAMAGED.keys())
def test_hostile_files_end_failed(target: Target, filename: str, content: bytes) -> None:
    client = target[0]
    with unharmed(target):
        path = uploaded(client, content, filename)
        status = processed(client, path)
        assert (status["status"], status["error"]["code"]) == ("FAILED", "damaged_document")
        assert client.delete(path).status_code == 204


def test_a_client_that_goes_leaves_nothing(target: Target) -> None:
    client, settings = target
    with unharmed(target):
        before = stored_files(settings)
        with connected(client) as connection:
            token = client.headers["Authorization"].removeprefix("Bearer ").encode()
            connection.sendall(sent(part(PDF.ljust(2 * 10**6)), Content_Length=str(3 * 10**6)).replace(b"TOKEN", token))
            until(lambda: [name for name in stored_files(settings) if name.endswith(".part")])
        until(lambda: stored_files(settings) == before)


def peak_memory(server: Server) -> int:
    """Bytes (proc(5))."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


def test_bombs_take_little_memory(tmp_path: Path) -> None:
    with Server(tmp_path, DOCS_PROCESS_SECONDS="0") as server, server.client() as client:
        assert processed(client, uploaded(client, docx(), "a.docx"))["status"] == "COMPLETED"
        before = peak_memory(server)
        with ThreadPoolExecutor(4) as pool:
            bombs = [bomb("[Content_Types].xml", 600)] * 4
            assert [answer.status_code for answer in pool.map(
                lambda content: upload(client, content, "a.docx"), bombs)] == [415] * 4
        status = processed(client, uploaded(client, bomb("word/media.bin", 600), "a.docx"))
        assert (status["status"], status["error"]["code"]) == ("FAILED", "damaged_document")
        assert peak_memory(server) - before < 64 * 2**20


# Hostile tokens


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
    **{f"alg {alg}, signed": ({"alg": alg}, {}, "sha256", SECRET) for alg in ("none", "hs256", "RS256", "ES256")},
    "alg HS512": ({"alg": "HS512"}, {}, "sha512", SECRET), "alg HS384": ({"alg": "HS384"}, {}, "sha384", SECRET),
    "no alg": ({"alg": None}, {}, "sha256", SECRET),
    "expired": ({}, {"exp": 1}, "sha256", SECRET), "expires as text": ({}, {"exp": "never"}, "sha256", SECRET),
    "not yet valid": ({}, {"nbf": 2**33}, "sha256", SECRET), "of the future": ({}, {"iat": 2**33}, "sha256", SECRET),
    **{f"no {claim}": ({}, {claim: None}, "sha256", SECRET)
       for claim in ("iss", "aud", "sub", "iat", "exp", "jti", "sid")},
    "another issuer": ({}, {"iss": "x"}, "sha256", SECRET), "another audience": ({}, {"aud": "x"}, "sha256", SECRET),
    "two audiences": ({}, {"aud": [auth.ISSUER, "x"]}, "sha256", SECRET),
    "another session": ({}, {"sid": "00000000-0000-4000-8000-000000000000"}, "sha256", SECRET),
    "refresh as access": ({"typ": auth.REFRESH}, {}, "sha256", SECRET),
    "typ JWT": ({"typ": "JWT"}, {}, "sha256", SECRET), "no typ": ({"typ": None}, {}, "sha256", SECRET),
    "kid": ({"kid": "../../dev/null"}, {}, "sha256", SECRET),
    "jku": ({"jku": "http://127.0.0.1/keys"}, {}, "sha256", SECRET),
    "jwk": ({"jwk": {"kty": "oct", "k": ""}}, {}, "sha256", SECRET),
    "crit": ({"crit": ["exp"]}, {}, "sha256", SECRET), "b64": ({"b64": False, "crit": ["b64"]}, {}, "sha256", SECRET),
}
Fields = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="session")
def good_token(target: Target) -> Fields:
    """Its header and payload."""
    header, payload, _ = log_in(target[0])["access_token"].split(".")
    return json.loads(base64.urlsafe_b64decode(header + "==")), json.loads(base64.urlsafe_b64decode(payload + "=="))


def challenge(client: httpx.Client, token: str) -> tuple[int, str | None]:
    answer = client.get("/documents?limit=1", headers={"Authorization": f"Bearer {token}"})
    return answer.status_code, answer.headers.get("WWW-Authenticate")


REFUSED = (401, 'Bearer error="invalid_token"')


@pytest.mark.parametrize("header, payload, digest, secret", FORGED.values(), ids=FORGED.keys())
def test_a_forged_token_is_refused(target: Target, good_token: Fields, header: dict[str, Any],
                                   payload: dict[str, Any], digest: str, secret: str) -> None:
    assert challenge(target[0], jws(*good_token)) == (200, None)  # so it is the change that makes it bad
    assert challenge(target[0], jws(good_token[0] | header, good_token[1] | payload, digest, secret)) == REFUSED


def test_a_changed_token_is_refused(target: Target, good_token: Fields) -> None:
    header, payload, signature = jws(*good_token).split(".")
    other = jws(good_token[0], good_token[1] | {"sub": "x"}).split(".")[1]
    flipped = ("B" if signature[0] == "A" else "A") + signature[1:]
    for parts in ((header, other, signature), (header, payload, flipped), (header, payload, signature[:-1]),
                  (header, payload, ""), (header, payload), (header, payload, signature, signature),
                  (header, payload, signature + "="), (header + "=", payload, signature)):
        assert challenge(target[0], ".".join(parts)) == REFUSED, parts


def test_tokens_of_one_kind_are_none_of_the_other(target: Target) -> None:
    tokens = log_in(target[0])
    assert challenge(target[0], tokens["refresh_token"]) == REFUSED
    answer = refresh(target[0], tokens["access_token"])
    assert (answer.status_code, answer.json()["code"]) == (401, "invalid_grant")
    assert refresh(target[0], tokens["refresh_token"]).status_code == 200  # no harm was done


# Hostile logins


def guess(client: httpx.Client, password: str, username: str = "admin", forwarded_for: str | None = None) -> int:
    headers = {"X-Forwarded-For": forwarded_for} if forwarded_for else {}
    return client.post("/auth/login", data={"username": username, "password": password}, headers=headers).status_code


def test_every_login_is_the_same_work_whoever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work: list[dict[str, Any]] = []
    scrypt = hashlib.scrypt

    def counted(secret: bytes, **options: Any) -> bytes:
        work.append({**options, "salt": len(options["salt"])})
        return scrypt(secret, **options)

    with running(settings_in(tmp_path)) as client:
        monkeypatch.setattr(hashlib, "scrypt", counted)
        for username, password, status in (
                ("admin", PASSWORD, 200), ("admin", "x", 401), ("nobody", "x", 401), ("nobody", PASSWORD, 401)):
            assert guess(client, password, username) == status
    assert len(work) == 4 and all(done == work[0] for done in work)


def test_parallel_logins_all_succeed_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "SCRYPT_N", 2**14)
    monkeypatch.setattr(auth, "SCRYPT_P", 1)  # a fifth of the time, and as much memory as ever
    with Server(tmp_path) as server, server.client() as client, ThreadPoolExecutor(100) as pool:
        database = Database(tmp_path / "data" / "documents.db")
        database.set_user("eve", auth.hash_password("eve")).result()
        database.close()
        assert guess(client, "eve", "eve") == 200
        before = peak_memory(server)
        assert set(pool.map(lambda _: guess(client, "eve", "eve"), range(100))) == {200}
        assert peak_memory(server) - before < 64 * 2**20  # 16 MiB each, but only two at a time


def test_of_parallel_guesses_only_five_are_answered(tmp_path: Path) -> None:
    with running(settings_in(tmp_path)) as client, ThreadPoolExecutor(30) as pool:
        assert sorted(pool.map(lambda i: guess(client, f"wrong {i}"), range(30))) == [401] * 5 + [429] * 25
        assert guess(client, PASSWORD) == 429


def test_a_right_guess_among_wrong_ones_is_not_told_apart(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_made_up_address_neither_dodges_the_throttle_nor_locks_another_out(tmp_path: Path) -> None:
    made_up = ["10.0.0.1", "10.0.0.2:99", "127.0.0.3", "10.0.0.4: 9", "[::1]:1", "x", "127.0.0.3, 10.0.0.5", "::"]
    with running(settings_in(tmp_path)) as client:
        assert [guess(client, "wrong", forwarded_for=address) for address in made_up] == [401] * 5 + [429] * 3
        assert guess(client, PASSWORD, forwarded_for="127.0.0.1") == 429
        for address in ("127.0.0.3", "127.0.0.4"):  # the one was made up by others, the other makes them up
            elsewhere = httpx.HTTPTransport(local_address=address)
            with httpx.Client(base_url=client.base_url, transport=elsewhere) as other:
                assert guess(other, PASSWORD) == 200
        with httpx.Client(base_url=client.base_url, transport=httpx.HTTPTransport(local_address=address)) as other:
            assert [guess(other, "wrong", forwarded_for=address) for address in made_up] == [401] * 5 + [429] * 3
            assert guess(other, PASSWORD) == 429


def test_a_trusted_proxy_tells_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "127.0.0.1")
    with running(settings_in(tmp_path)) as client:
        made_up = [f"10.0.0.{i}, 192.0.2.1" for i in range(6)]  # the proxy has added the last one
        assert [guess(client, "wrong", forwarded_for=address) for address in made_up] == [401] * 5 + [429]
        assert guess(client, PASSWORD, forwarded_for="192.0.2.2") == 200


# The log under fire


def test_secrets_and_contents_reach_neither_log_nor_error(tmp_path: Path) -> None:
    canary, fields = "canary-4711", "application/x-www-form-urlencoded"
    content = canary.encode()
    requests = [
        login(f'{{"username": "x", "password": "{canary}"}}'), login(f'{{"username": 1, "password": "{canary}"}}'),
        login(f'{{"{canary}": {canary}'), login(f'["{canary}"]'), form(f"username=x&password={canary}"),
        form(f"username=x&password={canary}&password={canary}"), form(f"{canary}=%FF"),
        wire("POST /auth/refresh", b"refresh_token=" + content, Content_Type=fields),
        wire("POST /auth/logout", b"refresh_token=" + content, Content_Type=fields),
        *(wire(f"GET /{path}{canary}") for path in (
            "?", "documents?", "documents?limit=", "documents?cursor=", "documents?status=", "docs?")),
        wire(f"PUT /documents?{canary}"), wire(f"GET /documents?access_token={canary}", Authorization=None),
        *(wire("GET /documents", Authorization=f"{scheme}{canary}") for scheme in ("", "Basic ", "Bearer ")),
        wire("GET /documents", Authorization=f"Bearer {canary}\r\nAuthorization: Bearer {canary}"),
        wire("GET /documents", Cookie=canary, X_Api_Key=canary), wire("GET /", b"", **{canary: "\0"}), wire(canary),
        sent(content), sent(b"--b\r\n\xff" + content), sent(part(PDF + content)[:-5]),
        sent(part(disposition=b"form-data; name=" + content) + part(content) + b"--b--"),
        sent(b"", Content_Type=f"multipart/form-data; boundary={canary * 30}"),
        sent(part() + b"--b--", Idempotency_Key=f"{canary} \xff"),
        file("a.pdf", content), file("a.docx", b"PK\3\4" + content), file("a.docx", typed(f"<{canary}>"))]
    damaged = docx(entries={canary: content}, compression=zipfile.ZIP_STORED).replace(content * 2, content + b"x" * 11)
    with Server(tmp_path, DOCS_PROCESS_SECONDS="0", DOCS_LOG_LEVEL="DEBUG") as server, server.client() as client:
        answers = [exchange(client, request) for request in requests]
        assert {status // 100 for status, _ in answers} == {2, 4} and canary not in json.dumps(answers)
        for document, filename in ((damaged, "a.docx"), (PDF[:-7] + content, "a.pdf")):
            status = processed(client, uploaded(client, document, filename))
            assert status["status"] == "FAILED" and canary not in json.dumps(status)
        tokens = log_in(client)
        for _ in range(2):
            refresh(client, tokens["refresh_token"])
        key = (tmp_path / "data" / "jwt-secret").read_text()
    assert len([line for line in server.lines() if line["event"] == "request"]) > len(requests) - 5
    for secret in (canary, PASSWORD, key, tokens["access_token"], tokens["refresh_token"],
                   client.headers["Authorization"].removeprefix("Bearer ")):
        assert secret not in server.output()


def test_an_unexpected_error_is_logged_without_its_text(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    text = "canary"

    def broken(*_: Any) -> Any:
        raise RuntimeError(text)

    def pipeline(*_: Any) -> Any:
        raise ValueError(text) from OSError(text)

    with running(settings_in(tmp_path), pipeline=pipeline) as client:
        assert processed(client, uploaded(client))["status"] == "FAILED"
        monkeypatch.setattr(Database, "documents", broken)
        assert client.get("/documents").status_code == 500
    lines = [main.JsonFormatter().format(record) for record in caplog.records]
    told = {line["event"]: line for line in map(json.loads, lines)}
    for event, exception, place in (("unhandled_error", "RuntimeError", "in broken"),
                                    ("process_failed", "ValueError", "in pipeline")):
        assert told[event]["exception"] == exception and place in told[event]["stack"]
    assert told["process_failed"]["error"] == "pipeline_error"
    assert text not in str(lines)


def test_a_client_that_breaks_the_protocol_is_no_error_of_ours(tmp_path: Path) -> None:
    with Server(tmp_path) as server, server.client() as client:
        for line in ("GET /healthz", "POST /auth/login", "POST /documents/upload", "GET /nowhere"):
            broken = wire(line, b"no size\r\n", Transfer_Encoding="chunked", Content_Length=None, Authorization=None)
            assert exchange(client, broken) == (400, {"code": "Invalid HTTP request received."})
    assert [line for line in server.lines() if line["level"] == "ERROR"] == []


def test_no_byte_of_a_request_breaks_a_line(tmp_path: Path) -> None:
    with Server(tmp_path) as server, server.client() as client:
        for byte in range(256):
            assert exchange(client, wire(f"GET /%{byte:02x}"))[0] in (404, 405)
        for byte in (0, 1, 9, 11, 12, 27, 127, 128, 133, 155, 160, 255):
            raw = f"1{byte:c}1"
            exchange(client, wire("GET /", X_Forwarded_For=raw, User_Agent=raw, X_Request_ID=raw))
        for name in ('\r\n{"event": "forged"}', "\u2028\u2029\x85", "\x1b[2J", "\U0001f600", '"\\', "\0"):
            assert guess(client, "x", name) == 401
        assert exchange(client, wire("GET /" + "%0a" * 20_000))[0] == 404
    output = server.output_file.read_bytes()
    lines = [json.loads(line) for line in output.split(b"\n")[:-1]]
    assert all({"timestamp", "level", "logger", "event"} <= set(line) for line in lines)
    assert "forged" not in {line["event"] for line in lines}
    assert len([line for line in lines if line["event"] == "login_failed"]) == 6
    assert max(map(len, output.split(b"\n"))) < 4096 and not re.search(rb"[^\x20-\x7e\n]", output)


@pytest.mark.parametrize("kind", ["closed", "full", "broken", "unread"])
def test_a_log_that_goes_nowhere_does_not_stop_the_service(tmp_path: Path, kind: str) -> None:
    reader, writer = os.pipe()
    with open("/dev/full", "wb") as full, open(reader, "rb", 0) as pipe:
        stdout = {"closed": None, "full": full.fileno()}.get(kind, writer)
        server = Server(tmp_path, stdout=stdout, DOCS_PROCESS_SECONDS="0")
        os.close(writer)
        if kind == "broken":
            pipe.close()
        with server, server.client() as client:
            assert all(client.get("/healthz").status_code == 200 for _ in range(300))  # a pipe takes 64 KiB
            assert processed(client, uploaded(client))["status"] == "COMPLETED"
            if kind == "unread":
                os.set_blocking(reader, False)
                lines: list[dict[str, Any]] = []

                def lost() -> int:
                    assert client.get("/healthz").status_code == 200
                    lines.extend(json.loads(line) for line in (pipe.read(2**20) or b"").splitlines())
                    return sum(line.get("lines_lost_before", 0) for line in lines)

                assert until(lost) + len(lines) > 300
        assert server.output() == ""


# Crashes


def settled(client: httpx.Client, data: Path) -> dict[str, dict[str, Any]]:
    """All documents by id, once every run has ended by itself and the sweep is through, with all that holds then."""
    until(lambda: client.get("/documents?status=PROCESSING").json() == [])
    url, documents = "/documents?limit=200", dict[str, dict[str, Any]]()
    while url:
        answer = client.get(url)
        documents |= {document["document_id"]: document for document in answer.json()}
        url = answer.links.get("next", {}).get("url", "")
    with contextlib.suppress(AssertionError):  # the comparison below says more
        until(lambda: set(os.listdir(data / "files")) == set(documents), 5)
    assert {name: hashlib.sha256((data / "files" / name).read_bytes()).hexdigest()
            for name in os.listdir(data / "files")} == {key: value["sha256"] for key, value in documents.items()}
    with contextlib.closing(sqlite3.connect(f"file:{data}/documents.db?mode=ro", uri=True)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []
        results = database.execute("SELECT document_id, result FROM results").fetchall()
    assert sorted((key, json.loads(result)["source"]["sha256"]) for key, result in results) == sorted(
        (key, value["sha256"]) for key, value in documents.items() if value["status"] == "COMPLETED")
    return documents


def age_files(data: Path) -> None:
    """Makes all files old enough for the sweep; only while no upload is under way."""
    for path in (data / "files").glob("*"):
        os.utime(path, (0, 0))


class Load:
    """Threads that upload, process and delete, and a ledger of what was answered and what is in doubt."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.uploaded: dict[str, str] = {}  # answered with 201 and not deleted: the SHA-256
        self.processed: set[str] = set()  # answered with 202
        self.deleted: set[str] = set()  # answered with 204
        self.doubtful_uploads: dict[str, bytes] = {}  # no answer: the content by Idempotency-Key
        self.doubtful_deletes: set[str] = set()
        self._ended: dict[str, str] = {}  # when the run ended

    @contextlib.contextmanager
    def on(self, client: httpx.Client) -> Iterator[None]:
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                with contextlib.suppress(httpx.TransportError):
                    self._one_document(client)

        with ThreadPoolExecutor(4) as pool:
            threads = [pool.submit(work) for _ in range(4)]
            try:
                yield
            finally:
                stop.set()
        for thread in threads:
            thread.result()

    def _one_document(self, client: httpx.Client) -> None:
        key, content = uuid.uuid4().hex, b"%PDF-1.7" + os.urandom(random.randrange(40_000)) + b"%%EOF"
        self.doubtful_uploads[key] = content
        document_id = self._upload(client, key).json()["document_id"]
        if random.random() < 0.7:
            answer = client.post(f"/documents/{document_id}/process")
            assert answer.status_code == 202, answer.text
            self.processed.add(document_id)
            self.counts["runs"] += 1
        if random.random() < 0.4:
            self.doubtful_deletes.add(document_id)
            answer = client.delete(f"/documents/{document_id}")
            assert answer.status_code == 204, answer.text
            self.doubtful_deletes.remove(document_id)
            del self.uploaded[document_id]
            self.deleted.add(document_id)
            self.counts["deletes"] += 1

    def _upload(self, client: httpx.Client, key: str) -> httpx.Response:
        answer = upload(client, self.doubtful_uploads[key], **{"Idempotency-Key": key})
        assert answer.status_code == 201, answer.text
        content = self.doubtful_uploads.pop(key)
        self.uploaded[answer.json()["document_id"]] = hashlib.sha256(content).hexdigest()
        self.counts["uploads"] += 1
        return answer

    def check(self, client: httpx.Client, data: Path) -> None:
        """That all is there which was answered, and that what is in doubt happened wholly or not at all."""
        documents = settled(client, data)
        self.counts["in doubt"] += len(self.doubtful_uploads) + len(self.doubtful_deletes)
        for document_id in self.doubtful_deletes - set(documents):
            del self.uploaded[document_id]
        self.doubtful_deletes.clear()
        assert self.uploaded.items() <= {key: value["sha256"] for key, value in documents.items()}.items()
        assert not self.deleted & set(documents)
        done = {documents[key]["sha256"]: key for key in set(documents) - set(self.uploaded)}
        for key, content in list(self.doubtful_uploads.items()):  # the client asks again
            known = done.pop(hashlib.sha256(content).hexdigest(), None)
            answer = self._upload(client, key)
            assert ("Idempotency-Replayed" in answer.headers) == (known is not None)
            assert known in (None, answer.json()["document_id"])
        assert not done  # no document that nobody sent
        for document_id in self.processed & set(documents):
            assert documents[document_id]["status"] in ("COMPLETED", "FAILED")
            ended = self._ended.setdefault(document_id, documents[document_id]["updated_at"])
            assert ended == documents[document_id]["updated_at"]  # the result stands
            self.counts["failed runs"] += documents[document_id]["status"] == "FAILED"
        document_id = random.choice(list(self.uploaded))
        content = client.get(f"/documents/{document_id}/file").content
        assert hashlib.sha256(content).hexdigest() == self.uploaded[document_id]

    def print(self, title: str, rounds: int) -> None:
        print(f"\n{title}: {rounds} rounds,", ", ".join(f"{count} {what}" for what, count in self.counts.items()))


KILL_ROUNDS = int(os.environ.get("KILL_ROUNDS", "10"))
QUICK = {"DOCS_LEASE_SECONDS": "0.5", "DOCS_PROCESS_SECONDS": "0.1", "DOCS_PROCESS_WORKERS": "16",
         "DOCS_ACCESS_TOKEN_SECONDS": "86400"}


def ended_runs(folder: Path) -> Counter[str]:
    """How often the logs of all servers in this folder say so of each document."""
    lines = [line for file in folder.glob("output-*") for line in file.read_text().splitlines()]
    return Counter(json.loads(line)["document_id"] for line in lines if '"process_completed"' in line)


def test_nothing_answered_is_lost_when_the_server_is_killed(tmp_path: Path) -> None:
    data, load, token = tmp_path / "data", Load(), dict[str, str]()
    for _ in range(KILL_ROUNDS):
        with Server(tmp_path, **QUICK) as server, httpx.Client(base_url=server.url, timeout=60) as client:
            token = token or {"Authorization": f"Bearer {log_in(client)['access_token']}"}
            client.headers.update(token)  # a session too outlives the crash
            if load.uploaded:
                load.check(client, data)
            with load.on(client):
                time.sleep(random.uniform(0.05, 0.6))
                server.process.kill()
        if random.random() < 0.2:
            starting = Server(tmp_path, **QUICK)
            time.sleep(random.uniform(0.1, 0.5))
            starting.process.kill()
            starting.process.wait()
        age_files(data)
    with Server(tmp_path, **QUICK) as server, httpx.Client(base_url=server.url, headers=token, timeout=60) as client:
        load.check(client, data)
    assert set(ended_runs(tmp_path).values()) == {1}
    load.print("server killed", KILL_ROUNDS)


def test_nothing_answered_is_lost_when_one_of_two_workers_is_killed(tmp_path: Path) -> None:
    data, load, rounds, killed = tmp_path / "data", Load(), max(1, KILL_ROUNDS // 3), set[int]()

    with Server(tmp_path, "--workers", "2", **QUICK) as server, server.client() as client:
        client.headers["Connection"] = "close"  # either worker may take the next request

        def both() -> list[int]:
            """The two that live, once both serve."""
            started = set(map(int, re.findall(r"Started server process \[(\d+)\]", server.output())))
            ready = server.output().count("Application startup complete")
            return list(started - killed) if len(started) == ready == len(killed) + 2 else []

        def kill(pid: int) -> None:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)

        def go_on() -> None:
            before = load.counts["uploads"]
            until(lambda: load.counts["uploads"] > before + 8)

        for _ in range(rounds):
            first, second = random.sample(until(both), 2)
            with load.on(client):
                time.sleep(random.uniform(0.05, 0.5))
                kill(first)
                go_on()
                until(both)
                go_on()  # while the new one sweeps
            age_files(data)
            kill(second)  # the one in its place sweeps what the first left
            until(both)
            load.check(client, data)
    assert set(ended_runs(tmp_path).values()) == {1}
    load.print("one of two workers killed", rounds)


def test_the_sweep_at_a_start_spares_what_may_be_under_way(tmp_path: Path) -> None:
    settings, go = settings_in(tmp_path), threading.Event()
    files = settings.data_dir / "files"

    def body() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.pdf"\r\n\r\n' + PDF[:9] + bytes(2**21)
        assert go.wait(30)
        yield PDF[9:] + b"\r\n--x--\r\n"

    with running(settings) as client, ThreadPoolExecutor(1) as pool:
        sending = pool.submit(client.post, "/documents/upload", content=body(), headers={
            "Content-Type": "multipart/form-data; boundary=x"})
        until(lambda: list(files.glob("*.part")))
        for name in ("finished", "unfinished.part"):
            (files / name).touch()
            os.utime(files / name, (0, 0))
        with running(settings) as other:
            until(lambda: len(list(files.iterdir())) == 1)
            go.set()
            path = sending.result().headers["Location"]
            assert len(other.get(f"{path}/file").content) == 2**21 + len(PDF)


# Step by step


class StepWriter:
    def __init__(self, writer: Writer, tell: Callable[[str], None]) -> None:
        self._writer, self._tell = writer, tell

    def write(self, data: bytes) -> None:
        self._tell("write")
        self._writer.write(data)

    def commit(self) -> None:
        self._writer.commit()

    def __enter__(self) -> "StepWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.__exit__(*_)


class StepStorage:
    """The local disk, which tells of each step before it takes it."""

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        folder.parent.mkdir()
        self._storage, self._tell = LocalStorage(folder), tell

    def create(self, key: str) -> Writer:
        self._tell("create")
        return StepWriter(self._storage.create(key), self._tell)

    def sync(self) -> None:
        self._storage.sync()

    def open(self, key: str) -> BinaryIO:
        self._tell("open")
        return self._storage.open(key)

    def delete(self, key: str) -> None:
        self._tell("remove")
        self._storage.delete(key)
        self._tell("removed")

    def keys(self, older_than: float) -> Iterator[str]:
        return self._storage.keys(older_than)

    def check(self) -> None:
        self._storage.check()


class StepOs:
    """What `storage` takes for the module `os`."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, descriptor: int) -> None:
        self._tell("fsync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        os.fsync(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        self._tell("rename")
        os.replace(source, target)


class StepConnection(sqlite3.Connection):
    """Tells of each transaction that writes documents, before it is committed and after."""

    WRITES = {"INSERT INTO documents": "row", "queued_at = ?": "queue", "attempts = attempts + 1": "claim",
              "SET progress = ?": "progress", "INSERT INTO results": "complete", "DELETE FROM documents": "delete"}

    def __init__(self, tell: Callable[[str], None], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._tell, self._pending = tell, set[str]()

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        self._pending |= {name for part, name in self.WRITES.items() if part in sql}
        if sql != "COMMIT":
            return super().execute(sql, parameters)
        pending, self._pending = self._pending, set()
        for name in pending:
            self._tell(f"commit {name}")
        cursor = super().execute(sql)
        for name in pending:
            self._tell(f"committed {name}")
        return cursor


class Steps:
    """A service that calls `tell` at each step that it takes towards the disk."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tell: Callable[[str], None] = lambda step: None
        self.settings, self.connections = settings_in(folder, lease_seconds=0.5), list[sqlite3.Connection]()
        self._monkeypatch = monkeypatch

    def _tell(self, step: str) -> None:
        self.tell(step)

    def _connection(self, *arguments: Any, **options: Any) -> sqlite3.Connection:
        self.connections.append(StepConnection(self._tell, *arguments, **options))
        return self.connections[-1]

    @contextlib.contextmanager
    def running(self) -> Iterator[httpx.Client]:
        with self._monkeypatch.context() as patch:
            storage = StepStorage(self.settings.data_dir / "files", self._tell)
            patch.setattr(storage_module, "os", StepOs(self._tell))
            patch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=self._connection))
            with running(self.settings, storage=storage) as client:
                yield client


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(tmp_path, monkeypatch)


UPLOAD = ["create", "write", "fsync file", "rename", "open", "fsync folder", "commit row", "committed row"]
PROCESS = ["commit queue", "committed queue", "commit claim", "committed claim", "open",
           "commit progress", "committed progress", "commit complete", "committed complete"]
DELETE = ["commit delete", "committed delete", "remove", "removed"]


def test_every_answer_comes_after_what_it_promises(steps: Steps) -> None:
    seen: list[str] = []
    with steps.running() as client:
        steps.tell = seen.append
        path = uploaded(client, docx(), "a.docx")
        assert seen == UPLOAD
        seen.clear()
        uploaded(client)
        assert seen == [step for step in UPLOAD if step != "open"]  # nobody looks into a PDF
        seen.clear()
        assert client.post(f"{path}/process").status_code == 202
        assert seen[:2] == PROCESS[:2]
        processed(client, path)
        assert list(dict.fromkeys(seen)) == PROCESS
        seen.clear()
        assert client.delete(path).status_code == 204
        assert [step for step in seen if step in DELETE] == DELETE
        for connection in steps.connections:
            assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: a commit waits for the disk


def upload_together(steps: Steps, monkeypatch: pytest.MonkeyPatch, tell: Callable[[str], None],
                    files: list[dict[str, Any]]) -> list[httpx.Response]:
    """Answers of uploads that all come while another one waits for the disk; `tell` hears of what happens then."""
    go, arrived, end = threading.Event(), list[main.Upload](), main.Upload.end

    def hold(step: str) -> None:
        if step == "fsync folder" and not go.is_set():
            assert go.wait(30)
            steps.tell = tell

    def arrive(incoming: main.Upload) -> None:
        end(incoming)
        arrived.append(incoming)

    with steps.running() as client, ThreadPoolExecutor(1 + len(files)) as pool, monkeypatch.context() as patch:
        patch.setattr(main.Upload, "end", arrive)
        steps.tell = hold
        first = pool.submit(upload, client)
        until(lambda: arrived)
        others = [pool.submit(upload, client, **file) for file in files]
        until(lambda: len(arrived) == 1 + len(files))
        until(lambda: all(incoming.finished for incoming in arrived if incoming.takes_long)
              or any(other.done() for other in others))
        go.set()
        assert first.result().status_code == 201
        answers = [other.result() for other in others]
        steps.tell = lambda step: None
        assert len(stored_files(steps.settings)) == len(client.get("/documents").json())
    return answers


def test_uploads_that_wait_together_share_a_sync_and_a_commit(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    answers = upload_together(steps, monkeypatch, seen.append, [{}] * 20)
    assert [answer.status_code for answer in answers] == [201] * 20
    assert len({answer.headers["Location"] for answer in answers}) == 20
    assert seen.count("fsync file") == seen.count("rename") == 20
    syncs = [number for number, step in enumerate(seen) if step == "fsync folder"]
    assert 1 <= len(syncs) <= 2 and 1 <= seen.count("committed row") <= 3  # the first one's too; the last may come late
    assert "rename" not in seen[syncs[-1]:] and "commit row" in seen[syncs[-1]:]


def test_few_of_the_uploads_that_wait_have_their_files_open_together(
        steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "AT_ONCE", 4)
    seen: list[str] = []
    answers = upload_together(steps, monkeypatch, seen.append, [{}] * 20)
    assert [answer.status_code for answer in answers] == [201] * 20
    assert seen.count("create") == 20
    batches = " ".join(seen).split("fsync folder")
    assert max(batch.count("create") for batch in batches) <= 4


def test_a_failed_commit_is_told_to_all_that_share_it(
        steps: Steps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    faults = [OSError(errno.ENOSPC, "full")]

    def tell(step: str) -> None:
        if step == "fsync folder" and faults:
            raise faults.pop()

    answers = upload_together(steps, monkeypatch, tell, [{}] * 20)
    assert Counter(answer.status_code for answer in answers)[507] >= 19  # one may have come late
    stacks = [record.exc_info[2] for record in caplog.records if record.exc_info]
    assert len({len(traceback.extract_tb(stack)) for stack in stacks}) == 1  # none has the frames of the others


def test_a_refusal_waits_for_no_disk(steps: Steps) -> None:
    go = threading.Event()

    def tell(step: str) -> None:
        if step == "fsync file":
            assert go.wait(30)

    with steps.running() as client, ThreadPoolExecutor(9) as pool:
        steps.tell = tell
        stuck = [pool.submit(upload, client, docx(), "a.docx") for _ in range(8)]  # all of the file pool
        stuck.append(pool.submit(upload, client))
        assert upload(client, b"no PDF".ljust(2000)).status_code == 415
        assert upload(client, b"").status_code == 422
        go.set()
        assert {answer.result().status_code for answer in stuck} == {201}


def test_no_row_is_added_for_a_file_that_a_sweep_may_have_taken(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "FRESH_SECONDS", -1)  # as if the process had been stopped for long
    monkeypatch.setattr(main, "WRITE_SECONDS", 0.1)
    with running(settings_in(tmp_path)) as client:
        assert upload(client).status_code == 503
        assert client.get("/documents").json() == []


def test_what_was_given_up_before_its_turn_leaves_nothing(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    go, store = threading.Event(), main.Intake.store

    async def give_up(intake: main.Intake, incoming: main.Upload) -> Document:
        async with asyncio.timeout(0.1):
            return await store(intake, incoming)

    def tell(step: str) -> None:
        if step == "fsync folder":
            assert go.wait(30)

    with steps.running() as client, ThreadPoolExecutor(1) as pool:
        steps.tell = tell
        first = pool.submit(upload, client)
        until(lambda: len(stored_files(steps.settings)) == 1)
        monkeypatch.setattr(main.Intake, "store", give_up)
        assert upload(client).status_code == upload(client, docx(), "a.docx").status_code == 503
        go.set()
        assert first.result().status_code == 201
        until(lambda: len(stored_files(steps.settings)) == 1)
        assert len(client.get("/documents").json()) == 1


def test_a_slow_disk_is_waited_for(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "WRITE_SECONDS", 0.1)  # for the database, which other processes may hold
    with steps.running() as client:
        steps.tell = lambda step: time.sleep(0.5) if step == "fsync file" else None
        assert upload(client).status_code == 201


def test_an_upload_that_fails_spares_those_that_wait_with_it(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [OSError(errno.ENOSPC, "full")]

    def tell(step: str) -> None:
        if step == "fsync file" and faults:
            raise faults.pop()

    key = {"Idempotency-Key": "the-same"}
    answers = upload_together(steps, monkeypatch, tell, [
        {"content": docx()[:-30], "filename": "broken.docx"}, {"content": PDF + b"1", **key},
        {"content": PDF + b"2", **key}, {"filename": "other.pdf"}, {}, {}])
    assert answers[0].status_code == 415
    codes = Counter(answer.status_code for answer in answers[1:])
    assert codes in ({201: 3, 422: 1, 507: 1}, {201: 4, 507: 1})  # the full disk may hit one of the two under a key


def test_uploads_that_wait_together_wait_for_the_disk_side_by_side(
        steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    side_by_side, synced = threading.Barrier(4), itertools.count()

    def tell(step: str) -> None:
        if step == "fsync file" and next(synced) < 4:
            side_by_side.wait(30)

    answers = upload_together(steps, monkeypatch, tell, [{"content": docx(), "filename": "a.docx"}, *[{}] * 9])
    assert [answer.status_code for answer in answers] == [201] * 10


def test_small_uploads_do_not_wait_for_large_ones(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    go, together, end = threading.Event(), threading.Event(), main.Upload.end
    stuck_at, arrived = list[str](), list[None]()

    def tell(step: str) -> None:
        if step == "fsync file" and threading.current_thread().name.startswith("file"):
            stuck_at.append(step)
            assert go.wait(30)
        elif step == "fsync folder":
            assert together.wait(30)

    def arrive(incoming: main.Upload) -> None:
        end(incoming)
        arrived.append(None)

    monkeypatch.setattr(main.Upload, "end", arrive)
    with steps.running() as client, ThreadPoolExecutor(14) as pool:
        steps.tell = tell
        large = [pool.submit(upload, client, docx(), "a.docx") for _ in range(8)]  # all of the file pool
        until(lambda: len(stuck_at) == 8)
        small = [pool.submit(upload, client) for _ in range(6)]
        until(lambda: len(arrived) == 14)
        together.set()
        assert {answer.result(20).status_code for answer in small} == {201}
        go.set()
        assert {answer.result().status_code for answer in large} == {201}


def test_a_crash_at_any_step_loses_nothing_that_was_answered(steps: Steps, tmp_path: Path) -> None:
    """A copy made in the middle of a step is what the start after a crash there finds."""
    data, answers, crashes = steps.settings.data_dir, dict[str, int](), dict[str, dict[str, int]]()
    lock, content = data / "documents.db.lock", docx()

    def crash(step: str) -> None:
        if step in crashes:
            return
        crashes[step] = dict(answers)
        with lock.open() as file:
            if not step.startswith("commit"):  # else this thread's own transaction keeps others from writing
                fcntl.flock(file, fcntl.LOCK_EX)
            shutil.copytree(data, tmp_path / step / "data")

    def restart(step: str) -> None:
        settings, answered = settings_in(tmp_path / step, lease_seconds=0.5), crashes[step]
        age_files(settings.data_dir)
        with running(settings) as client:
            documents = settled(client, settings.data_dir)
            assert len(documents) <= 1
            if "DELETE" in answered:
                assert not documents
            if "upload" in answered and step not in DELETE:
                assert documents
            if "process" in answered and documents:
                assert [document["status"] for document in documents.values()] == ["COMPLETED"]
            if step not in DELETE:  # the client that got no answer asks again
                assert upload(client, content, "a.docx", **{"Idempotency-Key": "key"}).status_code == 201
                (path,) = [f"/documents/{document_id}" for document_id in settled(client, settings.data_dir)]
                assert processed(client, path)["status"] == "COMPLETED"

    with steps.running() as client:
        steps.tell = crash
        answer = upload(client, content, "a.docx", **{"Idempotency-Key": "key"})
        answers["upload"] = answer.status_code
        path = answer.headers["Location"]
        answers["process"] = client.post(f"{path}/process").status_code
        processed(client, path)
        answers["DELETE"] = client.delete(path).status_code
    assert answers == {"upload": 201, "process": 202, "DELETE": 204}
    assert set(crashes) == {*UPLOAD, *PROCESS, *DELETE}
    for step in crashes:
        restart(step)


def test_a_fault_at_any_step_is_answered_and_got_over(steps: Steps, caplog: pytest.LogCaptureFixture) -> None:
    faults: dict[str, Exception] = {}
    io_error, full = OSError(errno.EIO, "no such luck"), OSError(errno.ENOSPC, "full")
    database_error = sqlite3.OperationalError("disk I/O error")

    def tell(step: str) -> None:
        if step in faults:
            raise faults.pop(step)

    @contextlib.contextmanager
    def fault(step: str, failure: Exception) -> Iterator[None]:
        faults[step] = failure
        caplog.clear()
        yield
        until(lambda: not faults)
        until(lambda: any(record.exc_info and repr(record.exc_info[1]) == repr(failure) for record in caplog.records))

    steps.tell = tell
    data = steps.settings.data_dir
    with steps.running() as client:
        for step, failure, code in [
                ("create", io_error, "unavailable"), ("create", full, "insufficient_storage"),
                ("write", io_error, "unavailable"), ("write", full, "insufficient_storage"),
                ("fsync file", io_error, "unavailable"), ("fsync file", full, "insufficient_storage"),
                ("rename", io_error, "unavailable"), ("fsync folder", io_error, "unavailable"),
                ("open", io_error, "unavailable"), ("commit row", database_error, "unavailable"),
                ("committed row", database_error, "unavailable")]:
            with fault(step, failure):
                answer = upload(client, docx(), "a.docx", **{"Idempotency-Key": step.replace(" ", "-")})
                assert answer.json().get("code") == code, step
            if step in UPLOAD[:6]:
                assert stored_files(steps.settings) == [], step
        assert len(client.get("/documents").json()) == 1  # the last one was in doubt
        for step, status in [("commit queue", 503), ("committed queue", 503), *((step, 202) for step in PROCESS[2:])]:
            path = uploaded(client)
            with fault(step, io_error if step == "open" else database_error):
                assert client.post(f"{path}/process").status_code == status, step
            ended = processed(client, path)
            if ended["status"] == "FAILED":  # what is retryable is retried
                assert ended["error"]["retryable"], step
                ended = processed(client, path)
            assert ended["status"] == "COMPLETED", step
        for step, status, again in [
                ("commit delete", 503, 204), ("committed delete", 503, 404), ("remove", 204, 404)]:
            path = uploaded(client)
            with fault(step, io_error if step == "remove" else database_error):
                assert client.delete(path).status_code == status, step
            assert client.delete(path).status_code == again, step
    age_files(data)
    with running(settings_in(data.parent)) as client:
        assert len(settled(client, data)) == 1 + len(PROCESS)


# Workers that die, stall or have to stop


ODD_PIPELINE = """
import os, pathlib, time
import main
from db import RunLost

def pipeline(file, document, progress):
    if document.filename == "poison.pdf":
        os._exit(1)
    progress(50, "half of it")
    gate = pathlib.Path(os.environ["GATE"])
    while not gate.exists():
        time.sleep(0.02)
    try:
        progress(90, "nearly")
    except RunLost:
        gate.with_suffix(".lost").touch()
    return {"from": gate.name}

app = main.create_app(pipeline=pipeline)
"""


def odd_server(folder: Path, gate: str, *arguments: str, **environment: str) -> Server:
    """Its pipeline ends the process, or waits for the file `gate` and nothing else, as the document's name says."""
    (folder / "odd.py").write_text(ODD_PIPELINE)
    return Server(folder, "--app-dir", str(folder), *arguments, app="odd:app", GATE=str(folder / gate), **environment)


def half_done(client: httpx.Client, path: str, attempt: int = 1) -> bool:
    status = client.get(f"{path}/status").json()
    return (status["attempts"], status["progress"]) == (attempt, 50)


@contextlib.contextmanager
def stopped(server: Server, folder: Path) -> Iterator[None]:
    """Stops the process in a moment in which it doesn't hold the lock that all processes share."""
    with (folder / "data" / "documents.db.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        server.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, server.process.pid, os.WSTOPPED)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


def test_a_process_that_was_stopped_past_its_lease_changes_nothing(tmp_path: Path) -> None:
    with (odd_server(tmp_path, "first", DOCS_LEASE_SECONDS="0.5") as first, first.client() as client,
          contextlib.ExitStack() as stack):
        path = uploaded(client)
        client.post(f"{path}/process")
        until(lambda: half_done(client, path))
        with stopped(first, tmp_path):
            second = stack.enter_context(odd_server(tmp_path, "second", DOCS_LEASE_SECONDS="0.5"))
            client = stack.enter_context(second.client())
            until(lambda: half_done(client, path, attempt=2))
            (tmp_path / "first").touch()
        until((tmp_path / "first.lost").exists)  # it learns that, and returns its result all the same
        first.process.terminate()
        first.process.wait(30)
        assert half_done(client, path, attempt=2)
        (tmp_path / "second").touch()
        assert processed(client, path)["attempts"] == 2
        assert client.get(f"{path}/result").json()["result"] == {"from": "second"}
        assert '"process_completed"' not in first.output()
        assert second.output().count('"process_completed"') == 1


def test_a_document_that_kills_its_process_ends_failed_and_the_service_stays_up(tmp_path: Path) -> None:
    with odd_server(tmp_path, "gate", "--workers", "2", DOCS_LEASE_SECONDS="0.5") as server, server.client() as client:
        (tmp_path / "gate").touch()
        path = uploaded(client, PDF, "poison.pdf")
        assert client.post(f"{path}/process").status_code == 202

        def failed() -> Any:
            with contextlib.suppress(httpx.TransportError):  # of a process that dies
                status = client.get(f"{path}/status").json()
                return status["status"] == "FAILED" and status

        status = until(failed)
        assert (status["attempts"], status["error"]["code"], status["error"]["retryable"]) == (3, "interrupted", True)
        assert processed(client, uploaded(client))["status"] == "COMPLETED"
    started = [line for line in server.output().splitlines() if '"process_started"' in line and path[11:] in line]
    assert len(started) == 3


def test_a_job_may_end_within_the_grace(tmp_path: Path) -> None:
    with odd_server(tmp_path, "gate", DOCS_SHUTDOWN_SECONDS="60") as server, server.client() as client:
        path = uploaded(client)
        client.post(f"{path}/process")
        until(lambda: half_done(client, path))
        server.process.terminate()
        until(lambda: "Waiting for application shutdown" in server.output())
        (tmp_path / "gate").touch()
        server.process.wait(30)
    with running(settings_in(tmp_path)) as client:
        status = client.get(f"{path}/status").json()
        assert (status["status"], status["attempts"]) == ("COMPLETED", 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_exit_is_bounded_whatever_is_under_way(tmp_path: Path, number: int) -> None:
    """The grace is a second here. What is waited for could take minutes."""
    big = PDF[:9] + bytes(16_000_000) + PDF[9:]
    with (odd_server(tmp_path, "never", DOCS_SHUTDOWN_SECONDS="1") as server,
          server.client() as client, contextlib.ExitStack() as stack):
        path, download = uploaded(client), uploaded(client, big)
        client.post(f"{path}/process")
        until(lambda: half_done(client, path))

        def send(request: str) -> socket.socket:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
            token = client.headers["Authorization"]
            connection.sendall(f"{request} HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\n".encode())
            return connection

        polling = send(f"GET {path}/status?wait=30")
        polling.sendall(b"\r\n")
        send(f"GET {download}/file").sendall(b"\r\n")  # and nobody takes it
        uploading = send("POST /documents/upload")
        uploading.sendall(b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 9999999\r\n\r\n--x\r\n"
                          b'Content-Disposition: form-data; name="file"; filename="a.pdf"\r\n\r\n' + big[:2_000_000])
        until(lambda: list((tmp_path / "data" / "files").glob("*.part")))
        server.process.send_signal(number)
        server.process.wait(10)
        assert b'"status":"PROCESSING"' in polling.recv(9999)
        assert b'"code": "shutting_down"' in uploading.recv(9999)
        assert '"process_requeued"' in server.output()
    settings = settings_in(tmp_path)
    assert [f"/documents/{name}" for name in stored_files(settings)] == sorted([path, download])
    with running(settings) as client:
        status = processed(client, path)
        assert (status["status"], status["attempts"]) == ("COMPLETED", 1)


def test_exit_is_bounded_while_nobody_can_write(tmp_path: Path) -> None:
    with (Server(tmp_path, DOCS_SHUTDOWN_SECONDS="0") as server,
          (tmp_path / "data" / "documents.db.lock").open() as lock):
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a process does that was stopped in the middle of a commit
        server.process.terminate()
        server.process.wait(10)


# Faults of the disk and the database


@contextlib.contextmanager
def no_space(server: Server, data: Path, mounted: bool) -> Iterator[None]:
    """No byte more can be written: the tiny file system is full, else the process may write none (EFBIG)."""
    ballast, pid = data / "ballast", server.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    if mounted:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    else:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        ballast.unlink(missing_ok=True)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["file-size limit", "tiny file system"])
def test_a_full_disk_is_told_and_got_over(tmp_path: Path, kind: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    mounted = kind == "tiny file system" and subprocess.run(  # where that isn't allowed it is the limit once more
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", data], stderr=subprocess.DEVNULL).returncode == 0
    try:
        with Server(tmp_path, DOCS_PROCESS_SECONDS="0", DOCS_LEASE_SECONDS="0.5") as server, server.client() as client:
            path, other, content = uploaded(client), uploaded(client), PDF[:9] + bytes(40_000) + PDF[9:]
            paths = client.get("/openapi.json").json()["paths"]
            with no_space(server, data, mounted):
                for answer in (upload(client), upload(client, content), upload(client, PDF.ljust(2_000_000))):
                    assert (answer.status_code, answer.json()["code"]) == (507, "insufficient_storage")
                assert client.get("/readyz").status_code == 503
                for method, answer in (("post", client.post(f"{path}/process")), ("delete", client.delete(path))):
                    route = paths["/documents/{document_id}" + "/process" * (method == "post")][method]
                    assert answer.status_code in (503, 507) and str(answer.status_code) in route["responses"]
                assert client.get("/healthz").status_code == 200
                assert client.get(f"{path}/file").content == PDF
                assert len(client.get("/documents").json()) == 2
            assert client.get("/readyz").status_code == 200
            assert processed(client, path)["status"] == "COMPLETED"
            assert client.delete(other).status_code == 204
            assert client.get(f"{uploaded(client, content)}/file").content == content
            assert len(settled(client, data)) == 2  # and no trace of what was refused
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", data], check=True)


def test_a_file_store_that_cannot_be_written_is_told_and_got_over(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    files, away = settings.data_dir / "files", settings.data_dir / "away"
    with running(settings) as client:
        path = uploaded(client)
        for in_its_place in (Path.touch, lambda _: None):  # a file; nothing
            files.rename(away)
            in_its_place(files)
            until(lambda: client.get("/readyz").status_code == 503)  # it believes itself for a second
            for answer in (upload(client), upload(client, docx(), "a.docx")):
                assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
                assert answer.headers["Retry-After"]
            assert client.get(path).status_code == client.get("/healthz").status_code == 200
            files.unlink(missing_ok=True)
            away.rename(files)
            assert client.get("/readyz").status_code == 200
            assert client.get(f"{path}/file").content == PDF
            uploaded(client)
        assert len(settled(client, settings.data_dir)) == 3


def test_a_locked_database_is_told_and_got_over(steps: Steps) -> None:
    with steps.running() as client, contextlib.closing(sqlite3.connect(steps.settings.data_dir / "documents.db")) as db:
        path = uploaded(client)
        for connection in steps.connections:
            connection.execute("PRAGMA busy_timeout = 50")  # else ten seconds
        db.execute("BEGIN EXCLUSIVE")
        for answer in (upload(client), client.post(f"{path}/process"), client.delete(path), client.get("/readyz")):
            assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert len(client.get("/documents").json()) == 1  # readers never wait
        db.rollback()
        assert client.get("/readyz").status_code == 200
        assert processed(client, path)["status"] == "COMPLETED"


def test_writers_of_all_processes_wait_at_one_lock_and_readers_do_not(tmp_path: Path) -> None:
    with running(settings_in(tmp_path)) as client, ThreadPoolExecutor(1) as pool:
        path = uploaded(client)
        with (tmp_path / "data" / "documents.db.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            started = pool.submit(client.post, f"{path}/process")
            assert {client.get(f"{path}/status").json()["status"] for _ in range(50)} == {"UPLOADED"}
            assert not started.done()
        assert started.result().status_code == 202


def test_a_full_database_is_told_and_got_over(steps: Steps) -> None:
    with steps.running() as client:
        writer = steps.connections[0]
        writer.execute("PRAGMA max_page_count = 1")  # SQLite makes that the size it has
        answers = [upload(client).status_code for _ in range(100)]
        assert set(answers) == {201, 507}
        writer.execute("PRAGMA max_page_count = 1000000")
        path = uploaded(client)
        assert processed(client, path)["status"] == "COMPLETED"
        assert len(client.get("/documents?limit=200").json()) == answers.count(201) + 1


def test_a_vanished_file_is_told(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with running(settings) as client:
        path = uploaded(client)
        (settings.data_dir / "files" / path[11:]).unlink()
        answer = client.get(f"{path}/file")
        assert (answer.status_code, answer.json()["code"]) == (404, "file_missing")
        status = processed(client, path)
        assert [status["status"], status["attempts"], status["error"]["code"], status["error"]["retryable"]] == [
            "FAILED", 1, "file_missing", False]
        assert client.delete(path).status_code == 204
        assert client.get(path).json()["code"] == "not_found"


def test_a_lost_database_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with running(settings) as client:
        path = uploaded(client)
    for file in settings.data_dir.glob("documents.db*"):
        file.unlink()
    age_files(settings.data_dir)
    for _ in range(2):
        server = Server(tmp_path)
        assert server.process.wait(30) != 0
        assert "db.UnusableDatabase: " in server.output()
    assert [f"/documents/{name}" for name in stored_files(settings)] == [path]


def test_a_process_that_holds_the_lock_makes_others_answer_503(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "WRITE_SECONDS", 0.2)
    with running(settings_in(tmp_path)) as client:
        path = uploaded(client)
        with (tmp_path / "data" / "documents.db.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for answer in (upload(client), client.post(f"{path}/process"), client.delete(path), client.get("/readyz")):
                assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert client.get("/readyz").status_code == 200
        assert len(client.get("/documents").json()) == 1  # what was answered with 503 has been withdrawn
        assert processed(client, path)["status"] == "COMPLETED"


def make_database(file: Path, version: int) -> None:
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE of_somebody_else (x)")
        database.execute(f"PRAGMA user_version = {version}")


@pytest.mark.parametrize("spoil, told", [
    (lambda file: file.write_bytes(b"This is no database. " * 1000), "db.UnusableDatabase: .*not a database"),
    (lambda file: make_database(file, 99), "db.UnusableDatabase: .*version 99"),
    (lambda file: make_database(file, 0), "db.UnusableDatabase: "),
    (Path.mkdir, "sqlite3.OperationalError: ")],
    ids=["no database", "a later version", "of another program", "a folder"])
def test_an_unusable_database_stops_the_start(tmp_path: Path, spoil: Callable[[Path], Any], told: str) -> None:
    file, stored = tmp_path / "data" / "documents.db", tmp_path / "data" / "files" / "precious"
    stored.parent.mkdir(parents=True)
    stored.touch()
    os.utime(stored, (0, 0))
    spoil(file)
    before = file.is_file() and file.read_bytes()
    server = Server(tmp_path)
    try:
        assert server.process.wait(10) != 0
    finally:
        server.process.kill()
    errors = [line["event"] for line in server.lines() if line["level"] == "ERROR"]
    assert re.fullmatch(f"{told}.*", errors[0]) and len(errors) == 2  # the other is uvicorn's farewell
    assert (file.is_file() and file.read_bytes()) == before
    assert stored.exists()
