"""What ships calibrated keeps its rate of false alarms: scored here on a few held-out images, in the table on many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from anomaly import calibration as calibrations
from anomaly import conformal
from models import _checkpoint
from training import anomaly_page, data, scored
from training.data import Dataset

ZOO = Path(__file__).parents[1] / "zoo"
FOLDERS = sorted(p.parent for p in ZOO.glob("*/model.json"))
checkpoints = pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
FEWER = {"fashion-mnist-flow-matching": 300, "fashion-mnist-score-sde": 300}  # images where one takes seconds
UNLIKELY = 0.0005  # on each side: some of many checkpoints would leave an interval of 95 % by chance


def shipped(folder: Path) -> calibrations.Calibration:
    about = _checkpoint.read_about(folder)
    if calibrations.FILE not in about["files"]:
        pytest.skip("not calibrated")
    return calibrations.unpack(_checkpoint.read_file(folder, calibrations.FILE))


def as_the_law_says(rate: float, m: int, n: int, k: int) -> bool:
    """Whether so many of m images are false alarms, of rank k among n calibration images, as chance allows."""
    low, high = scipy.stats.betabinom.ppf([UNLIKELY, 1 - UNLIKELY], m, k, n + 1 - k)
    return bool(low <= round(rate * m) <= high)


@checkpoints
def test_a_calibration_is_of_the_weights_beside_it(folder: Path) -> None:
    found = shipped(folder)
    about = _checkpoint.read_about(folder)
    assert found.about["weights_sha256"] == about["files"]["weights.safetensors"]
    assert found.about["data"] == {"name": about["data"]["name"], "sha256": about["data"]["sha256"]}
    assert found.n == FEWER.get(folder.name, about["data"]["splits"]["calibration"])
    assert found.about["fit_n"] == FEWER.get(folder.name, about["data"]["splits"]["fit"])
    assert conformal.rank(found.n, 0.01) > 0, "too few for the alpha that a server asks for by default"
    assert (np.diff(found.scores) >= 0).all()
    assert np.isfinite(found.scores).all()


@checkpoints
@pytest.mark.slow
@pytest.mark.realdata
def test_false_alarms_among_held_out_images_are_as_many_as_the_beta_law_allows(
    folder: Path, fashion_mnist: Dataset
) -> None:
    found, model = shipped(folder), _checkpoint.load(folder)
    name = found.about["data"]["name"]
    normal = fashion_mnist if name == fashion_mnist.name else data.load(name)
    likelihood = model.spec.likelihood
    assert likelihood is not None
    images = 200 if likelihood.steps * likelihood.network_evaluations_per_step == 1 else 8
    x = normal.splits["test"].x[:images]
    described = scored.described(x, scored.scores(model, x), scored.complexities(x)["complexity"])
    verdicts = found.judge(found.score(described), 0.05)
    rate = float(np.mean([verdict.is_anomaly for verdict in verdicts]))
    assert as_the_law_says(rate, images, found.n, conformal.rank(found.n, 0.05)), f"{rate:.3f} of {images}"


def table() -> list[Any]:
    results = anomaly_page.read(anomaly_page.PAGE)
    return [
        pytest.param(name, measured, id=f"{name}, {data}")
        for data, entry in results.items()
        for name, measured in entry["scorers"].items()
    ]


@pytest.mark.parametrize(("name", "measured"), table())
def test_the_table_is_of_the_calibrations_that_ship_and_its_false_alarms_keep_to_the_law(
    name: str, measured: dict[str, Any]
) -> None:
    if f" zoo/{name} " in measured["command"]:  # others are trained to be measured, by a recipe, and do not ship
        path = ZOO / name / calibrations.FILE
        assert path.is_file(), "measured once, and gone: run the evaluation again, or take it out of the table"
        assert calibrations.unpack(path.read_bytes()).sha256 == measured["calibration_sha256"]
    n = measured["calibration_n"]
    for alarm in measured["false_alarms"]:
        alpha, confidence = alarm["alpha"], alarm["confidence"]
        k = conformal.rank(n, alpha) if confidence is None else conformal.rank_with_confidence(n, alpha, confidence)
        assert as_the_law_says(alarm["rate"], alarm["n"], n, k), alarm


def test_the_law_is_broken_by_what_breaks_it() -> None:
    k = conformal.rank(2000, 0.05)
    assert as_the_law_says(0.05, 10_000, 2000, k)
    assert not as_the_law_says(0.08, 10_000, 2000, k)
    assert not as_the_law_says(0.02, 10_000, 2000, k)
