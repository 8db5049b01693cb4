"""THE loop: one for every family. Optimiser groups, EMA, clipping, precision, several devices, resume, progress.

What is the paper's stays in the family's `objective`; what is here would be the same for any network.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import models
from models._protocol import Batch, Model
from training.config import Run
from training.data import Dataset, Split, batches
from training.progress import Progress

CHECK_EVERY = 50  # steps between reads of the loss: reading is a host-device synchronisation


class Diverged(Exception):
    """The loss is no longer finite. The last good resume state is kept."""


@dataclass
class State:
    """All that a run is at a step: what a resume state holds, next to the random generator."""

    model: Model
    average: AveragedModel
    optimisers: dict[str, torch.optim.AdamW]
    step: int = 0
    seconds: float = 0.0  # of optimisation, over all the times that the run was taken up again


def train(run: Run, data: Dataset, out: Path, fabric: Fabric, progress: Progress) -> Model:
    """Train to the end of the run, taking up where `out`/resume left off, and return the averaged model, on the CPU.

    The result is the same whether or not the run was interrupted, bit for bit on one machine. Raises `Diverged`.
    """
    state = _begin(run, data, fabric)
    _resume(state, run, out / "resume", fabric)
    split = data.splits["train"]
    finite = torch.ones((), dtype=torch.bool, device=fabric.device)
    clock = progress.start(run, done=state.step, seconds=state.seconds)
    for x, labels, captions in _stream(split, run, state.step, fabric):
        batch = Batch(x, labels, captions, step=state.step, steps=run.steps)
        for name, optimiser in state.optimisers.items():
            _set_lr(optimiser, run.optimisers[name].lr * lr_factor(run, state.step))
        losses: dict[str, Tensor] = {}
        with fabric.autocast():
            for name, loss, metrics in state.model.objective(batch):
                _update(state.optimisers[name], loss, run.clip, fabric)
                finite &= loss.detach().isfinite()
                losses |= {f"loss/{name}": loss.detach(), **metrics}
        _share_buffers(state.model, fabric)
        state.average.update_parameters(state.model)
        state.step += 1
        last = state.step == run.steps
        if last or state.step % CHECK_EVERY == 0:
            if not finite:
                raise Diverged(
                    f"{run.family}: a loss is not finite between steps {state.step - CHECK_EVERY} and {state.step}; "
                    f"the last good state is in {out / 'resume'}"
                )
            clock.report(state.step, {name: float(value) for name, value in losses.items()})
        if last or state.step % run.checkpoint_every == 0:
            state.seconds = clock.seconds()
            _save(state, run, out / "resume", fabric)
    clock.finish()
    averaged: Model = state.average.module
    return averaged.to("cpu").eval()


def lr_factor(run: Run, step: int) -> float:
    """Linear warm-up over `run.warmup` steps, then constant, or half a cosine down to zero at the last step."""
    if step < run.warmup:
        return (step + 1) / run.warmup
    if run.decay == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - run.warmup) / max(1, run.steps - run.warmup)))


def ema_update(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """θ̄ ← d θ̄ + (1 − d) θ, where d grows from 1/10 to `decay` at first, so that the start is forgotten."""

    @torch.no_grad()
    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], n: Tensor | int) -> None:
        torch._foreach_lerp_(list(averaged), list(current), 1 - min(decay, (1 + int(n)) / (10 + int(n))))

    return update


# ------------------------------------------------------------------------------------------------------------- one step


def _update(optimiser: torch.optim.AdamW, loss: Tensor, clip: float | None, fabric: Fabric) -> None:
    """One optimiser step on the group's own parameters; a loss leaves no gradient on another group's."""
    parameters: list[Tensor] = optimiser.param_groups[0]["params"]
    with torch.autocast(loss.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    present = [p.grad for p in parameters if p.grad is not None]
    if fabric.world_size > 1:  # explicit, since `objective` is not the forward pass that DistributedDataParallel wraps
        flat = fabric.all_reduce(torch.cat([g.reshape(-1) for g in present]), reduce_op="mean")
        assert isinstance(flat, Tensor)
        for gradient, mean in zip(present, flat.split([g.numel() for g in present]), strict=True):
            gradient.copy_(mean.view_as(gradient))
    if clip is not None:
        nn.utils.clip_grad_norm_(parameters, clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    torch.clear_autocast_cache()  # it holds the weights as they were before this step


def _share_buffers(model: nn.Module, fabric: Fabric) -> None:
    """Buffers that an objective moves (codebooks, power iterations) stay equal on all devices: their mean."""
    if fabric.world_size > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(fabric.all_reduce(buffer, reduce_op="mean"))


def _set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr


def _stream(split: Split, run: Run, start: int, fabric: Fabric) -> Iterator[tuple[Tensor, Tensor, tuple[str, ...]]]:
    """Batches from step `start` to the end of the run: a pure function of (seed, step), each device with its own share."""
    for step in range(start, run.steps):
        yield _on_device(
            batches(split, run.batch_size, run.seed, step, rank=fabric.global_rank, world=fabric.world_size), run, fabric
        )


def _on_device(part: Split, run: Run, fabric: Fabric) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    x = torch.from_numpy(part.x).to(fabric.device, non_blocking=True).to(torch.float32) / 255
    if run.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, torch.from_numpy(part.labels).to(fabric.device, non_blocking=True), part.captions


# ---------------------------------------------------------------------------------------------------- beginning, resume


def _begin(run: Run, data: Dataset, fabric: Fabric) -> State:
    torch.manual_seed(run.seed)  # the same weights and the same preparation on every device
    model: Model = models.family(run.family).Model(run.config, data.space).to(fabric.device).train()
    if run.channels_last:
        model = model.to(memory_format=torch.channels_last)
    groups = model.groups()
    if groups.keys() != run.optimisers.keys():
        raise ValueError(f"optimisers: the run has {sorted(run.optimisers)}, {run.family} has groups {sorted(groups)}")
    with torch.no_grad():
        model.prepare(_preparation(data.splits["train"], run, fabric))
    optimisers = {
        name: torch.optim.AdamW(groups[name], lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)
        for name, o in run.optimisers.items()
    }
    average = AveragedModel(model, multi_avg_fn=ema_update(run.ema))
    torch.manual_seed(run.seed * 100_003 + 1 + fabric.global_rank)  # from here on, each device its own noise
    return State(model, average, optimisers)


def _preparation(split: Split, run: Run, fabric: Fabric) -> Iterator[Batch]:
    """One pass over the training data, the same on every device."""
    for step in range(math.ceil(len(split.labels) / run.batch_size)):
        x, labels, captions = _on_device(batches(split, run.batch_size, run.seed, step), run, fabric)
        yield Batch(x, labels, captions, step=0, steps=run.steps)


def _save(state: State, run: Run, folder: Path, fabric: Fabric) -> None:
    """Write the resume state: whole, or not at all. Each rank keeps its own random generator."""
    scratch = folder.with_name("resume.tmp")
    if fabric.is_global_zero:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    fabric.barrier()
    random = {"cpu": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(fabric.device)
    save_file(random, scratch / f"random-{fabric.global_rank}.safetensors")
    if fabric.is_global_zero:
        save_file({k: v.contiguous() for k, v in _flat(state).items()}, scratch / "state.safetensors")
        about = {"step": state.step, "seconds": state.seconds, "run": _identity(run)}
        (scratch / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    fabric.barrier()
    if fabric.is_global_zero:
        previous = folder.with_name("resume.old")
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.rename(previous)
        scratch.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)
    fabric.barrier()


def _resume(state: State, run: Run, folder: Path, fabric: Fabric) -> None:
    """Take up a resume state where there is one. Raises `ValueError` if it is another run's."""
    previous = folder.with_name("resume.old")  # left by a stop between the two renames of a save
    if fabric.is_global_zero and previous.exists() and not folder.exists():
        previous.rename(folder)
    fabric.barrier()
    if not folder.exists():
        return
    about = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if about["run"] != _identity(run):
        changed = sorted(k for k, v in _identity(run).items() if about["run"].get(k) != v)
        raise ValueError(f"{folder}: the state of another run (other {', '.join(changed)}); remove it, or name another --out")
    saved = load_file(folder / "state.safetensors", device=str(fabric.device))
    for name, optimiser in state.optimisers.items():  # AdamW makes its moments at a first step: make them now, to be filled
        for i, parameter in enumerate(optimiser.param_groups[0]["params"]):
            if f"{name}.{i}.step" in saved:
                moments = {m: torch.zeros_like(parameter) for m in ("exp_avg", "exp_avg_sq")}
                optimiser.state[parameter] = {"step": torch.zeros(()), **moments}
    with torch.no_grad():
        for name, tensor in _flat(state).items():
            tensor.copy_(saved[name])
    state.step, state.seconds = about["step"], about["seconds"]
    random = load_file(folder / f"random-{fabric.global_rank}.safetensors")
    torch.set_rng_state(random["cpu"])
    if fabric.device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], fabric.device)


def _flat(state: State) -> dict[str, Tensor]:
    """Every tensor of the state, by name. The tensors themselves: copying into them restores the state."""
    flat = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    flat |= {f"average.{k}": v for k, v in state.average.state_dict().items()}
    for name, optimiser in state.optimisers.items():
        for i, parameter in enumerate(optimiser.param_groups[0]["params"]):
            flat |= {f"{name}.{i}.{k}": v for k, v in optimiser.state.get(parameter, {}).items()}
    return flat


def _identity(run: Run) -> Mapping[str, Any]:
    """The run as JSON gives it back; how often it saves is not part of what it is."""
    about: dict[str, Any] = json.loads(json.dumps(run.to_json()))
    del about["checkpoint_every"]
    return about
