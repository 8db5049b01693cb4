"""Recipes: functions that return a Run, one file per data set. `fashion_mnist.ddpm` is the recipe "fashion-mnist-ddpm".

A recipe's docstring says what budget it was given and what it reached.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable

from training.config import Run


def recipes() -> dict[str, Callable[[], Run]]:
    """Every recipe by name: the public functions that the modules of this package define."""
    found: dict[str, Callable[[], Run]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                found[f"{info.name}-{name}".replace("_", "-")] = function
    return found
