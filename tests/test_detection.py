"""How detectors are measured: closed forms, and an evaluation from checkpoints to a page that goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import scipy.stats
from PIL import Image
from rich.console import Console
from toys import Config, Walk

import models
import training.__main__ as command
from anomaly import calibration as calibrations
from anomaly.heatmaps import Maps
from models import _checkpoint
from models._protocol import Localiser
from training import anomalies, anomaly_page, calibrate, data, detect, detection, scored
from training.detect import CALIBRATED, COMPRESSED, ONE_SIDED, TYPICALITY
from training.errors import DataError

# --------------------------------------------------------------------------------------------------------- closed forms


def test_two_normals_apart_are_told_as_their_closed_form_says() -> None:
    rng, apart = np.random.default_rng(0), 1.5
    found = detection.separation(rng.standard_normal(40_000), rng.standard_normal(40_000) + apart)
    assert found["auroc"] == pytest.approx(scipy.stats.norm.cdf(apart / math.sqrt(2)), abs=0.005)
    assert found["fpr95"] == pytest.approx(scipy.stats.norm.sf(apart + scipy.stats.norm.ppf(0.05)), abs=0.01)
    assert found["auroc"] < found["auprc"] + 0.05


def test_ties_are_chance_and_order_is_all_that_counts() -> None:
    same = detection.separation(np.zeros(50), np.zeros(70))
    assert (same["auroc"], same["fpr95"], same["n"]) == (0.5, 1.0, 70)
    normal, odd = np.arange(10.0), np.arange(5.0, 15.0)
    assert detection.separation(normal, odd) == detection.separation(np.exp(normal), np.exp(odd))
    assert detection.separation(normal, normal + 100) == pytest.approx(
        {"auroc": 1.0, "auprc": 1.0, "fpr95": 0.0, "n": 10}
    )


def test_a_score_that_is_no_number_is_above_all_and_minus_infinity_below() -> None:
    normal, odd = np.array([0.0, 1.0, -np.inf]), np.array([np.nan, np.inf, np.nan])
    assert detection.separation(normal, odd)["auroc"] == 1.0
    assert detection.separation(odd, normal)["auroc"] == 0.0


@pytest.mark.slow
def test_realised_false_alarms_lie_within_the_beta_law_as_often_as_it_says() -> None:
    """1,000 times: 200 scores calibrate, 100 others are counted."""
    rng, inside, promised = np.random.default_rng(0), 0, 0
    said = [{"a": float(a)} for a in rng.standard_normal(200)]
    plain = calibrations.calibrate(said[:100], said[100:], {})
    for _ in range(1000):
        calibration = dataclasses.replace(plain, scores=np.sort(rng.standard_normal(200)))
        fresh = rng.standard_normal(100)
        found = detection.false_alarms(calibration, fresh, 0.05)
        assert found is not None
        assert found.beta[0] > found.counted[0]
        assert found.beta[1] < found.counted[1]
        inside += found.counted[0] <= found.rate <= found.counted[1]
        strict = detection.false_alarms(calibration, fresh, 0.05, 0.95)
        assert strict is not None
        promised += strict.rate <= 0.05 + 1.645 * math.sqrt(0.05 * 0.95 / 100)
    assert inside / 1000 >= 0.94, "the counts are whole, so the interval holds a little more than 95 %"
    assert promised / 1000 >= 0.95
    assert detection.false_alarms(calibration, fresh, 0.001) is None, "200 images are too few for that"


def test_groups_are_whole_and_scored_together() -> None:
    values = np.arange(11.0)
    assert detection.grouped(values, 5).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert detection.typicality(values, 4.0, 5).tolist() == [2.0, 3.0]
    p = np.random.default_rng(0).uniform(size=50_000)
    statistic = 2 * detection.fisher(p, 5)
    assert scipy.stats.kstest(statistic, scipy.stats.chi2(10).cdf).pvalue > 0.01, "Fisher: χ² of 2k degrees"


def test_pixels_are_pooled_and_images_without_an_anomaly_have_no_part() -> None:
    masks = np.zeros((3, 4, 4), np.bool_)
    masks[0, :2, :2] = masks[1, 2:, 2:] = True
    assert detection.pixels(masks.astype(float), masks) == {"auroc": 1.0, "auroc_by_image": 1.0, "n": 2}
    shifted = masks + np.array([0.0, 5.0, 9.0])[:, None, None]
    found = detection.pixels(shifted, masks)
    assert found["auroc_by_image"] == 1.0
    assert found["auroc"] < 0.8, "one image glows as a whole: no one threshold serves both"
    for odd in (np.nan, np.inf):
        unsaid = np.where(masks, odd, 0.0)
        assert detection.pixels(unsaid, masks)["auroc"] == 1.0, "what cannot be said is as odd as can be"


# --------------------------------------------------------------------------------------------------------- what is kept


def test_rows_that_are_kept_are_not_computed_again(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (600, 1, 3, 3)).astype(np.uint8)
    asked: list[int] = []
    shift = 0.0

    def compute(block: np.ndarray) -> dict[str, np.ndarray]:
        asked.append(len(block))
        return {"mean": block.mean(axis=(1, 2, 3)) + shift}

    def kept(n: int) -> np.ndarray:
        asked.clear()
        return scored.kept(tmp_path / "a" / "x.safetensors", x[:n], compute, lambda done, total: None)["mean"]

    first = kept(300)
    assert asked == [256, 44]
    np.testing.assert_array_equal(kept(300), first)
    assert asked == [4], "a few, to see that they still are the same"
    np.testing.assert_array_equal(kept(100), first[:100])
    more = kept(600)
    assert asked == [4, 256, 44]
    np.testing.assert_array_equal(more, x.mean(axis=(1, 2, 3)))
    shift = 50.0
    np.testing.assert_array_equal(kept(300), first + 50)
    assert asked == [4, 256, 44], "another model: begun anew"
    (tmp_path / "a" / "x.safetensors").write_bytes(b"broken")
    with pytest.raises(DataError, match="remove it"):
        kept(3)


# --------------------------------------------------------------------------------------------------- a whole evaluation


class Two(Walk, Localiser):
    """The toy, with a second statistic, surprised by whatever is bright."""

    statistic_names = ("sum", "edge")

    def evaluate(self, x: Any, labels: Any) -> Any:
        found = super().evaluate(x, labels)
        edge = (x[:, :, :, 1:] - x[:, :, :, :-1]).abs().flatten(1).sum(1)
        return dataclasses.replace(found, statistics={**found.statistics, "edge": edge})

    def surprise(self, x: Any, labels: Any) -> Any:
        return x.mean(1)


class Family:
    Model, Config = Two, Config


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two calibrated toys of digits, their ensemble, and one without a calibration; a page with markers."""
    folder, digits = tmp_path_factory.mktemp("zoo"), data.load("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "family", lambda name: Family)
        _checkpoint.save(
            folder / "bare", Two(Config(), digits.space), Config(), {"data": digits.description, "metrics": {}}
        )
        shutil.copytree(folder / "bare", folder / "one")
        calibrate.run([folder / "one"], None, None, Console(file=io.StringIO()))
        shutil.copytree(folder / "one", folder / "two")
        quiet = Console(file=io.StringIO())
        calibrate.run([folder / "one", folder / "two"], None, None, quiet, folder / "both")
    (folder / "page.md").write_text("# Page\n\n<!-- anomalies: begin -->\n<!-- anomalies: end -->\n")
    return folder


@pytest.fixture
def zoo(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(models, "family", lambda name: Family)
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return tmp_path


def evaluated(zoo: Path, *names: str, images: int = 40, more: tuple[str, ...] = ()) -> int:
    given = [*(str(zoo / name) for name in names), "--anomalies", "--images", str(images)]
    return command.main(["evaluate", *given, "--work", str(zoo / "work"), "--page", str(zoo / "page.md"), *more])


@pytest.mark.slow
def test_an_evaluation_writes_its_page_and_goes_on_from_what_it_kept(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(zoo, "one", "bare") == 0
    assert "bare: left out: not calibrated" in capsys.readouterr().out
    found = json.loads((zoo / "page.json").read_text(encoding="utf-8"))["digits"]
    (one,) = found["scorers"].values()
    sets = {"horizontal flip", "noise σ = 12", "block swapped", "constant"}
    assert sets <= one["rows"][CALIBRATED].keys() == one["rows"][ONE_SIDED].keys() == found[COMPRESSED].keys()
    assert one["rows"][ONE_SIDED]["inverted"]["auroc"] > 0.9, "the toy's −log p is the sum of the levels"
    assert one["rows"][CALIBRATED]["constant"]["n"] == 40
    assert {a["alpha"] for a in one["false_alarms"]} == {0.01, 0.05} or one["calibration_n"] < 99
    assert (
        one["groups"]["5"][TYPICALITY].keys()
        == one["groups"]["10"][CALIBRATED].keys()
        == one["rows"][CALIBRATED].keys()
    )
    assert "--anomalies --images 40" in one["command"]
    page = (zoo / "page.md").read_text(encoding="utf-8")
    assert page.startswith("# Page\n\n<!-- anomalies: begin -->\n## Normal: digits\n")
    assert f"| one | **calibrated** | {one['rows'][CALIBRATED]['horizontal flip']['auroc']:.3f} |" in page

    scores, asked = scored.scores, []
    monkeypatch.setattr(scored, "scores", lambda model, x: asked.append(len(x)) or scores(model, x))
    assert evaluated(zoo, "one") == 0
    assert set(asked) == {scored.CHECKED}, "all was there"
    again = json.loads((zoo / "page.json").read_text(encoding="utf-8"))["digits"]["scorers"]["one"]
    assert again == one


def test_masks_are_counted_by_whether_they_show_anything_and_whether_it_is_what_was_changed() -> None:
    """Four images of 20×20 with a bright spot in one corner, in another, and none; the first corner was changed."""
    surprise, changed = np.zeros((4, 20, 20)), np.zeros((4, 20, 20), dtype=np.bool_)
    surprise[0, 2, 2] = surprise[1, 17, 17] = surprise[2, 17, 17] = 1000.0
    changed[:, :4, :4] = True
    one = np.ones((1, 20, 20))
    maps = Maps(0 * one, one, np.arange(100.0) / 100)
    scorer = SimpleNamespace(
        calibration=SimpleNamespace(maps=maps), surprise={"test": [surprise[[3]]], "spots": [surprise]}
    )
    subject = SimpleNamespace(odd=[anomalies.Odd("spots", np.zeros((4, 1, 20, 20), np.uint8), changed)])
    found = detect._pixels(cast(Any, scorer), cast(Any, subject))
    assert (found["sets"]["spots"]["lit"], found["sets"]["spots"]["hit"], found["lit"]) == (0.75, 0.25, 0.0)
    few = dataclasses.replace(maps, maxima=maps.maxima[:5])
    scorer.calibration.maps = few
    found = detect._pixels(cast(Any, scorer), cast(Any, subject))
    assert (found["sets"]["spots"]["lit"], found["sets"]["spots"]["hit"], found["lit"]) == (None, None, None)


@pytest.mark.slow
def test_an_ensemble_is_measured_by_its_own_calibration_and_pictures_are_drawn(zoo: Path) -> None:
    assert evaluated(zoo, "both", images=30, more=("--pictures",)) == 0
    (both,) = json.loads((zoo / "page.json").read_text(encoding="utf-8"))["digits"]["scorers"].values()
    packed = (zoo / "both" / "calibration.safetensors").read_bytes()
    assert both["calibration_sha256"] == hashlib.sha256(packed).hexdigest()
    assert both["rows"].keys() == {CALIBRATED}, "it has no likelihood of its own"
    assert {"one.nll_bits", "two.nll_bits", "complexity_bits"} <= set(both["statistics"])
    assert both["versions"].keys() == {"one", "two"}
    assert both["pixels"]["sets"].keys() == {"block swapped"}
    assert 0 <= both["pixels"]["sets"]["block swapped"]["auroc"] <= 1
    assert both["pixels"]["images"] == 30
    masked = both["pixels"]["sets"]["block swapped"]
    assert 0 <= masked["hit"] <= masked["lit"] <= 1, "what is hit is lit"
    for name in ("roc", "heatmaps"):
        picture = Image.open(zoo / "page" / f"{name}-both.png")
        assert len(picture.convert("L").getcolors() or []) > 2
    page = (zoo / "page.md").read_text(encoding="utf-8")
    assert "### Heat maps" in page
    assert f"| both | {both['pixels']['lit']:.4f} | {masked['lit']:.3f} ({masked['hit']:.3f}) |" in page
    assert "](page/roc-both.png)" in page
    assert "](page/heatmaps-both.png)" in page


def test_false_alarms_may_be_counted_among_more_normal_images_than_anomalies_are_held_against(zoo: Path) -> None:
    def measured(*more: str) -> dict[str, Any]:
        assert evaluated(zoo, "one", images=20, more=more) == 0
        (one,) = json.loads((zoo / "page.json").read_text(encoding="utf-8"))["digits"]["scorers"].values()
        return dict(one)

    few, many = measured(), measured("--normal", "60")
    assert {alarm["n"] for alarm in few["false_alarms"]} == {20}
    assert {alarm["n"] for alarm in many["false_alarms"]} == {60}
    for same in ("rows", "found", "groups", "images"):
        assert few[same] == many[same], "what anomalies are held against is the same"
    assert many["command"].endswith("--images 20 --normal 60")


def test_what_a_model_makes_of_the_class_that_it_was_trained_without_stands_in_a_table_of_its_own(zoo: Path) -> None:
    less = data.load("digits-without:0")
    _checkpoint.save(zoo / "less", Two(Config(), less.space), Config(), {"data": less.description, "metrics": {}})
    calibrate.run([zoo / "less"], None, None, Console(file=io.StringIO()))
    assert evaluated(zoo, "one", "less", images=20) == 0
    results = json.loads((zoo / "page.json").read_text(encoding="utf-8"))
    assert results.keys() == {"digits", less.name}
    found = results[less.name]["scorers"]["less"]["rows"]
    odd = "held-out class: 0"
    assert found[CALIBRATED][odd]["n"] == 20
    assert odd not in results["digits"]["scorers"]["one"]["rows"][CALIBRATED]
    whole, _, apart = (zoo / "page.md").read_text(encoding="utf-8").partition("## A class held out of training\n")
    assert "## Normal: digits\n" in whole
    assert less.name not in whole
    assert (
        f"| digits, 0 | less | {found[CALIBRATED][odd]['auroc']:.3f} | {found[ONE_SIDED][odd]['auroc']:.3f} |" in apart
    )


def test_an_ensemble_of_other_weights_is_refused(zoo: Path) -> None:
    about = json.loads((zoo / "two" / "model.json").read_text(encoding="utf-8"))
    about["files"]["weights.safetensors"] = "0" * 64
    (zoo / "two" / "model.json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(_checkpoint.CheckpointError, match="other weights of two"):
        detect.members(zoo / "both")


def test_what_cannot_be_measured_is_said_before_the_work(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluated(zoo, "bare") == 2
    assert "none is calibrated" in capsys.readouterr().err
    (zoo / "page.md").write_text("no markers")
    assert evaluated(zoo, "one") == 2
    assert "no lines '<!-- anomalies: begin -->'" in capsys.readouterr().err
    assert not (zoo / "work").exists()
    assert command.main(["evaluate", str(zoo / "one"), "--images", "3"]) == 2
    assert "images: only with --anomalies" in capsys.readouterr().err


def test_the_page_keeps_what_other_checkpoints_were_measured_to_do(tmp_path: Path) -> None:
    results: anomaly_page.Results = {}
    few, many = {"a": {"n": 5}}, {"a": {"n": 9}}
    anomaly_page.add(results, "digits", few, "one", {"x": 1})
    anomaly_page.add(results, "digits", many, "two", {"x": 2})
    anomaly_page.add(results, "digits", few, "one", {"x": 3})
    expected = {COMPRESSED: many, "scorers": {"one": {"x": 3}, "two": {"x": 2}}}
    assert results == {"digits": expected}, "the baseline is that of the most images"
    assert detect.NORMAL == "test"
