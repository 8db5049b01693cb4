"""The benchmarks' own arithmetic: statistics, budgets, random arrivals, and what a latency counts from.

Loads run on a clock of their own, so that their times are exact and take no time.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib
import io
import json
import math
import os
import re
import selectors
import subprocess
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import torch
import uvicorn
from PIL import Image
from scipy import stats
from servers import DDPM, GAN, free_port, write

from benchmarks import __main__ as benchmarks_main
from benchmarks import _frame, _load, _page, _servers, _ways
from benchmarks._frame import Bench, Results, digits, percentile, spread, turned
from benchmarks._load import Job, Outcome, Phase, arrivals, closed_loop, open_loop
from benchmarks.peers._sampling import Asked, Painter
from models._protocol import Draw, ImageSpace
from service.execution import Execution
from service.settings import Settings
from training.measure import sample

PIXELCNN = {"features": 8, "dilations": (1, 2), "hidden": 8, "embedding": 4}

T = TypeVar("T")


# ----------------------------------------------------------------------------------------------------------- a clock


class _Sleepless(selectors.DefaultSelector):
    """Waiting takes no time: the clock is set on by it."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0.0
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Sleepless()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def timeless(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(work)


class OneAtATime:
    """A server that takes so many seconds for a request of each kind, one request after the other."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.lock = seconds, asyncio.Lock()

    async def __call__(self, job: Job, seed: int) -> bool:
        async with self.lock:
            await asyncio.sleep(self.seconds[job.name])
        return True


# ----------------------------------------------------------------------------------------------------------- statistics


def test_a_spread_is_the_median_between_the_least_and_the_most() -> None:
    found = spread([3.0, 1.0, 10.0])
    assert (found.median, found.least, found.most, found.rounds) == (3.0, 1.0, 10.0, 3)
    assert spread([1.0, 3.0]).median == 2.0
    assert found.text() == "3.00 (1.00 – 10.0)"
    assert found.text(1000) == "3,000 (1,000 – 10,000)"
    assert spread([2.5]).text() == "2.50", "one round has no spread"
    with pytest.raises(ValueError, match="none"):
        spread([])


@pytest.mark.parametrize("values", [[1.0], [5.0, 1.0, 3.0], [float(k) for k in range(100)], [2.0] * 7])
@pytest.mark.parametrize("q", [1, 50, 95, 99, 100])
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(values: list[float], q: float) -> None:
    found = percentile(values, q)
    assert found in values
    assert sum(v <= found for v in values) >= q / 100 * len(values)
    assert sum(v < found for v in values) < q / 100 * len(values)


def test_percentiles_count_what_never_came() -> None:
    values = [1.0] * 95 + [math.inf] * 5
    assert percentile(values, 95) == 1.0
    assert percentile(values, 96) == math.inf
    assert math.isnan(percentile([], 50))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00123456, "0.00123"), (0.5, "0.500"), (12.345, "12.3"), (99.96, "100.0"), (123456.0, "123,000"), (0.0, "0"),
     (math.inf, "∞"), (math.nan, "–")],
)  # fmt: skip
def test_three_digits_that_count(value: float, text: str) -> None:
    assert digits(value) == text


def test_every_case_is_measured_in_every_round_and_each_is_first_in_its_turn() -> None:
    orders = [turned("abc", by) for by in range(3)]
    assert [sorted(order) for order in orders] == [["a", "b", "c"]] * 3
    assert {order[0] for order in orders} == {"a", "b", "c"}


# --------------------------------------------------------------------------------------------------------------- budget


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def bench(tmp_path: Path, seconds: float, **more: Any) -> tuple[Bench, Clock]:
    clock = Clock()
    return Bench("test", seconds, folder=tmp_path, clock=clock, **more), clock


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 1), (5.0, 1), (60.0, 3), (1000.0, 7)])
def test_rounds_are_as_many_as_fit_whole(tmp_path: Path, seconds: float, rounds: int) -> None:
    made, clock = bench(tmp_path, seconds)
    seen = []
    for number, case in made.interleaved(["a", "b"]):
        seen.append((number, case))
        clock.now += 10.0
    assert len(seen) == 2 * rounds
    assert {number for number, _ in seen} == set(range(rounds))
    assert clock.now <= max(seconds, 20.0)


def test_a_file_of_measurements_is_json_with_a_line_for_each(tmp_path: Path) -> None:
    made, _ = bench(tmp_path, 0.0)
    for number in range(3):
        made.record({"model": "ddpm", "load": 0.5}, number, "s", 10, p50=0.1 * (number + 1), p95=math.inf)
    path = made.save()
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if '"metric"' in line]
    assert len(lines) == 6
    for line in lines:
        assert set(json.loads(line.rstrip(","))) >= {"round", "metric", "unit", "value", "samples", "model"}
    results = Results.read(path)
    assert results.about["machine"]["cores"] >= 1
    assert results.text("p50", 1000, model="ddpm", load=0.5) == "200 (100 – 300)"
    assert results.values("p95", model="ddpm") == [math.inf] * 3, "JSON has no infinity, but it is not lost"
    assert results.samples("p50") == 30
    assert results.cases("model", "load") == [("ddpm", 0.5)]
    assert results.spread("p99") is None


# ------------------------------------------------------------------------------------------------------------- arrivals


def test_arrivals_are_a_poisson_process() -> None:
    """Of the rate asked for, with exponential gaps (Kolmogorov–Smirnov), and kinds by their shares."""
    found = arrivals(20.0, 500.0, [4, 1], seed=3)
    times = [when for when, _ in found]
    assert times == sorted(times)
    assert 0 < times[0] <= times[-1] < 500.0
    assert abs(len(found) - 10_000) < 4 * 100, "the standard deviation of a Poisson number is its root"
    gaps = [b - a for a, b in pairwise(times)]
    assert stats.kstest(gaps, stats.expon(scale=1 / 20.0).cdf).pvalue > 0.01
    assert sum(kind == 1 for _, kind in found) / len(found) == pytest.approx(0.2, abs=4 * 0.004)
    assert arrivals(20.0, 500.0, [4, 1], seed=3) == found
    assert arrivals(20.0, 500.0, [4, 1], seed=4) != found
    with pytest.raises(ValueError, match="rate"):
        arrivals(0.0, 1.0, [1], seed=0)


def test_latencies_of_an_open_loop_are_those_of_a_queue() -> None:
    """Lindley's recursion: what waits for a server that takes S seconds, one at a time, is known from the arrivals
    alone."""
    phase = Phase((Job("a", {}),), seconds=200.0, rate=4.0, seed=1)
    service = 0.2  # 80 % busy
    outcome = timeless(open_loop(OneAtATime(a=service), phase))
    due = [when for when, _ in _load.schedule(phase)]
    expected, waited = [], 0.0
    for k, when in enumerate(due):
        waited = max(0.0, waited + service - (when - due[k - 1])) if k else 0.0
        expected.append(waited + service)
    assert outcome.latencies() == pytest.approx(expected, abs=1e-6)
    # and, on the average over many, those of an M/D/1 queue (Pollaczek–Khinchine)
    assert sum(expected) / len(expected) == pytest.approx(service + 0.8 * service / (2 * 0.2), rel=0.35)


def test_a_latency_counts_from_when_a_request_was_due() -> None:
    """A server that stalls is charged for those who came meanwhile, though none of them could have been asked one by
    one."""
    stalled = 0

    async def send(job: Job, seed: int) -> bool:
        nonlocal stalled
        stalled += 1
        loop = asyncio.get_running_loop()
        if loop.time() < 10.0:
            await asyncio.sleep(10.0 - loop.time())
        return True

    outcome = timeless(open_loop(send, Phase((Job("a", {}),), seconds=20.0, rate=5.0, seed=2)))
    assert stalled == len(outcome.answers)
    for answer, latency in zip(outcome.answers, outcome.latencies(), strict=True):
        assert latency == pytest.approx(max(0.0, 10.0 - answer.due), abs=1e-6)
    assert outcome.lag == pytest.approx(0.0, abs=1e-6)


def test_what_is_not_answered_in_time_or_refused_is_no_success() -> None:
    async def send(job: Job, seed: int) -> bool:
        if job.name == "never":
            await asyncio.sleep(1e6)
        return job.name == "good"

    jobs = (Job("good", {}, goal=1.0), Job("refused", {}), Job("never", {}))
    outcome = timeless(open_loop(send, Phase(jobs, seconds=100.0, rate=3.0, drain=5.0, seed=5)))
    counts = {job.name: len(outcome.of(job.name)) for job in jobs}
    assert sum(counts.values()) == len(outcome.answers) == outcome.failed + counts["good"]
    assert min(counts.values()) > 50
    assert outcome.goodput == pytest.approx(counts["good"] / 100.0)
    assert outcome.latency(50, "good") == pytest.approx(0.0, abs=1e-6)
    assert outcome.latency(1, "refused") == outcome.latency(1, "never") == math.inf


def test_goodput_counts_answers_within_the_goal_of_their_kind() -> None:
    jobs = (Job("slow", {}, goal=0.4), Job("quick", {}, goal=0.4))
    outcome = timeless(open_loop(OneAtATime(slow=0.5, quick=0.1), Phase(jobs, seconds=400.0, rate=0.05, seed=6)))
    assert len(outcome.of("slow")) > 3
    assert outcome.goodput == pytest.approx(sum(t <= 0.4 for t in outcome.latencies()) / 400.0)
    assert outcome.goodput < len(outcome.answers) / 400.0


def test_a_closed_loop_finds_what_a_server_can_do() -> None:
    """One at a time, a tenth of the time for short requests and the rest for long ones: capacity follows."""
    jobs = (Job("short", {}, share=0.8, work=1.0), Job("long", {}, share=0.2, work=20.0))
    phase = Phase(jobs, seconds=2000.0, clients=16, warm=50.0, seed=7)
    outcome = timeless(closed_loop(OneAtATime(short=0.01, long=0.2), phase))
    assert outcome.seconds == 2000.0
    assert outcome.work_rate == pytest.approx(100.0, rel=0.02), "a unit of work takes a hundredth of a second"
    assert outcome.capacity == pytest.approx(100.0 / (0.8 * 1 + 0.2 * 20), rel=0.02)
    assert outcome.latency(50, "short") > 0.1, "sixteen clients wait for one another"
    assert min(a.ended for a in outcome.of() if a.ended is not None) >= 50.0


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("begin", [0.0, 0.3, 1.1, 1.9])
def test_a_rate_is_told_from_the_end_of_a_batch_to_the_end_of_another(batch: int, begin: float) -> None:
    """Whole batches of answers every two seconds: the rate is theirs wherever the window begins."""
    ends = [2.0 * k + 0.001 * i for k in range(1, 12) for i in range(batch)]
    told = [_load.Answer(0, 0.0, 0.0, end, good=True) for end in ends]
    answers, seconds = Outcome(told, begin, begin + 13.0, jobs=(Job("a", {}),)).steady
    assert answers / seconds == pytest.approx(batch / 2.0, rel=1e-6)
    with pytest.raises(ValueError, match="too few"):
        assert Outcome([], 0.0, 1.0, jobs=(Job("a", {}),)).steady


def test_one_client_waits_for_nobody() -> None:
    outcome = timeless(closed_loop(OneAtATime(a=0.25), Phase((Job("a", {}),), seconds=10.0, clients=1)))
    assert outcome.latencies() == pytest.approx([0.25] * len(outcome.answers))
    assert len(outcome.completed()) == pytest.approx(40, abs=1)


def test_a_burst_comes_at_once() -> None:
    outcome = timeless(
        open_loop(OneAtATime(a=0.5), Phase((Job("a", {}),), seconds=1.0, rate=20.0, burst=True, drain=60.0))
    )
    assert outcome.latencies() == pytest.approx([0.5 * (k + 1) for k in range(20)])
    assert outcome.seconds == pytest.approx(10.0)
    assert outcome.work_rate == pytest.approx(2.0, rel=0.1)


def test_an_outcome_passes_between_processes_unchanged() -> None:
    """Against a port where nobody listens: every request fails, and the accounts say so."""
    phase = Phase((Job("a", {"seed": 0}),), seconds=0.3, rate=20.0, drain=1.0, seed=1)
    outcome = _load.run("http://127.0.0.1:9", phase)
    assert isinstance(outcome, Outcome)
    assert [(a.due, a.job) for a in outcome.answers] == [(pytest.approx(d), j) for d, j in _load.schedule(phase)]
    assert outcome.failed == len(outcome.answers) > 0
    assert outcome.goodput == 0.0


def test_what_a_server_answers_is_counted_as_it_came() -> None:
    """Answered 200 with content, whole or in pieces, on connections that are kept or closed: good; all else is not."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        asked = json.loads((await receive())["body"])
        start, content = {"type": "http.response.start", "status": asked["status"]}, b"abcd"[: asked["length"]]
        headers = [] if asked["pieces"] else [(b"content-length", str(len(content)).encode())]
        await send({**start, "headers": [*headers, *([(b"connection", b"close")] if asked["close"] else [])]})
        await send({"type": "http.response.body", "body": content[:2], "more_body": True})
        await send({"type": "http.response.body", "body": content[2:]})

    def job(good: bool, **asked: Any) -> Job:
        return Job(str(good), {"status": 200, "length": 4, "pieces": False, "close": False, "seed": 0, **asked})

    jobs = (
        *(job(True), job(True, pieces=True), job(True, close=True)),
        *(job(False, length=0), job(False, status=429), job(False, status=429, close=True)),
    )

    async def measure() -> Outcome:
        port = free_port()
        config = uvicorn.Config(answer, port=port, log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        outcome = await asyncio.to_thread(
            _load.run, f"http://127.0.0.1:{port}", Phase(jobs, seconds=1.0, rate=100.0, seed=2)
        )
        server.should_exit = True
        await serving
        return outcome

    outcome = asyncio.run(measure())
    assert {(outcome.jobs[a.job].name, a.good) for a in outcome.answers} == {("True", True), ("False", False)}


# ------------------------------------------------------------------------------------------------------------ commands

MODULES = {name: importlib.import_module(path) for name, path in benchmarks_main.MODULES.items()}


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_has_its_place_on_the_page(name: str) -> None:
    page, module = _frame.PAGE.read_text(encoding="utf-8"), MODULES[name]
    assert module.WEIGHT > 0
    for marker, text in module.page(Results({"measurements": []})).items():
        assert text.strip(), "a table without rows still has a header"
        assert f"<!-- {marker}: begin" in page
        assert f"<!-- {marker}: end -->" in page


def test_what_a_benchmark_finds_is_written_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n\n<!-- scheduler: begin -->\nold\n<!-- scheduler: end -->\n\nwords\n", encoding="utf-8")
    module = MODULES["scheduler"]
    args = argparse.Namespace(steps=10, rounds=1, results=tmp_path, page=page)
    path = _frame.measure("scheduler", module, args, 0.0, "the command")
    before = page.read_text(encoding="utf-8")
    _page.update(args, {"scheduler": module})
    assert page.read_text(encoding="utf-8") == before, "what is smallest measures nothing"
    about = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**about, "smallest": False}), encoding="utf-8")
    _page.update(args, {"scheduler": module})
    after = page.read_text(encoding="utf-8")
    assert "old" not in after
    assert after.startswith("# A\n\n<!-- scheduler: begin -->\n`the command`")
    assert after.endswith("<!-- scheduler: end -->\n\nwords\n")
    assert len(re.findall(r"^\| [\d,]+ \|", after, re.MULTILINE)) == len(module.LOADS)


