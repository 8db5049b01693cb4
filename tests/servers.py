"""Server processes for tests, and checkpoints small enough to be made by them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

import models
from models import _checkpoint
from models._protocol import ImageSpace

SPACE = ImageSpace(width=8, height=8, channels=1, labels=("a", "b", "c"))
DDPM = {"channels": 8, "multipliers": (1, 2), "bound_steps": 5}
GAN = {"latent": 4, "embedding": 4, "generator_channels": (8, 8), "critic_channels": (8, 8), "blocks": (0, 1)}
VAE = {"latent": 4, "width": 8, "blocks": 1, "hidden": 16, "components": 2, "importance_samples": 4}


def write(folder: Path, name: str, family: str, config: dict[str, Any], seed: int = 0) -> None:
    module = models.family(family)
    made = module.Config(**config)
    torch.manual_seed(seed)
    model = module.Model(made, SPACE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    _checkpoint.save(folder / name, model, made, {"metrics": {}})


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run(log: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """python -m service …, writing to `log`."""
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "service", *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[1],
            env={**os.environ, **(environment or {})},
        )


class Server:
    """A server process on a free port: with workers of its own, or (`api`) without."""

    def __init__(
        self,
        folder: Path,
        log: Path,
        devices: str = "cpu,cpu",
        command: str = "serve",
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        self.port = port or free_port()
        self.log = log
        self.began = time.monotonic()
        arguments = [command, "--models", str(folder), "--port", str(self.port)]
        if command == "serve":
            arguments += ["--devices", devices]
        self.child = run(log, *arguments, environment=environment)
        self.process = psutil.Process(self.child.pid)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)

    def wait_for(self, path: str, seconds: float = 60) -> float:
        """Seconds from the start until this path answers 200."""
        while time.monotonic() - self.began < seconds:
            try:
                if self.client.get(path).status_code == 200:
                    return time.monotonic() - self.began
            except httpx.TransportError:
                pass
            assert self.child.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"{path} never answered 200:\n{self.log.read_text()}")

    def workers(self) -> list[psutil.Process]:
        return [p for p in self.process.children() if "service.worker" in " ".join(p.cmdline())]

    def status(self, model: str, wanted: str, seconds: float = 30) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while True:
            answer = self.client.get(f"/models/{model}")
            about: dict[str, Any] = answer.json()
            if about.get("status") == wanted or time.monotonic() > deadline:
                assert about.get("status") == wanted, about
                return about
            time.sleep(0.1)

    def close(self) -> None:
        self.client.close()
        self.child.send_signal(signal.SIGTERM)
        assert self.child.wait(20) == 0, self.log.read_text()
