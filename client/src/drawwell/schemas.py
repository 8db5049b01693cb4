"""What the server sends, as values. Fields that a later server adds are ignored."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, overload

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from drawwell.errors import ContractError


class Schema(BaseModel):
    """Frozen; unknown fields are ignored, and one that is null counts as absent."""

    model_config = ConfigDict(frozen=True, extra="ignore", arbitrary_types_allowed=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: item for name, item in value.items() if item is not None}


S = TypeVar("S", bound=Schema)


def parse(schema: type[S], answer: Any) -> S:
    """The value that an answer's JSON stands for. Raises `ContractError`."""
    try:
        return schema.model_validate(answer)
    except ValidationError as error:
        raise ContractError(f"an answer that is no {schema.__name__}: {error}") from error


def decode(value: Any) -> Image.Image:
    """A picture from base64. Raises `ValueError`."""
    if isinstance(value, Image.Image):
        return value
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(value, validate=True)))
        picture.load()
    except (TypeError, binascii.Error, UnidentifiedImageError, OSError) as error:
        raise ValueError(f"not a base64 picture: {error}") from error
    return picture


Picture = Annotated[Image.Image, BeforeValidator(decode)]

# -------------------------------------------------------------------------------------------------------------- models


class Size(Schema):
    """Pixels."""

    width: int
    height: int
    channels: int


class Steps(Schema):
    """How many steps a sample takes, and what a step is."""

    kind: Literal["one-step", "iterative"]
    unit: str
    min: int
    default: int
    max: int
    network_evaluations_per_step: int


class Likelihood(Schema):
    """What the number that `score` returns is."""

    kind: Literal["exact", "bound", "estimate", "unnormalised"]
    dequantisation: str | None = None
    note: str | None = None
    heatmap_evaluations: int = 0  # of the network, for a heat map; 0: there are none


class Conditioning(Schema):
    """What can be asked for: one of the labels, or a caption."""

    labels: tuple[str, ...] = ()
    captions: bool = False


class Model(Schema):
    """What a model is and what a request to it may set."""

    id: str
    family: str | None = None
    status: Literal["ready", "loading", "failed"]
    error: str | None = None  # why it failed
    resident: bool = True  # in some worker's memory; a request for one that is not waits until it is loaded
    image: Size | None = None
    steps: Steps | None = None
    solvers: tuple[str, ...] = ()
    likelihood: Likelihood | None = None  # None: it cannot score
    conditioning: Conditioning | None = None
    accepts: dict[str, Any] = Field(default_factory=dict)  # field of `generate` -> JSON schema
    metrics: dict[str, Any] = Field(default_factory=dict)
    sha256: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in index order; empty where it takes no label."""
        return self.conditioning.labels if self.conditioning else ()


# -------------------------------------------------------------------------------------------------------------- images


class Usage(Schema):
    """What an answer cost."""

    queue_seconds: float
    compute_seconds: float
    network_evaluations: int | None = None


class GeneratedImage(Schema):
    """One image of an answer; it can be drawn again from (seed, sample)."""

    picture: Picture = Field(alias="b64_json")
    seed: int
    sample: int


class Generation(Schema):
    """An answer without its images."""

    id: str
    model: str
    family: str
    steps: int
    seed: int
    width: int
    height: int
    channels: int
    usage: Usage
    model_sha256: str | None = None


class Generated(Generation):
    """The answer to `POST /generate`."""

    images: tuple[GeneratedImage, ...]


class Images(Sequence[Image.Image]):
    """Generated pictures, with all that it takes to draw them again."""

    def __init__(self, answer: Generation, drawn: Iterable[tuple[int, Image.Image]]) -> None:
        """drawn: (sample, picture) of each."""
        self.id = answer.id
        self.model = answer.model
        self.family = answer.family
        self.seed = answer.seed
        self.steps = answer.steps
        self.size = (answer.width, answer.height)
        self.channels = answer.channels
        self.usage = answer.usage
        self.model_sha256 = answer.model_sha256
        in_order = sorted(drawn, key=itemgetter(0))
        self.samples = tuple(sample for sample, _ in in_order)
        self._pictures = tuple(picture for _, picture in in_order)

    def __len__(self) -> int:
        return len(self._pictures)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | Sequence[Image.Image]:
        return self._pictures[index]

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self._pictures)

    def __repr__(self) -> str:
        return f"<{len(self)} images by {self.model}, seed {self.seed}, {self.size[0]}×{self.size[1]}>"

    def grid(self, columns: int | None = None, scale: int = 1, gap: int = 2) -> Image.Image:
        """All of them in one picture, row by row, each enlarged `scale` times, hard edges; `gap` in pixels."""
        return grid(self._pictures, columns, scale, gap)

    def save(self, folder: str | Path, suffix: str = ".png") -> list[Path]:
        """One file per picture, named after model, seed and sample."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.model}-{self.seed}-{sample}{suffix}" for sample in self.samples]
        for path, picture in zip(paths, self._pictures, strict=True):
            picture.save(path)
        return paths


