"""A calibration: how a score is made of what is said of an image, and the scores of normal images, in one file.

groups       detectors, each over the statistics of one model: what `describe` makes of its score and the image itself
directed     statistics of which more is odder (`DIRECTED`)
subspaces    of each feature vector, what is normal for it (`anomaly.features`)
combination  how all of these make one score (`anomaly.combination`)
maps         where there are heat maps: what they are measured by (`anomaly.heatmaps`)
scores       of the calibration images, sorted: normal images that neither model nor detector has seen

All but the last two are fitted on the fit images. The file is safetensors, each array in the least precision that
holds its numbers exactly: scores, like what maps are measured by, are rounded to single precision wherever they are
computed, so that a score is compared with the others as they are stored. What was made by an older version, whose
scores are other numbers, is refused: format 1 had no combination, format 2 another measure of complexity.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse
from safetensors.numpy import save as format_arrays

from anomaly import combination, conformal, detectors, features
from anomaly.combination import Combination, Tails
from anomaly.complexity import compressed_bits
from anomaly.detectors import Detector, Floats, single
from anomaly.features import DISTANCES, Subspace
from anomaly.heatmaps import Maps

FORMAT = 3
DIRECTED = "excess_bits"  # a log-likelihood ratio, of a compressor to the model: what is odd has more of it
FILE = "calibration.safetensors"  # beside the model whose scores it calibrates
LEVELS = ("distances", "sources", "models")  # of a `Combination`


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


Vector: TypeAlias = NDArray[np.floating]  # (F,)
Described: TypeAlias = Mapping[str, float | Vector]  # of one image: statistics and feature vectors by name


@dataclass(frozen=True)
class Group:
    """A detector, and the statistics that it is over."""

    statistics: tuple[str, ...]
    detector: Detector

    def score(self, described: Sequence[Described]) -> Floats:
        """(m,)"""
        return self.detector.score(_table(described, self.statistics))


@dataclass(frozen=True)
class Calibration:
    groups: tuple[Group, ...]
    directed: tuple[str, ...]
    subspaces: Mapping[str, Subspace]
    combination: Combination
    scores: Floats  # (n,) sorted
    about: Mapping[str, Any]  # data description, weights' sha256, sizes, volumes of the detectors
    maps: Maps | None = None

    @property
    def n(self) -> int:
        return len(self.scores)

    @property
    def statistics(self) -> tuple[str, ...]:
        """All that the score is made of, by name."""
        distances = [f"{name}_{distance}" for name in self.subspaces for distance in DISTANCES]
        return tuple(sorted({name for group in self.groups for name in group.statistics}.union(distances)))

    @property
    def kind(self) -> str:
        """In words."""
        return ", ".join([*(group.detector.kind for group in self.groups), *self.directed, *self.subspaces])

    def distances(self, described: Sequence[Described]) -> list[dict[str, float]]:
        """How unusual each image's feature vectors are, by name: the statistics that only a calibration tells. Of a
        vector that an image has not, none."""
        found: list[dict[str, float]] = [{} for _ in described]
        for name, subspace in self.subspaces.items():
            having = [k for k, one in enumerate(described) if name in one]
            each = subspace.distances(_vectors([described[k] for k in having], name, len(subspace.median)))
            for k, values in zip(having, each.tolist(), strict=True):
                found[k] |= {f"{name}_{distance}": value for distance, value in zip(DISTANCES, values, strict=True)}
        return found

    def score(self, described: Sequence[Described]) -> Floats:
        """(m,) of images described by `describe`. An image of which a statistic cannot be said is as anomalous as can
        be. Raises `CalibrationError` for a statistic that none has: the calibration is of another version of the model.
        """
        if not described:
            return np.zeros(0)
        needed = {name for group in self.groups for name in group.statistics}.union(self.directed, self.subspaces)
        missing = sorted(needed.difference(*described))
        if missing:
            raise CalibrationError(f"statistics: {', '.join(missing)} missing; the calibration is of another version")
        return single(self.combination.score(self._plain(described), self._distances(described)))

    def _plain(self, described: Sequence[Described]) -> Floats:
        """(m, S): scores of the groups, directed statistics."""
        scores = [group.score(described)[:, None] for group in self.groups]
        return np.concatenate([*scores, _table(described, self.directed)], axis=1)

    def _distances(self, described: Sequence[Described]) -> Floats:
        """(m, V, 2)"""
        found = np.empty((len(described), len(self.subspaces), len(DISTANCES)))
        for k, (name, subspace) in enumerate(self.subspaces.items()):
            found[:, k] = subspace.distances(_vectors(described, name, len(subspace.median)))
        return found

    def rank(self, alpha: float, confidence: float | None) -> int:
        """Raises `CalibrationError` where no image could ever be an anomaly: there are too few calibration images."""
        if confidence is None:
            k, needed = conformal.rank(self.n, alpha), conformal.needed(alpha)
        else:
            k = conformal.rank_with_confidence(self.n, alpha, confidence)
            needed = conformal.needed_with_confidence(alpha, confidence)
        if k == 0:
            promise = "" if confidence is None else f" with confidence {confidence}"
            raise CalibrationError(
                f"alpha {alpha}{promise} takes at least {needed:,} calibration images; there are {self.n:,}"
            )
        return k

    def together(self, images: int, rate: float) -> int:
        """The least number of so many images that `judge_together` can name, besides none at all. Raises
        `CalibrationError` where it never names any: there are too few calibration images."""
        least = conformal.fewest(self.n, images, rate)
        if least > images:
            needed = conformal.needed(rate)
            raise CalibrationError(f"fdr {rate} takes at least {needed:,} calibration images; there are {self.n:,}")
        return least

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
        k = round(float(found[named].max()) * (self.n + 1)) if named.any() else 0  # as if that had been asked for
        limit, bound = (conformal.threshold(self.scores, k) if k else None), conformal.upper_bound(self.n, k)
        return [
            Verdict(float(s), float(p), bool(a), rate, limit, bound)
            for s, p, a in zip(scores, found, named, strict=True)
        ]

    def pack(self) -> bytes:
        arrays = {"scores": self.scores}
        for i, group in enumerate(self.groups):
            arrays |= {f"groups.{i}.{name}": values for name, values in group.detector.state.items()}
        for i, subspace in enumerate(self.subspaces.values()):
            arrays |= {f"subspaces.{i}.{name}": values for name, values in vars(subspace).items()}
        for level in LEVELS:
            of_level = getattr(self.combination, level)
            arrays |= {f"{level}.{name}": values for name, values in vars(of_level).items()}
        arrays["owners"] = self.combination.owners
        if self.maps is not None:
            arrays |= {f"maps.{name}": values for name, values in vars(self.maps).items()}
        about = {
            "format": FORMAT,
            "groups": [{"detector": g.detector.kind, "statistics": list(g.statistics)} for g in self.groups],
            "directed": list(self.directed),
            "features": list(self.subspaces),
            **self.about,
        }
        packed: bytes = format_arrays(
            {name: _smallest(values) for name, values in arrays.items()},
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
        arrays = {name: values.astype(np.float64) for name, values in parse(packed).items()}
        found = about.pop("format")
        if found != FORMAT:
            raise CalibrationError(
                f"calibration: format {found!r}; this version reads format {FORMAT}: calibrate again"
            )
        groups = tuple(
            Group(tuple(told["statistics"]), Detector(_known(told["detector"]), _under(f"groups.{i}.", arrays)))
            for i, told in enumerate(about.pop("groups"))
        )
        directed, names = tuple(about.pop("directed")), about.pop("features")
        subspaces = {name: Subspace(**_under(f"subspaces.{i}.", arrays)) for i, name in enumerate(names)}
        levels = {level: Tails(**_under(f"{level}.", arrays)) for level in LEVELS}
        combined = Combination(**levels, owners=arrays["owners"])
        maps = _under("maps.", arrays)
        return Calibration(
            groups, directed, subspaces, combined, arrays["scores"], about, Maps(**maps) if maps else None
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as e:
        raise CalibrationError(f"calibration: not one: {type(e).__name__}: {e}") from e


def _known(kind: str) -> str:
    if kind not in detectors.SCORES:
        raise CalibrationError(f"detector: {kind!r}; there are {', '.join(detectors.SCORES)}")
    return kind


def _under(prefix: str, arrays: Mapping[str, Floats]) -> dict[str, Floats]:
    return {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}


def _smallest(values: Floats) -> NDArray[np.floating]:
    """In the least precision that loses nothing."""
    for precision in (np.float16, np.float32):
        with np.errstate(over="ignore"):
            shorter = values.astype(precision)
        if np.array_equal(shorter.astype(np.float64), values):
            return np.ascontiguousarray(shorter)
    return np.ascontiguousarray(values)


def _table(described: Sequence[Described], names: Sequence[str]) -> Floats:
    """(m, d) of statistics; not a number where one cannot be said."""
    return np.array([[float(one.get(name, math.nan)) for name in names] for one in described], dtype=np.float64)


def _vectors(described: Sequence[Described], name: str, size: int) -> Floats:
    """(m, F) of a feature vector. Raises `CalibrationError` for one of another size."""
    found = np.full((len(described), size), math.nan)
    for k, one in enumerate(described):
        vector = one.get(name)
        if vector is not None:
            if np.shape(vector) != (size,):
                raise CalibrationError(
                    f"features: {name} of shape {np.shape(vector)} where the calibration has ({size},); it is of "
                    "another version"
                )
            found[k] = vector
    return found


def numbers(described: Described) -> dict[str, float]:
    """The statistics among what is said of an image, without its feature vectors."""
    return {name: float(value) for name, value in described.items() if np.ndim(value) == 0}


def describe(
    pixels: NDArray[np.uint8],
    log_prob: float | None,
    energy: float | None,
    statistics: Mapping[str, float],
    complexity: float | None = None,
    features: Mapping[str, Vector] | None = None,
) -> dict[str, float | Vector]:
    """Everything known of an image (C, H, W), by name: the model's statistics and feature vectors, and how the image
    compresses.

    nll_bits          −log₂ of its probability, where the model has one    complexity_bits    as `compressed_bits`
    excess_bits       nll_bits − complexity_bits (Serrà's S)                energy             where the model has one

    complexity: the image's `compressed_bits`, where they are known already.
    """
    found: dict[str, float | Vector] = {name: float(value) for name, value in statistics.items()}
    complexity = compressed_bits(pixels) if complexity is None else complexity
    if log_prob is not None:
        nll_bits = -log_prob / math.log(2)
        found |= {"nll_bits": nll_bits, "excess_bits": nll_bits - complexity}
    if energy is not None:
        found["energy"] = energy
    return {**found, **(features or {}), "complexity_bits": complexity}


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
    fit: Sequence[Described],
    calibration: Sequence[Described],
    about: Mapping[str, Any],
    maps: Maps | None = None,
    members: Sequence[str] = (),
) -> Calibration:
    """From described normal images: fit chooses and fits the detectors and subspaces, calibration gives the scores.
    Disjoint. maps: of the same images, where the models have heat maps. members: of an ensemble, whose names begin
    those of their statistics; each has a detector of its own, which sees those of the image alone too.

    Fit images of which some number cannot be said are left out: there is no spread of what is no number. Among the
    calibration images such a one stands, as odd as can be, since that is how normal images are.

    Raises `CalibrationError` for too few images, and for such as are all the same to the model.
    """
    fit, unsaid = _said(fit)
    names = tuple(sorted(numbers(fit[0]))) if fit else ()
    vectors = sorted(set(fit[0]).difference(names)) if fit else []
    grouped = [_of_member(names, member, members) for member in members] or [names]
    widest = max(map(len, grouped))
    least = needed(widest) // 2
    if len(fit) < least or len(calibration) < 20:
        raise CalibrationError(
            f"calibration: {len(fit)} fit and {len(calibration)} calibration images; "
            f"{widest} statistics take at least {least} and 20{unsaid}"
        )
    groups: list[Group] = []
    volumes: dict[str, float] = {}
    for member, of_member in zip(members or ("",), grouped, strict=True):
        group, found = _fitted(fit, of_member)
        groups.append(group)
        volumes |= {f"{member}.{kind}" if member else kind: volume for kind, volume in found.items()}
    directed = tuple(name for name in names if name == DIRECTED or name.endswith(f".{DIRECTED}"))
    subspaces: dict[str, Subspace] = {}
    distances = np.empty((len(fit), len(vectors), len(DISTANCES)))
    for k, name in enumerate(vectors):
        subspaces[name], distances[:, k] = features.fit(_vectors(fit, name, np.size(fit[0][name])))
    tables = ((group.detector.kind, _table(fit, group.statistics)) for group in groups)
    held_out = np.stack([detectors.held_out(kind, table, features.FOLDS) for kind, table in tables], axis=1)
    owners = [*range(len(groups)), *(_owner(name, members) for name in (*directed, *vectors))]
    plain = np.concatenate([held_out, _table(fit, directed)], axis=1)
    combined = combination.fit(plain, distances, np.array(owners, dtype=np.float64))
    made = Calibration(tuple(groups), directed, subspaces, combined, np.zeros(0), {}, maps)
    scores = np.sort(made.score(calibration))
    told = {"n": len(scores), "fit_n": len(fit), "volumes": volumes, **about}
    return dataclasses.replace(made, scores=scores, about=told)


def _said(fit: Sequence[Described]) -> tuple[list[Described], str]:
    """Those of which every statistic and feature vector that any has is finite; and, for who has too few of them, which
    is not."""
    names = sorted(set[str]().union(*fit))
    lacking = [[name for name in names if not np.isfinite(one.get(name, math.nan)).all()] for one in fit]
    kept = [one for one, lacks in zip(fit, lacking, strict=True) if not lacks]
    whose = sorted({name for lacks in lacking for name in lacks})
    return kept, f"; {len(fit) - len(kept)} more have no finite {', '.join(whose)}" if whose else ""


def _owner(name: str, members: Sequence[str]) -> int:
    """Whose statistic it is, among the members; the first's, where it is no member's."""
    owners = [k for k, member in enumerate(members) if name.startswith(f"{member}.")]
    return max(owners, key=lambda k: len(members[k]), default=0)


def _of_member(names: Sequence[str], member: str, members: Sequence[str]) -> tuple[str, ...]:
    """The member's statistics, and those of the image alone."""
    ours = (name for name in names if any(name.startswith(f"{one}.") for one in members))
    others = {name for name in ours if members[_owner(name, members)] != member}
    return tuple(name for name in names if name not in others)


def _fitted(fit: Sequence[Described], names: Sequence[str]) -> tuple[Group, dict[str, float]]:
    """The detector whose acceptance volume is least, over the statistics that differ at all; and every one's volume."""
    table = _table(fit, names)
    varying = [k for k, spread in enumerate(table.std(axis=0)) if spread > 0]
    if not varying:
        raise CalibrationError(f"calibration: the images do not differ in any of {', '.join(names)}")
    detector, volumes = detectors.choose(table[:, varying])
    return Group(tuple(names[k] for k in varying), detector), volumes