@pytest.mark.parametrize("arguments", [["nothing"], ["scheduler", "--minutes", "soon"], ["--rounds", "x"]])
def test_a_wrong_command_line_is_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as ended:
        benchmarks_main.main()
    assert ended.value.code == 2


def test_a_variant_is_a_name_with_settings() -> None:
    parser = argparse.ArgumentParser()
    _servers.variants(parser)

    def variants(*arguments: str) -> dict[str, dict[str, str]]:
        return _servers.of_variants(parser.parse_args(arguments), ("a", "b"))

    asked = variants("--variant", "plain", "--variant", "small", "DRAWWELL_MAX_ROWS=4", "DRAWWELL_DEVICES=cpu,cpu")
    assert asked == {"plain": {}, "small": {"DRAWWELL_MAX_ROWS": "4", "DRAWWELL_DEVICES": "cpu,cpu"}}
    assert variants()["drawwell"] == {}, "the server as it is, first of all"
    for settings in variants().values():
        environment = {key.removeprefix("DRAWWELL_").lower(): value for key, value in settings.items()}
        assert Settings(**environment)
    for wrong in ("PATH=/", "DRAWWELL_SPEED=11"):
        with pytest.raises(SystemExit, match="no setting"):
            variants("--variant", "x", wrong)


@pytest.mark.parametrize(
    ("seconds", "window", "rounds"),
    [(0.0, 2.0, 1), (100.0, 8.0, 1), (250.0, 10.5, 2), (1000.0, 31.333, 3), (1e6, 60.0, 3)],
)
def test_windows_are_laid_out_for_a_few_rounds_or_for_good_ones(
    tmp_path: Path, seconds: float, window: float, rounds: int
) -> None:
    """Ten windows a round and 20 s besides."""
    made, _ = bench(tmp_path, seconds)
    found = made.window(10, least=2.0, most=60.0, fixed=20.0)
    assert found == pytest.approx(window, rel=1e-3)
    assert rounds * (10 * found + 20.0) <= max(seconds, 10 * 2.0 + 20.0) + 1e-6


