"""The wire types: what requests, answers and events look like in JSON.

Bounds that depend on the model or on settings are checked by `accepts`; here is what holds for every model.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field
from pydantic_core import PydanticCustomError

Format: TypeAlias = Literal["png", "jpeg", "webp", "npy"]
LikelihoodKind: TypeAlias = Literal["exact", "bound", "estimate", "unnormalised"]
LARGEST_SEED = 2**64 - 1
MOST_MEMBERS = 8  # of an ensemble


def _label(value: Any) -> Any:
    if value is None or (isinstance(value, int | str) and not isinstance(value, bool)):
        return value
    raise PydanticCustomError("label", "Input should be a label's name or its index")


def _models(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(model, str) for model in value):
        raise PydanticCustomError("model", "Input should be a model's id, or a list of them, which is an ensemble")
    if not 2 <= len(value) <= MOST_MEMBERS:
        raise PydanticCustomError(
            "ensemble",
            "an ensemble has {least} to {most} models, not {count}; one by itself is given as its id, not as a list",
            {"least": 2, "most": MOST_MEMBERS, "count": len(value)},
        )
    if len(set(value)) < len(value):
        raise PydanticCustomError("ensemble", "a model is named twice; each judges once")
    return value


Label: TypeAlias = Annotated[int | str, Field(description="a class, by name or by index")]
Files: TypeAlias = Annotated[list[str], FailFast()]  # a list of a million mistakes is refused at its first
ModelId: TypeAlias = Annotated[str, Field(description="a model's id, as in `GET /models`")]


class Request(BaseModel):
    """Unknown fields are refused, true is no number, and neither is NaN. A field that is null counts as not given."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class JobOptions(Request):
    priority: Literal["interactive", "batch"] = Field(
        "interactive", description="batch waits until nothing interactive does"
    )
    timeout: float | None = Field(
        None, description="seconds after which nobody needs the answer; the server has a limit", examples=[30]
    )


class GenerateRequest(JobOptions):
    """Draw images. Only `model` is required; what else a model takes is in its `accepts`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "fashion-mnist-ddpm", "n": 4, "seed": 7, "steps": 50, "solver": "ddim"}]
        }
    )

    model: ModelId
    n: int = Field(1, description="number of images; image k is the same whatever n is")
    seed: int | None = Field(
        None, ge=0, le=LARGEST_SEED, description="unsigned, 64 bits; not given: the server picks one"
    )
    steps: int | None = Field(None, description="steps a sample takes")
    solver: str | None = Field(None, description="how a diffusion model steps")
    label: Annotated[Label | None, BeforeValidator(_label)] = None
    prompt: str | None = Field(None, description="a caption")
    guidance_scale: float | None = Field(None, description="strength of classifier-free guidance; 1: none")
    temperature: float | None = Field(None, description="below 1: less varied than the model")
    top_k: int | None = Field(None, description="draw each token among its k most likely values only")
    format: Format = Field("png", description="how images are encoded; npy: uint8 (height, width, channels)")
    preview_every: int | None = Field(
        None, description="steps between the previews of a stream; not given: no previews"
    )
    stream: bool = Field(False, description="answer with events (`text/event-stream`), as `Accept` can ask too")


class ScoreOptions(JobOptions):
    model: Annotated[ModelId | list[ModelId], BeforeValidator(_models)] = Field(
        description="a model's id; a list of them (in JSON alone), or the name of a folder that was calibrated from "
        "several, is an ensemble, whose statistics are judged together"
    )
    label: Annotated[Label | None, BeforeValidator(_label)] = None
    marginal: bool = Field(
        False,
        description="score each image under every label, and answer with the mean of the probabilities; costs as much "
        "as all labels together",
    )
    alpha: float = Field(0.01, gt=0, lt=1, description="false alarms to accept among normal images")
    confidence: float | None = Field(
        None, gt=0, lt=1, description="promise with this confidence that the true rate of false alarms is at most alpha"
    )
    fdr: float | None = Field(
        None, gt=0, lt=1, description="judge the images together: at most this share of those named is to be normal"
    )
    heatmap: bool = Field(False, description="also say where in the image it is unlikely, and where it is an anomaly")
    resize: bool = Field(
        False,
        description="bring images of another size or channel count to the model's; such scores are not comparable",
    )


class ScoreRequest(ScoreOptions):
    """Say how likely images are."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "fashion-mnist-pixelcnn", "images": ["iVBORw0KGgo…"], "alpha": 0.01}]}
    )

    images: Files = Field(
        description="base64 of PNG, JPEG, WebP or npy (uint8, (height, width) or (height, width, channels))"
    )


class CalibrationOptions(Request):
    description: str = Field(
        "", max_length=500, description="what the images are: kept with the calibration", examples=["line 3, new lamp"]
    )


