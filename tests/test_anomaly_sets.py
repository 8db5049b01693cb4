"""The anomalies that detectors are measured on: what each is, that none is normal, and none depends on how many."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from training import anomalies, data, shapes
from training.anomalies import CHANGES, Odd, chance, swapped
from training.data import Dataset
from training.errors import DataError


@pytest.fixture(scope="module")
def found(digits: Dataset) -> dict[str, Odd]:
    return {odd.name: odd for odd in anomalies.sets(digits, 40)}


def test_every_image_of_every_set_is_changed(digits: Dataset, found: dict[str, Odd]) -> None:
    assert found.keys() == {*CHANGES, anomalies.SWAPPED}
    normal = digits.splits["test"].x[:40]
    for name, odd in found.items():
        assert odd.x.shape == normal.shape, name
        assert odd.x.dtype == np.uint8
        changed = (odd.x != normal).any(axis=(1, 2, 3))
        assert changed.mean() > 0.95, f"{name}: a symmetric digit may look the same flipped, but few do"


def test_the_first_images_are_the_same_however_many_are_asked_for(digits: Dataset, found: dict[str, Odd]) -> None:
    for odd in anomalies.sets(digits, 7):
        np.testing.assert_array_equal(odd.x, found[odd.name].x[:7])


def test_what_moves_pixels_changes_none_of_their_levels(digits: Dataset, found: dict[str, Odd]) -> None:
    normal = digits.splits["test"].x[:40]
    for name in ("horizontal flip", "vertical flip", "rotation 90°", "shuffled tiles"):
        np.testing.assert_array_equal(
            np.sort(found[name].x.reshape(40, -1)), np.sort(normal.reshape(40, -1)), err_msg=name
        )
    np.testing.assert_array_equal(found["horizontal flip"].x[..., ::-1], normal)
    np.testing.assert_array_equal(found["vertical flip"].x[..., ::-1, :], normal)
    np.testing.assert_array_equal(np.rot90(found["rotation 90°"].x, -1, axes=(2, 3)), normal)
    np.testing.assert_array_equal(255 - found["inverted"].x, normal)


def test_tiles_are_moved_whole_and_what_is_left_over_stays() -> None:
    image = np.arange(3 * 30 * 29).astype(np.uint8).reshape(3, 30, 29)
    out = CHANGES["shuffled tiles"](image, np.random.default_rng(0))
    corners = [np.s_[:, i * 7 : i * 7 + 7, j * 7 : j * 7 + 7] for i in range(4) for j in range(4)]
    assert sorted(out[c].tobytes() for c in corners) == sorted(image[c].tobytes() for c in corners)
    np.testing.assert_array_equal(out[:, 28:], image[:, 28:])
    np.testing.assert_array_equal(out[:, :, 28:], image[:, :, 28:])
    assert (out != image).any()


def test_blur_noise_contrast_and_constant_are_what_they_are_called() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(60, 190, (3, 64, 64)).astype(np.uint8)
    blurred = CHANGES["3×3 blur"](image, rng)
    assert blurred[1, 10, 20] == np.rint(image[1, 9:12, 19:22].mean())
    noise = CHANGES["noise σ = 12"](image, rng).astype(float) - image
    assert noise.std() == pytest.approx(12, rel=0.03)
    assert noise.mean() == pytest.approx(0, abs=0.4)
    grey = CHANGES["half contrast"](image, rng)
    np.testing.assert_allclose(grey.mean(axis=(1, 2)), image.mean(axis=(1, 2)), atol=0.5)
    np.testing.assert_allclose(grey.std(axis=(1, 2)), image.std(axis=(1, 2)) / 2, rtol=0.02)
    levels = np.array([CHANGES["constant"](image[:1], chance("constant", i))[0] for i in range(200)])
    assert (levels == levels[:, :1, :1]).all()
    assert levels.min() < 20
    assert levels.max() > 235


def test_a_swapped_block_comes_from_another_image_and_its_mask_is_what_differs(digits: Dataset) -> None:
    normal = digits.splits["test"].x
    odd = swapped(normal, 60)
    assert odd.masks is not None
    for image, was, mask in zip(odd.x, normal, odd.masks, strict=False):
        np.testing.assert_array_equal((image != was).any(axis=0), mask)
        ys, xs = np.nonzero(mask)
        assert np.ptp(ys) < 2, "a tile of 8×8 pixels is 2×2"
        assert np.ptp(xs) < 2
        assert mask.sum() >= 2, "at least half of the block differs"


def test_where_nothing_can_differ_nothing_is_made_up() -> None:
    flat = np.zeros((5, 1, 8, 8), np.uint8)
    odd = swapped(flat, 5)
    assert odd.masks is not None
    assert not odd.masks.any()


def test_shapes_have_drawn_faults_in_pictures_that_no_model_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    few = shapes.draw_many(range(30))
    x = np.stack([p.pixels for p in few])
    base = data.load("digits")
    split = data.Split(x, np.full(30, -1), tuple(p.scene.caption for p in few))
    space = dataclasses.replace(base.space, width=32, height=32, channels=3, labels=(), captions=True)
    dataset = Dataset("shapes", space, {**base.splits, "test": split}, "")
    drawn = [odd for odd in anomalies.sets(dataset, 3) if odd.name.startswith("drawn: ")]
    assert [odd.name for odd in drawn] == [f"drawn: {kind}" for kind in shapes.ANOMALIES]
    for odd, kind in zip(drawn, shapes.ANOMALIES, strict=True):
        picture = shapes.draw(data.SHAPES + 2, kind)
        np.testing.assert_array_equal(odd.x[2], picture.pixels)
        assert odd.masks is not None
        np.testing.assert_array_equal(odd.masks[2], picture.mask)


# ----------------------------------------------------------------------------------------- a class held out of training


def test_a_class_is_left_out_and_every_other_image_stays_in_its_split(digits: Dataset) -> None:
    less = data.load("digits-without:3")
    assert less.space.labels == tuple("012456789")
    assert less.digest != digits.digest
    for name, split in digits.splits.items():
        np.testing.assert_array_equal(less.splits[name].x, split.x[split.labels != 3])
        there = [digits.space.labels[k] for k in split.labels if k != 3]
        assert [less.space.labels[k] for k in less.splits[name].labels] == there
    (odd,) = [odd for odd in anomalies.sets(less, 10) if odd.name.startswith("held-out")]
    assert odd.name == "held-out class: 3"
    np.testing.assert_array_equal(odd.x, digits.splits["test"].x[digits.splits["test"].labels == 3][:10])


@pytest.mark.parametrize("name", ["digits-without:", "digits-without:ten", "shapes-without:star"])
def test_a_class_that_there_is_not_is_refused_by_name(name: str) -> None:
    with pytest.raises(DataError, match=r"no class|not known"):
        data.load(name)


@pytest.mark.realdata
def test_fashion_mnist_is_held_against_mnist_and_the_other_way_round(fashion_mnist: Dataset, mnist: Dataset) -> None:
    for one, other, title in ((fashion_mnist, mnist, "MNIST"), (mnist, fashion_mnist, "Fashion-MNIST")):
        first = next(anomalies.sets(one, 5))
        assert first.name == title
        np.testing.assert_array_equal(first.x, other.splits["test"].x[:5])