def grid(pictures: Sequence[Image.Image], columns: int | None = None, scale: int = 1, gap: int = 2) -> Image.Image:
    """Pictures of one size in one picture, row by row, on white. Raises `ValueError` for none, or for several sizes."""
    if not pictures:
        raise ValueError("grid: no pictures")
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"grid: pictures of different sizes: {sorted(sizes)}")
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = (side * scale for side in sizes.pop())
    mode = pictures[0].mode if len({picture.mode for picture in pictures}) == 1 else "RGB"
    sheet = Image.new(mode, (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for k, picture in enumerate(pictures):
        row, column = divmod(k, columns)
        enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (column * (width + gap), row * (height + gap)))
    return sheet


# -------------------------------------------------------------------------------------------------------------- scores


class Calibration(Schema):
    """What counts as normal for a model, by the images that it was calibrated on."""

    version: int  # 0: the one that came with the model
    current: bool = False  # whether it is in use
    sha256: str = ""
    error: str | None = None  # why it cannot be used; then nothing else is told
    n: int | None = None  # images whose scores are p-values; as many others chose and fitted the detector
    fit_n: int | None = None
    detector: str | None = None
    statistics: tuple[str, ...] = ()
    smallest_alpha: float | None = None  # at a smaller alpha no image could be an anomaly
    description: str = ""
    created: str | None = None


class Calibrations(Schema):
    """All of a model's."""

    versions: tuple[Calibration, ...] = ()


class Anomaly(Schema):
    """Is the image unlike what the model has learnt? A p-value against images that are not anomalies."""

    score: float  # higher: more unlike
    p_value: float  # of a normal image to score as high
    is_anomaly: bool  # score > threshold: p_value ≤ alpha, or stricter where `confidence` or `fdr` was asked for
    alpha: float  # or the `fdr` that was asked for
    threshold: float | None = None  # of `score`; None where nothing of the batch was an anomaly
    false_positive_rate_upper95: float | None = None  # what alpha promises with 95 % confidence

    def __str__(self) -> str:
        return f"{'anomaly' if self.is_anomaly else 'normal'} (p = {self.p_value:.3g}, alpha {self.alpha:g})"


class ModelScore(Schema):
    """What a model says of one image."""

    log_prob: float | None = None  # nats of the whole 8-bit image; None where there is only an energy
    bits_per_dim: float | None = None
    energy: float | None = None
    stderr: float | None = None  # nats, of an estimate
    converged: bool | None = None  # of an integral: whether half the steps give nearly the same
    anomaly: Anomaly | None = None  # None: the model is not calibrated
    by_label: dict[str, float | None] | None = None  # with `marginal`: log_prob given each label
    statistics: dict[str, float | None] = Field(default_factory=dict)


class Score(ModelScore):
    """What a model, or an ensemble, says of one image."""

    heatmap: Picture | None = None  # levels: 0 the median of normal images; beyond 128 one in 100 of them at most
    mask: Picture | None = None  # white where the image is an anomaly
    members: dict[str, ModelScore] = Field(default_factory=dict)  # of an ensemble: what each model says by itself


class Scored(Schema):
    """The answer to `POST /score`."""

    model: str | tuple[str, ...]
    family: str | tuple[str, ...] | None = None
    kind: str | tuple[str, ...] | None = None
    dequantisation: str | tuple[str, ...] | None = None
    results: tuple[Score, ...]
    calibration: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()


class Scores(Sequence[Score]):
    """A score for each image, in order, and what kind of number `log_prob` is."""

    def __init__(self, answer: Scored) -> None:
        self.model = answer.model
        self.family = answer.family
        self.kind = answer.kind
        self.dequantisation = answer.dequantisation
        self.calibration = answer.calibration
        self.warnings = answer.warnings
        self._results = answer.results

    def __len__(self) -> int:
        return len(self._results)

    @overload
    def __getitem__(self, index: int) -> Score: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Score]: ...
    def __getitem__(self, index: int | slice) -> Score | Sequence[Score]:
        return self._results[index]

    def __iter__(self) -> Iterator[Score]:
        return iter(self._results)

    def __repr__(self) -> str:
        return f"<{len(self)} scores ({self.kind}) by {self.model}>"
