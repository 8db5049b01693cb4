"""C beside a family's file, compiled once on the machine that runs it, for steps too small for tensor operations.

A step of a thousand tiny products spends its time on calling them. Such a step may stand in C, over the tensors' own
memory (`_pixelcnn.c`, `_transformer.c`), beside the same step in tensor operations, which is what a machine without a C
compiler takes, and what the C is tested against.

The compiler is `cc`, or what CC says, and takes a second; what it made is kept in DRAWWELL_NATIVE_CACHE (by default
~/.cache/drawwell/native) under a hash of source, compiler and processor. DRAWWELL_NATIVE=0 does without.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# Fused multiply-adds round once: -ffp-contract=fast lets every sum be taken that way, whatever the loop around it.
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=gnu11", "-shared", "-fPIC")
COMPILE_SECONDS = 60

log = logging.getLogger(__name__)


@cache
def library(name: str) -> ctypes.CDLL | None:
    """models/_<name>.c, compiled and loaded; None where that cannot be done, after a warning that says why."""
    if os.environ.get("DRAWWELL_NATIVE", "1") == "0":
        return None
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        log.info("%s: no C compiler; tensor operations do instead, more slowly", name)
        return None
    source = Path(__file__).with_name(f"_{name}.c")
    try:
        return ctypes.CDLL(str(_compiled(source, compiler)))
    except (OSError, subprocess.SubprocessError) as e:
        why = e.stderr.decode(errors="replace").strip() if isinstance(e, subprocess.CalledProcessError) else e
        log.warning("%s: cannot be compiled; tensor operations do instead, more slowly: %s", source.name, why)
        return None


def _compiled(source: Path, compiler: Sequence[str]) -> Path:
    """The shared library, made where it is not there yet. Raises `OSError` and `subprocess.SubprocessError`."""
    content = b"\0".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("_*.h"))))
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_SECONDS).stdout
    made_of = (content, version, " ".join((*compiler, *FLAGS)).encode(), _processor().encode())
    digest = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in made_of)).hexdigest()
    folder = Path(os.environ.get("DRAWWELL_NATIVE_CACHE") or Path.home() / ".cache" / "drawwell" / "native")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder}: belongs to another user, whose code would be run")
    target = folder / f"{source.stem}-{digest[:32]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / target.name
            command = [*compiler, *FLAGS, "-o", str(made), str(source), "-lm"]
            subprocess.run(command, capture_output=True, check=True, timeout=COMPILE_SECONDS)
            made.replace(target)  # whole or not at all, though several workers may begin together
    return target


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by machines."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_model_name()}"


def _model_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def usable(*tensors: Tensor) -> bool:
    """Whether C can read these: in the processor's memory, without gaps."""
    return all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)


def addresses(*tensors: Tensor) -> ctypes.Array[ctypes.c_void_p]:
    """Where the tensors' numbers lie."""
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
