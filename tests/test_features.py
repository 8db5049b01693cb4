"""Feature vectors and how sources are combined: subspaces, tails, calibrations with both, and what families say."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from safetensors.numpy import save

from anomaly import combination, detectors, features
from anomaly.calibration import Calibration, CalibrationError, Described, calibrate, numbers, unpack
from anomaly.combination import Combination, Tails
from anomaly.ensembles import joined
from models._flow_model import MOST_CHANNELS, Products, count_moments
from models._pixels import by_tile_of, feature_sizes
from service.marginals import marginal
from service.messages import Scored, pack
from service.messages import unpack as unpack_message

F, K = 64, 4
AXES = scipy.linalg.hadamard(F)[1 : K + 1] / 8  # every number has the same part in each, so that scaling changes none


def near_a_subspace(n: int, seed: int) -> np.ndarray:
    """(n, F) around a subspace of K dimensions, with variances 9 in it and 0.04 beyond."""
    rng = np.random.default_rng(seed)
    return 3 * rng.standard_normal((n, K)) @ AXES + 0.2 * rng.standard_normal((n, F)) + 7


# ------------------------------------------------------------------------------------------------------------ subspaces


def test_the_subspace_is_found_and_tells_what_lies_in_it_from_what_lies_beyond() -> None:
    found, _ = features.fit(near_a_subspace(1200, 0))
    assert len(found.axes) == K
    fresh = near_a_subspace(800, 1)
    normal = found.distances(fresh)
    assert np.exp(normal).mean(axis=0) == pytest.approx([1, 1], abs=0.1), "in units of what is normal"
    far_in, far_out = found.distances(fresh + 40 * AXES[0]), found.distances(fresh + 2 * np.eye(F)[3])
    assert (far_in[:, 0] > normal[:, 0].max()).all()
    assert np.median(far_in[:, 1]) < np.quantile(normal[:, 1], 0.99)
    assert (far_out[:, 1] > np.quantile(normal[:, 1], 0.99)).all()
    assert np.median(np.abs(far_out[:, 0] - normal[:, 0])) < 0.3


def test_distances_of_the_fit_images_are_like_those_of_images_that_were_not_fitted_on() -> None:
    fitted = near_a_subspace(120, 2)
    found, held_out = features.fit(fitted)
    fresh = found.distances(near_a_subspace(2000, 3))
    own = found.distances(fitted)
    assert own[:, 1].mean() < fresh[:, 1].mean() - 0.02, "to its own subspace any image is too near"
    assert held_out[:, 1].mean() == pytest.approx(fresh[:, 1].mean(), abs=0.06)


def test_the_density_is_that_of_probabilistic_pca() -> None:
    x = near_a_subspace(600, 4)
    found, _ = features.fit(x)
    z = detectors.standardise({"median": found.median, "scale": found.scale}, x)
    rest = found.rest[0]
    covariance = rest * np.eye(F) + (found.axes.T * (found.variances - rest)) @ found.axes
    expected = scipy.stats.multivariate_normal(found.mean, covariance).logpdf(z)
    differ = found.log_density(x) - expected
    np.testing.assert_allclose(differ - differ[0], 0, atol=0.05)  # axes are rounded to half precision


def test_features_that_never_differ_and_few_of_them_are_borne() -> None:
    x = near_a_subspace(60, 6)
    x[:, 5] = 1.0
    found, held_out = features.fit(x)
    assert np.isfinite(held_out).all()
    assert np.isfinite(found.distances(x + 1)).all()
    two, held_out = features.fit(x[:, :2])
    assert len(two.axes) == 1
    assert np.isfinite(held_out).all()


# ---------------------------------------------------------------------------------------------------------------- tails


def test_a_surprisal_is_minus_log_of_the_share_above() -> None:
    rng = np.random.default_rng(0)
    fitted = combination.tails(rng.exponential(size=(4000, 1)))
    at = np.array([[0.2], [1.0], [2.5], [8.0], [30.0]])
    assert fitted.surprisals(at)[:, 0] == pytest.approx(at[:, 0], rel=0.12, abs=0.03), "P(X > x) = e^-x, far out too"


def test_a_surprisal_rises_everywhere_and_ends_with_what_is_no_number() -> None:
    fitted = combination.tails(np.random.default_rng(1).standard_normal((500, 2)))
    line = np.linspace(-6, 60, 4000)
    found = fitted.surprisals(np.stack([line, line], axis=1))
    assert (np.diff(found, axis=0) > 0).all()
    broken = fitted.surprisals(np.array([[np.nan, np.inf]]))
    assert (broken > found.max()).all()
    assert np.isfinite(broken).all()


def plain(n: int, s: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, s))


def test_sources_of_one_model_add_up_and_models_do_not_outvote_one_that_is_sure() -> None:
    none = np.empty((3000, 0, 2))
    one = combination.fit(plain(3000, 4, 0), none, np.zeros(4))
    two = combination.fit(plain(3000, 4, 0), none, np.array([0.0, 1, 1, 1]))
    normal = plain(3000, 4, 1)
    some, sure = normal + 1.2, normal + np.array([4.0, 0, 0, 0])

    def found(of: Combination, x: np.ndarray) -> float:
        known, scores = of.score(normal, none), of.score(x, none)
        return float(np.mean(scores > np.quantile(known, 0.99)))

    single = np.mean(some[:, 0] > np.quantile(normal[:, 0], 0.99))
    assert found(one, some) > 2 * single
    assert found(two, sure) > found(one, sure)
    by_hand = np.logaddexp.reduce(
        two.models.surprisals(combination.by_model(two.sources.surprisals(normal), two.owners)), axis=1
    )
    np.testing.assert_array_equal(two.score(normal, none), by_hand)


def test_the_score_of_a_single_source_ranks_as_the_source_does() -> None:
    values = plain(800, 1, 2)
    made = combination.fit(values, np.empty((800, 0, 2)), np.zeros(1))
    order = np.argsort(values[:, 0])
    assert (np.diff(made.score(values, np.empty((800, 0, 2)))[order]) > 0).all()


# --------------------------------------------------------------------------------------------------------- calibrations


def described(n: int, seed: int, odd: float = 0.0) -> list[Described]:
    rng = np.random.default_rng(seed + 100)
    vectors = (near_a_subspace(n, seed) + odd * np.eye(F)[3]).astype(np.float32)
    return [
        {"a": float(a), "excess_bits": float(b), "complexity_bits": float(c), "inner": vector}
        for (a, b, c), vector in zip(rng.standard_normal((n, 3)), vectors, strict=True)
    ]


@pytest.fixture(scope="module")
def made() -> Calibration:
    return calibrate(described(400, 0), described(400, 1), {"data": {"name": "made up"}})


def test_a_calibration_with_features_finds_what_statistics_do_not_say(made: Calibration) -> None:
    assert made.statistics == ("a", "complexity_bits", "excess_bits", "inner_beyond", "inner_within")
    fresh, odd = made.score(described(1500, 2)), made.score(described(200, 3, odd=3.0))
    alarms = np.mean([v.is_anomaly for v in made.judge(fresh, 0.05)])
    low, high = scipy.stats.betabinom(1500, 20, 381).ppf([0.001, 0.999]) / 1500
    assert low <= alarms <= high
    assert np.mean([v.is_anomaly for v in made.judge(odd, 0.05)]) > 0.95
    blind = calibrate([numbers(d) for d in described(400, 0)], [numbers(d) for d in described(400, 1)], {})
    assert np.mean([v.is_anomaly for v in blind.judge(blind.score(described(200, 3, odd=3.0)), 0.05)]) < 0.2


def test_a_calibration_with_features_comes_back_from_its_bytes_which_are_few(made: Calibration) -> None:
    again = unpack(made.pack())
    images = described(30, 4)
    np.testing.assert_array_equal(again.score(images), made.score(images))
    assert again.distances(images) == made.distances(images)
    assert again.pack() == made.pack()
    assert (again.kind, again.statistics) == (made.kind, made.statistics)
    assert len(made.pack()) < 400 * (8 + 3 * 2) + 12_000


def test_distances_are_told_by_name_and_only_where_there_is_a_vector(made: Calibration) -> None:
    with_, without = described(2, 5)
    found = made.distances([with_, numbers(without)])
    assert found[0].keys() == {"inner_within", "inner_beyond"}
    assert found[1] == {}


def test_features_that_are_missing_or_of_another_size_are_refused(made: Calibration) -> None:
    (image,) = described(1, 6)
    with pytest.raises(CalibrationError, match="statistics: inner missing"):
        made.score([numbers(image)])
    with pytest.raises(CalibrationError, match=r"inner of shape \(3,\) where the calibration has \(64,\)"):
        made.score([{**image, "inner": np.zeros(3)}])


def test_a_vector_of_no_numbers_is_as_anomalous_as_can_be(made: Calibration) -> None:
    (image,) = described(1, 7)
    broken = made.score([{**image, "inner": np.full(F, np.nan)}])
    assert np.isfinite(broken).all()
    assert broken[0] > made.scores[-1]


def test_members_have_a_detector_each_and_share_what_is_of_the_image() -> None:
    names = ["b", "b.c"]

    def of(n: int, seed: int) -> list[Described]:
        return [joined(names, both) for both in zip(described(n, seed), described(n, seed + 50), strict=True)]

    made = calibrate(of(300, 0), of(200, 1), {}, members=names)
    assert [set(group.statistics) for group in made.groups] == [
        {"b.a", "b.excess_bits", "complexity_bits"},
        {"b.c.a", "b.c.excess_bits", "complexity_bits"},
    ]
    owned = dict(zip([*made.directed, *made.subspaces], made.combination.owners[2:].tolist(), strict=True))
    assert owned == {"b.excess_bits": 0, "b.c.excess_bits": 1, "b.inner": 0, "b.c.inner": 1}
    assert unpack(made.pack()).pack() == made.pack()


@pytest.mark.parametrize("older", [1, 2])
def test_a_calibration_of_an_older_version_is_refused(older: int) -> None:
    """Its scores are other numbers: nothing is judged by them."""
    packed = save({"scores": np.zeros(100)}, metadata={"calibration": json.dumps({"format": older, "n": 100})})
    with pytest.raises(CalibrationError, match=f"format {older}; this version reads format 3: calibrate again"):
        unpack(packed)


# ------------------------------------------------------------------------------------------------------ what models say


def moments(z: torch.Tensor) -> torch.Tensor:
    return Products.of(z).moments


def test_moments_of_white_noise_and_of_what_is_not() -> None:
    white = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = moments(2 * white)
    assert found.shape == (2, count_moments(3)) == (2, 12)
    torch.testing.assert_close(found[:, :3], torch.full((2, 3), math.log(4)), atol=0.08, rtol=0)
    assert found[:, 3:].abs().max() < 0.08
    same = moments(white[:, :1].expand(2, 2, 64, 64))
    torch.testing.assert_close(same[:, -1], torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(moments(torch.full((1, 1, 4, 5), 3.0))[0, 1:], torch.ones(2), atol=1e-4, rtol=0)
    assert torch.equal(moments(torch.ones(1, 1, 1, 1))[0, 1:], torch.zeros(2))
    assert moments(torch.randn(1, MOST_CHANNELS + 1, 2, 2)).shape == (1, count_moments(MOST_CHANNELS + 1))


def test_tiles_cover_the_image() -> None:
    surprise, entropy = torch.randn(2, 4, 28, 21, generator=torch.Generator().manual_seed(1))
    found = by_tile_of(surprise, entropy)
    assert [part.shape for part in found] == [(4, size) for size in feature_sizes(28, 21).values()]
    torch.testing.assert_close(found[0].mean(dim=1), entropy.mean(dim=(1, 2)))
    torch.testing.assert_close(found[1].mean(dim=1), surprise.mean(dim=(1, 2)))
    torch.testing.assert_close(found[2].square().mean(dim=1), surprise.square().mean(dim=(1, 2)))
    assert feature_sizes(2, 3)["spread_by_tile"] == 6


def test_features_go_through_messages_and_means_over_labels() -> None:
    told = [Scored(k, log, features={"inner": np.float32([k, 1])}) for k, log in enumerate((math.log(3), 0.0))]
    again = unpack_message(pack(told[1]))
    assert isinstance(again, Scored)
    np.testing.assert_array_equal(again.features["inner"], np.float32([1, 1]))
    np.testing.assert_allclose(marginal(told, 0).scored.features["inner"], [0.25, 1])


def test_tails_of_nothing_are_borne() -> None:
    empty = combination.tails(np.empty((10, 0)))
    assert empty.surprisals(np.empty((3, 0))).shape == (3, 0)
    assert isinstance(empty, Tails)
