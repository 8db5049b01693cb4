"""The demo, against a server that answers by the contract without drawing anything."""

from __future__ import annotations

import base64
import io
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from rich.console import Console

from drawwell import Client
from drawwell.demo import show

ROOT = Path(__file__).parents[1]
SIZES = {"a": (28, 28, 1), "b": (28, 28, 1), "c": (32, 32, 3), "d": (28, 28, 1)}


def spec(name: str, **changes: Any) -> dict[str, Any]:
    width, height, channels = SIZES[name]
    about: dict[str, Any] = {
        "id": name,
        "family": "gan",
        "status": "ready",
        "image": {"width": width, "height": height, "channels": channels},
        "likelihood": {"kind": "exact", "dequantisation": "none"} if name in ("a", "d") else None,
        "conditioning": {"captions": True} if name == "c" else None,
    }
    return about | changes


def png(size: tuple[int, int, int], level: int) -> str:
    buffer = io.BytesIO()
    Image.new("L" if size[2] == 1 else "RGB", size[:2], (level,) * size[2]).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


class Server:
    def __init__(self, models: list[dict[str, Any]]) -> None:
        self.models = models
        self.bodies: dict[str, list[dict[str, Any]]] = {"/generate": [], "/score": []}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path in self.bodies:
            self.bodies[path].append(json.loads(request.content))
        return {
            "/readyz": lambda: httpx.Response(200, json={}),
            "/models": lambda: httpx.Response(200, json={"models": self.models}),
            "/generate": lambda: self.generate(self.bodies["/generate"][-1]),
            "/score": lambda: self.score(self.bodies["/score"][-1]),
        }[path]()

    def generate(self, body: dict[str, Any]) -> httpx.Response:
        width, height, channels = size = SIZES[body["model"]]
        about = {"id": "j", "model": body["model"], "family": "gan", "steps": 1, "seed": body["seed"]}
        about |= {"width": width, "height": height, "channels": channels}
        events: list[tuple[str, dict[str, Any]]] = [("progress", {"step": 1, "steps": 1, "eta_seconds": 0.0})]
        events += [("image", {"sample": k, "b64_json": png(size, k)}) for k in range(body["n"])]
        events += [("completed", about | {"usage": {"queue_seconds": 0, "compute_seconds": 0}})]
        return httpx.Response(
            200, text="".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
        )

    def score(self, body: dict[str, Any]) -> httpx.Response:
        anomaly = {"score": 9.0, "p_value": 0.001, "is_anomaly": True, "alpha": 0.01}
        warnings = [f"{body['model']} is not calibrated"]
        results = [{"log_prob": -1.0, "bits_per_dim": 0.5, "anomaly": anomaly} for _ in body["images"]]
        return httpx.Response(
            200, json={"model": body["model"], "kind": "exact", "results": results, "warnings": warnings}
        )


def run(models: list[dict[str, Any]], out: Path) -> tuple[int, str, Server]:
    server, console = Server(models), Console(file=io.StringIO(), width=200)
    with Client("http://well", transport=httpx.MockTransport(server)) as well:
        status = show(well, console, out, n=4, seed=7, wait=1)
    assert isinstance(console.file, io.StringIO)
    return status, console.file.getvalue(), server


def test_every_model_draws_a_sheet_and_every_density_scores_what_fits_it(tmp_path: Path) -> None:
    status, told, server = run([spec("a"), spec("b"), spec("c"), spec("d")], tmp_path)
    assert status == 0
    for name, (width, height, _) in SIZES.items():
        scale = 96 // max(width, height)
        with Image.open(tmp_path / f"{name}.png") as sheet:
            assert sheet.size == (2 * width * scale + 2, 2 * height * scale + 2)
    assert [body.get("prompt") is not None for body in server.bodies["/generate"]] == [False, False, True, False]
    scored = sorted(path.name for path in (tmp_path / "scored").iterdir())
    assert scored == [f"{name}-{shown}.png" for name in "ad" for shown in ("grey", "its-own", "noise", "upside-down")]
    assert [len(body["images"]) for body in server.bodies["/score"]] == [4, 4]
    assert "0.50 ✗" in told
    assert str(tmp_path) in told
    assert told.count("note") == 1
    assert "note, of a, d: … is not calibrated" in told


def test_a_broken_model_is_told_and_the_others_are_shown(tmp_path: Path) -> None:
    status, told, _ = run([spec("a"), {"id": "x", "status": "failed", "error": "weights: [missing]"}], tmp_path)
    assert status == 1
    assert "x could not be loaded: weights: [missing]" in told
    assert (tmp_path / "a.png").exists()


def test_a_server_without_models_is_told(tmp_path: Path) -> None:
    status, told, _ = run([], tmp_path)
    assert status == 1
    assert "no model that is ready" in told


def make_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/demo.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_make_demo_says_when_there_is_no_model(tmp_path: Path) -> None:
    done = make_demo("--models", str(tmp_path))
    assert done.returncode == 1
    assert "holds no model" in done.stderr


def test_make_demo_says_when_its_port_is_taken(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.json").write_text("{}")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = make_demo("--models", str(tmp_path), "--port", str(port))
    assert done.returncode == 1
    assert f"port {port} is taken" in done.stderr
