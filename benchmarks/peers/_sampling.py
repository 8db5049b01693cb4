"""What every peer does with a batch: the same networks and the same samplers as Drawwell's, whole requests at a time.

A request-level server collects requests and hands them over together. None of the peers can be told which requests to
collect, so a batch may hold requests of different lengths. Two ways of drawing such a batch are measured (`PEER_JOIN`),
and each peer is compared in the way that serves it best:

    steps   requests of the same model and steps are drawn together, one group after another, the shortest first: what a
            sampling loop can do whose number of steps is an argument
    any     all requests of a model are drawn together, and those that are finished leave: our samplers can, whose
            number of steps is a column of the batch
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from models import _checkpoint, _rows
from models._protocol import Draw, Model


@dataclass(frozen=True)
class Asked:
    """A request."""

    model: str
    n: int = 1
    steps: int | None = None  # None: the model's default
    seed: int = 0


class Painter:
    """The models of a folder, and one thread."""

    def __init__(self, folder: Path, join: str = "steps", threads: int = 1) -> None:
        if join not in ("steps", "any"):
            raise ValueError(f"join: {join!r}; there are steps, any")
        torch.set_num_threads(threads)
        self._join = join
        self._models: dict[str, Model] = {
            path.parent.name: _checkpoint.load(path.parent) for path in sorted(folder.glob(f"*/{_checkpoint.ABOUT}"))
        }

    @classmethod
    def from_environment(cls) -> Painter:
        join, threads = os.environ.get("PEER_JOIN", "steps"), int(os.environ.get("PEER_THREADS", "1"))
        return cls(Path(os.environ["PEER_MODELS"]), join, threads)

    def draw(self, asked: Sequence[Asked]) -> list[bytes]:
        """A PNG for each request, with its images side by side."""
        found = dict(self.finishing(asked))
        return [found[i] for i in range(len(asked))]

    def finishing(self, asked: Sequence[Asked]) -> Iterator[tuple[int, bytes]]:
        """(index of the request, PNG) of each, as soon as it is finished. Raises `KeyError` for an unknown model."""
        groups: dict[tuple[str, int], list[int]] = {}
        for i, request in enumerate(asked):
            steps = self._steps(request) if self._join == "steps" else 0
            groups.setdefault((request.model, steps), []).append(i)
        for (name, _), members in sorted(groups.items(), key=lambda item: item[0][1]):
            yield from self._drawn(self._models[name], {i: asked[i] for i in members})

    def _steps(self, request: Asked) -> int:
        return self._models[request.model].spec.steps.default if request.steps is None else request.steps

    def _drawn(self, model: Model, asked: dict[int, Asked]) -> Iterator[tuple[int, bytes]]:
        solver = model.spec.solvers[0] if model.spec.solvers else None
        draws, owners = [], []
        for i, request in asked.items():
            for sample in range(request.n):
                draws.append(Draw(request.seed, sample, self._steps(request), solver))
                owners.append(i)
        rows = _begun(model, draws)
        while owners:
            rows, done, images = _until_some_finish(model, rows)
            for i in dict.fromkeys(owners[k] for k in done):  # whole requests: their images take the same steps
                yield i, png(images[[owners[k] == i for k in done]])
            owners = [owner for k, owner in enumerate(owners) if k not in set(done)]


# No generator: inference mode belongs to a thread, and a generator may go on in another one.
@torch.inference_mode()
def _begun(model: Model, draws: Sequence[Draw]) -> Any:
    return model.init(draws)


@torch.inference_mode()
def _until_some_finish(model: Model, rows: Any) -> tuple[Any, list[int], NDArray[np.uint8]]:
    """The rows that go on, the indices of those that are finished, and their images (B, C, H, W)."""
    while True:
        rows = model.step(rows)
        left = rows.left.tolist()
        if min(left) == 0:
            break
    done, going = ([k for k, n in enumerate(left) if (n == 0) == finished] for finished in (True, False))
    images = (model.image(_rows.take(rows, done)) * 255).round().to(torch.uint8).numpy()
    return _rows.take(rows, going), done, images


def png(images: NDArray[np.uint8]) -> bytes:
    """(N, C, H, W), grey or colour, side by side."""
    sheet = np.concatenate(list(images), axis=2).transpose(1, 2, 0)  # (H, N·W, C)
    out = io.BytesIO()
    Image.fromarray(sheet[..., 0] if sheet.shape[2] == 1 else sheet).save(out, "png")
    return out.getvalue()
