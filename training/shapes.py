"""Coloured shapes with captions, 32×32: data that needs no download and whose truth is known.

Every picture is a pure function of its index: a scene, such as "two small red circles above a blue square", drawn
with Pillow at four times the size and averaged down, so that edges are smooth. The scene is a value that a caption
can be parsed back into: what a captioned model draws can be held against what was asked.

An anomaly is the same picture with one object drawn as no training picture ever draws it, or with something drawn over
it that is no object. Its mask is exactly the pixels that differ from the normal picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

T = TypeVar("T")
Point = tuple[float, float]
RGB = tuple[int, int, int]

Size = Literal["small", "medium", "large"]
Colour = Literal["red", "orange", "yellow", "green", "blue", "purple"]
Shape = Literal["circle", "square", "triangle", "star", "cross"]
Relation = Literal["above", "below", "left of", "right of"]
Anomaly = Literal["shape", "colour", "texture", "broken", "blob", "scratch"]

SIDE = 32  # pixels
COUNTS = {1: "a", 2: "two", 3: "three"}
SIZES: tuple[Size, ...] = get_args(Size)
COLOURS: tuple[Colour, ...] = get_args(Colour)
SHAPES: tuple[Shape, ...] = get_args(Shape)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
ANOMALIES: tuple[Anomaly, ...] = get_args(Anomaly)

_SCALE = 4  # supersampling
_RADIUS: dict[Size, float] = {"small": 3.0, "medium": 4.4, "large": 6.2}  # pixels, of the circle around the shape
_INK: dict[Colour, RGB] = {
    "red": (214, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (236, 210, 50),
    "green": (50, 160, 70),
    "blue": (45, 90, 210),
    "purple": (135, 60, 175),
}
_UNSEEN_INKS: tuple[RGB, ...] = (
    (20, 20, 20),
    (240, 120, 190),
    (40, 200, 210),
    (120, 75, 40),
)  # black, pink, cyan, brown
_PAPER = (200, 250)  # grey levels of the background, from … to


@dataclass(frozen=True)
class Group:
    """One to three equal objects."""

    count: int
    size: Size
    colour: Colour
    shape: Shape

    def __str__(self) -> str:
        plural = self.shape if self.count == 1 else {"cross": "crosses"}.get(self.shape, f"{self.shape}s")
        article = "an" if self.count == 1 and self.size == "medium" and self.colour == "orange" else COUNTS[self.count]
        size = "" if self.size == "medium" else f"{self.size} "
        return f"{article} {size}{self.colour} {plural}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: a group, and perhaps how it lies to a second one."""

    first: Group
    relation: Relation | None = None
    second: Group | None = None

    def __post_init__(self) -> None:
        if (self.relation is None) != (self.second is None):
            raise ValueError(f"scene: relation {self.relation!r} with second group {self.second!r}; both or neither")

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def caption(self) -> str:
        """Such as "two small red circles above a blue square"."""
        return str(self.first) if self.second is None else f"{self.first} {self.relation} {self.second}"


@dataclass(frozen=True)
class Thing:
    """One object: where it lies (pixels), how far it is turned (radians), and to which group it belongs."""

    group: Group
    x: float
    y: float
    angle: float

    @property
    def radius(self) -> float:
        return _RADIUS[self.group.size]


@dataclass(frozen=True)
class Picture:
    """A drawn scene."""

    scene: Scene
    things: tuple[Thing, ...]
    pixels: NDArray[np.uint8]  # (3, 32, 32)
    mask: NDArray[np.bool_]  # (32, 32): where an anomaly has changed the picture


# --------------------------------------------------------------------------------------------------------------- scenes


def parse(caption: str) -> Scene:
    """The scene that a caption describes: the inverse of `Scene.caption`. Raises `ValueError` where it stumbles."""
    words = caption.split()
    first, rest = _parse_group(words, caption)
    if not rest:
        return Scene(first)
    for relation in RELATIONS:
        parts = relation.split()
        if rest[: len(parts)] == parts:
            second, rest = _parse_group(rest[len(parts) :], caption)
            if rest:
                raise ValueError(f"caption {caption!r}: {' '.join(rest)!r} after the second group")
            return Scene(first, relation, second)
    raise ValueError(f"caption {caption!r}: {rest[0]!r} is none of {', '.join(RELATIONS)}")


_NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
_NOUNS: dict[str, Shape] = {name: shape for shape in SHAPES for name in (shape, f"{shape}s", f"{shape}es")}


