"""Data sets, as the loop and the evaluation see them: five disjoint splits of 8-bit images.

    digits            1,797 handwritten digits, 8×8, bundled with scikit-learn: needs no download
    shapes            coloured shapes with captions, 32×32, drawn (see `training.shapes`)
    mnist             handwritten digits, 28×28, 60,000 + 10,000
    fashion-mnist     pictures of clothes, 28×28, 60,000 + 10,000
    folder:PATH       image files; sub-folders, where there are any, are the labels
    npz:PATH          a NumPy archive: images, and optionally labels, label_names, captions
    NAME-without:CLASS  digits, mnist or fashion-mnist without the images of one class, as mnist-without:7

A data set is treated as a *set*: images stand in the order of a hash of their own bytes, and the same hash says which
split an image is in. So the splits are a property of the images, not of how a file happens to list them: a re-ordered
copy gives the same splits and the same batches, and two copies of one image never stand on both sides of a boundary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from models._protocol import JSON, UNLABELLED, ImageSpace
from training import download, shapes
from training.errors import DataError
from training.idx import read_idx

Images = NDArray[np.uint8]  # (N, C, H, W)
Labels = NDArray[np.int64]  # (N,)

ENVIRONMENT = "DRAWWELL_DATA"  # names the folder that holds the data sets


@dataclass(frozen=True)
class Split:
    """Rows of a data set: a part of it, or a batch."""

    x: Images  # (N, C, H, W)
    labels: Labels  # (N,); -1 where there is none
    captions: tuple[str, ...] = ()  # N of them, or none at all

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: NDArray[np.intp]) -> Split:
        """A copy of the rows at `index`, in that order."""
        captions = tuple(self.captions[i] for i in index) if self.captions else ()
        return Split(self.x[index], self.labels[index], captions)


@dataclass(frozen=True)
class Dataset:
    """Images of one kind, in five disjoint parts, each with one purpose:

    train         the weights are learnt here
    validation    chooses between checkpoints
    fit           the density over anomaly statistics is fitted here
    calibration   turns anomaly scores into p-values
    test          reported, never chosen by
    """

    name: str  # what `load` was asked for
    space: ImageSpace
    splits: Mapping[str, Split]  # by the names above, in that order
    digest: str  # sha256 of every split's images, labels and captions

    @property
    def description(self) -> dict[str, JSON]:
        """What `model.json` says of the data that a model has seen."""
        return {
            "name": self.name,
            "sha256": self.digest,
            "splits": {name: len(split) for name, split in self.splits.items()},
        }


# -------------------------------------------------------------------------------------------------------------- loading


def load(name: str, folder: Path | None = None) -> Dataset:
    """The data set called `name` (see the list above).

    MNIST and Fashion-MNIST are read from `folder/<name>/` or `folder` itself; without a `folder` from the one that
    the environment variable DRAWWELL_DATA names; without that they are downloaded once into the user's cache. A
    folder that was named is never written to.

    Raises `DataError`: an unknown name, a missing or broken file, fewer than 20 images.
    """
    kind, _, path = name.partition(":")
    if kind in _BY_PATH and path:
        return _BY_PATH[kind](name, Path(path).expanduser())
    base, left_out = without(name)
    if left_out is not None:
        return _selected(name, base, left_out, folder, keep=False)
    if name in _BY_NAME:
        return _BY_NAME[name](name, folder)
    known = ", ".join([*_BY_NAME, *(f"{kind}:PATH" for kind in _BY_PATH), f"{_CLASSED[-1]}{_WITHOUT}CLASS"])
    raise DataError(f"data set {name!r}: not known; there are {known}")


def without(name: str) -> tuple[str, str | None]:
    """(base, class): "fashion-mnist-without:Sandal" -> ("fashion-mnist", "Sandal"); any other name: (name, None)."""
    base, mark, label = name.partition(_WITHOUT)
    return (base, label) if mark and base in _CLASSED else (name, None)


def of_class(name: str, label: str, folder: Path | None = None) -> Dataset:
    """The images of one class alone. Raises as `load` does."""
    return _selected(f"{name}-only:{label}", name, label, folder, keep=True)


def _selected(name: str, base: str, label: str, folder: Path | None, keep: bool) -> Dataset:
    """A data set of which one class is kept, or left out. Every image stays in its split."""
    whole = load(base, folder)
    if label not in whole.space.labels:
        raise DataError(f"data set {name!r}: {base} has no class {label!r}; it has {', '.join(whole.space.labels)}")
    k = whole.space.labels.index(label)
    splits = {}
    for part, split in whole.splits.items():
        kept = split.take(np.flatnonzero((split.labels == k) == keep))
        labels = np.zeros_like(kept.labels) if keep else kept.labels - (kept.labels > k)
        splits[part] = Split(kept.x, labels, kept.captions)
    names = (label,) if keep else tuple(other for other in whole.space.labels if other != label)
    return Dataset(name, dataclasses.replace(whole.space, labels=names), splits, _digest(splits))


def _digits(name: str, folder: Path | None) -> Dataset:
    """scikit-learn's 8×8 digits. Their grey levels 0 … 16 become round(level · 255 / 16): 8-bit images of 17 values."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    levels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return _assemble(name, Split(levels[:, None], bunch.target.astype(np.int64)), labels=_DIGITS)


