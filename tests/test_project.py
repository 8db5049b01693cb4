"""The outer parts keep their word: pinned dependencies, links that lead somewhere, duties that exist."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

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
    missing = [target for target in targets if not (page.parent / target.split("#")[0]).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_the_duties_that_pages_name_are_in_the_makefile(page: Path) -> None:
    duties = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= duties