def _parse_group(words: list[str], caption: str) -> tuple[Group, list[str]]:
    words = list(words)

    def read(meanings: dict[str, T], what: str) -> T:
        word = words.pop(0) if words else "its end"
        if word not in meanings:
            raise ValueError(f"caption {caption!r}: {word} where a {what} should stand ({', '.join(meanings)})")
        return meanings[word]

    count = read(_NUMBERS, "number")
    sizes: dict[str, Size] = {size: size for size in SIZES}
    size: Size = sizes[words.pop(0)] if words and words[0] in sizes else "medium"
    colours: dict[str, Colour] = {colour: colour for colour in COLOURS}
    return Group(count, size, read(colours, "colour"), read(_NOUNS, "shape")), words


def scene(index: int) -> Scene:
    """The scene of picture `index`."""
    return _scene(_Chance(index))


def _scene(chance: _Chance) -> Scene:
    first = _group(chance)
    if chance.uniform(0, 1) < 0.3:
        return Scene(first)
    second = _group(chance)
    while (second.colour, second.shape) == (first.colour, first.shape):
        second = _group(chance)
    return Scene(first, chance.pick(RELATIONS), second)


def _group(chance: _Chance) -> Group:
    count = chance.pick((1, 1, 2, 3))
    size = chance.pick(SIZES[: 2 if count == 3 else 3])  # three large ones have no room
    return Group(count, size, chance.pick(COLOURS), chance.pick(SHAPES))


def _place(scene: Scene, chance: _Chance) -> tuple[Thing, ...]:
    """Every group has a half of the picture to itself (or all of it), every object an equal cell of that."""
    if scene.second is None:
        across, order = chance.pick((True, False)), [scene.first]
    else:
        across = scene.relation in ("above", "below")
        order = [scene.first, scene.second] if scene.relation in ("above", "left of") else [scene.second, scene.first]
    band = SIDE / len(order)
    things = []
    for k, group in enumerate(order):
        cell, radius = SIDE / group.count, _RADIUS[group.size] + 0.5
        for i in range(group.count):
            along = chance.uniform(i * cell + min(radius, cell / 2), (i + 1) * cell - min(radius, cell / 2))
            over = chance.uniform(k * band + radius, (k + 1) * band - radius)
            x, y = (along, over) if across else (over, along)
            things.append(Thing(group, x, y, chance.uniform(-0.25, 0.25)))
    return tuple(things)


# -------------------------------------------------------------------------------------------------------------- drawing


def draw(index: int, anomaly: Anomaly | None = None) -> Picture:
    """Picture `index`; with `anomaly`, one of its objects is

    shape     a heart or a crescent         colour    black, pink, cyan or brown
    texture   striped                       broken    cut through by a gap in the colour of the background

    or the whole is overlaid with

    blob      a spot, smaller than any object, in a colour that objects have
    scratch   a thin line from one side of the picture towards the other, darker than the background
    """
    chance = _Chance(index)
    scene = _scene(chance)
    things = _place(scene, chance)
    paper = _grey(chance)
    normal = _render(things, paper)
    if anomaly is None:
        return Picture(scene, things, normal, np.zeros((SIDE, SIDE), dtype=np.bool_))
    if anomaly in ("blob", "scratch"):
        pixels = _render(things, paper, overlay=anomaly, chance=chance)
    else:
        odd = chance.pick(range(len(things)))
        pixels = _render(things, paper, odd, anomaly, chance)
    return Picture(scene, things, pixels, (pixels != normal).any(axis=0))


def draw_many(indices: Iterable[int]) -> list[Picture]:
    """The pictures of several indices."""
    return [draw(index) for index in indices]


def _grey(chance: _Chance) -> RGB:
    level = round(chance.uniform(*_PAPER))
    return level, level, level


def _render(
    things: Sequence[Thing],
    paper: RGB,
    odd: int = -1,
    anomaly: Anomaly | None = None,
    chance: _Chance | None = None,
    overlay: Anomaly | None = None,
) -> NDArray[np.uint8]:
    image = Image.new("RGB", (SIDE * _SCALE, SIDE * _SCALE), paper)
    canvas = ImageDraw.Draw(image)
    for k, thing in enumerate(things):
        ink = _INK[thing.group.colour]
        if k != odd or chance is None:
            _fill(canvas, thing, _outline(thing.group.shape), ink)
        elif anomaly == "shape":
            _fill(canvas, thing, chance.pick((_HEART, _CRESCENT)), ink)
        elif anomaly == "colour":
            _fill(canvas, thing, _outline(thing.group.shape), chance.pick(_UNSEEN_INKS))
        else:
            _fill(canvas, thing, _outline(thing.group.shape), ink)
            _cut(image, thing, paper, stripes=3 if anomaly == "texture" else 1)
    if chance is not None and overlay == "blob":
        _spot(canvas, things, chance)
    elif chance is not None and overlay == "scratch":
        _scratch(canvas, chance)
    return np.asarray(image.reduce(_SCALE)).transpose(2, 0, 1).copy()


