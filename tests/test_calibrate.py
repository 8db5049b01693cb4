"""python -m training calibrate: one model, several together, and what is refused."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from servers import Server

import models
from anomaly import ensembles
from anomaly.calibration import unpack
from models import _checkpoint
from models._protocol import Batch
from training import calibrate, data
from training.__main__ import main


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of digits that are learnt in a moment."""
    folder, digits = tmp_path_factory.mktemp("zoo"), data.load("digits")
    train = digits.splits["train"]
    batch = Batch(torch.from_numpy(train.x).float() / 255, torch.from_numpy(train.labels))
    for name, given in (("gaussian", {}), ("bayesnet", {"bins": 4})):
        family = models.family(name)
        config = family.Config(**given)
        model = family.Model(config, digits.space)
        with torch.no_grad():
            model.prepare([batch])
        _checkpoint.save(folder / name, model, config, {"data": digits.description, "metrics": {}})
    return folder


def test_a_calibration_has_scores_and_maps_and_brings_the_spec_up_to_date(zoo: Path) -> None:
    about = _checkpoint.read_about(zoo / "gaussian")
    _checkpoint.update(
        zoo / "gaussian", {"spec": {**about["spec"], "likelihood": None}}
    )  # as an older version wrote it
    assert main(["calibrate", str(zoo / "gaussian")]) == 0
    made = unpack(_checkpoint.read_file(zoo / "gaussian", "calibration.safetensors"))
    splits = data.load("digits").splits
    assert made.n == len(splits["calibration"]) == len(made.scores)
    assert "mahalanobis" in made.statistics
    model = _checkpoint.load(zoo / "gaussian")
    np.testing.assert_allclose(made.scores, np.sort(made.score(calibrate.described(model, splits["calibration"].x))))
    assert made.maps is not None
    heights = made.maps.heights([calibrate.surprises(model, splits["calibration"].x)])
    np.testing.assert_allclose(made.maps.maxima, np.sort(heights.max(axis=(1, 2))))
    spec = _checkpoint.read_about(zoo / "gaussian")["spec"]
    assert spec == json.loads(json.dumps(model.spec.to_json()))


def test_several_are_calibrated_together_over_the_statistics_of_all(zoo: Path) -> None:
    out = zoo / "both"
    assert main(["calibrate", str(zoo / "gaussian"), str(zoo / "bayesnet"), "--out", str(out)]) == 0
    found = ensembles.unpack((out / "ensemble.json").read_bytes())
    weights = [_checkpoint.read_about(zoo / name)["files"]["weights.safetensors"] for name in ("gaussian", "bayesnet")]
    assert [(m.name, m.weights_sha256) for m in found.members] == list(
        zip(["gaussian", "bayesnet"], weights, strict=True)
    )
    assert found.order(weights[::-1]) == (1, 0)
    assert found.order(weights[:1]) is None
    made = unpack((out / "calibration.safetensors").read_bytes())
    assert made.sha256 == found.calibration_sha256
    assert {"gaussian.nll_bits", "bayesnet.worst_tile", "complexity_bits"} <= set(made.statistics)
    assert made.maps is not None
    assert len(made.maps.centre) == 2


