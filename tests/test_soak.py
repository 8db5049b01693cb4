"""A soak: a live server under all that clients, operators and misfortune do, for a while; then nothing may be left.

DRAWWELL_SOAK_SECONDS says for how long (15); an hour is 3600. A third of it is warm-up: what is held after that, in
file descriptors and memory, is all that may be held at the end, and of rows and jobs nothing may be.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from servers import DDPM, GAN, VAE, Server, write

SECONDS = float(os.environ.get("DRAWWELL_SOAK_SECONDS", "15"))
CLIENTS = 6
KEPT = 1.0  # seconds that the server keeps the answers of ended jobs
FEW = 16  # file descriptors more or less: connections that are just being closed
GROWTH = 0.15  # of memory, besides MIB: allocators keep what they once had
MIB = 48 * 2**20


@dataclass
class Soak:
    """What clients saw."""

    base: str
    seen: Counter[str] = field(default_factory=Counter)
    images: dict[str, list[str]] = field(default_factory=dict)  # request -> its images, which never change
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, seconds: float, seed: int, beside: Callable[[], None]) -> None:
        """Clients that act at random, and what goes on beside them."""
        ends = time.monotonic() + seconds
        threads = [threading.Thread(target=self._client, args=(seed + k, ends)) for k in range(CLIENTS)]
        for thread in threads:
            thread.start()
        while time.monotonic() < ends:
            beside()
            time.sleep(min(1.0, seconds / 5))
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), "a request was never answered"

    def _client(self, seed: int, ends: float) -> None:
        rng = random.Random(seed)
        actions = [
            self._draw,
            self._draw,
            self._stream,
            self._hang_up,
            self._hurry,
            self._score,
            self._job,
            self._nonsense,
        ]
        with httpx.Client(base_url=self.base, timeout=100) as client:
            while time.monotonic() < ends:
                action = rng.choice(actions)
                try:
                    what = action(client, rng)
                except Exception as e:
                    what = "raised"
                    self.wrong.append(f"{action.__name__}: {type(e).__name__}: {e}")
                with self.lock:
                    self.seen[f"{action.__name__[1:]} {what}"] += 1

    def _request(self, rng: random.Random) -> dict[str, Any]:
        model = rng.choice(["chain", "gan", "vae"])
        steps = {"steps": rng.choice([1, 5, 20, 60])} if model == "chain" else {}
        return {"model": model, "n": rng.randint(1, 4), "seed": rng.randrange(8), **steps}

    def _check(self, body: dict[str, Any], images: list[str]) -> None:
        """A request always has the same images, as many as were asked for."""
        if len(images) != body["n"]:
            self.wrong.append(f"{body}: {len(images)} images")
        with self.lock:
            known = self.images.setdefault(json.dumps(body), images)
        if known != images:
            self.wrong.append(f"{body}: other images than before")

    def _draw(self, client: httpx.Client, rng: random.Random) -> str:
        body = self._request(rng)
        answer = client.post("/generate", json=body)
        if answer.status_code == 200:
            self._check(body, [image["b64_json"] for image in answer.json()["images"]])
        elif answer.status_code not in (429, 503):
            self.wrong.append(f"{body}: {answer.status_code} {answer.text}")
        return str(answer.status_code)

    def _stream(self, client: httpx.Client, rng: random.Random) -> str:
        body = self._request(rng)
        with client.stream("POST", "/generate", json=body | {"stream": True}) as answer:
            text = answer.read().decode()
        ends = text.count("event: completed") + text.count("event: error")
        if answer.status_code == 200 and ends != 1:
            self.wrong.append(f"{body}: a stream that ended {ends} times")
        if "event: completed" in text:
            data = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
            drawn = sorted((d["sample"], d["b64_json"]) for d in data if "sample" in d)
            self._check(body, [image for _, image in drawn])
        return str(answer.status_code)

    def _hang_up(self, client: httpx.Client, rng: random.Random) -> str:
        body = {"model": "chain", "n": rng.randint(1, 8), "steps": 1000, "stream": rng.random() < 0.5}
        try:
            httpx.post(f"{self.base}/generate", json=body, timeout=rng.uniform(0.01, 0.5))
        except httpx.TimeoutException:
            return "gone"
        return "answered"

    def _hurry(self, client: httpx.Client, rng: random.Random) -> str:
        body = {"model": "chain", "n": 8, "steps": 500, "timeout": rng.uniform(0.05, 0.3)}
        answer = client.post("/generate", json=body)
        if answer.status_code not in (200, 429, 503, 504):
            self.wrong.append(f"{body}: {answer.status_code} {answer.text}")
        return str(answer.status_code)

    def _score(self, client: httpx.Client, rng: random.Random) -> str:
        drawn = client.post("/generate", json={"model": "gan", "n": 2, "seed": rng.randrange(4)})
        if drawn.status_code != 200:
            return "no images"
        images = [image["b64_json"] for image in drawn.json()["images"]]
        answer = client.post("/score", json={"model": rng.choice(["chain", "vae"]), "images": images})
        if answer.status_code == 200 and len(answer.json()["results"]) != 2:
            self.wrong.append(f"{len(answer.json()['results'])} scores of 2 images")
        return str(answer.status_code)

    def _job(self, client: httpx.Client, rng: random.Random) -> str:
        body = {"model": "chain", "n": 2, "steps": rng.choice([5, 300])}
        accepted = client.post("/generate", json=body, headers={"Prefer": "respond-async"})
        if accepted.status_code != 202:
            return str(accepted.status_code)
        place = accepted.headers["location"]
        if rng.random() < 0.5:
            client.delete(place)
        ends = time.monotonic() + 60
        while (status := client.get(place).json().get("status", "forgotten")) in ("queued", "running"):
            if time.monotonic() > ends:
                self.wrong.append(f"{place}: {status} after a minute")
                break
            time.sleep(0.05)
        return str(status)

    def _nonsense(self, client: httpx.Client, rng: random.Random) -> str:
        wrong: list[Any] = [{"model": "none"}, {"model": "gan", "n": 0}, {"model": "chain", "solver": "x"}, [1], "{"]
        answer = client.post("/generate", json=rng.choice(wrong))
        if answer.status_code not in (404, 422):
            self.wrong.append(f"nonsense: {answer.status_code}")
        return str(answer.status_code)


def metric(server: Server, name: str) -> float:
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    return sum(s.value for family in families for s in family.samples if s.name == name)


def settle(server: Server) -> None:
    """Wait until nothing runs or waits, and answers are forgotten."""
    ends = time.monotonic() + 90
    while any(metric(server, f"drawwell_{name}") for name in ("running_rows", "waiting_rows", "queued_units")):
        assert time.monotonic() < ends, "rows or jobs are left that nobody waits for"
        time.sleep(0.2)
    time.sleep(2 * KEPT)


def held(server: Server) -> dict[str, tuple[int, int]]:
    """Process -> its file descriptors and its memory in bytes: the API's, and of the worker that is never killed."""
    processes = {"api": server.process, "worker-1": worker(server, "worker-1")}
    return {name: (p.num_fds(), p.memory_info().rss) for name, p in processes.items()}


