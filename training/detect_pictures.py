"""Pictures of how detectors do: ROC curves, a panel for each set of anomalies; and heat maps beside their images."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from training import anomalies, detect
from training.detect import Scorer, Subject
from training.detection import Floats, roc, separation
from training.pictures import sheet

# Okabe and Ito's colours, which colour-blind readers tell apart; and lines that differ without colour, too.
STYLES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", ":"))
COLUMNS, PANEL, DPI = 4, 2.6, 110  # inches a panel
COLOURS = 48  # of lines, letters and what lies between them and white

SHOWN = 8  # images on a sheet of heat maps
ALPHA = 0.05  # of their masks


def pictures(scorer: Scorer, subject: Subject) -> dict[str, bytes]:
    """PNGs by name: roc, and heatmaps where there are any."""
    found = {"roc": curves(scorer.name, detect.ranked(scorer, subject), detect.NORMAL)}
    masked = {odd.name: odd for odd in subject.odd if odd.masks is not None and odd.name in scorer.surprise}
    if masked:
        found["heatmaps"] = heatmaps(scorer, subject, list(masked.values()))
    return found


def heatmaps(scorer: Scorer, subject: Subject, odd: list[anomalies.Odd]) -> bytes:
    """The first images of the sets in turn, a row each: a normal image and its map; the anomaly, its map, the mask at
    ALPHA, and the truth."""
    maps = scorer.calibration.maps
    assert maps is not None
    normal, rows, labels = detect.heights(scorer, detect.NORMAL), [], []
    k, channels = maps.rank(ALPHA, None), subject.dataset.space.channels

    def grey(levels: np.ndarray) -> np.ndarray:
        return np.repeat(levels[None].astype(np.uint8), channels, axis=0)

    for i in range(min(SHOWN, len(normal))):
        one = odd[i % len(odd)]
        high = detect.heights(scorer, one.name)[i]
        assert one.masks is not None
        mask = maps.mask(high[None], k)[0] if k else np.zeros_like(one.masks[i])
        row = [subject.images[detect.NORMAL][i], grey(maps.picture(normal[i])), one.x[i], grey(maps.picture(high))]
        rows += [*row, grey(255 * mask), grey(255 * one.masks[i])]
        labels.append(one.name)
    return sheet(np.stack(rows), 6, labels)


def curves(title: str, rows: Mapping[str, Mapping[str, Floats]], normal: str) -> bytes:
    """A PNG. rows: by score and by set of images; `normal` is the set that all others are held against."""
    sets = [name for name in next(iter(rows.values())) if name != normal]
    high = -(-len(sets) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * PANEL, high * PANEL + 0.8), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(high, COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, name in zip(panels, sets, strict=False):
        axes.plot([0, 1], [0, 1], color="#cccccc", linewidth=0.8)
        told = []
        for (row, scores), (colour, line) in zip(rows.items(), STYLES, strict=False):
            axes.plot(*roc(scores[normal], scores[name]), color=colour, linestyle=line, linewidth=1.4, label=row)
            told.append(f"{separation(scores[normal], scores[name])['auroc']:.3f}")
        axes.set_title(f"{name}\n{' · '.join(told)}", fontsize=8)
        axes.set_aspect("equal")
        axes.tick_params(labelsize=7)
    for axes in panels[len(sets) :]:
        axes.set_axis_off()
    figure.supxlabel("false alarms among normal images", fontsize=9)
    figure.supylabel("anomalies found", fontsize=9)
    figure.suptitle(f"{title}: ROC curves; above each the AUROC of every score, in the legend's order", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(labels), fontsize=8, frameon=False)
    drawn, out = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    with Image.open(drawn) as picture:  # a palette takes a quarter of the bytes
        picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()