def _spot(canvas: ImageDraw.ImageDraw, things: Sequence[Thing], chance: _Chance) -> None:
    """Of a colour that shows wherever it lies: one that no object of the picture has."""
    there = {thing.group.colour for thing in things}
    ink = _INK[chance.pick([colour for colour in COLOURS if colour not in there])]
    radius = chance.uniform(1.2, 2.0)  # pixels; the smallest object's is 3
    x, y = (chance.uniform(radius, SIDE - radius) for _ in range(2))
    box = [(x - radius) * _SCALE, (y - radius) * _SCALE, (x + radius) * _SCALE, (y + radius) * _SCALE]
    canvas.ellipse(box, fill=ink)


def _scratch(canvas: ImageDraw.ImageDraw, chance: _Chance) -> None:
    begin, end = chance.uniform(2, SIDE - 2), chance.uniform(2, SIDE - 2)
    length = chance.uniform(0.6, 1.0) * SIDE
    line = [(0.0, begin), (length, begin + (end - begin) * length / SIDE)]
    if chance.pick((True, False)):
        line = [(y, x) for x, y in line]
    level = round(chance.uniform(90, 150))
    canvas.line([(x * _SCALE, y * _SCALE) for x, y in line], fill=(level, level, level), width=_SCALE)


def _fill(canvas: ImageDraw.ImageDraw, thing: Thing, outline: Sequence[Point], ink: RGB) -> None:
    canvas.polygon(_to_canvas(thing, outline), fill=ink)


def _cut(image: Image.Image, thing: Thing, paper: RGB, stripes: int) -> None:
    """Bars of background across the object: several make a texture, a single one breaks it in two."""
    canvas = ImageDraw.Draw(image)
    half = 0.45 / (2 * stripes)
    for k in range(stripes):
        middle = (2 * k + 1 - stripes) / stripes * 0.8
        bar = [(-1.1, middle - half), (1.1, middle - half), (1.1, middle + half), (-1.1, middle + half)]
        canvas.polygon(_to_canvas(thing, bar, turn=0.7), fill=paper)


def _to_canvas(thing: Thing, outline: Sequence[Point], turn: float = 0.0) -> list[Point]:
    c, s = math.cos(thing.angle + turn), math.sin(thing.angle + turn)
    r = thing.radius
    return [((thing.x + r * (c * u - s * v)) * _SCALE, (thing.y + r * (s * u + c * v)) * _SCALE) for u, v in outline]


def _ring(corners: int, start: float = -math.pi / 2, radii: Sequence[float] = (1.0,)) -> tuple[Point, ...]:
    """Corners at equal angles, at radii that take turns. y points down."""
    angles = [start + 2 * math.pi * k / corners for k in range(corners)]
    return tuple(
        (radii[k % len(radii)] * math.cos(a), radii[k % len(radii)] * math.sin(a)) for k, a in enumerate(angles)
    )


def _plus(arm: float) -> tuple[Point, ...]:
    a, b = arm, math.sqrt(1 - arm * arm)
    return ((-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a))


_OUTLINES: dict[Shape, tuple[Point, ...]] = {
    "circle": _ring(48),
    "square": _ring(4, start=math.pi / 4),
    "triangle": _ring(3),
    "star": _ring(10, radii=(1.0, 0.42)),
    "cross": _plus(0.3),
}
_HEART = tuple(
    (
        math.sin(t) ** 3,
        -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
    )
    for t in (2 * math.pi * k / 40 for k in range(40))
)
_CRESCENT = tuple(
    [(math.cos(a), math.sin(a)) for a in np.linspace(0.9, 2 * math.pi - 0.9, 30)]
    + [(0.62 + 0.79 * math.cos(a), 0.79 * math.sin(a)) for a in np.linspace(2 * math.pi - 1.56, 1.56, 30)]
)


def _outline(shape: Shape) -> Sequence[Point]:
    return _OUTLINES[shape]


class _Chance:
    """Random choices that are a function of an index, with every version of NumPy: it promises Philox's raw bits."""

    def __init__(self, index: int) -> None:
        if index < 0:
            raise ValueError(f"index: {index}; pictures are counted from 0")
        self._bits = np.random.Philox(key=index)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._bits.random_raw()) % len(options)]
