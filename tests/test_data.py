"""Data sets: splits that belong to the images, batches that are a pure function of (seed, step), honest readers."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from training import data, download
from training.errors import DataError
from training.idx import read_idx

SHAPES = st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(1, 6))


def noise(n: int, side: int = 4, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side), dtype=np.uint8)


def save_npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return f"npz:{path}"


def hashes(split: data.Split) -> set[bytes]:
    return {image.tobytes() for image in split.x}


# --------------------------------------------------------------------------------------------------------------- splits


def test_splits_are_disjoint_complete_and_named(digits: data.Dataset) -> None:
    assert tuple(digits.splits) == data.SPLITS
    assert sum(len(split) for split in digits.splits.values()) == 1797
    parts = [hashes(split) for split in digits.splits.values()]
    assert len(set.union(*parts)) == sum(map(len, parts))


def test_digits_use_seventeen_levels_of_the_8_bit_grid(digits: data.Dataset) -> None:
    assert digits.space.shape == (1, 8, 8)
    assert digits.space.labels == tuple("0123456789")
    levels = np.unique(digits.splits["train"].x)
    assert levels.tolist() == [round(level * 255 / 16) for level in range(17)]


def test_splits_and_order_belong_to_the_images_not_to_the_file(tmp_path: Path) -> None:
    images, labels = noise(200), np.arange(200) % 7
    order = np.random.default_rng(1).permutation(200)
    a = data.load(save_npz(tmp_path / "a.npz", images=images, labels=labels))
    b = data.load(save_npz(tmp_path / "b.npz", images=images[order], labels=labels[order]))
    assert a.digest == b.digest
    for name in data.SPLITS:
        assert np.array_equal(a.splits[name].x, b.splits[name].x)
        assert np.array_equal(a.splits[name].labels, b.splits[name].labels)


def test_labels_and_captions_stay_with_their_images(tmp_path: Path) -> None:
    images = noise(100)
    images[:, 0, 0] = np.arange(100)
    captions = [f"number {k}" for k in range(100)]
    dataset = data.load(save_npz(tmp_path / "x.npz", images=images, labels=np.arange(100), captions=captions))
    for split in dataset.splits.values():
        assert split.x[:, 0, 0, 0].tolist() == split.labels.tolist()
        assert split.captions == tuple(f"number {k}" for k in split.labels)
    assert dataset.space.captions


def test_copies_of_an_image_never_stand_on_both_sides_of_a_boundary(tmp_path: Path) -> None:
    dataset = data.load(save_npz(tmp_path / "x.npz", images=np.repeat(noise(60), 5, axis=0)))
    parts = [hashes(split) for split in dataset.splits.values()]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 60


def test_the_digest_notices_one_pixel_one_label_one_caption(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"images": noise(50), "labels": np.zeros(50, int), "captions": ["a"] * 50}
    digests = [data.load(save_npz(tmp_path / "x.npz", **arrays)).digest]
    changes: list[Callable[[], None]] = [
        lambda: arrays["images"].__setitem__((7, 0, 0), arrays["images"][7, 0, 0] ^ 1),
        lambda: arrays["labels"].__setitem__(7, 1),
        lambda: arrays["captions"].__setitem__(7, "b"),
    ]
    for change in changes:
        change()
        digests.append(data.load(save_npz(tmp_path / "x.npz", **arrays)).digest)
    assert len(set(digests)) == 4


# -------------------------------------------------------------------------------------------------------------- batches


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**64 - 1), st.integers(1, 4))
def test_every_epoch_shows_every_row_once(size: int, batch_size: int, seed: int, epochs: int) -> None:
    steps = -(-epochs * size // batch_size)
    line = np.concatenate([data.batch_indices(size, batch_size, seed, step) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(line[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 4), st.integers(0, 10**6))
def test_processes_deal_the_same_batch_out_among_them(size: int, each: int, world: int, step: int) -> None:
    whole = data.batch_indices(size, each * world, 3, step)
    shares = [data.batch_indices(size, each * world, 3, step, rank, world) for rank in range(world)]
    assert np.array_equal(np.stack(shares, axis=1).ravel(), whole)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(data.batch_indices(100, 100, seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 6


def test_a_permutation_is_uniform() -> None:
    firsts = np.bincount([data.batch_indices(5, 5, seed, 0)[0] for seed in range(2000)], minlength=5)
    assert (np.abs(firsts - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8)).all()


@pytest.mark.parametrize(
    "arguments", [(0, 1, 0, 0), (5, 0, 0, 0), (5, 5, 0, -1), (5, 5, 0, 0, 0, 2), (5, 4, 0, 0, 2, 2)]
)
def test_an_impossible_batch_is_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^batch: "):
        data.batch_indices(*arguments)


def test_a_batch_is_a_copy(digits: data.Dataset) -> None:
    before = digits.splits["test"].x.copy()
    data.batches(digits.splits["test"], 8, 0, 0).x[:] = 0
    assert np.array_equal(digits.splits["test"].x, before)


# ------------------------------------------------------------------------------------------------------------ idx files


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@given(SHAPES, st.booleans())
def test_idx_files_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int, int], zipped: bool
) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(idx_bytes(array)) if zipped else idx_bytes(array))
    assert np.array_equal(read_idx(path, dims=3), array)


GOOD = idx_bytes(noise(3))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "too few"),
        (GOOD[:10], "too few"),
        (GOOD[:-1], "promises 3 × 4 × 4"),
        (GOOD + b"\0", "promises 3 × 4 × 4"),
        (b"\0\0\x0d" + GOOD[3:], "magic number 0x00000d03"),
        (idx_bytes(np.zeros((9, 9), np.uint8)), "magic number 0x00000802"),
        (gzip.compress(GOOD, mtime=0)[:-20], "cannot be read"),
        (gzip.compress(GOOD, mtime=0)[:20] + b"\xff" * 20, "cannot be read"),
    ],
)
def test_a_broken_idx_file_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=complaint) as caught:
        read_idx(path, dims=3)
    assert str(path) in str(caught.value)


def write_mnist(folder: Path, train: int = 60, test: int = 20, labels: int | None = None, top: int = 9) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k, (images, names) in enumerate((download.STEMS[:2], download.STEMS[2:])):
        n = (train, test)[k]
        marks = (np.arange(n if labels is None else labels) % 10).clip(max=9).astype(np.uint8)
        marks[0] = top
        (folder / f"{images}.gz").write_bytes(gzip.compress(idx_bytes(noise(n, side=28, seed=k))))
        (folder / f"{names}.gz").write_bytes(gzip.compress(idx_bytes(marks)))


@pytest.mark.parametrize("inside", ["", "mnist"])
def test_mnist_is_found_in_the_folder_or_below_it(tmp_path: Path, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / inside)
    dataset = data.load("mnist", tmp_path)
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 45,
        "validation": 3,
        "fit": 6,
        "calibration": 6,
        "test": 20,
    }
    assert hashes(dataset.splits["test"]) == {image.tobytes() for image in noise(20, side=28, seed=1)}
    monkeypatch.setenv("DRAWWELL_DATA", str(tmp_path))
    assert data.load("mnist").digest == dataset.digest


def test_labels_that_do_not_fit_their_images_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, labels=59)
    with pytest.raises(DataError, match="59 labels for the 60 images"):
        data.load("mnist", tmp_path)
    write_mnist(tmp_path, top=10)
    with pytest.raises(DataError, match="label 10"):
        data.load("mnist", tmp_path)


def test_a_named_folder_without_the_files_is_an_error_not_a_download(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither it nor its sub-folder 'fashion-mnist'"):
        data.load("fashion-mnist", tmp_path)
    assert not any(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------- folders, archives, names


def test_an_image_folder_takes_its_labels_from_the_sub_folders(tmp_path: Path) -> None:
    images = noise(40)
    for k, image in enumerate(images):
        folder = tmp_path / ("cat" if k % 2 else "dog")
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{k}.png")
    dataset = data.load(f"folder:{tmp_path}")
    assert dataset.space.labels == ("cat", "dog")
    assert dataset.space.shape == (1, 4, 4)
    for split in dataset.splits.values():
        for image, label in zip(split.x, split.labels, strict=True):
            k = next(k for k in range(40) if np.array_equal(images[k], image[0]))
            assert dataset.space.labels[label] == ("cat" if k % 2 else "dog")


def test_colour_images_stand_channels_first(tmp_path: Path) -> None:
    colours = np.zeros((30, 5, 6, 3), np.uint8)
    colours[..., 0], colours[..., 2] = np.arange(30)[:, None, None], 200
    for k, image in enumerate(colours):
        Image.fromarray(image).save(tmp_path / f"{k}.png")
    dataset = data.load(f"folder:{tmp_path}")
    assert dataset.space.shape == (3, 5, 6)
    assert dataset.space.labels == ()
    x = np.concatenate([split.x for split in dataset.splits.values()])
    assert sorted(x[:, 0, 0, 0]) == list(range(30))
    assert (x[:, 1] == 0).all()
    assert (x[:, 2] == 200).all()
    assert all((split.labels == -1).all() for split in dataset.splits.values())


def test_what_is_wrong_in_an_image_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        data.load(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="holds no image"):
        data.load(f"folder:{tmp_path}")
    for k, image in enumerate(noise(20)):
        Image.fromarray(image).save(tmp_path / f"{k:02}.png")
    odd = tmp_path / "99.png"
    Image.fromarray(noise(1, side=5)[0]).save(odd)
    with pytest.raises(DataError, match=r"99\.png: 5×5 pixels, but 00\.png has 4×4"):
        data.load(f"folder:{tmp_path}")
    odd.write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"99\.png: cannot be read"):
        data.load(f"folder:{tmp_path}")
    Image.new("RGBA", (4, 4)).save(odd)
    with pytest.raises(DataError, match=r"99\.png: has transparency"):
        data.load(f"folder:{tmp_path}")
    Image.new("I;16", (4, 4)).save(odd)
    with pytest.raises(DataError, match=r"99\.png: mode I;16"):
        data.load(f"folder:{tmp_path}")


@pytest.mark.parametrize("shape", [(30, 4, 5), (30, 1, 4, 5), (30, 4, 5, 1), (30, 3, 4, 5), (30, 4, 5, 3)])
def test_archives_may_order_their_axes_as_usual(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    dataset = data.load(save_npz(tmp_path / "x.npz", images=images))
    assert dataset.space.shape == (3 if 3 in shape else 1, 4, 5)


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"x": noise(30)}, "no array 'images'; it has x"),
        ({"images": noise(30) / 255}, "float64, expected uint8"),
        ({"images": np.zeros((30, 2, 4, 4), np.uint8)}, "with C 1 or 3"),
        ({"images": noise(30), "labels": np.zeros(29, int)}, "30 images, 29 labels"),
        ({"images": noise(30), "captions": ["a"] * 29}, "29 captions"),
        ({"images": noise(30), "labels": np.full(30, 3), "label_names": ["a"]}, "1 label names"),
        ({"images": noise(30), "labels": np.full(30, -2)}, "run from -2"),
        ({"images": noise(19)}, "at least 20"),
        ({"images": noise(30), "captions": np.array([object()] * 30)}, "without pickles"),
    ],
)
def test_what_is_wrong_in_an_archive_is_named(tmp_path: Path, arrays: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        data.load(save_npz(tmp_path / "x.npz", **arrays))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"'cifar'.*digits, shapes, mnist, fashion-mnist, folder:PATH, npz:PATH"):
        data.load("cifar")
    with pytest.raises(DataError, match="'npz:'"):
        data.load("npz:")


# ------------------------------------------------------------------------------------------------------------ real data


@pytest.mark.realdata
def test_fashion_mnist_is_whole(fashion_mnist: data.Dataset) -> None:
    sizes = {name: len(split) for name, split in fashion_mnist.splits.items()}
    assert sizes == {"train": 55_000, "validation": 1_000, "fit": 2_000, "calibration": 2_000, "test": 10_000}
    assert np.bincount(fashion_mnist.splits["test"].labels).tolist() == [1_000] * 10
    official = np.concatenate([fashion_mnist.splits[name].labels for name in data.SPLITS[:-1]])
    assert np.bincount(official).tolist() == [6_000] * 10
    assert len(set.union(*map(hashes, fashion_mnist.splits.values()))) == 70_000
    for split in fashion_mnist.splits.values():  # every class in every part, in fair share
        assert (np.abs(np.bincount(split.labels) / len(split) - 0.1) < 5 * np.sqrt(0.09 / len(split))).all()


@pytest.mark.realdata
def test_mnist_is_whole(mnist: data.Dataset) -> None:
    assert sum(len(split) for split in mnist.splits.values()) == 70_000
    assert np.bincount(mnist.splits["test"].labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert mnist.space.shape == (1, 28, 28)
