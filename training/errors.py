"""What training raises.

TrainingError
└── DataError          a data set that is missing, broken or not what its name says
    └── DownloadError  could not be fetched: every mirror failed, or the bytes are not the ones expected
"""

from __future__ import annotations


class TrainingError(Exception):
    """Anything that a command line shows as one sentence, without a traceback."""


class DataError(TrainingError):
    """A data set that is missing, broken or not what its name says. The message says which and why."""


class DownloadError(DataError):
    """A file could not be fetched: every mirror failed, or the bytes are not the ones expected."""
