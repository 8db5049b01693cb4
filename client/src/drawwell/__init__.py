"""The client of a Drawwell server: draw images from generative models, and ask how likely an image is.

from drawwell import Client

with Client("http://127.0.0.1:8000") as well:
    images = well.generate("fashion-mnist-ddpm", n=4, seed=7, label="Dress")
    scores = well.score("fashion-mnist-pixelcnn", images)
"""

from drawwell import errors
from drawwell.client import Client
from drawwell.errors import (
    ApiError,
    Busy,
    ContractError,
    DrawwellError,
    Invalid,
    NotFound,
    ServerError,
    TimedOut,
    TransportError,
)
from drawwell.events import Completed, Drawn, Event, Progress, Queued
from drawwell.schemas import Anomaly, Calibration, Images, Model, ModelScore, Score, Scores

__all__ = [
    "Anomaly",
    "ApiError",
    "Busy",
    "Calibration",
    "Client",
    "Completed",
    "ContractError",
    "Drawn",
    "DrawwellError",
    "Event",
    "Images",
    "Invalid",
    "Model",
    "ModelScore",
    "NotFound",
    "Progress",
    "Queued",
    "Score",
    "Scores",
    "ServerError",
    "TimedOut",
    "TransportError",
    "errors",
]