def test_ways_draw_the_same_images_or_about_the_same(tmp_path: Path) -> None:
    """Those that take no compiler: float32 to a grey level, bfloat16 nearly. Where a step calls no network is said."""
    write(tmp_path, "d", "ddpm", DDPM)
    write(tmp_path, "p", "pixelcnn", PIXELCNN)

    def drawn(way: str) -> Any:
        model = _ways.prepared(tmp_path / "d", way, 4)
        return sample(model, [Draw(1, k, 6, "ddim", label=k) for k in range(3)], 3).astype(int)

    expected = drawn("float32")
    assert np.abs(drawn("float32 channels-last") - expected).max() <= 1
    low = np.abs(drawn("bfloat16") - expected)
    assert 0 < low.mean() < 8
    for way in ("float32 channels-last", "bfloat16"):
        with pytest.raises(_ways.NotApplicable):
            _ways.prepared(tmp_path / "p", way, 4)


@pytest.mark.parametrize(
    ("execution", "way"),
    [
        (None, "float32"),
        (Execution(), "float32"),
        (Execution(mode="compile", precision="bfloat16"), "bfloat16 compile"),
        (Execution(mode="channels-last"), "float32 channels-last"),
        (Execution(mode="onnx"), "float32 onnx"),
    ],
)
def test_the_way_that_a_server_tells_is_one_that_can_be_measured(execution: Execution | None, way: str) -> None:
    told = {} if execution is None else {"execution": dataclasses.asdict(execution)}
    assert _ways.way_of(told) == way
    assert way in _ways.WAYS


