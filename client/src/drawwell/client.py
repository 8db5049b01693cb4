"""The client: one method for each thing that a server can be asked."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, TypedDict, Unpack

import httpx
from PIL import Image

from drawwell.errors import ContractError, TimedOut
from drawwell.events import Event, read
from drawwell.schemas import Calibration, Calibrations, Generated, Images, Model, Scored, Scores, parse
from drawwell.transport import Transport

# A picture, the bytes of a picture file, or the path of one.
ImageLike: TypeAlias = "Image.Image | bytes | str | PathLike[str]"


class GenerateSettings(TypedDict, total=False):
    """What a request for images may set, as far as its model takes it. None: as if it were not set."""

    n: int  # how many images (1)
    seed: int | None  # unsigned, 64 bits
    label: str | int | None  # a class, by name or index
    prompt: str | None  # a caption
    steps: int | None
    solver: str | None
    guidance_scale: float | None
    temperature: float | None
    top_k: int | None
    priority: Literal["interactive", "batch"]
    timeout: float | None  # seconds after which the server shall give the request up


class ScoreSettings(TypedDict, total=False):
    """What a request for scores may set. None: as if it were not set."""

    label: str | int | None  # the class that the image is said to be of
    marginal: bool  # score under every label, and take the mean of the probabilities
    alpha: float  # the part of normal images that may be called anomalies (0.01)
    confidence: float  # promise with it that the true part is at most alpha
    fdr: float  # judge the images together: at most this part of those named is to be normal
    heatmap: bool  # also show where in the image it is unlikely, and where it is an anomaly
    resize: bool  # bring images of another size to the model's
    priority: Literal["interactive", "batch"]
    timeout: float | None  # seconds after which the server shall give the request up


class Client:
    """A connection to one server, for one thread or several; close it, or use it in a `with`.

    base_url     where the server is
    timeout      seconds without a sign of life before an attempt is given up
    retries      further attempts where no answer came or the server was busy
    transport    an `httpx` transport, such as `httpx.MockTransport` or one that drives an ASGI application
    sleep        waits between attempts; tests put their own here

    Every method raises a `DrawwellError` (the tree of them: `help(drawwell.errors)`).
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        timeout: float = 300.0,
        retries: int = 4,
        headers: dict[str, str] | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._http = httpx.Client(
            base_url=base_url,
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            headers={"User-Agent": f"drawwell/{_version()}"} | (headers or {}),
            transport=transport,
        )
        self._transport = Transport(self._http, retries, sleep)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes its connections."""
        self._http.close()

    # ----------------------------------------------------------------------------------------------------- generate

    def generate(self, model: str, **settings: Unpack[GenerateSettings]) -> Images:
        """Images by `model`. The same settings with the same `seed` give the same images; without a seed the server
        picks one, and the answer tells which.

        What a model takes is in `model(id).accepts`; anything else raises `Invalid`.
        """
        answer = parse(Generated, self._transport.json("POST", "/generate", _body(settings, model=model)))
        return Images(answer, ((image.sample, image.picture) for image in answer.images))

    def stream(
        self, model: str, *, preview_every: int | None = None, **settings: Unpack[GenerateSettings]
    ) -> Iterator[Event]:
        """What `generate` does, told as it happens: `Queued`, `Progress` (every `preview_every` steps with previews),
        `Drawn` for each image, and at last `Completed`, which holds what `generate` returns.

        To stop listening is to cancel. A stream that is cut off raises `TransportError`; the same request with the same
        seed gives the same images.
        """
        body = _body(settings, model=model, preview_every=preview_every, stream=True)
        with self._transport.events("/generate", body) as events:
            yield from read(events)

    # -------------------------------------------------------------------------------------------------------- score

    def score(
        self, model: str | Sequence[str], images: ImageLike | Iterable[ImageLike], **settings: Unpack[ScoreSettings]
    ) -> Scores:
        """How likely each image is under `model`, or an ensemble of models, and whether it is an anomaly."""
        who = model if isinstance(model, str) else list(model)
        several = [images] if isinstance(images, Image.Image | bytes | str | PathLike) else images
        body = _body(settings, model=who, images=[_encode(image) for image in several])
        return Scores(parse(Scored, self._transport.json("POST", "/score", body)))

    # -------------------------------------------------------------------------------------------------- calibration

    def calibrate(
        self, model: str, images: Iterable[ImageLike], description: str = "", timeout: float = 3600.0
    ) -> Calibration:
        """Let `model` learn what is normal from images that all are, without retraining it: at least 100, no two the
        same. `score` judges by it from then on; the calibrations before are kept.

        description: of the images, kept with the calibration. timeout: seconds to wait for the answer, which comes when
        all images have been scored. A server whose settings do not allow it answers 403, an `ApiError`.
        """
        body = {"images": [_encode(image) for image in images], "description": description}
        return parse(Calibration, self._transport.json("POST", f"/models/{model}/calibration", body, timeout))

    def calibrations(self, model: str) -> list[Calibration]:
        """The calibrations of `model`, old ones too; that with `current` is in use."""
        return list(parse(Calibrations, self._transport.json("GET", f"/models/{model}/calibration")).versions)

    def use_calibration(self, model: str, version: int) -> list[Calibration]:
        """Judge by another calibration of `model` from now on; 0 is the one that came with it."""
        answer = self._transport.json("PUT", f"/models/{model}/calibration", {"version": version})
        return list(parse(Calibrations, answer).versions)

    # ------------------------------------------------------------------------------------------------------- models

    def models(self) -> list[Model]:
        """Every model of the server, those that failed to load too."""
        answer = self._transport.json("GET", "/models")
        if not isinstance(answer, dict) or "models" not in answer:
            raise ContractError("GET /models: an answer without 'models'")
        return [parse(Model, item) for item in answer["models"]]

    def model(self, id: str) -> Model:
        """One model. Raises `NotFound`."""
        return parse(Model, self._transport.json("GET", f"/models/{id}"))

    def ready(self) -> bool:
        """Whether a worker is ready to work; False where nothing answers at all."""
        try:
            return self._http.get("/readyz").is_success
        except httpx.TransportError:
            return False

    def wait_until_ready(self, timeout: float = 120.0, every: float = 0.25) -> None:
        """Returns once the server is ready. Raises `TimedOut` after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self.ready():
            if time.monotonic() >= deadline:
                raise TimedOut(f"{self._http.base_url}: not ready after {timeout:g} s")
            self._transport.sleep(every)


def _encode(image: ImageLike) -> str:
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")  # lossless: a score is a function of the very pixels
        content = buffer.getvalue()
    elif isinstance(image, bytes):
        content = image
    else:
        content = Path(image).read_bytes()
    return base64.b64encode(content).decode("ascii")


def _body(settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {name: value for name, value in {**more, **settings}.items() if value is not None}


def _version() -> str:
    try:
        return version("drawwell")
    except PackageNotFoundError:  # run from the source tree
        return "0"
