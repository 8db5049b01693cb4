"""An API without workers: a broker in memory that answers as it is told to, model folders without weights, and a client
that speaks ASGI message by message, so that a test can hang up when it likes."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import io
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI
from PIL import Image

from models._protocol import ImageSpace, Likelihood, Range, Spec, Steps
from service.app import create_app
from service.broker import Broker, Event, Job, Line, ModelState, Status, Waiting, WorkerState
from service.catalog import Catalog
from service.messages import (
    Completed,
    Generate,
    ImageDone,
    MapImages,
    Mapped,
    Message,
    Pixels,
    Progress,
    Scored,
    ScoreImages,
    Started,
    pack,
    unpack,
)
from service.settings import Settings

LABELS = ("T-shirt/top", "Trouser", "Pullover")
DIFFUSION = Spec(
    family="ddpm",
    image=ImageSpace(width=5, height=4, channels=1, labels=LABELS),
    steps=Steps(unit="denoising step", min=1, default=20, max=1000, network_evaluations_per_step=1),
    solvers=("ddim", "ddpm"),
    likelihood=Likelihood(kind="bound", dequantisation="none", steps=7),
    guidance_scale=Range(0, 1, 10),
)
DENSITY = Spec(
    family="pixelcnn",
    image=ImageSpace(width=5, height=4, channels=3),
    steps=Steps(unit="pixel", min=20, default=20, max=20),
    likelihood=Likelihood(kind="exact", dequantisation="none", heatmap_evaluations=3),
    temperature=Range(0.1, 1, 2),
)
ENERGY = Spec(
    family="ebm",
    image=ImageSpace(width=5, height=4, channels=1),
    steps=Steps(unit="Langevin step", min=1, default=10, max=100, network_evaluations_per_step=2),
    likelihood=Likelihood(kind="unnormalised", dequantisation="uniform K=1"),
)
GAN = Spec(family="gan", image=ImageSpace(width=5, height=4, channels=1), steps=Steps(unit="pass"))
SPECS = {"diffusion": DIFFUSION, "density": DENSITY, "energy": ENERGY, "gan": GAN}

Answer = Callable[[Job], AsyncIterator[Event]]


def picture(seed: int, sample: int, shape: tuple[int, int, int]) -> Pixels:
    """The image that the fake draws: a function of seed and sample, like a model's."""
    return np.random.default_rng([seed, sample]).integers(0, 256, shape, np.uint8)


def tell(*messages: Message) -> list[Event]:
    """Messages as a worker publishes them; the last is final."""
    return [Event(pack(m), final=k == len(messages) - 1) for k, m in enumerate(messages)]


def at_once(job: Job) -> list[Event]:
    """A whole answer."""
    space = SPECS[job.model].image
    match task := unpack(job.payload):
        case Generate():
            drawn = [ImageDone(k, picture(task.seed, k, space.shape)) for k in range(task.n)]
            return tell(Started(0.25), Progress(1, task.steps, 0.5), *drawn, Completed(0.25, 1.5, task.n * task.steps))
        case ScoreImages():
            energy = job.model == "energy"
            scored = [
                Scored(
                    k, None if energy else log_prob(x), log_prob(x) if energy else None, statistics={"mean": x.mean()}
                )
                for k, x in enumerate(task.images)
            ]
            return tell(Started(0.25), *reversed(scored), Completed(0.25, 1.5, len(scored)))
        case MapImages():
            mapped = [Mapped(k, surprise(x)) for k, x in enumerate(task.images)]
            return tell(Started(0.25), *reversed(mapped), Completed(0.25, 1.5, len(mapped)))
    raise AssertionError(task)


def surprise(x: Pixels) -> np.ndarray:
    """The map that the fake tells: how far a pixel is from grey."""
    return np.abs(x.astype(np.float32) - 128).sum(axis=0)


def log_prob(x: Pixels) -> float:
    """The score that the fake gives."""
    return -float(x.sum()) / 10


