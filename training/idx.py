"""The IDX format of MNIST and its relatives: a magic number, the sizes, then the bytes.

offset  bytes   meaning
0       2       zero
2       1       element type; 0x08 is an unsigned byte, the only one read here
3       1       number of dimensions, d
4       4 d     the sizes, big-endian
4+4d    …       the elements, last index fastest
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.errors import DataError

UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: Path, dims: int) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes with `dims` dimensions, gzipped or not. Raises `DataError`."""
    content = _content(path)
    header = 4 + 4 * dims
    if len(content) < header:
        raise DataError(f"{path}: {len(content)} bytes are too few for an IDX header of {header}")
    zero, kind, found = struct.unpack_from(">HBB", content)
    if zero != 0 or kind != UNSIGNED_BYTE or found != dims:
        magic = content[:4].hex()
        raise DataError(
            f"{path}: magic number 0x{magic}, expected 0x0000{UNSIGNED_BYTE:02x}{dims:02x} ({dims}-d unsigned bytes)"
        )
    shape = struct.unpack_from(f">{dims}I", content, 4)
    expected = header + math.prod(shape)
    if len(content) != expected:
        raise DataError(
            f"{path}: {len(content)} bytes, but its header promises {' × '.join(map(str, shape))}, so {expected}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw.startswith(_GZIP_MAGIC) else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
