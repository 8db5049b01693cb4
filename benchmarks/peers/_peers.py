"""Which peers there are: how each is installed, started, and what of it is tuned."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks._frame import ROOT
from benchmarks._servers import Server

HERE = Path(__file__).parent
VENVS = ROOT / ".venv-peers"
TORCH = "drawwell.pth"  # in an environment: where torch is
CORES = os.cpu_count() or 1
SIZES = (32, 8, 1)  # of a batch that are tried
ALWAYS = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "BENTOML_DO_NOT_TRACK": "True",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # as every other server's processes run
    "RAY_AUTH_MODE": "disabled",  # a cluster of one machine,
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # by the loopback alone: its name is of the systems where that is usual
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a machine that others keep busy starts slowly
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}


@dataclass(frozen=True)
class Peer:
    name: str
    command: Callable[[str, int], list[str]]  # of an environment's python, for a port
    settings: tuple[Mapping[str, str], ...]  # that are tried, the most promising first; environment variables
    title: str

    @property
    def python(self) -> Path:
        return VENVS / self.name / "bin" / "python"

    @property
    def installed(self) -> bool:
        """With all of it: where torch is, is written last."""
        return any(self.python.parents[1].glob(f"lib/python*/site-packages/{TORCH}"))

    def setup(self) -> None:
        """Make its environment. torch is the one that runs this: a peer's environment sees it behind its own packages,
        so that it is not installed again and so that all networks run on the same one."""
        folder = VENVS / self.name
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(HERE / self.name / "requirements.txt")], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        link = folder / "lib" / version / "site-packages" / TORCH
        link.write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")

    def server(self, models: Path, setting: Mapping[str, str]) -> Server:
        def command(port: int) -> list[str]:
            # The port is known only now, so `env` hands it on.
            return ["env", f"PEER_PORT={port}", *self.command(str(self.python), port)]

        environment = {**ALWAYS, "PEER_MODELS": str(models.resolve()), "PEER_WORKERS": str(CORES), **setting}
        return Server(self.name, command, environment)


def _module(name: str) -> Callable[[str, int], list[str]]:
    return lambda python, port: [python, "-m", f"benchmarks.peers.{name}.server"]


def _bentoml(python: str, port: int) -> list[str]:
    serve = [python, "-m", "bentoml", "serve", "benchmarks.peers.bentoml.server:Front"]
    return [*serve, "--host", "127.0.0.1", "--port", str(port)]


def _uvicorn(python: str, port: int) -> list[str]:
    # The number of processes is a setting: a shell reads it from the environment.
    line = 'exec "$0" -m uvicorn benchmarks.peers.diffusers_loop.server:app --port "$1" --workers "$PEER_WORKERS"'
    return ["sh", "-c", f"{line} --log-level warning", python, str(port)]


def _batches(**waits: str) -> tuple[Mapping[str, str], ...]:
    """Sizes of a batch, and what is joined to one; a batch of one is the same either way."""
    kinds = [(size, join) for join, size in product(("any", "steps"), SIZES) if size > 1 or join == "any"]
    return tuple({"PEER_BATCH": str(size), "PEER_JOIN": join, **waits} for size, join in kinds)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("litserve", _module("litserve"), _batches(PEER_WAIT="0.01"), "LitServe"),
        Peer("bentoml", _bentoml, _batches(PEER_LATENCY_MS="3600000"), "BentoML"),
        Peer("rayserve", _module("rayserve"), _batches(PEER_WAIT="0.01"), "Ray Serve"),
        Peer(
            "diffusers_loop",
            _uvicorn,
            ({}, {"PEER_WORKERS": "1", "PEER_THREADS": str(CORES), "OMP_NUM_THREADS": str(CORES)}),
            "FastAPI and a loop",
        ),
    )
}
