"""Processes that share a Redis: what they answer while workers, connections, Redis and an API fall over."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import redis
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from redis_server import RedisServer
from servers import DDPM, GAN, Server, free_port, write

from models import _checkpoint
from service.broker import MAX_DEATHS
from service.engine import Engine
from service.messages import Generate, ImageDone, Message

pytestmark = pytest.mark.xdist_group("servers")
CLAIM = 3.0  # seconds without a sign of life after which a worker loses its jobs
HOUR = 3600.0
AHEAD = (  # a worker on whose machine it is `argv[1]` seconds later
    "import runpy, sys, time; seconds = float(sys.argv.pop(1)); real, real_ns = time.time, time.time_ns;"
    "time.time = lambda: real() + seconds; time.time_ns = lambda: real_ns() + int(1e9 * seconds);"
    "runpy.run_module('service.worker', run_name='__main__', alter_sys=True)"
)
PIXELCNN = {"features": 8, "dilations": (1, 2), "hidden": 8, "embedding": 4}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    write(folder, "chain", "ddpm", DDPM)
    write(folder, "gan", "gan", GAN)
    write(folder, "pixels", "pixelcnn", PIXELCNN)
    return folder


class Proxy:
    """Stands between Redis and everybody else, and cuts their connections when it is told to."""

    def __init__(self, target: int) -> None:
        self.port, self._target = free_port(), target
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """All connections, in the middle of whatever they carry."""

        def abort() -> None:
            for writer in list(self._writers):
                writer.transport.abort()

        self._loop.call_soon_threadsafe(abort)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", self.port))
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.1))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        try:
            await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))
        except OSError:
            pass
        finally:
            self._writers -= {writer, far_writer}
            writer.transport.abort()
            far_writer.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.transport.abort()


class WorkerProcess:
    """One worker, without a supervisor: the test kills it and starts it again."""

    def __init__(
        self, name: str, zoo: Path, log: Path, environment: dict[str, str], ahead: float = 0.0, drain: float = 20.0
    ) -> None:
        self._name, self._zoo, self._log, self._environment = name, zoo, log, environment
        self._module = ["-c", AHEAD, str(ahead)] if ahead else ["-m", "service.worker"]
        self._drain_seconds = drain
        self.start()

    def start(self) -> None:
        command = [sys.executable, *self._module, "--redis", "--name", self._name, "--models", str(self._zoo)]
        command += ["--drain-seconds", str(self._drain_seconds)]
        with self._log.open("ab") as out:
            self.child = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=self._environment, cwd=Path(__file__).parents[1]
            )

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()

    def drain(self) -> int:
        self.child.send_signal(signal.SIGCONT)
        self.child.terminate()
        return self.child.wait(40)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.child.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.child.send_signal(signal.SIGCONT)


@dataclass
class Pool:
    server: RedisServer
    proxy: Proxy
    apis: list[Server]
    workers: list[WorkerProcess]
    environment: dict[str, str]
    zoo: Path
    folder: Path

    @property
    def client(self) -> httpx.Client:
        return self.apis[0].client

    @property
    def redis(self) -> redis.Redis:
        return redis.Redis(port=self.server.port)

    def worker(self, name: str, ahead: float = 0.0, drain: float = 20.0) -> WorkerProcess:
        """One more."""
        log = self.folder / f"{name}.log"
        self.workers.append(WorkerProcess(name, self.zoo, log, self.environment, ahead, drain))
        return self.workers[-1]

    def restart_api(self, k: int) -> None:
        old = self.apis[k]
        old.child.kill()
        old.child.wait()
        old.client.close()
        self.apis[k] = Server(self.zoo, old.log, command="api", environment=self.environment, port=old.port)


@contextmanager
def pool(zoo: Path, folder: Path, workers: int, apis: int = 1, **of_workers: float) -> Iterator[Pool]:
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer(folder))
        proxy = stack.enter_context(Proxy(server.port))
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DRAWWELL_REDIS_URL": f"redis://127.0.0.1:{proxy.port}/0",
            "DRAWWELL_CLAIM_SECONDS": str(CLAIM),
        }
        made = Pool(server, proxy, [], [], environment, zoo, folder)
        stack.callback(_end, made)
        for k in range(apis):
            made.apis.append(Server(zoo, folder / f"api{k}.log", command="api", environment=environment))
        for k in range(workers):
            made.worker(f"w{k}", **of_workers)
        for api in made.apis:
            api.wait_for("/readyz")
        yield made


def _end(made: Pool) -> None:
    for worker in made.workers:
        worker.kill()
    for api in made.apis:
        api.child.kill()
        api.child.wait()
        api.client.close()


def expected(zoo: Path, bodies: list[dict[str, Any]]) -> list[list[bytes]]:
    """Pixels of each request's images, drawn one request after the other by an engine of our own."""
    told: dict[str, dict[int, bytes]] = {}

    def emit(job: str, message: Message, final: bool) -> None:
        if isinstance(message, ImageDone):
            told.setdefault(job, {})[message.sample] = message.pixels.tobytes()

    engine = Engine(emit)
    for name in {body["model"] for body in bodies}:
        engine.put(name, "1", _checkpoint.load(zoo / name))
    for k, body in enumerate(bodies):
        steps = body.get("steps", 64 if body["model"] == "pixels" else 1)
        solver = "ddim" if body["model"] == "chain" else None
        task = Generate(body["n"], body["seed"], steps, solver, body.get("label"), guidance_scale=body.get("g", 1.0))
        engine.submit(str(k), body["model"], task)
        while engine.step():
            pass
    return [[told[str(k)][i] for i in range(body["n"])] for k, body in enumerate(bodies)]


