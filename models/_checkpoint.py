"""A checkpoint folder: what passes between training and serving.

    model.json             Spec, family config, image space, what training tells of itself (data, recipe, revision,
                           metrics), and the sha256 of every other file
    weights.safetensors    every tensor that sampling and scoring need; matrices of weights in 32 or 16 bits
    ...                    calibration.safetensors, samples.png, README.md, as training adds them

No pickle anywhere. A folder whose hashes, shapes or dtypes do not match is refused with a `CheckpointError` that
names the file and what differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as format_tensors

import models
from models._protocol import ImageSpace, Model

FORMAT = 1
ABOUT = "model.json"
WEIGHTS = "weights.safetensors"


class CheckpointError(Exception):
    """A checkpoint folder that cannot be used: the message names the file and what differs."""


def save(folder: Path, model: Model, config: Any, about: Mapping[str, Any], half: bool = False) -> None:
    """Write weights and model.json, replacing them where they are there. Each file appears whole or not at all, and
    model.json last, so that a reader never accepts half a checkpoint. Other files of the folder are no longer listed:
    they were made for other weights.

    config: the family's Config that the model was built from. about: JSON for data, recipe, revision, metrics, ...
    half: store parameters of two and more dimensions in 16 bits, in half the space; `load` makes them float32 again.
    Buffers and vectors stay as they are. Raises `ValueError` for a weight beyond float16's range.
    """
    folder.mkdir(parents=True, exist_ok=True)
    matrices = _matrices(model) if half else {}
    # Clones, because safetensors refuses tensors that share memory (tied weights).
    weights = format_tensors(
        {
            name: _halved(name, t) if name in matrices else t.detach().cpu().contiguous().clone()
            for name, t in _kept(model).items()
        }
    )
    write_file(folder / WEIGHTS, weights)
    described = {
        "format": FORMAT,
        "family": model.spec.family,
        "config": dataclasses.asdict(config),
        "space": dataclasses.asdict(model.spec.image),
        "spec": model.spec.to_json(),
    }
    _write_about(folder, {**described, **about, "files": {WEIGHTS: _sha256(weights)}})


@torch.no_grad()
def round_to_half(model: Model) -> None:
    """Give every weight the value that it will have after `save(half=True)` and `load`, in place. Raises as they do."""
    for name, weight in _matrices(model).items():
        weight.copy_(_halved(name, weight))


@torch.inference_mode(False)  # weights made in inference mode could take no part in a gradient, as of an energy
def load(folder: Path, device: torch.device | str = "cpu") -> Model:
    """The model of a checkpoint folder, on `device`, in eval mode, frozen. Raises `CheckpointError`."""
    about = read_about(folder)
    try:
        tensors = parse_tensors(_read(folder, WEIGHTS, about))
    except SafetensorError as e:
        raise CheckpointError(f"{WEIGHTS}: not a safetensors file: {e}") from e
    try:
        family = models.family(about["family"])
        space = ImageSpace(**_tuples(about["space"]))
        model: Model = family.Model(family.Config(**_tuples(about["config"])), space)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:  # what wrong JSON values can lead to
        raise CheckpointError(f"{ABOUT}: describes no model of this version: {type(e).__name__}: {e}") from e
    _check_tensors(_kept(model), tensors)
    model.load_state_dict(tensors, strict=False)
    return model.to(device).eval().requires_grad_(False)


def read_about(folder: Path) -> dict[str, Any]:
    """model.json, parsed. Raises `CheckpointError`."""
    path = folder / ABOUT
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise CheckpointError(f"{ABOUT}: missing in {folder.name}") from e
    except ValueError as e:
        raise CheckpointError(f"{ABOUT}: not JSON: {e}") from e
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = f"format {about.get('format')!r}" if isinstance(about, dict) else f"a JSON {type(about).__name__}"
        raise CheckpointError(f"{ABOUT}: {found}; this version reads format {FORMAT}")
    if not isinstance(about.get("files"), dict):
        raise CheckpointError(f"{ABOUT}: lists no files")
    return about


def read_file(folder: Path, name: str) -> bytes:
    """One file of the folder, after its hash was checked. Raises `CheckpointError`."""
    return _read(folder, name, read_about(folder))


def update(folder: Path, about: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> None:
    """Add or replace entries of model.json (metrics, ...) and files of the folder. Raises `CheckpointError`."""
    files = files or {}
    before = read_about(folder)
    for name, content in files.items():
        write_file(folder / name, content)
    hashes = {**before["files"], **{name: _sha256(content) for name, content in files.items()}}
    _write_about(folder, {**before, **about, "files": hashes})


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name on an empty file
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _write_about(folder: Path, about: Mapping[str, Any]) -> None:
    text = json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False)
    write_file(folder / ABOUT, (text + "\n").encode())


def _read(folder: Path, name: str, about: Mapping[str, Any]) -> bytes:
    expected = about["files"].get(name)
    if not isinstance(expected, str):
        raise CheckpointError(f"{ABOUT}: lists no sha256 of {name}")
    try:
        content = (folder / name).read_bytes()
    except FileNotFoundError as e:
        raise CheckpointError(f"{name}: missing in {folder.name}") from e
    if _sha256(content) != expected:
        raise CheckpointError(f"{name}: sha256 is {_sha256(content)[:12]}…, {ABOUT} says {expected[:12]}…")
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _kept(model: Model) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a model, by name."""
    without = model.training_only
    return {name: t for name, t in model.state_dict().items() if not {name, name.split(".")[0]} & {*without}}


def _matrices(model: Model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.dim() > 1}


def _halved(name: str, weight: torch.Tensor) -> torch.Tensor:
    half = weight.detach().cpu().contiguous().half()
    if not half.isfinite().all():
        raise ValueError(
            f"{name}: a weight of {float(weight.abs().max()):.4g} does not fit into 16 bits; at most 65504"
        )
    return half


def _check_tensors(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"{WEIGHTS}: missing {missing[:3]}, unexpected {extra[:3]} ({len(missing)} and {len(extra)} in all)"
        )
    for name, tensor in expected.items():
        dtypes = (torch.float32, torch.float16) if tensor.dtype == torch.float32 else (tensor.dtype,)
        if tensor.shape != found[name].shape or found[name].dtype not in dtypes:
            raise CheckpointError(
                f"{WEIGHTS}: {name} is {tuple(found[name].shape)} {found[name].dtype}, "
                f"its config makes it {tuple(tensor.shape)} {tensor.dtype}"
            )


def _tuples(value: Any) -> Any:
    """JSON lists back to the tuples that frozen configs hold."""
    if isinstance(value, list):
        return tuple(_tuples(v) for v in value)
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return value
