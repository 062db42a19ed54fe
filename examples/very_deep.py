"""Trains encoders of 12 to 1000 layers with six kinds of residual, all with one learning rate and no warm-up.

    python examples/very_deep.py [--full] [--out DIR]

It learns the intents of short questions: with CLINC150 at hand (SUPY_DATA; see README.md) the first 10 of them, else of
sentences that it generates. Each network is trained in a process of its own and saved as it ends, so that the same
command goes on after a kill; at the end there are a table, a picture and a JSON file. A network is

* trained, and its training ends, once the mean of 20 losses is below half of ln(intents), which is what guessing costs;
* diverged, if a loss is not finite, or if at half of the steps (50 at the least) or at the end the mean of 50 losses is
  not below 0.99 ln(intents);
* slow, if it is neither after all steps.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from supy._checkpoint import write_atomically
from supy._checks import positive
from supy.events import data_folder
from supy.nn import DeepEncoder

CLINC = "https://github.com/clinc/oos-eval"
RESIDUALS = {"deepnorm": "DeepNorm", "post": "Post-LN", "pre": "Pre-LN", "none": "no residual", "rezero": "ReZero",
             "admin": "Admin"}  # fmt: skip
DEPTHS = (12, 50, 100, 200, 500, 1000)
CLASSES, LENGTH = 10, 10  # intents; words of a sentence, the rest is cut off
PADDING, RARE = 0, 1  # numbers of what is no word, and of words that come once
COLOURS = {"trained": "#7fbf7b", "slow": "#fee08b", "diverged": "#f4a582"}


class Options(NamedTuple):
    """What a cell's result depends on, beside its kind and depth."""

    data: str
    width: int
    batch: int
    steps: int
    rate: float
    segment: int | None
    seed: int


