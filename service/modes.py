"""Which way of running a model's networks is taken: the fastest of those asked for that gives the same 8-bit images.

When a model is loaded, what takes no time is tried at once: each mode draws a few images in a short chain, to be
compared level by level with eager float32, and takes a few steps against the clock. What has to be compiled is compiled
in a thread of its own, while eager serves; when it is done, it is tried in the same way, and jobs that come from then
on run so.

bfloat16 is another matter: its images are others of about the same quality, so a model runs in it only where the
operator asks for that by name, and every answer says so. Then modes are compared by their time alone, and have to be
finite.
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from models import _modes, _onnx
from models._modes import Arguments, Call, NotApplicable
from models._protocol import UNLABELLED, Model, Spec
from service.engine import PLAIN, Warm
from service.execution import CHANNELS_LAST, COMPILE, CUDA_GRAPHS, EAGER, ONNX, Execution, Favour, Precision
from service.programs import Drawing

log = logging.getLogger(__name__)

CANONICAL_ROWS = 16  # of the one shape that is compiled for a CPU
PARITY_STEPS = 8  # of the chain whose images are compared
FASTER = 0.95  # of the other's time at most: less is within the noise of the clock
TIMED = 3  # steps of which the median counts
_compiling = threading.Lock()  # one at a time: it takes a core, and memory


class WarmUp(Protocol):
    """`Engine.warm`."""

    def __call__(self, model_id: str, model: Model, drawing: Model | None, execution: Execution) -> Warm: ...


@dataclass(frozen=True)
class Renewed:
    """How a model draws from now on, when it was compiled, or why not; or (without `warm`) since a mode has failed."""

    name: str
    model: Model
    warm: Warm | None
    execution: Execution


@dataclass
class _Choice:
    """What draws for a model, of what was tried so far."""

    reference: Model  # eager float32
    model: Model
    mode: str
    precision: Precision
    timed: Sequence[int]  # rows of the steps whose time decides
    not_chosen: dict[str, str] = field(default_factory=dict)
    tried: Execution = PLAIN  # what trying it told besides

    @property
    def execution(self) -> Execution:
        return replace(self.tried, mode=self.mode, precision=self.precision, not_chosen=dict(self.not_chosen))

    def give_up(self, mode: str, error: Exception) -> None:
        """It has failed, and is run as it was written from now on."""
        self.not_chosen[mode] = _reason(error)
        if self.mode == mode:
            self.not_chosen.pop(EAGER, None)
            self.mode = EAGER

    def consider(self, mode: str, model: Model, max_rows: int) -> bool:
        """Take it where it is as good and faster."""
        try:
            for plain in _conditions(model.spec):
                if self.precision == "float32":
                    _same_levels(self.reference, model, max_rows, plain)
                else:
                    _levels(model, min(CANONICAL_ROWS, max_rows), plain)
            ratio = _ratio(model, self.model, self.timed)
        except Exception as e:  # whatever a mode raises when it draws, another serves
            self.not_chosen[mode] = _reason(e)
            return False
        if ratio > FASTER:
            self.not_chosen[mode] = f"{ratio:.2f} times the time of {self.mode}"
            return False
        self.not_chosen[self.mode] = f"{1 / ratio:.2f} times the time of {mode}"
        self.model, self.mode = model, mode
        return True


class Modes:
    """Chooses for the models of a worker. Eager is always among the candidates.

    warm: the engine's. folder: whose subfolders are the checkpoints. precision: by model; float32 where it names none.
    favour: what the fastest is the fastest at, a lone row, a full batch, or both.
    tell: called from another thread with what was compiled.
    """

    def __init__(
        self,
        warm: WarmUp,
        folder: Path,
        modes: Sequence[str] = (),
        precision: Mapping[str, Precision] | None = None,
        max_rows: int = 64,
        tell: Callable[[Renewed], None] = lambda renewed: None,
        favour: Favour = "both",
    ) -> None:
        self._warm, self._folder, self._modes, self._tell = warm, folder, tuple(modes), tell
        self._precision, self._max_rows = precision or {}, max_rows
        full = min(CANONICAL_ROWS, max_rows)
        self._timed = {"lone": (1,), "full": (full,), "both": (1, full)}[favour]

    def warm(self, name: str, model: Model) -> Warm:
        """`Engine.warm`, in the best of the modes that are there at once. Raises what that does."""
        wanted = [mode for mode in self._modes if mode != EAGER]
        choice = _Choice(model, model, EAGER, "float32", self._timed)
        examples: Mapping[str, Arguments] = {}
        if wanted or self._precision.get(name, "float32") != "float32":
            with torch.inference_mode():
                examples = self._choose(name, choice, wanted)
        warm = self._warmed(name, choice)
        for mode, reason in choice.not_chosen.items():
            log.info("%s: %s is not chosen: %s", name, mode, reason)
        if (choice.mode, choice.precision) != (EAGER, "float32"):
            log.info("%s: draws by %s in %s", name, choice.mode, choice.precision)
        # Only now: it would disturb the clock, and `choice` is one thread's at a time.
        if COMPILE in wanted and examples:
            threading.Thread(
                target=self._compile, args=(name, choice, examples), name=f"compile {name}", daemon=True
            ).start()
        return warm

    def _warmed(self, name: str, choice: _Choice) -> Warm:
        """`Engine.warm` of what was chosen; of the model itself where that raises."""
        model = choice.reference
        if choice.model is not model:
            try:
                return self._tried(name, choice, choice.model)
            except Exception as e:  # in a batch of a size that was not tried before, perhaps
                given_up = {choice.mode, choice.precision} - {EAGER, "float32"}
                log.warning("%s: %s is given up", name, " in ".join(sorted(given_up)), exc_info=True)
                choice.not_chosen.pop(EAGER, None)
                choice.not_chosen |= dict.fromkeys(given_up, _reason(e))
                choice.model, choice.mode, choice.precision = model, EAGER, "float32"
        return self._warmed_up(name, choice, None)

    def _warmed_up(self, name: str, choice: _Choice, drawing: Model | None) -> Warm:
        warm = self._warm(name, choice.reference, drawing, choice.execution)
        choice.tried = warm.execution
        return warm

    def _tried(self, name: str, choice: _Choice, drawing: Model) -> Warm:
        """`Engine.warm`; and if the mode fails for the first time later on, the model is run as it was written. Not
        where its images would be others.
        """

        def told(network: str, error: Exception) -> None:
            log.error("%s: %s is given up for eager, until it is loaded again", name, mode, exc_info=error)
            choice.give_up(mode, error)
            self._tell(Renewed(name, choice.reference, None, choice.execution))

        mode = choice.mode
        warm = self._warmed_up(name, choice, drawing)
        if choice.precision == "float32":
            _modes.fall_back(drawing, told)
        return warm

    def _choose(self, name: str, choice: _Choice, wanted: Sequence[str]) -> Mapping[str, Arguments]:
        """Try what takes no time. Returns with what the model's networks are called; nothing where there is nothing to
        run otherwise."""
        model, precision = choice.reference, self._precision.get(name, "float32")
        try:
            examples = _modes.called(model)
        except NotApplicable as e:
            low = [precision] if precision != "float32" else []
            choice.not_chosen |= {what: str(e) for what in (*wanted, *low)}
            return {}
        if precision == "bfloat16":
            calls = {key: _modes.Autocast(model.networks()[key], model.device) for key in examples}
            choice.model, choice.precision = _modes.twin(model, calls), precision
        for mode in wanted:
            if mode == COMPILE:
                continue
            try:
                made = self._made(mode, name, model, precision, examples)
            except Exception as e:  # whatever is wrong with a mode, another serves
                choice.not_chosen[mode] = _reason(e)
            else:
                choice.consider(mode, made, self._max_rows)
        return examples

    def _made(
        self, mode: str, name: str, model: Model, precision: Precision, examples: Mapping[str, Arguments]
    ) -> Model:
        """The model, drawing in that mode. Raises `NotApplicable`, and whatever else the mode's library does."""
        calls: dict[str, Call] = {}
        for key, example in examples.items():
            network: Call = model.networks()[key]
            if mode == CHANNELS_LAST:
                network = _modes.ChannelsLast(model.networks()[key])
            elif mode == ONNX:
                if precision != "float32":
                    raise NotApplicable("float32 alone")
                network = _onnx.session(self._folder / name, key, model.device, torch.get_num_threads())
            elif mode == COMPILE:
                network = _modes.compiled(model.networks()[key], self._sizes(model))
            if precision == "bfloat16":
                network = _modes.Autocast(network, model.device)
            if mode == COMPILE:
                _modes.warm(network, self._sizes(model), example)
            elif mode == CUDA_GRAPHS:
                network = _modes.graphed(network, self._sizes(model), example)
            calls[key] = network
        return _modes.twin(model, calls)

    def _sizes(self, model: Model) -> tuple[int, ...]:
        """Batch sizes of what has one shape each. One alone keeps floats the same whatever the batch, and is soonest
        compiled."""
        return (self._max_rows if model.device.type == "cuda" else min(self._max_rows, CANONICAL_ROWS),)

    def _compile(self, name: str, choice: _Choice, examples: Mapping[str, Arguments]) -> None:
        began, model = time.monotonic(), choice.reference
        warm = None
        try:
            with _compiling, torch.inference_mode():
                made = self._made(COMPILE, name, model, self._precision.get(name, "float32"), examples)
                log.info("%s: compiled in %.1f s", name, time.monotonic() - began)
                if choice.consider(COMPILE, made, self._max_rows):
                    warm = self._tried(name, choice, made)
        except Exception as e:  # whatever the compiler says of a model: it is served as it is
            choice.not_chosen[COMPILE] = _reason(e)
        if warm is None:
            log.warning("%s: %s is not chosen, %s goes on: %s", name, COMPILE, choice.mode, choice.not_chosen[COMPILE])
        self._tell(Renewed(name, model, warm, choice.execution))