def test_what_a_device_does_is_counted() -> None:
    """Work grows with the rows; a rate of products is one that exists."""
    device = MODULES["device"]
    torch.manual_seed(0)
    model = device.ddpm.Model(device.ddpm.Config(**DDPM), ImageSpace(8, 8, 1)).eval().requires_grad_(False)
    four, eight = (device.flops(model, batch) for batch in (4, 8))
    assert eight == pytest.approx(2 * four, rel=0.02), "but for what all rows share"
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    least = 2 * sum(m.weight.numel() for m in convolutions)  # each weight is met at one place at least
    assert four > 4 * least > 0
    assert device.kernels(model) > len(convolutions)
    assert 1e3 < device.product_rate(torch.device("cpu"), torch.float32, 32, 0.01) < 1e15


@pytest.mark.slow
@pytest.mark.xdist_group("servers")
@pytest.mark.timeout(600)
def test_some_run_at_their_smallest_size(tmp_path: Path) -> None:
    """With servers and without, of tiny models: each leaves numbers behind, and nothing else."""
    zoo = tmp_path / "zoo"
    write(zoo, "fashion-mnist-ddpm", "ddpm", DDPM)
    write(zoo, "fashion-mnist-gan", "gan", GAN)
    write(zoo, "fashion-mnist-pixelcnn", "pixelcnn", PIXELCNN)
    write(zoo, "fashion-mnist-glow", "glow", {"couplings": (2, 2), "widths": (8, 8), "maps": 2})
    names = ["cache", "overhead", "scoring"]
    command = [sys.executable, "-m", "benchmarks", *names, "--minutes", "0"]
    command += ["--models", str(zoo), "--results", str(tmp_path / "results")]
    done = subprocess.run(
        command,
        cwd=_frame.ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},  # so that servers are started with a path of this test
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in names:
        found = Results.read(tmp_path / "results" / f"{name}.json").measurements
        assert found, name
        assert all(m["value"] is None or m["value"] >= 0 for m in found)
    assert [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info["cmdline"])] == []


