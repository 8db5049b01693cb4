"""How much a worker claims ahead of its device: pure, plain data in and out.

For each model it claims until it has `AHEAD` times a full batch of rows. And until twice as many, jobs of tenants who
have none here, so that they need not wait for others' to end.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from service.broker import Job

AHEAD = 2


class Window:
    def __init__(self, max_rows: int) -> None:
        self._batch = max_rows
        self._rows: dict[str, Counter[str]] = defaultdict(Counter)  # model -> tenant -> rows of unfinished jobs here

    def add(self, job: Job) -> None:
        self._rows[job.model][job.tenant] += job.rows

    def drop(self, job: Job) -> None:
        """It has ended here, or is for others to do."""
        tenants = self._rows[job.model]
        tenants[job.tenant] -= job.rows
        if tenants[job.tenant] <= 0:
            del tenants[job.tenant]
        if not tenants:
            del self._rows[job.model]

    def room(self, models: Iterable[str]) -> list[str]:
        """For which of these there is room, be it for some tenants alone."""
        return [model for model in models if self._total(model) < 2 * AHEAD * self._batch]

    def enough(self) -> dict[str, list[str]]:
        """Of whom no more is wanted: model -> tenants."""
        return {model: list(of) for model, of in self._rows.items() if self._total(model) >= AHEAD * self._batch}

    def free(self, models: Iterable[str]) -> dict[str, int]:
        """Rows until there is enough of whomever: model -> rows, where there are any."""
        rows = {model: AHEAD * self._batch - self._total(model) for model in models}
        return {model: free for model, free in rows.items() if free > 0}

    def _total(self, model: str) -> int:
        return self._rows[model].total() if model in self._rows else 0
