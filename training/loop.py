"""THE loop: one for every family. Optimiser groups, averaged weights, clipping, precision, devices, resume, progress.

What is the paper's stays in the family's `objective`; what is here would be the same for any network.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

import models
from models import _checkpoint
from models._protocol import Batch, Model
from training import state as states
from training import teacher as teachers
from training.config import Run
from training.data import Dataset, Split, batches
from training.errors import Diverged, RunError
from training.progress import Progress
from training.state import State
from training.teacher import Teacher

CHECK_EVERY = 50  # steps between reads of the loss: a read waits for the device


def train(run: Run, data: Dataset, out: Path, fabric: Fabric, progress: Progress) -> State:
    """Train to the end of the run, taking up where out/resume left off. The result is the state's `average`, concluded.

    On one machine the result is the same bit for bit, whether the run was interrupted or not. Raises `Diverged`, and
    `RunError` where the run cannot begin.
    """
    state = _begin(run, data, out, fabric)
    finite = torch.ones((), dtype=torch.bool, device=fabric.device)
    with progress.start(run, done=state.step, seconds=state.seconds) as clock:
        for batch in _stream(data.splits["train"], run, state, fabric):
            values: dict[str, Tensor] = {}
            for name, optimiser in state.optimisers.items():
                optimiser.param_groups[0]["lr"] = run.optimisers[name].lr * lr_factor(run, state.step)
            for name, loss, metrics in _autocast(state.model.objective(batch), fabric):
                mean, norm = _update(state.optimisers[name], loss, run.clip, fabric)
                finite &= mean.isfinite() & norm.isfinite()
                values |= {f"loss/{name}": mean, **metrics}
            _share_buffers(state.model, fabric)
            average(state.average, state.model, run.ema, state.step)
            state.step += 1

            last = state.step == run.steps
            save = last or state.step % run.checkpoint_every == 0
            if save or state.step % CHECK_EVERY == 0:
                if not finite:
                    raise Diverged(
                        f"{run.family}: loss or gradient no longer finite at step {state.step} of {run.steps}"
                    )
                clock.report(state.step, {name: float(value) for name, value in values.items()})
            if save:
                state.seconds = clock.seconds()
                states.save(state, run, out, fabric)
        _conclude(state, data.splits["train"], run, fabric)
        state.seconds = clock.seconds()
    return state


def lr_factor(run: Run, step: int) -> float:
    """Linear warm-up over `run.warmup` steps, then constant, or half a cosine that reaches zero at `run.steps`, and at
    each of `run.restarts`, from where it begins anew at half the height.
    """
    if step < run.warmup:
        return (step + 1) / run.warmup
    if run.decay == "constant":
        return 1.0
    ends = (*run.restarts, run.steps)
    cycle = next(k for k, end in enumerate(ends) if step < end or end == run.steps)
    begin = (run.warmup, *run.restarts)[cycle]
    return 0.5**cycle * 0.5 * (1 + math.cos(math.pi * (step - begin) / (ends[cycle] - begin)))


@torch.no_grad()
def average(averaged: nn.Module, current: nn.Module, decay: float, step: int) -> None:
    """θ̄ ← d θ̄ + (1 − d) θ, where d = min(decay, (1 + step) / (10 + step)), so that the start is soon forgotten.

    Buffers are copied: what a model keeps there (codebooks, chains, statistics) is slow already, or must not be mixed.
    """
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(averaged.parameters()), list(current.parameters()), 1 - d)
    for mine, theirs in zip(averaged.buffers(), current.buffers(), strict=True):
        mine.copy_(theirs)


# ---------------------------------------------------------------------------------------------------------------- begin


def _begin(run: Run, data: Dataset, out: Path, fabric: Fabric) -> State:
    """The run at its first step, or where it was interrupted."""
    if run.batch_size % fabric.world_size:
        raise RunError(f"batch_size: {run.batch_size} images cannot be shared evenly by {fabric.world_size} devices")
    split, resuming = data.splits["train"], states.exists(out, fabric)
    torch.manual_seed(run.seed)  # the same weights and the same preparation on every device
    try:
        model: Model = models.family(run.family).Model(run.config, data.space).to(fabric.device).train()
    except ValueError as e:  # what every family raises for a config that does not fit itself or the images
        raise RunError(f"{run.family}: {e}") from e
    if run.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    teacher = teachers.load(run.teacher, data.space, fabric.device) if run.teacher is not None else None
    groups = model.groups()
    if groups.keys() != run.optimisers.keys():
        raise RunError(f"optimisers: the run has {sorted(run.optimisers)}, {run.family} has groups {sorted(groups)}")
    began = time.perf_counter()
    if not resuming:
        with torch.no_grad():
            if teacher is not None:
                _begin_from(teacher, model, run)
            model.prepare(_one_pass(split, run, 0, teacher, fabric))
    optimisers = {
        name: torch.optim.AdamW(groups[name], lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)
        for name, o in run.optimisers.items()
    }
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    state = State(model, averaged, optimisers, teacher, seconds=time.perf_counter() - began)
    torch.manual_seed(run.seed * 100_003 + 1 + fabric.global_rank)  # from here on, each device its own noise
    if resuming:
        states.resume(state, run, out, fabric)
    return state


def _begin_from(teacher: Teacher, model: Model, run: Run) -> None:
    try:
        model.begin_from(teacher.model)
    except ValueError as e:
        raise RunError(f"{run.family}: {e}") from e


def _one_pass(split: Split, run: Run, at: int, teacher: Teacher | None, fabric: Fabric) -> Iterator[Batch]:
    """One pass over the training data when `at` steps are taken, the same on every device."""
    for start in range(0, len(split), run.batch_size):
        part = batches(split, run.batch_size, run.seed, start // run.batch_size)
        part = part.take(np.arange(min(run.batch_size, len(split) - start)))  # nothing of the next pass
        yield _on_device(part, run, at, teacher, fabric)


# ------------------------------------------------------------------------------------------------------------------ end


def _conclude(state: State, split: Split, run: Run, fabric: Fabric) -> None:
    """What the model computes once from its finished weights. The state that is resumed from holds none of it: a
    finished run that is taken up again computes it again, to the same result."""
    if run.storage == "fp16":
        _checkpoint.round_to_half(state.average)
    torch.manual_seed(run.seed)  # the same on every device
    with torch.no_grad():
        state.average.conclude(_one_pass(split, run, run.steps, state.teacher, fabric))


# ------------------------------------------------------------------------------------------------------------- one step


def _stream(split: Split, run: Run, state: State, fabric: Fabric) -> Iterator[Batch]:
    """Batches from the state's step to the end: a pure function of (seed, step), each device with its own share."""
    for step in range(state.step, run.steps):
        part = batches(split, run.batch_size, run.seed, step, rank=fabric.global_rank, world=fabric.world_size)
        yield _on_device(part, run, step, state.teacher, fabric)


