"""Drawn shapes: a picture shows exactly what its caption says, and an anomaly's mask is exactly what was changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from training import shapes
from training.shapes import ANOMALIES, COLOURS, RELATIONS, SHAPES, SIZES, Group, Scene

INDEX = st.integers(0, 2**40)
GROUP = st.builds(Group, st.integers(1, 3), st.sampled_from(SIZES), st.sampled_from(COLOURS), st.sampled_from(SHAPES))
SCENE = st.one_of(st.builds(Scene, GROUP), st.builds(Scene, GROUP, st.sampled_from(RELATIONS), GROUP))


@given(SCENE)
def test_a_caption_is_parsed_back_into_its_scene(scene: Scene) -> None:
    assert shapes.parse(scene.caption) == scene


def test_captions_read_like_english() -> None:
    scene = Scene(Group(2, "small", "red", "circle"), "above", Group(1, "medium", "blue", "square"))
    assert scene.caption == "two small red circles above a blue square"
    assert Scene(Group(1, "medium", "orange", "star")).caption == "an orange star"
    assert Scene(Group(3, "large", "green", "cross")).caption == "three large green crosses"


@pytest.mark.parametrize(
    ("caption", "culprit"),
    [
        ("", "its end"),
        ("four red circles", "four"),
        ("two circles", "circles"),
        ("two red", "its end"),
        ("a red circle beside a blue square", "beside"),
        ("a red circle above", "its end"),
        ("a red circle left a blue square", "left"),
        ("a red circle above a blue square below a star", "below a star"),
    ],
)
def test_a_caption_of_nothing_drawable_is_refused_at_the_word(caption: str, culprit: str) -> None:
    with pytest.raises(ValueError, match=culprit):
        shapes.parse(caption)


def test_half_a_relation_is_refused() -> None:
    with pytest.raises(ValueError, match="both or neither"):
        Scene(Group(1, "small", "red", "star"), "above")


@given(INDEX)
def test_a_picture_is_a_function_of_its_index(index: int) -> None:
    a, b = shapes.draw(index), shapes.draw(index)
    assert a.scene == b.scene == shapes.scene(index)
    assert a.things == b.things
    assert np.array_equal(a.pixels, b.pixels)
    assert not a.mask.any()


def test_pictures_differ() -> None:
    assert len({shapes.draw(index).pixels.tobytes() for index in range(500)}) == 500


@given(INDEX)
def test_objects_lie_inside_apart_and_as_the_relation_says(index: int) -> None:
    picture = shapes.draw(index)
    for k, a in enumerate(picture.things):
        assert a.radius <= a.x <= shapes.SIDE - a.radius
        assert a.radius <= a.y <= shapes.SIDE - a.radius
        for b in picture.things[k + 1 :]:
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > 0.85 * (a.radius + b.radius)
    scene = picture.scene
    if scene.second is None:
        assert [thing.group for thing in picture.things] == [scene.first] * scene.first.count
        return
    first, second = ([t for t in picture.things if t.group == group] for group in scene.groups)
    assert (len(first), len(second)) == (scene.first.count, scene.second.count)
    pairs = [(a, b) for a in first for b in second]
    holds = {
        "above": all(a.y + a.radius <= b.y - b.radius for a, b in pairs),
        "below": all(a.y - a.radius >= b.y + b.radius for a, b in pairs),
        "left of": all(a.x + a.radius <= b.x - b.radius for a, b in pairs),
        "right of": all(a.x - a.radius >= b.x + b.radius for a, b in pairs),
    }
    opposite = dict(zip(RELATIONS, ("below", "above", "right of", "left of"), strict=True))
    assert scene.relation is not None
    assert holds[scene.relation]
    assert not holds[opposite[scene.relation]]


@given(INDEX)
def test_the_pixel_at_an_object_has_its_colour(index: int) -> None:
    picture = shapes.draw(index)
    for thing in picture.things:
        pixel = picture.pixels[:, int(thing.y), int(thing.x)].astype(int)
        inks = {colour: np.abs(pixel - np.array(ink)).sum() for colour, ink in shapes._INK.items()}
        assert min(inks, key=inks.__getitem__) == thing.group.colour


@given(INDEX, st.sampled_from(ANOMALIES))
def test_an_anomaly_changes_its_mask_alone(index: int, anomaly: Any) -> None:
    normal, odd = shapes.draw(index), shapes.draw(index, anomaly)
    assert odd.scene == normal.scene
    assert np.array_equal(odd.mask, (odd.pixels != normal.pixels).any(axis=0))
    assert np.array_equal(odd.pixels[:, ~odd.mask], normal.pixels[:, ~odd.mask])
    assert 4 <= odd.mask.sum() < odd.mask.size / 2
    assert np.array_equal(shapes.draw(index, anomaly).pixels, odd.pixels), "a function of the index"


@given(INDEX, st.sampled_from(("shape", "colour", "texture", "broken")))
def test_an_anomaly_of_an_object_changes_one_object_alone(index: int, anomaly: Any) -> None:
    normal, odd = shapes.draw(index), shapes.draw(index, anomaly)
    ys, xs = np.nonzero(odd.mask)
    touched = [
        all(np.hypot(xs + 0.5 - thing.x, ys + 0.5 - thing.y) <= thing.radius * 1.1 + 1.5) for thing in normal.things
    ]
    assert any(touched)


@given(INDEX)
def test_a_blob_is_smaller_than_any_object_and_a_scratch_crosses_half_the_picture(index: int) -> None:
    spread = {}
    for anomaly in ("blob", "scratch"):
        ys, xs = np.nonzero(shapes.draw(index, anomaly).mask)  # type: ignore[arg-type]
        spread[anomaly] = max(np.ptp(xs), np.ptp(ys)) + 1
    assert spread["blob"] <= 6
    assert spread["scratch"] >= shapes.SIDE / 2


@given(INDEX)
def test_an_unseen_colour_is_far_from_every_seen_one(index: int) -> None:
    odd = shapes.draw(index, "colour")
    thing = next((t for t in odd.things if odd.mask[int(t.y), int(t.x)]), None)
    assume(thing is not None)
    assert thing is not None
    pixel = odd.pixels[:, int(thing.y), int(thing.x)].astype(int)
    assert min(np.abs(pixel - np.array(ink)).max() for ink in shapes._INK.values()) > 40


def test_every_word_is_drawn() -> None:
    groups = [group for index in range(300) for group in shapes.scene(index).groups]
    assert {g.count for g in groups} == {1, 2, 3}
    assert {g.size for g in groups} == set(SIZES)
    assert {g.colour for g in groups} == set(COLOURS)
    assert {g.shape for g in groups} == set(SHAPES)
    assert {shapes.scene(index).relation for index in range(300)} == {None, *RELATIONS}


def test_a_negative_index_is_refused() -> None:
    with pytest.raises(ValueError, match="index: -1"):
        shapes.draw(-1)
