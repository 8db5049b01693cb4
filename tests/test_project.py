"""The outer parts keep their word: pinned dependencies, links that lead somewhere, duties and commands that exist."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from service.__main__ import _parser as service_parser
from training.__main__ import _parser as training_parser

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "client" / "README.md"]
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def normalised(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def pinned() -> dict[str, str]:
    lines = (line.strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normalised(name): version for name, version in pairs}


def direct() -> set[str]:
    needed = []
    for path in (ROOT / "pyproject.toml", ROOT / "client" / "pyproject.toml"):
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        project = content["project"]
        extras = project.get("optional-dependencies", {}).values()
        needed += [*content["build-system"]["requires"], *project["dependencies"], *chain.from_iterable(extras)]
    return {normalised(requirement) for requirement in needed} - {"drawwell-server", "drawwell"}


def test_every_direct_dependency_is_pinned_and_nothing_else() -> None:
    assert set(pinned()) == direct()


def test_torch_is_pinned_without_a_local_part() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", pinned()["torch"])


def test_the_client_needs_three_libraries() -> None:
    content = tomllib.loads((ROOT / "client" / "pyproject.toml").read_text(encoding="utf-8"))
    assert {normalised(r) for r in content["project"]["dependencies"]} == {"httpx", "pillow", "pydantic"}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text(encoding="utf-8"))
    targets = [a or b for a, b in links if not re.match(r"https?://|#", a or b)]
    missing = [target for target in targets if not leads_somewhere(page, *target.partition("#")[::2])]
    assert missing == []


def leads_somewhere(page: Path, file: str, heading: str) -> bool:
    """Whether there is such a file beside the page, or none is named, and such a heading on it."""
    target = page.parent / file if file else page
    if not heading:
        return target.exists()
    titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
    return heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_a_page_or_decision_is_called_by_its_number(page: Path) -> None:
    links = re.findall(r"\[(?:docs/|page |decision )?(\d+)\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    numbered = [(int(said), re.match(r"\d+", Path(target).name), target) for said, target in links]
    assert [(said, target) for said, found, target in numbered if found and int(found[0]) != said] == []


def test_the_list_of_pages_has_every_page() -> None:
    folder = ROOT / "docs"
    listed = re.findall(r"\]\(([^)\s#]+)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert {page.name for page in folder.glob("*.md")} - {"README.md"} <= set(listed)
    assert {"families/README.md", "decisions/"} <= set(listed)


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_rows_of_a_table_have_as_many_cells_as_its_head(page: Path) -> None:
    """A table whose lines were wrapped like prose is none any longer."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = re.sub(r"`[^`\n]*`|\\\|", "", table).splitlines()
        assert re.fullmatch(r"[|\s:-]+", lines[1]), table
        for told, line in zip(table.splitlines(), lines, strict=True):
            assert line.rstrip().endswith("|"), told
            assert line.count("|") == lines[1].count("|"), told


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_the_commands_that_pages_show_exist_with_their_options(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parsers = {"training": training_parser, "service": service_parser}
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for module, command, rest in re.findall(r"python -m (training|service) ([a-z]+)([^`\n|#]*)", text):
        with pytest.raises(SystemExit) as ended:
            parsers[module]().parse_args([command, "--help"])
        assert ended.value.code == 0, f"python -m {module} {command}"
        options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= options, f"python -m {module} {command}{rest}"


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_the_benchmarks_that_pages_name_are_there(page: Path) -> None:
    named = re.findall(r"python -m (benchmarks(?:\.[a-z_]+)*)", page.read_text(encoding="utf-8"))
    places = [ROOT / name.replace(".", "/") for name in named]
    assert [p for p in places if not p.with_suffix(".py").exists() and not (p / "__main__.py").exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_the_duties_that_pages_name_are_in_the_makefile(page: Path) -> None:
    duties = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= duties