def test_our_server_is_set_beside_the_best_peer_in_each_number(tmp_path: Path) -> None:
    """Which may be another one for each; what never came is no best number."""
    made, _ = bench(tmp_path, 0.0)
    found = {"drawwell": (8.0, 0.2, 1.0), "litserve": (8.0, 3.0, 0.9), "rayserve": (10.0, math.inf, 2.0)}
    for number in range(3):
        for server, (capacity, short, long) in found.items():
            made.record({"server": server}, number, "requests/s", capacity=capacity)
            for job, p95 in (("10 steps", short), ("200 steps", long)):
                made.record({"server": server, "load": 0.8, "job": job}, number, "s", p50=p95, p95=p95)
    table = MODULES["peers"].verdict(Results.read(made.save()))
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()[2:]]
    assert [(row[3], row[5], row[7]) for row in rows] == [
        ("Ray Serve", "0.800", "no"),  # capacity: 1.0 at least
        ("LitServe", "0.0667", "yes"),  # p95 of short ones: a tenth at most
        ("LitServe", "1.11", "no"),  # of long ones: 1.1 at most
    ]
    assert MODULES["peers"].page(Results.read(made.save()))["peers"].startswith(table)


def test_a_server_s_end_is_that_of_its_workers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that does not end when it is told to, and whose worker has a session of its own."""
    monkeypatch.setattr(_servers, "GRACE", 0.2)
    worker = (
        "import subprocess, time; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True)"
    )
    stubborn = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {worker}; time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None
    with child.stdout as told:
        below = psutil.Process(int(told.readline()))
    _servers._end(child)
    assert child.returncode is not None
    psutil.wait_procs([below], timeout=10)
    assert not below.is_running() or below.status() == psutil.STATUS_ZOMBIE


def test_peers_draw_what_the_models_draw(tmp_path: Path) -> None:
    """In a batch with requests of other lengths, joined either way, each as soon as it is finished."""
    write(tmp_path, "d", "ddpm", DDPM)
    write(tmp_path, "g", "gan", GAN)
    asked = [Asked("d", 2, 6, 1), Asked("g", 1, 1, 2), Asked("d", 1, 3, 3), Asked("d", 1, 6, 4)]
    grouped, joined = Painter(tmp_path, "steps"), Painter(tmp_path, "any")
    expected = [pixels(grouped.draw([request])[0]) for request in asked]
    assert expected[0].shape == (8, 16), "two images side by side"
    for painter in (grouped, joined):
        for png, alone in zip(painter.draw(asked), expected, strict=True):
            assert np.abs(pixels(png) - alone).max() <= 1, "to a grey level: sums run in another order in a batch"
    answers, order = joined.finishing(asked), []
    while True:
        with ThreadPoolExecutor(1) as fresh:  # a server may ask for each from another thread
            if (found := fresh.submit(next, answers, None).result()) is None:
                break
        order.append(found[0])
    assert sorted(order) == [0, 1, 2, 3]
    assert order.index(2) < min(order.index(0), order.index(3)), "the shorter one does not wait for the longer ones"
    with pytest.raises(ValueError, match="join"):
        Painter(tmp_path, "none")


def pixels(png: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(png)), dtype=np.int64)
