"""POST /score: what it answers, and what it asks of workers."""

from __future__ import annotations

import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_fakes import DENSITY, DIFFUSION, Api, after, b64, file_of, log_prob, picture, tell, write_model

from anomaly.calibration import calibrate, describe
from anomaly.complexity import compressed_bits
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
                "statistics": {
                    "mean": x.mean(),
                    "nll_bits": pytest.approx(-log_prob(x) / ln2, rel=1e-12),
                    "excess_bits": pytest.approx(-log_prob(x) / ln2 - compressed_bits(x), rel=1e-9),
                    "complexity_bits": compressed_bits(x),
                },
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


@pytest.mark.parametrize(
    ("model", "image", "why"),
    [("density", COLOUR, "not calibrated with heat maps"), ("energy", GREY, "heatmap: ebm says of whole images only")],
)
async def test_a_heatmap_that_cannot_be_drawn_is_null_and_a_warning(api: Api, model: str, image: Any, why: str) -> None:
    body = {"model": model, "images": [b64(file_of(image))], "heatmap": True}
    answer = (await api.post("/score", body)).json()
    assert answer["results"][0]["heatmap"] is None
    assert "mask" not in answer["results"][0]
    assert any(why in w for w in answer["warnings"])
    assert len(api.broker.jobs) == 1, "nobody works at a map that cannot be drawn"


async def test_a_calibration_that_cannot_be_read_is_not_called_missing(api: Api) -> None:
    files = {"weights.safetensors": "0" * 64, "calibration.safetensors": "1" * 64}
    write_model(api.folder, "density", DENSITY, files=files)
    api.catalog.refresh()
    answer = (await api.post("/score", {"model": "density", "images": [b64(file_of(COLOUR))]})).json()
    assert answer["results"][0]["anomaly"] is None
    assert "the calibration of density cannot be used" in answer["warnings"][0]


async def test_a_model_without_a_density_names_those_that_have_one(api: Api) -> None:
    response = await api.post("/score", {"model": "gan", "images": [b64(file_of(GREY))]})
    assert response.status_code == 422
    problem = response.json()
    assert problem["type"] == "urn:drawwell:problem:no-density"
    assert "gan" in problem["detail"]
    assert "density, diffusion, energy" in problem["detail"]
    assert not api.broker.jobs


# -------------------------------------------------------------------------------------------------------------- anomaly


def normal(seed: int) -> np.ndarray:
    """An image of the kind that the calibration below calls normal: grey, a little noise."""
    return np.random.default_rng([9, seed]).normal(128, 12, (3, 4, 5)).clip(0, 255).astype(np.uint8)


def calibrated(api: Api, n: int = 200) -> str:
    """Calibrate the model "density" on such images; the calibration's sha256."""
    images = [normal(k) for k in range(100 + n)]
    found = [describe(x, log_prob(x), None, {"mean": x.mean()}) for x in images]
    weights = hashlib.sha256(b"density").hexdigest()
    made = calibrate(found[:100], found[100:], {"weights_sha256": weights, "data": {"name": "made up"}})
    (api.folder / "density" / "calibration.safetensors").write_bytes(made.pack())
    files = {"weights.safetensors": weights, "calibration.safetensors": made.sha256}
    write_model(api.folder, "density", DENSITY, files=files)
    api.catalog.refresh()
    return made.sha256


async def asked(api: Api, images: list[np.ndarray], **options: Any) -> dict[str, Any]:
    body = {"model": "density", "images": [b64(file_of(x)) for x in images], **options}
    found: dict[str, Any] = (await api.post("/score", body)).json()
    return found


