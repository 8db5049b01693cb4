"""What routes and workers say to each other inside jobs and events: dataclasses <-> msgpack bytes.

Arrays travel as raw uint8 or float32: the API encodes PNGs, so that no worker spends its device's time on them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeAlias, get_args

import msgpack
import numpy as np
from numpy.typing import NDArray

from service.execution import Precision

Pixels: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class Generate:
    """Draw `n` images. Everything is resolved: label is an index, steps and solver are set."""

    n: int
    seed: int
    steps: int
    solver: str | None = None
    label: int | None = None
    prompt: str | None = None
    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    preview_every: int | None = None  # steps between previews; None: no previews


@dataclass(frozen=True)
class ScoreImages:
    """Score images (N, C, H, W); labels as indices, -1 for none."""

    images: Pixels
    labels: tuple[int, ...]


@dataclass(frozen=True)
class MapImages:
    """Say where images (N, C, H, W) are surprising; labels as indices, -1 for none."""

    images: Pixels
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Started:
    """The job's first row runs."""

    queue_seconds: float  # from the job's submission to its first step


@dataclass(frozen=True)
class Progress:
    """The images of the job stand at `step` of `steps`, in the mean and rounded down."""

    step: int
    steps: int
    eta_seconds: float | None = None
    previews: tuple[Pixels | None, ...] = ()  # (C, H, W) by sample, None of one that has not begun; empty: no preview


@dataclass(frozen=True)
class ImageDone:
    sample: int
    pixels: Pixels  # (C, H, W)


@dataclass(frozen=True)
class Scored:
    """The score of one image. Numbers in nats."""

    index: int
    log_prob: float | None
    energy: float | None = None
    stderr: float | None = None
    statistics: dict[str, float] = field(default_factory=dict)
    features: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # name -> (F,)
    converged: bool | None = None  # of an integral: whether half the steps give nearly the same


@dataclass(frozen=True)
class Mapped:
    """Where one image is surprising."""

    index: int
    surprise: NDArray[np.float32]  # (H, W)


@dataclass(frozen=True)
class Completed:
    """Final: everything was told. `network_evaluations` counts one per network call and row, and one per product with
    its Jacobian."""

    queue_seconds: float
    compute_seconds: float  # of the steps that this job's rows took part in
    network_evaluations: int
    precision: Precision = "float32"  # that images were drawn in
    version: str = ""  # sha256 of the model.json of the weights that did it; empty where a worker does not tell


@dataclass(frozen=True)
class Failed:
    """Final: no answer. `kind` is one of: row (a row raised or turned NaN), unknown-model, expired, cancelled,
    internal.
    """

    kind: str
    detail: str


Task: TypeAlias = Generate | ScoreImages | MapImages
Message: TypeAlias = Task | Started | Progress | ImageDone | Scored | Mapped | Completed | Failed

_TYPES: dict[str, type[Any]] = {t.__name__: t for t in get_args(Message)}
_DTYPES = ("uint8", "float32")


def pack(message: Message) -> bytes:
    """Message -> bytes."""
    fields = {f.name: getattr(message, f.name) for f in dataclasses.fields(message)}
    packed: bytes = msgpack.packb([type(message).__name__, fields], default=_array_out)
    return packed


def unpack(data: bytes) -> Message:
    """Bytes -> message. Raises `ValueError` for bytes that are none."""
    try:
        name, fields = msgpack.unpackb(data, object_hook=_array_in, use_list=False, strict_map_key=False)
        message: Message = _TYPES[name](**fields)
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"message: not one of {', '.join(_TYPES)}: {e}") from e
    return message


def _array_out(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.name in _DTYPES:
        return {value.dtype.name: list(value.shape), "data": value.tobytes()}
    raise TypeError(f"message: cannot send a {type(value).__name__}")


def _array_in(value: dict[str, Any]) -> Any:
    for dtype in _DTYPES:
        if value.keys() == {dtype, "data"}:
            return np.frombuffer(value["data"], dtype).reshape(value[dtype])
    return value
