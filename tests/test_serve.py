"""The real thing: `python -m service serve` with its worker processes, over HTTP on this machine."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from servers import DDPM, GAN, VAE, Server, write

from models import _checkpoint
from service.engine import Engine
from service.loader import weigh

pytestmark = pytest.mark.xdist_group("servers")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    write(folder, "chain", "ddpm", DDPM)
    write(folder, "gan", "gan", GAN)
    write(folder, "vae", "vae", VAE)
    return folder


@pytest.fixture(scope="module")
def server(zoo: Path) -> Iterator[Server]:
    server = Server(zoo, zoo.parent / "serve.log")
    server.wait_for("/readyz")
    yield server
    server.close()
    assert "Traceback" not in server.log.read_text()


def images(answer: httpx.Response) -> list[bytes]:
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(image["b64_json"]) for image in answer.json()["images"]]


def test_draws_images_that_are_a_function_of_the_request(server: Server) -> None:
    body = {"model": "chain", "n": 3, "seed": 2**64 - 1, "steps": 6, "label": "b"}
    first, again = server.client.post("/generate", json=body), server.client.post("/generate", json=body)
    assert images(first) == images(again)
    assert images(server.client.post("/generate", json=body | {"n": 1})) == images(first)[:1]
    assert len(set(images(first))) == 3
    assert Image.open(io.BytesIO(images(first)[0])).size == (8, 8)
    other = server.client.post("/generate", json=body | {"label": 0})
    assert images(other) != images(first)


def test_the_same_alone_and_amid_others_with_other_everything(server: Server) -> None:
    """A crowd of 63 over both workers, of three models, other steps, solvers, labels and seeds, some of whom hang up
    midway.
    """
    body = {"model": "chain", "n": 2, "seed": 11, "steps": 40, "solver": "ancestral", "label": 1, "guidance_scale": 2.0}
    alone = images(server.client.post("/generate", json=body))
    crowd: list[dict[str, Any]] = [
        {
            "model": "chain",
            "seed": k,
            "steps": 1 + 7 * k % 60,
            "solver": ["ddim", "ancestral", "dpm-solver++"][k % 3],
            "label": k % 3,
        }
        for k in range(40)
    ]
    crowd += [{"model": name, "seed": k, "n": 1 + k % 4} for name in ("gan", "vae") for k in range(11)]
    with ThreadPoolExecutor(64) as pool:
        others = [pool.submit(server.client.post, "/generate", json=c) for c in crowd]
        hung_up = pool.submit(hang_up, server, {"model": "chain", "steps": 1000, "n": 8})
        mine = pool.submit(server.client.post, "/generate", json=body)
        assert images(mine.result()) == alone
        assert all(other.result().status_code == 200 for other in others)
        hung_up.result()


def hang_up(server: Server, body: dict[str, Any]) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.client.base_url}/generate", json=body, timeout=0.3)


def test_hanging_up_frees_the_rows_at_once(server: Server) -> None:
    """Counted in steps: those that its rows take part in, from when the client is gone, are few of those left."""
    body = {"model": "chain", "n": 8, "steps": 1000, "stream": True}
    rows = idle(server)
    with server.client.stream("POST", "/generate", json=body) as answer:
        seen = next(json.loads(line[6:])["step"] for line in answer.iter_lines() if '"step"' in line)
    taken = (idle(server) - rows) / 8
    assert seen < 500, "it was far from its end"
    assert taken - seen <= 250, f"{taken} steps of 1000, though the client was gone after {seen}"


def idle(server: Server) -> float:
    """Wait until no row runs. Returns the rows of all steps so far: workers tell it the moment that they are idle."""
    deadline = time.monotonic() + 20
    while total(server, "drawwell_running_rows"):
        assert time.monotonic() < deadline, "rows are still there"
        time.sleep(0.02)
    return total(server, "drawwell_step_rows_total")


def total(server: Server, name: str) -> float:
    """Over all workers, of the model "chain"."""
    text = server.client.get("/metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and sample.labels["model"] == "chain"
    )


def test_scores(server: Server) -> None:
    drawn = server.client.post("/generate", json={"model": "gan", "n": 4, "seed": 1}).json()
    encoded = [image["b64_json"] for image in drawn["images"]]
    for model in ("vae", "chain"):
        together = server.client.post("/score", json={"model": model, "images": encoded}).json()
        alone = server.client.post("/score", json={"model": model, "images": encoded[2:3]}).json()
        assert together["kind"] == "bound"
        assert together["results"][2] == alone["results"][0]
        for result in together["results"]:
            assert result["bits_per_dim"] == pytest.approx(-result["log_prob"] / (64 * 0.6931471805599453))
    refused = server.client.post("/score", json={"model": "gan", "images": encoded})
    assert refused.status_code == 422


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_api_process_has_no_torch_and_workers_do(server: Server) -> None:
    def has_torch(process: psutil.Process) -> bool:
        return any("libtorch" in m.path for m in process.memory_maps())

    assert not has_torch(server.process)
    assert all(has_torch(w) for w in server.workers())


def test_a_worker_killed_midway_changes_no_answer(server: Server) -> None:
    body = {"model": "chain", "n": 4, "seed": 5, "steps": 300}
    quiet = images(server.client.post("/generate", json=body))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.client.post, "/generate", json=body)
        time.sleep(0.2)
        assert not answer.done()
        for worker in server.workers():
            worker.kill()
        assert images(answer.result(timeout=120)) == quiet
    assert server.client.get("/healthz").status_code == 200
    server.wait_for("/readyz", time.monotonic() - server.began + 60)


def test_a_stream_survives_the_worker_and_repeats_nothing(server: Server) -> None:
    body = {"model": "chain", "n": 2, "seed": 6, "steps": 300, "stream": True, "preview_every": 50}
    steps, samples, last = [], [], ""
    killed = threading.Event()
    with server.client.stream("POST", "/generate", json=body) as answer:
        event = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                event = line[7:]
            elif line.startswith("data: "):
                data = json.loads(line[6:])
                last = event
                if event == "progress":
                    steps.append(data["step"])
                    if not killed.is_set():
                        killed.set()
                        for worker in server.workers():
                            worker.kill()
                if event == "image":
                    samples.append(data["sample"])
    assert last == "completed"
    assert steps == sorted(set(steps))
    assert sorted(samples) == [0, 1]
    server.wait_for("/readyz", time.monotonic() - server.began + 60)


def test_models_come_change_break_and_go_without_a_restart(server: Server, zoo: Path) -> None:
    write(zoo, "late", "gan", GAN, seed=1)
    first = server.status("late", "ready")
    body = {"model": "late", "seed": 3}
    before = server.client.post("/generate", json=body)

    write(zoo, "late", "gan", GAN, seed=2)
    deadline = time.monotonic() + 30
    while server.client.get("/models/late").json()["sha256"] == first["sha256"] and time.monotonic() < deadline:
        time.sleep(0.1)
    # While workers change over, two versions are in service; soon there is one.
    while any(images(server.client.post("/generate", json=body)) == images(before) for _ in range(4)):
        assert time.monotonic() < deadline, "the old version stayed in service"
        time.sleep(0.1)
    changed = server.client.post("/generate", json=body)

    weights = zoo / "late" / _checkpoint.WEIGHTS
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    os.utime(zoo / "late" / _checkpoint.ABOUT)
    time.sleep(2.5)
    assert images(server.client.post("/generate", json=body)) == images(changed)

    for file in (zoo / "late").iterdir():
        file.unlink()
    (zoo / "late").rmdir()
    deadline = time.monotonic() + 30
    while server.client.get("/models/late").status_code != 404 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.client.post("/generate", json=body).status_code == 404


def test_a_checkpoint_with_one_flipped_byte_fails_alone(server: Server, zoo: Path) -> None:
    staged = zoo.parent / "staged"
    write(staged, "bad", "vae", VAE)
    weights = staged / "bad" / _checkpoint.WEIGHTS
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    (staged / "bad").rename(zoo / "bad")
    about = server.status("bad", "failed")
    assert "weights.safetensors" in about["error"]
    assert "sha256" in about["error"]
    refused = server.client.post("/generate", json={"model": "bad"})
    assert refused.status_code == 503
    assert "weights.safetensors" in refused.json()["detail"]
    assert server.client.post("/generate", json={"model": "gan"}).status_code == 200


@pytest.mark.slow
def test_an_operator_chooses_modes_and_precisions_and_clients_are_told(
    zoo: Path, server: Server, tmp_path: Path
) -> None:
    environment = {
        "DRAWWELL_MODES": "eager,channels-last,onnx",
        "DRAWWELL_PRECISION": "chain=bfloat16",
        "DRAWWELL_DETERMINISM": "pixels",
    }
    other = Server(zoo, tmp_path / "log", devices="cpu", environment=environment)
    other.wait_for("/readyz")
    told = other.client.get("/models/chain").json()["execution"]
    assert (told["precision"], told["determinism"]) == ("bfloat16", "pixels")
    assert "float32 alone" in told["not_chosen"]["onnx"]
    body = {"model": "chain", "n": 2, "seed": 3, "steps": 5}
    low, plain = (s.client.post("/generate", json=body).json() for s in (other, server))
    assert (low["precision"], plain["precision"]) == ("bfloat16", "float32")
    encoded = [image["b64_json"] for image in plain["images"]]
    scores = [s.client.post("/score", json={"model": "chain", "images": encoded}).json() for s in (other, server)]
    assert scores[0]["results"] == scores[1]["results"]
    assert other.client.get("/models/gan").json()["execution"]["precision"] == "float32"
    assert server.client.get("/models/gan").json()["execution"]["mode"] == "eager"
    other.close()


def test_healthz_answers_within_a_second_and_nothing_is_left_behind(zoo: Path, tmp_path: Path) -> None:
    server = Server(zoo, tmp_path / "log", devices="cpu")
    assert server.wait_for("/healthz") < (1.0 if os.environ.get("DRAWWELL_STRICT_TIMES") else 5.0)
    assert server.client.get("/readyz").status_code == 503
    server.wait_for("/readyz")
    children = server.process.children(recursive=True)
    assert children
    server.close()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def test_workers_end_when_the_api_is_killed(zoo: Path, tmp_path: Path) -> None:
    server = Server(zoo, tmp_path / "log", devices="cpu")
    server.wait_for("/readyz")
    children = server.process.children(recursive=True)
    server.child.kill()
    server.child.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    server.client.close()


def test_a_taken_port_and_a_missing_folder_end_with_a_message(server: Server, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    base = [sys.executable, "-m", "service", "serve"]
    taken = subprocess.run(
        [*base, "--port", str(server.port), "--models", str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert taken.returncode != 0
    assert "address already in use" in taken.stderr
    missing = subprocess.run(
        [*base, "--models", str(tmp_path / "none")], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert missing.returncode == 2
    assert "is not a folder" in missing.stderr
    devices = subprocess.run([*base, "--devices", "tpu"], cwd=root, capture_output=True, text=True, timeout=60)
    assert devices.returncode == 2
    assert "'tpu'" in devices.stderr


def test_models_beyond_the_memory_budget_are_loaded_when_they_are_asked_for(server: Server, tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"  # of its own, with the same weights: other tests break some of theirs
    for name, family, config in (("chain", "ddpm", DDPM), ("gan", "gan", GAN), ("vae", "vae", VAE)):
        write(zoo, name, family, config)
    engine, loaded = Engine(lambda *_: None), {path.name: _checkpoint.load(path) for path in zoo.iterdir()}
    heaviest = max(weigh(engine.warm(name, model).model) for name, model in loaded.items())
    environment = {"DRAWWELL_MODEL_MEMORY": str(heaviest)}
    tight = Server(zoo, tmp_path / "tight.log", devices="cpu", environment=environment)
    try:
        tight.wait_for("/readyz")
        for k in range(2):
            for model in ("chain", "gan", "vae"):
                body = {"model": model, "n": 2, "seed": k, **({"steps": 5} if model == "chain" else {})}
                assert images(tight.client.post("/generate", json=body)) == images(
                    server.client.post("/generate", json=body)
                )
        models = tight.client.get("/models").json()["models"]
        assert {model["status"] for model in models} == {"ready"}
        assert 1 <= sum(model["resident"] for model in models) < 3
        plenty = server.client.get("/models").json()["models"]
        assert all(model["resident"] for model in plenty if model["id"] in loaded)
        told = tight.client.get("/metrics").text
        lines = [line for line in told.splitlines() if line.startswith("drawwell_model_loads_total")]
        assert sum(float(line.split()[-1]) for line in lines) > 5
    finally:
        tight.close()
