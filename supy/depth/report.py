"""Studies of depth as a table, plain sentences, JSON and a picture."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from supy._checkpoint import write_atomically
from supy.depth.probe import Study

# What grows with a smaller power of the depth does not grow: a factor of 2 from 6 to 200 layers.
FLAT = math.log(2) / math.log(200 / 6)


def table(study: Study) -> str:
    """A line a depth: the loss, each optimiser's update (of matrices alone) and loss change, and what the layers do."""
    names = list(study.probes[0].steps)
    head = ["layers", "loss"]
    for name in names:
        head += [f"{name} update", "(matrices)", "loss change"]
    head += ["probe first", "last", "output", "|y-x|/|x|", "spread"]
    rows = [head]
    for probe in study.probes:
        row = [str(probe.depth), _short(probe.loss)]
        for step in probe.steps.values():
            row += [_short(step.update), _short(step.update_matrices), _short(step.loss_change)]
        first, last = probe.layers[0], probe.layers[-1]
        numbers = first.probe, last.probe, last.output, _middle(probe, "change"), last.spread
        rows.append(row + [_short(number) for number in numbers])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)
    return f"{study.model}\n" + "\n".join(lines)


def sentences(study: Study) -> list[str]:
    """What the numbers mean, one plain sentence each."""
    first, last = study.probes[0], study.probes[-1]
    lines = []
    bad = [str(probe.depth) for probe in study.probes if not probe.finite()]
    if bad:
        lines.append(f"The loss or a step is NaN or infinite at {', '.join(bad)} layers: nothing can be learned there.")
    for name, step in last.steps.items():
        moves = []
        for which in ("update", "update_matrices"):
            power = study.exponent(name, which)
            growth = f", as layers^{power:.2f}" if math.isfinite(power) else ""
            begin = getattr(first.steps[name], which)
            moves.append(f"{_short(begin)} to {_short(getattr(step, which))}{growth}")
        lines.append(f"{name}, {first.depth} to {last.depth} layers: the output moves by {moves[0]} (of matrices alone "
                     f"{moves[1]}): {_growth(study, name)}.")  # fmt: skip
        lines.append(f"{name}, {last.depth} layers: the loss changes by {_short(step.loss_change)}, and the gradient "
                     f"promised {_short(step.promised)}: {_honesty(step)}.")  # fmt: skip
    top, bottom = last.layers[-1].probe, last.layers[0].probe
    verdict = _verdict(top, bottom, "the layers learn at very different speeds",
                       "gradients neither vanish nor explode on their way down")  # fmt: skip
    lines.append(f"Gradient of a layer's scale at {last.depth} layers: {_short(bottom)} in the first and {_short(top)} "
                 f"in the last: {verdict}.")  # fmt: skip
    inside, outside = last.layers[0].input, last.layers[-1].output
    verdict = _verdict(inside, outside, "the forward pass changes the scale a lot", "the forward pass is stable")
    lines.append(f"Scale at {last.depth} layers: {_short(inside)} before the first, {_short(outside)} behind the last: "
                 f"{verdict}.")  # fmt: skip
    change = _middle(last, "change")
    if not math.isfinite(change):
        verdict = "nothing can be said"
    elif change < 0.3:
        verdict = "layers begin close to the identity"
    else:
        verdict = "layers do not begin close to the identity"
    lines.append(f"The median of {last.depth} layers changes its input by {_short(change)} of its length: {verdict}.")
    spread = last.layers[-1].spread
    if not math.isfinite(spread):
        verdict = "nothing can be said"
    else:
        verdict = "the tokens have become the same" if spread < 0.01 else "the tokens still differ"
    lines.append(f"Behind the last layer {_short(spread)} of the length is not shared by all tokens: {verdict}.")
    return lines


def _growth(study, name):
    whole, matrices = (study.exponent(name, which) for which in ("update", "update_matrices"))
    if not math.isfinite(whole):
        return "that says nothing about growth"
    if whole < -FLAT:
        return "deeper networks change less in the same step"
    if whole <= FLAT:
        return "the step does not depend on the depth"
    if matrices <= FLAT:
        return "of the matrices it does not depend on the depth, and what grows is the part of norms and biases"
    return "deeper networks change more in the same step, and want a smaller rate or a warm-up"


