"""The ways in which a model's networks can be run: those of the server (`models._modes`), by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models import _checkpoint, _modes, _onnx
from models._modes import Call, NotApplicable
from models._protocol import Model

__all__ = ["WAYS", "NotApplicable", "prepared"]

LOW, COMPILED, ORDERED, ONNX = "bfloat16", "compile", "channels-last", "onnx"
WAYS = ("float32", f"float32 {ORDERED}", f"float32 {ONNX}", f"float32 {COMPILED}", LOW, f"{LOW} {COMPILED}")


def prepared(folder: Path, way: str, batch: int) -> Model:
    """The checkpoint's model, on the CPU, ready to draw batches of that size so: what is to be compiled, is compiled.
    Raises `NotApplicable` where it cannot."""
    model = _checkpoint.load(folder)
    precision, _, mode = way.partition(" ")
    if way == "float32":
        return model
    calls: dict[str, Call] = {}
    for name, example in _modes.called(model).items():
        network = model.networks()[name]
        call: Call = network
        if mode == ORDERED:
            call = _modes.ChannelsLast(network)
        elif mode == ONNX:
            call = _onnx.session(folder, name, model.device, torch.get_num_threads())
        elif mode == COMPILED:
            call = _modes.compiled(network, [batch])
        if precision == LOW:
            call = _modes.Autocast(call, model.device)
        if mode == COMPILED:
            with torch.inference_mode():
                _modes.warm(call, [batch], example)
        calls[name] = call
    return _modes.twin(model, calls)


def way_of(about: Mapping[str, Any]) -> str:
    """How a server says (`GET /models/{id}`) that it runs a model's networks."""
    execution = about.get("execution") or {"mode": "eager", "precision": "float32"}
    mode = "" if execution["mode"] == "eager" else f" {execution['mode']}"
    return f"{execution['precision']}{mode}"
