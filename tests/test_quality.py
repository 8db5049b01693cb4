"""Quality measures: closed forms, what identical sets must give, and planted copies that must be found."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor

from models import _checkpoint, boltzmann, consistency, vae
from models._protocol import UNLABELLED, Draw, ImageSpace
from training import measure, pictures, quality
from training.card import card
from training.data import Dataset, Split
from training.errors import DataError
from training.evaluate import Settings, evaluate, matched, metric
from training.features import FeatureConfig, FeatureSpace, feature_space


def gaussian(n: int, seed: int, dims: int = 8) -> Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------- Fréchet distance


@settings(deadline=None, max_examples=30)
@given(m1=st.floats(-5, 5), m2=st.floats(-5, 5), s1=st.floats(0, 5), s2=st.floats(0, 5), dims=st.integers(1, 6))
def test_frechet_of_round_gaussians_is_the_closed_form(m1: float, m2: float, s1: float, s2: float, dims: int) -> None:
    found = quality.gaussian_frechet(
        torch.full((dims,), m1), s1**2 * torch.eye(dims), torch.full((dims,), m2), s2**2 * torch.eye(dims)
    )
    assert found == pytest.approx(dims * ((m1 - m2) ** 2 + (s1 - s2) ** 2), abs=1e-4)


@pytest.mark.parametrize("rank", [2, 6])
def test_frechet_agrees_with_the_matrix_square_root(rank: int) -> None:
    a, b = gaussian(6, 1, rank).double(), gaussian(6, 2).double()
    cov1, cov2, zero = a @ a.T, b @ b.T, torch.zeros(6)
    root = sqrtm((cov1 @ cov2).numpy())
    expected = float(cov1.trace() + cov2.trace() - 2 * np.trace(root).real)
    assert quality.gaussian_frechet(zero, cov1, zero, cov2) == pytest.approx(expected, abs=1e-5)
    assert quality.gaussian_frechet(zero, cov2, zero, cov1) == pytest.approx(expected, abs=1e-5)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_grows_with_a_shift() -> None:
    a, b = gaussian(500, 1), gaussian(500, 2)
    assert quality.frechet_distance(a, a) < 1e-6
    floor = quality.frechet_distance(a, b)
    assert 0 < floor < 0.3
    shifted = [quality.frechet_distance(a, b + shift) for shift in (0.5, 1.0)]
    assert shifted[0] == pytest.approx(8 * 0.25, rel=0.3)
    assert shifted[1] == pytest.approx(8 * 1.0, rel=0.3)


# ------------------------------------------------------------------------------------------------- density and coverage


def test_identical_sets_have_density_and_coverage_one() -> None:
    found = quality.density_coverage(gaussian(700, 3), gaussian(700, 3))
    assert found.density == pytest.approx(1, abs=1e-3)
    assert found.coverage == 1


def test_fresh_sets_of_one_distribution_have_both_near_one() -> None:
    found = quality.density_coverage(gaussian(1000, 3), gaussian(1000, 4))
    assert found.density == pytest.approx(1, abs=0.08)
    assert found.coverage > 1 - 2.0**-quality.NEAREST - 0.03  # its expectation, eq. 8 of the paper


def test_coverage_sees_a_lost_mode_and_density_sees_crowding() -> None:
    real = gaussian(1000, 5)
    real[:400] += 50
    kept = gaussian(1000, 6)
    lost = quality.density_coverage(real, kept)
    assert lost.coverage == pytest.approx(0.6, abs=0.04)
    crowded = quality.density_coverage(real, 0.3 * kept)
    assert crowded.density > 1.3
    far = quality.density_coverage(real, kept + 1000)
    assert (far.density, far.coverage) == (0, 0)


def test_density_and_coverage_are_what_their_definition_says() -> None:
    real, fake, k = gaussian(20, 7, 2), gaussian(15, 8, 2), 3
    within = [[float((x - y).norm()) < sorted(float((x - z).norm()) for z in real)[k] for y in fake] for x in real]
    found = quality.density_coverage(real, fake, k)
    assert found.density == pytest.approx(sum(map(sum, within)) / (k * len(fake)))
    assert found.coverage == pytest.approx(sum(map(any, within)) / len(real))


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="real: 5 images"):
        quality.density_coverage(gaussian(5, 1), gaussian(9, 2))


# ------------------------------------------------------------------------------------------------ distances, and copies


def test_distances_are_exact_and_zero_between_copies() -> None:
    a = gaussian(150, 1, 50) + 30  # far from the origin, where |a|² + |b|² − 2ab cancels
    b = torch.cat([gaussian(200, 2, 50) + 30, a[:100]])
    b[-1] += 1e-3
    naive = (a.double()[:, None] - b.double()).square().sum(dim=2).sqrt()
    found = quality.distances(a, b)
    torch.testing.assert_close(found, naive, check_dtype=False, rtol=1e-2, atol=1e-6)
    assert (found[torch.arange(99), 200 + torch.arange(99)] == 0).all()
    values, index = quality.nearest(a, b, 3)
    torch.testing.assert_close(values, naive.topk(3, largest=False).values, check_dtype=False, rtol=1e-2, atol=1e-6)
    assert (index[:99, 0] == 200 + torch.arange(99)).all()


TRAIN, UNSEEN = gaussian(3000, 10), gaussian(1000, 11)


def test_fresh_samples_do_not_count_as_copies() -> None:
    found = quality.memorisation(gaussian(500, 12), TRAIN, UNSEEN)
    assert found.p_value > 0.01
    assert found.share < 0.01


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_planted_copies_fire(noise: float) -> None:
    samples = gaussian(500, 12)
    planted = torch.arange(0, 500, 50)  # one in fifty
    samples[planted] = TRAIN[planted] + noise * gaussian(len(planted), 13)
    found = quality.memorisation(samples, TRAIN, UNSEEN)
    assert found.p_value < 1e-4
    assert (found.ratio[planted] < found.threshold).float().mean() > 0.9
    assert (found.neighbours[planted, 0] == planted).all()
    assert torch.isin(found.ratio.argsort()[: len(planted)], planted).float().mean() > 0.8


def test_blurred_samples_are_no_copies_though_they_are_near() -> None:
    """Averages of a few fresh images lie nearer to the training images than images do, but to none in particular."""
    blurred = gaussian(2000, 14).view(500, 4, -1).mean(dim=1)
    assert quality.nearest(blurred, TRAIN, 1)[0].mean() < 0.9 * quality.nearest(UNSEEN, TRAIN, 1)[0].mean()
    assert quality.memorisation(blurred, TRAIN, UNSEEN).p_value > 0.01


def test_p_values_are_valid_under_the_null() -> None:
    train = gaussian(600, 20, 3)
    p = [quality.memorisation(gaussian(100, 100 + i, 3), train, gaussian(300, 500 + i, 3)).p_value for i in range(120)]
    for alpha in (0.05, 0.2):
        share = float(np.mean(np.array(p) <= alpha))
        assert share <= alpha + 3 * (alpha * (1 - alpha) / len(p)) ** 0.5


# ------------------------------------------------------------------------------------------------------------- features

SMALL = FeatureConfig(width=8, features=16)


@pytest.fixture(scope="module")
def digit_space(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureSpace, Path]:
    folder = tmp_path_factory.mktemp("features")
    return feature_space(digits, SMALL, folder), folder


def test_label_agreement_of_real_images_is_the_networks_accuracy(
    digits: Dataset, digit_space: tuple[FeatureSpace, Path]
) -> None:
    space, test = digit_space[0], digits.splits["test"]
    features, predicted, confidence = space.describe(test.x)
    assert features.shape == (len(test), 16)
    assert ((confidence > 0.1 - 1e-6) & (confidence <= 1)).all()  # the largest of ten
    assert confidence.mean() > 0.8
    nothing = space.describe(np.random.default_rng(0).integers(0, 256, test.x.shape, dtype=np.uint8))
    assert nothing.confidence.mean() < confidence.mean()
    assert space.task == "labels"
    assert float((predicted.numpy() == test.labels).mean()) == pytest.approx(space.accuracy)
    assert space.accuracy > 0.9


def test_the_feature_network_is_cached_and_much_the_same_when_trained_again(
    digits: Dataset, digit_space: tuple[FeatureSpace, Path], tmp_path: Path
) -> None:
    space, folder = digit_space
    steps: list[int] = []
    report: Callable[[int, int], None] = lambda done, total: steps.append(done)  # noqa: E731
    cached = feature_space(digits, SMALL, folder, report)
    assert not steps
    assert (cached.sha256, cached.accuracy) == (space.sha256, space.accuracy)
    again = feature_space(digits, SMALL, tmp_path, report)
    assert len(steps) >= 400
    # Not bit for bit: sums on a CPU follow how memory happens to be aligned, and 400 steps amplify it.
    assert again.accuracy == pytest.approx(space.accuracy, abs=0.03)
    agree = again.describe(digits.splits["test"].x).predicted == space.describe(digits.splits["test"].x).predicted
    assert agree.double().mean() > 0.95


def test_without_labels_the_network_learns_rotations(digits: Dataset, tmp_path: Path) -> None:
    bare = {
        name: Split(split.x[:300], np.full(len(split.x[:300]), UNLABELLED)) for name, split in digits.splits.items()
    }
    data = Dataset("bare", ImageSpace(8, 8, 1), bare, "bare")
    space = feature_space(data, SMALL, tmp_path)
    assert space.task == "rotations"
    assert space.accuracy > 0.5  # a quarter by chance
    assert space.describe(bare["test"].x).features.shape == (len(bare["test"]), 16)


@pytest.mark.slow
@pytest.mark.realdata
def test_the_feature_network_knows_clothes(fashion_mnist: Dataset) -> None:
    assert feature_space(fashion_mnist).accuracy >= 0.91


# ------------------------------------------------------------------------------------------------- measuring, the whole


def tiny_vae(space: ImageSpace) -> tuple[vae.Model, vae.Config]:
    torch.manual_seed(0)
    config = vae.Config(latent=2, width=4, blocks=0, hidden=8, components=1, importance_samples=2)
    return vae.Model(config, space), config


def test_draws_take_the_classes_in_turn_at_the_default_settings(digits: Dataset) -> None:
    model, _ = tiny_vae(digits.space)
    asked = measure.draws(model.spec, 12, seed=3)
    assert [draw.label for draw in asked] == [*range(10), 0, 1]
    assert asked[5] == Draw(seed=3, sample=5, steps=1, solver="mean", label=5, temperature=1.0)


def test_samples_do_not_depend_on_how_they_are_batched(digits: Dataset) -> None:
    model, _ = tiny_vae(digits.space)
    asked = measure.draws(model.spec, 7, seed=3)
    whole = measure.sample(model, asked, 7)
    assert whole.dtype == np.uint8
    assert np.array_equal(whole, measure.sample(model, asked, 3))


def test_a_likelihood_is_measured_on_the_first_images(digits: Dataset) -> None:
    model, _ = tiny_vae(digits.space)
    test = digits.splits["test"]
    whole = measure.log_probs(model, test, labelled=True, limit=10_000)
    assert len(whole.values) == len(test)
    few = measure.log_probs(model, test, labelled=True, limit=20, batch=7)
    np.testing.assert_allclose(few.values, whole.values[:20], rtol=1e-5)
    assert not np.allclose(few.values, measure.log_probs(model, test, labelled=False, limit=20).values)


def test_the_error_of_an_estimate_is_measured_with_it(digits: Dataset) -> None:
    model = boltzmann.Model(boltzmann.Config(hidden=(4,), chains=10, particles=2), digits.space)
    with torch.no_grad():
        model.log_z.copy_(torch.tensor([0.0, 0.3, 0.4])[:, None])
    found = measure.log_probs(model, digits.splits["test"], labelled=True, limit=9, batch=4)
    np.testing.assert_allclose(found.stderr, [0.5] * 9, rtol=1e-6)


def test_sets_of_real_images_are_disjoint_and_of_the_same_classes(digits: Dataset) -> None:
    train = digits.splits["train"]
    labels = np.array([0, 1, 2, 2, 2, 9] * 5)
    sets = matched(train, labels, 4)
    assert len(sets) == 4
    for index in sets:
        assert np.array_equal(np.sort(train.labels[index]), np.sort(labels))
    assert len(np.unique(np.concatenate(sets))) == 4 * len(labels)
    any_class = matched(train, np.full(300, UNLABELLED), 99)
    assert len(any_class) == len(train) // 300
    assert len(np.unique(np.concatenate(any_class))) == 300 * len(any_class)


def test_a_floor_of_matched_classes_is_lower_than_one_of_random_classes() -> None:
    """Clusters far apart, as classes are: the shares of the classes alone make a distance."""
    labels = torch.randint(0, 4, (4000,), generator=torch.Generator().manual_seed(1))
    features = gaussian(4000, 2, 4) + 10 * torch.eye(4)[labels]
    split = Split(np.zeros((4000, 1, 1, 1), np.uint8), labels.numpy())

    def floor(asked: np.ndarray[tuple[int], np.dtype[np.int64]]) -> float:
        real, *others = (features[index] for index in matched(split, asked, 8))
        return float(np.mean([quality.frechet_distance(real, other) for other in others]))

    assert floor(np.arange(400) % 4) < 0.5 * floor(np.full(400, UNLABELLED))


def test_a_model_without_labels_has_no_label_agreement(digits: Dataset, tmp_path: Path) -> None:
    """Even where its data has labels. And what a likelihood took long to measure can be kept."""
    model, config = tiny_vae(ImageSpace(8, 8, 1))
    old: dict[str, object] = {"value": 5.0, "unit": "bits/dim", "direction": "lower", "data": "kept", "n": 1}
    about = {"data": digits.description, "metrics": {"bits_per_dim": old, "label_agreement": old}}
    _checkpoint.save(tmp_path / "model", model, config, about)
    few = Settings(samples=60, unseen=100, only="quality")
    metrics = evaluate(tmp_path / "model", settings=few, features_dir=tmp_path / "features")
    assert "label_agreement" not in metrics
    assert metrics["bits_per_dim"] == old
    assert "bits_per_dim_gap" not in metrics
    assert not any(name.startswith("images_per_second") for name in metrics)
    assert evaluate(tmp_path / "model", settings=Settings(only="speed")) == {
        **metrics,
        **{f"images_per_second_batch_{n}": ANY for n in (1, 16)},
    }


@pytest.fixture(scope="module")
def measured(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """A checkpoint of a model that has learnt nothing, measured."""
    folder = tmp_path_factory.mktemp("digits-vae")
    model, config = tiny_vae(digits.space)
    _checkpoint.save(folder, model, config, {"data": digits.description, "metrics": {}})
    few = Settings(samples=100, train_images=64, evaluations=100, unseen=200)
    metrics = evaluate(folder, settings=few, features_dir=tmp_path_factory.mktemp("features"))
    return folder, dict(metrics)


def test_evaluation_writes_metrics_pictures_and_a_card(measured: tuple[Path, dict[str, object]]) -> None:
    folder, metrics = measured
    about = _checkpoint.read_about(folder)
    assert about["metrics"] == json.loads(json.dumps(metrics))
    assert metrics.keys() == {
        "bits_per_dim",
        "bits_per_dim_given_label",
        "bits_per_dim_gap",
        "fd_local",
        "density",
        "coverage",
        "label_agreement",
        "label_confidence",
        "reconstruction_fd_local",
        "memorised",
        "images_per_second_batch_1",
        "images_per_second_batch_16",
    }
    for entry in about["metrics"].values():
        assert entry.keys() >= {"value", "unit", "direction", "data", "n"}
        assert entry["direction"] in {"higher", "lower"}
        assert entry["n"] > 0
    assert about["metrics"]["bits_per_dim"]["n"] == 100, "as many as the evaluations allow"
    assert about["metrics"]["bits_per_dim"]["kind"] == "bound"
    assert about["metrics"]["bits_per_dim"]["note"] == "importance-weighted, S=2"
    assert {"samples.png", "neighbours.png", "README.md"} <= about["files"].keys()
    _checkpoint.load(folder)  # the hashes are those of the files


def test_a_model_of_few_steps_is_measured_at_each_power_of_two(digits: Dataset, tmp_path: Path) -> None:
    config = consistency.Config(channels=8, multipliers=(1,), max_steps=5)
    torch.manual_seed(0)
    model = consistency.Model(config, digits.space)
    _checkpoint.save(tmp_path / "m", model, config, {"data": digits.description, "metrics": {}})
    metrics = evaluate(tmp_path / "m", settings=Settings(samples=60, unseen=100), features_dir=tmp_path / "features")
    by_steps = {name: entry["steps"] for name, entry in metrics.items() if name.endswith("_steps")}
    assert by_steps == {f"{name}_{k}_steps": k for k in (2, 4) for name in ("fd_local", "label_agreement")}
    assert metrics["fd_local_2_steps"]["value"] != metrics["fd_local"]["value"]


@torch.inference_mode()
def test_reconstructions_are_of_the_split_in_its_order(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_vae(digits.space)
    monkeypatch.setattr(type(model), "reconstruct", lambda self, x, labels: x)
    part = digits.splits["test"].take(np.arange(50))
    np.testing.assert_array_equal(measure.reconstructions(model, part, 16), part.x)


def test_a_model_that_learnt_nothing_is_measured_as_such(measured: tuple[Path, dict[str, object]]) -> None:
    about = _checkpoint.read_about(measured[0])["metrics"]
    assert about["fd_local"]["value"] > 10 * about["fd_local"]["real"]
    assert about["coverage"]["value"] < 0.2 < about["coverage"]["real"]
    assert about["label_agreement"]["value"] < 0.3 < about["label_agreement"]["real"]
    assert about["memorised"]["p_value"] > 0.01
    assert about["reconstruction_fd_local"]["value"] > 10 * about["reconstruction_fd_local"]["real"]


def test_the_card_says_what_model_json_says(measured: tuple[Path, dict[str, object]]) -> None:
    folder, _ = measured
    about = _checkpoint.read_about(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text == card(folder.name, about)
    for name, entry in about["metrics"].items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {name.replace('_', ' ')} |")]
        assert f"{entry['value']:.4g}" in line
        assert entry["unit"] in line
    assert "importance-weighted, S=2" in text
    for field in about["spec"]["accepts"]:
        assert f"| {field} |" in text


def test_other_data_than_the_model_was_trained_on_is_refused(digits: Dataset, tmp_path: Path) -> None:
    model, config = tiny_vae(digits.space)
    other = {**digits.description, "sha256": "0" * 64}
    _checkpoint.save(tmp_path, model, config, {"data": other, "metrics": {}})
    with pytest.raises(DataError, match="not the data"):
        evaluate(tmp_path)


def test_a_metric_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="nan"):
        metric(float("nan"), "bits/dim", "lower", "digits test", 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_shows_every_image_in_its_place(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 255, (6, channels, 20, 30), dtype=np.uint8)
    bare = np.asarray(Image.open(io.BytesIO(pictures.sheet(images, 3))))
    assert bare.ndim == (2 if channels == 1 else 3)
    scale = pictures.SMALL // 30
    for i, image in enumerate(images):
        top = pictures.GAP + i // 3 * (20 * scale + pictures.GAP)
        left = bare.shape[1] - (3 - i % 3) * (30 * scale + pictures.GAP)
        tile = bare[top : top + 20 * scale : scale, left : left + 30 * scale : scale]
        assert np.array_equal(tile, image[0] if channels == 1 else image.transpose(1, 2, 0))
    labelled = Image.open(io.BytesIO(pictures.sheet(images, 3, ["first", "second"])))
    assert labelled.width > bare.shape[1]
    assert labelled.height == bare.shape[0]


def test_samples_that_take_different_numbers_of_steps_all_finish() -> None:
    from toys import Config, Walk

    model = Walk(Config(), ImageSpace(2, 2, 1))
    asked = [
        dataclasses.replace(draw, steps=steps)
        for draw, steps in zip(measure.draws(model.spec, 4, 1), (3, 1, 5, 1), strict=True)
    ]
    together = measure.sample(model, asked, 4)
    assert np.array_equal(together, np.concatenate([measure.sample(model, [draw], 1) for draw in asked]))