def _honesty(step):
    kept = step.loss_change / step.promised if step.promised else math.nan
    if not math.isfinite(kept):
        return "this is no step to learn from"
    if kept < 0:
        return "the step is far too long, as the loss rises"
    return "the step is as short as it should be" if 0.5 < kept < 2 else "the step is too long"


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON whose numbers that are NaN or infinite are the strings "nan", "inf" and "-inf"."""
    text = json.dumps(_strict(content), ensure_ascii=False, indent=1, allow_nan=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), text.encode() + b"\n")


def to_json(studies: Sequence[Study], settings: dict[str, Any]) -> dict[str, Any]:
    """What :func:`write_json` writes of studies."""
    models = []
    for study in studies:
        powers = {
            name: {which: study.exponent(name, which) for which in ("update", "update_matrices")}
            for name in study.probes[0].steps
        }
        probes = [asdict(probe) for probe in study.probes]
        models.append({"model": study.model, "exponents": powers, "probes": probes, "sentences": sentences(study)})
    return {"settings": settings, "models": models}


def save_picture(path: str | Path, studies: Sequence[Study]) -> None:
    """A PNG: updates and loss changes over the depth, and the layers of the deepest networks. Needs matplotlib."""
    figure = new_figure(15, 12)
    names = list(studies[0].probes[0].steps)
    grid = figure.subplots(3, max(3, len(names)), squeeze=False)
    for axes in grid.flat[: 0 if len(names) >= 3 else 3]:
        axes.set_visible(False)
    colours = [f"C{i % 10}" for i in range(len(studies))]
    for column, name in enumerate(names):
        top, below = grid[0, column], grid[1, column]
        top.set_visible(True)
        top.set(title=f"{name}: update of the output", xlabel="layers", ylabel="root mean square")
        below.set(title=f"{name}: change of the loss", xlabel="layers")
        for study, colour in zip(studies, colours):
            x = [probe.depth for probe in study.probes]
            for which, style in (("update", "-"), ("update_matrices", "--")):
                label = study.model if style == "-" else None
                _line(top, x, [getattr(p.steps[name], which) for p in study.probes], colour, style, label)
            _line(below, x, [-p.steps[name].loss_change for p in study.probes], colour, "-")
        for axes in (top, below):
            axes.set(xscale="log", yscale="log")
        below.set(ylabel="decrease")
    for axes in grid[1, len(names) :]:
        axes.set_visible(False)
    wanted = (("probe", "gradient of a layer's scale"), ("change", "|layer(x) - x| / |x|"),
              ("spread", "part that tokens do not share"))  # fmt: skip
    for axes, (which, title) in zip(grid[2], wanted):
        axes.set(title=f"{title}, deepest network", xlabel="layer / layers", yscale="log")
        for study, colour in zip(studies, colours):
            layers = study.probes[-1].layers
            x = [(i + 1) / len(layers) for i in range(len(layers))]
            _line(axes, x, [getattr(layer, which) for layer in layers], colour, "-", marker="")
    for axes in grid[2, 3:]:
        axes.set_visible(False)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        if not any(len(line.get_xydata()) for line in axes.lines if line.get_linestyle() != "None"):
            axes.set(ylim=(0.1, 1))  # a logarithmic axis without a number has no limits of its own
    grid[0, 0].plot([], [], "k--", label="matrices alone")
    grid[0, 0].plot([], [], "kx", ls="", label="NaN, infinite or a rise")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(studies) + 2)
    write_figure(path, figure)


def new_figure(width: float, height: float):
    """A figure of matplotlib without pyplot, hence without a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("supy.depth: a picture needs matplotlib: pip install supy[picture]") from None
    return Figure(figsize=(width, height), layout="constrained")


def write_figure(path: str | Path, figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), buffer.getvalue())


def _line(axes, x, y, colour, style, label=None, marker="."):
    """A line through what is above 0; a cross at the top for NaN, infinity and what is below 0."""
    good = [(a, b) for a, b in zip(x, y) if math.isfinite(b) and b > 0]
    axes.plot(*(zip(*good) if good else ((), ())), style, color=colour, label=label, marker=marker)
    bad = [a for a, b in zip(x, y) if not (math.isfinite(b) and b >= 0)]
    if bad and marker:
        axes.plot(bad, [0.98] * len(bad), "x", color=colour, transform=axes.get_xaxis_transform())


def _middle(probe, which) -> float:
    values = [getattr(layer, which) for layer in probe.layers]
    return statistics.median(values) if all(map(math.isfinite, values)) else math.nan


def _verdict(a, b, apart, close) -> str:
    if not (math.isfinite(a) and math.isfinite(b)):
        return "nothing can be said"
    return apart if max(a, b) > 10 * min(a, b) else close


def _short(number: float) -> str:
    return f"{number:.3g}"


def _strict(value):
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    return [_strict(part) for part in value] if isinstance(value, (list, tuple)) else value
