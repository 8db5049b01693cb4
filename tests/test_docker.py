"""What containers are made of, as far as it can be told without Docker (`make test-docker` is the rest)."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import brokers
import kubernetes_validate
import pytest
import redis
import yaml
from jsonschema import Draft202012Validator
from prometheus_client.parser import text_string_to_metric_families
from pydantic_core import PydanticUndefined
from redis_server import RedisServer

from service.broker import Job, Load, ModelState, WorkerState
from service.messages import Completed
from service.metrics import Metrics
from service.settings import Settings

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker-compose.yml"
MANIFESTS = sorted(path for path in ROOT.glob("docker/k8s/**/*.yaml") if path.name != "kustomization.yaml")
KUBERNETES = "1.31"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def manifests() -> Iterator[dict[str, Any]]:
    for path in MANIFESTS:
        yield from documents(path)


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for document in manifests() if document["kind"] == kind]


# --------------------------------------------------------------------------------------------------------- .env.example


def examples() -> dict[str, str]:
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    return dict(re.findall(r"^#([A-Z_]+)=(\S*)", text, re.MULTILINE))


def test_the_example_has_every_setting_with_its_default_and_what_compose_asks_for() -> None:
    ours = {f"DRAWWELL_{name.upper()}": field.default for name, field in Settings.model_fields.items()}
    asked = set(re.findall(r"\$\{([A-Z_]+)", COMPOSE.read_text(encoding="utf-8")))
    found = examples()
    assert found.keys() == ours.keys() | asked
    for name, default in ours.items():
        assert default is not PydanticUndefined
        assert found[name] == ("" if default is None else str(default)), name


def test_the_examples_of_compose_are_its_defaults() -> None:
    defaults = re.findall(r"\$\{([A-Z_]+):?-([^}]*)\}", COMPOSE.read_text(encoding="utf-8"))
    found = examples()
    assert {name: found[name] for name, _ in defaults} == dict(defaults)


# --------------------------------------------------------------------------------------------------------------- images


@pytest.mark.skipif(shutil.which("hadolint", path=str(Path(sys.executable).parent)) is None, reason="no hadolint")
def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    said = subprocess.run([hadolint, ROOT / "docker" / "Dockerfile"], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, "")


def stages() -> dict[str, str]:
    """Each stage of the Dockerfile, without its comments, by its name."""
    lines = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    parts = re.split(r"^FROM (\S+) AS (\S+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[2::3], parts[3::3], strict=True))


@pytest.mark.parametrize("target", ["api", "worker", "worker-gpu", "train"])
def test_an_image_has_a_user_a_health_check_and_labels(target: str) -> None:
    body = stages()[target]
    assert "USER 10001:10001" in body
    assert "HEALTHCHECK" in body
    assert {"title", "description", "licenses", "version", "revision"} == set(
        re.findall(r"org\.opencontainers\.image\.(\w+)=", body)
    )
    assert not re.search(r"\bapt-get|\bpip\b|\bgcc", body), "build tools"


def imported(package: str) -> set[str]:
    """Our packages that modules of a package import, in whatever function."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    ours = set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / package).rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.partition(".")[0] for name in names} & ours


