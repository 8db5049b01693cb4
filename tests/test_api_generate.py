"""POST /generate: what it answers, and what it asks of workers."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from api_fakes import LABELS, Api, b64, file_of, picture, pixels_of

from service.images import grid
from service.messages import Generate

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def api(tmp_path: Path) -> Api:
    return Api(tmp_path)


async def test_the_answer_is_exactly_that_of_the_contract(api: Api) -> None:
    response = await api.post("/generate", {"model": "diffusion", "n": 2, "seed": 7, "steps": 50, "solver": "ddpm"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert answer == {
        "id": api.broker.job.id,
        "model": "diffusion",
        "family": "ddpm",
        "steps": 50,
        "seed": 7,
        "images": [
            {"b64_json": answer["images"][k]["b64_json"], "seed": 7, "sample": k}  # the pixels are compared below
            for k in range(2)
        ],
        "width": 5,
        "height": 4,
        "channels": 1,
        "usage": {"queue_seconds": 0.25, "compute_seconds": 1.5, "network_evaluations": 100},
        "model_sha256": api.catalog.entry("diffusion", []).version.weights_sha256,
        "precision": "float32",
    }
    for k, image in enumerate(answer["images"]):
        assert (pixels_of(base64.b64decode(image["b64_json"])) == picture(7, k, (1, 4, 5))).all()


async def test_what_is_not_given_is_filled_in_from_the_model(api: Api) -> None:
    assert (await api.post("/generate", {"model": "diffusion", "seed": 1})).status_code == 200
    assert api.broker.task == Generate(n=1, seed=1, steps=20, solver="ddim", guidance_scale=1.0)


async def test_null_counts_as_not_given(api: Api) -> None:
    body = {"model": "gan", "seed": 1, "label": None, "steps": None, "solver": None, "prompt": None, "timeout": None}
    assert (await api.post("/generate", body)).status_code == 200
    assert api.broker.task == Generate(n=1, seed=1, steps=1)


@pytest.mark.parametrize("label", range(3))
async def test_a_label_by_name_is_the_label_by_index(tmp_path: Path, label: int) -> None:
    api = Api(tmp_path)
    for given in (label, LABELS[label]):
        await api.post("/generate", {"model": "diffusion", "seed": 1, "label": given})
    by_index, by_name = (job.payload for job in api.broker.jobs.values())
    assert by_index == by_name


@pytest.mark.parametrize(
    ("body", "rows", "units"),
    [
        ({"model": "diffusion", "n": 3, "steps": 10}, 3, 30),
        ({"model": "diffusion", "n": 3, "steps": 10, "guidance_scale": 1.0}, 3, 30),
        ({"model": "diffusion", "n": 3, "steps": 10, "guidance_scale": 1.0, "label": 1}, 3, 30),
        ({"model": "diffusion", "n": 3, "steps": 10, "guidance_scale": 1.5, "label": 1}, 3, 60),  # with it and without
        ({"model": "diffusion", "n": 3, "steps": 10, "guidance_scale": 1.5}, 3, 30),  # nothing to guide by
        ({"model": "energy", "n": 2, "steps": 10}, 2, 40),  # two evaluations a step
        ({"model": "gan", "n": 64}, 64, 64),
    ],
)
async def test_work_is_counted_in_rows_steps_and_evaluations(api: Api, body: dict, rows: int, units: int) -> None:
    assert (await api.post("/generate", body)).status_code == 200
    assert (api.broker.job.rows, api.broker.job.units) == (rows, units)


async def test_priority_and_timeout_reach_the_broker(api: Api) -> None:
    await api.post("/generate", {"model": "gan", "priority": "batch", "timeout": 12.5})
    assert (api.broker.job.priority, api.broker.job.timeout) == ("batch", 12.5)


async def test_without_a_timeout_the_servers_own_holds(tmp_path: Path) -> None:
    api = Api(tmp_path, request_timeout=42)
    await api.post("/generate", {"model": "gan"})
    assert api.broker.job.timeout == 42


async def test_a_picked_seed_is_told_fresh_and_safe_for_javascript(api: Api) -> None:
    seeds = {(await api.post("/generate", {"model": "gan"})).json()["seed"] for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**53 for seed in seeds)


@pytest.mark.parametrize("seed", [0, 2**53, 2**64 - 1])
async def test_every_unsigned_seed_of_64_bits_passes_through_unchanged(api: Api, seed: int) -> None:
    answer = (await api.post("/generate", {"model": "gan", "seed": seed})).json()
    assert (answer["seed"], answer["images"][0]["seed"], api.broker.task.seed) == (seed, seed, seed)


async def test_previews_are_asked_for_only_by_streams(api: Api) -> None:
    await api.post("/generate", {"model": "diffusion", "preview_every": 5})
    assert api.broker.task.preview_every is None


@pytest.mark.parametrize("format", ["png", "webp", "npy", "jpeg"])
async def test_images_come_in_the_format_asked_for(api: Api, format: str) -> None:
    answer = (await api.post("/generate", {"model": "density", "seed": 3, "format": format})).json()
    data = base64.b64decode(answer["images"][0]["b64_json"])
    expected = picture(3, 0, (3, 4, 5))
    if format == "npy":
        assert (np.load(io.BytesIO(data)) == expected.transpose(1, 2, 0)).all()
    elif format == "jpeg":
        assert data == file_of(expected, "JPEG", quality=95, subsampling=0)
    else:
        assert (pixels_of(data) == expected).all()


async def test_accept_png_answers_with_one_png_and_tells_the_seed(api: Api) -> None:
    response = await api.post("/generate", {"model": "gan"}, headers={"Accept": "image/png"})
    assert response.headers["content-type"] == "image/png"
    seed = int(response.headers["drawwell-seed"])
    assert (pixels_of(response.content) == picture(seed, 0, (1, 4, 5))).all()


async def test_accept_png_of_several_images_is_their_grid(api: Api) -> None:
    response = await api.post("/generate", {"model": "density", "n": 5, "seed": 9}, headers={"Accept": "image/png"})
    expected = grid([picture(9, k, (3, 4, 5)) for k in range(5)])
    assert (pixels_of(response.content) == expected).all()


async def test_accept_png_refuses_another_format(api: Api) -> None:
    body = {"model": "gan", "format": "webp"}
    response = await api.post("/generate", body, headers={"Accept": "image/png"})
    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == ["body", "format"]


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        ("application/*", "application/json"),
        ("image/png, */*", "image/png"),
        ("image/*", "image/png"),
        ("image/webp, image/png;q=0.5, application/json;q=0.4", "image/png"),
        ("image/png;q=0.2, application/json", "application/json"),
        ("image/png;q=0, */*", "application/json"),
        ("application/json, text/event-stream", "application/json"),
        ("text/event-stream", "text/event-stream"),
    ],
)
async def test_accept_chooses_the_answer(api: Api, accept: str | None, expected: str) -> None:
    headers = {} if accept is None else {"Accept": accept}
    response = await api.post("/generate", {"model": "gan"}, headers=headers)
    assert response.status_code == 200
    assert response.headers["content-type"].partition(";")[0] == expected


@pytest.mark.parametrize("accept", ["text/html", "image/webp", "*/*;q=0", "application/json;q=nonsense"])
async def test_accept_of_nothing_on_offer_is_refused_before_any_work(api: Api, accept: str) -> None:
    response = await api.post("/generate", {"model": "gan"}, headers={"Accept": accept})
    assert response.status_code == 406
    assert "image/png" in response.json()["detail"]
    assert not api.broker.jobs


async def test_a_finished_job_is_not_cancelled(api: Api) -> None:
    await api.post("/generate", {"model": "gan"})
    assert api.broker.cancelled == []


async def test_generated_images_can_be_scored(api: Api) -> None:
    """What comes out goes in again, in every lossless format and for grey models too."""
    for model in ("diffusion", "density"):
        for format in ("png", "webp", "npy", "jpeg"):
            drawn = (await api.post("/generate", {"model": model, "format": format})).json()["images"][0]["b64_json"]
            scored = await api.post("/score", {"model": model, "images": [drawn]})
            assert scored.status_code == 200, (model, format, scored.text)


async def test_line_breaks_in_base64_do_not_matter(api: Api) -> None:
    text = b64(file_of(picture(1, 1, (1, 4, 5))))
    wrapped = "\n".join(text[k : k + 20] for k in range(0, len(text), 20)) + "\n"
    one, other = [(await api.post("/score", {"model": "diffusion", "images": [t]})).json() for t in (text, wrapped)]
    assert one == other
