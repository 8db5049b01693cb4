"""Servers to measure: how each is started, and that it answers. All speak one contract:

POST /generate {"model", "n", "steps", "seed"}, Accept: image/png  ->  200 and a PNG, or an error's status
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks._frame import ROOT
from benchmarks._load import Job, Outcome, Phase, processor_seconds, run
from service.settings import Settings
from service.supervisor import device_list

START = 600.0  # seconds that a server may take until it answers
STARTING = 10.0  # seconds, about, that it takes to start and to end, on a quiet machine
CLIENTS, WARM = 8, 1.0  # that warm it up, for so many seconds
POLL = 0.5  # seconds between questions whether it does
REST = 0.2  # of a core: a server that uses less has come to rest
GRACE = 30.0  # seconds that it may take to end
LINES = 30  # of its log that are told when it fails


@dataclass(frozen=True)
class Server:
    """A command line that serves on a port."""

    name: str
    command: Callable[[int], list[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: Callable[[str], bool] = lambda url: True  # whether all of it works, once it answers at this address
    restless: float = 15.0  # seconds after which it is measured though it does not come to rest

    def with_environment(self, **more: str) -> Server:
        return replace(self, environment={**self.environment, **more})


@dataclass(frozen=True)
class Running:
    server: Server
    url: str
    pid: int

    def phase(self, phase: Phase) -> Outcome:
        """What a load does to it."""
        return run(self.url, phase, self.pid)

    def metric(self, name: str, **labels: str) -> float:
        return metric(self.url, name, **labels)


def drawwell(
    models: Path, devices: str = "auto", name: str = "drawwell", environment: Mapping[str, str] | None = None
) -> Server:
    """This project's server, with workers of its own. Nothing of a benchmark may be refused for want of room."""
    workers = len(device_list(devices))

    def command(port: int) -> list[str]:
        serve = [sys.executable, "-m", "service", "serve", "--models", str(models.resolve()), "--port", str(port)]
        return [*serve, "--devices", devices]

    room = {"DRAWWELL_QUEUE_UNITS": "100000000", "DRAWWELL_REQUEST_TIMEOUT": "3600", "DRAWWELL_LOG_LEVEL": "WARNING"}

    def ready(url: str) -> bool:
        return metric(url, "drawwell_workers", state="ready") == workers

    # It compiles in the background for minutes.
    return Server(name, command, {**room, **(environment or {})}, ready, restless=START)


def metric(url: str, name: str, **labels: str) -> float:
    """The sum over all labels that are left open, in a server's Prometheus metrics; 0 where there is none."""
    text = httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text
    samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def variants(parser: argparse.ArgumentParser) -> None:
    """Our server may be measured more than once, with other settings each time."""
    parser.add_argument(
        "--variant", dest="variants", action="append", nargs="+", metavar=("NAME", "SETTING=VALUE"),
        help="our server with these DRAWWELL_ settings and under this name; may be repeated (default: as it is, with "
        "all its fast ways to run networks, and with these in bfloat16)",
    )  # fmt: skip


def of_variants(args: argparse.Namespace, models: Sequence[str], one: bool = False) -> dict[str, dict[str, str]]:
    """{name: settings}; of those that nobody asked for, the first alone where `one` is enough. Raises `SystemExit` for
    a setting that is none."""
    if not args.variants and one:
        return {"drawwell": {}}
    if not args.variants:
        fast = {"DRAWWELL_MODES": "eager,channels-last,onnx,compile"}
        low = {"DRAWWELL_PRECISION": ",".join(f"{model}=bfloat16" for model in models)}
        known = {"drawwell": {}, "drawwell-fast": fast, "drawwell-bfloat16": {**fast, **low}}
        return known if "modes" in Settings.model_fields else {"drawwell": {}}
    found = {}
    for name, *settings in args.variants:
        pairs = [setting.partition("=") for setting in settings]
        if wrong := [key for key, _, _ in pairs if key.removeprefix("DRAWWELL_").lower() not in Settings.model_fields]:
            raise SystemExit(f"--variant {name}: {', '.join(wrong)}: no setting of the server")
        found[name] = {key: value for key, _, value in pairs}
    return found


@contextmanager
def subset(models: Path, *names: str) -> Iterator[Path]:
    """A folder with these models alone. Raises `SystemExit` for one that is not there."""
    with tempfile.TemporaryDirectory(prefix="drawwell-models-") as folder:
        for name in names:
            source = (models / name).resolve()
            if not (source / "model.json").exists():
                raise SystemExit(f"{models / name}: no model there (a folder with a model.json)")
            (Path(folder) / name).symlink_to(source)
        yield Path(folder)


@contextmanager
def running(server: Server, *jobs: Job) -> Iterator[Running]:
    """The server in processes of its own, which end with it. It runs once it has answered each of the jobs; one that
    does not is ended with a `RuntimeError` that says what its log does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            server.command(port), cwd=ROOT, env={**os.environ, **server.environment},
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        try:
            for job in jobs:
                if (problem := _first_answer(url, job, child)) is not None:
                    log.seek(0)
                    last = log.read().decode(errors="replace").splitlines()[-LINES:]
                    raise RuntimeError(f"{server.name}: {problem}; its log ends:\n" + "\n".join(last))
            # Asked by several at once, so that every process of it has loaded what it needs.
            run(url, Phase(jobs, WARM, clients=CLIENTS))
            _wait_until_ready(server, url, child.pid)
            yield Running(server, url, child.pid)
        finally:
            _end(child)


def _first_answer(url: str, job: Job, child: subprocess.Popen[bytes]) -> str | None:
    """Ask until the answer is there; what is wrong where it does not come."""
    began, problem = time.monotonic(), "no answer"
    with httpx.Client(base_url=url, headers={"Accept": job.accept}, timeout=START) as client:
        while time.monotonic() - began < START:
            if child.poll() is not None:
                return f"it ended with status {child.returncode}"
            try:
                answer = client.post(job.path, json=job.body)
            except httpx.TransportError as e:
                problem = repr(e)
            else:
                if answer.status_code == 200:
                    return None
                problem = f"{job.name}: {answer.status_code} {answer.text[:500]}"
            time.sleep(POLL)
    return problem


def _wait_until_ready(server: Server, url: str, pid: int) -> None:
    """All of it, and until nothing goes on in the background (code may be compiled there while requests are answered
    without), or for as long as that is waited for."""
    began = time.monotonic()
    while not server.ready(url):
        if time.monotonic() - began > START:
            raise RuntimeError(f"{server.name}: it answers, but not all of it was ready within {START:.0f} s")
        time.sleep(POLL)
    began = time.monotonic()
    while time.monotonic() - began < server.restless:
        before = processor_seconds(pid)
        time.sleep(1.0)
        if processor_seconds(pid) - before < REST:
            return


def _end(child: subprocess.Popen[bytes]) -> None:
    """Of the child and of all that it has started, in whatever sessions: what is killed cannot end its own workers."""
    below = psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
    child.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)
    with suppress(ProcessLookupError):  # none of its own session is left
        os.killpg(child.pid, signal.SIGKILL)
    for process in below:
        with suppress(psutil.NoSuchProcess):  # nor this one
            process.kill()
    child.wait()