@pytest.mark.parametrize(
    ("names", "out", "message"),
    [
        (("gaussian", "bayesnet"), None, "a folder of its own: name one"),
        (("gaussian",), "alone", "is for several checkpoints"),
        (("gaussian", "bayesnet"), "gaussian", "is a model's folder"),
        (("gaussian", "gaussian"), "twice", "have the same name"),
    ],
)
def test_what_is_no_ensemble_is_refused_before_any_work(
    zoo: Path, names: tuple[str, ...], out: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [] if out is None else ["--out", str(zoo / out)]
    assert main(["calibrate", *(str(zoo / name) for name in names), *where]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_too_few_images_and_copies_are_told_before_any_work(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = data.load("digits").splits["train"].x[:130]

    def calibrated_on(name: str, x: np.ndarray) -> int:
        np.savez(tmp_path / name, images=x[:, 0])
        return main(["calibrate", str(zoo / "gaussian"), "--data", f"npz:{tmp_path / name}"])

    assert calibrated_on("few.npz", x[:40]) == 2
    assert "40 distinct images; a calibration takes at least 100" in capsys.readouterr().err.replace("\n", " ")
    assert calibrated_on("same.npz", np.repeat(x[:1], 150, axis=0)) == 2
    told = capsys.readouterr()
    assert "149 images are copies of others; each is taken once, which leaves 1" in told.out.replace("\n", " ")
    assert "scoring" not in told.out
    assert calibrated_on("copies.npz", np.concatenate([x, x[:7]])) == 0
    made = unpack(_checkpoint.read_file(zoo / "gaussian", "calibration.safetensors"))
    assert made.n == made.about["fit_n"] == 65, "copies stand on neither side"


def test_where_images_are_dear_the_first_of_both_splits_do(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(zoo / "gaussian"), "--images", "60"]) == 0
    made = unpack(_checkpoint.read_file(zoo / "gaussian", "calibration.safetensors"))
    assert made.n == made.about["fit_n"] == 60
    x = data.load("digits").splits["calibration"].x[:60]
    np.testing.assert_allclose(
        made.scores, np.sort(made.score(calibrate.described(_checkpoint.load(zoo / "gaussian"), x)))
    )
    assert main(["calibrate", str(zoo / "gaussian"), "--images", "49"]) == 2
    assert "images: 49; a calibration takes at least 50, and as many to fit on" in capsys.readouterr().err


def test_other_classes_of_the_same_images_are_calibrated_on_what_was_not_trained_on_either(zoo: Path) -> None:
    """A model of all digits on all but one class, and the other way round."""
    for trained, given in (("digits", "digits-without:7"), ("digits-without:7", "digits")):
        _checkpoint.update(zoo / "gaussian", {"data": data.load(trained).description})
        assert main(["calibrate", str(zoo / "gaussian"), "--data", given]) == 0
        made = unpack(_checkpoint.read_file(zoo / "gaussian", "calibration.safetensors"))
        splits = data.load(given).splits
        assert (made.about["fit_n"], made.n) == (len(splits["fit"]), len(splits["calibration"]))
    _checkpoint.update(zoo / "gaussian", {"data": data.load("digits").description})


def test_a_folder_that_has_grown_since_it_was_trained_on_is_told_and_not_taken_unasked(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, before = data.load("digits").splits["train"].x, _checkpoint.read_about(zoo / "gaussian")["data"]
    name = f"npz:{tmp_path / 'line.npz'}"
    np.savez(tmp_path / "line.npz", images=x[:260, 0])
    try:
        for trained_on, told in (("npz:another", False), (name, True)):
            _checkpoint.update(zoo / "gaussian", {"data": {"name": trained_on, "sha256": "0" * 64}})
            assert main(["calibrate", str(zoo / "gaussian"), "--data", name]) == 0
            assert ("must not be there now" in capsys.readouterr().out.replace("\n", " ")) == told
        assert main(["calibrate", str(zoo / "gaussian")]) == 2
        assert "--data names images that were not trained on" in capsys.readouterr().err.replace("\n", " ")
    finally:
        _checkpoint.update(zoo / "gaussian", {"data": before})


@pytest.mark.parametrize(
    ("pointer", "told"), [(None, False), ('{"version": 0}', False), ('{"version": 2}', True), ("", True)]
)
def test_that_another_calibration_is_in_use_where_it_is_served_is_told(
    zoo: Path, pointer: str | None, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = zoo / "gaussian" / "calibrations" / "current.json"
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if pointer is not None:
        path.write_text(pointer)
    assert main(["calibrate", str(zoo / "gaussian"), "--images", "60"]) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert ("PUT /models/gaussian/calibration with version 0" in out) == told
    path.unlink(missing_ok=True)


@pytest.mark.parametrize("broken", [b"", b"[]", b'{"format": 2}', b'{"format": 1, "members": [{}], "files": {}}'])
def test_what_is_no_ensemble_file_is_refused(broken: bytes) -> None:
    with pytest.raises(ensembles.CalibrationError, match=r"ensemble\.json"):
        ensembles.unpack(broken)


@pytest.mark.slow
def test_a_server_judges_draws_maps_and_takes_members_together(zoo: Path) -> None:
    """The real thing, from the command line to the answer: what it says is what the calibrations say here."""
    members = ["bayesnet", "gaussian"]
    for name in members:
        assert main(["calibrate", str(zoo / name)]) == 0
    assert main(["calibrate", *(str(zoo / name) for name in members), "--out", str(zoo / "both")]) == 0
    x = data.load("digits").splits["test"].x[:6].copy()
    x[3:, :, 2:6, 2:6] = 255 - x[3:, :, 2:6, 2:6]
    content = []
    for image in x:
        out = io.BytesIO()
        np.save(out, image[0])
        content.append(base64.b64encode(out.getvalue()).decode())
    server = Server(zoo, zoo.parent / "serve.log", devices="cpu")
    try:
        server.wait_for("/readyz")
        body = {"images": content, "alpha": 0.05, "heatmap": True}
        asked = ("gaussian", members[::-1])
        alone, together = (server.client.post("/score", json={**body, "model": who}).json() for who in asked)
    finally:
        server.close()
    assert alone["warnings"] == together["warnings"] == []
    models_ = [_checkpoint.load(zoo / name) for name in members]
    each = [calibrate.described(model, x) for model in models_]
    surprise = [calibrate.surprises(model, x) for model in models_]
    made = unpack((zoo / "both" / "calibration.safetensors").read_bytes())
    joined = [ensembles.joined(members, of_image) for of_image in zip(*each, strict=True)]
    assert [r["anomaly"]["score"] for r in together["results"]] == pytest.approx(made.score(joined).tolist(), rel=1e-4)
    own = unpack((zoo / "gaussian" / "calibration.safetensors").read_bytes())
    assert [r["anomaly"]["score"] for r in alone["results"]] == pytest.approx(own.score(each[1]).tolist(), rel=1e-4)
    assert together["results"][0]["members"]["gaussian"]["anomaly"] == alone["results"][0]["anomaly"]
    for answer, maps, seen in ((together, made.maps, surprise), (alone, own.maps, surprise[1:])):
        assert maps is not None
        expected = maps.picture(maps.heights(seen))
        shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(r["heatmap"])))) for r in answer["results"]]
        assert np.abs(np.stack(shown).astype(int) - expected).max() <= 1
