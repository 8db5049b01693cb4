"""Events that come with the news of a job: taken in their order, each once, and asked for where one is missing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.broker_redis import BOX, _Box

TOLD = [(number, b"=%d" % number, number == 12) for number in range(1, 13)]


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 4), st.booleans(), st.booleans())))
def test_whatever_is_heard_a_reader_gets_every_event_once_and_in_order(
    publications: list[tuple[int, int, bool, bool]],
) -> None:
    """Publications arrive, late, twice or not at all; now and then the reader looks, and asks Redis where it finds
    nothing."""
    box, after, read = _Box(), 0, []
    for start, count, heard, looks in [*publications, (0, 0, False, True)]:
        if heard:
            box.put(TOLD[start : start + count])
        if looks:
            told = box.take(after) or TOLD[after:]
            read += told
            after += len(told)
    assert read == TOLD[:after]


def test_news_without_events_wake_a_reader_and_have_nothing_for_it() -> None:
    box = _Box()
    box.put([])
    assert box.news.is_set()
    assert box.take(0) == []
    assert not box.news.is_set()


def test_a_slow_reader_costs_no_more_than_a_box() -> None:
    box, payload = _Box(), b"=" * (BOX // 10)
    for number in range(1, 35):
        box.put([(number, payload, False)])
        assert sum(len(stored) for _, stored, _ in box._told) <= BOX
    assert box.take(0) == [], "what was dropped is asked for"
