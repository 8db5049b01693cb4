"""What a model says of many images, kept on disk: an evaluation that was interrupted goes on where it stopped, and one
that asks for more images computes those alone.

A file holds rows of numbers by name, one for each of the first n images of a set. Before it is relied upon, its first
rows are computed again: where they differ, the model, the set or the code has changed, and it is begun anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from anomaly.calibration import Described, describe
from anomaly.complexity import compressed_bits
from models._checkpoint import write_file
from models._protocol import Density, Model
from training.data import Images
from training.errors import DataError
from training.measure import Report

Floats = NDArray[np.float64]
Rows = Mapping[str, Floats]  # each (n, …), by name

CHUNK = 256  # images between two writes
CHECKED = 4  # rows that are computed again
BATCH = 64
_STATISTIC, _FEATURE = "statistic.", "feature."


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def file(folder: Path, name: str) -> Path:
    """Where what is said of a set is kept."""
    return folder / f"{slug(name)}.safetensors"


def kept(path: Path, x: Images, compute: Callable[[Images], Rows], report: Report) -> dict[str, Floats]:
    """compute(x), but for the rows that the file holds. Raises `DataError` for a broken file."""
    found = _read(path)
    checked = min(CHECKED, len(x), _count(found))
    if checked and not _same(found, compute(x[:checked]), checked):
        found = {}
    done = _count(found)
    while done < len(x):
        report(done, len(x))
        more = compute(x[done : done + CHUNK])
        found = {name: np.concatenate([found[name], rows]) if found else rows for name, rows in more.items()}
        done = _count(found)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, save({name: np.ascontiguousarray(rows) for name, rows in found.items()}))
    report(len(x), len(x))
    return {name: rows[: len(x)].astype(np.float64) for name, rows in found.items()}


def _read(path: Path) -> dict[str, Floats]:
    try:
        return dict(load(path.read_bytes()))
    except FileNotFoundError:
        return {}
    except SafetensorError as e:
        raise DataError(f"{path}: cannot be read: {e}; remove it, and it is made anew") from e


def _count(rows: Rows) -> int:
    return min((len(values) for values in rows.values()), default=0)


def _same(found: Rows, again: Rows, n: int) -> bool:
    """Up to what the size of a batch may do to floats."""
    if found.keys() != again.keys():
        return False
    return all(
        np.allclose(found[name][:n], again[name], rtol=1e-3, atol=1e-3 * (1e-9 + _spread(found[name])), equal_nan=True)
        for name in found
    )


def _spread(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.std()) if finite.size else 0.0


# ------------------------------------------------------------------------------------------------------------ computed


def scores(model: Model, x: Images) -> dict[str, Floats]:
    """log_prob or energy, every statistic under "statistic.<name>", and every feature vector under "feature.<name>", of
    images without labels."""
    assert isinstance(model, Density), "a model whose Spec has a likelihood is a Density"
    parts: list[dict[str, Floats]] = []
    with torch.inference_mode():
        for start in range(0, len(x), BATCH):
            score = model.log_prob(torch.from_numpy(x[start : start + BATCH]).to(model.device).float() / 255)
            numbers = {"log_prob": score.log_prob, "energy": score.energy}
            numbers |= {_STATISTIC + name: value for name, value in score.statistics.items()}
            numbers |= {_FEATURE + name: value for name, value in score.features.items()}
            parts.append({name: v.double().cpu().numpy() for name, v in numbers.items() if v is not None})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def complexities(x: Images) -> dict[str, Floats]:
    """Bits that each image takes compressed, for which no model is needed."""
    return {"complexity": np.array([compressed_bits(image) for image in x])}


def described(x: Images, rows: Rows, complexity: Floats) -> list[Described]:
    """What a detector is given of each image, as `anomaly.calibration.describe` puts it together."""
    names = [name for name in rows if name.startswith(_STATISTIC)]
    vectors = [name for name in rows if name.startswith(_FEATURE)]
    return [
        describe(
            image,
            float(rows["log_prob"][i]) if "log_prob" in rows else None,
            float(rows["energy"][i]) if "energy" in rows else None,
            {name.removeprefix(_STATISTIC): float(rows[name][i]) for name in names},
            float(complexity[i]),
            {name.removeprefix(_FEATURE): rows[name][i] for name in vectors},
        )
        for i, image in enumerate(x)
    ]


def column(images: Sequence[Described], name: str) -> Floats:
    """One number of each described image."""
    return np.array([image[name] for image in images], dtype=np.float64)
