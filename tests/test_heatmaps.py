"""Heat maps: measured by normal images, dark on those, and with a family-wise false-alarm rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from safetensors.numpy import load as parse

from anomaly import heatmaps
from anomaly.calibration import calibrate, unpack
from anomaly.heatmaps import MIDDLE, Maps

SHAPE = (28, 28)


def rough(n: int, seed: int, noise: float = 1.0) -> np.ndarray:
    """(n, H, W) surprises of normal images: skewed, and wilder in the middle than at the rim."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : SHAPE[0] * 1j, -1 : 1 : SHAPE[1] * 1j]
    return 5 + noise * np.exp(-2 * (x**2 + y**2)) * rng.gamma(2.0, 1.0, (n, *SHAPE))


@pytest.fixture(scope="module")
def maps() -> Maps:
    return heatmaps.fit([rough(300, 0)], [rough(400, 1)])


def test_the_neighbourhood_is_a_gaussian_filter() -> None:
    x = rough(3, 9)
    expected = scipy.ndimage.gaussian_filter(x**2, (0, 2.8, 2.8), mode="reflect", radius=9)
    np.testing.assert_allclose(heatmaps.local(x), np.sqrt(expected), rtol=1e-12)
    np.testing.assert_allclose(heatmaps.local(np.full((2, 3, 1), -7.0)), 7.0)


def test_of_normal_images_as_many_have_a_mask_as_were_asked_for(maps: Maps) -> None:
    heights = maps.heights([rough(3000, 2)])
    k = maps.rank(0.05, None)
    share = maps.mask(heights, k).any(axis=(1, 2)).mean()
    low, high = scipy.stats.beta(k, 401 - k).ppf([0.001, 0.999])
    assert low <= share <= high
    assert maps.rank(0.05, 0.95) < k
    assert not maps.mask(heights, 0).any()


def test_a_normal_image_stays_dark_and_a_defect_shines(maps: Maps) -> None:
    surprise = rough(50, 3)
    normal = maps.picture(maps.heights([surprise]))
    assert np.median(normal) < MIDDLE / 4
    assert np.quantile(normal, 0.99) < MIDDLE
    surprise[:, 4:11, 5:12] += 12
    picture = maps.picture(maps.heights([surprise]))
    assert picture[:, 6:9, 7:10].min() > MIDDLE
    assert picture[:, 18:, 18:].max() < MIDDLE * 1.5
    mask = maps.mask(maps.heights([surprise]), maps.rank(0.01, None))
    assert mask[:, 6:9, 7:10].all()
    assert mask[:, 16:, 16:].mean() < 0.01


def test_no_map_is_scaled_by_its_own_largest_value(maps: Maps) -> None:
    """A defect elsewhere leaves the rest of the map as it was; the same surprise is the same level in any image."""
    surprise = rough(1, 4)
    before = maps.picture(maps.heights([surprise]))
    surprise[:, :4, :4] += 1000
    after = maps.picture(maps.heights([surprise]))
    np.testing.assert_array_equal(after[:, 14:, 14:], before[:, 14:, 14:])
    assert after.max() == 255


def test_a_unit_makes_no_difference_and_models_are_averaged(maps: Maps) -> None:
    fit, held_out, new = rough(300, 0), rough(400, 1), rough(5, 5)
    same = heatmaps.fit([fit, -1e3 * fit], [held_out, -1e3 * held_out])
    np.testing.assert_allclose(same.heights([new, -1e3 * new]), maps.heights([new]), rtol=1e-5, atol=1e-5)
    one, other = heatmaps.fit([fit], [held_out]), heatmaps.fit([rough(300, 6)], [rough(400, 7)])
    both = heatmaps.fit([fit, rough(300, 6)], [held_out, rough(400, 7)])
    mean = (one.heights([new]) + other.heights([new])) / 2
    np.testing.assert_allclose(both.heights([new, new]), mean, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="zip"):
        both.heights([new])


def test_a_place_where_nothing_ever_happens_does_not_glow_at_a_trifle(maps: Maps) -> None:
    dull = rough(300, 0)
    dull[:, :6] = 5
    measured = heatmaps.fit([dull], [dull[:200]])
    trifle = np.full((1, *SHAPE), 5.0)
    trifle[:, :6] += 0.01
    assert measured.picture(measured.heights([trifle])).max() < MIDDLE / 4
    assert math.isfinite(heatmaps.fit([np.ones((9, *SHAPE))], [np.ones((9, *SHAPE))]).reference)


def test_maps_come_back_from_the_bytes_of_a_calibration(maps: Maps) -> None:
    rng = np.random.default_rng(0)
    numbers = [{"a": a, "b": b} for a, b in rng.standard_normal((200, 2))]
    packed = calibrate(numbers[:100], numbers[100:], {}, maps).pack()
    stored = {name: values.dtype for name, values in parse(packed).items() if name.startswith("maps.")}
    assert stored == dict.fromkeys(("maps.centre", "maps.scale", "maps.maxima"), np.dtype(np.float32))
    again = unpack(packed).maps
    assert again is not None
    new = rough(5, 8)
    np.testing.assert_array_equal(again.heights([new]), maps.heights([new]))
    np.testing.assert_array_equal(again.maxima, maps.maxima)
    assert unpack(calibrate(numbers[:100], numbers[100:], {}).pack()).maps is None
