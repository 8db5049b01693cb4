"""The client: one method for each thing that a server can be asked."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, TypeVar

import httpx
from PIL import Image
from pydantic import BaseModel, TypeAdapter, ValidationError

from drawwell.errors import ContractError, TimedOut
from drawwell.schemas import Generated, Images, Model, Scored, Scores
from drawwell.transport import Transport

T = TypeVar("T", bound=BaseModel)

# A picture, the bytes of a picture file, or the path of one.
ImageLike: TypeAlias = "Image.Image | bytes | str | PathLike[str]"


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

    def generate(
        self,
        model: str,
        *,
        n: int = 1,
        seed: int | None = None,
        label: str | int | None = None,
        prompt: str | None = None,
        steps: int | None = None,
        solver: str | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        priority: Literal["interactive", "batch"] | None = None,
        timeout: float | None = None,
    ) -> Images:
        """`n` images by `model`. The same arguments with the same `seed` give the same images; without a seed the
        server picks one, and the answer tells which.

        What a model takes is in `model(id).accepts`; anything else raises `Invalid`. `timeout`: seconds after which
        the server shall give the request up.
        """
        body = {
            "model": model,
            "n": n,
            "seed": seed,
            "label": label,
            "prompt": prompt,
            "steps": steps,
            "solver": solver,
            "guidance_scale": guidance_scale,
            "temperature": temperature,
            "priority": priority,
            "timeout": timeout,
        }
        answer = self._transport.json("POST", "/generate", _without_none(body))
        return Images(_parse(Generated, answer))

    # -------------------------------------------------------------------------------------------------------- score

    def score(
        self,
        model: str | Sequence[str],
        images: ImageLike | Iterable[ImageLike],
        *,
        label: str | int | None = None,
        alpha: float | None = None,
        heatmap: bool | None = None,
        resize: bool | None = None,
        priority: Literal["interactive", "batch"] | None = None,
        timeout: float | None = None,
    ) -> Scores:
        """How likely each image is under `model` (or an ensemble), and whether it is an anomaly at level `alpha`."""
        several = [images] if isinstance(images, Image.Image | bytes | str | PathLike) else images
        body = {
            "model": model if isinstance(model, str) else list(model),
            "images": [_encode(image) for image in several],
            "label": label,
            "alpha": alpha,
            "heatmap": heatmap,
            "resize": resize,
            "priority": priority,
            "timeout": timeout,
        }
        return Scores(_parse(Scored, self._transport.json("POST", "/score", _without_none(body))))

    # ------------------------------------------------------------------------------------------------------- models

    def models(self) -> list[Model]:
        """Every model of the server, those that failed to load too."""
        answer = self._transport.json("GET", "/models")
        if not isinstance(answer, dict) or "models" not in answer:
            raise ContractError("GET /models: an answer without 'models'")
        return [_parse(Model, item) for item in answer["models"]]

    def model(self, id: str) -> Model:
        """One model. Raises `NotFound`."""
        return _parse(Model, self._transport.json("GET", f"/models/{id}"))

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


def _without_none(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def _parse(schema: type[T], answer: Any) -> T:
    try:
        return TypeAdapter(schema).validate_python(answer)
    except ValidationError as error:
        raise ContractError(f"an answer that is no {schema.__name__}: {error}") from error


def _version() -> str:
    try:
        return version("drawwell")
    except PackageNotFoundError:  # run from the source tree
        return "0"
