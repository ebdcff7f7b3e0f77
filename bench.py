"""The benchmark: this service beside the textbook, which is what most people would write with FastAPI instead.

    python bench.py      in the tests' virtual environment, on Linux (it reads /proc); less than two minutes

    upload10k    16 clients upload PDFs of 10,000 bytes, one after another
    upload1m     the same with 1,000,000 bytes
    open1000     1,000 uploads of 100,000 bytes are open at once: each client takes three seconds to send its own
    status       16 clients ask for a status
    poll1000     1,000 clients wait in `status?wait=30`; times are from the end of PROCESSING to their answers

The textbook syncs no files, hashes nothing, keeps no sessions and takes up no work after a crash. Both are started anew
for each round, in turn, with an empty folder in TMPDIR. Figures are medians of the rounds, `good %` is the worst one's.
`CPU ms` is the server's for each request, `MiB` its peak. All share one machine, so trust the ratios most. A run within
minutes of another one is slower: ext4 searches long for inodes where many files were deleted just now.
"""
import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jwt
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.security import OAuth2PasswordBearer, OAuth2PasswordRequestForm

HOST, PASSWORD = "127.0.0.1", "correct-horse-battery-staple"
CLIENTS, MANY, WARM_UP_SECONDS, SECONDS = 16, 1000, 0.4, 1.2
PIECES, PAUSE = 7, 0.5  # each of MANY uploads is sent in so many pieces, one every so many seconds
PROCESS_SECONDS = "3"  # long enough for MANY clients to come and wait

# The textbook: a SQLite connection for each request, a dependency that checks the JWT, a background task

FOLDER, SECRET = Path(os.environ.get("DOCS_DATA_DIR", ".")), "a secret of the textbook, of 32 bytes or more"


def execute(statement: str, *values: object) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(FOLDER / "documents.db")) as db, db:
        return db.execute(statement, values).fetchall()


@contextlib.asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    execute("CREATE TABLE documents (id TEXT PRIMARY KEY, owner TEXT, filename TEXT, status TEXT, finished_at TEXT)")
    yield


async def current_user(token: Annotated[str, Depends(OAuth2PasswordBearer("auth/login"))]) -> str:
    try:
        return str(jwt.decode(token, SECRET, algorithms=["HS256"])["sub"])
    except jwt.InvalidTokenError:
        raise HTTPException(401, "Could not validate credentials", {"WWW-Authenticate": "Bearer"}) from None


textbook = FastAPI(lifespan=lifespan)
User = Annotated[str, Depends(current_user)]


@textbook.post("/auth/login")
def login(form: Annotated[OAuth2PasswordRequestForm, Depends()]) -> dict[str, str]:
    if (form.username, form.password) != ("admin", PASSWORD):
        raise HTTPException(401, "Incorrect username or password")
    token = jwt.encode({"sub": form.username, "exp": time.time() + 3600}, SECRET, "HS256")
    return {"access_token": token, "token_type": "bearer"}


@textbook.post("/documents/upload", status_code=201)
def upload(file: UploadFile, user: User) -> dict[str, Any]:
    document_id, filename = str(uuid.uuid4()), file.filename or ""
    with open(FOLDER / document_id, "wb") as target:
        shutil.copyfileobj(file.file, target)
    execute("INSERT INTO documents VALUES (?, ?, ?, 'UPLOADED', NULL)", document_id, user, filename)
    return {"document_id": document_id, "filename": filename, "size": file.size, "status": "UPLOADED"}


@textbook.post("/documents/{document_id}/process", status_code=202)
def start(document_id: uuid.UUID, user: User, tasks: BackgroundTasks) -> dict[str, Any]:
    execute("UPDATE documents SET status = 'PROCESSING' WHERE id = ? AND owner = ?", str(document_id), user)
    tasks.add_task(process, document_id)
    return find(document_id, user)


def process(document_id: uuid.UUID) -> None:
    time.sleep(float(PROCESS_SECONDS))
    now = datetime.now(timezone.utc).isoformat()
    execute("UPDATE documents SET status = 'COMPLETED', finished_at = ? WHERE id = ?", now, str(document_id))


def find(document_id: uuid.UUID, user: str) -> dict[str, Any]:
    rows = execute("SELECT id, status, finished_at FROM documents WHERE id = ? AND owner = ?", str(document_id), user)
    if not rows:
        raise HTTPException(404, "Document not found")
    return dict(zip(("document_id", "status", "finished_at"), rows[0]))


