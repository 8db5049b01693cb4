"""Images that are not normal, made from a data set's test images: what detectors are measured on, never fitted to.

    another data set     MNIST for Fashion-MNIST, and the other way round
    flipped, rotated, inverted, tiles shuffled, blurred, noisy, constant, half contrast
    block swapped        one block replaced by that of another image: with a mask of the pixels that differ
    held-out class       of a model that was trained without it
    drawn: …             of `shapes`: pictures with a fault, and its mask

Image i of a set is a function of the data set and i alone, so that the first n are the same however many are asked for.
What is random is drawn for each image by itself, with `SEED`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from training import data, shapes
from training.data import Dataset, Images

SEED = 0
NOISE = 12.0  # standard deviation, grey levels
TILES = 4  # a side: 7×7 pixels each of an image of 28×28
OTHER = {"fashion-mnist": ("MNIST", "mnist"), "mnist": ("Fashion-MNIST", "fashion-mnist")}  # title, name
SWAPPED = "block swapped"

Masks = NDArray[np.bool_]  # (N, H, W)
Image = NDArray[np.uint8]  # (C, H, W)


@dataclass(frozen=True)
class Odd:
    """A set of anomalies."""

    name: str
    x: Images
    masks: Masks | None = None  # where only a part of each image is anomalous: which pixels


def held_out(label: str) -> str:
    """What the images of a class are called that a model was trained without."""
    return f"held-out class: {label}"


def sets(dataset: Dataset, n: int, folder: Path | None = None) -> Iterator[Odd]:
    """The sets that there are for a data set, of n images each or as many as there are. folder: as for `data.load`."""
    normal = dataset.splits["test"].x
    base, left_out = data.without(dataset.name)
    if base in OTHER:
        title, other = OTHER[base]
        yield Odd(title, data.load(other, folder).splits["test"].x[:n])
    for name, change in CHANGES.items():
        chosen = normal[:n]
        yield Odd(name, np.stack([change(image, chance(name, i)) for i, image in enumerate(chosen)]))
    yield swapped(normal, n)
    if left_out is not None:
        yield Odd(held_out(left_out), data.of_class(base, left_out, folder).splits["test"].x[:n])
    if dataset.name == "shapes":
        for kind in get_args(shapes.Anomaly):
            yield drawn(kind, n)


def chance(name: str, index: int) -> np.random.Generator:
    """Of image `index` of a set."""
    return np.random.Generator(np.random.Philox(key=[SEED << 32 | zlib.crc32(name.encode()), index]))


# --------------------------------------------------------------------------------------------------- of a whole image


def shuffled(image: Image, rng: np.random.Generator) -> Image:
    """Tiles in another order. Where the sides are no multiples of TILES, what is left over stays where it is."""
    high, wide = image.shape[1] // TILES, image.shape[2] // TILES
    corners = [(i * high, j * wide) for i in range(TILES) for j in range(TILES)]
    order = rng.permutation(len(corners))
    while (order == np.arange(len(corners))).all():
        order = rng.permutation(len(corners))
    out = image.copy()
    for (top, left), (from_top, from_left) in zip(corners, (corners[k] for k in order), strict=True):
        tile = image[:, from_top : from_top + high, from_left : from_left + wide]
        out[:, top : top + high, left : left + wide] = tile
    return out


def blurred(image: Image, rng: np.random.Generator) -> Image:
    """The mean of 3×3 pixels; beyond the border, the border's."""
    return _levels(ndimage.uniform_filter(image.astype(np.float64), size=(1, 3, 3), mode="nearest"))


def noisy(image: Image, rng: np.random.Generator) -> Image:
    return _levels(image + NOISE * rng.standard_normal(image.shape))


def constant(image: Image, rng: np.random.Generator) -> Image:
    """One level everywhere, any of 0 … 255; of colour images, one for each channel."""
    return np.broadcast_to(rng.integers(0, 256, (len(image), 1, 1), dtype=np.uint8), image.shape).copy()


def half_contrast(image: Image, rng: np.random.Generator) -> Image:
    """Each channel half as far from its mean."""
    mean = image.mean(axis=(1, 2), keepdims=True)
    return _levels(mean + (image - mean) / 2)


def _levels(values: NDArray[np.float64]) -> Image:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


CHANGES: dict[str, Callable[[Image, np.random.Generator], Image]] = {
    "horizontal flip": lambda image, _: image[:, :, ::-1],
    "vertical flip": lambda image, _: image[:, ::-1],
    "rotation 90°": lambda image, _: np.rot90(image, axes=(1, 2)),
    "inverted": lambda image, _: 255 - image,
    "shuffled tiles": shuffled,
    "3×3 blur": blurred,
    "noise σ = 12": noisy,
    "constant": constant,
    "half contrast": half_contrast,
}


# --------------------------------------------------------------------------------------------------- of a part of it


def swapped(normal: Images, n: int) -> Odd:
    """Each image with one block, as large as a tile, of another of the images, from the same place.

    Place and other image are drawn until at least half of the block's pixels differ: where both are black, nothing is
    swapped. Of an image that after a thousand draws has no such block, the one that differs most is taken.
    """
    total, _, height, width = normal.shape
    high, wide = max(1, height // TILES), max(1, width // TILES)
    x = normal[:n].copy()
    masks = np.zeros((len(x), height, width), dtype=np.bool_)
    for i, image in enumerate(x):
        rng, best = chance(SWAPPED, i), -1
        for _ in range(1000):
            top, left = int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1))
            place = np.s_[:, top : top + high, left : left + wide]
            donor = normal[(i + 1 + int(rng.integers(max(1, total - 1)))) % total]
            differ = (donor[place] != normal[i][place]).any(axis=0)
            if differ.sum() > best:
                best = int(differ.sum())
                image[:] = normal[i]
                image[place] = donor[place]
                masks[i] = (image != normal[i]).any(axis=0)
            if 2 * best >= differ.size:
                break
    return Odd(SWAPPED, x, masks)


def drawn(kind: shapes.Anomaly, n: int) -> Odd:
    """Pictures that come after all those of the data set, with a fault."""
    pictures = [shapes.draw(data.SHAPES + i, kind) for i in range(n)]
    x = np.stack([picture.pixels for picture in pictures])
    return Odd(f"drawn: {kind}", x, np.stack([picture.mask for picture in pictures]))
