"""POST, GET and PUT /models/{id}/calibration: what is made, kept and refused; and the watch for drift."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_fakes import DENSITY, Api, Call, after, b64, file_of, log_prob, write_model
from prometheus_client.parser import text_string_to_metric_families

from anomaly.calibration import calibrate, describe, halves
from models._protocol import ImageSpace
from service import writes
from service.broker import Event, QueueFull
from service.calibration_store import CalibrationStore, Unwritable
from service.calibrations import Calibrations
from service.catalog import Version
from service.catalog import read as read_version
from service.messages import Scored, pack, unpack
from service.settings import Settings
from training import calibrate as offline
from training.data import Dataset, Split

pytestmark = pytest.mark.anyio
PATH = "/models/density/calibration"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def api(tmp_path: Path) -> Api:
    return Api(tmp_path, allow_calibration="yes")


def normal(seed: int, level: int = 128) -> np.ndarray:
    return np.random.default_rng([9, seed]).normal(level, 12, (3, 4, 5)).clip(0, 255).astype(np.uint8)


def body(n: int = 120, first: int = 0, **changes: Any) -> dict[str, Any]:
    return {"images": [b64(file_of(normal(first + k))) for k in range(n)], **changes}


def version_of(api: Api, model: str = "density") -> Version:
    return read_version(api.folder / model / "model.json")


async def calibrated(api: Api, **changes: Any) -> dict[str, Any]:
    answer = await api.post(PATH, body(**changes))
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def scored(api: Api, *images: np.ndarray, **options: Any) -> dict[str, Any]:
    asked = {"model": "density", "images": [b64(file_of(x)) for x in images], "alpha": 0.05, **options}
    found: dict[str, Any] = (await api.post("/score", asked)).json()
    return found


# --------------------------------------------------------------------------------------------------------- what is made


async def test_images_become_a_calibration_that_scores_are_judged_by_at_once(api: Api) -> None:
    assert (await scored(api, normal(1)))["calibration"] is None
    made = await calibrated(api, n=201, description="line 3")
    assert (made["version"], made["current"], made["fit_n"], made["n"]) == (1, True, 100, 101)
    assert (made["description"], made["smallest_alpha"]) == ("line 3", pytest.approx(1 / 102, rel=2e-3))
    assert made["smallest_alpha"] >= 1 / 102, "an alpha that is served"
    answer = await scored(api, normal(1000), np.full((3, 4, 5), 255, np.uint8), alpha=made["smallest_alpha"])
    assert answer["calibration"] == {"n": 101, "sha256": made["sha256"]}
    assert [result["anomaly"]["is_anomaly"] for result in answer["results"]] == [False, True]


async def test_it_is_what_the_command_line_makes_of_the_same_images(api: Api) -> None:
    images = np.stack([normal(k) for k in range(130)])
    made = await calibrated(api, n=130)
    space = ImageSpace(width=5, height=4, channels=3)
    dataset = Dataset("x", space, {"train": Split(images[::-1], np.full(130, -1))}, "")
    fit, held_out = offline.parts(dataset, trained_on=False)
    found = [[describe(x, log_prob(x), None, {"mean": x.mean()}) for x in part.x] for part in (fit, held_out)]
    expected = calibrate(*found, {})
    known = await api.app.state.services.calibrations.of("density", version_of(api))
    np.testing.assert_allclose(known.calibration.scores, expected.scores)
    assert known.calibration.kind == expected.kind == made["detector"]


def test_halves_belong_to_the_images_and_not_to_their_order() -> None:
    images = np.stack([normal(k) for k in range(101)])
    fit, held_out = halves(images)
    assert sorted([*fit, *held_out]) == list(range(101))
    shuffled = np.random.default_rng(0).permutation(101)
    again = halves(images[shuffled])
    assert {images[k].tobytes() for k in fit} == {images[shuffled][k].tobytes() for k in again[0]}


async def test_it_goes_through_the_queue_in_small_jobs_that_wait_for_others(api: Api) -> None:
    await calibrated(api, n=150)
    jobs = list(api.broker.jobs.values())
    for kind in ("score", "map"):
        assert sorted(job.rows for job in jobs if job.kind == kind) == [22, 64, 64]
    assert {job.priority for job in jobs} == {"batch"}
    assert {job.model for job in jobs} == {"density"}


async def test_a_full_queue_is_waited_for(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, refused = api.broker.submit, []

    async def full_at_first(job: Any) -> str:
        if len(refused) < 3:
            refused.append(job.rows)
            raise QueueFull(0.01, 10, 10)
        return await submit(job)

    monkeypatch.setattr(api.broker, "submit", full_at_first)
    assert (await calibrated(api, n=120))["n"] == 60
    assert len(refused) == 3


async def test_a_form_is_as_good_as_json(api: Api) -> None:
    made = await calibrated(api, n=110)
    files = [("images", (f"{k}.png", file_of(normal(k)), "image/png")) for k in range(110)]
    form = await api.request("POST", PATH, files=files, data={"description": "a form"})
    assert form.status_code == 201, form.text
    assert form.json()["version"] == 2
    assert form.json()["description"] == "a form"
    assert form.json()["data"]["sha256"] == made["data"]["sha256"]


async def test_the_same_request_with_its_key_is_the_same_calibration(api: Api) -> None:
    first = await api.post(PATH, body(), headers={"Idempotency-Key": "k1"})
    again = await api.post(PATH, body(), headers={"Idempotency-Key": "k1"})
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert (await api.post(PATH, body(), headers={"Idempotency-Key": "k2"})).json()["version"] == 2
    for other in (body(first=1), body(description="another lamp"), body(n=110)):
        taken = await api.post(PATH, other, headers={"Idempotency-Key": "k1"})
        assert taken.status_code == 422
        assert taken.json()["errors"][0]["loc"] == ["header", "Idempotency-Key"]
    shuffled = body()
    shuffled["images"].reverse()
    assert (await api.post(PATH, shuffled, headers={"Idempotency-Key": "k1"})).json()["sha256"] == first.json()[
        "sha256"
    ]


async def test_a_server_that_ends_before_its_calibration_is_in_use_puts_it_in_use_when_asked_again(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a client does that got no answer. One that was put out of use since stays out of it."""
    await calibrated(api, first=1000)
    with monkeypatch.context() as ended:
        ended.setattr(CalibrationStore, "choose", lambda *_: None)
        lost = await api.post(PATH, body(), headers={"Idempotency-Key": "k1"})
    assert (lost.json()["version"], lost.json()["current"]) == (2, False)
    again = await api.post(PATH, body(), headers={"Idempotency-Key": "k1"})
    assert (again.status_code, again.json()["version"], again.json()["current"]) == (200, 2, True)
    assert (await scored(api, normal(1)))["calibration"]["sha256"] == again.json()["sha256"]
    await api.request("PUT", PATH, json={"version": 1})
    late = await api.post(PATH, body(), headers={"Idempotency-Key": "k1"})
    assert (late.status_code, late.json()["version"], late.json()["current"]) == (200, 2, False)


