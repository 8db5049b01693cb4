"""C beside a family's file: it computes what the tensor operations do, chain by chain, and can be done without."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from models import _native, _rows, pixelcnn
from models._pixelcnn_sampler import PixelRows, Sampler
from models._protocol import Draw, ImageSpace

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "cc").split()[0]) is None, reason="no C compiler on this machine"
)
COLOUR = ImageSpace(width=5, height=4, channels=3, labels=("a", "b"))
GREY = ImageSpace(width=6, height=6, channels=1)


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Libraries are looked for anew in every test."""
    _native.library.cache_clear()
    yield monkeypatch
    _native.library.cache_clear()


def model(space: ImageSpace, features: int = 24, levels: int = 16) -> pixelcnn.Model:
    """Features and levels that are no multiples of the vectors' lanes as well as such that are."""
    torch.manual_seed(0)
    config = pixelcnn.Config(features=features, dilations=(1, 2, 1), hidden=40, embedding=6, levels=levels)
    made: pixelcnn.Model = pixelcnn.Model(config, space).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def draws(space: ImageSpace, n: int) -> list[Draw]:
    steps = space.width * space.height
    return [Draw(k, k % 3, steps, label=k % 3 - 1, temperature=0.5 + 0.3 * (k % 4)) for k in range(n)]


def drawn(made: pixelcnn.Model, rows: PixelRows) -> PixelRows:
    with torch.inference_mode():
        while int(rows.left.max()) > 0:
            rows = made.step(rows)
    return rows


