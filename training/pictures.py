"""Sheets of small images as PNG: samples by class, and samples beside their nearest training images."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

GAP = 2  # pixels between images
SMALL = 56  # images narrower than this are shown larger by a whole factor, pixel by pixel


def sheet(images: NDArray[np.uint8], columns: int, labels: Sequence[str] = ()) -> bytes:
    """Images (N, C, H, W), C 1 or 3, row by row as a PNG on white; each row's label, if there are any, on its left."""
    n, channels, height, width = images.shape
    scale = max(1, SMALL // width)
    cell_w, cell_h = width * scale + GAP, height * scale + GAP
    rows = -(-n // columns)
    font = ImageFont.load_default(size=max(10, min(16, cell_h // 3)))
    margin = max((int(font.getlength(label)) for label in labels), default=-2 * GAP) + 4 * GAP
    mode = "L" if channels == 1 else "RGB"
    canvas = Image.new(mode, (margin + columns * cell_w, GAP + rows * cell_h), "white")
    for i, image in enumerate(images):
        pixels = image[0] if channels == 1 else image.transpose(1, 2, 0)
        tile = Image.fromarray(np.ascontiguousarray(pixels), mode=None).resize(
            (width * scale, height * scale), Image.Resampling.NEAREST
        )
        canvas.paste(tile, (margin + i % columns * cell_w, GAP + i // columns * cell_h))
    pen = ImageDraw.Draw(canvas)
    for row, label in enumerate(labels[:rows]):
        pen.text((GAP, GAP + (row + 0.5) * cell_h), label, fill="black", font=font, anchor="lm")
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