# --------------------------------------------------------------------------------------------------------- what is kept


async def test_old_ones_are_kept_and_there_is_a_way_back(api: Api) -> None:
    weights = hashlib.sha256(b"density").hexdigest()
    found = [describe(x, log_prob(x), None, {"mean": x.mean()}) for x in (normal(500 + k) for k in range(120))]
    own = calibrate(found[:60], found[60:], {"weights_sha256": weights, "data": {"name": "its own"}})
    (api.folder / "density" / "calibration.safetensors").write_bytes(own.pack())
    write_model(
        api.folder, "density", DENSITY, files={"weights.safetensors": weights, "calibration.safetensors": own.sha256}
    )
    api.catalog.refresh()
    one, two = await calibrated(api, first=0), await calibrated(api, first=1000)
    listed = (await api.get(PATH)).json()
    assert (listed["current"], [v["version"] for v in listed["versions"]]) == (2, [0, 1, 2])
    assert [v["sha256"] for v in listed["versions"]] == [own.sha256, one["sha256"], two["sha256"]]
    assert listed["versions"][0]["data"] == {"name": "its own"}
    assert len({v["sha256"] for v in listed["versions"]}) == 3

    for version, sha256 in ((1, one["sha256"]), (0, own.sha256), (2, two["sha256"])):
        chosen = await api.request("PUT", PATH, json={"version": version})
        assert chosen.json()["current"] == version
        assert (await scored(api, normal(1)))["calibration"]["sha256"] == sha256
    missing = await api.request("PUT", PATH, json={"version": 7})
    assert missing.status_code == 422
    assert "there are 0, 1, 2" in missing.json()["detail"]

    restarted = Api(api.folder)
    write_model(
        api.folder, "density", DENSITY, files={"weights.safetensors": weights, "calibration.safetensors": own.sha256}
    )
    restarted.catalog.refresh()
    assert (await scored(restarted, normal(1)))["calibration"]["sha256"] == two["sha256"]
    assert (await restarted.get(PATH)).json() == (await api.get(PATH)).json()


