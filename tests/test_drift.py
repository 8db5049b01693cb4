"""The watch for drift: a martingale whatever comes, few false alarms, and drifts that are found soon."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from anomaly.drift import POWERS, Bets, Watch, log_bet, stake

GRID = (np.arange(200_000) + 0.5) / 200_000


def test_every_bet_is_fair_and_never_goes_below_nothing() -> None:
    """∫ f = 1. The grid misses what lies within its first cell, of which the power knows the integral."""
    values = np.exp(np.array([log_bet(p) for p in GRID[::20]]))
    assert (values > 0).all()
    for k, power in enumerate(POWERS):
        fine = np.exp(np.log(power) + (power - 1) * np.log(GRID[1:]))
        assert fine.mean() + (1 / len(GRID)) ** power == pytest.approx(1, abs=0.02)
        np.testing.assert_allclose(values[:, k], power * GRID[::20] ** (power - 1))


@given(past=st.lists(st.floats(0, 1), max_size=30))
def test_the_money_is_a_martingale_after_any_past(past: list[float]) -> None:
    """The mean over the next p, uniform, is what there is: in closed form, ∫ W · f = W."""
    bets = Bets()
    for p in past:
        bets.take(p)
    share = 1 / (bets.taken + 50)
    asleep = math.exp(bets.asleep)
    low, high = np.exp(bets.low), np.exp(bets.high)
    assert asleep + low.sum() + high.sum() == pytest.approx(math.exp(bets.wealth), rel=1e-9)
    # What is bet on each power before p is known, times ∫ f = 1, and what sleeps on:
    staked = (low + asleep * share / (2 * len(POWERS))).sum() + (high + asleep * share / (2 * len(POWERS))).sum()
    assert staked + asleep * (1 - share) == pytest.approx(math.exp(bets.wealth), rel=1e-9)
    p = 0.3
    bets.take(p)
    gain = np.exp(log_bet(p)), np.exp(log_bet(1 - p))
    expected = asleep * (1 - share) + sum(
        ((side + asleep * share / (2 * len(POWERS))) * f).sum() for side, f in zip((low, high), gain, strict=True)
    )
    assert math.exp(bets.wealth) == pytest.approx(expected, rel=1e-9)


def peaks(p: np.ndarray) -> np.ndarray:
    """The most that each row of ranks ever made: `Bets`, for many rows at once."""
    eps = np.array(POWERS)
    rows, steps = p.shape
    asleep, money, peak = np.ones(rows), np.zeros((2, rows, len(eps))), np.ones(rows)
    for t in range(steps):
        share = 1 / (t + 50)
        for side, q in enumerate((p[:, t], 1 - p[:, t])):
            bet = eps * np.maximum(q, 1e-12)[:, None] ** (eps - 1)
            money[side] = (money[side] + (asleep * share / (2 * len(eps)))[:, None]) * bet
        asleep = asleep * (1 - share)
        peak = np.maximum(peak, asleep + money.sum(axis=(0, 2)))
    return peak


def test_many_rows_at_once_are_what_one_is() -> None:
    p = np.random.default_rng(0).uniform(size=(3, 200)) ** 1.5
    for row, peak in zip(p, peaks(p), strict=True):
        bets = Bets()
        for value in row:
            bets.take(float(value))
        assert math.exp(bets.peak) == pytest.approx(peak, rel=1e-9)


def test_false_alarms_are_as_rare_as_ville_says() -> None:
    """1,000 repetitions of 2,000 uniform ranks: the bound is reached, ever, by at most 1/bound of them."""
    found = peaks(np.random.default_rng(0).uniform(size=(1000, 2000)))
    for bound in (5, 20, 100):
        share = np.mean(found >= bound)
        assert share <= 1 / bound + 3 * math.sqrt(1 / bound / 1000), bound


def test_ranks_among_all_that_came_are_uniform_and_independent() -> None:
    """Whatever the calibration happened to be: over many images its luck does not show."""
    rng = np.random.default_rng(3)
    calibration = np.sort(rng.standard_normal(30))
    watch = Watch(calibration)
    ranks = np.array([watch._rank(float(s)) for s in np.round(rng.standard_normal(6000), 1)])
    assert scipy.stats.kstest(ranks[200:], "uniform").pvalue > 0.01, "ties included"
    assert abs(np.corrcoef(ranks[1:], ranks[:-1])[0, 1]) < 0.05
    alone = np.array([(1 + (calibration >= s).sum()) / 31 for s in rng.standard_normal(6000)])
    assert scipy.stats.kstest(alone, "uniform").pvalue < 1e-6, "ranked among the calibration alone, it does"


def test_an_unlucky_calibration_raises_no_alarm_in_the_long_run() -> None:
    alarms = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        watch = Watch(np.sort(rng.standard_normal(50)))
        watch.saw(rng.standard_normal(1500), bound=20)
        alarms += watch.alarmed_at is not None
    assert alarms <= 40 / 20 + 3 * math.sqrt(2)


@pytest.mark.parametrize(("normal_before", "soon"), [(0, 60), (3000, 120)])
@pytest.mark.parametrize("shift", [1.5, -1.5])
def test_a_drift_is_found_soon_early_and_late(normal_before: int, soon: int, shift: float) -> None:
    """Images that are odder, or all more usual, by one and a half standard deviations."""
    delays = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        watch = Watch(np.sort(rng.standard_normal(1000)))
        watch.saw(rng.standard_normal(normal_before), bound=100)
        assert watch.alarmed_at is None
        watch.saw(rng.standard_normal(1000) + shift, bound=100)
        assert watch.alarmed_at is not None
        delays.append(watch.alarmed_at - normal_before)
    assert np.median(delays) <= soon, delays


def test_an_alarm_stays_and_scores_that_are_none_are_odd() -> None:
    watch = Watch(np.arange(500.0))
    watch.saw([math.nan] * 40, bound=100)
    assert watch.alarmed_at is not None
    at = watch.alarmed_at
    watch.saw(np.random.default_rng(0).uniform(0, 500, 300), bound=100)
    assert (watch.alarmed_at, watch.seen) == (at, 340)


def test_the_watch_forgets_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomaly.drift.LONGEST", 100)
    watch = Watch(np.arange(10.0))
    watch.saw(np.random.default_rng(0).uniform(0, 10, 250), bound=1e9)
    assert len(watch._scores) == 10 + 50
    assert watch.bets.taken == 50
    assert watch.seen == 250


def test_many_games_share_one_unit_of_money(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it goes on: of watches that begin anew 30 times, no more raise a false alarm than 1 in `bound`."""
    assert sum(stake(game) for game in range(1, 10_001)) == pytest.approx(1, abs=1e-4)
    monkeypatch.setattr("anomaly.drift.LONGEST", 100)
    bound, alarms, apart = 5.0, 0, 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        watch, games = Watch(np.sort(rng.standard_normal(50))), []
        for _ in range(30):
            watch.saw(rng.standard_normal(100), bound)
            games.append(watch.bets.peak)
        assert watch.peak == max(peak + math.log(stake(j + 1)) for j, peak in enumerate(games))
        alarms += watch.alarmed_at is not None
        apart += max(games) >= math.log(bound)
    assert alarms <= 20 / bound
    assert apart > 2 * 20 / bound, "each with a unit of its own, they would"


def test_a_drift_is_found_in_a_later_game(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomaly.drift.LONGEST", 400)
    rng = np.random.default_rng(0)
    watch = Watch(np.sort(rng.standard_normal(1000)))
    watch.saw(rng.standard_normal(2000), bound=100)
    assert watch.alarmed_at is None
    watch.saw(rng.standard_normal(150) + 1.5, bound=100)
    assert watch.alarmed_at is not None
    assert watch.peak == watch.bets.peak + math.log(0.1 / 30), "the sixth game"
