"""What of a device's ceiling is reached: the DDPM's network at batch 256, 32×32, in each way that it can be run there.

    python -m benchmarks.device [--device cuda] [--minutes 5]

Ceiling: matrix products as large as fit, which no network can beat, in float32 and in bfloat16. A step's arithmetic is
that of its convolutions and linear layers.

Floor: a step launches so many kernels (counted by the profiler), and a kernel that does nothing takes so long to
launch: no eager step is faster than their product, however small the batch. CUDA graphs launch all of them at once.

The network is untrained: the work is the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks._frame import Bench, Results, alone
from benchmarks._page import table
from models import _modes, ddpm
from models._modes import NotApplicable
from models._protocol import ImageSpace, Model

WEIGHT = 0.5
SIDE, BATCHES = 32, (1, 16, 256)
SQUARE = 8192  # rows and columns of the matrices
LEAST, MOST = 0.05, 10.0  # seconds of a window
WAYS = ("float32", "float32 graphs", "bfloat16", "bfloat16 graphs")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, …")


def run(bench: Bench, args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    sizes, square = ((1,), 64) if bench.smallest else (BATCHES, SQUARE if device.type == "cuda" else 2048)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    about = {"device": name}
    torch.manual_seed(0)
    space = ImageSpace(width=SIDE, height=SIDE, channels=3)
    model = ddpm.Model(ddpm.Config(), space).to(device).eval().requires_grad_(False)
    window = bench.window(len(sizes) * len(WAYS) + 2, LEAST, MOST, good=1.0)
    for batch in sizes:
        bench.record({**about, "batch": batch}, 0, "FLOP", flops=flops(model, batch))
    bench.record(about, 0, "kernels", kernels=kernels(model))
    ways: dict[tuple[str, int], Model] = {}
    for way in WAYS:
        for batch in sizes:
            try:
                ways[way, batch] = prepared(model, way, batch)
            except NotApplicable as e:
                print(f"benchmarks: {way}: {e}", flush=True)
                break
    cases: list[str | tuple[str, int]] = ["float32 products", "bfloat16 products", "launch", *ways]
    for number, case in bench.interleaved(cases):
        if isinstance(case, tuple):
            way, batch = case
            seconds = step_seconds(ways[way, batch], batch, window)
            bench.record({**about, "way": way, "batch": batch}, number, "s", step=seconds)
        elif case == "launch":
            bench.record(about, number, "s", launch=launch_seconds(device, window))
        else:
            dtype = torch.float32 if case.startswith("float32") else torch.bfloat16
            reached = product_rate(device, dtype, square, window)
            bench.record({**about, "precision": case.split()[0]}, number, "FLOP/s", ceiling=reached)


def prepared(model: Model, way: str, batch: int) -> Model:
    """The model, drawing in that way. Raises `NotApplicable`."""
    precision, _, graphs = way.partition(" ")
    if way == "float32":
        return model
    calls = {}
    for name, example in _modes.called(model).items():
        call: _modes.Call = model.networks()[name]
        if precision == "bfloat16":
            call = _modes.Autocast(call, model.device)
        if graphs:
            with torch.inference_mode():
                call = _modes.graphed(call, [batch], example)
        calls[name] = call
    return _modes.twin(model, calls)


# ------------------------------------------------------------------------------------------------------------- measures


@torch.inference_mode()
def step_seconds(model: Model, batch: int, seconds: float) -> float:
    """Of a step over a batch, the mean over a window."""
    rows = model.init(_modes.example_draws(model.spec, batch))

    def step() -> None:
        model.step(rows)  # the same rows each time: a step costs the same at every tick

    return repeated(step, model.device, seconds)


@torch.inference_mode()
def product_rate(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> float:
    """FLOP/s of square matrix products."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / repeated(lambda: a @ b, device, seconds)


@torch.inference_mode()
def launch_seconds(device: torch.device, seconds: float) -> float:
    """Of one kernel that does next to nothing."""
    x = torch.zeros(1, device=device)
    many = 100

    def launches() -> None:
        for _ in range(many):
            x.add_(1)

    return repeated(launches, device, seconds) / many


def repeated(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of one time, the mean over as many as fit into a window; what the device was told is waited for once, at
    the end. Three times before it warm up."""
    for _ in range(3):
        work()
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    times = max(1, int(seconds / max(time.perf_counter() - began, 1e-6)))
    began = time.perf_counter()
    for _ in range(times):
        work()
    _wait(device)
    return (time.perf_counter() - began) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def flops(model: Model, batch: int) -> int:
    """Of the convolutions and linear layers of a step: two for every multiplication with an addition."""
    counted: list[int] = []

    def count(layer: nn.Module, _: object, out: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        counted.append(2 * out.numel() * layer.weight[0].numel())

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        model.step(model.init(_modes.example_draws(model.spec, batch)))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counted)


@torch.inference_mode()
def kernels(model: Model) -> int:
    """That a step over one row launches on a CUDA device; on a CPU the operators that it calls."""
    rows = model.init(_modes.example_draws(model.spec, 1))
    model.step(rows)  # the first one chooses its kernels
    kind = torch.profiler.ProfilerActivity.CUDA if model.device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    wanted = model.device.type.upper()
    with torch.profiler.profile(activities=[kind]) as profile:
        model.step(rows)
        _wait(model.device)
    events = [e for e in profile.events() or () if e.device_type.name == wanted]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in events)


# ----------------------------------------------------------------------------------------------------------------- page


def page(results: Results) -> dict[str, str]:
    rows = []
    for device, way, batch in results.cases("device", "way", "batch"):
        case = {"device": device, "way": way, "batch": batch}
        step, precision = results.spread("step", **case), way.split()[0]
        work = results.values("flops", device=device, batch=batch)[0]
        ceiling = results.spread("ceiling", device=device, precision=precision)
        share = "–" if step is None or ceiling is None else f"{work / step.median / ceiling.median:.1%}"
        speed = "–" if step is None else f"{work / step.median / 1e12:,.2f}"
        rows.append((device, way, str(batch), results.text("step", 1000, **case), speed, share))
    header = ("device", "way", "rows", "a step, ms ↓", "TFLOP/s ↑", "of the ceiling ↑")
    lines = [
        (
            device,
            *(results.text("ceiling", 1e-12, device=device, precision=p) for p in ("float32", "bfloat16")),
            results.text("kernels", device=device),
            results.text("launch", 1e6, device=device),
            f"{1000 * results.values('kernels', device=device)[0] * found.median:.3g}"
            if (found := results.spread("launch", device=device))
            else "–",
        )
        for (device,) in results.cases("device")
    ]
    names = (
        "device",
        "ceiling in float32, TFLOP/s",
        "in bfloat16",
        "kernels a step",
        "a launch, µs",
        "floor of a step, ms",
    )
    return {"device": f"{table(names, lines)}\n{table(header, rows)}"}


if __name__ == "__main__":
    import sys

    alone("device", sys.modules[__name__])