class FakeBroker(Broker):
    """Notes what is asked of it, and answers by `answer`."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.cancelled: list[str] = []
        self.refusal: Exception | None = None
        self.places: list[int] = [0]  # positions told one after another; the last one stays
        self.states: Sequence[WorkerState] = [ready_worker()]
        self.lines: dict[Line, Waiting] = {}  # what waits
        self.answer: Answer = self._at_once
        self.changed = asyncio.Event()

    async def _at_once(self, job: Job) -> AsyncIterator[Event]:
        for event in at_once(job):
            yield event

    async def submit(self, job: Job) -> str:
        if self.refusal is not None:
            raise self.refusal
        self.jobs[job.id] = job
        self.changed.set()
        return job.id

    async def cancel(self, job_id: str) -> None:
        self.cancelled.append(job_id)

    async def events(self, job_id: str, after: int = 0, wait: bool = True) -> AsyncIterator[Event]:
        number = 0
        async for event in self.answer(self.jobs[job_id]):
            if (number := number + 1) > after:
                yield dataclasses.replace(event, number=number)

    async def status(self, job_id: str) -> Status:
        return Status(self.jobs[job_id], "running")

    async def position(self, job_id: str) -> int:
        return self.places.pop(0) if len(self.places) > 1 else self.places[0]

    async def queued_units(self) -> int:
        return sum(job.units for job in self.jobs.values())

    async def waiting(self) -> Mapping[Line, Waiting]:
        return self.lines

    async def pool(self) -> Sequence[WorkerState]:
        return self.states

    @property
    def job(self) -> Job:
        """The one job that was submitted."""
        (job,) = self.jobs.values()
        return job

    @property
    def task(self) -> Any:
        return unpack(self.job.payload)


async def silence(job: Job) -> AsyncIterator[Event]:
    """Nothing, ever."""
    await asyncio.Event().wait()
    yield Event(b"")


def after(*events: Event, then: Answer | None = None) -> Answer:
    """These events, and then what `then` gives, else silence."""

    async def answer(job: Job) -> AsyncIterator[Event]:
        for event in events:
            yield event
        async for event in (then or silence)(job):
            yield event

    return answer


def ready_worker(**models: ModelState) -> WorkerState:
    return WorkerState("w0", "cpu", True, models or {name: ModelState("ready") for name in SPECS})


def write_model(folder: Path, name: str, spec: Spec, /, **changes: Any) -> str:
    """A model.json as a checkpoint has it; changes replace its top-level entries. -> its sha256"""
    about = {
        "format": 1,
        "family": spec.family,
        "spec": spec.to_json(),
        "metrics": {"bits_per_dim": 2.5},
        "files": {"weights.safetensors": hashlib.sha256(name.encode()).hexdigest()},
        **changes,
    }
    content = json.dumps(about).encode()
    (folder / name).mkdir(exist_ok=True)
    scratch = folder / name / ".model.json.tmp"
    scratch.write_bytes(content)
    scratch.replace(folder / name / "model.json")
    return hashlib.sha256(content).hexdigest()


class Api:
    """An application over a fake broker and a folder of models."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.broker = folder, FakeBroker()
        for name, spec in SPECS.items():
            write_model(folder, name, spec)
        self.catalog = Catalog(folder)
        self.catalog.refresh()
        self.app = create_app(Settings(models=folder, **settings), self.broker, self.catalog)

    async def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
            return await client.request(method, path, **kwargs)

    async def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return await self.request("GET", path, **kwargs)

    async def post(self, path: str, json: Any = None, **kwargs: Any) -> httpx.Response:
        return await self.request("POST", path, json=json, **kwargs)


class Call:
    """One request, message by message."""

    def __init__(
        self, app: FastAPI, path: str, body: Any, headers: dict[str, str] | None = None, method: str = "POST"
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **(headers or {})}
        self._incoming: asyncio.Queue[Any] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": content, "more_body": False})
        self.sent: list[Any] = []
        self._news = asyncio.Event()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
            "client": ("test", 1),
            "server": ("api", 80),
            "state": {},
        }
        self.task = asyncio.ensure_future(app(scope, self._incoming.get, self._send))

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        self._news.set()

    def hang_up(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def text(self) -> str:
        return b"".join(m["body"] for m in self.sent[1:]).decode()

    async def until(self, text: str) -> None:
        """Wait until the answer so far holds a text."""
        while text not in self.text:
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), 30)


def problem_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The body of a problem, checked for its form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"]
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem.keys() - {"errors"} == {"type", "title", "status", "detail"}
    for error in problem.get("errors", []):
        assert error.keys() == {"loc", "msg", "input"}
    return problem


def events_of(text: str) -> list[tuple[str, Any]]:
    """A stream of events, parsed as strictly as it is written: (event, data) each; comments are ("", text)."""
    assert text.endswith("\n\n"), text
    found = []
    for block in text[:-2].split("\n\n"):
        if block.startswith(": "):
            found.append(("", block[2:]))
            continue
        name, *numbered, data = block.split("\n")
        assert name.startswith("event: "), block
        assert all(line.startswith("id: ") for line in numbered), block
        assert data.startswith("data: "), block
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def file_of(pixels: Pixels, format: str = "PNG", **options: Any) -> bytes:
    """Pixels (C, H, W) -> an image file, by Pillow and not by the project."""
    out = io.BytesIO()
    rows = pixels.transpose(1, 2, 0)
    Image.fromarray(rows[:, :, 0] if rows.shape[2] == 1 else rows).save(out, format, **options)
    return out.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def pixels_of(data: bytes) -> Pixels:
    """An image file -> (C, H, W)."""
    array = np.asarray(Image.open(io.BytesIO(data)))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