async def test_a_model_that_came_without_one_can_be_without_one_again(api: Api) -> None:
    await calibrated(api)
    back = (await api.request("PUT", PATH, json={"version": 0})).json()
    assert (back["current"], [v["current"] for v in back["versions"]]) == (None, [False])
    answer = await scored(api, normal(1))
    assert answer["calibration"] is None
    assert "not calibrated" in answer["warnings"][0]


async def test_another_replica_sees_it_at_its_next_look(api: Api) -> None:
    now = [0.0]
    other = Calibrations(api.folder, poll_seconds=1.0, clock=lambda: now[0])
    assert (await other.of("density", version_of(api))).calibration is None
    made = await calibrated(api)
    assert (await other.of("density", version_of(api))).calibration is None
    now[0] = 1.5
    assert (await other.of("density", version_of(api))).sha256 == made["sha256"]


def test_processes_that_write_at_once_get_numbers_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda k: CalibrationStore(tmp_path).add("m", b"%d" % k), range(40)))
    assert sorted(numbers) == list(range(1, 41)) == CalibrationStore(tmp_path).versions("m")
    assert {CalibrationStore(tmp_path).read("m", n) for n in numbers} == {b"%d" % k for k in range(40)}
    assert not list((tmp_path / "m" / "calibrations").glob(".*")), "no scratch file is left"


async def test_what_was_made_for_other_weights_says_so_and_cannot_be_chosen(api: Api) -> None:
    await calibrated(api)
    write_model(api.folder, "density", DENSITY, files={"weights.safetensors": "f" * 64})
    api.catalog.refresh()
    answer = await scored(api, normal(1))
    assert answer["results"][0]["anomaly"] is None
    assert "version 1 was made for other weights" in answer["warnings"][0]
    (listed,) = (await api.get(PATH)).json()["versions"]
    assert "other weights" in listed["error"]
    assert (await api.request("PUT", PATH, json={"version": 1})).status_code == 409


def came_with(api: Api, weights: str = "a" * 64, of: str = "a" * 64) -> bytes:
    """The model has these weights, and a calibration that was made for those `of`; its file."""
    found = [describe(x, log_prob(x), None, {"mean": x.mean()}) for x in (normal(500 + k) for k in range(120))]
    own = calibrate(found[:60], found[60:], {"weights_sha256": of})
    files = {"weights.safetensors": weights, "calibration.safetensors": own.sha256}
    write_model(api.folder, "density", DENSITY, files=files)
    api.catalog.refresh()
    return own.pack()


async def test_files_of_a_folder_that_is_being_copied_may_come_in_any_order(api: Api) -> None:
    """The calibration after the model.json that names it, and at first cut off."""
    packed, path = came_with(api), api.folder / "density" / "calibration.safetensors"
    for content in (None, packed[:1000]):
        if content is not None:
            path.write_bytes(content)
        answer = await scored(api, normal(1))
        assert answer["results"][0]["anomaly"] is None
        assert "cannot be used: " in answer["warnings"][0]
    path.write_bytes(packed)
    answer = await scored(api, normal(1))
    assert answer["results"][0]["anomaly"] is not None
    assert answer["warnings"] == []
    path.unlink()
    assert (await scored(api, normal(1)))["results"][0]["anomaly"] is not None, "what was read is kept"


