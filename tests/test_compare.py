"""Tables and a chart of what was measured: from model.json files alone, between the markers of two pages."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import models
import training.__main__ as command
from models import _checkpoint, gaussian
from models._protocol import Batch, ImageSpace, unlabelled
from training import compare as module
from training.chart import COLOURS, Point, quality_and_speed
from training.compare import Entry, between_markers, compare, entry, found
from training.errors import RunError

SPACE = ImageSpace(4, 4, 1)
MEASURED: dict[str, dict[str, Any]] = {
    "bits_per_dim": {"value": 6.46154, "stderr": 0.0112},
    "fd_local": {"value": 505.18, "real": 3.14},
    "density": {"value": 0.436, "real": 0.998},
    "coverage": {"value": 0.108, "real": 0.971},
    "label_agreement": {"value": 0.7944, "real": 0.9246},
    "images_per_second_batch_1": {"value": 43.56, "data": "CPU, 1 thread"},
    "images_per_second_batch_16": {"value": 656.1, "data": "CPU, 1 thread"},
}


def checkpoint(folder: Path, metrics: dict[str, Any], data: str = "toys") -> Path:
    config = gaussian.Config(components=2, rank=1)
    model = gaussian.Model(config, SPACE)
    x = torch.rand(20, *SPACE.shape)
    with torch.no_grad():
        model.prepare([Batch(x, unlabelled(x))])
    _checkpoint.save(folder, model, config, {"data": {"name": data}, "metrics": metrics})
    return folder


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Two checkpoints: the better one measured in full, the other not at all."""
    checkpoint(tmp_path / "zoo" / "toys-measured", MEASURED)
    checkpoint(tmp_path / "zoo" / "toys-another", {})
    (tmp_path / "zoo" / "notes").mkdir()
    return tmp_path / "zoo"


@pytest.fixture
def pages(tmp_path: Path) -> tuple[Path, Path]:
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "README.md"
    page.parent.mkdir()
    readme.write_text("before\n<!-- families: begin (from cards) -->\nold\n<!-- families: end -->\nafter\n")
    page.write_text("top\n<!-- measured: begin -->\n<!-- measured: end -->\n")
    return readme, page


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| \n").split(" | ")]


def test_tables_and_chart_hold_what_was_measured_and_a_dash_for_what_was_not(
    zoo: Path, pages: tuple[Path, Path]
) -> None:
    readme, page = pages
    written = compare([zoo], readme, page)
    assert written == [readme, page, page.parent / "quality-and-speed.png"]
    text = readme.read_text()
    assert text.startswith("before\n<!-- families: begin (from cards) -->\n| family |")
    assert text.endswith("<!-- families: end -->\nafter\n")
    assert "old" not in text
    _, _, measured, unmeasured, real = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert measured[1:] == [
        "[measured](zoo/toys-measured/README.md)",
        "one pass",
        "6.462 bound (dequantisation: uniform, averaged in closed form)",
        "0.794",
        "505.2",
        "0.44",
        "0.11",
        "43.6",
        "656",
    ]
    assert unmeasured[1:4] == ["[another](zoo/toys-another/README.md)", "one pass", "– bound"]
    assert unmeasured[4:] == ["–"] * 6
    assert real[0] == "*real images*"
    assert real[4:8] == ["0.925", "3.1", "1.00", "0.97"]
    full = page.read_text()
    assert "### toys" in full
    weights = (zoo / "toys-measured" / "weights.safetensors").stat().st_size
    row = next(line for line in full.splitlines() if "[measured](../zoo/toys-measured/README.md)" in line)
    assert cells(row)[2:] == [
        "pass",
        "1",
        "1",
        "bound; dequantisation: uniform, averaged in closed form",
        "6.462 ± 0.011",
        "505.2 (3.1)",
        "0.44",
        "0.11",
        "0.794",
        "43.6",
        "656",
        f"{weights / 1e6:.1f}",
    ]
    with Image.open(page.parent / "quality-and-speed.png") as image:
        assert image.format == "PNG"


def test_writing_again_changes_nothing(zoo: Path, pages: tuple[Path, Path]) -> None:
    first = [path.read_bytes() for path in compare([zoo], *pages)]
    assert [path.read_bytes() for path in compare([zoo], *pages)] == first


