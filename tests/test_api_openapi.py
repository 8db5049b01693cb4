"""The OpenAPI document says what the API does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from api_fakes import Api, b64, file_of, picture

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def api(tmp_path: Path) -> Api:
    return Api(tmp_path)


@pytest.fixture
def document(api: Api) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(api.app.openapi()))
    return document


def schema(document: dict[str, Any], name: str) -> dict[str, Any]:
    """A component's schema, with all that it refers to."""
    return {"$ref": f"#/components/schemas/{name}", "components": document["components"]}


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from references(child)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    found = set(references(document))
    assert found
    for reference in found:
        target: Any = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]


def test_the_document_stays_whole_when_it_is_asked_for_twice(api: Api) -> None:
    assert "ScoreForm" in api.app.openapi()["components"]["schemas"]
    assert "ScoreForm" in api.app.openapi()["components"]["schemas"]


def test_every_route_is_documented_with_its_problems(document: dict[str, Any]) -> None:
    assert document["paths"].keys() == {
        *("/generate", "/score", "/models", "/models/{model_id}", "/healthz", "/readyz", "/metrics"),
        *("/jobs/{job_id}", "/jobs/{job_id}/events", "/models/{model_id}/calibration"),
    }
    for path in document["paths"].values():
        for operation in path.values():
            assert operation["summary"]
            assert operation["description"]
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    assert response["content"].keys() == {"application/problem+json"}, (operation["summary"], status)
    generate = document["paths"]["/generate"]["post"]
    assert generate["responses"]["200"]["content"].keys() == {"application/json", "image/png", "text/event-stream"}
    assert {"400", "404", "406", "413", "415", "422", "429", "500", "503", "504"} < generate["responses"].keys()
    score = document["paths"]["/score"]["post"]
    assert score["requestBody"]["content"].keys() == {"application/json", "multipart/form-data"}
    calibration = document["paths"]["/models/{model_id}/calibration"]
    assert calibration.keys() == {"get", "post", "put"}
    assert calibration["post"]["requestBody"]["content"].keys() == {"application/json", "multipart/form-data"}
    assert {"403", "409"} < calibration["post"]["responses"].keys()
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_the_examples_of_requests_are_requests(document: dict[str, Any]) -> None:
    for name in ("GenerateRequest", "ScoreRequest", "CalibrationRequest", "ChooseCalibration"):
        component = document["components"]["schemas"][name]
        assert component["examples"]
        for example in component["examples"]:
            jsonschema.validate(example, schema(document, name))
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**component["examples"][0], "unknown": 1}, schema(document, name))


async def test_answers_are_as_documented(api: Api, document: dict[str, Any]) -> None:
    image = b64(file_of(picture(1, 0, (1, 4, 5))))
    (api.folder / "broken").mkdir()
    (api.folder / "broken" / "model.json").write_text("{")
    api.catalog.refresh()
    for response, name in (
        (await api.post("/generate", {"model": "gan", "n": 2}), "GenerateResponse"),
        (await api.post("/score", {"model": "diffusion", "images": [image]}), "ScoreResponse"),
        (await api.post("/score", {"model": "energy", "images": [image]}), "ScoreResponse"),
        (await api.get("/models"), "ModelList"),
        (await api.get("/models/diffusion/calibration"), "CalibrationVersions"),
        (await api.get("/models/gan/calibration"), "ProblemDetails"),
        (await api.get("/models/broken"), "ModelEntry"),
        (await api.get("/healthz"), "Health"),
        (await api.get("/readyz"), "Health"),
        (await api.get("/models/none"), "ProblemDetails"),
        (await api.post("/generate", {"model": "gan", "n": 0}), "ProblemDetails"),
        (await api.post("/generate", {"model": "gan", "n": "x", "seed": [1, {"a": None}]}), "ProblemDetails"),
    ):
        jsonschema.validate(response.json(), schema(document, name))


async def test_the_pages_are_served(api: Api) -> None:
    assert (await api.get("/docs")).status_code == 200
    assert (await api.get("/openapi.json")).json()["info"]["title"] == "Drawwell"


def test_the_api_process_imports_no_torch() -> None:
    code = "import sys, service.app; sys.exit(any(m in sys.modules for m in ('torch', 'models', 'safetensors.torch')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False).returncode == 0