async def test_calibrations_that_are_being_copied_may_come_after_what_says_which_is_in_use(api: Api) -> None:
    """As to another replica's disk. It is looked at every second, and not only when that changes."""
    made = await calibrated(api)
    file, now = api.folder / "density" / "calibrations" / "1.safetensors", [0.0]
    packed = file.read_bytes()
    file.unlink()
    other = Calibrations(api.folder, poll_seconds=1.0, clock=lambda: now[0])
    assert (await other.of("density", version_of(api))).fault == "version 1 is missing"
    file.write_bytes(packed)
    now[0] = 1.5
    assert (await other.of("density", version_of(api))).sha256 == made["sha256"]


async def test_a_look_that_began_before_a_change_is_not_believed_after_it(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score asks which is in use while another is put in use: it may be of before, those that come later are not."""
    one, two = await calibrated(api, first=0), await calibrated(api, first=1000)
    known, look = api.app.state.services.calibrations, Calibrations._look
    looked, go_on = threading.Event(), threading.Event()

    def slowly(self: Calibrations, model: str, before: Any) -> Any:
        found = look(self, model, before)
        looked.set()
        go_on.wait(30)
        return found

    known.forget("density")
    with monkeypatch.context() as slow:
        slow.setattr(Calibrations, "_look", slowly)
        early = asyncio.create_task(known.of("density", version_of(api)))
        assert await asyncio.to_thread(looked.wait, 30)
    known.store.choose("density", 1)
    known.forget("density")
    go_on.set()
    assert (await early).sha256 == two["sha256"]
    assert (await known.of("density", version_of(api))).sha256 == one["sha256"]


async def test_what_came_with_a_model_does_not_judge_by_other_weights_because_it_once_was_right(api: Api) -> None:
    """A model that is trained anew in its folder, with the calibration of the one before left in."""
    (api.folder / "density" / "calibration.safetensors").write_bytes(came_with(api))
    assert (await scored(api, normal(1)))["results"][0]["anomaly"] is not None
    came_with(api, weights="b" * 64)
    answer = await scored(api, normal(1))
    assert answer["results"][0]["anomaly"] is None
    assert "calibration.safetensors was made for other weights" in answer["warnings"][0]
    (listed,) = (await api.get(PATH)).json()["versions"]
    assert "other weights" in listed["error"]


async def test_who_lists_them_while_another_does_is_answered(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both look anew; the second forgets what the first has found, while that reads a file."""
    (api.folder / "density" / "calibration.safetensors").write_bytes(came_with(api))
    known, reading, go_on = api.app.state.services.calibrations, asyncio.Event(), asyncio.Event()
    came = known._that_came_with

    async def slowly(model: str, version: Version) -> Any:
        reading.set()
        await go_on.wait()
        return await came(model, version)

    monkeypatch.setattr(known, "_that_came_with", slowly)
    first = asyncio.create_task(api.get(PATH))
    await asyncio.wait_for(reading.wait(), 30)
    known.forget("density")
    go_on.set()
    assert [(one["version"], one["current"]) for one in (await first).json()["versions"]] == [(0, True)]


@pytest.mark.parametrize("content", ["", "{}", '{"version": "2"}', '{"version": -1}', '{"version": 9}'])
async def test_a_pointer_that_cannot_be_followed_is_told_and_never_guessed(api: Api, content: str) -> None:
    await calibrated(api)
    (api.folder / "density" / "calibrations" / "current.json").write_text(content)
    api.app.state.services.calibrations.forget("density")
    answer = await scored(api, normal(1))
    assert answer["results"][0]["anomaly"] is None
    assert "cannot be used" in answer["warnings"][0]
    assert (await api.request("PUT", PATH, json={"version": 1})).json()["current"] == 1
    assert (await scored(api, normal(1)))["results"][0]["anomaly"] is not None


async def test_who_hangs_up_late_leaves_it_either_in_use_or_not_made(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the file is written: the thread goes on, and what comes after it does too."""
    add, linked, go_on = CalibrationStore.add, threading.Event(), threading.Event()

    def slowly(store: CalibrationStore, model: str, packed: bytes) -> int:
        number = add(store, model, packed)
        linked.set()
        go_on.wait(30)
        return number

    monkeypatch.setattr(CalibrationStore, "add", slowly)
    call = Call(api.app, PATH, body())
    assert await asyncio.to_thread(linked.wait, 30)
    call.hang_up()
    await asyncio.wait_for(call.task, 30)
    go_on.set()
    store = CalibrationStore(api.folder)
    for _ in range(300):
        if store.current("density"):
            break
        await asyncio.sleep(0.01)
    assert (store.versions("density"), store.current("density")) == ([1], 1)


# ------------------------------------------------------------------------------------------------------ what is refused


async def test_too_few_too_many_copies_and_other_sizes_are_named(api: Api) -> None:
    few = await api.post(PATH, body(99))
    assert few.status_code == 422
    assert "99 images; 100 to 5000" in few.json()["detail"]
    copies = body(120)
    copies["images"][7] = copies["images"][3]
    copied = await api.post(PATH, copies)
    assert copied.json()["errors"][0]["loc"] == ["body", "images", 7]
    assert "the same pixels as images[3]" in copied.json()["detail"]
    large = body(120)
    large["images"][5] = b64(file_of(np.zeros((3, 8, 8), np.uint8)))
    other = await api.post(PATH, large)
    assert other.json()["errors"][0]["loc"] == ["body", "images", 5]
    assert "8×8" in other.json()["detail"]
    assert not api.broker.jobs, "nothing was scored"
    assert (await api.get(PATH)).json() == {"model": "density", "current": None, "versions": []}


async def test_models_with_many_statistics_take_more_images_and_say_so_after_the_first_block(api: Api) -> None:
    many = {f"s{k}": float(k) for k in range(30)}
    at_once = api.broker.answer

    async def with_many(job: Any) -> Any:
        async for event in at_once(job):
            message = unpack(event.payload)
            if isinstance(message, Scored):
                message = dataclasses.replace(message, statistics=many)
            yield Event(pack(message), event.final, event.number)

    api.broker.answer = with_many
    refused = await api.post(PATH, body(200))
    assert refused.status_code == 422
    assert "200 images; the 33 statistics of density take at least 264" in refused.json()["detail"]
    assert {job.rows for job in api.broker.jobs.values()} == {64}
    assert len(api.broker.jobs) == 2, "of the first block alone, one for scores and one for maps"


async def test_a_model_without_a_density_and_one_that_there_is_not(api: Api) -> None:
    gan = await api.post("/models/gan/calibration", body())
    assert gan.status_code == 422
    assert gan.json()["type"] == "urn:drawwell:problem:no-density"
    assert gan.json()["errors"][0]["loc"] == ["path", "model_id"]
    for method in ("GET", "POST", "PUT"):
        json = {"GET": None, "POST": body(1), "PUT": {"version": 0}}[method]
        assert (await api.request(method, "/models/none/calibration", json=json)).status_code == 404


async def test_a_folder_that_cannot_be_written_is_said_before_the_work(api: Api) -> None:
    (api.folder / "density" / "calibrations").write_text("in the way")
    refused = await api.post(PATH, body())
    assert refused.status_code == 409
    assert "DRAWWELL_MODELS" in refused.json()["detail"]
    assert not api.broker.jobs
    with pytest.raises(Unwritable):
        CalibrationStore(api.folder).choose("density", 0)


async def test_one_at_a_time_for_a_model_and_hanging_up_makes_room(api: Api) -> None:
    api.broker.answer = after()
    call = Call(api.app, PATH, body())
    await asyncio.wait_for(api.broker.changed.wait(), 30)
    busy = await api.post(PATH, body())
    assert busy.status_code == 409
    assert "another request" in busy.json()["detail"]
    call.hang_up()
    await asyncio.wait_for(call.task, 30)
    assert api.broker.cancelled
    api.broker.answer = api.broker._at_once
    assert (await calibrated(api))["version"] == 1


async def test_time_that_runs_out_is_told_and_nothing_is_kept(tmp_path: Path) -> None:
    api = Api(tmp_path, allow_calibration="yes", calibration_timeout=0.2)
    api.broker.answer = after()
    assert (await api.post(PATH, body())).status_code == 504
    assert CalibrationStore(tmp_path).versions("density") == []


async def test_bodies_may_be_longer_here_but_not_endless(tmp_path: Path) -> None:
    api = Api(tmp_path, allow_calibration="yes", max_body_bytes=2048, max_calibration_bytes=60_000)
    assert (await api.post("/score", {"model": "density", "images": ["A" * 3000]})).status_code == 413
    assert (await api.post(PATH, body())).status_code == 201
    assert (await api.post(PATH, body(120, description="x" * 60_000))).status_code == 413


# -------------------------------------------------------------------------------------------------------- who may write


@pytest.mark.parametrize(
    ("settings", "headers", "status"),
    [
        ({}, {}, 200),
        ({}, {"host": "localhost:8000"}, 200),
        ({}, {"host": "[::1]:8000"}, 200),
        ({}, {"host": "evil.example"}, 403),
        ({}, {"origin": "http://evil.example"}, 403),
        ({}, {"origin": "http://127.0.0.1:8000"}, 200),
        ({"host": "0.0.0.0"}, {}, 403),
        ({"host": "::1"}, {}, 200),
        ({"allow_calibration": "no"}, {}, 403),
        ({"allow_calibration": "yes", "host": "0.0.0.0"}, {"host": "drawwell.example"}, 200),
        ({"allow_calibration": "yes"}, {"host": "drawwell.example", "origin": "null"}, 403),
    ],
)
async def test_who_may_write_is_a_setting(
    tmp_path: Path, settings: dict[str, str], headers: dict[str, str], status: int
) -> None:
    api = Api(tmp_path, **settings)
    answer = await api.request("PUT", PATH, json={"version": 7}, headers={"host": "127.0.0.1:8000", **headers})
    assert answer.status_code == (422 if status == 200 else status), "there is no calibration yet"
    if status == 403 and "origin" not in headers:
        assert writes.SETTING in answer.json()["detail"]
    if status == 403:
        assert (await api.post(PATH, body(1), headers={"host": "127.0.0.1:8000", **headers})).status_code == 403
        assert (await api.get(PATH, headers={"host": "127.0.0.1:8000"})).status_code == 200, "reading is free"
    assert Settings().allow_calibration == "auto"


# ---------------------------------------------------------------------------------------------------------------- drift


async def drift_metrics(api: Api) -> dict[str, float]:
    text = (await api.get("/metrics")).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {s.name: s.value for s in samples if "drift" in s.name and s.labels.get("model") == "density"}


async def test_a_watched_model_warns_of_drift_until_it_is_calibrated_again(tmp_path: Path) -> None:
    api = Api(tmp_path, allow_calibration="yes", drift_models="other, density", drift_bound=50)
    await calibrated(api, n=200)
    assert await drift_metrics(api) == {}
    for start in range(0, 128, 32):
        answer = await scored(api, *(normal(5000 + start + k) for k in range(32)))
        assert answer["warnings"] == [], "normal images are no drift"
    found = await drift_metrics(api)
    assert found["drawwell_calibration_drift_images_total"] == 128
    assert found["drawwell_calibration_drift_alarm"] == 0
    assert found["drawwell_calibration_drift_peak_log10"] < 1.7
    for start in range(0, 128, 32):
        answer = await scored(api, *(normal(7000 + start + k, level=150) for k in range(32)))
    (warning,) = answer["warnings"]
    assert warning.startswith("drift: density: since its calibration 256 images")
    assert "50 : 1" in warning
    found = await drift_metrics(api)
    assert (found["drawwell_calibration_drift_alarm"], found["drawwell_calibration_drift_images_total"]) == (1, 256)
    assert found["drawwell_calibration_drift_log10"] >= 1.7

    images = [b64(file_of(normal(9000 + k, level=150))) for k in range(200)]
    assert (await api.post(PATH, {"images": images})).status_code == 201
    answer = await scored(api, *(normal(7500 + k, level=150) for k in range(32)))
    assert answer["warnings"] == []
    assert (await drift_metrics(api))["drawwell_calibration_drift_images_total"] == 32


async def test_a_model_that_is_not_named_is_not_watched(tmp_path: Path) -> None:
    api = Api(tmp_path, allow_calibration="yes", drift_models="diffusion")
    await calibrated(api)
    for _ in range(3):
        answer = await scored(api, *(normal(7000 + k, level=200) for k in range(40)))
    assert answer["warnings"] == []
    assert await drift_metrics(api) == {}
