"""POST /score: what it answers, and what it asks of workers."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_fakes import DENSITY, Api, after, b64, file_of, log_prob, picture, tell, write_model

from service.messages import Completed, Scored

pytestmark = pytest.mark.anyio

GREY, COLOUR = picture(1, 0, (1, 4, 5)), picture(1, 0, (3, 4, 5))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def api(tmp_path: Path) -> Api:
    return Api(tmp_path)


async def test_the_answer_is_exactly_that_of_the_contract(api: Api) -> None:
    others = [picture(2, k, (3, 4, 5)) for k in range(3)]
    response = await api.post(
        "/score", {"model": "density", "images": [b64(file_of(x)) for x in others], "alpha": 0.05}
    )
    assert response.status_code == 200
    ln2 = math.log(2)
    assert response.json() == {
        "model": "density",
        "family": "pixelcnn",
        "kind": "exact",
        "dequantisation": "none",
        "results": [
            {
                "log_prob": log_prob(x),
                "bits_per_dim": pytest.approx(-log_prob(x) / (60 * ln2), rel=1e-12),
                "stderr": None,
                "anomaly": None,
                "statistics": {"nll_bits": pytest.approx(-log_prob(x) / ln2, rel=1e-12), "mean": x.mean()},
                "heatmap": None,
            }
            for x in others
        ],
        "calibration": None,
        "warnings": ["anomaly: density is not calibrated, so its scores have no p-values"],
    }


async def test_workers_get_the_pixels_and_no_label(api: Api) -> None:
    await api.post("/score", {"model": "density", "images": [b64(file_of(COLOUR)), b64(file_of(COLOUR[::-1]))]})
    assert (api.broker.task.images == np.stack([COLOUR, COLOUR[::-1]])).all()
    assert api.broker.task.labels == (-1, -1)


@pytest.mark.parametrize("label", [2, "Pullover"])
async def test_a_label_goes_with_every_image(api: Api, label: Any) -> None:
    await api.post("/score", {"model": "diffusion", "images": [b64(file_of(GREY))] * 2, "label": label})
    assert api.broker.task.labels == (2, 2)


async def test_work_is_counted_in_images_and_the_likelihoods_steps(api: Api) -> None:
    body = {"model": "diffusion", "images": [b64(file_of(GREY))] * 3, "priority": "batch", "timeout": 9}
    await api.post("/score", body)
    job = api.broker.job
    assert (job.rows, job.units, job.priority, job.timeout) == (3, 21, "batch", 9)


async def test_an_unnormalised_model_gives_its_energy_and_no_probability(api: Api) -> None:
    answer = (await api.post("/score", {"model": "energy", "images": [b64(file_of(GREY))]})).json()
    assert answer["kind"] == "unnormalised"
    (result,) = answer["results"]
    assert (result["log_prob"], result["bits_per_dim"], result["energy"]) == (None, None, log_prob(GREY))
    assert "nll_bits" not in result["statistics"]


async def test_an_estimate_comes_with_its_error(api: Api) -> None:
    api.broker.answer = after(*tell(Scored(0, -12.0, stderr=0.5), Completed(0, 0, 1)))
    answer = (await api.post("/score", {"model": "density", "images": [b64(file_of(COLOUR))]})).json()
    assert answer["results"][0]["stderr"] == 0.5


async def test_an_integral_that_has_not_converged_says_so_and_which_it_is(api: Api) -> None:
    sure = Scored(0, -12.0, stderr=0.5, statistics={"coarse_log_prob": -12.1}, converged=True)
    unsure = Scored(1, -12.0, stderr=0.5, statistics={"coarse_log_prob": -99.0}, converged=False)
    api.broker.answer = after(*tell(sure, unsure, Completed(0, 0, 1)))
    answer = (await api.post("/score", {"model": "density", "images": [b64(file_of(COLOUR))] * 2})).json()
    assert [result["converged"] for result in answer["results"]] == [True, False]
    assert [result["log_prob"] for result in answer["results"]] == [-12.0, -12.0]
    assert [w for w in answer["warnings"] if w.startswith("images[")] == [
        "images[1]: not converged: half the steps give -99.0 nats, all of them -12.0"
    ]


async def test_an_integral_that_would_be_a_probability_above_one_is_refused(api: Api) -> None:
    impossible = Scored(0, 3.0, stderr=0.5, statistics={"coarse_log_prob": 4.0}, converged=False)
    api.broker.answer = after(*tell(impossible, Completed(0, 0, 1)))
    answer = (await api.post("/score", {"model": "density", "images": [b64(file_of(COLOUR))]})).json()
    assert answer["results"][0]["log_prob"] is None
    assert answer["results"][0]["bits_per_dim"] is None
    assert "nll_bits" not in answer["results"][0]["statistics"]
    assert "images[0]: log_prob is refused: 3.0 nats would be a probability above one" in answer["warnings"]


async def test_a_number_that_json_cannot_say_is_null_and_a_warning(api: Api) -> None:
    api.broker.answer = after(*tell(Scored(0, -math.inf), Completed(0, 0, 1)))
    answer = (await api.post("/score", {"model": "density", "images": [b64(file_of(COLOUR))]})).json()
    assert answer["results"][0]["log_prob"] is None
    assert answer["results"][0]["bits_per_dim"] is None
    assert "images[0]: log_prob is -inf, which JSON cannot say" in answer["warnings"]


@pytest.mark.parametrize("format", ["PNG", "WEBP", "npy"])
async def test_a_form_is_the_same_request(api: Api, format: str) -> None:
    def file(pixels: Any) -> bytes:
        if format != "npy":
            return file_of(pixels, format, lossless=True)
        out = io.BytesIO()
        np.save(out, pixels.transpose(1, 2, 0))
        return out.getvalue()

    images = [file(picture(5, k, (1, 4, 5))) for k in range(2)]
    files = [("images", (f"{k}.bin", data, "application/octet-stream")) for k, data in enumerate(images)]
    fields = {"model": "diffusion", "label": "Trouser", "alpha": "0.05", "heatmap": "true", "timeout": "20"}
    form = await api.post("/score", files=files, data=fields)
    body = {**fields, "alpha": 0.05, "heatmap": True, "timeout": 20, "images": [b64(data) for data in images]}
    plain = await api.post("/score", body)
    assert form.status_code == plain.status_code == 200, form.text
    assert form.json() == plain.json()
    one, other = api.broker.jobs.values()
    assert one.payload == other.payload


async def test_a_form_gives_a_label_by_index_in_digits(api: Api) -> None:
    await api.post("/score", files={"images": file_of(GREY)}, data={"model": "diffusion", "label": "1"})
    assert api.broker.task.labels == (1,)


async def test_resized_images_are_scored_with_a_warning_that_names_them(api: Api) -> None:
    large = picture(3, 0, (3, 40, 50))
    body = {"model": "diffusion", "images": [b64(file_of(GREY)), b64(file_of(large))], "resize": True}
    answer = (await api.post("/score", body)).json()
    assert api.broker.task.images.shape == (2, 1, 4, 5)
    assert (api.broker.task.images[0] == GREY).all()
    (warning,) = [w for w in answer["warnings"] if "resized" in w]
    assert warning.startswith("images[1]: ")
    assert "not comparable" in warning


async def test_a_heatmap_that_cannot_be_drawn_is_null_and_a_warning(api: Api) -> None:
    body = {"model": "density", "images": [b64(file_of(COLOUR))], "heatmap": True}
    answer = (await api.post("/score", body)).json()
    assert answer["results"][0]["heatmap"] is None
    assert any(w.startswith("heatmap:") for w in answer["warnings"])


async def test_a_calibration_that_is_not_read_is_not_called_missing(api: Api) -> None:
    files = {"weights.safetensors": "0" * 64, "calibration.safetensors": "1" * 64}
    write_model(api.folder, "density", DENSITY, files=files)
    api.catalog.refresh()
    answer = (await api.post("/score", {"model": "density", "images": [b64(file_of(COLOUR))]})).json()
    assert answer["results"][0]["anomaly"] is None
    assert answer["warnings"] == ["anomaly: this server does not read the calibration of density yet"]


async def test_a_model_without_a_density_names_those_that_have_one(api: Api) -> None:
    response = await api.post("/score", {"model": "gan", "images": [b64(file_of(GREY))]})
    assert response.status_code == 422
    problem = response.json()
    assert problem["type"] == "urn:drawwell:problem:no-density"
    assert "gan" in problem["detail"]
    assert "density, diffusion, energy" in problem["detail"]
    assert not api.broker.jobs


async def test_a_list_of_models_is_refused_clearly(api: Api) -> None:
    response = await api.post("/score", {"model": ["density", "diffusion"], "images": [b64(file_of(GREY))]})
    assert response.status_code == 422
    (fault,) = response.json()["errors"]
    assert fault["loc"] == ["body", "model"]
    assert "ensemble" in fault["msg"]
