"""Each rule of the service has a test that is named after it. They use the real app, files, SQLite and processes."""
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import pytest
import uvicorn

import main
from main import Settings, create_app

pytestmark = pytest.mark.filterwarnings("error")

HERE = Path(__file__).parent
PASSWORD = "correct horse battery"
PDF = b"%PDF-1.7\n1 0 obj << /Type /Catalog >> endobj\ntrailer << /Root 1 0 R >>\n%%EOF\n"
MAIN_PART = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"


def docx(main_part: str = MAIN_PART, compression: int = zipfile.ZIP_DEFLATED, **entries: bytes) -> bytes:
    """A small DOCX. More entries, or other ones, by name."""
    types = ('<?xml version="1.0"?><Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
             f'<Override PartName="/word/document.xml" ContentType="{main_part}"/></Types>')
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in {"[Content_Types].xml": types.encode(), "word/document.xml": b"<document/>",
                              **entries}.items():
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
    return Settings(**{"data_dir": folder / "data", "admin_password": PASSWORD, "process_seconds": 0} | settings)


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
            client.headers["Authorization"] = f"Bearer {log_in(client)['access_token']}"
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
    return answer.headers["Location"]


def processed(client: httpx.Client, path: str) -> dict[str, Any]:
    """Its status when processing has ended."""
    assert client.post(f"{path}/process").status_code in (200, 202)
    while (status := client.get(f"{path}/status?wait=30").json())["status"] == "PROCESSING":
        pass
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


def test_process_service(tmp_path: Path) -> None:
    with Server(tmp_path) as server, server.client() as client:
        assert processed(client, uploaded(client))["status"] == "COMPLETED"
