"""p-values and what they promise; detectors; calibrations as files."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load as parse
from sklearn.covariance import LedoitWolf

from anomaly import calibration, conformal, detectors, sizes
from anomaly.calibration import Calibration, CalibrationError, calibrate, describe, unpack
from anomaly.complexity import compressed_bits


def normal_scores(n: int, seed: int = 0) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).standard_normal(n))


@given(
    calibration=st.lists(st.floats(-5, 5), min_size=1, max_size=40),
    score=st.one_of(st.floats(-6, 6), st.just(math.inf), st.just(math.nan)),
)
def test_a_p_value_counts_what_it_says(calibration: list[float], score: float) -> None:
    p = float(conformal.p_values(np.sort(np.array(calibration)), np.array([score]))[0])
    assert p == (1 + sum(c >= score for c in calibration)) / (len(calibration) + 1)
    assert 0 < p <= 1


@given(n=st.integers(1, 2000), alpha=st.floats(1e-4, 0.5))
def test_an_anomaly_is_exactly_a_p_value_of_at_most_alpha(n: int, alpha: float) -> None:
    k = conformal.rank(n, alpha)
    assert k / (n + 1) <= alpha * (1 + 1e-9)
    assert (k + 1) / (n + 1) > alpha * (1 - 1e-9)
    assert (k == 0) == (n < conformal.needed(alpha))


@given(n=st.integers(1, 3000), ulps=st.integers(1, 5))
def test_an_alpha_just_below_1_leaves_the_most_usual_image_normal(n: int, ulps: int) -> None:
    """No rank is n + 1, whose threshold would be that of rank 1: p = 1 is above every alpha there is."""
    alpha = 1.0
    for _ in range(ulps):
        alpha = math.nextafter(alpha, 0)
    assert conformal.rank(n, alpha) == n
    assert not conformal.discoveries(np.ones(3), alpha).any()


@given(a=st.integers(1, 40), b=st.integers(1, 4000), x=st.floats(0, 1))
def test_the_beta_law_is_scipys(a: int, b: int, x: float) -> None:
    assert conformal.beta_cdf(x, a, b) == pytest.approx(scipy.stats.beta.cdf(x, a, b), abs=1e-9)


def test_the_bounds_of_the_docs() -> None:
    assert conformal.upper_bound(1000, conformal.rank(1000, 0.01)) == pytest.approx(0.0157, abs=5e-5)
    k = conformal.rank_with_confidence(1000, 0.01, 0.95)
    assert k == 5
    assert scipy.stats.beta.cdf(0.01, k, 1001 - k) >= 0.95 > scipy.stats.beta.cdf(0.01, k + 1, 1000 - k)
    assert conformal.needed_with_confidence(0.01, 0.95) == 299
    assert conformal.rank_with_confidence(299, 0.01, 0.95) == 1
    assert conformal.rank_with_confidence(298, 0.01, 0.95) == 0


@pytest.mark.parametrize(("n", "alpha"), [(2_000, 0.01), (2_000, 0.9), (25_000, 0.5)])
def test_a_promise_is_worked_out_while_a_request_waits(n: int, alpha: float) -> None:
    """On the event loop, and anew for every alpha: at an alpha of 0.9 it took seconds."""
    began = time.process_time()
    k = conformal.rank_with_confidence(n, alpha, 0.95)
    assert time.process_time() - began < 0.25
    assert conformal.upper_bound(n, k) <= alpha < conformal.upper_bound(n, k + 1)


@given(
    alpha=st.floats(2e-3, 0.9),
    confidence=st.one_of(st.floats(0.01, 0.999), st.sampled_from([1 - 1e-6, 1 - 1e-10, 1 - 1e-14])),
)
def test_the_number_of_images_that_a_promise_takes_is_the_least(alpha: float, confidence: float) -> None:
    """And is told right where a small confidence promises less than alpha alone takes."""
    n = conformal.needed_with_confidence(alpha, confidence)
    assert conformal.rank_with_confidence(n, alpha, confidence) > 0
    assert n == 1 or conformal.rank_with_confidence(n - 1, alpha, confidence) == 0


@pytest.mark.parametrize("share", [5e-324, 1e-310, 1e-200, 1e-17])
def test_shares_that_no_number_of_images_could_serve_are_told_as_a_number(share: float) -> None:
    for needed in (
        conformal.needed(share),
        conformal.needed_with_confidence(share, 0.95),
        conformal.fewest(99, 10, share),
    ):
        assert 10**15 < needed <= 10**18


def test_false_alarm_rates_over_calibrations_follow_the_beta_law() -> None:
    """1,000 calibrations of 500 scores: the true rate of each is known, since scores are standard normal."""
    rng = np.random.default_rng(0)
    n, alpha = 500, 0.05
    k = conformal.rank(n, alpha)
    rates = [scipy.stats.norm.sf(conformal.threshold(np.sort(rng.standard_normal(n)), k)) for _ in range(1000)]
    assert scipy.stats.kstest(rates, scipy.stats.beta(k, n + 1 - k).cdf).pvalue > 0.01
    bound = conformal.upper_bound(n, k)
    assert np.mean(np.array(rates) <= bound) == pytest.approx(0.95, abs=0.02)
    promised = conformal.rank_with_confidence(n, alpha, 0.95)
    kept = [scipy.stats.norm.sf(conformal.threshold(normal_scores(n, 1000 + s), promised)) for s in range(1000)]
    assert np.mean(np.array(kept) <= alpha) >= 0.94


def test_benjamini_hochberg_holds_its_rate() -> None:
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(300):
        known = np.sort(rng.standard_normal(500))
        scores = np.concatenate([rng.standard_normal(180), rng.standard_normal(20) + 5])
        named = conformal.discoveries(conformal.p_values(known, scores), 0.1)
        shares.append(named[:180].sum() / max(1, named.sum()))
    assert np.mean(shares) <= 0.1 + 3 * np.std(shares) / math.sqrt(300)
    assert conformal.discoveries(np.array([0.01, 0.02, 0.9]), 0.05).tolist() == [True, True, False]
    assert not conformal.discoveries(np.array([]), 0.1).any()


@given(n=st.integers(1, 3000), images=st.integers(1, 64), rate=st.floats(1e-4, 0.5))
def test_fewer_images_than_the_fewest_are_never_named_together(n: int, images: int, rate: float) -> None:
    least = conformal.fewest(n, images, rate)
    for odd in {min(least, images), min(least - 1, images)}:
        p = np.ones(images)
        p[:odd] = 1 / (n + 1)
        assert conformal.discoveries(p, rate).sum() == (odd if odd >= least else 0)


def test_from_so_many_images_on_a_rate_is_as_near_to_alpha_as_it_says() -> None:
    """Against every n one by one."""
    for alpha, factor in ((0.1, 1.5), (0.1, 1.2), (0.05, 1.5)):
        n = sizes.close(alpha, factor)
        bounds = {m: conformal.upper_bound(m, conformal.rank(m, alpha)) for m in range(sizes.sizes(alpha).least, 3 * n)}
        assert max(m for m, bound in bounds.items() if bound > factor * alpha) == n - 1
    with pytest.raises(ValueError, match="more than 1"):
        sizes.close(0.1, 1.0)


def test_the_page_for_the_inspector_says_what_the_beta_law_says() -> None:
    page = (Path(__file__).parents[1] / "docs" / "11-anomalies.md").read_text(encoding="utf-8")
    written = re.search(r"<!-- sizes: begin .*-->\n(.*?)\n<!-- sizes: end -->", page, re.DOTALL)
    assert written is not None
    assert written[1] == sizes.table()
    assert f"{2 * sizes.sizes(0.01).promised:,}" == "598", "«at least 600»"
    assert 2 * sizes.sizes(0.01).within_half <= 2600, "«2,600»"


# ------------------------------------------------------------------------------------------------------------ detectors


def correlated(n: int, d: int = 5, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ np.random.default_rng(7).standard_normal((d, d)) * 3 + 10


@pytest.mark.parametrize("kind", detectors.FITS)
def test_a_detector_ranks_what_lies_outside_above_what_lies_inside(kind: str) -> None:
    fitted = detectors.fit(kind, correlated(1000))
    normal = fitted.score(correlated(1000, seed=1))
    far = fitted.score(correlated(200, seed=2) + 80)
    assert (far > np.quantile(normal, 0.99)).all()
    constant = fitted.score(np.full((1, 5), 10.0) + 1e9)
    assert constant[0] > far.max(), "farther is more anomalous, however far"
    broken = fitted.score(np.array([[np.nan, 10, 10, 10, 10], [np.inf, 10, 10, 10, 10]]))
    assert (broken > normal.max()).all()


def test_shrinkage_is_that_of_ledoit_and_wolf() -> None:
    x = correlated(60)
    centred = x - x.mean(axis=0)
    ours = detectors.shrunk_covariance(centred) - detectors.RIDGE * np.eye(5)
    np.testing.assert_allclose(ours, LedoitWolf(assume_centered=True).fit(centred).covariance_, rtol=1e-6)


def test_two_clusters_are_a_mixtures_not_a_gaussians() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 2)) * 0.3 + np.where(rng.random((2000, 1)) < 0.5, 3.0, -3.0)
    between = np.zeros((1, 2))
    shares = {kind: np.mean(f.score(x) >= f.score(between)) for kind in FITTED for f in [detectors.fit(kind, x)]}
    assert shares["mixture"] < 0.01
    assert shares["neighbours"] < 0.01
    assert shares["mahalanobis"] > 0.5
    chosen, volumes = detectors.choose(x)
    assert chosen.kind in ("mixture", "neighbours")
    assert volumes["mahalanobis"] > volumes[chosen.kind]


FITTED = ("mixture", "neighbours", "mahalanobis")


# ---------------------------------------------------------------------------------------------------------- calibration


def described(n: int, seed: int, shift: float = 0.0) -> list[dict[str, float]]:
    return [dict(zip("abcde", row, strict=True)) for row in correlated(n, seed=seed) + shift]


@pytest.fixture(scope="module")
def made() -> Calibration:
    return calibrate(described(800, 0), described(500, 1), {"data": {"name": "made up"}})


def test_a_calibration_comes_back_from_its_bytes(made: Calibration) -> None:
    again = unpack(made.pack())
    images = described(20, 5)
    np.testing.assert_array_equal(again.score(images), made.score(images))
    assert again.judge(again.score(images), 0.05) == made.judge(made.score(images), 0.05)
    assert again.about == made.about
    assert again.sha256 == made.sha256


def test_scores_are_stored_in_half_the_bytes_and_yet_compared_as_they_are(made: Calibration) -> None:
    """An image of the calibration, scored again, is as odd as itself: not a trifle more or less."""
    assert parse(made.pack())["scores"].dtype == np.float32
    again = unpack(made.pack())
    scores = again.score(described(500, 1))
    np.testing.assert_array_equal(np.sort(scores), again.scores)
    at_least = (again.scores[None] >= scores[:, None]).sum(axis=1)
    assert at_least.min() == 1
    np.testing.assert_allclose(conformal.p_values(again.scores, scores), (1 + at_least) / 501)


def test_false_alarms_are_as_many_as_were_asked_for(made: Calibration) -> None:
    verdicts = made.judge(made.score(described(4000, 2)), 0.05)
    low, high = scipy.stats.beta(25, 476).ppf([0.001, 0.999])
    assert low <= np.mean([v.is_anomaly for v in verdicts]) <= high
    assert all((v.p_value <= 0.05) == v.is_anomaly == (v.score > v.threshold) for v in verdicts if v.threshold)
    strict = made.judge(made.score(described(4000, 2)), 0.05, confidence=0.95)
    assert sum(v.is_anomaly for v in strict) < sum(v.is_anomaly for v in verdicts)
    assert strict[0].false_positive_rate_upper95 <= 0.05


def test_anomalies_are_found(made: Calibration) -> None:
    scores = made.score(described(50, 3, shift=60.0) + described(150, 4))
    named = [v.is_anomaly for v in made.judge_together(scores, 0.1)]
    assert all(named[:50])
    assert sum(named[50:]) <= 15


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.9])
def test_the_threshold_of_a_batch_is_one_that_its_anomalies_are_above(made: Calibration, rate: float) -> None:
    """As that of alpha is: also where some score is not a number, and where a score stands in the calibration."""
    scores = made.score(described(5, 3, shift=60.0) + described(40, 4))
    scores = np.concatenate([scores, made.scores[[-1, -2, -30]]])
    verdicts = made.judge_together(scores, rate)
    limit = verdicts[0].threshold
    assert limit is not None
    assert [v.is_anomaly for v in verdicts] == [v.score > limit for v in verdicts]
    assert made.judge_together(np.append(scores, math.nan), rate)[0].threshold == limit
    k = round(max(v.p_value for v in verdicts if v.is_anomaly) * 501)
    assert verdicts[0].false_positive_rate_upper95 == conformal.upper_bound(500, k)


@pytest.mark.parametrize(("name", "wrong"), [("b", None), ("excess_bits", math.nan), ("excess_bits", math.inf)])
def test_a_normal_image_of_which_a_number_cannot_be_said_spoils_no_calibration(name: str, wrong: float | None) -> None:
    """Among the fit images, first or last, it is left out; a calibration image is as odd as can be, as a new one is."""

    def images(n: int, seed: int) -> list[dict[str, float]]:
        rng = np.random.default_rng(seed)
        return [{**one, "excess_bits": rng.normal()} for one in described(n, seed)]

    (odd,), fit, held_out = images(1, 7), images(120, 0), images(300, 1)
    odd |= {} if wrong is None else {name: wrong}
    if wrong is None:
        del odd[name]
    made = calibrate(fit, held_out, {})
    for with_odd in ([odd, *fit], [*fit, odd]):
        assert calibrate(with_odd, held_out, {}).sha256 == made.sha256
    known = calibrate(fit, [*held_out, odd], {})
    assert known.scores[-1] > made.scores[-1]
    found = known.judge(known.score([odd, *images(100, 2)]), 0.05)
    assert found[0].p_value == 2 / 302, "one of the calibration images is as odd"
    assert sum(verdict.is_anomaly for verdict in found[1:]) < 20
    with pytest.raises(CalibrationError, match=f"3 fit and 300 calibration images; .*; 99 more have no finite {name}"):
        calibrate([odd] * 99 + fit[:3], held_out, {})


@pytest.mark.parametrize(("alpha", "confidence", "needed"), [(0.001, None, "999"), (0.005, 0.95, "598")])
def test_an_alpha_too_small_for_the_calibration_says_how_many_images_it_takes(
    made: Calibration, alpha: float, confidence: float | None, needed: str
) -> None:
    with pytest.raises(CalibrationError, match=f"at least {needed} calibration images; there are 500"):
        made.judge(np.zeros(1), alpha, confidence)


def test_images_that_are_all_the_same_to_a_model_are_refused() -> None:
    with pytest.raises(CalibrationError, match="do not differ in any of a, b"):
        calibrate([{"a": 1.0, "b": -2.0}] * 60, [{"a": 1.0, "b": -2.0}] * 60, {})


def test_too_few_images_and_bytes_that_are_no_calibration_are_refused(made: Calibration) -> None:
    with pytest.raises(CalibrationError, match="10 fit and 500 calibration images"):
        calibrate(described(10, 0), described(500, 1), {})
    for broken in (b"", b"nonsense" * 10, made.pack()[:-9]):
        with pytest.raises(CalibrationError):
            unpack(broken)
    with pytest.raises(CalibrationError, match="statistics: a missing"):
        made.score([{k: v for k, v in described(1, 0)[0].items() if k != "a"}])


def test_what_compresses_well_is_simple() -> None:
    rng = np.random.default_rng(0)
    constant = np.full((1, 28, 28), 90, np.uint8)
    ramp = np.tile(np.arange(28, dtype=np.uint8) * 9, (28, 1))[None]
    noise = rng.integers(0, 256, (1, 28, 28)).astype(np.uint8)
    sizes = [compressed_bits(x) for x in (constant, ramp, noise)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 100
    assert sizes[2] == pytest.approx(8 * 784, rel=0.05), "noise does not compress"
    assert compressed_bits(rng.integers(0, 256, (3, 8, 8)).astype(np.uint8)) > 0
    found = describe(noise, -math.log(2) * 5000, None, {"own": 1.0})
    assert found == {
        "own": 1.0,
        "nll_bits": pytest.approx(5000),
        "excess_bits": pytest.approx(5000 - sizes[2]),
        "complexity_bits": sizes[2],
    }
    assert "nll_bits" not in calibration.describe(noise, None, 3.5, {})