def _on_device(part: Split, run: Run, step: int, teacher: Teacher | None, fabric: Fabric) -> Batch:
    x = torch.from_numpy(part.x).to(fabric.device, non_blocking=True).to(torch.float32) / 255
    if run.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.from_numpy(part.labels).to(fabric.device, non_blocking=True)
    denoiser = teacher.denoiser if teacher is not None else None
    return Batch(x, labels, part.captions, step=step, steps=run.steps, teacher=denoiser)


Loss = tuple[str, Tensor, Mapping[str, Tensor]]


def _autocast(objective: Iterator[Loss], fabric: Fabric) -> Iterator[Loss]:
    """What the objective yields, each loss under an autocast of its own.

    Autocast keeps the bfloat16 copies that it makes of weights until it is left: under one autocast for all, the second
    loss would still see the weights from before the first one's update.
    """
    while True:
        with fabric.autocast():
            item = next(objective, None)
        if item is None:
            return
        yield item


def _update(optimiser: torch.optim.AdamW, loss: Tensor, clip: float | None, fabric: Fabric) -> tuple[Tensor, Tensor]:
    """One optimiser step on the group's own parameters; a loss leaves no gradient on another group's.

    Returns the loss over all devices, and the norm of its gradient before clipping.
    """
    parameters: list[Tensor] = optimiser.param_groups[0]["params"]
    loss.backward(inputs=parameters)  # type: ignore[no-untyped-call]
    loss = loss.detach().clone()
    gradients = [p.grad for p in parameters if p.grad is not None]
    _mean_over_devices([loss, *gradients], fabric)
    norm = nn.utils.get_total_norm(gradients)
    if clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    optimiser.step()
    optimiser.zero_grad()
    return loss, norm


def _mean_over_devices(tensors: list[Tensor], fabric: Fabric) -> None:
    """In place. Explicit, since `objective` is not the forward pass that DistributedDataParallel hooks into."""
    if fabric.world_size > 1:
        flat = fabric.all_reduce(torch.cat([t.flatten() for t in tensors]), reduce_op="mean")
        assert isinstance(flat, Tensor)
        for tensor, mean in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def _share_buffers(model: nn.Module, fabric: Fabric) -> None:
    """Buffers that an objective moves (codebooks, chains, statistics) stay equal on all devices: the first device's.

    Not their mean, which would be nonsense for chains.
    """
    if fabric.world_size > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