def pixels(answer: dict[str, Any]) -> list[bytes]:
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))).tobytes() for image in answer["images"]
    ]


def request(k: int, rng: random.Random) -> dict[str, Any]:
    body: dict[str, Any] = {"n": rng.randint(1, 3), "seed": k}
    model = rng.choice(["chain", "chain", "gan", "pixels"])
    if model == "chain":
        body |= {"steps": rng.choice([2, 5, 40]), "guidance_scale": 1.0}
    return {"model": model, "label": rng.randrange(3), **body}


def persistent(made: Pool, k: int, body: dict[str, Any], deadline: float) -> dict[str, Any]:
    """The answer, asked for until it comes: two times of three with an idempotency key, otherwise as a new job."""
    rng = random.Random(k)
    headers = {"Idempotency-Key": f"key-{k}"} if k % 3 else {}
    while time.monotonic() < deadline:
        api = rng.choice(made.apis)
        try:
            answer = httpx.post(f"http://127.0.0.1:{api.port}/generate", json=body, headers=headers, timeout=60)
        except httpx.TransportError:
            time.sleep(rng.uniform(0.1, 0.5))
            continue
        if answer.status_code == 200:
            found: dict[str, Any] = answer.json()
            return found
        assert answer.status_code in (429, 503, 504), answer.text
        time.sleep(rng.uniform(0.1, 0.5))
    raise AssertionError(f"request {k} was never answered")


def under_suspicion(made: Pool) -> list[bytes]:
    """Jobs that run, and are given up when their worker dies: they were alone with as many that did. The pool cannot
    tell chance from a job that kills, so chance must not hit a harmless one as often."""
    jobs = list(made.redis.scan_iter("{drawwell}:job:*"))
    found = [made.redis.hmget(key, "state", "deaths_alone") for key in jobs]
    return [
        key
        for key, (state, alone) in zip(jobs, found, strict=True)
        if state == b"running" and int(alone or 0) >= MAX_DEATHS - 1
    ]


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_nothing_is_lost_whatever_falls_over(zoo: Path, tmp_path: Path) -> None:
    """500 requests over 3 workers and 2 APIs, while 10 workers are killed, 3 are stopped for longer than their claims,
    Redis is killed and started again twice, all connections are cut 5 times, and an API is killed and started again.
    """
    rng = random.Random(0)
    bodies = [request(k, rng) for k in range(500)]
    wanted = expected(zoo, bodies)
    with pool(zoo, tmp_path, workers=3, apis=2) as made, ThreadPoolExecutor(24) as threads:
        deadline = time.monotonic() + 360
        asked = [threads.submit(persistent, made, k, body, deadline) for k, body in enumerate(bodies)]
        faults = ["kill"] * 10 + ["stop"] * 3 + ["redis"] * 2 + ["cut"] * 5 + ["api"]
        rng.shuffle(faults)
        for k, fault in enumerate(faults):
            while sum(a.done() for a in asked) < len(asked) * (k + 1) // (len(faults) + 2):
                assert time.monotonic() < deadline, "it got stuck"
                time.sleep(0.02)
            worker = made.workers[k % 3]
            if fault in ("kill", "stop"):
                while under_suspicion(made):
                    time.sleep(0.02)
            if fault == "kill":
                worker.kill()
                worker.start()
            elif fault == "stop":
                with worker.stopped():
                    time.sleep(2 * CLAIM)
            elif fault == "redis":
                made.server.kill()
                time.sleep(0.5)
                made.server.start()
            elif fault == "cut":
                made.proxy.cut()
            else:
                made.restart_api(1)
        answers = [a.result() for a in asked]
        for body, answer, images in zip(bodies, answers, wanted, strict=True):
            assert pixels(answer) == images, body
        assert_tidy(made, [answer["id"] for answer in answers])
        _until(lambda: metric(made, "drawwell_workers", state="ready") == 3, seconds=60)
        for name in ("running_rows", "waiting_rows", "queued_units"):
            _until(lambda name=name: metric(made, f"drawwell_{name}") == 0)