def _shapes(name: str, folder: Path | None) -> Dataset:
    drawn = shapes.draw_many(range(SHAPES))
    captions = tuple(picture.scene.caption for picture in drawn)
    x = np.stack([picture.pixels for picture in drawn])
    return _assemble(name, Split(x, np.full(len(drawn), UNLABELLED, dtype=np.int64), captions))


def _idx(name: str, folder: Path | None) -> Dataset:
    files = _idx_files(name, folder)
    parts = []
    for images, labels in (files[:2], files[2:]):
        x, y = read_idx(images, dims=3), read_idx(labels, dims=1)
        if len(x) != len(y):
            raise DataError(f"{labels}: {len(y)} labels for the {len(x)} images in {images}")
        if y.size and int(y.max()) >= 10:
            raise DataError(f"{labels}: label {int(y.max())}, but {name} has the classes 0 … 9")
        parts.append(Split(x[:, None], y.astype(np.int64)))
    return _assemble(name, parts[0], parts[1], labels=_CLASSES[name])


def _idx_files(name: str, folder: Path | None) -> list[Path]:
    """Training images and labels, test images and labels."""
    if folder is None and os.environ.get(ENVIRONMENT):
        folder = Path(os.environ[ENVIRONMENT])
    if folder is None:
        return download.fetch(name)
    folder = folder.expanduser()
    for base in (folder / name, folder):
        found = [file for stem in download.STEMS for file in (base / f"{stem}.gz", base / stem) if file.is_file()]
        if len(found) >= len(download.STEMS):
            return [next(file for file in found if file.name.removesuffix(".gz") == stem) for stem in download.STEMS]
    raise DataError(
        f"{folder}: neither it nor its sub-folder {name!r} holds {', '.join(download.STEMS)} (with or without .gz); "
        f"name another folder, or none (and no {ENVIRONMENT}) to download them"
    )


_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def _image_folder(name: str, folder: Path) -> Dataset:
    """Every image file under `folder`. Those in sub-folders are labelled by the first one's name."""
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"{folder}: holds no image ({', '.join(sorted(_SUFFIXES))})")
    tops = [file.relative_to(folder).parts[0] if file.parent != folder else "" for file in files]
    names = tuple(sorted({top for top in tops if top}))
    opened = [_open(file) for file in files]
    grey = all(image.mode == "L" for image in opened)
    pixels = [np.asarray(image if grey else image.convert("RGB")) for image in opened]
    for file, array in zip(files, pixels, strict=True):
        if array.shape != pixels[0].shape:
            size, first = f"{array.shape[1]}×{array.shape[0]}", f"{pixels[0].shape[1]}×{pixels[0].shape[0]}"
            raise DataError(f"{file}: {size} pixels, but {files[0].name} has {first}; all images must have one size")
    x = np.stack(pixels)
    x = x[:, None] if grey else x.transpose(0, 3, 1, 2)
    labels = np.array([names.index(top) if top else UNLABELLED for top in tops], dtype=np.int64)
    return _assemble(name, Split(x, labels), labels=names)


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
                raise DataError(f"{file}: has transparency; flatten it onto a background first")
            if image.mode not in {"1", "L", "P", "RGB", "YCbCr", "CMYK"}:
                raise DataError(f"{file}: mode {image.mode} is not 8-bit grey or colour")
            return image.convert("L") if image.mode in {"1", "L"} else image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def _npz(name: str, file: Path) -> Dataset:
    """`images` uint8 (N, H, W), (N, H, W, C) or (N, C, H, W); optional `labels` and `captions` (N,), `label_names`."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as an .npz archive without pickles: {error}") from error
    if "images" not in arrays:
        raise DataError(f"{file}: has no array 'images'; it has {', '.join(sorted(arrays)) or 'none'}")
    x = arrays["images"]
    if x.dtype != np.uint8:
        raise DataError(f"{file}: images are {x.dtype}, expected uint8 (0 … 255)")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise DataError(
            f"{file}: images of shape {arrays['images'].shape}, "
            "expected (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3"
        )
    labels = arrays.get("labels", np.full(len(x), UNLABELLED)).astype(np.int64)
    captions = tuple(str(caption) for caption in arrays.get("captions", ()))
    if len(labels) != len(x) or (captions and len(captions) != len(x)):
        raise DataError(f"{file}: {len(x)} images, {len(labels)} labels, {len(captions)} captions")
    classes = int(labels.max(initial=UNLABELLED)) + 1
    names = tuple(str(label) for label in arrays.get("label_names", [str(k) for k in range(classes)]))
    if len(names) < classes or int(labels.min(initial=UNLABELLED)) < UNLABELLED:
        raise DataError(
            f"{file}: labels run from {labels.min()} to {labels.max()}, but there are {len(names)} label names"
        )
    return _assemble(name, Split(x, labels, captions), labels=names)


_DIGITS = tuple("0123456789")
_GARMENTS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CLASSES = {"mnist": _DIGITS, "fashion-mnist": _GARMENTS}
_CLASSED = ("digits", "mnist", "fashion-mnist")  # where a class can be left out
_WITHOUT = "-without:"
SHAPES = 30_000
_BY_NAME: Mapping[str, Callable[[str, Path | None], Dataset]] = {
    "digits": _digits,
    "shapes": _shapes,
    "mnist": _idx,
    "fashion-mnist": _idx,
}
_BY_PATH: Mapping[str, Callable[[str, Path], Dataset]] = {"folder": _image_folder, "npz": _npz}


# --------------------------------------------------------------------------------------------------------------- splits

SPLITS = ("train", "validation", "fit", "calibration", "test")

# What is held out, as a share of the images and at most this many; of 60,000 images 55,000 are left to train on.
_HELD_OUT = {"validation": (1 / 20, 1_000), "fit": (1 / 10, 2_000), "calibration": (1 / 10, 2_000)}
_TEST = (1 / 6, 10_000)  # where the source has no test set of its own


def _assemble(name: str, pool: Split, test: Split | None = None, labels: tuple[str, ...] = ()) -> Dataset:
    """The images in canonical order, cut into splits. `test` is the source's own test set, if it has one."""
    if len(pool) < 20:
        raise DataError(f"{name}: {len(pool)} images; at least 20 are needed to cut them into splits")
    shares = dict(_HELD_OUT) if test is not None else {"test": _TEST, **_HELD_OUT}
    pool, rank = canonical(pool)
    parts: dict[str, Split] = {}
    start, distinct = 0, int(rank[-1]) + 1
    for part, (share, most) in shares.items():
        stop = start + min(most, max(1, round(share * distinct)))
        parts[part] = pool.take(np.flatnonzero((rank >= start) & (rank < stop)))
        start = stop
    parts["train"] = pool.take(np.flatnonzero(rank >= start))
    if test is not None:
        parts["test"] = canonical(test)[0]
    splits = {part: parts[part] for part in SPLITS}
    _, channels, height, width = pool.x.shape
    space = ImageSpace(width, height, channels, labels, captions=bool(pool.captions))
    return Dataset(name, space, splits, _digest(splits))