def worker(server: Server, name: str) -> psutil.Process:
    return next(p for p in server.workers() if name in p.cmdline())


@pytest.mark.slow
@pytest.mark.xdist_group("servers")
@pytest.mark.timeout(SECONDS + 280)
def test_nothing_is_left_after_everything_that_can_happen(tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    for name, config in {"chain": DDPM, "gan": GAN, "vae": VAE, "changing": GAN}.items():
        write(zoo, name, {"chain": "ddpm", "vae": "vae"}.get(name, "gan"), config)
    environment = {"DRAWWELL_KEEP_SECONDS": str(KEPT), "DRAWWELL_LOG_LEVEL": "WARNING"}
    server = Server(zoo, tmp_path / "log", environment=environment)
    server.wait_for("/readyz")
    soak = Soak(str(server.client.base_url))
    rng, rounds = random.Random(0), Counter[str]()

    def beside() -> None:
        """A model changes; now and then a worker dies."""
        rounds["changes"] += 1
        write(zoo, "changing", "gan", GAN, seed=rounds["changes"])
        server.client.post("/generate", json={"model": "changing", "seed": 1})
        if rng.random() < 0.3:
            rounds["kills"] += 1
            for process in [p for p in server.workers() if "worker-0" in p.cmdline()]:
                process.kill()

    soak.run(SECONDS / 3, seed=0, beside=beside)
    settle(server)
    before = held(server)
    soak.run(2 * SECONDS / 3, seed=1000, beside=beside)
    settle(server)
    after = held(server)
    told = f"{dict(soak.seen)}\n{dict(rounds)}\n{before}\n{after}"
    assert not soak.wrong, soak.wrong[:5]
    for name in before:
        assert abs(after[name][0] - before[name][0]) <= FEW, f"file descriptors: {told}"
        assert after[name][1] <= before[name][1] * (1 + GROWTH) + MIB, f"memory: {told}"
    assert sum(count for what, count in soak.seen.items() if what in ("draw 200", "stream 200")) > 0, told
    status = server.client.get("/models/changing").json()
    assert status["status"] == "ready", status
    for body, images in random.Random(5).sample(sorted(soak.images.items()), k=min(5, len(soak.images))):
        again = server.client.post("/generate", json=json.loads(body)).json()
        assert [image["b64_json"] for image in again["images"]] == images, "it serves as before"
    print(told)
    server.close()
