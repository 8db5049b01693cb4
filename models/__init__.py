"""Deep generative image models: one family, one file.

A module of this package without a leading underscore *is* a family: the folder is the registry. Each offers two names:

    Config      a frozen dataclass of JSON values: everything that shapes the network and the objective
    Model       Model(config, space), a `Sampler` and `Trainable`, and a `Density` where it has one

so `models.ddpm.Model(models.ddpm.Config(), space)` builds a DDPM. All that the rest of the project knows about a
model is in `models._protocol`.
"""

import importlib
import pkgutil
from types import ModuleType


def family_names() -> list[str]:
    """Names of every family, sorted: the modules of this package without a leading underscore."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def family(name: str) -> ModuleType:
    """The module of one family. Raises `ValueError` that lists the families if there is none of that name."""
    names = family_names()
    if name not in names:
        raise ValueError(f"family: no family {name!r}; there are {', '.join(names)}")
    return importlib.import_module(f"{__name__}.{name}")
