"""Images between bytes and pixels: decode what a client sends, encode what it gets.

Pixels are uint8 arrays (C, H, W) with one channel (grey) or three (RGB), as workers take and give them. What a client
sends is not trusted: size is read from the header and checked before anything is decoded, and only the four formats'
own decoders are ever asked.
"""

from __future__ import annotations

import asyncio
import base64
import io
import math
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

from service.messages import Pixels
from service.schemas import Format, ImageShape

P = ParamSpec("P")
R = TypeVar("R")

MEDIA_TYPES: dict[Format, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "npy": "application/octet-stream",
}
_GRID_PADDING = 2  # pixels between the images of a grid
_LOOP_PIXELS = 100_000  # more than these, and a codec takes more than a few milliseconds: off the event loop

_NPY_ENTRIES = (
    re.compile(rb"'descr':\s*'([^']*)'"),
    re.compile(rb"'fortran_order':\s*(True|False)"),
    re.compile(rb"'shape':\s*\(([\d,\s]*)\)"),
)

# All that Pillow's decoders and zlib raise for bytes that are no image of their format.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
)


class ImageRefused(ValueError):
    """An image that is not taken; the message says what it is and what would be."""


class OtherShape(ImageRefused):
    """An image of another size or channel count than is taken. Resized, it would be."""


@dataclass(frozen=True)
class Decoded:
    pixels: Pixels  # (C, H, W), of the shape that was asked for
    resized: bool  # it had another size or channel count


