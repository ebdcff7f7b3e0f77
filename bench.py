"""The benchmark: this service beside what a user would write instead, and beside what its web server can do at most.

    python bench.py                      every scenario, in less than five minutes
    python bench.py upload-10k status    only these
    python bench.py --rounds 5 --json figures.json

    service     `uvicorn main:app` with default settings
    textbook    FastAPI as in its tutorial: `UploadFile` copied to disk in a `def` route, a SQLite connection for each
                request, a dependency that checks the JWT; no fsync of files
    floor       bare ASGI under the same uvicorn: the raw body into a file; no parsing, no token, no database

Each round starts each server anew, in turn, on the loopback and with an empty folder; a figure is the median over the
rounds. `CPU ms` is the server's for each request, `MiB` its peak memory, all its processes together. Client and
servers share the machine, so trust the ratios more than the figures; `client` is the share of one core that the client
took. Folders are made in TMPDIR: on a disk, fsync costs what it costs there; in memory, nothing. Needs Linux (/proc).
"""
# What only one of the servers needs is imported there: the floor is to have its own memory alone.
import argparse
import asyncio
import contextlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, NamedTuple

if TYPE_CHECKING:
    from fastapi import FastAPI

HOST, PASSWORD, SECRET = "127.0.0.1", "correct horse battery staple", "a secret of the textbook, 32 bytes or more"
CLIENTS, MANY = 16, 1000  # MANY: uploads open at once, waiting clients, queued documents
PACE, PIECES = 6.0, 13  # seconds that each of MANY uploads takes by its client's will, in so many pieces
GOOD = 200, 201, 202
STARTED = time.perf_counter()

# The other servers


def textbook() -> "FastAPI":
    import jwt
    from fastapi import Depends, FastAPI, HTTPException, UploadFile
    from fastapi.security import OAuth2PasswordBearer

    app, bearer, folder = FastAPI(), OAuth2PasswordBearer("auth/login"), Path(os.environ["DOCS_DATA_DIR"])
    database = folder / "documents.db"
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        db.execute("CREATE TABLE documents (id TEXT PRIMARY KEY, owner TEXT, filename TEXT, size INTEGER, status TEXT)")

    async def current_user(token: Annotated[str, Depends(bearer)]) -> str:
        try:
            return str(jwt.decode(token, SECRET, algorithms=["HS256"])["sub"])
        except jwt.InvalidTokenError:
            raise HTTPException(401, "Could not validate credentials", {"WWW-Authenticate": "Bearer"}) from None

    @app.post("/documents/upload", status_code=201)
    def upload(file: UploadFile, user: Annotated[str, Depends(current_user)]) -> dict[str, Any]:
        document_id, filename = str(uuid.uuid4()), file.filename or ""
        with open(folder / document_id, "wb") as target:
            shutil.copyfileobj(file.file, target)
            size = target.tell()
        with contextlib.closing(sqlite3.connect(database)) as db, db:
            db.execute("INSERT INTO documents VALUES (?, ?, ?, ?, 'UPLOADED')", (document_id, user, filename, size))
        return {"document_id": document_id, "filename": filename, "size": size, "status": "UPLOADED"}

    @app.get("/documents/{document_id}/status")
    async def status(document_id: uuid.UUID, user: Annotated[str, Depends(current_user)]) -> dict[str, Any]:
        return {"document_id": document_id, "status": "UPLOADED", "progress": 0}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return app


