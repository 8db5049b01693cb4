"""How a model's steps are run, told and asked for in plain data: what `GET /models/{id}` shows as `execution`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Determinism: TypeAlias = Literal["exact", "pixels"]
Precision: TypeAlias = Literal["float32", "bfloat16"]
Favour: TypeAlias = Literal["lone", "full", "both"]  # rows: whose steps shall be fast

EAGER, CHANNELS_LAST, COMPILE, ONNX, CUDA_GRAPHS = MODES = (
    "eager",
    "channels-last",
    "compile",
    "onnx",
    "cuda-graphs",
)


@dataclass(frozen=True)
class Execution:
    """Of a model on one worker. Scores are always float32, eager and exact; this is about drawing."""

    mode: str = EAGER
    precision: Precision = "float32"
    determinism: Determinism = "exact"
    filled_to: int = 1  # rows: a batch is filled up to a multiple of it
    seconds_per_step: Mapping[str, float] = field(default_factory=dict)  # by rows; measured when the model was loaded
    not_chosen: Mapping[str, str] = field(default_factory=dict)  # other modes that were asked for, and why not
    unfilled: Sequence[int] = ()  # rows of batches that are not filled up all the same


def modes_in(text: str) -> tuple[str, ...]:
    """A comma-separated list of modes. Raises `ValueError` for one that there is not."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for mode in found:
        if mode not in MODES:
            raise ValueError(f"modes: {mode!r}; there are {', '.join(MODES)}")
    return found


def precisions_in(text: str) -> dict[str, Precision]:
    """ "model=bfloat16,other=float32" -> the precision of each model named. Raises `ValueError`."""
    found: dict[str, Precision] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        model, separator, precision = (piece.strip() for piece in part.partition("="))
        if not separator or not model:
            raise ValueError(f"precision: {part!r}; it is a list of model=precision, as fashion-mnist-ddpm=bfloat16")
        if precision == "bfloat16":
            found[model] = "bfloat16"
        elif precision == "float32":
            found[model] = "float32"
        else:
            raise ValueError(f"precision: {precision!r} of {model}; there are float32, bfloat16")
    return found


def execution_in(data: Mapping[str, Any] | None) -> Execution | None:
    """What `dataclasses.asdict` made of it, back again."""
    return None if data is None else Execution(**data)
