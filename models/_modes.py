"""Running a model's networks in another way, whatever its family: faster, for the same images or about the same ones.

A model's `networks()` are functions of their arguments, batched along dim 0. A *twin* is a copy of the model that
shares all of it, but calls other functions in their place:

    ChannelsLast    weights and activations in the order (B, H, W, C), for which convolutions are faster on some devices
    compiled        torch.compile with the weights frozen into the code
    graphed         CUDA graphs: the kernels of a call are recorded once and launched together
    Autocast        in bfloat16, for about the same images: never for a score

Whatever is compiled or recorded has one shape: `Canonical` fills batches up to one of a few sizes, and cuts longer
ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from models._protocol import UNLABELLED, Draw, Model, Spec

Call: TypeAlias = Callable[..., Any]
Arguments: TypeAlias = tuple[Any, ...]


class NotApplicable(Exception):
    """A model that cannot be run so; the message says why."""


def example_draws(spec: Spec, n: int, steps: int | None = None) -> list[Draw]:
    """What a plain request for n images asks for, at the Spec's defaults, of at most so many steps."""
    taken = spec.steps.default if steps is None else max(spec.steps.min, min(steps, spec.steps.default))
    return [
        Draw(
            seed=0,
            sample=k,
            steps=taken,
            solver=spec.solvers[0] if spec.solvers else None,
            label=0 if spec.image.labels else UNLABELLED,
            prompt="a" if spec.image.captions else None,
            guidance_scale=1.0 if spec.guidance_scale is None else spec.guidance_scale.default,
        )
        for k in range(n)
    ]


@torch.inference_mode()
def called(model: Model, rows: int = 2) -> dict[str, Arguments]:
    """The networks that a step of drawing calls, and the arguments of the first call of each. Raises `NotApplicable`
    where it calls none, or not by tensors alone."""
    seen: dict[str, Arguments] = {}
    hooks = [
        network.register_forward_pre_hook(_noting(seen, name), with_kwargs=True)
        for name, network in model.networks().items()
    ]
    try:
        model.step(model.init(example_draws(model.spec, rows)))
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise NotApplicable("a step calls none of its networks")
    return seen


def _noting(seen: dict[str, Arguments], name: str) -> Callable[..., None]:
    def note(module: nn.Module, args: Arguments, kwargs: dict[str, Any]) -> None:
        if kwargs or not all(isinstance(a, Tensor) for a in flat(args)):
            raise NotApplicable(f"{name} is called with other arguments than tensors")
        seen.setdefault(name, args)

    return note


def twin(model: Model, calls: Mapping[str, Call]) -> Model:
    """A copy of the model that shares everything, but runs the networks named by other functions."""
    other = copy.copy(model)
    replaced = {name: _Replaced(network, calls[name]) for name, network in model.networks().items() if name in calls}
    other.__dict__["_modules"] = {**model._modules, **replaced}
    return other


class _Replaced(nn.Module):
    """A network in another's place; whatever else is asked of it, the first answers."""

    def __init__(self, network: nn.Module, call: Call) -> None:
        super().__init__()
        self.network = network
        self.__dict__["call"] = call  # no submodule, whatever it is
        self.tell: Callable[[Exception], None] | None = None  # see `fall_back`

    def forward(self, *args: Any) -> Any:
        try:
            return self.__dict__["call"](*args)
        except Exception as e:
            if self.tell is None:
                raise
            error = e
        result = self.network(*args)  # where this raises as well, it is the arguments
        self.tell(error)
        self.__dict__["call"], self.tell = self.network, None
        return result

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)


def fall_back(twin: Model, tell: Callable[[str, Exception], None]) -> None:
    """From now on a network of the twin for which the other function raises, while the network itself does not, is run
    as it was written, then and ever after. tell: called with its name, once.
    """
    for name, network in twin.networks().items():
        if isinstance(network, _Replaced):
            network.tell = partial(tell, name)


# ------------------------------------------------------------------------------------------------------------ the modes


class ChannelsLast:
    """A network with a copy of its weights in the other order."""

    def __init__(self, network: nn.Module) -> None:
        self._network = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __call__(self, *args: Any) -> Any:
        return mapped(Tensor.contiguous, self._network(*mapped(_ordered, args)))


def compiled(network: nn.Module, sizes: Sequence[int]) -> Call:
    """Compiled at its first call of each size, which takes from seconds to minutes: see `warm`."""
    function = torch.compile(network, dynamic=False, options={"freezing": True})
    return Canonical(function, sizes)


class Autocast:
    """A call in bfloat16 where that is safe enough (torch.autocast's lists), with float32 in and out."""

    def __init__(self, call: Call, device: torch.device) -> None:
        self._call, self._device = call, device

    def __call__(self, *args: Any) -> Any:
        with torch.autocast(self._device.type, torch.bfloat16):
            out = self._call(*args)
        return mapped(lambda part: part.float() if part.is_floating_point() else part, out)


def graphed(call: Call, sizes: Sequence[int], example: Arguments) -> Call:
    """CUDA graphs, one for each size, recorded now. What a call returns is a copy: the graph writes to one place."""
    if not flat(example)[0].is_cuda:
        raise NotApplicable("CUDA graphs need a CUDA device")
    graphs = {size: _Graph(call, sized(example, size)) for size in sizes}
    return Canonical(lambda *args: graphs[len(flat(args)[0])](*args), sizes)


class _Graph:
    def __init__(self, call: Call, example: Arguments) -> None:
        self._inputs = mapped(torch.clone, example)
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries choose their kernels in the first calls, outside the recording
            for _ in range(3):
                call(*self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = call(*self._inputs)

    def __call__(self, *args: Any) -> Any:
        for place, value in zip(flat(self._inputs), flat(args), strict=True):
            place.copy_(value)
        self._graph.replay()
        return mapped(torch.clone, self._outputs)


def warm(call: Call, sizes: Sequence[int], example: Arguments) -> None:
    """Call it once with each size, so that whatever is compiled then is compiled now."""
    for size in sizes:
        call(*sized(example, size))


class Canonical:
    """Calls a function with batches of a few sizes only: filled up with copies of the last row, longer ones cut."""

    def __init__(self, call: Call, sizes: Sequence[int]) -> None:
        self._call, self._sizes = call, sorted(sizes)

    def __call__(self, *args: Any) -> Any:
        rows, top = len(flat(args)[0]), self._sizes[-1]
        if rows > top:
            return _joined([self(*_cut(args, slice(at, at + top))) for at in range(0, rows, top)])
        size = next(size for size in self._sizes if size >= rows)
        if size == rows:
            return self._call(*args)
        return _cut(self._call(*sized(args, size)), slice(rows))


def sized(args: Arguments, size: int) -> Arguments:
    """The first rows of each tensor, or all and copies of the last one."""

    def part(x: Tensor) -> Tensor:
        if len(x) >= size:
            return x[:size].contiguous()
        return torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])])

    found: Arguments = mapped(part, args)
    return found


def flat(tree: Any) -> list[Any]:
    """What tuples and lists of tensors hold, in order."""
    return [leaf for part in tree for leaf in flat(part)] if isinstance(tree, tuple | list) else [tree]


def _cut(tree: Any, rows: slice) -> Any:
    return mapped(lambda x: x[rows], tree)


def mapped(f: Callable[[Tensor], Any], tree: Any) -> Any:
    """The function of each tensor of a tree of tuples and lists."""
    return type(tree)(mapped(f, part) for part in tree) if isinstance(tree, tuple | list) else f(tree)


def _ordered(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return type(parts[0])(_joined(column) for column in zip(*parts, strict=True))