@pytest.mark.parametrize(
    ("target", "package"), [("api", "service"), ("worker", "service"), ("worker-gpu", "service"), ("train", "training")]
)
def test_an_image_carries_what_it_imports_and_the_api_no_models(target: str, package: str) -> None:
    copied = set(re.findall(r"^COPY (\w+) \1$", stages()[target], re.MULTILINE))
    needed = {package} | imported(package)
    assert copied >= (needed - {"models"} if target == "api" else needed)
    assert ("models" in copied) == (target != "api")
    kept = re.findall(r"^!(\w+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert copied <= set(kept)


def test_torch_is_in_no_layer_of_the_api() -> None:
    assert "COPY --from=venv-api" in stages()["api"]
    assert ".[" not in stages()["venv-api"]


def test_nothing_that_is_built_upon_floats() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    bases = re.findall(r"^ARG (?:PYTHON|CUDA)=(\S+)$", dockerfile, re.MULTILINE)
    images = [value for name, value in examples().items() if name.endswith("_IMAGE")]
    assert len(bases) == 2
    for image in (*bases, *images):
        assert re.search(r":.*\d", image), image
        assert "latest" not in image


def test_the_bill_of_materials_lists_what_is_installed(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text(
        "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2.36-9+deb12u10\n"
        "Description: GNU C Library\n shared: libraries\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n",
        encoding="utf-8",
    )
    bill = runpy.run_path(str(ROOT / "docker" / "sbom.py"))["document"]("drawwell-api", "0.1.0", status)
    found = {component["purl"]: component for component in bill["components"]}
    assert f"pkg:pypi/fastapi@{metadata.version('fastapi')}" in found
    assert "pkg:deb/libc6@2.36-9%2Bdeb12u10?arch=amd64" in found
    assert not any("gone" in purl for purl in found)
    assert len(found) == len(bill["components"])
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "drawwell-api")


def seed(source: Path, target: Path) -> list[str]:
    command = ["sh", ROOT / "docker" / "seed.sh", source, target]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [Path(line).name for line in said.splitlines()]


def test_seeding_brings_what_is_new_and_leaves_what_was_trained(tmp_path: Path) -> None:
    source, target = tmp_path / "zoo", tmp_path / "models"
    for name in ("a", "b"):
        (source / name).mkdir(parents=True)
        (source / name / "weights.safetensors").write_bytes(name.encode())
        (source / name / "model.json").write_text(f'"{name}"', encoding="utf-8")
    (source / "unfinished").mkdir()
    (target / "trained").mkdir(parents=True)
    (target / "trained" / "model.json").write_text('"trained"', encoding="utf-8")
    assert seed(source, target) == ["a", "b"]
    assert seed(source, target) == []
    (source / "b" / "weights.safetensors").write_bytes(b"b2")
    (source / "b" / "model.json").write_text('"b2"', encoding="utf-8")
    assert seed(source, target) == ["b"]
    kept = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert kept == {
        "a/model.json": b'"a"',
        "a/weights.safetensors": b"a",
        "b/model.json": b'"b2"',
        "b/weights.safetensors": b"b2",
        "trained/model.json": b'"trained"',
    }


# -------------------------------------------------------------------------------------------------------------- compose


def test_services_of_compose_are_contained() -> None:
    services = documents(COMPOSE)[0]["services"]
    assert {"redis", "api", "worker", "worker-gpu", "train", "prometheus", "grafana"} < services.keys()
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        for published in service.get("ports", []):
            assert published.startswith("127.0.0.1:"), name


# ------------------------------------------------------------------------------------------------------------- watching


def exposed() -> dict[str, set[str]]:
    """The samples that an API exposes, with the labels that each has."""
    metrics = Metrics()
    metrics.request("/generate", "POST", 200, 0.1)
    metrics.refused("queue-full")
    metrics.job("a", "draw").ended("completed", Completed(0.1, 0.2, 1))
    load = {"a/draw": Load(max_rows=64, steps=1, rows=1, seconds=0.1, running=1)}
    text = metrics.exposition([WorkerState("w", "cpu", True, {"a": ModelState("ready")}, load)], 1).decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_the_dashboard_asks_for_what_there_is() -> None:
    dashboard = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "drawwell.json").read_text(encoding="utf-8"))
    there, asked = exposed(), set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            names = set(re.findall(r"drawwell_\w+", target["expr"]))
            labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            labels |= {label.strip() for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in by.split(",")}
            for name in names:
                assert name in there, target["expr"]
                assert labels <= there[name], target["expr"]
            asked |= names
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in there if not name.endswith("_created")}
    assert families == {re.sub(r"_bucket$", "", name) for name in asked}, "no panel shows it"


# ----------------------------------------------------------------------------------------------------------- Kubernetes


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_what_kubernetes_takes(path: Path) -> None:
    for document in documents(path):
        if not document["apiVersion"].startswith("keda.sh/"):
            kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_the_kustomization_takes_what_needs_nothing_installed() -> None:
    folder = ROOT / "docker" / "k8s"
    (kustomization,) = documents(folder / "kustomization.yaml")
    assert sorted(kustomization["resources"]) == sorted(p.name for p in MANIFESTS if p.parent == folder)


def test_pods_are_contained_and_selected_by_their_own_labels() -> None:
    workloads = of_kind("Deployment") + of_kind("StatefulSet")
    selectors = []
    for workload in workloads:
        spec = workload["spec"]
        pod, labels = spec["template"]["spec"], spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"] == labels
        selectors.append(labels)
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"]
            assert not security["allowPrivilegeEscalation"]
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
    assert [s for s in selectors for t in selectors if s is not t and s.items() <= t.items()] == []
    for service in of_kind("Service"):
        assert any(service["spec"]["selector"].items() <= labels.items() for labels in selectors)


