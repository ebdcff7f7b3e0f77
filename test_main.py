"""Each rule of the service has a test that is named after it. They use the real app, files, SQLite and processes."""
import contextlib
import errno
import hashlib
import io
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import pytest
import uvicorn

import auth
import main
from db import Database, Document, Status
from main import Settings, create_app
from storage import LocalStorage, Storage

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
    status: dict[str, Any] = {}
    while status.get("status") in (None, "PROCESSING"):
        status = client.get(f"{path}/status?wait=30").json()
    return status


def stored_files(settings: Settings) -> list[str]:
    return sorted(os.listdir(settings.data_dir / "files"))


# The service as a process of its own


class Server:
    """`uvicorn main:app` on a free port, as a user starts it; stopped at the end of the `with` block."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.output_file = folder / f"output-{self.port}-{time.monotonic_ns()}"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DOCS_")}
        with self.output_file.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", "main:app", "--port", str(self.port), *arguments], cwd=HERE,
                stdout=output, stderr=subprocess.STDOUT, env=inherited | {
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
    ("DOCS_JWT_SECRET", "canary-0123456789-0123456789-01"), ("DOCS_ACCESS_TOKEN_SECONDS", "0"),
    ("DOCS_REFRESH_TOKEN_SECONDS", "a week"), ("DOCS_MAX_UPLOAD_BYTES", "-1"), ("DOCS_UPLOAD_IDLE_SECONDS", "nan"),
    ("DOCS_PROCESS_WORKERS", "1.5"), ("DOCS_PROCESS_SECONDS", "inf"), ("DOCS_LEASE_SECONDS", ""),
    ("DOCS_MAX_ATTEMPTS", "0"), ("DOCS_MAX_QUEUE", "0"), ("DOCS_SHUTDOWN_SECONDS", "-1"),
    ("DOCS_LOG_LEVEL", "LOUD"), ("DOCS_ADMIN_USERNAME", ""), ("DOCS_ADMIN_PASSWORD", "")])
def test_bad_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(main.UnusableSetting, match=f"^{name}: .*should") as failure:
        Settings.from_environment({name: value})
    assert "\n" not in str(failure.value) and "canary" not in str(failure.value)


def test_bad_setting_stops_the_start_with_one_line(tmp_path: Path) -> None:
    server = Server(tmp_path, DOCS_MAX_QUEUE="many")
    assert server.process.wait(30) != 0
    errors = [line["event"] for line in server.lines() if line["level"] == "ERROR"]
    assert errors[0].startswith("main.UnusableSetting: DOCS_MAX_QUEUE: ") and "\n" not in errors[0]
    assert not (tmp_path / "data").exists()


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
    settings = settings_in(tmp_path, max_upload_bytes=100_000)
    with running(settings) as client:
        for size, status in ((100_000, 201), (100_001, 413), (200_000, 413)):
            answer = upload(client, PDF.ljust(size))
            assert answer.status_code == status
        assert answer.json()["code"] == "too_large"
        request = client.build_request("POST", "/documents/upload", files={"file": ("a.pdf", PDF.ljust(300_000))})
        body = request.read()
        pieces = (body[i:i + 9999] for i in range(0, len(body), 9999))
        headers = {"Content-Type": request.headers["Content-Type"]}
        assert client.post("/documents/upload", content=pieces, headers=headers).status_code == 413
        assert len(stored_files(settings)) == 1


def test_a_silent_client_gets_408(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, upload_idle_seconds=0.2)
    with running(settings) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port or 80), 30) as connection:
            body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.pdf"\r\n\r\n' + PDF.ljust(50_000)
            connection.sendall(
                b"POST /documents/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\nAuthorization: "
                + client.headers["Authorization"].encode()
                + b"\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n" + body)
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 408") and b'"upload_timeout"' in answer
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
    for bad in ("", "x" * 129, "a b"):
        assert upload(client, PDF, "a.pdf", **{"Idempotency-Key": bad}).status_code == 422


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
    unfinished.__exit__()
    storage.check()
    assert list(storage.keys(-60)) == ["done"]


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
    for operation in operations.values():
        for status, answer in operation["responses"].items():
            for media_type, content in answer.get("content", {}).items():
                assert content["schema"] and (content.get("example") or content["examples"])
                assert status < "400" or media_type == "application/problem+json"
    assert "HTTPValidationError" not in json.dumps(document)


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