async def floor(scope: Mapping[str, Any], receive: Callable[[], Awaitable[dict[str, Any]]],
                send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    if scope["method"] == "POST":
        with open(Path(os.environ["DOCS_DATA_DIR"]) / uuid.uuid4().hex, "wb", buffering=0) as file:
            more = True
            while more:
                message = await receive()
                file.write(message["body"])
                more = message["more_body"]
    await send({"type": "http.response.start", "status": 201, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"{}"})


# Starting and watching them


@dataclass(frozen=True)
class Kind:
    """How a server is started. With `documents` it finds so many in its database, and keeps its folder."""

    name: str
    arguments: tuple[str, ...] = ("main:app",)
    settings: Mapping[str, str] = field(default_factory=dict)
    documents: int = 0


SERVICE = Kind("service")
TEXTBOOK = Kind("textbook", ("bench:textbook", "--factory"))
FLOOR = Kind("floor", ("bench:floor", "--lifespan", "off"))


@dataclass
class Server:
    kind: Kind
    process: subprocess.Popen[bytes]
    port: int
    token: str = ""

    def request(self, method: str, path: str, body: bytes = b"", media_type: str = "application/json") -> bytes:
        """The bytes of a request, to be sent as often as wanted."""
        return (f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nAuthorization: Bearer {self.token}\r\n"
                f"Content-Type: {media_type}\r\nContent-Length: {len(body)}\r\n\r\n").encode() + body

    def upload(self, size: int) -> bytes:
        pdf = b"%PDF-1.7\n" + random.Random(size).randbytes(size - 15) + b"%%EOF\n"
        return self.request("POST", "/documents/upload", (
            b'--b0undary\r\nContent-Disposition: form-data; name="file"; filename="report.pdf"\r\n'
            b"Content-Type: application/pdf\r\n\r\n" + pdf + b"\r\n--b0undary--\r\n"
        ), "multipart/form-data; boundary=b0undary")

    def cpu(self) -> float:
        """Seconds that its processes have used."""
        return sum(int(stat[11]) + int(stat[12]) for _, stat in self._processes()) / os.sysconf("SC_CLK_TCK")

    def in_status(self, name: str) -> int:
        """The sum of this field of /proc/PID/status."""
        found = [re.search(rf"^{name}:\s+(\d+)", (path / "status").read_text(), re.M) for path, _ in self._processes()]
        return sum(int(match[1]) for match in found if match)

    def _processes(self) -> Iterator[tuple[Path, list[str]]]:
        """The processes of its session, with /proc/PID/stat from the third field on (proc(5))."""
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                stat = path.read_text().rpartition(")")[2].split()
                if int(stat[3]) == self.process.pid:
                    yield path.parent, stat


@contextlib.contextmanager
def running(kind: Kind, folder: Path, open_files: int) -> Iterator[Server]:
    """A server that answers, with a token for it. It is stopped at the end."""
    if not folder.exists():
        folder.mkdir(mode=0o700)
        if kind.documents:
            fill(folder, kind)
    with folder.with_suffix(".log").open("w+b") as log:
        server = start(kind, folder, open_files, log)
        try:
            while ask(server, server.request("GET", "/healthz")).status not in GOOD:
                if server.process.poll() is not None:
                    sys.exit(f"{kind.name} did not start:\n{Path(log.name).read_text()}")
                time.sleep(0.02)
            server.token = log_in(server)
            yield server
        finally:
            server.process.terminate()
            try:
                server.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.process.pid, signal.SIGKILL)
                server.process.wait()
            if not kind.documents:
                empty(folder)


def start(kind: Kind, folder: Path, open_files: int, log: IO[bytes]) -> Server:
    """In a session of its own, by which its worker processes are known; `open_files` is its soft limit."""
    with socket.create_server((HOST, 0)) as probe:
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DOCS_")}
    environment |= {"DOCS_DATA_DIR": str(folder), "DOCS_ADMIN_PASSWORD": PASSWORD, **kind.settings}
    limits = open_files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return Server(kind, subprocess.Popen(
        [sys.executable, "-m", "uvicorn", *kind.arguments, "--port", str(port)], cwd=Path(__file__).parent,
        env=environment, stdout=log, stderr=log, start_new_session=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits)), port)


