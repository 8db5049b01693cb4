"""The image codec: lossless round trips, and nothing but a refusal for bytes that are no image of the model's shape."""

from __future__ import annotations

import base64
import io
import math
import struct
import tracemalloc
import zlib
from typing import Any

import hypothesis.extra.numpy as npst
import hypothesis.strategies as st
import numpy as np
import pytest
from api_fakes import file_of, picture
from hypothesis import given, settings
from PIL import Image

from service.images import Decoded, ImageRefused, decode, encode, from_base64, grid
from service.messages import Pixels
from service.schemas import ImageShape

LOSSLESS = ("png", "webp", "npy")


def shape_of(pixels: Pixels) -> ImageShape:
    channels, height, width = pixels.shape
    return ImageShape(width=width, height=height, channels=channels)


def read(data: bytes, shape: ImageShape, resize: bool = False, max_side: int = 4096) -> Decoded:
    return decode(data, shape, resize=resize, max_side=max_side)


@st.composite
def images(draw: st.DrawFn) -> Pixels:
    shape = (draw(st.sampled_from([1, 3])), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    return draw(npst.arrays(np.uint8, shape))


# -------------------------------------------------------------------------------------------------------- round trips


@given(images(), st.sampled_from(LOSSLESS), st.booleans())
def test_what_is_encoded_without_loss_decodes_to_itself(pixels: Pixels, format: Any, resize: bool) -> None:
    decoded = read(encode(pixels, format), shape_of(pixels), resize)
    assert (decoded.pixels == pixels).all()
    assert decoded.pixels.shape == pixels.shape
    assert decoded.pixels.dtype == np.uint8
    assert not decoded.resized


@given(images())
def test_png_and_jpeg_decode_as_pillow_decodes_them(pixels: Pixels) -> None:
    for format in ("png", "jpeg"):
        data = encode(pixels, format)
        expected = np.asarray(Image.open(io.BytesIO(data)))
        expected = expected[None] if expected.ndim == 2 else expected.transpose(2, 0, 1)
        assert (read(data, shape_of(pixels)).pixels == expected).all()


@given(images(), st.booleans())
def test_npy_is_read_in_either_order_and_grey_with_or_without_its_axis(pixels: Pixels, fortran: bool) -> None:
    rows = pixels.transpose(1, 2, 0)
    arrays = [rows] + ([rows[:, :, 0]] if rows.shape[2] == 1 else [])
    for array in arrays:
        out = io.BytesIO()
        np.save(out, np.asfortranarray(array) if fortran else np.ascontiguousarray(array))
        assert (read(out.getvalue(), shape_of(pixels)).pixels == pixels).all()


@given(st.integers(1, 20), st.sampled_from([1, 3]), st.integers(1, 6), st.integers(1, 6))
def test_every_image_is_in_its_cell_of_the_grid(n: int, channels: int, height: int, width: int) -> None:
    drawn = [picture(3, k, (channels, height, width)) for k in range(n)]
    sheet = grid(drawn)
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    assert sheet.shape == (channels, rows * (height + 2) - 2, columns * (width + 2) - 2)
    for k, image in enumerate(drawn):
        top, left = k // columns * (height + 2), k % columns * (width + 2)
        assert (sheet[:, top : top + height, left : left + width] == image).all()
    assert int(sheet.astype(int).sum()) == sum(int(image.astype(int).sum()) for image in drawn)


def test_the_grid_of_one_image_is_itself() -> None:
    image = picture(3, 0, (3, 4, 5))
    assert (grid([image]) == image).all()


# --------------------------------------------------------------------------------------------------- modes and shapes

GREY, COLOUR = picture(1, 0, (1, 6, 7)), picture(1, 0, (3, 6, 7))
GREY_SHAPE, COLOUR_SHAPE = shape_of(GREY), shape_of(COLOUR)


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def image_of(pixels: Pixels) -> Image.Image:
    rows = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    return Image.fromarray(rows[:, :, 0] if rows.shape[2] == 1 else rows)


def test_black_and_white_is_grey() -> None:
    image = image_of(GREY).convert("1")
    expected = np.where(np.asarray(image), 255, 0)
    assert (read(saved(image), GREY_SHAPE).pixels[0] == expected).all()


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_opaque_transparency_is_dropped(format: str) -> None:
    data = saved(image_of(COLOUR).convert("RGBA"), format, **({"lossless": True} if format == "WEBP" else {}))
    assert (read(data, COLOUR_SHAPE).pixels == COLOUR).all()
    assert (read(saved(image_of(GREY).convert("LA")), GREY_SHAPE).pixels == GREY).all()


@pytest.mark.parametrize("resize", [False, True])
def test_transparency_that_shows_is_refused(resize: bool) -> None:
    image = image_of(COLOUR).convert("RGBA")
    image.putpixel((2, 3), (1, 2, 3, 254))
    palette = image_of(COLOUR).quantize(16)
    files = [
        saved(image),
        saved(image, "WEBP", lossless=True),
        saved(palette, transparency=palette.getpixel((0, 0))),
        saved(image_of(GREY), transparency=int(GREY[0, 0, 0])),
    ]
    for data, shape in zip(files, (COLOUR_SHAPE, COLOUR_SHAPE, COLOUR_SHAPE, GREY_SHAPE), strict=True):
        with pytest.raises(ImageRefused, match="transparent"):
            read(data, shape, resize)


def test_a_palette_is_its_colours() -> None:
    palette = image_of(COLOUR).quantize(16)
    expected = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    assert (read(saved(palette), COLOUR_SHAPE).pixels == expected).all()


def test_formats_without_grey_give_grey_when_every_pixel_is() -> None:
    palette = image_of(GREY).convert("RGB").quantize(64)
    for data in (saved(palette), saved(image_of(GREY), "WEBP", lossless=True)):
        assert read(data, GREY_SHAPE).pixels.shape == GREY.shape
        assert read(data, COLOUR_SHAPE).pixels.shape == COLOUR.shape
    with pytest.raises(ImageRefused, match="3 channels"):
        read(saved(image_of(COLOUR), "WEBP", lossless=True), GREY_SHAPE)


@pytest.mark.parametrize(("pixels", "shape"), [(COLOUR, GREY_SHAPE), (GREY, COLOUR_SHAPE)])
@pytest.mark.parametrize("format", ["png", "jpeg", "npy"])
def test_another_channel_count_is_refused_unless_it_may_be_changed(
    pixels: Pixels, shape: ImageShape, format: Any
) -> None:
    data = encode(pixels, format)
    with pytest.raises(ImageRefused, match=rf"with {len(pixels)} channel.*with {shape.channels} channel"):
        read(data, shape)
    decoded = read(data, shape, resize=True)
    assert decoded.resized
    assert decoded.pixels.shape == (shape.channels, 6, 7)


@given(images(), st.integers(1, 12), st.integers(1, 12), st.sampled_from(["png", "webp", "jpeg", "npy"]))
def test_another_size_is_refused_unless_it_may_be_changed(pixels: Pixels, width: int, height: int, format: Any) -> None:
    data, shape = encode(pixels, format), ImageShape(width=width, height=height, channels=len(pixels))
    if pixels.shape[1:] == (height, width):
        assert not read(data, shape, resize=True).resized
        return
    with pytest.raises(ImageRefused, match=rf"{pixels.shape[2]}×{pixels.shape[1]}.*takes {width}×{height} with"):
        read(data, shape)
    decoded = read(data, shape, resize=True)
    assert decoded.resized
    assert decoded.pixels.shape == (len(pixels), height, width)


@given(st.integers(0, 255), st.integers(1, 30), st.integers(1, 30))
def test_resizing_keeps_a_constant_image_constant(value: int, width: int, height: int) -> None:
    data = encode(np.full((3, height, width), value, np.uint8), "png")
    assert (read(data, COLOUR_SHAPE, resize=True).pixels == value).all()


@pytest.mark.parametrize("dtype", ["I;16", "I", "F"])
def test_images_of_more_bits_are_refused(dtype: str) -> None:
    if dtype == "F":
        out = io.BytesIO()
        np.save(out, GREY[0].astype(np.float32) / 255)
        data, word = out.getvalue(), "f4; uint8"
    else:
        data, word = saved(Image.fromarray(GREY[0].astype(np.uint16) * 257)), "16 bits"
    with pytest.raises(ImageRefused, match=word):
        read(data, GREY_SHAPE)


def png(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour", "samples"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_no_png_of_16_bits_is_taken_with_half_its_bits(colour: int, samples: int) -> None:
    data = png(7, 6, 16, colour, b"".join(b"\0" + bytes(7 * samples * 2) for _ in range(6)))
    for shape in (GREY_SHAPE, COLOUR_SHAPE):
        with pytest.raises(ImageRefused, match="16 bits"):
            read(data, shape, resize=True)


def test_cmyk_is_refused_by_name() -> None:
    with pytest.raises(ImageRefused, match="JPEG in CMYK"):
        read(saved(image_of(COLOUR).convert("CMYK"), "JPEG"), COLOUR_SHAPE)


def test_an_animation_of_one_frame_is_a_still_image() -> None:
    data = saved(image_of(GREY), save_all=True, append_images=[])
    assert (read(data, GREY_SHAPE).pixels == GREY).all()


@pytest.mark.parametrize("array", [np.zeros((3, 6, 7), np.uint8), np.zeros(4, np.uint8), np.zeros((6, 7, 4), np.uint8)])
def test_npy_of_another_layout_is_refused_with_the_right_one(array: Any) -> None:
    out = io.BytesIO()
    np.save(out, array)
    with pytest.raises(ImageRefused, match=r"\(height, width, 1 or 3\)"):
        read(out.getvalue(), COLOUR_SHAPE)


def test_npy_is_never_unpickled() -> None:
    out = io.BytesIO()
    np.save(out, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ImageRefused, match=r"npy of \|O"):
        read(out.getvalue(), GREY_SHAPE)


# -------------------------------------------------------------------------------------------------------------- bombs


def webp_canvas(width: int, height: int, kind: bytes) -> bytes:
    """The beginning of a WebP that says it is of this size."""
    match kind:
        case b"VP8X":
            content = bytes([0, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        case b"VP8L":
            content = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14)
        case _:
            content = b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height)
    content += bytes(20)
    return b"RIFF" + struct.pack("<I", 12 + len(content)) + b"WEBP" + kind + struct.pack("<I", len(content)) + content


def npy_header(shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return out.getvalue()


def jpeg_of(width: int, height: int) -> bytes:
    """A JPEG whose header says another size than its data has."""
    data = bytearray(file_of(GREY, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


BOMBS = {
    "png": png(50_000, 50_000, 8, 0, bytes(1000)),
    "jpeg": jpeg_of(50_000, 50_000),
    "webp lossy": webp_canvas(16_383, 16_383, b"VP8 "),
    "webp lossless": webp_canvas(16_383, 16_383, b"VP8L"),
    "webp extended": webp_canvas(50_000, 50_000, b"VP8X"),
    "npy": npy_header((50_000, 50_000)),
}


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("name", list(BOMBS))
def test_a_bomb_is_refused_before_anything_is_allocated(name: str, resize: bool) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ImageRefused, match=r"(50000×50000|16383×16383); 4096×4096 is the largest"):
            read(BOMBS[name], GREY_SHAPE, resize)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_an_image_that_says_more_than_it_holds_is_refused() -> None:
    for data in (png(4000, 4000, 8, 0, bytes(1000)), npy_header((4000, 4000))):
        with pytest.raises(ImageRefused, match="cut off"):
            read(data, GREY_SHAPE, resize=True)


@pytest.mark.parametrize("side", [0, 5])
def test_an_npy_without_pixels_is_refused(side: int) -> None:
    with pytest.raises(ImageRefused, match="without pixels"):
        read(npy_header((0, side)), GREY_SHAPE, resize=True)


# ---------------------------------------------------------------------------------------------- whatever bytes come in

FILES = {
    "png": encode(COLOUR, "png"),
    "jpeg": encode(COLOUR, "jpeg"),
    "webp": encode(COLOUR, "webp"),
    "npy": encode(COLOUR, "npy"),
    "palette": saved(image_of(COLOUR).quantize(16)),
    "apng": saved(image_of(GREY), save_all=True, append_images=[image_of(GREY[:, ::-1])]),
}


@pytest.mark.parametrize("name", list(FILES))
def test_a_file_cut_anywhere_is_refused_or_whole(name: str) -> None:
    data = FILES[name]
    try:
        whole = read(data, COLOUR_SHAPE).pixels
    except ImageRefused:
        whole = None
    refused = 0
    for length in range(len(data)):
        try:
            decoded = read(data[:length], COLOUR_SHAPE)
        except ImageRefused:
            refused += 1
        else:
            assert whole is not None
            assert (decoded.pixels == whole).all(), length
    assert refused >= len(data) - 24  # all but what comes after the pixels


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of oddities that it can live with
@settings(max_examples=500)
@given(
    st.sampled_from(list(FILES)),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
    st.booleans(),
)
def test_a_file_with_wrong_bytes_is_refused_or_an_image_of_the_right_shape(
    name: str, changes: list[tuple[int, int]], resize: bool
) -> None:
    data = bytearray(FILES[name])
    for place, value in changes:
        data[place % len(data)] = value
    try:
        decoded = read(bytes(data), COLOUR_SHAPE, resize, max_side=64)
    except ImageRefused:
        return
    assert decoded.pixels.shape == COLOUR.shape


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(
    st.binary(max_size=60),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8X", b"\x93NUMPY\1\0"]),
)
def test_bytes_that_are_no_image_are_refused(data: bytes, head: bytes) -> None:
    with pytest.raises(ImageRefused):
        read(head + data, GREY_SHAPE)


@settings(max_examples=50)
@given(st.text(max_size=40))
def test_text_is_base64_or_refused(text: str) -> None:
    try:
        data = from_base64(text)
    except ImageRefused:
        return
    assert base64.b64encode(data).decode() == "".join(text.split())


@given(st.binary())
def test_base64_gives_its_bytes_back_in_lines_too(data: bytes) -> None:
    assert from_base64(base64.encodebytes(data).decode()) == data
