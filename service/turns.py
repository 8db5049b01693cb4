"""A queue in which tenants take turns: start-time fair queueing (Goyal, Vin and Cheng 1996), by the work that each asks
for. Pure; `service/lua` does the same inside Redis.

A job gets a tag when it comes: where the queue's clock stands, or where its tenant's earlier jobs end, if that is
later. Its tenant's jobs then end at the tag plus its work. The least tag is next, and the clock goes to it. So a tenant
who has asked for much stands far back, one who comes new stands at the front, and what was not asked for is not saved
up.
"""

from __future__ import annotations

import bisect
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace

TENANTS = 1000  # whose turns are remembered, at the least: of more, those who were given the most


@dataclass(frozen=True, order=True)
class Place:
    """Where a job stands. It keeps it when it is taken, for the case that it comes back (`Turns.put_back`)."""

    tag: float
    number: int  # of those that came, for equal tags
    job: str = field(compare=False)
    tenant: str = field(compare=False)


class Turns:
    def __init__(self) -> None:
        self._places: list[Place] = []  # sorted
        self._given: dict[str, float] = {}  # tenant -> where its jobs end; what the clock has passed says nothing
        self._clock = 0.0
        self._count = 0

    def add(self, job: str, tenant: str, work: float) -> Place:
        """At the end of its tenant's jobs."""
        tag = max(self._clock, self._given.get(tenant, 0.0))
        self._given[tenant] = tag + work
        self._count += 1
        place = Place(tag, self._count, job, tenant)
        bisect.insort(self._places, place)
        return place

    def put_back(self, place: Place) -> Place:
        """It had its turn, and comes back to where it stood. If the clock was set back since, since nobody waited, that
        is in front: its tag is one of another time, which the clock may reach in hours."""
        place = replace(place, tag=min(place.tag, self._clock))
        bisect.insort(self._places, place)
        return place

    def remove(self, place: Place) -> None:
        """It waits no longer."""
        del self._places[self.position(place)]
        if not self._places:  # nobody waits, so nobody is owed anything
            self._given, self._clock = {}, 0.0

    def take(self, place: Place) -> None:
        """It has its turn."""
        self._clock = max(self._clock, place.tag)
        if len(self._given) > 2 * TENANTS:
            latest = sorted(((end, tenant) for tenant, end in self._given.items() if end > self._clock), reverse=True)
            self._given = {tenant: end for end, tenant in latest[:TENANTS]}
        self.remove(place)

    def first(self, without: Container[str] = ()) -> Place | None:
        """Of the jobs of other tenants than these."""
        return next((place for place in self._places if place.tenant not in without), None)

    def position(self, place: Place) -> int:
        """How many come before it."""
        return bisect.bisect_left(self._places, place)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Place]:
        return iter(self._places)