async def off_loop(pixels: int, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """work(...), in a thread where `pixels` are so many that the event loop would feel it."""
    if pixels <= _LOOP_PIXELS:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


# --------------------------------------------------------------------------------------------------------------- encode


def encode(pixels: Pixels, format: Format) -> bytes:
    """Pixels (C, H, W) -> file. Lossless but for jpeg; npy holds (H, W, C)."""
    rows = np.ascontiguousarray(pixels.transpose(1, 2, 0))  # (H, W, C)
    out = io.BytesIO()
    if format == "npy":
        np.save(out, rows, allow_pickle=False)
        return out.getvalue()
    image = Image.fromarray(rows[:, :, 0] if rows.shape[2] == 1 else rows)
    match format:
        case "png":
            image.save(out, "PNG")
        case "jpeg":
            image.save(out, "JPEG", quality=95, subsampling=0)
        case "webp":
            image.save(out, "WEBP", lossless=True)
    return out.getvalue()


def grid(images: Sequence[Pixels]) -> Pixels:
    """N images (C, H, W) as one, row by row, as square as it goes; one image is itself."""
    if len(images) == 1:
        return images[0]
    channels, height, width = images[0].shape
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    down, right = height + _GRID_PADDING, width + _GRID_PADDING
    sheet = np.zeros((channels, rows * down - _GRID_PADDING, columns * right - _GRID_PADDING), np.uint8)
    for k, image in enumerate(images):
        top, left = k // columns * down, k % columns * right
        sheet[:, top : top + height, left : left + width] = image
    return sheet


# --------------------------------------------------------------------------------------------------------------- decode


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def from_base64(text: str) -> bytes:
    """Base64, with or without line breaks -> bytes. Raises `ImageRefused`."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as e:
        hint = "; give the part of a data URL that is after its comma" if text.startswith("data:") else ""
        raise ImageRefused(f"not base64, or cut off: {e}{hint}") from e


def decode(data: bytes, shape: ImageShape, *, resize: bool = False, max_side: int) -> Decoded:
    """An image file -> its pixels, of `shape`. Raises `ImageRefused`.

    An image of another size or channel count is refused unless `resize`: then it is scaled (Lanczos, without keeping
    its proportions), and turned to grey or RGB. Transparency is refused where it shows.
    """
    kind, open_file = _sniff(data)
    try:
        return open_file(data, shape, resize, max_side)
    except ImageRefused:
        raise
    except _DECODER_ERRORS as e:
        raise ImageRefused(f"a {kind} that cannot be decoded, or is cut off: {e}") from e


def _sniff(data: bytes) -> tuple[str, Callable[[bytes, ImageShape, bool, int], Decoded]]:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG", _png
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG", _jpeg
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP", _webp
    if data.startswith(b"\x93NUMPY"):
        return "npy", _npy
    raise ImageRefused("no image" if not data else "neither PNG, JPEG, WebP nor npy")


def _png(data: bytes, shape: ImageShape, resize: bool, max_side: int) -> Decoded:
    if data[12:16] != b"IHDR" or len(data) < 33:
        raise ImageRefused("a PNG without its header, or cut off")
    if data[24] == 16:  # the depth; Pillow would drop the low byte of most of these without a word
        raise ImageRefused("a PNG of 16 bits a channel; models take 8")
    image = PngImagePlugin.PngImageFile(io.BytesIO(data))
    return _finish(image, shape, resize, max_side, says_channels=image.mode != "P")


def _jpeg(data: bytes, shape: ImageShape, resize: bool, max_side: int) -> Decoded:
    return _finish(JpegImagePlugin.JpegImageFile(io.BytesIO(data)), shape, resize, max_side, says_channels=True)


def _webp(data: bytes, shape: ImageShape, resize: bool, max_side: int) -> Decoded:
    # Opening one allocates its canvas, so the size is read by hand.
    _check_size(*_webp_size(data), shape, resize, max_side)
    return _finish(WebPImagePlugin.WebPImageFile(io.BytesIO(data)), shape, resize, max_side, says_channels=False)


def _webp_size(data: bytes) -> tuple[int, int]:
    match data[12:16]:
        case b"VP8 " if data[23:26] == b"\x9d\x01\x2a":
            width, height = struct.unpack_from("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF
        case b"VP8L" if data[20:21] == b"\x2f":
            (bits,) = struct.unpack_from("<I", data, 21)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8X" if len(data) >= 30:
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    raise ImageRefused("a WebP without a size, or cut off")


def _npy(data: bytes, shape: ImageShape, resize: bool, max_side: int) -> Decoded:
    end, dtype, by_column, dims = _npy_header(data)
    if dtype not in ("|u1", "<u1", ">u1", "=u1"):
        raise ImageRefused(f"an npy of {dtype}; uint8 (|u1) is taken")
    if len(dims) not in (2, 3) or (len(dims) == 3 and dims[2] not in (1, 3)):
        raise ImageRefused(f"an npy of shape {dims}; (height, width) and (height, width, 1 or 3) are taken")
    height, width = dims[:2]
    _check_size(width, height, shape, resize, max_side)
    content = np.frombuffer(data, np.uint8)[end:]
    if content.size != math.prod(dims):
        raise ImageRefused(
            f"an npy of {content.size:,} bytes for shape {dims}, which is {math.prod(dims):,}: cut off, or too long"
        )
    array = content.reshape(dims, order="F" if by_column else "C")
    rows = np.ascontiguousarray(array if array.ndim == 2 or dims[2] == 3 else array[:, :, 0])
    return _fit(Image.fromarray(rows), shape, resize)


def _npy_header(data: bytes) -> tuple[int, str, bool, tuple[int, ...]]:
    """Where the content begins, its dtype, whether columns come first, its shape.

    Not by numpy: that reads the header as Python, which bytes of a stranger can make slow or raise anything at all.
    """
    match data[6:7]:
        case b"\1":
            (length,) = struct.unpack_from("<H", data, 8)
            begin = 10
        case b"\2" | b"\3":
            (length,) = struct.unpack_from("<I", data, 8)
            begin = 12
        case version:
            raise ImageRefused(f"an npy of version {int.from_bytes(version)}; 1 to 3 are taken")
    header = data[begin : begin + length]
    dtype, by_column, dims = (pattern.search(header) for pattern in _NPY_ENTRIES)
    if len(header) < length or not (dtype and by_column and dims):
        raise ImageRefused("an npy whose header cannot be read, or is cut off")
    shape = tuple(int(dim) for dim in dims[1].split(b",") if dim.strip())
    return begin + length, dtype[1].decode("latin-1"), by_column[1] == b"True", shape


def _finish(image: ImageFile, shape: ImageShape, resize: bool, max_side: int, *, says_channels: bool) -> Decoded:
    """Decode an opened file. says_channels: that it is RGB means more than that its format knows no grey."""
    _check_size(*image.size, shape, resize, max_side)
    if getattr(image, "n_frames", 1) > 1:
        raise ImageRefused(f"an animated {image.format}; give one still image")
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        raise ImageRefused(f"a {image.format} in {image.mode}; grey and RGB of 8 bits a channel are taken")
    image.load()
    return _fit(_opaque(image), shape, resize, says_channels=says_channels)


def _opaque(image: Image.Image) -> Image.Image:
    """Grey or RGB. Transparency that shows is refused: what lies behind it would be a guess."""
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        lowest, _ = image.getchannel("A").getextrema()
        if lowest != 255:
            raise ImageRefused("an image with transparent pixels; put it on a background first")
    return image.convert("L" if grey else "RGB")


def _fit(image: Image.Image, shape: ImageShape, resize: bool, *, says_channels: bool = True) -> Decoded:
    """A grey or RGB image -> pixels of `shape`."""
    wanted = "L" if shape.channels == 1 else "RGB"
    if not says_channels and wanted == "L" and image.mode == "RGB" and _is_grey(image):
        image = image.getchannel("R")
    size = (shape.width, shape.height)
    resized = image.mode != wanted or image.size != size
    if resized and not resize:
        raise OtherShape(_other(*image.size, len(image.getbands()), shape))
    if image.mode != wanted:
        image = image.convert(wanted)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    rows: NDArray[np.uint8] = np.asarray(image, np.uint8).reshape(shape.height, shape.width, shape.channels)
    return Decoded(np.ascontiguousarray(rows.transpose(2, 0, 1)), resized)


def _is_grey(image: Image.Image) -> bool:
    red, green, blue = (np.asarray(band) for band in image.split())
    return bool((red == green).all() and (green == blue).all())


def _check_size(width: int, height: int, shape: ImageShape, resize: bool, max_side: int) -> None:
    if width < 1 or height < 1:
        raise ImageRefused(f"an image of {width}×{height}: without pixels")
    if width > max_side or height > max_side:
        raise ImageRefused(f"an image of {width}×{height}; {max_side}×{max_side} is the largest that is decoded")
    if not resize and (width, height) != (shape.width, shape.height):
        raise OtherShape(_other(width, height, None, shape))


def _other(width: int, height: int, channels: int | None, shape: ImageShape) -> str:
    def told(width: int, height: int, channels: int | None) -> str:
        return f"{width}×{height}" + (f" with {channels} channel{'s' * (channels != 1)}" if channels else "")

    wanted = told(shape.width, shape.height, shape.channels)
    return f"an image of {told(width, height, channels)}; the model takes {wanted}"