class CalibrationRequest(CalibrationOptions):
    """Calibrate on normal images."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"images": ["iVBORw0KGgo…"], "description": "line 3, new lamp"}]}
    )

    images: Files = Field(description="base64 of PNG, JPEG, WebP or npy, all normal, of the model's size")


class ChooseCalibration(Request):
    """Use another calibration."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"version": 0}]})

    version: int = Field(ge=0, description="as listed; 0: the one that came with the model, or none")


class Answer(BaseModel):
    """A number that JSON cannot say (infinite, NaN) is null."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")


class ProblemDetails(Answer):
    """RFC 9457."""

    class Error(Answer):
        loc: list[str | int]
        msg: str
        input: Any

    type: str
    title: str
    status: int
    detail: str
    errors: list[Error] = []


class Image(Answer):
    b64_json: str
    seed: int
    sample: int = Field(
        description="the image's index k: it depends on weights, seed, k and the request's own parameters alone"
    )


class Usage(Answer):
    queue_seconds: float
    compute_seconds: float
    network_evaluations: int


class Generation(Answer):
    """An answer without its images, as the event `completed` tells it."""

    id: str
    model: str
    family: str
    steps: int
    seed: int
    width: int
    height: int
    channels: int
    usage: Usage
    model_sha256: str = Field(description="of the weights")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="that the images were drawn in")


class GenerateResponse(Generation):
    images: list[Image]


class JobProgress(Answer):
    step: int
    steps: int
    eta_seconds: float | None


class JobResponse(Answer):
    """A job that was asked for with `Prefer: respond-async`."""

    id: str
    model: str
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    position: int | None = Field(default=None, description="jobs that come before this one, while it is queued")
    eta_seconds: float | None = Field(default=None, description="predicted, from now to its end, while it is queued")
    progress: JobProgress | None = None
    answer: GenerateResponse | None = Field(default=None, description="once it is done")
    problem: ProblemDetails | None = Field(default=None, description="why there is no answer")


class Anomaly(Answer):
    score: float
    p_value: float
    is_anomaly: bool = Field(
        description="whether p_value ≤ alpha; with `confidence` stricter, with `fdr` as the batch decides"
    )
    alpha: float = Field(description="that of the request, or its `fdr`")
    threshold: float | None = Field(description="a score above it is an anomaly; null: none of the batch was")
    false_positive_rate_upper95: float


class ModelScore(Answer):
    """What one model says of one image."""

    log_prob: float | None = Field(
        description="nats of the whole 8-bit image; null where the family has only an energy, and of an ensemble"
    )
    bits_per_dim: float | None = Field(description="-log_prob / (D ln 2), D = width × height × channels")
    energy: float | None = Field(
        None, exclude_if=lambda v: v is None, description="lower is likelier; of unnormalised models only"
    )
    stderr: float | None = Field(description="of log_prob where it is an estimate, in nats")
    converged: bool | None = Field(
        None,
        exclude_if=lambda v: v is None,
        description="whether half the steps give nearly the same log_prob; of numerical integrals only",
    )
    anomaly: Anomaly | None = Field(description="null for a model, or an ensemble, that is not calibrated")
    by_label: dict[str, float] | None = Field(
        None, exclude_if=lambda v: v is None, description="with `marginal`: log_prob given each label, in nats"
    )
    statistics: dict[str, float] = Field(
        description="of an ensemble: `<model>.<statistic>`, by its calibration's names"
    )


class ScoreResult(ModelScore):
    heatmap: str | None = Field(
        description="base64 of a grey PNG of the image's size: 0 is at most the median of normal images; of these 1 in "
        "100 at most reaches beyond 128 anywhere"
    )
    mask: str | None = Field(
        None,
        exclude_if=lambda v: v is None,
        description="comes with a heat map: base64 of a PNG, white where the image is an anomaly. Of normal images a "
        "share of at most alpha has any white",
    )
    members: dict[str, ModelScore] | None = Field(
        None, exclude_if=lambda v: v is None, description="of an ensemble: what each model says by itself"
    )


class Calibration(Answer):
    n: int
    sha256: str


class CalibrationVersion(Answer):
    version: int = Field(description="0: the one that came with the model")
    current: bool = Field(description="whether it is in use")
    sha256: str
    error: str | None = Field(
        None, exclude_if=lambda v: v is None, description="why it cannot be used; then nothing else is told"
    )
    n: int | None = Field(None, description="calibration images; the others chose and fitted the detector")
    fit_n: int | None = None
    detector: str | None = None
    statistics: list[str] = []
    smallest_alpha: float | None = Field(None, description="at a smaller alpha no image could be an anomaly")
    data: dict[str, Any] | None = Field(None, description="the images' name and sha256")
    description: str = ""
    created: str | None = Field(None, description="ISO 8601, UTC; null of one that came with the model")


class CalibrationVersions(Answer):
    model: str
    current: int | None = Field(description="the version in use; null: the model has none")
    versions: list[CalibrationVersion]


class ScoreResponse(Answer):
    """Of an ensemble model, family, kind and dequantisation are lists, in the order of the request, or, asked for by
    the name of its folder, of the calibration."""

    model: str | list[str]
    family: str | list[str]
    kind: LikelihoodKind | list[LikelihoodKind]
    dequantisation: str | list[str] = Field(description='how the 8-bit grid was treated: "none", "uniform K=1", ...')
    results: list[ScoreResult]
    calibration: Calibration | None
    warnings: list[str]


class ImageShape(Answer):
    width: int = Field(ge=1)
    height: int = Field(ge=1)
    channels: int = Field(ge=1)


class Steps(Answer):
    kind: Literal["one-step", "iterative"]
    unit: str
    min: int
    default: int
    max: int
    network_evaluations_per_step: int = Field(ge=1)


class Likelihood(Answer):
    model_config = ConfigDict(extra="allow")

    kind: LikelihoodKind
    dequantisation: str
    note: str = ""
    steps: int = Field(1, ge=1, description="steps that one image's score takes")
    network_evaluations_per_step: int = Field(1, ge=1, exclude_if=lambda v: v == 1)
    heatmap_evaluations: int = Field(
        0, ge=0, exclude_if=lambda v: v == 0, description="of the network, for a heat map; absent: there are none"
    )


class Conditioning(Answer):
    labels: list[str] | None = Field(None, exclude_if=lambda v: v is None, description="class names in index order")
    captions: bool = Field(False, exclude_if=lambda v: not v)


class Spec(Answer):
    """What a model is and what a request may set."""

    model_config = ConfigDict(extra="allow")

    family: str
    image: ImageShape
    steps: Steps
    solvers: list[str] = []
    evaluations: dict[str, int] = Field(
        {},
        exclude_if=lambda v: not v,
        description="network evaluations of a step, of solvers that take more than one; the last step takes one",
    )
    adaptive: list[str] = Field(
        [],
        exclude_if=lambda v: not v,
        description="solvers that choose their own steps: `steps` says how finely, and they take about as many",
    )
    likelihood: Likelihood | None
    conditioning: Conditioning | None
    prediction: str | None = None
    accepts: dict[str, dict[str, Any]] = Field(
        description="field of a generate request -> JSON schema of what is taken there"
    )

    def ticks(self, steps: int, solver: str | None) -> int:
        """Steps that a worker takes for a sample of so many `steps`; an adaptive solver takes about as many."""
        return (steps - 1) * self.evaluations.get(solver or next(iter(self.solvers), ""), 1) + 1

    @property
    def labels(self) -> list[str]:
        return (self.conditioning.labels if self.conditioning else None) or []

    def label_index(self, label: int | str | None) -> int | None:
        """A label that the model takes, by name or index -> its index."""
        return self.labels.index(label) if isinstance(label, str) else label


class Execution(Answer):
    """How a model draws on a worker. Scores are float32, eager and exact whatever stands here."""

    mode: Literal["eager", "channels-last", "compile", "onnx", "cuda-graphs"]
    precision: Literal["float32", "bfloat16"]
    determinism: Literal["exact", "pixels"]
    filled_to: int = Field(description="rows: a batch is filled up to a multiple of it")
    seconds_per_step: dict[str, float] = Field(description="by rows; measured when the model was loaded")
    not_chosen: dict[str, str] = Field(description="other modes that were asked for, and why they are not used")
    unfilled: list[int] = Field(description="rows of batches that are not filled up all the same")


class LaneCost(Answer):
    """Fitted on one worker: a step over n rows takes row_seconds · n + step_seconds."""

    row_seconds: float
    step_seconds: float


class LaneLoad(Answer):
    """What workers do with a model at present."""

    workers: int
    running: int = Field(description="rows that step")
    waiting: int = Field(description="rows that wait in the workers")
    steps: int = Field(description="so far")
    costs: list[LaneCost] = Field(description="by worker")


class ModelEntry(Answer):
    """A Spec, and how the model stands. One whose files never worked has no Spec to show: those fields are absent."""

    model_config = ConfigDict(extra="allow")

    id: str
    status: Literal["ready", "loading", "failed"]
    error: str | None = Field(None, description="why it failed or, of a ready model, why a newer version was refused")
    resident: bool = Field(
        description="in some worker's memory; a request for one that is `ready` and not resident waits for its loading"
    )
    family: str | None = None
    image: ImageShape | None = None
    steps: Steps | None = None
    solvers: list[str] | None = None
    evaluations: dict[str, int] | None = None
    adaptive: list[str] | None = None
    likelihood: Likelihood | None = None
    conditioning: Conditioning | None = None
    prediction: str | None = None
    accepts: dict[str, dict[str, Any]] | None = None
    metrics: dict[str, Any] = {}
    sha256: str | None = Field(None, description="of the weights: the `model_sha256` of answers")
    execution: Execution | None = Field(None, description="null until a worker has loaded it")
    load: dict[str, LaneLoad] | None = Field(None, description="of one model alone: by draw, score, map")


class ModelList(Answer):
    models: list[ModelEntry]


class Health(Answer):
    status: Literal["ok", "ready"]
