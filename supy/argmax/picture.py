"""A picture of the margins: how far each class gets ahead of the others, against the length of its row."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from supy._checkpoint import write_atomically
from supy.argmax.certificates import Report

FORMATS = (".png", ".pdf", ".svg")
_SIDES = {"argmaxable": ("tab:blue", "o"), "tied": ("tab:green", "^")}
_BELOW = {"unargmaxable": ("tab:red", "x"), "undecided": ("tab:gray", "+")}


def check_picture(path: str | Path) -> None:
    """Raises what :func:`draw_margins` would, before the search."""
    if Path(path).suffix not in FORMATS:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
    try:
        import matplotlib.figure  # noqa: F401  asked for before a long search, and used after it
    except ImportError:
        raise ImportError("supy.argmax: the picture needs matplotlib: pip install supy[picture]") from None


def draw_margins(path: str | Path, report: Report) -> None:
    """Draws a point a class into a .png, .pdf or .svg, both axes logarithmic. Needs matplotlib.

    Up: the margin of the witness, relative to the length of (x, 1) and so without the scale of x. Dead classes, which
    have none, are below the line, each at the length |w_k| of its row.
    """
    check_picture(path)
    from matplotlib.figure import Figure  # without pyplot, hence without a display

    lengths = np.array([np.linalg.norm(report.layer.rows(k)) for k in range(len(report))])
    margins = np.full(len(report), np.nan)
    for proof in report.certificates():
        if proof.witness is not None:
            margins[proof.index] = proof.margin / np.hypot(1.0, np.linalg.norm(proof.witness))
    shown = np.isfinite(margins) & (margins > 0)
    floor = margins[shown].min() / 4 if shown.any() else 1.0
    smallest = lengths[lengths > 0].min(initial=np.inf)
    lengths = np.maximum(lengths, smallest if np.isfinite(smallest) else 1.0)  # a row of zeros stands at the left
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="length of the row |w|",
                              ylabel="margin of the witness / |(x, 1)|")  # fmt: skip
    for verdict, (colour, marker) in (_SIDES | _BELOW).items():
        classes = report.classes(verdict)
        if not classes:
            continue
        heights = margins[classes] if verdict in _SIDES else np.full(len(classes), floor)
        axes.plot(lengths[classes], heights, marker, color=colour, markersize=3, label=f"{len(classes)} {verdict}",
                  linestyle="none", rasterized=len(classes) > 2000)  # fmt: skip
    axes.axhline(2 * floor, color="gray", linewidth=0.5)
    figure.legend(loc="outside upper center", ncols=4)
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:], dpi=150)
    write_atomically(Path(path), content.getvalue())
