"""python docker/sbom.py NAME VERSION FILE: what an image is made of, as a CycloneDX 1.6 document.

It lists the distributions of the Python that runs it, and Debian's packages where there are any. Runs inside the image
while it is built; needs the standard library alone.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

DPKG = Path("/var/lib/dpkg/status")


def document(name: str, version: str, dpkg: Path = DPKG) -> dict[str, Any]:
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": name, "version": version}},
        "components": [*_python(), *_debian(dpkg)],
    }


def _python() -> list[dict[str, Any]]:
    found = {(d.metadata["Name"], d.version): d for d in metadata.distributions()}
    return [_python_component(found[key]) for key in sorted(found)]


def _python_component(distribution: metadata.Distribution) -> dict[str, Any]:
    name, version = distribution.metadata["Name"], distribution.version
    purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{version.replace('+', '%2B')}"
    component: dict[str, Any] = {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}
    if licence := distribution.metadata.get("License-Expression"):
        component["licenses"] = [{"expression": licence}]
    return component


def _debian(dpkg: Path) -> list[dict[str, Any]]:
    if not dpkg.exists():
        return []
    components = []
    for paragraph in dpkg.read_text(encoding="utf-8").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
        if fields.get("Status") == "install ok installed":
            name, version = fields["Package"], fields["Version"]
            purl = f"pkg:deb/{name}@{version.replace('+', '%2B')}?arch={fields['Architecture']}"
            components.append({"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl})
    return components


def main(name: str, version: str, file: str) -> None:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(name, version), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
