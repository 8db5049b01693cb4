"""A model's networks as ONNX files beside its weights, and running those with ONNX Runtime.

`export` is for the end of training (it needs the packages onnx and onnxscript); `session` is for serving (onnxruntime,
on the CPU or on CUDA). The files are listed with their sha256 in model.json, like all others."""

from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from models import _checkpoint
from models._modes import Arguments, Call, NotApplicable, called, flat, mapped, sized
from models._protocol import Model

_NUMPY = {torch.float32: np.float32, torch.int64: np.int64, torch.int32: np.int32, torch.bool: np.bool_}


FEWEST = 4  # rows of an exported network's batch: with fewer, families choose other branches


def file_of(network: str) -> str:
    return f"{network}.onnx"


@torch.inference_mode()
def export(model: Model) -> dict[str, bytes]:
    """File -> content, of each network that a step of drawing calls, for batches of any size. Raises
    `NotApplicable`."""
    found = called(model)
    networks = model.networks()
    return {file_of(name): _exported(networks[name], example) for name, example in found.items()}


def _exported(network: nn.Module, example: Arguments) -> bytes:
    rows = torch.export.Dim("rows", min=FEWEST, max=4096)
    inputs = mapped(torch.clone, sized(example, 2 * FEWEST))  # a size that no layer has by chance
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's words to itself
        try:
            program = torch.export.export(network, inputs, dynamic_shapes=mapped(lambda _: {0: rows}, inputs))
        except Exception as e:  # torch raises errors of many kinds about code that it cannot follow
            raise NotApplicable(f"it cannot be traced for batches of any size: {str(e).splitlines()[0]}") from e
        path = Path(folder) / "network.onnx"
        torch.onnx.export(program, (), path, external_data=False, dynamo=True, verbose=False)
        return path.read_bytes()


def session(folder: Path, network: str, device: torch.device, threads: int) -> Call:
    """The exported network, run by ONNX Runtime. Raises `NotApplicable` where there is no such file or no runtime."""
    about = _checkpoint.read_about(folder)
    if file_of(network) not in about["files"]:
        raise NotApplicable(f"no {file_of(network)}: python -m training export {folder.name} writes it")
    try:
        import onnxruntime
    except ModuleNotFoundError as e:
        raise NotApplicable("onnxruntime is not installed") from e
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise NotApplicable(f"onnxruntime has no {provider} here")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    content = _checkpoint.read_file(folder, file_of(network))
    run = _Session(onnxruntime.InferenceSession(content, options, providers=[provider]), device)

    def call(*args: Any) -> Any:
        rows = len(flat(args)[0])
        return mapped(lambda out: out[:rows], run(flat(sized(args, max(FEWEST, rows)))))

    return call


class _Session:
    def __init__(self, runtime: Any, device: torch.device) -> None:
        self._runtime, self._device = runtime, device
        self._names = [i.name for i in runtime.get_inputs()]
        self._outputs = [o.name for o in runtime.get_outputs()]

    def __call__(self, args: list[Tensor]) -> Any:
        binding = self._runtime.io_binding()
        kept = [a.contiguous() for a in args]  # their memory is read in `run_with_iobinding`
        for name, x in zip(self._names, kept, strict=True):
            binding.bind_input(name, *self._where(), _NUMPY[x.dtype], list(x.shape), x.data_ptr())
        for name in self._outputs:
            binding.bind_output(name, *self._where())
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # what computes the inputs is not ONNX Runtime's
        self._runtime.run_with_iobinding(binding)
        found = [from_dlpack(out._ortvalue.to_dlpack()).clone() for out in binding.get_outputs()]
        return found[0] if len(found) == 1 else tuple(found)

    def _where(self) -> tuple[str, int]:
        return self._device.type, self._device.index or 0