@textbook.get("/documents/{document_id}/status")
async def get_status(document_id: uuid.UUID, user: User, wait: float = 0) -> dict[str, Any]:
    end, document = time.monotonic() + wait, await run_in_threadpool(find, document_id, user)
    while document["status"] == "PROCESSING" and time.monotonic() < end:
        await asyncio.sleep(0.5)
        document = await run_in_threadpool(find, document_id, user)
    return document


# Clients and servers: the clients speak plain HTTP/1.1, since a library for it would take more CPU than a server


class Answer(NamedTuple):
    status: int = 0  # the connection broke
    body: bytes = b"{}"
    took: float = 0
    came_at: float = 0


async def ask(port: int, *pieces: bytes, pause: float = 0, until: float = 0) -> list[Answer]:
    """Sends a request, a piece every `pause` seconds, and sends it again until that time; gives the answers."""
    answers, began = list[Answer](), time.time()
    with contextlib.suppress(OSError, EOFError):
        reader, writer = await asyncio.open_connection(HOST, port)
        with contextlib.closing(writer):
            while not answers or began < until:
                for number, piece in enumerate(pieces):
                    await asyncio.sleep(began + number * pause - time.time())
                    writer.write(piece)
                    await writer.drain()
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
                body = await reader.readexactly(int(re.findall(rb"(?i)content-length: *(\d+)", head)[0]))
                now = time.time()
                answers.append(Answer(int(head[9:12]), body, now - began, now))
                began = now
            return answers
    return [*answers, Answer(came_at=time.time())]


class Kind(NamedTuple):
    """A kind of server: its name in the table, the folder that it is started in, and the app."""

    name: str
    folder: Path
    app: str


SERVICE = Kind("service", Path(__file__).resolve().parent, "main:app")
TEXTBOOK = Kind("textbook", Path(__file__).resolve().parent, "bench:textbook")
Sample = dict[str, float]  # the figures of one round, under their headings