def test_workers_have_the_time_to_drain() -> None:
    (settings,) = of_kind("ConfigMap")
    fields = {f"DRAWWELL_{name.upper()}" for name in Settings.model_fields}
    assert settings["data"].keys() <= fields
    drain = float(settings["data"]["DRAWWELL_DRAIN_SECONDS"])
    workers = [d["spec"]["template"]["spec"] for d in of_kind("Deployment") if "worker" in d["metadata"]["name"]]
    assert len(workers) == 2
    assert all(pod["terminationGracePeriodSeconds"] > drain + 5 for pod in workers)
    asked = [pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for pod in workers]
    assert sorted(asked, key=str) == [1, None]


TRIGGER = {
    "type": "object",
    "required": ["type", "metadata", "authenticationRef"],
    "additionalProperties": False,
    "properties": {
        "type": {"const": "redis"},
        "authenticationRef": {"type": "object", "required": ["name"]},
        "metadata": {  # KEDA takes strings alone
            "type": "object",
            "required": ["address", "listName", "listLength"],
            "additionalProperties": False,
            "properties": {
                "address": {"type": "string", "pattern": r"^[\w.-]+:\d+$"},
                "listName": {"type": "string"},
                "listLength": {"type": "string", "pattern": r"^[1-9]\d*$"},
            },
        },
    },
}
SCALED_OBJECT = {
    "type": "object",
    "required": ["scaleTargetRef", "triggers"],
    "additionalProperties": False,
    "properties": {
        "scaleTargetRef": {
            "type": "object",
            "required": ["name"],
            "additionalProperties": False,
            "properties": {"name": {}},
        },
        "minReplicaCount": {"type": "integer", "minimum": 1},  # without a worker, the API would refuse everything
        "maxReplicaCount": {"type": "integer"},
        "pollingInterval": {"type": "integer"},
        "cooldownPeriod": {"type": "integer"},
        "advanced": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "horizontalPodAutoscalerConfig": {
                    "type": "object",
                    "required": ["behavior"],
                    "additionalProperties": False,
                    "properties": {"behavior": {"type": "object"}},
                }
            },
        },
        "triggers": {"type": "array", "minItems": 1, "items": TRIGGER},
    },
}


def test_the_scaler_is_what_keda_takes() -> None:
    (scaler,), (access,) = of_kind("ScaledObject"), of_kind("TriggerAuthentication")
    Draft202012Validator(SCALED_OBJECT).validate(scaler["spec"])
    target = {"scaleTargetRef": {"kind": "Deployment", "name": "any"}, "maxReplicas": 2}
    behavior = scaler["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]  # KEDA hands it on as it is
    autoscaler = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "any"}}
    kubernetes_validate.validate({**autoscaler, "spec": {**target, "behavior": behavior}}, KUBERNETES, strict=True)
    names = {document["metadata"]["name"] for document in of_kind("Deployment")}
    assert scaler["spec"]["scaleTargetRef"]["name"] in names
    for trigger in scaler["spec"]["triggers"]:
        assert trigger["authenticationRef"]["name"] == access["metadata"]["name"]


@pytest.mark.anyio
async def test_the_scaler_reads_how_many_jobs_wait(redis_server: RedisServer) -> None:
    """KEDA asks for the type of the key that it is given, and for its size by that."""
    (scaler,) = of_kind("ScaledObject")
    (watched,) = {trigger["metadata"]["listName"] for trigger in scaler["spec"]["triggers"]}
    redis_server.flush()
    kind = brokers.Distributed(redis_server)
    with redis.Redis(port=redis_server.port) as client:
        async with kind.broker() as broker, brokers.workers(kind, broker, "w") as [worker]:

            def size() -> object:
                sizes = {b"zset": client.zcard, b"set": client.scard, b"list": client.llen, b"hash": client.hlen}
                return sizes.get(client.type(watched), client.llen)(watched)  # type: ignore[call-overload]

            assert size() == 0
            for k in range(5):
                await broker.submit(Job(f"j{k}", "mn"[k % 2], b"", 1, 1, priority="batch" if k > 2 else "interactive"))
            assert size() == 5
            for left in (4, 3):
                await worker.claims.claim(["m"])
                assert size() == left
            await worker.claims.hand_back(["j0"])
            assert size() == 4
            for k in (1, 3, 4):
                await broker.cancel(f"j{k}")
            assert size() == 1
            await worker.claims.claim(["m"])
            assert size() == 0
