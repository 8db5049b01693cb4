"""The chart of quality against speed: a point for each checkpoint, labelled where there is room."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {"exact": "#0072B2", "bound": "#009E73", "estimate": "#E69F00", "energy only": "#CC79A7", "none": "#555555"}
SIZE, DPI = (9.0, 6.0), 150
GAP = 6.0  # points between a marker and its label
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))  # of a marker that a label may be at


@dataclass(frozen=True)
class Point:
    """A checkpoint on the chart."""

    name: str
    images_per_second: float
    fd_local: float
    kind: str  # of its likelihood: a key of COLOURS
    one_step: bool
    measured_on: str


def quality_and_speed(data: str, points: Sequence[Point], floor: float | None) -> bytes:
    """A PNG. Both axes are logarithmic, and better is up and to the right. floor: FD-local of real images."""
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    for p in points:
        marker = "o" if p.one_step else "^"
        axes.scatter(p.images_per_second, p.fd_local, s=60, marker=marker, color=COLOURS[p.kind], zorder=3)
    axes.set(xscale="log", yscale="log")
    axes.invert_yaxis()
    axes.margins(0.12)
    if floor is not None:
        axes.axhline(floor, color="black", linewidth=1, linestyle="--", zorder=1)
        axes.annotate(
            "real images", (0.01, floor), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
            fontsize=8,
        )  # fmt: skip
    where = ", ".join(sorted({p.measured_on for p in points}))
    axes.set_xlabel(f"images per second at batch 16, default steps ({where}) →")
    axes.set_ylabel("FD-local to real images (lower is better) →")
    axes.set_title(f"Quality and speed on {data}")
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    _legend(figure, points)
    canvas.draw()  # type: ignore[no-untyped-call]
    _label(axes, canvas, points)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})  # the same bytes whatever the version
    return out.getvalue()


def _legend(figure: Figure, points: Sequence[Point]) -> None:
    kinds = [kind for kind in COLOURS if any(p.kind == kind for p in points)]
    handles = [
        Line2D([], [], color=COLOURS[kind], marker="s", linestyle="", label=f"likelihood: {kind}") for kind in kinds
    ]
    for marker, name, one_step in (("o", "one step", True), ("^", "many steps", False)):
        if any(p.one_step == one_step for p in points):
            handles.append(Line2D([], [], color="black", marker=marker, linestyle="", label=name))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def _label(axes: Axes, canvas: FigureCanvasAgg, points: Sequence[Point]) -> None:
    """Names beside their markers, at the first side where they cover no marker and no other name."""
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    at = [axes.transData.transform((p.images_per_second, p.fd_local)) for p in points]
    taken = [Bbox.from_extents(x - 8, y - 8, x + 8, y + 8) for x, y in at]
    frame = axes.get_window_extent(renderer)
    for own, p in enumerate(points):
        others = taken[:own] + taken[own + 1 :]
        for x, y in SIDES:
            text = axes.annotate(
                p.name, (p.images_per_second, p.fd_local), xytext=(GAP * x, GAP * y), textcoords="offset points",
                ha={1: "left", 0: "center", -1: "right"}[x], va={1: "bottom", 0: "center", -1: "top"}[y], fontsize=8,
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            if inside and not any(box.overlaps(other) for other in others):
                break
            if (x, y) != SIDES[-1]:  # the last is kept for want of a better one
                text.remove()
        taken.append(box)