async def test_a_calibrated_model_says_what_is_an_anomaly(api: Api) -> None:
    sha256 = calibrated(api)
    images = [normal(1000), np.full((3, 4, 5), 255, np.uint8), normal(1001)]
    answer = await asked(api, images, alpha=0.01)
    assert answer["calibration"] == {"n": 200, "sha256": sha256}
    assert answer["warnings"] == []
    anomalies = [result["anomaly"] for result in answer["results"]]
    assert anomalies[1]["is_anomaly"]
    assert anomalies[1]["p_value"] == 1 / 201
    assert anomalies[1]["score"] > anomalies[1]["threshold"] >= max(anomalies[0]["score"], anomalies[2]["score"])
    assert not anomalies[0]["is_anomaly"]
    assert anomalies[0]["alpha"] == 0.01
    assert 0.01 < anomalies[0]["false_positive_rate_upper95"] < 0.04


async def test_an_image_whose_likelihood_is_refused_is_judged_alone_as_in_company(api: Api) -> None:
    """It is the oddest there is; alone it was taken for one of another model, and not judged at all."""
    calibrated(api)
    wild = Scored(0, 3.0, statistics={"mean": 128.0, "coarse_log_prob": 4.0}, converged=False)
    usual = Scored(1, log_prob(normal(1)), statistics={"mean": normal(1).mean()})
    answers = []
    for told in ([wild], [wild, usual]):
        api.broker.answer = after(*tell(*told, Completed(0, 0, 1)))
        answers.append(await asked(api, [normal(k) for k in range(len(told))], alpha=0.01))
    alone, company = (answer["results"][0] for answer in answers)
    assert alone == company
    assert (alone["anomaly"]["is_anomaly"], alone["anomaly"]["p_value"]) == (True, 1 / 201)
    assert not answers[1]["results"][1]["anomaly"]["is_anomaly"]
    assert alone["log_prob"] is None
    assert "nll_bits" not in alone["statistics"]


async def test_scores_by_other_weights_than_were_asked_are_not_judged_by_their_calibration(api: Api) -> None:
    """The folder changed while the job waited: what ran is what workers had by then."""
    calibrated(api)
    same = (api.folder / "density" / "model.json").read_bytes()
    versions = {"same": hashlib.sha256(same).hexdigest(), "unknown": "f" * 64, "untold": ""}
    versions["other"] = write_model(api.folder, "density", DENSITY, files={"weights.safetensors": "e" * 64})
    api.catalog.refresh()
    (api.folder / "density" / "model.json").write_bytes(same)
    api.catalog.refresh()
    about = json.loads(same)
    for who, status in (("same", 200), ("unknown", 503), ("untold", 200), ("other", 503), ("described anew", 200)):
        if who == "described anew":  # by `calibrate`, after the API has looked
            files = {**about["files"], "calibration.safetensors": "d" * 64}
            versions[who] = write_model(api.folder, "density", DENSITY, files=files)
        told = tell(Scored(0, -12.0, statistics={"mean": 1.0}), Completed(0, 0, 1, version=versions[who]))
        api.broker.answer = after(*told)
        answer = await api.post("/score", {"model": "density", "images": [b64(file_of(normal(1)))]})
        assert answer.status_code == status, who
        if status == 503:
            assert answer.json()["type"] == "urn:drawwell:problem:interrupted"
            assert "other weights" in answer.json()["detail"]
            assert answer.headers["Retry-After"] == "1"


async def test_a_confidence_is_stricter_and_a_batch_can_be_judged_together(api: Api) -> None:
    calibrated(api)
    images = [normal(2000 + k) for k in range(40)]
    plain = await asked(api, images, alpha=0.2)
    strict = await asked(api, images, alpha=0.2, confidence=0.95)
    first = strict["results"][0]["anomaly"]
    assert first["threshold"] > plain["results"][0]["anomaly"]["threshold"]
    assert first["false_positive_rate_upper95"] <= 0.2
    strange = [np.full((3, 4, 5), level, np.uint8) for level in (0, 255, 254)]
    together = await asked(api, images + strange, fdr=0.1)
    named = [result["anomaly"]["is_anomaly"] for result in together["results"]]
    assert all(named[40:])
    assert sum(named[:40]) <= 2


