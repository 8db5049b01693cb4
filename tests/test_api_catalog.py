"""What models there are: hot reload, broken folders, and what workers say of them; GET /models and health."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from api_fakes import DIFFUSION, GAN, SPECS, Api, ready_worker, write_model

from models import _checkpoint, gan
from models._protocol import ImageSpace
from service.broker import ModelState, WorkerState, state_in
from service.catalog import Catalog
from service.execution import Execution

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def api(tmp_path: Path) -> Api:
    return Api(tmp_path)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path)


def test_a_model_is_resident_where_some_worker_has_it_in_memory(api: Api) -> None:
    sha256 = api.catalog.entry("gan", []).version.sha256  # type: ignore[union-attr]
    here, absent = ModelState("ready", sha256), ModelState("ready", sha256, resident=False)
    for states, resident in (((here, absent), True), ((absent, here), True), ((absent,), False), ((), False)):
        entry = api.catalog.entry("gan", [ready_worker(gan=state) for state in states])
        assert (entry.status, entry.resident) == ("ready" if states else "loading", resident)


async def test_how_a_model_draws_is_told_of_the_version_in_service(api: Api) -> None:
    version = api.catalog.entry("gan", []).version
    assert version is not None
    fast = Execution("compile", "bfloat16", "pixels", 16, {"1": 0.1}, {"onnx": "slower"}, [1])
    states = [ModelState("ready", "another"), ModelState("ready", version.sha256, execution=fast)]
    api.broker.states = [ready_worker(gan=state) for state in states]
    shown = (await api.get("/models/gan")).json()["execution"]
    assert shown == {
        "mode": "compile",
        "precision": "bfloat16",
        "determinism": "pixels",
        "filled_to": 16,
        "seconds_per_step": {"1": 0.1},
        "not_chosen": {"onnx": "slower"},
        "unfilled": [1],
    }
    (worker,) = [state_in(dataclasses.asdict(w)) for w in api.broker.states[1:]]
    assert worker == api.broker.states[1], "as it comes from a worker"


# -------------------------------------------------------------------------------------------------------------- routes


async def test_an_entry_is_the_spec_and_how_the_model_stands(api: Api) -> None:
    version = api.catalog.entry("diffusion", []).version
    assert version is not None
    expected = {
        **json.loads(json.dumps(DIFFUSION.to_json())),
        "id": "diffusion",
        "status": "ready",
        "resident": True,
        "execution": None,
        "metrics": {"bits_per_dim": 2.5},
        "sha256": version.weights_sha256,
    }
    assert (await api.get("/models/diffusion")).json() == {**expected, "load": {}}
    models = (await api.get("/models")).json()
    assert models.keys() == {"models"}
    assert [entry["id"] for entry in models["models"]] == sorted(SPECS)
    assert expected in models["models"]


@pytest.mark.parametrize("name", list(SPECS))
async def test_every_spec_comes_through_as_the_model_wrote_it(api: Api, name: str) -> None:
    entry = (await api.get(f"/models/{name}")).json()
    written = json.loads(json.dumps(SPECS[name].to_json()))
    assert {key: entry[key] for key in written} == written


async def test_an_id_may_hold_any_character_of_a_folder_name(api: Api) -> None:
    write_model(api.folder, "a b+c%ä", GAN)
    api.catalog.refresh()
    assert (await api.get("/models/a%20b%2Bc%25%C3%A4")).json()["id"] == "a b+c%ä"
    assert (await api.post("/generate", {"model": "a b+c%ä", "label": 1})).status_code == 422


async def test_the_process_lives_whatever_its_workers_do(api: Api) -> None:
    api.broker.states = []
    response = await api.get("/healthz")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


async def test_it_is_ready_once_a_worker_is_and_until_it_shuts_down(api: Api) -> None:
    for states in ([], [WorkerState("w0", "cpu", ready=False)]):
        api.broker.states = states
        response = await api.get("/readyz")
        assert response.status_code == 503
        assert response.headers["content-type"] == "application/problem+json"
    api.broker.states = [WorkerState("w0", "cpu", ready=False), ready_worker()]
    assert (await api.get("/readyz")).status_code == 200
    api.app.state.services.draining = True
    assert (await api.get("/readyz")).status_code == 503


# ---------------------------------------------------------------------------------------------------------- hot reload


def test_a_new_folder_is_found_and_a_removed_one_forgotten(catalog: Catalog) -> None:
    catalog.refresh()
    assert catalog.ids == []
    write_model(catalog.folder, "one", GAN)
    catalog.refresh()
    assert catalog.ids == ["one"]
    shutil.rmtree(catalog.folder / "one")
    catalog.refresh()
    assert catalog.ids == []
    with pytest.raises(KeyError):
        catalog.entry("one", [])


def test_a_folder_that_is_no_checkpoint_yet_is_no_model(catalog: Catalog) -> None:
    (catalog.folder / "training").mkdir()
    (catalog.folder / "training" / "weights.safetensors").write_bytes(b"")
    (catalog.folder / "README.md").write_text("not a folder")
    write_model(catalog.folder, ".hidden", GAN)
    catalog.refresh()
    assert catalog.ids == []


def test_a_models_folder_that_is_not_there_holds_none_until_it_is(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "later")
    catalog.refresh()
    assert catalog.ids == []
    (tmp_path / "later").mkdir()
    write_model(tmp_path / "later", "one", GAN)
    catalog.refresh()
    assert catalog.ids == ["one"]


def test_a_changed_file_is_read_again_even_if_its_size_is_the_same(catalog: Catalog) -> None:
    for value in (1, 2, 3):
        write_model(catalog.folder, "one", GAN, metrics={"fd": value})
        catalog.refresh()
        version = catalog.entry("one", []).version
        assert version is not None
        assert version.metrics == {"fd": value}


def test_a_file_that_did_not_change_is_not_read_again(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(catalog.folder, "one", GAN)
    catalog.refresh()
    monkeypatch.setattr("service.catalog.read", lambda path: pytest.fail("read again"))
    catalog.refresh()


BROKEN: list[tuple[Any, str]] = [
    ("{", "not JSON"),
    ("\xff", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[]", "format 'list'"),
    ('{"format": 2}', "format 2"),
    ({"files": {}}, "lists no sha256 of weights.safetensors"),
    ({"files": {"weights.safetensors": 7}}, "lists no sha256 of weights.safetensors"),
    ({"metrics": [1]}, "metrics is no object"),
    ({"spec": None}, "spec: Input should be a valid dictionary"),
    ({"spec": {**GAN.to_json(), "steps": {}}}, "spec.steps.kind: Field required"),
    ({"spec": {**GAN.to_json(), "image": {"width": 0, "height": 1, "channels": 1}}}, "spec.image.width"),
    ({"spec": {**GAN.to_json(), "accepts": {"steps": {"type": "whole"}}}}, "spec.accepts"),
]


def break_model(folder: Path, name: str, change: Any) -> None:
    if isinstance(change, dict):
        write_model(folder, name, GAN, **change)
    else:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "model.json").write_bytes(change.encode("latin-1"))


def test_a_checkpoint_as_training_writes_it_is_read(catalog: Catalog) -> None:
    config = gan.Config(latent=4, embedding=4, generator_channels=(8, 8), critic_channels=(8, 8), blocks=(0, 1))
    model = gan.Model(config, ImageSpace(width=8, height=8, channels=1, labels=("a", "b")))
    _checkpoint.save(catalog.folder / "one", model, config, {"metrics": {"fd": 1.5}})
    catalog.refresh()
    version = catalog.entry("one", []).version
    assert version is not None
    content = (catalog.folder / "one" / "model.json").read_bytes()
    weights = (catalog.folder / "one" / "weights.safetensors").read_bytes()
    assert version.sha256 == hashlib.sha256(content).hexdigest()
    assert version.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert version.metrics == {"fd": 1.5}
    assert version.spec.model_dump(mode="json") == json.loads(json.dumps(model.spec.to_json()))
    assert version.spec.label_index("b") == 1


@pytest.mark.parametrize(("change", "reason"), BROKEN, ids=[reason for _, reason in BROKEN])
async def test_a_broken_file_is_failed_with_its_reason_and_the_others_go_on(api: Api, change: Any, reason: str) -> None:
    break_model(api.folder, "broken", change)
    api.catalog.refresh()
    entry = (await api.get("/models/broken")).json()
    assert entry["status"] == "failed"
    assert entry["error"].startswith("model.json: ")
    assert reason in entry["error"]
    response = await api.post("/generate", {"model": "broken"})
    assert response.status_code == 503
    assert reason in response.json()["detail"]
    assert len((await api.get("/models")).json()["models"]) == len(SPECS) + 1
    assert (await api.post("/generate", {"model": "gan"})).status_code == 200


@pytest.mark.parametrize(("change", "reason"), BROKEN, ids=[reason for _, reason in BROKEN])
async def test_the_version_that_worked_stays_in_service(api: Api, change: Any, reason: str) -> None:
    sha256 = write_model(api.folder, "gan", GAN)
    api.catalog.refresh()
    before = (await api.get("/models/gan")).json()
    break_model(api.folder, "gan", change)
    api.catalog.refresh()
    api.broker.states = [ready_worker(gan=ModelState("ready", sha256, "a newer version was refused"))]
    assert (await api.get("/models/gan")).json() == before | {"error": "a newer version was refused"}
    assert (await api.post("/generate", {"model": "gan"})).status_code == 200
    write_model(api.folder, "gan", GAN)
    api.catalog.refresh()
    api.broker.states = [ready_worker()]
    assert (await api.get("/models/gan")).json() == before


async def test_the_version_that_a_worker_serves_is_the_one_that_is_told(api: Api) -> None:
    """A new model.json can be fine and its weights not: then the old version answers, and checks requests."""
    narrow = {**GAN.to_json(), "steps": {**GAN.to_json()["steps"], "default": 1}}
    old = write_model(api.folder, "gan", GAN, files={"weights.safetensors": "old"}, spec=narrow)
    api.catalog.refresh()
    new = write_model(api.folder, "gan", DIFFUSION, files={"weights.safetensors": "new"})
    api.catalog.refresh()
    for served, family, weights in ((old, "gan", "old"), (new, "ddpm", "new")):
        api.broker.states = [ready_worker(gan=ModelState("ready", served))]
        entry = (await api.get("/models/gan")).json()
        assert (entry["family"], entry["sha256"]) == (family, weights)
    api.broker.states = [ready_worker(gan=ModelState("ready", old))]
    assert (await api.post("/generate", {"model": "gan", "label": 1})).status_code == 422
    assert (await api.post("/generate", {"model": "gan"})).json()["model_sha256"] == "old"


def test_statuses_merge_what_workers_announce(catalog: Catalog) -> None:
    write_model(catalog.folder, "one", GAN)
    catalog.refresh()
    ready, loading = ModelState("ready"), ModelState("loading")
    failed = ModelState("failed", error="out of memory")

    def status(*states: ModelState) -> tuple[str, str | None]:
        entry = catalog.entry("one", [WorkerState(f"w{k}", "cpu", True, {"one": s}) for k, s in enumerate(states)])
        return entry.status, entry.error

    assert status() == ("loading", None)
    assert status(loading) == ("loading", None)
    assert status(failed) == ("failed", "out of memory")
    assert status(failed, loading) == ("loading", None)
    assert status(failed, ready) == ("ready", None)
    assert status(ModelState("ready", error="newer refused")) == ("ready", "newer refused")


async def test_the_running_application_watches_its_folder(tmp_path: Path) -> None:
    api = Api(tmp_path, catalog_poll_seconds=0.01)
    async with api.app.router.lifespan_context(api.app):
        assert (await api.get("/models/new")).status_code == 404
        write_model(tmp_path, "new", GAN)
        async with asyncio.timeout(30):
            while (await api.get("/models/new")).status_code != 200:
                await asyncio.sleep(0.01)
    assert api.app.state.services.draining


async def test_watching_goes_on_after_a_look_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = Catalog(tmp_path)
    looks = 0

    def refresh() -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise PermissionError("no")

    monkeypatch.setattr(catalog, "refresh", refresh)
    watching = asyncio.ensure_future(catalog.watch(0.001))
    async with asyncio.timeout(30):
        while looks < 3:
            await asyncio.sleep(0.001)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert "cannot be looked at" in caplog.text
