"""The judge of captions: what it is asked follows from the scene, and what it says from the picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from models._protocol import ImageSpace
from training import agreement, data, shapes
from training.agreement import ABSENT, OPTIONS, QUESTIONS, JudgeConfig, describes_scenes, judge
from training.data import SPLITS, Dataset, Split
from training.shapes import Group, Scene

SIZES = {"train": 600, "validation": 1, "fit": 1, "calibration": 1, "test": 200}


@pytest.fixture(scope="module")
def drawn() -> Dataset:
    """Shapes, few of them."""
    pictures = shapes.draw_many(range(sum(SIZES.values())))
    x = np.stack([picture.pixels for picture in pictures])
    captions = tuple(picture.scene.caption for picture in pictures)
    whole, splits, start = Split(x, np.full(len(x), -1), captions), {}, 0
    for name in SPLITS:
        splits[name] = whole.take(np.arange(start, start + SIZES[name]))
        start += SIZES[name]
    return Dataset("shapes", ImageSpace(32, 32, 3, captions=True), splits, "few")


def test_two_ways_to_say_the_same_are_one_answer() -> None:
    for a, b in (
        ("a red star above two blue squares", "two blue squares below a red star"),
        ("three small green crosses left of an orange circle", "an orange circle right of three small green crosses"),
    ):
        assert agreement._answer(shapes.parse(a)) == agreement._answer(shapes.parse(b))
    assert agreement._answer(shapes.parse("a red star")) != agreement._answer(shapes.parse("a red cross"))


def test_answers_name_the_attributes_of_the_groups_in_reading_order() -> None:
    answer = agreement._answer(Scene(Group(2, "small", "red", "star"), "right of", Group(1, "large", "blue", "cross")))
    asked = dict(zip(QUESTIONS[:5], answer[:5], strict=True))
    assert agreement.ARRANGEMENTS[asked["arrangement"]] == "side by side"
    assert shapes.COLOURS[asked["colour"]] == "blue"
    assert shapes.SHAPES[asked["shape"]] == "cross"
    assert shapes.SIZES[asked["size"]] == "large"
    assert all(0 <= k < n for k, n in zip(answer, OPTIONS, strict=True))
    assert agreement._answer(Scene(Group(1, "small", "red", "star")))[5:] == [ABSENT] * 4


def test_the_answers_of_a_mirrored_picture_are_those_of_its_mirrored_caption() -> None:
    pairs = {
        "a red star left of two blue squares": "a red star right of two blue squares",
        "a red star above two blue squares": "a red star above two blue squares",
        "three circles".replace("circles", "red circles"): "three red circles",
    }
    mirrored = agreement._mirrored(agreement._answers(list(pairs)))
    assert torch.equal(mirrored, agreement._answers(list(pairs.values())))


def test_data_is_judged_where_its_captions_are_scenes(drawn: Dataset) -> None:
    assert describes_scenes(drawn)
    other = drawn.splits["test"].take(np.arange(3))
    odd = dataclasses.replace(other, captions=("a red star", "a dog on a beach", "a red cross"))
    assert not describes_scenes(dataclasses.replace(drawn, splits={**drawn.splits, "test": odd}))
    assert not describes_scenes(dataclasses.replace(drawn, space=ImageSpace(32, 32, 3)))
    assert not describes_scenes(dataclasses.replace(drawn, space=ImageSpace(16, 16, 3, captions=True)))
    assert not describes_scenes(data.load("digits"))


@pytest.mark.slow
def test_a_judge_reads_what_is_there_and_is_the_same_from_the_cache(drawn: Dataset, tmp_path: Path) -> None:
    config = JudgeConfig(width=8, hidden=64, epochs=0, batch_size=48)
    reader = judge(drawn, config, tmp_path)
    again = judge(drawn, config, tmp_path)
    assert again.sha256 == reader.sha256
    assert again.accuracy == reader.accuracy
    assert len(list(tmp_path.iterdir())) == 1

    test = drawn.splits["test"]
    found = reader.agreement(test.x, test.captions)
    assert {name: float(right.mean()) for name, right in found.items()} == reader.accuracy
    assert reader.accuracy["colour"] > 0.3, "six colours, in one or two groups"
    assert reader.accuracy["caption"] <= min(reader.accuracy[name] for name in agreement.AGREEMENT)

    shuffled = reader.agreement(test.x, (*test.captions[1:], test.captions[0]))
    assert shuffled["caption"].mean() < 0.05
    assert shuffled["colour"].mean() < 0.5 * reader.accuracy["colour"]
    with pytest.raises(ValueError, match="where a number should stand"):
        reader.agreement(test.x[:1], ["red star"])
