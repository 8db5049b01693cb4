"""What an operator may set: environment variables `DRAWWELL_<NAME>`, or arguments of `Settings`.

Built by the composition roots (`__main__`, tests), never at import. A value outside its bounds stops the start with a
message.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.execution import Favour, modes_in, precisions_in


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="DRAWWELL_", frozen=True)

    models: Path = Field(Path("zoo"), description="folder whose subfolders are the checkpoints to serve")
    host: str = Field("127.0.0.1", description="address that the API listens on")
    port: int = Field(8000, ge=0, le=65535, description="port that the API listens on; 0: any free one")

    devices: str = Field(
        "auto",
        description='a worker for each: "cpu", "cuda:0,cuda:1", ...; "auto": every CUDA device, else up to four CPUs',
    )
    max_rows: int = Field(64, ge=1, description="most images that step together in one batch of a model")
    model_memory: int | None = Field(
        None,
        ge=1,
        description="bytes that the models of one worker may take in memory; those that were not used for the longest "
        "time make room, and are loaded again when they are asked for. Not set: every model stays",
    )
    determinism: Literal["exact", "pixels"] = Field(
        "exact",
        description="what stays the same in any crowd: every float, or 8-bit images as seen when a model is loaded, "
        "for batches that need no filling up",
    )
    modes: str = Field(
        "eager",
        description="ways to run networks that are tried when a model is loaded: eager, channels-last, onnx, "
        "cuda-graphs, compile (in the background); the fastest with equal 8-bit images is taken",
    )
    favour: Favour = Field(
        "both",
        description="what the fastest mode is the fastest at: a lone row (latency), a full batch (throughput), or both",
    )
    precision: str = Field(
        "", description='models that are drawn from in another precision than float32: "model=bfloat16,model=bfloat16"'
    )
    compile_cache: Path | None = Field(
        None, description="folder that keeps compiled code for the next start; not given: the user's cache folder"
    )
    traces: Literal["off", "console", "otlp"] = Field(
        "off", description="where OpenTelemetry spans of requests and jobs go: off, console, otlp"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="how much the processes tell")

    redis_url: SecretStr | None = Field(
        None,
        description="the Redis that `api` and `worker` share: redis://, rediss:// (TLS), with user and password; "
        "or redis+sentinel://host:26379,host:26379/service. `serve` needs none",
    )
    claim_seconds: float = Field(
        15.0, gt=0.1, description="a worker that gave no sign of life for so long loses its jobs to others"
    )
    keep_seconds: float = Field(600.0, gt=0, description="how long the answer of an ended job can still be fetched")
    drain_seconds: float = Field(
        20.0, ge=0, description="time that a worker which is told to end takes for what it runs; then it hands it back"
    )

    max_body_bytes: int = Field(16 * 2**20, ge=1024, description="longest request body, in bytes")
    max_images: int = Field(64, ge=1, description="most images (n) of one generate request")
    max_score_images: int = Field(64, ge=1, description="most images of one score request")
    max_image_side: int = Field(4096, ge=1, description="widest and highest image that is decoded, in pixels")
    queue_units: int = Field(
        200_000, ge=1, description="work that may be queued, in step-units: rows × steps × network evaluations a step"
    )
    request_timeout: float = Field(
        300.0, gt=0, allow_inf_nan=False, description="longest that a request may take, in seconds"
    )

    allow_calibration: Literal["auto", "yes", "no"] = Field(
        "auto",
        description="whether requests may recalibrate models (POST /models/{id}/calibration); auto: only where the API "
        "listens on this machine alone, as on 127.0.0.1. The models folder must be writable",
    )
    max_calibration_images: int = Field(5000, ge=100, description="most images of one calibration")
    max_calibration_bytes: int = Field(
        64 * 2**20, ge=1024, description="longest request body with images to calibrate on, in bytes"
    )
    calibration_timeout: float = Field(
        3600.0, gt=0, allow_inf_nan=False, description="longest that a calibration may take, in seconds"
    )
    drift_models: str = Field(
        "",
        description="models whose scores are watched for drift away from their calibration, with commas between; *: "
        "all. For models that see normal images mostly",
    )
    drift_bound: float = Field(
        100.0, gt=1, description="evidence (: 1) from which on drift is warned of; without drift, ever: once in so many"
    )

    catalog_poll_seconds: float = Field(1.0, gt=0, description="how often the models folder is looked at, in seconds")
    keep_alive_seconds: float = Field(
        10.0, gt=0, description="how long a stream may be silent before a comment keeps it open"
    )

    @field_validator("modes")
    @classmethod
    def _are_modes(cls, text: str) -> str:
        modes_in(text)
        return text

    @field_validator("precision")
    @classmethod
    def _are_precisions(cls, text: str) -> str:
        precisions_in(text)
        return text
