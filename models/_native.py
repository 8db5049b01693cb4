"""C beside a family's file, compiled once on the machine that runs it, for steps too small for tensor operations.

A step of a thousand tiny products spends its time on calling them. Such a step may stand in C, over the tensors' own
memory (`_pixelcnn.c`, `_transformer.c`), beside the same step in tensor operations, which is what a machine without a C
compiler takes, and what the C is tested against.

The compiler is `cc`, or what CC says, and takes a second; what it made is kept in DRAWWELL_NATIVE_CACHE (by default
~/.cache/drawwell/native) under a hash of source, compiler and processor. DRAWWELL_NATIVE=0 does without.

With DRAWWELL_NATIVE_MARCH=x86-64-v3 (any of the compiler's -march) it is made for every processor of that kind, and may
be made ahead, by `python -m models._native`, for machines that have no compiler: container images carry it so.
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
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

# Fused multiply-adds round once: -ffp-contract=fast lets every sum be taken that way, whatever the loop around it.
FLAGS = ("-O3", "-ffp-contract=fast", "-std=gnu11", "-shared", "-fPIC")
# What a kind of processor must have, in the words of /proc/cpuinfo; of other kinds the operator's word is taken.
NEEDS = {"x86-64-v3": frozenset(("abm", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"))}
COMPILE_SECONDS = 60

log = logging.getLogger(__name__)


@cache
def library(name: str) -> ctypes.CDLL | None:
    """models/_<name>.c, compiled and loaded; None where that cannot be done, after a warning that says why."""
    if os.environ.get("DRAWWELL_NATIVE", "1") == "0":
        return None
    lacking = NEEDS.get(_march(), frozenset()) - set(_features().split())
    if lacking:
        kind, lacks = _march(), ", ".join(sorted(lacking))
        log.warning("%s: no %s (it lacks %s); tensor operations do instead, more slowly", name, kind, lacks)
        return None
    source = Path(__file__).with_name(f"_{name}.c")
    try:
        made = _compiled(source)
        if made is None:
            log.info("%s: no C compiler; tensor operations do instead, more slowly", name)
        return None if made is None else ctypes.CDLL(str(made))
    except (OSError, subprocess.SubprocessError) as e:
        why = e.stderr.decode(errors="replace").strip() if isinstance(e, subprocess.CalledProcessError) else e
        log.warning("%s: cannot be compiled; tensor operations do instead, more slowly: %s", source.name, why)
        return None


def main() -> int:
    """Compile all of it ahead, for DRAWWELL_NATIVE_MARCH into DRAWWELL_NATIVE_CACHE."""
    for source in sorted(Path(__file__).parent.glob("_*.c")):
        made = _compiled(source)
        if made is None:
            print("no C compiler: CC names none", file=sys.stderr)
            return 1
        print(made)
    return 0


def _march() -> str:
    return os.environ.get("DRAWWELL_NATIVE_MARCH") or "native"


def _compiled(source: Path) -> Path | None:
    """The shared library, made where it is not there yet; None where there is neither it nor a compiler. Raises
    `OSError` and `subprocess.SubprocessError`.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    has_compiler = bool(compiler) and shutil.which(compiler[0]) is not None
    if _march() == "native" and not has_compiler:
        return None
    flags = (*FLAGS, f"-march={_march()}")
    target = _target(source, compiler, flags)
    if target.exists():
        return target
    if not has_compiler:
        return None
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        command = [*compiler, *flags, "-o", str(made), str(source), "-lm"]
        subprocess.run(command, capture_output=True, check=True, timeout=COMPILE_SECONDS)
        made.replace(target)  # whole or not at all, though several workers may begin together
    return target


def _target(source: Path, compiler: Sequence[str], flags: Sequence[str]) -> Path:
    """Where the shared library lies, by what it is made of. What is made ahead is found without its compiler."""
    made_of = [path.read_bytes() for path in (source, *sorted(source.parent.glob("_*.h")))]
    made_of.append(" ".join(flags).encode())
    if _march() == "native":
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_SECONDS)
        made_of += [" ".join(compiler).encode(), version.stdout, _processor().encode()]
    digest = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in made_of)).hexdigest()
    folder = Path(os.environ.get("DRAWWELL_NATIVE_CACHE") or Path.home() / ".cache" / "drawwell" / "native")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid not in (0, os.getuid()):
        raise PermissionError(f"{folder}: belongs to another user, whose code would be run")
    return folder / f"{source.stem}-{digest[:32]}.so"


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by machines."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_features()}"


def _features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


class Addressed:
    """Knows where a network's weights lie, and keeps them there. A copy of a model has None in its place, and makes its
    own: its weights lie elsewhere."""

    def __init__(self, network: nn.Module) -> None:
        self._weights = [weight.detach() for weight in network.parameters()]
        self._addresses = _at(self._weights)

    def is_of(self, network: nn.Module) -> bool:
        """Whether its weights lie where they lay: they have not been moved to another device, for one."""
        return self._addresses == _at(network.parameters())

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _at(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def usable(*tensors: Tensor) -> bool:
    """Whether C can read these: in the processor's memory, without gaps."""
    return all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)


def addresses(*tensors: Tensor) -> ctypes.Array[ctypes.c_void_p]:
    """Where the tensors' numbers lie."""
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


if __name__ == "__main__":
    sys.exit(main())
