"""Side by side with other servers: the same networks, the same machine, the same requests, in turns.

    python -m benchmarks.peers.measure [--minutes 30]        (first: python -m benchmarks.peers setup)

First every peer is tuned: each of its settings is saturated with the mix of `benchmarks.mixed` (80 % of the requests
10 DDIM steps, 20 % 200), and that of the greatest capacity is kept. Then, round after round, each server in its turn
is started, saturated again, and gets that mix open-loop at 50, 80 and 100 % of the *best peer's* capacity: the very
same arrivals for all. Then the GAN, of one step: saturated, and with a single client.

Each has as many processes as there are cores, of one thread each; all compute in float32 with the same torch.
`--variant` adds our server with other settings, such as its fast modes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._frame import Bench, Results, alone, quotient
from benchmarks._load import Job, Phase
from benchmarks._page import table
from benchmarks._servers import STARTING, Running, Server, drawwell, of_variants, running, subset, variants
from benchmarks.mixed import DDPM, GAN, LOADS, closed, record_outcome, steps_mix
from benchmarks.peers._peers import PEERS

WEIGHT = 10.0
TUNING = 0.15  # of the time
LEAST, ENOUGH, MOST = 1.5, 5.0, 90.0  # seconds of a window: at least; to tell two settings apart; at most
SHORT, LONG = "10 steps", "200 steps"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), help="default: all that are set up")
    parser.add_argument(
        "--loads", nargs="+", type=float, default=list(LOADS), help="parts of the best peer's capacity that arrive"
    )
    variants(parser)


def run(bench: Bench, args: argparse.Namespace) -> None:
    names = [name for name, peer in PEERS.items() if peer.installed] if args.peers is None else args.peers
    if missing := [name for name in names if not PEERS[name].installed]:
        raise SystemExit(f"peers: {', '.join(missing)}: not set up; python -m benchmarks.peers setup")
    if not names:
        raise SystemExit("peers: none is set up; python -m benchmarks.peers setup")
    with subset(args.models, DDPM, GAN) as folder:
        settings = of_variants(args, (DDPM, GAN), bench.smallest)
        ours = [drawwell(folder, name=name, environment=given) for name, given in settings.items()]
        theirs, capacity = _tuned(bench, names, folder)
        servers = [*ours, *theirs]
        # Saturation for two, with one to warm up, as whole batches end at a time; the loads, and up to as long again
        # until the last answers are there; saturation by the GAN for a half; and its single client.
        windows = 3 + 2 * len(args.loads) + 1.5 * 0.5 + 0.5
        window = bench.window(windows * len(servers), LEAST, MOST, STARTING * len(servers), good=8.0)
        for number, server in bench.interleaved(servers):
            with running(server, *steps_mix(), _gan()) as started:
                _side(bench, number, started, args.loads, capacity, window)


def _gan() -> Job:
    return Job("GAN", {"model": GAN, "n": 1, "steps": 1, "seed": 0})


def _tuned(bench: Bench, names: list[str], folder: Path) -> tuple[list[Server], float]:
    """Each peer with the settings that serve it best, and the greatest capacity of all."""
    affordable = int(TUNING * bench.seconds / (STARTING + 1.5 * ENOUGH) / len(names))  # settings of each
    tried = {name: PEERS[name].settings[: max(affordable, 1)] for name in names}
    count = sum(len(settings) for settings in tried.values())
    window = min(max((TUNING * bench.seconds / count - STARTING) / 1.5, LEAST), MOST)
    best: dict[str, tuple[float, Server]] = {}
    for name, settings in tried.items():
        for setting in settings:
            server = PEERS[name].server(folder, setting)
            with running(server, *steps_mix()) as started:
                outcome = started.phase(closed(steps_mix(), window))
            case = {"server": name, "setting": described(setting)}
            print(f"benchmarks: {name}, {case['setting']}: {outcome.capacity:.2f} requests/s", flush=True)
            count = len(outcome.completed())
            bench.record(case, 0, "requests/s", count, tuning=outcome.capacity, failed_while_tuning=outcome.failed)
            if name not in best or outcome.capacity > best[name][0]:
                best[name] = outcome.capacity, server
                bench.record(case, 0, "requests/s", count, tuned=outcome.capacity)
    greatest = max(capacity for capacity, _ in best.values())
    return [server for _, server in best.values()], max(greatest, 1 / window)


def described(setting: Mapping[str, str]) -> str:
    """For people: PEER_BATCH=8 → batch 8."""
    words = {key.removeprefix("PEER_").lower(): value for key, value in setting.items() if key.startswith("PEER_")}
    return ", ".join(f"{key} {value}" for key, value in words.items()) or "as it is"


def _side(bench: Bench, number: int, server: Running, loads: Sequence[float], capacity: float, window: float) -> None:
    """All that is asked of one server in a round."""
    name = server.server.name
    outcome = server.phase(closed(steps_mix(), 2 * window))
    bench.record({"server": name}, number, "requests/s", len(outcome.completed()), capacity=outcome.capacity)
    for load in loads:
        seed = 1000 * number + int(100 * load)  # the same arrivals for every server
        phase = Phase(steps_mix(), window, rate=load * capacity, drain=max(window, 5.0), seed=seed)
        record_outcome(bench, {"server": name, "load": load}, number, server.phase(phase))
    outcome = server.phase(closed((_gan(),), window / 2))
    bench.record({"server": name}, number, "images/s", len(outcome.completed()), gan=outcome.capacity)
    outcome = server.phase(Phase((_gan(),), window / 2, clients=1))
    count = len(outcome.completed())
    bench.record({"server": name}, number, "s", count, gan_alone=outcome.latency(50))


# ----------------------------------------------------------------------------------------------------------------- page


@dataclass(frozen=True)
class Goal:
    """What our server is to reach beside the best peer, of which each number may be another one's."""

    title: str
    metric: str
    ratio: float  # of our number to the peer's: at least, where more is better, else at most
    more_is_better: bool = False
    case: Mapping[str, str | float] = field(default_factory=dict)
    scale: float = 1.0