def canonical(split: Split) -> tuple[Split, NDArray[np.intp]]:
    """The split in the order of its images' hashes, and for each image the rank of its hash among the distinct ones."""
    hashes = (hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in split.x)
    keys = np.frombuffer(b"".join(hashes), dtype=">u8")
    order = np.lexsort((split.labels, keys))  # labels decide between copies of one image
    _, rank = np.unique(keys[order], return_inverse=True)
    return split.take(order), rank.astype(np.intp)


def _digest(splits: Mapping[str, Split]) -> str:
    sha = hashlib.sha256()
    for name, split in splits.items():
        sha.update(f"{name} {split.x.shape}\n".encode())
        sha.update(np.ascontiguousarray(split.x).data)
        sha.update(split.labels.astype("<i8").tobytes())
        sha.update("\n".join(split.captions).encode())
    return sha.hexdigest()


# -------------------------------------------------------------------------------------------------------------- batches


def batch_indices(size: int, batch_size: int, seed: int, step: int, rank: int = 0, world: int = 1) -> NDArray[np.intp]:
    """Which of `size` rows are in the batch of `step`: a pure function, so that training resumes bit for bit.

    The rows stand in one endless line, epoch after epoch, each in a permutation of its own, and a batch is the next
    `batch_size` of them. With `world` processes the batch is dealt out: process `rank` takes every `world`-th row.
    Raises `ValueError` where it cannot be dealt out evenly.
    """
    if size < 1 or batch_size < 1 or step < 0:
        raise ValueError(
            f"batch: {batch_size} of {size} rows at step {step}; sizes must be positive, steps not negative"
        )
    if not 0 <= rank < world or batch_size % world:
        raise ValueError(f"batch: {batch_size} rows cannot be dealt out evenly to rank {rank} of {world} processes")
    position = np.arange(step * batch_size + rank, (step + 1) * batch_size, world)
    epoch, offset = np.divmod(position, size)
    index = np.empty(len(position), dtype=np.intp)
    for e in np.unique(epoch):
        here = epoch == e
        index[here] = _permutation(size, seed, int(e))[offset[here]]
    return index


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> NDArray[np.intp]:
    # NumPy promises the raw bits of Philox for ever, but not what `Generator.permutation` makes of them.
    bits = np.random.Philox(key=(seed % 2**64) | (epoch << 64)).random_raw(size)
    return np.argsort(bits, kind="stable")


def batches(split: Split, batch_size: int, seed: int, step: int, rank: int = 0, world: int = 1) -> Split:
    """The rows of `split` that are in the batch of `step` (for process `rank`); see `batch_indices`."""
    return split.take(batch_indices(len(split), batch_size, seed, step, rank, world))
