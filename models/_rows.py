"""cat, take and pad for any Rows: what the engine needs to let rows join and leave a running batch.

A Rows is a tree: a dataclass whose fields are tensors (dim 0 is the row), Rows, or tuples of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from models._protocol import Rows

R = TypeVar("R", bound=Rows)

# Matrix products and convolutions choose other orders of summation for odd numbers of rows. For multiples of this one
# a row's floats seldom depend on how many others there are (measured on x86-64 CPUs with AVX-512, torch 2.13); whether
# they do for a model on a device, the engine finds out when it loads it.
ROW_MULTIPLE = 4


def count(rows: Rows) -> int:
    """Number of rows."""
    return rows.tick.shape[0]


def cat(batches: Sequence[R]) -> R:
    """One batch of all rows, in order. Raises `ValueError` for batches of different types or an empty list."""
    if not batches:
        raise ValueError("batches: none given; cat needs at least one")
    if len({type(b) for b in batches}) > 1:
        raise ValueError(f"batches: rows of different types: {sorted({type(b).__name__ for b in batches})}")
    if len(batches) == 1:
        return batches[0]
    return cast(R, _map(lambda *parts: torch.cat(parts), *batches))


def take(rows: R, index: Sequence[int] | Tensor) -> R:
    """The rows at `index`, in that order; a copy."""
    at = torch.as_tensor(index, dtype=torch.int64, device=rows.tick.device)
    return cast(R, _map(lambda part: part.index_select(0, at), rows))


def pad(rows: R, size: int) -> R:
    """At least `size` rows: copies of the last row fill up, to be cut off again with `take`. Raises `ValueError` where
    there is none."""
    missing = size - count(rows)
    if missing <= 0:
        return rows
    if count(rows) == 0:
        raise ValueError("rows: none, so there is no row to pad with")
    return cast(R, _map(lambda part: torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]), rows))


def filled(index: Tensor, multiple: int = ROW_MULTIPLE) -> Tensor:
    """Indices, the last one repeated until their number is a multiple of so many; none stay none."""
    missing = -len(index) % multiple
    return index if missing == 0 else torch.cat([index, index[-1:].expand(missing)])


def equal(a: Rows, b: Rows) -> bool:
    """Whether every column has the same shape and the same values (NaN equals NaN)."""
    same = True

    def compare(x: Tensor, y: Tensor) -> Tensor:
        nonlocal same
        same = same and x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all())
        return x

    _map(compare, a, b)
    return same


def nbytes(rows: Rows) -> int:
    """Memory that the rows hold, in bytes."""
    total = 0

    def add(part: Tensor) -> Tensor:
        nonlocal total
        total += part.nbytes
        return part

    _map(add, rows)
    return total


def _map(f: Callable[..., Tensor], *trees: Any) -> Any:
    first = trees[0]
    if isinstance(first, Tensor):
        return f(*trees)
    if isinstance(first, tuple):
        return tuple(_map(f, *parts) for parts in zip(*trees, strict=True))
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        return dataclasses.replace(first, **{n: _map(f, *(getattr(tree, n) for tree in trees)) for n in names})
    raise TypeError(
        f"rows: a field of type {type(first).__name__}; only tensors, Rows and tuples of them can be batched"
    )