def empty(folder: Path) -> None:
    """Gives the space back and the name free. The files themselves go at the very end: ext4 passes over inodes that
    were freed lately, one by one, and that would slow down the servers that come next."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, 0)
    folder.rename(folder.with_name(f"{folder.name} {time.monotonic_ns()}"))


def log_in(server: Server) -> str:
    if server.kind in (TEXTBOOK, FLOOR):
        import jwt
        return jwt.encode({"sub": "admin", "exp": time.time() + 3600}, SECRET, "HS256")
    credentials = json.dumps({"username": "admin", "password": PASSWORD}).encode()
    return str(json.loads(ask(server, server.request("POST", "/auth/login", credentials)).body)["access_token"])


def fill(folder: Path, kind: Kind) -> None:
    """Makes the service's database with documents of its first user; there are no files of them."""
    import auth
    from db import Database

    database = Database(folder / "documents.db")
    database.add_first_user("admin", auth.hash_password(PASSWORD)).result()
    user = database.user("admin")
    assert user
    database.close()
    error = json.dumps({"code": "damaged_document", "message": "The PDF is cut off.", "retryable": False})
    statuses, errors = ("UPLOADED", "COMPLETED", "FAILED"), (None, None, error)

    def rows() -> Iterator[tuple[Any, ...]]:
        for number in range(kind.documents):
            at = f"{datetime.fromtimestamp(1.7e9 + number).isoformat()}.000000Z"
            yield (document_id(number), user.user_id, f"report-{number}.pdf", "application/pdf", 80100,
                   f"{number:064x}", statuses[number % 3], at, at, errors[number % 3])

    with contextlib.closing(sqlite3.connect(folder / "documents.db")) as connection, connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA cache_size = -400000")
        connection.executemany(
            "INSERT INTO documents (document_id, owner_id, filename, media_type, size, sha256, status, created_at,"
            " updated_at, error) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows())


def document_id(number: int) -> str:
    """Spread like a random one, and the same each time."""
    return str(uuid.UUID(int=number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128, version=4))


# The client


class Answer(NamedTuple):
    status: int = 0  # the connection broke
    head: bytes = b""
    body: bytes = b""


class Connection:
    """Keep-alive HTTP/1.1 over a raw socket: a request's bytes go out as they are, little of the answer is read."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None

    async def exchange(self, *pieces: bytes, pause: float = 0.0) -> Answer:
        """The answer to a request that is sent in pieces, `pause` seconds from the start of one to that of the next."""
        try:
            async with asyncio.timeout(60):
                if self._socket is None:
                    self._socket = socket.socket()
                    self._socket.setblocking(False)
                    self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    await asyncio.get_running_loop().sock_connect(self._socket, (HOST, self._port))
                return await self._send_and_receive(self._socket, pieces, pause)
        except OSError:  # TimeoutError is one
            self.close()
            return Answer()

    @staticmethod
    async def _send_and_receive(connected: socket.socket, pieces: Sequence[bytes], pause: float) -> Answer:
        loop, start, received = asyncio.get_running_loop(), time.perf_counter(), b""
        for number, piece in enumerate(pieces):
            if number:
                await asyncio.sleep(start + number * pause - time.perf_counter())
            await loop.sock_sendall(connected, piece)
        while data := await loop.sock_recv(connected, 262144):
            received += data
            head, _, body = received.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)(\r|$)", head)
            if length and len(body) == int(length[1]):
                return Answer(int(head[9:12]), head, body)
        raise ConnectionResetError

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def ask(server: Server, request: bytes) -> Answer:
    with contextlib.closing(Connection(server.port)) as connection:
        return asyncio.run(connection.exchange(request))


Sample = dict[str, float]  # the figures of one row in one round


class Meter:
    """What happens from here on."""

    def __init__(self, server: Server) -> None:
        self._server, self._start = server, time.perf_counter()
        self._cpu, self._own = server.cpu(), time.process_time()

    def read(self, done: float, requests: int, seconds: float = math.inf) -> Sample:
        """With so much of these requests done in `seconds`, or until now."""
        elapsed = time.perf_counter() - self._start
        return {"rate": done / min(seconds, elapsed), "cpu": 1000 * (self._server.cpu() - self._cpu) / requests,
                "memory": self._server.in_status("VmHWM") / 1024, "client": (time.process_time() - self._own) / elapsed}


def percentiles(took: Sequence[float]) -> Sample:
    return {"p50": 1000 * statistics.median(took), "p99": 1000 * sorted(took)[math.ceil(0.99 * len(took)) - 1]}


async def drive(server: Server, requests: Iterable[bytes], seconds: float = math.inf) -> tuple[Sample, list[Answer]]:
    """CLIENTS connections take one request after another until none is left or the time is up. What is under way then
    is waited for, and counts for the rate by the part of its time that was within."""
    queue, took, answers, done = iter(requests), list[float](), list[Answer](), 0.0

    async def client() -> None:
        nonlocal done
        with contextlib.closing(Connection(server.port)) as connection:
            while (start := time.perf_counter()) < end and (request := next(queue, None)) is not None:
                answers.append(answer := await connection.exchange(request))
                took.append(time.perf_counter() - start)
                done += min(1.0, (end - start) / took[-1]) if answer.status in GOOD else 0

    meter, end = Meter(server), time.perf_counter() + seconds
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    errors = sum(answer.status not in GOOD for answer in answers)
    return percentiles(took) | meter.read(done, len(took), seconds) | ({"errors": errors} if errors else {}), answers


async def measure(server: Server, requests: Sequence[bytes], seconds: float = 1.3) -> Sample:
    await drive(server, itertools.cycle(requests), 0.3)  # to warm up
    return (await drive(server, itertools.cycle(requests), seconds))[0]


async def upload_documents(server: Server, count: int) -> list[str]:
    """The ids of new small documents."""
    _, answers = await drive(server, itertools.repeat(server.upload(1000), count))
    return [json.loads(answer.body)["document_id"] for answer in answers]


# Scenarios: each runs against one server and gives its rows

Rows = dict[str, Sample]


def uploads(size: int) -> Callable[[Server], Coroutine[Any, Any, Rows]]:
    async def run(server: Server) -> Rows:
        return {server.kind.name: await measure(server, [server.upload(size)])}
    return run


async def open_uploads(server: Server) -> Rows:
    """An upload is open from its first byte to its answer. They begin within one pause, and so end all at once too."""
    request, took, statuses, now_open, most_open = server.upload(100_000), list[float](), list[int](), 0, 0
    size, pause = math.ceil(len(request) / PIECES), PACE / (PIECES - 1)
    pieces = [request[start:start + size] for start in range(0, len(request), size)]

    async def client(delay: float) -> None:
        nonlocal now_open, most_open
        await asyncio.sleep(delay)
        start, now_open = time.perf_counter(), now_open + 1
        most_open = max(most_open, now_open)
        with contextlib.closing(Connection(server.port)) as connection:
            statuses.append((await connection.exchange(*pieces, pause=pause)).status)
        took.append(time.perf_counter() - start)
        now_open -= 1

    meter = Meter(server)
    await asyncio.gather(*(client(pause * number / MANY) for number in range(MANY)))
    return {server.kind.name: percentiles(took) | meter.read(statuses.count(201), MANY) | {
        "answers of 201": statuses.count(201), "open at once": most_open, "slowest / pace": max(took) / PACE}}


async def poll_status(server: Server) -> Rows:
    ids = await upload_documents(server, CLIENTS)
    return {server.kind.name: await measure(server, [
        server.request("GET", f"/documents/{id_}/status") for id_ in ids])}


async def wait_for_end(server: Server) -> Rows:
    """Times are from `finished_at`, the end of the one run that all wait for, to each answer."""
    (id_,) = await upload_documents(server, 1)
    request, late = server.request("GET", f"/documents/{id_}/status?wait=30"), list[float]()

    async def client() -> None:
        with contextlib.closing(Connection(server.port)) as connection:
            status, now = json.loads((await connection.exchange(request)).body or "{}"), time.time()
        if status.get("status") == "COMPLETED":
            late.append(now - datetime.fromisoformat(status["finished_at"]).timestamp())

    await drive(server, [server.request("POST", f"/documents/{id_}/process")])
    meter, idle = Meter(server), server.in_status("Threads")
    waiting = asyncio.gather(*(client() for _ in range(MANY)))
    await asyncio.sleep(0.8 * float(server.kind.settings["DOCS_PROCESS_SECONDS"]))
    threads = server.in_status("Threads")
    await waiting
    return {server.kind.name: percentiles(late) | meter.read(len(late), MANY) | {
        "answers at the end": len(late), "latest ms": 1000 * max(late), "threads": threads, "before": idle}}


async def look_up(server: Server) -> Rows:
    """Pages are those of the newest 1,000 documents, statuses are of documents from everywhere."""
    count, name, pages, path = server.kind.documents, server.kind.name, list[bytes](), "/documents?limit=50"
    while path and len(pages) < 20:
        pages.append(server.request("GET", path))
        _, (answer,) = await drive(server, pages[-1:])
        link = re.search(rb'(?i)\r\nlink: <([^>]+)>; rel="next"', answer.head)
        path = link[1].decode() if link else ""
    statuses = [server.request("GET", f"/documents/{document_id(number)}/status")
                for number in range(0, count, count // 1000)]
    return {f"page of {name}": await measure(server, pages, 1), f"status of {name}": await measure(server, statuses, 1)}


async def process_queue(server: Server) -> Rows:
    """The rate is of documents from the first `process` until all are COMPLETED, the times are of the `process`."""
    ids, meter = await upload_documents(server, MANY), Meter(server)
    sample, _ = await drive(server, [server.request("POST", f"/documents/{id_}/process") for id_ in ids])
    for status in ("PROCESSING", "UPLOADED", "FAILED"):
        question = server.request("GET", f"/documents?limit=1&status={status}")
        while (await drive(server, [question]))[1][0].body != b"[]":
            assert status == "PROCESSING", f"documents are {status}"
            await asyncio.sleep(0.02)
    return {server.kind.name: sample | meter.read(MANY, MANY)}


async def ask_health(server: Server) -> Rows:
    """The times are of `/healthz`, the rest is of the uploads."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as prober:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(prober, probe_health, server.port, 0.1)  # starts the process
        load = asyncio.create_task(measure(server, [server.upload(10_000_000)], 3))
        await asyncio.sleep(0.5)
        health = await loop.run_in_executor(prober, probe_health, server.port, 2.8)
        return {server.kind.name: await load | health}


def probe_health(port: int, seconds: float) -> Sample:
    """Asks in a process of its own, so that the uploading client adds nothing to the times."""
    async def probe() -> None:
        with contextlib.closing(Connection(port)) as connection:
            while (start := time.perf_counter()) < end:
                await connection.exchange(f"GET /healthz HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
                took.append(time.perf_counter() - start)
                await asyncio.sleep(0.005)

    took, end = list[float](), time.perf_counter() + seconds
    asyncio.run(probe())
    return percentiles(took)


@dataclass(frozen=True)
class Scenario:
    title: str
    run: Callable[[Server], Coroutine[Any, Any, Rows]]
    kinds: tuple[Kind, ...] = (SERVICE, TEXTBOOK, FLOOR)
    ratios: tuple[tuple[str, str], ...] = (("service", "textbook"), ("service", "floor"))
    open_files: int | None = None  # the server's soft limit at its start; None: that of this shell
    most_rounds: int = 100


SIZES = {"upload-10k": 10_000, "upload-100k": 100_000, "upload-1m": 1_000_000, "upload-10m": 10_000_000}
COUNTS = ("1,000", "100,000", "1,000,000")
SCENARIOS = {name: Scenario(f"{CLIENTS} clients upload PDFs of {size:,} bytes", uploads(size),
                            most_rounds=2 if size > 10**6 else 100) for name, size in SIZES.items()} | {
    "open-1000": Scenario(
        f"{MANY} uploads of 100,000 bytes open at once, sent within {PACE:g} s; soft limit of 1,024 open files",
        open_uploads, (SERVICE, TEXTBOOK), (("service", "textbook"),), open_files=1024, most_rounds=1),
    "status": Scenario(
        f"{CLIENTS} clients poll the status; the textbook answers a constant", poll_status, (SERVICE, TEXTBOOK),
        (("service", "textbook"),)),
    "wait-1000": Scenario(
        f"{MANY} clients wait for the end of one run; times from that end to their answers", wait_for_end,
        (Kind("service", settings={"DOCS_PROCESS_SECONDS": "3"}),), (), most_rounds=2),
    "list": Scenario(
        f"{CLIENTS} clients ask for pages of 50 documents, then for statuses, of so many documents", look_up,
        tuple(Kind(count, documents=int(count.replace(",", ""))) for count in COUNTS),
        tuple((f"{what} of {count}", f"{what} of {COUNTS[0]}") for what in ("page", "status") for count in COUNTS[1:]),
        most_rounds=2),
    "queue-1000": Scenario(
        f"{MANY} documents from `process` to COMPLETED; times of the calls of `process`", process_queue,
        (Kind("service", settings={"DOCS_PROCESS_SECONDS": "0"}),), (), most_rounds=2),
    "health": Scenario(
        f"times of /healthz while {CLIENTS} clients upload 10 MB files; the rest is of the uploads", ask_health,
        (SERVICE, TEXTBOOK), (("service", "textbook"),), most_rounds=2),
    "workers": Scenario(
        f"{CLIENTS} clients upload PDFs of 10,000 bytes to one process and to two", uploads(10_000),
        (Kind("one"), Kind("two", ("main:app", "--workers", "2"))), (("two", "one"),),
        most_rounds=2)}


# The report

COLUMNS = {"rate": "per s", "p50": "p50 ms", "p99": "p99 ms", "cpu": "CPU ms", "memory": "MiB", "client": "client"}


def run_rounds(name: str, rounds: int, root: Path, open_files: int) -> dict[str, Any]:
    """Every second round takes the servers in the opposite order."""
    scenario, samples = SCENARIOS[name], dict[str, list[Sample]]()
    for number in range(min(rounds, scenario.most_rounds)):
        for kind in scenario.kinds[::-1 if number % 2 else 1]:
            print(f"{time.perf_counter() - STARTED:4.0f} s  {name}, round {number + 1}: {kind.name}", file=sys.stderr)
            with running(kind, root / f"{name} {kind.name}", scenario.open_files or open_files) as server:
                for row, sample in asyncio.run(scenario.run(server)).items():
                    samples.setdefault(row, []).append(sample)
    rows = {row: {figure: statistics.median(sample.get(figure, 0) for sample in taken)
                  for figure in dict.fromkeys(itertools.chain(*taken))} for row, taken in samples.items()}
    ratios = {f"{one} / {other}": {figure: rows[one][figure] / rows[other][figure]
                                   for figure in COLUMNS if figure != "client" and rows[other][figure]}
              for one, other in scenario.ratios}
    return {"title": scenario.title, "rows": rows, "ratios": ratios, "rounds": samples}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{'':40}" + "".join(f"{heading:>9}" for heading in COLUMNS.values())]
    for name, result in results.items():
        lines += ["", f"{name}: {result['title']}"]
        for row, sample in result["rows"].items():
            others = (f"{figure}: {value:.4g}" for figure, value in sample.items() if figure not in COLUMNS)
            lines += [line(row, sample), *(f"      {other}" for other in others)]
        lines += [line(pair, ratios, "x") for pair, ratios in result["ratios"].items()]
    return "\n".join(lines)


def line(label: str, figures: Sample, unit: str = "") -> str:
    cells = (shown(figures[figure]) + unit if figure in figures else "" for figure in COLUMNS)
    return f"  {label:38}" + "".join(f"{cell:>9}" for cell in cells).rstrip()


def shown(value: float) -> str:
    """Three digits that count."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def machine(folder: Path) -> str:
    took = []
    with open(folder / "fsync", "wb", buffering=0) as file:
        for _ in range(50):
            file.write(bytes(4096))
            start = time.perf_counter()
            os.fsync(file.fileno())
            took.append(time.perf_counter() - start)
    extras = [name for name in ("uvloop", "httptools") if importlib.util.find_spec(name)]
    return (f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, fastapi {version('fastapi')},"
            f" uvicorn {version('uvicorn')} with {' and '.join(extras) or 'neither uvloop nor httptools'},"
            f" {os.cpu_count()} cores, {percentiles(took)['p50']:.2f} ms for an fsync of 4 KiB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measures the service beside two others.", formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:12}{scenario.title}" for name, scenario in SCENARIOS.items()))
    parser.add_argument("scenario", nargs="*", help="all, unless some are named")
    parser.add_argument("--rounds", type=int, default=3, help="3, unless given; the longest scenarios take one or two")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes every figure of every round there too")
    chosen = parser.parse_args()
    if chosen.rounds < 1 or not set(chosen.scenario) <= set(SCENARIOS):
        parser.error(f"at least one round, and scenarios out of {', '.join(SCENARIOS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the servers are stopped then too
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        about = machine(Path(folder))
        results = {name: run_rounds(name, chosen.rounds, Path(folder), soft) for name in chosen.scenario or SCENARIOS}
    print(f"{about}; measured in {time.perf_counter() - STARTED:.0f} s\n\n{table(results)}")
    if chosen.json:
        chosen.json.write_text(json.dumps({"machine": about, "scenarios": results}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
