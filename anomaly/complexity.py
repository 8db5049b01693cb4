"""How many bits an image takes, compressed without loss: a measure of its complexity that needs no model.

A likelihood alone is no anomaly score: simple images are likely under every model. S = NLL bits − complexity bits
(Serrà et al., arXiv 1909.11480) takes that out.

Every image that is scored is compressed, so it must not cost more than the model's own pass: all of WebP's effort would
take twenty times as long as all else here, for 2 % of an image of 28×28.
"""

from __future__ import annotations

import io
import zlib
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def compressed_bits(pixels: NDArray[np.uint8]) -> float:
    """Of (C, H, W): the least of PNG, zlib and lossless WebP, each less what it takes for an image of one level."""
    channels, height, width = pixels.shape
    return float(8 * min(a - b for a, b in zip(_sizes(pixels), _headers(channels, height, width), strict=True)))


@cache
def _headers(channels: int, height: int, width: int) -> tuple[int, ...]:
    return _sizes(np.zeros((channels, height, width), np.uint8))


def _sizes(pixels: NDArray[np.uint8]) -> tuple[int, ...]:
    """Bytes as PNG, zlib, WebP."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return _size(image, "PNG", compress_level=9), len(zlib.compress(pixels.tobytes(), 9)), _webp(image)


def _webp(image: Image.Image) -> int:
    return _size(image.convert("RGB"), "WEBP", lossless=True, quality=25, method=4)


def _size(image: Image.Image, format: str, **options: object) -> int:
    written = io.BytesIO()
    image.save(written, format, **options)
    return len(written.getvalue())
