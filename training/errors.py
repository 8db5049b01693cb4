"""What training raises.

TrainingError
├── RunError           a run that cannot begin: no such recipe, another run's folder, settings that do not fit
├── Diverged           a run whose loss or gradient is no longer finite
└── DataError          a data set that is missing, broken or not what its name says
    └── DownloadError  could not be fetched: every mirror failed, or the bytes are not the ones expected
"""

from __future__ import annotations


class TrainingError(Exception):
    """Anything that a command line shows as one sentence, without a traceback."""


class RunError(TrainingError):
    """A run cannot begin. The message says what does not fit."""


class Diverged(TrainingError):
    """A loss or a gradient is no longer finite. The last good resume state is kept."""


class DataError(TrainingError):
    """A data set that is missing, broken or not what its name says. The message says which and why."""


class DownloadError(DataError):
    """A file could not be fetched: every mirror failed, or the bytes are not the ones expected."""