class Data(NamedTuple):
    """Numbers of words `[N, LENGTH]` and intents `[N]`, to train on and for the test."""

    words: int
    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true",
                        help="depths to 1000, half an hour (default: to 100, and DeepNorm 1000)")  # fmt: skip
    parser.add_argument("--depths", type=positive, nargs="+", metavar="N", help="these alone")
    parser.add_argument("--residuals", choices=RESIDUALS, nargs="+", default=list(RESIDUALS), help="these alone")
    parser.add_argument("--width", type=positive, default=32, help="a multiple of 16 (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=16, help="sentences a step (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=200, help="at the most (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="Adam's learning rate (default: %(default)s)")
    parser.add_argument("--segment", type=positive, metavar="N",
                        help="keep the inputs of every N layers, compute the rest again (default: all)")  # fmt: skip
    parser.add_argument("--generate", action="store_true", help="generated sentences")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/very_deep"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    if args.width % 16:
        parser.error(f"--width is {args.width}, expected a multiple of 16")
    if not 0 < args.rate < math.inf:
        parser.error(f"--rate is {args.rate}, expected a number above 0")
    folder = None if args.generate else data_folder()
    source = "generated" if folder is None else str(folder / "classification" / "clinc150" / "data_full.json")
    try:
        data = load(source)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}; get {CLINC}, or try --generate\n")
    options = Options("generated" if folder is None else "clinc150", args.width, args.batch, args.steps, args.rate,
                      args.segment, args.seed)  # fmt: skip
    depths = args.depths or (DEPTHS if args.full else DEPTHS[:3])
    cells = [(layers, kind) for layers in depths for kind in args.residuals]
    if not args.full and not args.depths and "deepnorm" in args.residuals:
        cells.append((1000, "deepnorm"))
    print(f"{len(data.train[0])} sentences to train on, {len(data.test[0])} for the test; {data.words} words, "
          f"{CLASSES} intents, so guessing has a loss of {math.log(CLASSES):.2f}")  # fmt: skip
    try:
        results = run(cells, source, options, args.out)
        write_atomically(args.out / "very_deep.json", to_json(options, results))
        print(f"\n{table(results)}")
        write_atomically(args.out / "very_deep.png", picture(results))
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    except ImportError:
        print("\nno picture without matplotlib: pip install supy[picture]")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; the same command goes on\n")


def load(source: str) -> Data:
    """CLINC150's file of this name, or generated sentences."""
    parts = read(Path(source)) if source != "generated" else {"train": generate(1000), "test": generate(300, seed=1)}
    counts = Counter(word for words, _ in parts["train"] for word in words)
    numbers = {word: i for i, word in enumerate((w for w, n in counts.items() if n > 1), 2)}

    def encode(rows):
        ids = torch.full((len(rows), LENGTH), PADDING)
        for row, (words, _) in zip(ids, rows):
            row[: len(words)] = torch.tensor([numbers.get(word, RARE) for word in words])
        return ids, torch.tensor([label for _, label in rows])

    return Data(len(numbers) + 2, encode(parts["train"]), encode(parts["test"]))


def read(path: Path) -> dict[str, list[tuple[list[str], int]]]:
    """Words and labels of CLINC150's parts "train" and "test", of the CLASSES intents that come first."""
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
        rows = {name: [(str(text), str(intent)) for text, intent in parts[name]] for name in ("train", "test")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{path}: expected {{"train": [[text, intent], ...], "test": ...}}, got {error!r}') from None
    first = list(dict.fromkeys(intent for _, intent in rows["train"]))[:CLASSES]
    intents = {intent: i for i, intent in enumerate(first)}
    if len(intents) < CLASSES:
        raise ValueError(f"{path}: expected at least {CLASSES} intents, got {len(intents)}")
    return {
        name: [(text.lower().split()[:LENGTH], intents[intent]) for text, intent in some if intent in intents]
        for name, some in rows.items()
    }


# Generated questions: an intent is an action and a thing.
ACTIONS = ["book|reserve|get me", "cancel|call off|drop", "find|look for|show me", "change|move|shift", "rate|review"]
THINGS = ["flight|plane|airline ticket", "table|restaurant|place to eat"]
FORMS = ["{a} a {t} {w}", "please {a} my {t}", "can you {a} the {t} {w}", "i want to {a} a {t}", "{a} the {t} {w}"]
WHEN = ["today", "tomorrow", "on friday", "next week", "in june", "tonight", "at noon", "as soon as possible"]


def generate(count: int, seed: int = 0) -> list[tuple[list[str], int]]:
    """Words and labels. A seed always gives the same."""
    random, rows = Random(seed), []

    def pick(some):
        return some[int(random.random() * len(some))]  # random() alone is promised to stay the same

    for i in range(count):
        action, thing = divmod(i % CLASSES, len(THINGS))
        words = {"a": pick(ACTIONS[action].split("|")), "t": pick(THINGS[thing].split("|")), "w": pick(WHEN)}
        rows.append((pick(FORMS).format(**words).split()[:LENGTH], i % CLASSES))
    return rows


class Classifier(nn.Module):
    """Embeddings of words and places, normalised; the encoder; the mean over a sentence; scores of the intents."""

    def __init__(self, words: int, kind: str, layers: int, width: int, segment: int | None):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(LENGTH, width)
        self.norm = nn.LayerNorm(width)
        # Norms without weights: a step of Adam would change all at once, by factors of 1.001, 2000 times over.
        self.encoder = DeepEncoder(layers, width, heads=width // 16, residual=kind, segment=segment, affine=False)
        self.scores = nn.Linear(width, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.scores(self.encoder(self.embed(ids)).mean(1))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.words(ids) + self.places.weight)


def verdict(losses: list[float], steps: int) -> str | None:
    """See above; None: the training goes on."""
    guessing, late = math.log(CLASSES), len(losses) >= steps
    if losses and not math.isfinite(losses[-1]):
        return "diverged"
    if len(losses) >= 20 and sum(losses[-20:]) / 20 < guessing / 2:
        return "trained"
    if late or len(losses) == max(50, steps // 2):
        last = losses[-50:]
        if sum(last) >= 0.99 * guessing * len(last):
            return "diverged"
    return "slow" if late else None


def train(kind: str, layers: int, data: Data, options: Options, title: str) -> dict:
    """One cell: its result, as it is saved."""
    torch.set_num_threads(1)  # more do not help tensors as small as these
    torch.manual_seed(options.seed)
    network = Classifier(data.words, kind, layers, options.width, options.segment)
    ids, labels = data.train
    if kind == "admin":
        network.encoder.profile_(network.embed(ids[:64]))
    optimizer = torch.optim.Adam(network.parameters(), lr=options.rate, fused=True)
    random, order = Random(options.seed), []
    losses, seconds = [], []
    with tqdm(total=options.steps, desc=title, unit="step", leave=False) as bar:
        while (found := verdict(losses, options.steps)) is None:
            while len(order) < options.batch:
                order += random.sample(range(len(ids)), len(ids))
            rows, order = order[: options.batch], order[options.batch :]
            start = time.thread_time()
            loss = F.cross_entropy(network(ids[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            seconds.append(time.thread_time() - start)
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    with torch.no_grad():
        right = [(network(i).argmax(1) == y).sum().item() for i, y in zip(*(part.split(50) for part in data.test))]
    return {
        "residual": kind,
        "layers": layers,
        "verdict": found,
        "accuracy": sum(right) / len(data.test[1]),
        "losses": [round(loss, 4) if math.isfinite(loss) else None for loss in losses],
        "step_seconds": min(seconds),
        "peak_bytes": peak(),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }


def peak() -> int | None:
    """Most bytes that this process had in memory, where the system tells."""
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024 if status.exists() else None


def cell(kind: str, layers: int, source: str, options: Options, title: str, path: Path) -> None:
    """Trains one network in this process, which ends if its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    result = train(kind, layers, load(source), options, title)
    write_atomically(path, json.dumps({"options": options._asdict(), **result}).encode())


def run(cells: list[tuple[int, str]], source: str, options: Options, out: Path) -> list[dict]:
    """Results of all cells; those that ``out`` holds already are not trained again."""
    out.mkdir(parents=True, exist_ok=True)
    results, start = [], multiprocessing.get_context("spawn")
    for i, (layers, kind) in enumerate(cells, 1):
        path, name = out / f"{kind}-{layers}.json", f"{RESIDUALS[kind]}, {layers} layers"
        if not path.exists():
            title = f"[{i}/{len(cells)}] {name}"
            process = start.Process(target=cell, args=(kind, layers, source, options, title, path))
            process.start()
            try:
                process.join()
            finally:
                process.kill()
            if process.exitcode != 0:
                raise ValueError(f"{name}: its process ended with {process.exitcode}, perhaps for want of memory")
        result = saved(path, options)
        print(f"{name}: {result['verdict']} after {len(result['losses'])} steps", flush=True)
        results.append(result)
    return results


def saved(path: Path, options: Options) -> dict:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        same, _ = result.pop("options") == options._asdict(), len(result["losses"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); remove it") from None
    if not same:
        raise ValueError(f"{path} is of a run with other options; give another --out, or remove it")
    return result


def last_loss(result: dict) -> float:
    """The mean of the last 20 losses."""
    losses = [math.nan if loss is None else loss for loss in result["losses"][-20:]]
    return sum(losses) / len(losses)


def by_depth(results: list[dict]) -> tuple[list[int], list[str], dict]:
    """The depths, the kinds in their order, and the result of (kind, depth)."""
    found = {(result["residual"], result["layers"]): result for result in results}
    kinds = [kind for kind in RESIDUALS if any(kind == other for other, _ in found)]
    return sorted({layers for _, layers in found}), kinds, found


def table(results: list[dict]) -> str:
    """Markdown: a row a depth. Verdict, its step and the last losses; then time and memory."""
    depths, kinds, found = by_depth(results)
    lines = ["| layers | " + " | ".join(RESIDUALS[kind] for kind in kinds) + " | a step | peak |"]
    lines.append("|" + "---|" * (len(kinds) + 3))
    for depth in depths:
        row = [found.get((kind, depth)) for kind in kinds]
        texts = [f"{r['verdict']} {len(r['losses'])}: {last_loss(r):.2f}" if r else "" for r in row]
        times = [1e3 * r["step_seconds"] for r in row if r]
        peaks = [r["peak_bytes"] / 1e6 for r in row if r and r["peak_bytes"]]
        sizes = f"{min(times):.0f} to {max(times):.0f} ms | " + (f"{max(peaks):.0f} MB" if peaks else "?")
        lines.append(f"| {depth} | {' | '.join(texts)} | {sizes} |")
    return "\n".join(lines)


def picture(results: list[dict]) -> bytes:
    """A PNG: the verdicts, and the losses of the deepest networks."""
    from matplotlib.figure import Figure  # without pyplot, hence without a display

    depths, kinds, found = by_depth(results)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    grid, curves = figure.subplots(1, 2, width_ratios=[1.3, 1])
    grid.set(xlim=(0, len(depths)), ylim=(len(kinds), 0), xlabel="layers", title="one learning rate, no warm-up")
    grid.set_xticks([x + 0.5 for x in range(len(depths))], depths)
    grid.set_yticks([y + 0.5 for y in range(len(kinds))], [RESIDUALS[kind] for kind in kinds])
    for x, depth in enumerate(depths):
        for y, kind in enumerate(kinds):
            if result := found.get((kind, depth)):
                grid.fill_between([x, x + 1], y, y + 1, color=COLOURS[result["verdict"]], edgecolor="white")
                text = f"{result['verdict']}\n{len(result['losses'])} steps\nloss {last_loss(result):.2f}"
                grid.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7)
    curves.set(xlabel="step", ylabel="training loss, mean of 10", title=f"{depths[-1]} layers")
    for kind in kinds:
        if result := found.get((kind, depths[-1])):
            losses = [math.nan if loss is None else loss for loss in result["losses"]]
            means = [sum(losses[i : i + 10]) / 10 for i in range(0, len(losses) - 9, 10)]
            curves.plot(range(10, 10 * len(means) + 1, 10), means, label=RESIDUALS[kind])
    curves.axhline(math.log(CLASSES), color="grey", linestyle=":", label="guessing")
    curves.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def to_json(options: Options, results: list[dict]) -> bytes:
    rows = ",\n".join(json.dumps(result) for result in results)  # a line a cell
    return f'{{"options": {json.dumps(options._asdict())},\n"cells": [\n{rows}\n]}}\n'.encode()


if __name__ == "__main__":
    sys.exit(main())