def _reason(error: Exception) -> str:
    told = str(error) if isinstance(error, NotApplicable) else f"{type(error).__name__}: {error}"
    first, *others = (line.strip() for line in told.splitlines() if line.strip())
    return f"{first} {others[0]}" if others and first.endswith(":") else first  # as of what a compiler's backend raised


def _conditions(spec: Spec) -> Sequence[bool]:
    """Whether requests are plain, which have no condition: a network may be called otherwise then."""
    return (False, True) if spec.image.labels or spec.image.captions else (False,)


def _levels(model: Model, rows: int, plain: bool = False) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """8-bit images of a short chain. Raises `NotApplicable` where one is not finite."""
    program = Drawing(model)
    asked = _modes.example_draws(model.spec, rows, PARITY_STEPS)
    drawn = model.init([replace(draw, label=UNLABELLED, prompt=None) for draw in asked] if plain else asked)
    for _ in range(PARITY_STEPS):
        if int(drawn.left.min()) <= 0:
            break
        drawn = program.step(drawn)
    images = [image for image in program.result(drawn) if image is not None]
    if len(images) < rows:
        raise NotApplicable("an image is not finite")
    return np.stack(images)


def _same_levels(reference: Model, other: Model, max_rows: int, plain: bool = False) -> None:
    rows = min(CANONICAL_ROWS, max_rows)
    expected, found = _levels(reference, rows, plain), _levels(other, rows, plain)
    if differ := int((expected != found).sum()):
        raise NotApplicable(f"changes {differ} of {expected.size} pixels")


def _ratio(candidate: Model, chosen: Model, timed: Sequence[int]) -> float:
    """The candidate's time of a step over that of the one chosen so far, measured in turns: the geometric mean over
    steps of so many rows."""
    ratios = []
    for rows in timed:
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(TIMED + 1):
            for model, told in zip((candidate, chosen), times, strict=True):
                told.append(_seconds(model, rows))
        ratios.append(statistics.median(times[0][1:]) / statistics.median(times[1][1:]))
    return statistics.geometric_mean(ratios)


def _seconds(model: Model, rows: int) -> float:
    program = Drawing(model)
    fresh = model.init(_modes.example_draws(model.spec, rows))
    began = time.perf_counter()
    program.result(program.step(fresh))  # on the host: so the device is done
    return time.perf_counter() - began


def use_cache(folder: Path | None) -> None:
    """Where compiled code is kept, so that a restart finds it. Before anything is compiled."""
    if folder is None:
        with contextlib.suppress(RuntimeError):  # a user without a home, as in a container: then torch's own choice
            folder = Path.home() / ".cache" / "drawwell" / "compiled"
    if folder is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the cores are the workers'
