"""Which models stay in memory: the pure core of a worker's budget. Plain data in, plain data out; no tensors, no
threads, no clock of its own.

A model that is wanted and not there takes the place of others: of idle ones, the least recently used first. Rows that
run are never thrown away, so a model that has jobs is asked to *leave*: it takes no new ones, and goes when it has
ended those that it has. It is asked only after it has stayed for `STAY` times as long as loading it took, so that
models which take turns spend no more than a part of the time in loading.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

STAY = 2.0  # a model that has work stays for this many times as long as loading it took


@dataclass
class _Resident:
    weight: int  # bytes
    used: float  # on the caller's clock
    until: float  # it is not asked to leave its work before
    leaving: bool = False


class Memory:
    """Keeps the books of what is in memory. `budget` is in bytes; None: no bound."""

    def __init__(self, budget: int | None = None) -> None:
        if budget is not None and budget < 1:
            raise ValueError(f"budget: {budget} bytes; at least one, or None for no bound")
        self._budget = budget
        self._residents: dict[str, _Resident] = {}

    @property
    def used(self) -> int:
        """Bytes, of what is leaving as well."""
        return sum(resident.weight for resident in self._residents.values())

    def __contains__(self, name: str) -> bool:
        return name in self._residents

    def fits(self, weight: int) -> bool:
        """Whether so many bytes are no more than the budget, with nothing else there."""
        return self._budget is None or weight <= self._budget

    def has_room(self, weight: int) -> bool:
        """Whether they have room beside what is there."""
        return self._budget is None or self.used + weight <= self._budget

    def keep(self, name: str, weight: int, seconds: float, now: float) -> None:
        """It is in memory; loading it took so many seconds."""
        self._residents[name] = _Resident(weight, now, now + STAY * seconds)

    def touch(self, name: str, now: float) -> None:
        """It is used now. One that is not there is no error."""
        if name in self._residents:
            self._residents[name].used = now

    def leave(self, name: str) -> None:
        """It takes no more work: its bytes will be free by themselves. One that is not there is no error."""
        if name in self._residents:
            self._residents[name].leaving = True

    def held(self, names: Iterable[str]) -> None:
        """These alone are still in memory."""
        there = set(names)
        self._residents = {name: resident for name, resident in self._residents.items() if name in there}

    def make_room(self, weight: int, busy: Set[str], spared: Set[str], now: float) -> tuple[str, ...]:
        """Who is to leave so that so many bytes have room, besides those that are leaving already: idle ones before
        `busy` ones, and `spared` ones last; among these, the least recently used first. None goes in vain: without any
        one of them there would be no room. Empty where there is, or will be, room without it, and where too few may go
        yet.
        """
        if self._budget is None:
            return ()
        staying = {name: resident for name, resident in self._residents.items() if not resident.leaving}
        over = weight + sum(resident.weight for resident in staying.values()) - self._budget
        rank = {name: (name in spared, name in busy, resident.used) for name, resident in staying.items()}
        may = [name for name in sorted(staying, key=rank.__getitem__) if name not in busy or staying[name].until <= now]
        going: list[str] = []
        for name in may:
            if over <= 0:
                break
            going.append(name)
            over -= staying[name].weight
        if over > 0:
            return ()
        for name in reversed(going):  # a large one may have made a small one's leaving needless
            if over + staying[name].weight <= 0:
                going.remove(name)
                over += staying[name].weight
        for name in going:
            self.leave(name)
        return tuple(going)