def test_each_data_set_has_a_table_and_the_readme_that_of_most(zoo: Path, pages: tuple[Path, Path]) -> None:
    checkpoint(zoo / "other-model", {}, data="other")
    readme, page = pages
    compare([zoo], readme, page)
    headings = [line for line in page.read_text().splitlines() if line.startswith("###")]
    assert headings == ["### other", "### toys"]
    assert "other-model" not in readme.read_text()


def test_folders_are_checkpoints_or_hold_them(zoo: Path) -> None:
    both = [zoo / "toys-another", zoo / "toys-measured"]
    assert found([zoo]) == both
    assert found([zoo / "toys-measured", zoo]) == [both[1], *both]


def broken(zoo: Path, how: str) -> Path:
    folder = zoo / "toys-measured"
    about = folder / "model.json"
    if how == "not JSON":
        about.write_text("{")
    elif how == "another format":
        about.write_text(json.dumps({"format": 99}))
    elif how == "no spec":
        content = json.loads(about.read_text())
        del content["spec"]["likelihood"]
        about.write_text(json.dumps(content))
    elif how == "no data":
        content = json.loads(about.read_text())
        del content["data"]
        about.write_text(json.dumps(content))
    elif how == "no weights":
        (folder / "weights.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("not JSON", "model.json: not JSON"),
        ("another format", "model.json: format 99"),
        ("no spec", "model.json: describes no checkpoint of this version: KeyError: 'likelihood'"),
        ("no data", "model.json: describes no checkpoint of this version: KeyError: 'data'"),
        ("no weights", "weights.safetensors: missing"),
    ],
)
def test_a_broken_folder_is_refused_by_name_and_nothing_is_written(
    zoo: Path, pages: tuple[Path, Path], how: str, message: str
) -> None:
    folder = broken(zoo, how)
    before = [path.read_text() for path in pages]
    with pytest.raises(RunError) as refused:
        compare([zoo], *pages)
    assert str(refused.value).startswith(f"{folder}: {message}")
    assert [path.read_text() for path in pages] == before


def test_the_command_says_what_it_wrote_or_what_is_wrong(
    zoo: Path, pages: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "compare", lambda folders: compare(folders, *pages))
    assert command.main(["compare", str(zoo)]) == 0
    assert str(pages[0]) in capsys.readouterr().out
    assert command.main(["compare", str(zoo / "nothing")]) == 2
    assert f"{zoo / 'nothing'}: model.json: missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "<!-- families: begin -->\n", "<!-- families: end -->\n<!-- families: begin -->\n"]
)
def test_a_page_without_markers_is_refused(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    with pytest.raises(RunError, match=r"page\.md: missing"):
        between_markers(page, "families", "")
    page.write_text(text)
    with pytest.raises(RunError, match="no lines '<!-- families: begin -->'"):
        between_markers(page, "families", "")


def test_evaluations_are_those_of_the_default_solver(zoo: Path) -> None:
    """A solver of two evaluations a step takes a single one for its last."""
    steps = {"unit": "denoising step", "default": 50, "max": 100, "network_evaluations_per_step": 1}
    spec = {"steps": steps, "solvers": ["heun", "euler"], "evaluations": {"heun": 2}, "likelihood": None}
    assert Entry(zoo, "f", "d", spec, {}, 0).evaluations == 99
    assert Entry(zoo, "f", "d", {**spec, "solvers": []}, {}, 0).evaluations == 50
    assert entry(zoo / "toys-measured").evaluations == 1


def test_the_chart_names_every_checkpoint_apart_from_the_others() -> None:
    """Also where many lie in one place: twelve points at the same quality and nearly the same speed."""
    kinds = list(COLOURS)
    crowd = [Point(f"model-{k}", 100 * 1.05**k, 20.0, kinds[k % 5], k % 2 == 0, "CPU") for k in range(12)]
    for points, floor in ((crowd, 3.0), (crowd[:1], None), ([], None)):
        image = Image.open(io.BytesIO(quality_and_speed("toys", points, floor)))
        assert image.size == (1350, 900)
        assert len(image.convert("RGB").getcolors(2**20) or []) > 10, "something is drawn"


def test_the_page_of_families_tells_of_every_family() -> None:
    page = (module.ROOT / "docs" / "families" / "README.md").read_text(encoding="utf-8")
    for family in models.family_names():
        assert f"({family}.md)" in page or f"(../../models/{family}.py)" in page, family
    between_markers(module.ROOT / "docs" / "families" / "README.md", "measured", "")
    between_markers(module.ROOT / "README.md", "families", "")