async def test_an_alpha_that_the_calibration_cannot_serve_says_what_it_takes(api: Api) -> None:
    calibrated(api)
    answer = await asked(api, [normal(1)], alpha=0.001)
    assert answer["status"] == 422
    assert answer["errors"][0]["loc"] == ["body", "alpha"]
    assert "at least 999 calibration images; there are 200" in answer["detail"]
    assert not api.broker.jobs, "it is told before the work"


async def test_a_batch_that_could_not_be_judged_at_its_rate_is_told_so(api: Api) -> None:
    """200 calibration images: no p-value is below 1/201."""
    calibrated(api)
    answer = await asked(api, [normal(1)], fdr=0.004)
    assert answer["status"] == 422
    assert answer["errors"][0]["loc"] == ["body", "fdr"]
    assert "fdr 0.004 takes at least 249 calibration images; there are 200" in answer["detail"]
    assert not api.broker.jobs, "it is told before the work"
    strange = [np.full((3, 4, 5), level, np.uint8) for level in (0, 255, 254, 1)]
    batch = [normal(2000 + k) for k in range(36)]
    few = await asked(api, [*batch, *strange[:3], normal(1)], fdr=0.05)
    assert any("of 40 images judged together none is named unless 4 or more are" in told for told in few["warnings"])
    assert any("799 to name a single one" in told for told in few["warnings"])
    assert not any(result["anomaly"]["is_anomaly"] for result in few["results"])
    enough = await asked(api, batch + strange, fdr=0.05)
    assert all(result["anomaly"]["is_anomaly"] for result in enough["results"][36:])
    assert (await asked(api, strange, fdr=0.05))["warnings"] == []


@pytest.mark.parametrize("field", ["alpha", "confidence", "fdr"])
@pytest.mark.parametrize("value", [0, 1, -0.5, "a"])
async def test_shares_must_lie_between_0_and_1(api: Api, field: str, value: Any) -> None:
    calibrated(api)
    answer = await asked(api, [normal(1)], **{field: value})
    assert answer["status"] == 422
    assert answer["errors"][0]["loc"] == ["body", field]


@pytest.mark.parametrize("options", [{"alpha": 1e-310}, {"alpha": 1e-310, "confidence": 0.95}, {"fdr": 5e-324}])
async def test_the_smallest_numbers_there_are_are_refused_like_small_ones(api: Api, options: dict[str, float]) -> None:
    calibrated(api)
    answer = await asked(api, [normal(1)], **options)
    assert answer["status"] == 422, answer
    assert "calibration images; there are 200" in answer["detail"]


async def test_scores_given_a_label_are_not_judged_by_a_calibration_without(api: Api) -> None:
    images = [picture(2, k, (1, 4, 5)) for k in range(150)]
    found = [describe(x, log_prob(x), None, {"mean": x.mean()}) for x in images]
    weights = hashlib.sha256(b"diffusion").hexdigest()
    made = calibrate(found[:100], found[100:], {"weights_sha256": weights})
    (api.folder / "diffusion" / "calibration.safetensors").write_bytes(made.pack())
    files = {"weights.safetensors": weights, "calibration.safetensors": made.sha256}
    write_model(api.folder, "diffusion", DIFFUSION, files=files)
    api.catalog.refresh()
    body = {"model": "diffusion", "images": [b64(file_of(images[0]))], "alpha": 0.1}
    assert (await api.post("/score", body)).json()["results"][0]["anomaly"] is not None
    labelled = (await api.post("/score", {**body, "label": 1, "alpha": 1e-6})).json()
    assert labelled["results"][0]["anomaly"] is None
    assert "without labels" in labelled["warnings"][0]


async def test_a_calibration_that_cannot_be_used_is_told_and_scores_still_come(api: Api) -> None:
    calibrated(api)
    path = api.folder / "density" / "calibration.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    answer = await asked(api, [normal(1)])
    assert answer["results"][0]["anomaly"] is None
    assert answer["results"][0]["log_prob"] is not None
    assert "sha256 is not the one" in answer["warnings"][0]