def metric(made: Pool, name: str, **labels: str) -> float:
    """Summed over all that have these labels, as any API tells."""
    families = text_string_to_metric_families(made.client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def assert_tidy(made: Pool, ids: list[str]) -> None:
    """Each job has one answer, and nothing of them is left in the queues or the books."""
    store = made.redis
    deadline = time.monotonic() + 20
    while int(store.get("{drawwell}:queued") or 0) or store.zcard("{drawwell}:active"):  # type: ignore[arg-type]
        assert time.monotonic() < deadline, "jobs that nobody waits for are still there"
        time.sleep(0.1)
    assert len(set(ids)) == len(ids)
    for job_id in ids:
        told: Any = store.xrange(f"{{drawwell}}:events:{job_id}")
        finals = [fields[b"f"] for _, fields in told].count(b"1")
        assert finals == 1, f"{job_id} was answered {finals} times"
        assert told[-1][1][b"f"] == b"1", "and nothing was told after that"
        assert len(told) < 5000
    assert store.hlen("{drawwell}:waiting") == store.scard("{drawwell}:unclaimed") == 0
    assert list(store.scan_iter("{drawwell}:q:*")) == []
    for stream in store.smembers("{drawwell}:streams"):  # type: ignore[union-attr]
        assert store.xlen(stream) == 0
        assert store.xpending(stream, "workers")["pending"] == 0  # type: ignore[index]
    assert store.xlen("{drawwell}:dead") == 0
    store.close()


def test_a_pool_draws_what_one_machine_draws_and_drains_when_told_to(zoo: Path, tmp_path: Path) -> None:
    bodies = [request(k, random.Random(k)) for k in range(20)]
    wanted = expected(zoo, bodies)
    with pool(zoo, tmp_path, workers=2) as made, ThreadPoolExecutor(8) as threads:
        deadline = time.monotonic() + 60
        asked = [threads.submit(persistent, made, k, body, deadline) for k, body in enumerate(bodies)]
        time.sleep(0.3)
        assert made.workers[0].drain() == 0
        for body, answer, images in zip(bodies, asked, wanted, strict=True):
            assert pixels(answer.result()) == images, body
        assert_tidy(made, [a.result()["id"] for a in asked])
        long = {"model": "chain", "n": 4, "steps": 1000, "seed": 1}
        accepted = made.client.post("/generate", json=long, headers={"Prefer": "respond-async"}).json()
        stream = made.client.get(f"/jobs/{accepted['id']}/events").text
        assert "event: completed" in stream
        assert made.workers[1].drain() == 0
        _until(lambda: made.client.get("/readyz").status_code == 503)
        psutil.Process(made.apis[0].child.pid).send_signal(signal.SIGTERM)
        assert made.apis[0].child.wait(20) == 0


def test_without_redis_requests_are_refused_soon_and_taken_again_soon(zoo: Path, tmp_path: Path) -> None:
    with pool(zoo, tmp_path, workers=1) as made:
        body = {"model": "gan", "seed": 1}
        before = made.client.post("/generate", json=body)
        assert before.status_code == 200
        made.server.kill()
        began = time.monotonic()
        refused = made.client.post("/generate", json=body)
        assert time.monotonic() - began < 2
        assert refused.status_code == 503
        assert refused.headers["content-type"] == "application/problem+json"
        assert made.client.get("/healthz").status_code == 200
        _until(lambda: made.client.get("/readyz").status_code == 503)
        made.server.start()
        began = time.monotonic()
        _until(lambda: made.client.post("/generate", json=body).status_code == 200)
        assert time.monotonic() - began < (2 if os.environ.get("DRAWWELL_STRICT_TIMES") == "1" else 10)
        after = made.client.post("/generate", json=body)
        assert pixels(after.json()) == pixels(before.json())


def test_jobs_that_redis_has_forgotten_are_answered_at_once(zoo: Path, tmp_path: Path) -> None:
    with pool(zoo, tmp_path, workers=1) as made, ThreadPoolExecutor(1) as threads, made.workers[0].stopped():
        asked = threads.submit(made.client.post, "/generate", json={"model": "gan", "seed": 1})
        _until(lambda: bool(made.redis.zcard("{drawwell}:active")))
        began = time.monotonic()
        made.server.forget()
        lost = asked.result()
        assert time.monotonic() - began < 5
        assert lost.status_code == 500
        assert "lost its memory" in lost.json()["detail"]


def test_a_worker_that_comes_back_from_a_pause_does_not_answer_twice(zoo: Path, tmp_path: Path) -> None:
    with pool(zoo, tmp_path, workers=1) as made:
        long = {"model": "chain", "n": 1, "steps": 300, "seed": 1}
        quiet = made.client.post("/generate", json=long).json()
        job_id = made.client.post("/generate", json=long, headers={"Prefer": "respond-async"}).json()["id"]
        _until(lambda: made.client.get(f"/jobs/{job_id}").json()["status"] == "running")
        with made.workers[0].stopped():
            made.worker("second")
            _until(lambda: made.client.get(f"/jobs/{job_id}").json()["status"] == "done", seconds=60)
            answer = made.client.get(f"/jobs/{job_id}").json()["answer"]
        time.sleep(2)
        assert pixels(answer) == pixels(quiet)
        assert_tidy(made, [job_id])


def test_a_worker_that_is_told_to_end_hands_a_long_job_back(zoo: Path, tmp_path: Path) -> None:
    """It is off the list of those that are ready first, has its time, and then another worker begins anew."""
    with pool(zoo, tmp_path, workers=1, drain=0.5) as made:
        long = {"model": "chain", "n": 8, "steps": 1000, "seed": 1}
        quiet = made.client.post("/generate", json=long).json()
        job_id = made.client.post("/generate", json=long, headers={"Prefer": "respond-async"}).json()["id"]
        _until(lambda: made.client.get(f"/jobs/{job_id}").json()["status"] == "running")
        began = time.monotonic()
        made.workers[0].child.terminate()
        _until(lambda: made.client.get("/readyz").status_code == 503)
        assert made.workers[0].child.wait(20) == 0
        assert time.monotonic() - began > 0.5
        assert made.client.get(f"/jobs/{job_id}").json()["status"] == "queued"
        made.worker("second")
        _until(lambda: made.client.get(f"/jobs/{job_id}").json()["status"] == "done", seconds=120)
        assert pixels(made.client.get(f"/jobs/{job_id}").json()["answer"]) == pixels(quiet)
        assert made.redis.hmget(f"{{drawwell}}:job:{job_id}", "attempt", "deaths") == [b"1", b"0"]
        assert_tidy(made, [job_id])


def test_clocks_of_machines_may_differ_by_an_hour(zoo: Path, tmp_path: Path) -> None:
    """A worker an hour ahead dies; one an hour behind takes its job over once the claim has run out."""
    with pool(zoo, tmp_path, workers=1, ahead=HOUR) as made:
        long = {"model": "chain", "n": 4, "steps": 600, "seed": 1, "timeout": 100}
        quiet = made.client.post("/generate", json=long).json()
        job_id = made.client.post("/generate", json=long, headers={"Prefer": "respond-async"}).json()["id"]
        _until(lambda: made.client.get(f"/jobs/{job_id}").json()["status"] == "running")
        made.workers[0].kill()
        made.worker("behind", ahead=-HOUR)
        _until(lambda: made.client.get(f"/jobs/{job_id}").json()["status"] == "done", seconds=60)
        done = made.client.get(f"/jobs/{job_id}").json()["answer"]
        assert pixels(done) == pixels(quiet)
        assert CLAIM / 2 < done["usage"]["queue_seconds"] < 60
        assert_tidy(made, [job_id])


def _until(holds: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if holds():
                return
        time.sleep(0.05)
    raise AssertionError("it never came to hold")
