"""A checkpoint folder comes back as it was written, or is refused with the file's name and what differs."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import _checkpoint, ebm, vae
from models._checkpoint import ABOUT, WEIGHTS, CheckpointError
from models._protocol import Draw, ImageSpace

CONFIG = vae.Config(latent=2, width=4, blocks=1, hidden=8, components=2, importance_samples=8)
SPACE = ImageSpace(width=8, height=8, channels=1, labels=("zero", "one"))
ABOUT_IT = {"data": {"name": "made up"}, "metrics": {"bits_per_dim": {"value": 3.5}}, "revision": None}


def made(seed: int = 0) -> vae.Model:
    torch.manual_seed(seed)
    model: vae.Model = vae.Model(CONFIG, SPACE).eval()
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _checkpoint.save(tmp_path / "m", made(), CONFIG, ABOUT_IT)
    return tmp_path / "m"


def about(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / ABOUT).read_bytes())
    return found


def edit(folder: Path, **changes: Any) -> None:
    (folder / ABOUT).write_text(json.dumps({**about(folder), **changes}))


def reweigh(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Other weights, listed with their own right hash."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    edit(folder, files={WEIGHTS: hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()})


def samples(model: Any) -> Tensor:
    rows = model.step(model.init([Draw(seed=2**63 + i, sample=i, steps=1, label=i % 3 - 1) for i in range(6)]))
    images: Tensor = model.image(rows)
    return images


# ----------------------------------------------------------------------------------------------------------- round trip


def test_the_same_bytes_and_the_same_samples_come_back(folder: Path, tmp_path: Path) -> None:
    model, again = made(), _checkpoint.load(folder)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(samples(again), samples(model))
    _checkpoint.save(tmp_path / "again", again, CONFIG, ABOUT_IT)
    for name in (ABOUT, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_what_comes_back_is_frozen_and_evaluating(folder: Path) -> None:
    model = _checkpoint.load(folder)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.spec == made().spec


def test_model_json_says_what_the_model_is(folder: Path) -> None:
    found = about(folder)
    assert found["family"] == "vae"
    assert found["spec"] == json.loads(json.dumps(made().spec.to_json()))
    assert found["config"]["latent"] == CONFIG.latent
    assert found["space"]["labels"] == ["zero", "one"]
    assert found["files"] == {WEIGHTS: hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()}
    assert {name: found[name] for name in ABOUT_IT} == ABOUT_IT


def test_tied_weights_and_other_layouts_are_written(tmp_path: Path) -> None:
    model = made()
    model.decoder.dense[0].bias.data = model.encoder.hidden.bias.data  # one memory, two names
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _checkpoint.save(tmp_path, model, CONFIG, {})
    again = _checkpoint.load(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_what_only_training_needs_is_not_written(tmp_path: Path) -> None:
    config = ebm.Config(channels=(8,), blocks=(0,), replay=50)
    model = ebm.Model(config, SPACE)
    model.replay.fill_(7)
    _checkpoint.save(tmp_path, model, config, {})
    assert load_file(tmp_path / WEIGHTS).keys() == model.state_dict().keys() - {"replay"}
    again = _checkpoint.load(tmp_path)
    assert all(
        torch.equal(tensor, again.state_dict()[name]) != (name == "replay")
        for name, tensor in model.state_dict().items()
    )


def test_half_storage_rounds_matrices_alone_and_loads_as_float32(tmp_path: Path) -> None:
    model = made()
    _checkpoint.save(tmp_path / "whole", model, CONFIG, ABOUT_IT)
    _checkpoint.save(tmp_path / "half", model, CONFIG, ABOUT_IT, half=True)
    again = _checkpoint.load(tmp_path / "half")
    shapes = {name: p.dim() for name, p in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        expected = tensor.half().to(tensor.dtype) if shapes.get(name, 0) > 1 else tensor
        assert torch.equal(again.state_dict()[name], expected), name
        assert again.state_dict()[name].dtype == tensor.dtype
    assert (tmp_path / "half" / WEIGHTS).stat().st_size < 0.7 * (tmp_path / "whole" / WEIGHTS).stat().st_size


def test_a_weight_that_half_storage_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = made()
    with torch.no_grad():
        next(p for p in model.parameters() if p.dim() > 1).fill_(1e6)
    with pytest.raises(ValueError, match="65504"):
        _checkpoint.save(tmp_path / "m", model, CONFIG, ABOUT_IT, half=True)


def test_saving_again_forgets_files_made_for_other_weights(folder: Path) -> None:
    _checkpoint.update(folder, {}, {"calibration.safetensors": b"of the first weights"})
    _checkpoint.save(folder, made(seed=1), CONFIG, {})
    assert about(folder)["files"].keys() == {WEIGHTS}
    with pytest.raises(CheckpointError, match=r"model\.json: lists no sha256 of calibration\.safetensors"):
        _checkpoint.read_file(folder, "calibration.safetensors")


# --------------------------------------------------------------------------------------------------------------- update


def test_update_keeps_what_was_there_and_the_hashes_right(folder: Path) -> None:
    before = about(folder)
    _checkpoint.update(folder, {"metrics": {"a": 1}}, {"samples.png": b"picture", "README.md": b"card"})
    _checkpoint.update(folder, {"note": "é"}, {"README.md": b"a better card"})
    after = about(folder)
    assert after["metrics"] == {"a": 1}
    assert after["note"] == "é"
    assert {k: v for k, v in before.items() if k not in ("metrics", "files")}.items() <= after.items()
    assert after["files"].keys() == {WEIGHTS, "samples.png", "README.md"}
    for name, digest in after["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert _checkpoint.read_file(folder, "README.md") == b"a better card"
    _checkpoint.load(folder)


def test_an_update_gives_no_hash_to_a_file_that_it_did_not_write(folder: Path) -> None:
    """Damage done since must stay visible; a log file next to the weights is none of a reader's business."""
    (folder / "train.log").write_text("step 1\n")
    weights = bytearray((folder / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (folder / WEIGHTS).write_bytes(weights)
    _checkpoint.update(folder, {"metrics": {}})
    assert about(folder)["files"].keys() == {WEIGHTS}
    with pytest.raises(CheckpointError, match=WEIGHTS):
        _checkpoint.load(folder)


def test_a_metric_that_is_not_a_number_is_refused(folder: Path) -> None:
    """NaN is no JSON: other readers would refuse the whole file."""
    before = (folder / ABOUT).read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        _checkpoint.update(folder, {"metrics": {"fid": float("nan")}})
    assert (folder / ABOUT).read_bytes() == before


# -------------------------------------------------------------------------------------------------------------- refusal


@given(data=st.data())
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_flipped_bit_anywhere_in_the_weights_is_refused(folder: Path, data: st.DataObject) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    try:
        at = data.draw(st.integers(0, len(whole) - 1))
        flipped = bytearray(whole)
        flipped[at] ^= 1 << data.draw(st.integers(0, 7))
        (folder / WEIGHTS).write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"weights\.safetensors: sha256 is [0-9a-f]{12}…, model\.json says"):
            _checkpoint.load(folder)
    finally:
        (folder / WEIGHTS).write_bytes(whole)


@pytest.mark.parametrize("keep", [0, 7, -1])
def test_a_truncated_file_is_refused(folder: Path, keep: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: sha256"):
        _checkpoint.load(folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickled", struct.pack("<Q", 2**60) + b"{}"])
def test_a_file_that_is_no_safetensors_is_refused_even_with_its_right_hash(folder: Path, content: bytes) -> None:
    _checkpoint.update(folder, {}, {WEIGHTS: content})
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: not a safetensors file"):
        _checkpoint.load(folder)


NAME = "encoder.out.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), rf"missing \['{NAME}'\], unexpected \[\]"),
        (lambda t: t.update(spare=torch.zeros(1)), r"missing \[\], unexpected \['spare'\]"),
        (lambda t: t.update({NAME: torch.zeros(5)}), rf"{NAME} is \(5,\) torch.float32, its config makes it \(4,\)"),
        (lambda t: t.update({NAME: t[NAME].double()}), rf"{NAME} is \(4,\) torch.float64, .* \(4,\) torch.float32"),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    reweigh(folder, change)
    with pytest.raises(CheckpointError, match=rf"weights\.safetensors: {message}"):
        _checkpoint.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2; this version reads format 1"),
        ({"format": None}, "format None"),
        ({"files": {}}, r"lists no sha256 of weights\.safetensors"),
        ({"files": None}, "lists no files"),
        ({"files": {WEIGHTS: None}}, r"lists no sha256 of weights\.safetensors"),
        ({"family": "no-such-family"}, "no family 'no-such-family'; there are .*vae"),
        ({"family": "../gan"}, "no family"),
        ({"family": "_nn"}, "no family"),
        ({"family": None}, "no family"),
        ({"config": {"invented": 1}}, "unexpected keyword argument 'invented'"),
        ({"config": {"latent": 0}}, "latent: 0"),
        ({"config": {"latent": "two"}}, "TypeError"),
        ({"config": None}, "TypeError"),
        ({"space": {"width": 8}}, "TypeError.*height"),
        ({"space": {"width": 7, "height": 8, "channels": 1}}, "7×8"),
    ],
)
def test_a_model_json_that_describes_no_model_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"(?s)model\.json: .*{message}"):
        _checkpoint.load(folder)