GOALS = (
    Goal("capacity, requests/s ↑", "capacity", 1.0, more_is_better=True),
    Goal("10 steps at 80%: p95, ms ↓", "p95", 0.1, case={"load": 0.8, "job": SHORT}, scale=1000),
    Goal("200 steps at 80%: p95, s ↓", "p95", 1.1, case={"load": 0.8, "job": LONG}),
    Goal("10 steps at 50%: p50, ms ↓", "p50", 0.25, case={"load": 0.5, "job": SHORT}, scale=1000),
    Goal("GAN, images/s ↑", "gan", 1.5, more_is_better=True),
    Goal("GAN: p50 alone, ms ↓", "gan_alone", 1.0, scale=1000),
)


def verdict(results: Results) -> str:
    """Our server, in each variant, beside the best peer in each number, and whether that is what it is to reach."""
    servers = {server: None for (server,) in results.cases("server")}
    rows = []
    for goal in GOALS:
        medians = {name: results.spread(goal.metric, server=name, **goal.case) for name in servers}
        peers = {name: found.median for name, found in medians.items() if found is not None and name in PEERS}
        if not peers:
            continue
        best = (max if goal.more_is_better else min)(peers, key=lambda name: peers[name])
        theirs = results.values(goal.metric, server=best, **goal.case)
        for name, found in medians.items():
            if name in PEERS or found is None:
                continue
            ours = results.values(goal.metric, server=name, **goal.case)
            ratio = found.median / peers[best] if 0 < peers[best] < math.inf else math.nan
            reached = ratio >= goal.ratio if goal.more_is_better else ratio <= goal.ratio
            wanted = f"{'≥' if goal.more_is_better else '≤'} {goal.ratio:g}"
            rows.append(
                (
                    goal.title,
                    _title(name),
                    found.text(goal.scale),
                    _title(best),
                    results.text(goal.metric, goal.scale, server=best, **goal.case),
                    quotient(ours, theirs),
                    wanted,
                    "–" if math.isnan(ratio) else "yes" if reached else "no",
                )
            )
    header = ("", "variant", "ours", "best peer", "its number", "ratio, round by round", "goal", "median reaches it")
    return table(header, rows)


def page(results: Results) -> dict[str, str]:
    servers = [name for name, _ in results.cases("server", "load")]
    servers = list(dict.fromkeys(servers))
    settings = {m["server"]: m["setting"] for m in results.measurements if m["metric"] == "tuned"}  # the last is best
    rows: list[Sequence[str]] = [
        (
            _title(name),
            settings.get(name, ""),
            results.text("capacity", server=name),
            results.text("gan", server=name),
            results.text("gan_alone", 1000, server=name),
        )
        for name in servers
    ]
    header: Sequence[str] = ("server", "tuned to", "capacity, requests/s ↑", "GAN, images/s ↑", "GAN, p50 alone, ms ↓")
    parts = [verdict(results), table(header, rows)]
    for load in dict.fromkeys(load for _, load in results.cases("server", "load")):
        rows = [(_title(name), *_latencies(results, name, load)) for name in servers]
        header = (
            f"at {load:.0%} of the best peer's capacity", "10 steps: p50, ms ↓", "p95 ↓", "p99 ↓",
            "200 steps: p50, s ↓", "p95 ↓", "p99 ↓", "goodput, requests/s ↑", "failed", "utilisation",
        )  # fmt: skip
        parts.append(table(header, rows))
    return {"peers": "\n".join(parts)}


def _latencies(results: Results, server: str, load: float) -> list[str]:
    case: dict[str, Any] = {"server": server, "load": load}
    short = [results.text(f"p{q}", 1000, **case, job=SHORT) for q in (50, 95, 99)]
    long = [results.text(f"p{q}", **case, job=LONG) for q in (50, 95, 99)]
    return [*short, *long, *(results.text(name, **case) for name in ("goodput", "failed", "utilisation"))]


def _title(name: str) -> str:
    return PEERS[name].title if name in PEERS else name.replace("drawwell", "Drawwell")


if __name__ == "__main__":
    import sys

    alone("peers", sys.modules[__name__], "benchmarks.peers.measure")