class Server(NamedTuple):
    """A server that runs, and the access token that it gave."""

    port: int
    pid: int = 0
    token: str = ""

    def request(self, line: str, body: bytes = b"", media_type: str = "text/plain") -> bytes:
        return (f"{line} HTTP/1.1\r\nHost: {HOST}\r\nAuthorization: Bearer {self.token}\r\n"
                f"Content-Type: {media_type}\r\nContent-Length: {len(body)}\r\n\r\n").encode() + body

    def upload(self, size: int) -> bytes:
        head = (b'--b0undary\r\nContent-Disposition: form-data; name="file"; filename="report.pdf"\r\n'
                b"Content-Type: application/pdf\r\n\r\n%PDF-1.7\n")
        body = head + os.urandom(size - 15) + b"%%EOF\n\r\n--b0undary--\r\n"
        return self.request("POST /documents/upload", body, "multipart/form-data; boundary=b0undary")

    def clocks(self) -> tuple[float, float]:
        """The time, and the CPU seconds that the server has used (proc(5))."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return time.time(), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def figures(self, began: tuple[float, float], ended: tuple[float, float], answers: Sequence[Answer]) -> Sample:
        seconds, cpu = ended[0] - began[0], ended[1] - began[1]
        good = sorted(1000 * answer.took for answer in answers if answer.status in (200, 201))
        memory = re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())
        return {"per s": len(good) / seconds, "p50 ms": statistics.median(good), "p99 ms": good[int(0.99 * len(good))],
                "worst ms": good[-1], "CPU ms": 1000 * cpu / len(answers), "MiB": int(memory[0]) / 1024,
                "seconds": seconds, "good %": 100 * len(good) / len(answers)}


@contextlib.contextmanager
def running(kind: Kind, root: Path) -> Iterator[Server]:
    """Starts a server with an empty folder in `root`, logs in, and stops it at the end."""
    data, answer = Path(tempfile.mkdtemp(dir=root)), Answer()
    settings = {"DOCS_DATA_DIR": str(data), "DOCS_ADMIN_PASSWORD": PASSWORD, "DOCS_PROCESS_SECONDS": PROCESS_SECONDS}
    with socket.create_server((HOST, 0)) as probe:
        server = Server(probe.getsockname()[1])
    log_in = server.request("POST /auth/login", b"grant_type=password&username=admin&password=" + PASSWORD.encode(),
                            "application/x-www-form-urlencoded")
    command = [sys.executable, "-m", "uvicorn", kind.app, "--port", str(server.port)]
    with open(data / "log", "w") as log:
        process = subprocess.Popen(command, cwd=kind.folder, env=os.environ | settings, stdout=log, stderr=log)
    try:
        while answer.status == 0 and process.poll() is None:
            time.sleep(0.05)
            (answer,) = asyncio.run(ask(server.port, log_in))
        if answer.status != 200:
            sys.exit(f"{kind.name} did not start:\n{(data / 'log').read_text()}")
        yield Server(server.port, process.pid, json.loads(answer.body)["access_token"])
    finally:
        process.terminate()
        process.wait()
    for path in filter(Path.is_file, data.rglob("*")):
        os.truncate(path, 0)  # and deleted at the end: ext4 can be slow to use an inode again that was freed just now


# The scenarios


async def keep_busy(server: Server, request: bytes) -> Sample:
    """CLIENTS connections ask again and again. What is answered within SECONDS is measured."""
    until = time.time() + WARM_UP_SECONDS + SECONDS
    clients = asyncio.gather(*(ask(server.port, request, until=until) for _ in range(CLIENTS)))
    await asyncio.sleep(WARM_UP_SECONDS)
    began = server.clocks()
    await asyncio.sleep(SECONDS)
    ended = server.clocks()
    answers = [answer for client in await clients for answer in client if began[0] <= answer.came_at < ended[0]]
    return server.figures(began, ended, answers)


async def crowd(server: Server, *pieces: bytes, pause: float = 0) -> list[Answer]:
    """MANY clients ask once each. They begin one after another, and all have begun before the first ends."""
    clients = list[asyncio.Task[list[Answer]]]()
    for _ in range(MANY):
        clients.append(asyncio.create_task(ask(server.port, *pieces, pause=pause)))
        await asyncio.sleep(PAUSE / MANY)
    return [answer for client in clients for answer in await client]


async def open_uploads(server: Server) -> Sample:
    request, began = server.upload(100_000), server.clocks()
    size = len(request) // PIECES + 1
    pieces = [request[place:place + size] for place in range(0, len(request), size)]
    answers = await crowd(server, *pieces, pause=PAUSE)
    return server.figures(began, server.clocks(), answers)


async def add_document(server: Server) -> str:
    (answer,) = await ask(server.port, server.upload(1000))
    return f"/documents/{json.loads(answer.body)['document_id']}"


async def poll_status(server: Server) -> Sample:
    return await keep_busy(server, server.request(f"GET {await add_document(server)}/status"))


async def wait_for_end(server: Server) -> Sample:
    path, late = await add_document(server), list[Answer]()
    await ask(server.port, server.request(f"POST {path}/process"))
    began = server.clocks()
    answers = await crowd(server, server.request(f"GET {path}/status?wait=30"))
    ended = server.clocks()
    for answer in answers:
        end = json.loads(answer.body).get("finished_at")
        late.append(answer._replace(took=answer.came_at - datetime.fromisoformat(end).timestamp()) if end else Answer())
    return server.figures(began, ended, late)


SCENARIOS: dict[str, tuple[int, Callable[[Server], Coroutine[Any, Any, Sample]]]] = {  # with the number of rounds
    "upload10k": (3, lambda server: keep_busy(server, server.upload(10_000))),
    "upload1m": (3, lambda server: keep_busy(server, server.upload(1_000_000))),
    "open1000": (2, open_uploads), "status": (3, poll_status), "poll1000": (2, wait_for_end)}


def report(scenario: str, samples: Mapping[str, Sequence[Sample]]) -> None:
    """A line for each server, and one for the ratios of the first to each of the others."""
    medians = {name: {heading: (min if heading == "good %" else statistics.median)(sample[heading] for sample in taken)
                      for heading in taken[0]} for name, taken in samples.items()}
    (first, figures), *others = medians.items()
    print(f"{scenario:22}" + "".join(f"{heading:>10}" for heading in figures))
    for name, values in medians.items():
        print(f"  {name:20}" + "".join(f"{value:10.2f}" for value in values.values()))
    for name, values in others:
        print(f"  {first + ' / ' + name:20}" + "".join(f"{figures[key] / values[key]:10.2f}" for key in values))


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as root:
        for name, (rounds, scenario) in SCENARIOS.items():
            samples: dict[str, list[Sample]] = {SERVICE.name: [], TEXTBOOK.name: []}
            for kind in (SERVICE, TEXTBOOK) * rounds:
                with running(kind, Path(root)) as server:
                    samples[kind.name].append(asyncio.run(scenario(server)))
            report(name, samples)


if __name__ == "__main__":
    main()