@pytest.mark.parametrize("key", ["format", "family", "config", "space", "files"])
def test_a_model_json_without_an_entry_is_refused(folder: Path, key: str) -> None:
    left = {k: v for k, v in about(folder).items() if k != key}
    (folder / ABOUT).write_text(json.dumps(left))
    with pytest.raises(CheckpointError, match=r"model\.json: "):
        _checkpoint.load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'"vae"'])
def test_a_broken_model_json_is_refused(folder: Path, content: bytes) -> None:
    (folder / ABOUT).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.json: (not JSON|a JSON \w+; this version reads)"):
        _checkpoint.load(folder)


@pytest.mark.parametrize("name", [ABOUT, WEIGHTS])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing in m"):
        _checkpoint.load(folder)
    with pytest.raises(CheckpointError, match=r"model\.json: missing in nowhere"):
        _checkpoint.load(folder.with_name("nowhere"))


# -------------------------------------------------------------------------------------------------- interrupted writing


class Stopped(BaseException):
    """The process is stopped: nothing may catch it."""


@pytest.fixture(params=range(6))
def stop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The process stops before the n-th of: flush and rename of the weights, of model.json, of README.md."""
    left = [request.param]

    def stopping(real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any) -> Any:
            if left[0] == 0:
                raise Stopped
            left[0] -= 1
            return real(*args)

        return act

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stopping(os.fsync))
        patch.setattr(Path, "replace", stopping(Path.replace))
        yield left


def test_a_stop_while_writing_leaves_no_half_file_and_no_wrong_checkpoint(folder: Path, stop: list[int]) -> None:
    """Each file is the old or the new one; a folder caught between the two is refused, not served."""
    whole = {name: (folder / name).read_bytes() for name in (ABOUT, WEIGHTS)}
    new, steps = made(seed=1), stop[0]
    with pytest.raises(Stopped):  # noqa: PT012 - it may stop in either
        _checkpoint.save(folder, new, CONFIG, ABOUT_IT)
        _checkpoint.update(folder, {}, {"README.md": b"card"})
    stop[0] = -1  # runs on from here
    assert {path.name for path in folder.iterdir()} <= {ABOUT, WEIGHTS, "README.md"}, "no scratch file is left"
    assert ((folder / WEIGHTS).read_bytes() == whole[WEIGHTS]) == (steps < 2)
    assert ((folder / ABOUT).read_bytes() == whole[ABOUT]) == (steps < 4)
    if 2 <= steps < 4:
        with pytest.raises(CheckpointError, match=WEIGHTS):
            _checkpoint.load(folder)
    else:
        expected = made(seed=0 if steps < 2 else 1).state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in _checkpoint.load(folder).state_dict().items())


# ------------------------------------------------------------------------------------------------------------ no pickle


def test_nothing_of_ours_pickles() -> None:
    """No import of a pickling module, and no call of the functions of torch and numpy that pickle."""
    root = Path(_checkpoint.__file__).parents[1]
    files = [file for part in ("models", "training", "service") for file in sorted((root / part).rglob("*.py"))]
    assert len(files) > 20
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            where = f"{file.relative_to(root)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]}
            else:
                names = set()
            assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, where
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "save"), ("torch", "load")}, where
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), where
                assert node.value.value is False, where