@needs_compiler
@pytest.mark.parametrize("space", [COLOUR, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize(("features", "levels"), [(24, 16), (64, 256), (5, 3)])
def test_c_draws_what_tensor_operations_draw(
    space: ImageSpace, features: int, levels: int, native: pytest.MonkeyPatch
) -> None:
    made, asked = model(space, features, levels), draws(space, 6)
    in_c = drawn(made, made.init(asked))
    native.setenv("DRAWWELL_NATIVE", "0")
    _native.library.cache_clear()
    in_torch = drawn(made, made.init(asked))
    assert torch.equal(in_c.levels, in_torch.levels)
    torch.testing.assert_close(in_c.past, in_torch.past, rtol=1e-4, atol=1e-5)
    assert torch.equal(in_c.pixels, in_torch.pixels)


@needs_compiler
@torch.inference_mode()
def test_a_chain_computes_the_same_bits_in_a_batch_of_any_size() -> None:
    """Of the part that stands in C; what the vertical stack tells it is given."""
    made, asked = model(GREY), draws(GREY, 9)
    rows = made.init(asked[:1])
    for draw in asked[1:]:  # every chain a pixel ahead of the next
        rows = _rows.cat([made.step(rows), made.init([draw])])
    together = _rows.take(rows, range(9))
    sampler = Sampler(made.network)
    assert sampler._tick_in_c(together)
    for size in range(1, 9):
        for first in range(9 - size):
            part = _rows.take(rows, range(first, first + size))
            assert sampler._tick_in_c(part)
            assert _rows.equal(part, _rows.take(together, range(first, first + size))), (first, size)


@needs_compiler
@torch.inference_mode()
def test_a_row_that_is_not_a_number_is_named() -> None:
    made = model(GREY)
    rows = made.step(made.init(draws(GREY, 3)))
    rows.told[1] = torch.nan
    with pytest.raises(FloatingPointError, match="row 1"):
        made.step(dataclasses.replace(rows))


@needs_compiler
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_of_a_model_reads_its_own_weights(copied: Callable[[pixelcnn.Model], pixelcnn.Model]) -> None:
    """Though the original knew the addresses of its own."""
    made = model(GREY)
    half = made.init(draws(GREY, 2))
    with torch.inference_mode():
        for _ in range(GREY.width + 2):
            half = made.step(half)
    other, rest = copied(made), _rows.take(half, range(2))
    expected = drawn(made, half).levels
    with torch.no_grad():
        made.network.now.add_(1.0)
    assert torch.equal(drawn(other, rest).levels, expected)
    assert not torch.equal(drawn(made, made.init(draws(GREY, 2))).levels, expected)


@needs_compiler
def test_what_was_compiled_is_kept(native: pytest.MonkeyPatch, tmp_path: Path) -> None:
    native.setenv("DRAWWELL_NATIVE_CACHE", str(tmp_path / "kept"))
    assert _native.library("pixelcnn") is not None
    (kept,) = (tmp_path / "kept").iterdir()
    made = kept.stat()
    _native.library.cache_clear()
    assert _native.library("pixelcnn") is not None
    assert kept.stat().st_mtime_ns == made.st_mtime_ns


needs_v3 = pytest.mark.skipif(
    not _native.NEEDS["x86-64-v3"] <= set(_native._features().split()),
    reason="this machine's processor is no x86-64-v3",
)


@needs_compiler
@needs_v3
def test_what_was_made_ahead_needs_no_compiler_and_draws_the_same(native: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As container images carry it: compiled for a kind of processor, then read by a user who cannot write there."""
    made, asked = model(GREY, 64, 256), draws(GREY, 6)
    for_this_machine = drawn(made, made.init(asked))
    native.setenv("DRAWWELL_NATIVE_MARCH", "x86-64-v3")
    native.setenv("DRAWWELL_NATIVE_CACHE", str(tmp_path))
    assert _native.main() == 0
    native.setenv("CC", "no-such-compiler")
    _native.library.cache_clear()
    tmp_path.chmod(0o555)
    assert _native.library("pixelcnn") is not None
    for_its_kind = drawn(made, made.init(asked))
    assert torch.equal(for_its_kind.levels, for_this_machine.levels)
    assert torch.equal(for_its_kind.pixels, for_this_machine.pixels)


@needs_compiler
def test_what_was_made_ahead_is_told_apart_by_its_source(native: pytest.MonkeyPatch, tmp_path: Path) -> None:
    native.setenv("DRAWWELL_NATIVE_MARCH", "x86-64-v3")
    native.setenv("DRAWWELL_NATIVE_CACHE", str(tmp_path / "kept"))
    source = tmp_path / "_sum.c"
    names = set()
    for content in ("int f(void) { return 1; }", "int f(void) { return 2; }"):
        source.write_text(content, encoding="utf-8")
        names.add(_native._target(source, ["cc"], ["-march=x86-64-v3"]).name)
    names.add(_native._target(source, ["another-compiler"], ["-march=x86-64-v3"]).name)
    names.add(_native._target(source, ["cc"], ["-march=armv8-a"]).name)
    assert len(names) == 3


def test_a_processor_of_another_kind_does_without(native: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    native.setenv("DRAWWELL_NATIVE_MARCH", "x86-64-v3")
    native.setattr(_native, "_features", lambda: "flags : fpu sse sse2 avx avx2 bmi1 bmi2 f16c movbe abm")
    with caplog.at_level(logging.WARNING):
        assert _native.library("pixelcnn") is None
    assert "lacks fma" in caplog.text


def test_without_a_compiler_nothing_is_made_ahead(native: pytest.MonkeyPatch, tmp_path: Path) -> None:
    native.setenv("DRAWWELL_NATIVE_CACHE", str(tmp_path))
    native.setenv("CC", "no-such-compiler")
    assert _native.main() == 1


@pytest.mark.parametrize("variable", [("DRAWWELL_NATIVE", "0"), ("CC", "no-such-compiler"), ("CC", "")])
def test_it_can_be_done_without(variable: tuple[str, str], native: pytest.MonkeyPatch) -> None:
    native.setenv(*variable)
    assert _native.library("pixelcnn") is None


def test_a_compiler_that_fails_is_told(
    native: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    native.setenv("CC", "false")
    native.setenv("DRAWWELL_NATIVE_CACHE", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert _native.library("pixelcnn") is None
    assert "cannot be compiled" in caplog.text
