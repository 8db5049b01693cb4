"""POST /score: heat maps, and several models that judge together."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_fakes import (
    DENSITY,
    ENERGY,
    Api,
    at_once,
    b64,
    file_of,
    log_prob,
    picture,
    pixels_of,
    surprise,
    tell,
    write_model,
)

from anomaly import heatmaps
from anomaly.calibration import Calibration, calibrate, describe
from anomaly.ensembles import Ensemble, Member, joined
from anomaly.heatmaps import MIDDLE
from service.broker import Event, Job
from service.marginals import Marginal, marginal
from service.messages import Completed, MapImages, Scored, ScoreImages, unpack

pytestmark = pytest.mark.anyio

MEMBERS = ("energy", "diffusion")  # as the ensemble's calibration has them: both take grey images of 5×4


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def api(tmp_path: Path) -> Api:
    return Api(tmp_path)


def normal(seed: int, channels: int = 3) -> np.ndarray:
    """Grey, a little noise."""
    return np.random.default_rng([9, seed]).normal(128, 12, (channels, 4, 5)).clip(0, 255).astype(np.uint8)


def defect(seed: int) -> np.ndarray:
    x = normal(seed).copy()
    x[:, 2:, 3:] = 255
    return x


def weights(model: str) -> str:
    return hashlib.sha256(model.encode()).hexdigest()


def with_maps(api: Api, n: int = 200) -> Calibration:
    """Calibrate "density" on normal images, maps and all."""
    images = [normal(k) for k in range(100 + n)]
    found = [describe(x, log_prob(x), None, {"mean": x.mean()}) for x in images]
    maps = np.stack([surprise(x) for x in images])
    told = {"weights_sha256": weights("density")}
    made = calibrate(found[:100], found[100:], told, heatmaps.fit([maps[:100]], [maps[100:]]))
    (api.folder / "density" / "calibration.safetensors").write_bytes(made.pack())
    files = {"weights.safetensors": weights("density"), "calibration.safetensors": made.sha256}
    write_model(api.folder, "density", DENSITY, files=files)
    api.catalog.refresh()
    return made


async def asked(api: Api, model: Any, images: list[np.ndarray], **options: Any) -> dict[str, Any]:
    body = {"model": model, "images": [b64(file_of(x)) for x in images], **options}
    found: dict[str, Any] = (await api.post("/score", body)).json()
    return found


def shown(text: str) -> np.ndarray:
    return pixels_of(base64.b64decode(text))[0]


# ------------------------------------------------------------------------------------------------------------ heat maps


async def test_a_heat_map_is_the_calibrations_and_its_mask_is_where_the_defect_is(api: Api) -> None:
    maps = with_maps(api).maps
    assert maps is not None
    images = [normal(1000), defect(1001)]
    answer = await asked(api, "density", images, heatmap=True, alpha=0.05)
    assert answer["warnings"] == []
    heights = maps.heights([np.stack([surprise(x) for x in images])])
    for k, result in enumerate(answer["results"]):
        np.testing.assert_array_equal(shown(result["heatmap"]), maps.picture(heights)[k])
        np.testing.assert_array_equal(shown(result["mask"]) > 0, maps.mask(heights, maps.rank(0.05, None))[k])
    dark, bright = (result["heatmap"] for result in answer["results"])
    assert shown(dark).max() < 2 * MIDDLE
    assert shown(bright)[2:, 3:].min() > MIDDLE
    assert (shown(answer["results"][1]["mask"])[2:, 3:] == 255).all()


async def test_a_map_is_a_job_of_its_own_whose_work_is_counted_and_only_where_it_is_asked_for(api: Api) -> None:
    with_maps(api)
    await asked(api, "density", [normal(1), normal(2)])
    assert [type(unpack(job.payload)) for job in api.broker.jobs.values()] == [ScoreImages]
    api.broker.jobs.clear()
    await asked(api, "density", [normal(1), normal(2)], heatmap=True, priority="batch", timeout=9)
    score, drawing = api.broker.jobs.values()
    assert [type(unpack(job.payload)) for job in (score, drawing)] == [ScoreImages, MapImages]
    assert (score.units, drawing.units) == (2, 6)
    assert (drawing.rows, drawing.priority, drawing.timeout) == (2, "batch", 9)


async def test_where_one_job_fails_the_other_is_cancelled(api: Api) -> None:
    with_maps(api)

    async def answer(job: Job) -> AsyncIterator[Event]:
        if isinstance(unpack(job.payload), ScoreImages):
            raise RuntimeError("broken")
        await asyncio.Event().wait()
        yield Event(b"")

    api.broker.answer = answer
    found = await asked(api, "density", [normal(1)], heatmap=True)
    assert found["status"] == 500
    (drawing,) = (job.id for job in api.broker.jobs.values() if isinstance(unpack(job.payload), MapImages))
    assert drawing in api.broker.cancelled


async def test_a_confidence_makes_the_mask_smaller_and_too_few_images_make_none(api: Api) -> None:
    with_maps(api)
    images = [defect(k) for k in range(8)]
    areas = []
    for options in ({"alpha": 0.2}, {"alpha": 0.2, "confidence": 0.99}, {"alpha": 1e-4, "fdr": 0.5}):
        answer = await asked(api, "density", images, heatmap=True, **options)
        areas.append(sum(int((shown(result["mask"]) > 0).sum()) for result in answer["results"]))
        told = [warning for warning in answer["warnings"] if warning.startswith("mask: ")]
        assert len(told) == ("fdr" in options), "no black mask without a word"
    assert "alpha 0.0001 takes at least 9,999 calibration images" in told[0]
    assert areas[0] >= areas[1] > areas[2] == 0


async def test_maps_given_a_label_are_not_drawn_by_a_calibration_without(api: Api) -> None:
    answer = await asked(api, "diffusion", [normal(1, 1)], heatmap=True, label=1)
    assert answer["results"][0]["heatmap"] is None
    assert any(warning.startswith("heatmap:") for warning in answer["warnings"])


# ------------------------------------------------------------------------------------------------------------ ensembles


def spoken(model: str, x: np.ndarray) -> dict[str, float]:
    energy = log_prob(x) if model == "energy" else None
    return describe(x, None if model == "energy" else log_prob(x), energy, {"mean": x.mean()})


def ensemble(api: Api, names: tuple[str, ...] = MEMBERS, n: int = 200) -> Calibration:
    """Calibrate both together. names: what the calibration calls them."""
    images = [normal(k, 1) for k in range(100 + n)]
    found = [joined(names, [spoken(model, x) for model in MEMBERS]) for x in images]
    made = calibrate(found[:100], found[100:], {})
    folder = api.folder / "both"
    folder.mkdir(exist_ok=True)
    (folder / "calibration.safetensors").write_bytes(made.pack())
    members = tuple(Member(name, weights(model)) for name, model in zip(names, MEMBERS, strict=True))
    (folder / "ensemble.json").write_bytes(Ensemble(members, made.sha256).pack())
    return made


@pytest.mark.parametrize("order", [["diffusion", "energy"], ["energy", "diffusion"]])
@pytest.mark.parametrize("names", [MEMBERS, ("elsewhere", "of another name")])
async def test_an_ensemble_is_found_by_its_members_weights(api: Api, order: list[str], names: tuple[str, ...]) -> None:
    made = ensemble(api, names)
    images = [normal(1000, 1), np.full((1, 4, 5), 255, np.uint8)]
    answer = await asked(api, order, images, alpha=0.05)
    assert answer["warnings"] == []
    assert answer["model"] == order
    assert answer["family"] == [{"diffusion": "ddpm", "energy": "ebm"}[model] for model in order]
    assert answer["calibration"] == {"n": 200, "sha256": made.sha256}
    expected = made.score([joined(names, [spoken(model, x) for model in MEMBERS]) for x in images])
    assert [result["anomaly"]["score"] for result in answer["results"]] == pytest.approx(expected.tolist())
    assert [result["anomaly"]["is_anomaly"] for result in answer["results"]] == [False, True]
    assert answer["results"][0]["log_prob"] is None
    assert {f"{names[0]}.mean", f"{names[1]}.nll_bits", "complexity_bits"} <= answer["results"][0]["statistics"].keys()


async def test_an_ensemble_may_be_asked_for_by_the_name_of_its_folder(api: Api) -> None:
    ensemble(api)
    images = [normal(1000, 1), np.full((1, 4, 5), 255, np.uint8)]
    assert await asked(api, "both", images) == await asked(api, list(MEMBERS), images)
    form = await api.post("/score", data={"model": "both"}, files=[("images", file_of(x)) for x in images])
    assert form.json() == await asked(api, "both", images)
    write_model(api.folder, "both", ENERGY)
    api.catalog.refresh()
    before = len(api.broker.jobs)
    await asked(api, "both", images)
    assert [job.model for job in list(api.broker.jobs.values())[before:]] == ["both"], (
        "a model of that name comes first"
    )
    for unknown in ("neither", "../both", "*"):
        assert (await asked(api, unknown, images))["status"] == 404


async def test_each_member_says_what_it_would_say_alone(api: Api) -> None:
    ensemble(api)
    images = [picture(1, k, (1, 4, 5)) for k in range(2)]
    together = await asked(api, ["diffusion", "energy"], images)
    assert len(api.broker.jobs) == 2
    for model in MEMBERS:
        alone = await asked(api, model, images)
        for k, result in enumerate(alone["results"]):
            del result["heatmap"]
            assert together["results"][k]["members"][model] == result


async def test_models_that_are_not_calibrated_together_score_without_a_verdict(api: Api) -> None:
    answer = await asked(api, ["diffusion", "energy"], [normal(1, 1)])
    assert answer["results"][0]["anomaly"] is None
    assert answer["calibration"] is None
    assert any("diffusion and energy are not calibrated together" in warning for warning in answer["warnings"])
    ensemble(api)
    write_model(api.folder, "energy", ENERGY, files={"weights.safetensors": "0" * 64})  # trained anew
    api.catalog.refresh()
    answer = await asked(api, ["diffusion", "energy"], [normal(1, 1)])
    assert answer["results"][0]["anomaly"] is None


async def test_an_ensembles_calibration_that_is_broken_is_told(api: Api) -> None:
    ensemble(api)
    path = api.folder / "both" / "calibration.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    answer = await asked(api, ["diffusion", "energy"], [normal(1, 1)])
    assert any("both/calibration.safetensors: its sha256" in warning for warning in answer["warnings"])
    (api.folder / "both" / "ensemble.json").write_text("{}")
    answer = await asked(api, ["diffusion", "energy"], [normal(1, 1)])
    assert any("not calibrated together" in warning for warning in answer["warnings"])


async def test_an_ensemble_draws_one_map_of_those_of_its_members_that_draw_some(api: Api) -> None:
    twin = ("density", "twin")
    write_model(api.folder, "twin", DENSITY)
    api.catalog.refresh()

    async def answer(job: Job) -> AsyncIterator[Event]:
        for event in at_once(dataclasses.replace(job, model="density")):
            yield event

    api.broker.answer = answer
    images = [normal(k) for k in range(300)]
    found = [joined(twin, [describe(x, log_prob(x), None, {"mean": x.mean()})] * 2) for x in images]
    each = np.stack([surprise(x) for x in images])
    maps = heatmaps.fit([each[:100]] * 2, [each[100:]] * 2)
    made = calibrate(found[:100], found[100:], {}, maps)
    (api.folder / "both").mkdir()
    (api.folder / "both" / "calibration.safetensors").write_bytes(made.pack())
    members = tuple(Member(name, weights(name)) for name in twin)
    (api.folder / "both" / "ensemble.json").write_bytes(Ensemble(members, made.sha256).pack())
    result = (await asked(api, ["density", "twin"], [defect(1)], heatmap=True))["results"][0]
    heights = maps.heights([surprise(defect(1))[None]] * 2)
    np.testing.assert_array_equal(shown(result["heatmap"]), maps.picture(heights)[0])
    assert len(api.broker.jobs) == 4
    assert "heatmap" not in result["members"]["twin"]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (["diffusion"], "an ensemble has 2 to 8 models, not 1; one by itself"),
        ([], "an ensemble has 2 to 8 models, not 0"),
        (["diffusion"] * 2, "named twice"),
        (["diffusion", 3], "a model's id, or a list of them"),
        (7, "a model's id, or a list of them"),
        (["diffusion", "density"], "those of diffusion are 5×4×1, those of density are 5×4×3"),
        (["diffusion", "gan"], "gan is a gan without a density"),
    ],
)
async def test_what_is_no_ensemble_is_refused(api: Api, model: Any, why: str) -> None:
    found = await asked(api, model, [normal(1, 1)])
    assert found["status"] == 422
    assert found["errors"][0]["loc"] == ["body", "model"]
    assert why in found["detail"]
    assert not api.broker.jobs


async def test_a_label_that_one_member_does_not_take_is_refused(api: Api) -> None:
    found = await asked(api, ["diffusion", "energy"], [normal(1, 1)], label=1)
    assert found["status"] == 422
    assert "energy takes no label" in found["detail"]


# ------------------------------------------------------------------------------------------------------------ marginals


def by_label(job: Job) -> list[Event]:
    """Scores that depend on the label: image k is likely under label k, and hardly under the others."""
    task = unpack(job.payload)
    assert isinstance(task, ScoreImages)
    scored = []
    for i, label in enumerate(task.labels):
        log_prob = -10.0 - 3 * abs(label - i // 3)
        statistics = {"own": float(label), "coarse_log_prob": log_prob - 9}
        scored.append(Scored(i, log_prob, stderr=1.0 + label, statistics=statistics, converged=label < 2))
    return tell(*scored, Completed(0, 0, len(scored)))


async def test_a_marginal_is_the_mean_of_the_probabilities_over_all_labels(api: Api) -> None:
    async def answer(job: Job) -> AsyncIterator[Event]:
        for event in by_label(job):
            yield event

    api.broker.answer = answer
    images = [normal(k, 1) for k in range(3)]
    found = await asked(api, "diffusion", images, marginal=True)
    job = api.broker.job
    assert (job.rows, job.units) == (9, 63)
    task = unpack(job.payload)
    assert task.labels == (0, 1, 2) * 3
    for k, image in enumerate(images):
        assert (task.images[3 * k : 3 * k + 3] == image).all()
    logs = -10.0 - 3 * np.abs(np.arange(3)[:, None] - np.arange(3))
    posterior = np.exp(logs) / np.exp(logs).sum(axis=1, keepdims=True)
    for k, result in enumerate(found["results"]):
        assert result["log_prob"] == pytest.approx(np.log(np.exp(logs[k]).mean()))
        assert list(result["by_label"].values()) == pytest.approx(logs[k].tolist())
        assert list(result["by_label"]) == ["T-shirt/top", "Trouser", "Pullover"]
        assert result["statistics"]["own"] == pytest.approx(float(posterior[k] @ np.arange(3)))
        assert result["stderr"] == pytest.approx(math.sqrt(float(posterior[k] @ (1 + np.arange(3)) ** 2)))
    assert [result["converged"] for result in found["results"]] == [True, False, False]


def test_a_marginal_of_one_label_is_its_score_and_of_none_possible_is_none() -> None:
    one = Scored(5, -3.0, stderr=0.5, statistics={"a": 2.0}, converged=True)
    assert marginal([one], 5) == Marginal(one, (-3.0,))
    nothing = marginal([Scored(0, -math.inf), Scored(1, -math.inf)], 0)
    assert nothing.scored.log_prob == -math.inf
    with pytest.raises(ValueError, match="energies"):
        marginal([Scored(0, None, energy=1.0)], 0)


@pytest.mark.parametrize(
    ("model", "more", "why"),
    [
        ("diffusion", {"label": 1}, "give the one or the other"),
        ("density", {}, "density knows no labels"),
        (["diffusion", "energy"], {}, "energy knows no labels"),
    ],
)
async def test_what_has_no_marginal_is_refused(api: Api, model: Any, more: dict[str, Any], why: str) -> None:
    found = await asked(api, model, [normal(1, 3 if model == "density" else 1)], marginal=True, **more)
    assert found["status"] == 422
    assert any(error["loc"] == ["body", "marginal"] for error in found["errors"])
    assert why in found["detail"]
    assert not api.broker.jobs
