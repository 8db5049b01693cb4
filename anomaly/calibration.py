"""A calibration: which statistics, the detector over them, and the scores of normal images, in one safetensors file.

statistics   what `describe` makes of a model's score and the image itself, by name
detector     fitted on the fit images
maps         where there are heat maps: what they are measured by (`anomaly.heatmaps`)
scores       of the calibration images, sorted: normal images that neither model nor detector has seen
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse
from safetensors.numpy import save as format_arrays

from anomaly import conformal, detectors
from anomaly.complexity import compressed_bits
from anomaly.detectors import Detector, Floats
from anomaly.heatmaps import Maps

FORMAT = 1
FILE = "calibration.safetensors"  # beside the model whose scores it calibrates


class CalibrationError(Exception):
    """A calibration that cannot be made or read: the message says what is wrong, and what would be right."""


@dataclass(frozen=True)
class Verdict:
    """What is said of one image."""

    score: float
    p_value: float
    is_anomaly: bool
    alpha: float
    threshold: float | None  # None: no score is an anomaly at this alpha
    false_positive_rate_upper95: float


@dataclass(frozen=True)
class Calibration:
    statistics: tuple[str, ...]
    detector: Detector
    scores: Floats  # (n,) sorted
    about: Mapping[str, Any]  # data description, weights' sha256, sizes, volumes of the detectors
    maps: Maps | None = None

    @property
    def n(self) -> int:
        return len(self.scores)

    def score(self, described: Sequence[Mapping[str, float]]) -> Floats:
        """(m,) of images described by `describe`. An image of which a statistic cannot be said is as anomalous as can
        be. Raises `CalibrationError` for a statistic that none has: the calibration is of another version of the model.
        """
        missing = sorted(set(self.statistics).difference(*described)) if described else []
        if missing:
            raise CalibrationError(f"statistics: {', '.join(missing)} missing; the calibration is of another version")
        vectors = np.array([[d.get(name, math.nan) for name in self.statistics] for d in described])
        return self.detector.score(vectors)

    def rank(self, alpha: float, confidence: float | None) -> int:
        """Raises `CalibrationError` where no image could ever be an anomaly: there are too few calibration images."""
        if confidence is None:
            k, needed = conformal.rank(self.n, alpha), conformal.needed(alpha)
        else:
            k = conformal.rank_with_confidence(self.n, alpha, confidence)
            needed = conformal.needed_with_confidence(alpha, confidence)
        if k == 0:
            promise = "" if confidence is None else f" with confidence {confidence:g}"
            raise CalibrationError(
                f"alpha {alpha:g}{promise} takes at least {needed:,} calibration images; there are {self.n:,}"
            )
        return k

    def judge(self, scores: Floats, alpha: float, confidence: float | None = None) -> list[Verdict]:
        """Each image by itself. With a confidence, the true false-alarm rate is at most alpha with that confidence."""
        k = self.rank(alpha, confidence)
        limit, bound = conformal.threshold(self.scores, k), conformal.upper_bound(self.n, k)
        found = conformal.p_values(self.scores, scores)
        at_most = (k + 0.5) / (self.n + 1)  # p is a whole number of (n + 1)ths
        return [
            Verdict(float(s), float(p), bool(p < at_most), alpha, limit, bound)
            for s, p in zip(scores, found, strict=True)
        ]

    def judge_together(self, scores: Floats, rate: float) -> list[Verdict]:
        """A batch: of the images that are named, at most that share is to be normal, on average."""
        found = conformal.p_values(self.scores, scores)
        named = conformal.discoveries(found, rate)
        limit = float(scores[named].min()) if named.any() else None
        k = round(float(found[named].max()) * (self.n + 1)) if named.any() else 0
        bound = conformal.upper_bound(self.n, k)
        return [
            Verdict(float(s), float(p), bool(a), rate, limit, bound)
            for s, p, a in zip(scores, found, named, strict=True)
        ]

    def pack(self) -> bytes:
        arrays = {"scores": self.scores, **{f"detector.{k}": np.asarray(v) for k, v in self.detector.state.items()}}
        if self.maps is not None:
            arrays |= {f"maps.{name}": getattr(self.maps, name) for name in ("centre", "scale", "maxima")}
        about = {
            "format": FORMAT,
            "statistics": list(self.statistics),
            "detector": self.detector.kind,
            **self.about,
        }
        packed: bytes = format_arrays(
            {name: np.ascontiguousarray(a, dtype=np.float64) for name, a in arrays.items()},
            metadata={"calibration": json.dumps(about, sort_keys=True)},
        )
        return packed

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.pack()).hexdigest()


def unpack(packed: bytes) -> Calibration:
    """Raises `CalibrationError` for bytes that are no calibration."""
    try:
        length = int.from_bytes(packed[:8], "little")
        about = json.loads(json.loads(packed[8 : 8 + length])["__metadata__"]["calibration"])
        arrays = parse(packed)
        found = about.pop("format")
        if found != FORMAT:
            raise CalibrationError(f"calibration: format {found!r}; this version reads format {FORMAT}")
        kind, statistics = about.pop("detector"), tuple(about.pop("statistics"))
        state = {k.removeprefix("detector."): v for k, v in arrays.items() if k.startswith("detector.")}
        if kind not in detectors.SCORES:
            raise CalibrationError(f"detector: {kind!r}; there are {', '.join(detectors.SCORES)}")
        found_maps = {k.removeprefix("maps."): v for k, v in arrays.items() if k.startswith("maps.")}
        maps = Maps(**found_maps) if found_maps else None
        return Calibration(statistics, Detector(kind, state), arrays["scores"], about, maps)
    except (SafetensorError, KeyError, TypeError, ValueError) as e:
        raise CalibrationError(f"calibration: not one: {type(e).__name__}: {e}") from e


def describe(
    pixels: NDArray[np.uint8],
    log_prob: float | None,
    energy: float | None,
    statistics: Mapping[str, float],
    complexity: float | None = None,
) -> dict[str, float]:
    """Everything known of an image (C, H, W), by name: the model's statistics, and how the image compresses.

    nll_bits          −log₂ of its probability, where the model has one    complexity_bits    as `compressed_bits`
    excess_bits       nll_bits − complexity_bits (Serrà's S)                energy             where the model has one

    complexity: the image's `compressed_bits`, where they are known already.
    """
    found = {name: float(value) for name, value in statistics.items()}
    complexity = compressed_bits(pixels) if complexity is None else complexity
    if log_prob is not None:
        nll_bits = -log_prob / math.log(2)
        found |= {"nll_bits": nll_bits, "excess_bits": nll_bits - complexity}
    if energy is not None:
        found["energy"] = energy
    return {**found, "complexity_bits": complexity}


def needed(statistics: int) -> int:
    """The least number of images that a calibration takes, fit and calibration images together."""
    return 2 * max(50, 4 * statistics)


def halves(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(fit, calibration): indices of distinct images (N, …). The hash of an image's bytes gives it a place in an order,
    whose first half is fit: a property of the images, however they are listed."""
    hashes = (hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in pixels)
    order = np.argsort(np.frombuffer(b"".join(hashes), dtype=">u8"), kind="stable")
    return order[: len(order) // 2], order[len(order) // 2 :]


def calibrate(
    fit: Sequence[Mapping[str, float]],
    calibration: Sequence[Mapping[str, float]],
    about: Mapping[str, Any],
    maps: Maps | None = None,
) -> Calibration:
    """From described normal images: fit chooses and fits the detector, calibration gives the scores. Disjoint.
    maps: of the same images, where the models have heat maps.

    Raises `CalibrationError` for too few images.
    """
    names = tuple(sorted(fit[0])) if fit else ()
    least = needed(len(names)) // 2
    if len(fit) < least or len(calibration) < 20:
        raise CalibrationError(
            f"calibration: {len(fit)} fit and {len(calibration)} calibration images; "
            f"{len(names)} statistics take at least {least} and 20"
        )
    vectors = np.array([[d[name] for name in names] for d in fit], dtype=np.float64)
    varying = tuple(name for name, spread in zip(names, vectors.std(axis=0), strict=True) if spread > 0)
    columns = [names.index(name) for name in varying]
    detector, volumes = detectors.choose(vectors[:, columns])
    made = Calibration(varying, detector, np.zeros(0), {})
    scores = np.sort(made.score(calibration))
    told = {"n": len(scores), "fit_n": len(fit), "volumes": volumes, **about}
    return Calibration(varying, detector, scores, told, maps)
