"""Classes that can never win: supy against linear programs through scipy. ``python benchmarks/argmax.py``.

On output layers of ``SUPY_DATA`` it times the whole search, and for a sample of the classes that the cheap witnesses
leave, one program with all rows (HiGHS), and one to which violated rows are added until none is left, in the same run.
Without data: ``--first-pass`` times the product with argmax that begins a search; ``--vocabulary`` the search of 50,257 x
768 random rows, or of the layer in ``--file``; ``--gpu`` that of 151,936 x 4096 random rows on a CUDA device.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from supy.argmax import find_unargmaxable, verify
from supy.argmax.files import read_head
from supy.argmax.search import _Exact, _Problem, read_layer
from supy.argmax.witnesses import EasyWitnesses, _Filter

TIGHT = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


def program(rows: np.ndarray) -> tuple[float, np.ndarray]:
    """max t with rows . u >= t, |u| <= 1: (t, u)."""
    from scipy.optimize import linprog

    n = rows.shape[1]
    bounds = [(-1, 1)] * (n - 1) + [(0, 1), (None, 1)]
    solved = linprog(np.r_[np.zeros(n), -1.0], np.column_stack([-rows, np.ones(len(rows))]), np.zeros(len(rows)),
                     bounds=bounds, method="highs-ds", options=TIGHT)  # fmt: skip
    return -solved.fun, solved.x[:n]


def full(rows: np.ndarray, k: int) -> bool:
    return program(np.delete(rows[k] - rows, k, 0))[0] > 1e-8


def lazy(rows: np.ndarray, k: int) -> bool:
    """Starts with the rows that are nearest in direction k and adds the 40 most violated ones each time."""
    differences = np.delete(rows[k] - rows, k, 0)
    used = np.argsort(differences @ rows[k])[:40]
    while True:
        best, u = program(differences[used])
        if best <= 1e-8:
            return False
        gaps = differences @ u
        violated = np.argsort(gaps)[:40]
        violated = violated[gaps[violated] < best - 1e-9]
        if gaps.min() > 0 or len(violated) == 0:
            return True
        used = np.union1d(used, violated)


def random_rows(classes: int, size: int, spread: float = 0.3, device: str = "cpu") -> torch.Tensor:
    """Normal rows whose lengths vary log-normally: the longest of 50,000 is about 12 times as long as the shortest."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(classes, size, generator=generator, device=device)
    return weight.mul_(torch.randn(classes, 1, generator=generator, device=device).mul_(spread).exp_())


def first_pass(classes: int, size: int) -> None:
    """Every class in the direction of its own row: the search's first pass against a product with argmax in blocks."""
    weight = random_rows(classes, size)
    problem = _Problem(read_layer("benchmark", weight, None, None, False, None, None), np.arange(classes))
    begin = time.perf_counter()
    with tqdm(disable=True) as bar:
        search = _Filter(EasyWitnesses(problem), None, bar)
        every = torch.arange(classes)
        search.attempt(every, lambda part: search.weight[part], own=True)
    ours, won = time.perf_counter() - begin, int(search.won.sum())
    begin = time.perf_counter()
    peer_won = 0
    for at in range(0, classes, 1024):
        peer_won += int(((weight[at : at + 1024] @ weight.T).max(1).indices == every[at : at + 1024]).sum())
    peer = time.perf_counter() - begin
    print(f"first pass [{classes}, {size}]: {ours:.2f} s, {won} proven; torch's product with argmax {peer:.2f} s, "
          f"{peer / ours:.1f} times slower, {peer_won} found and not proven", flush=True)  # fmt: skip


def vocabulary(name: str, weight: torch.Tensor) -> None:
    """The whole search of one layer, and the memory that it took beside the layer."""
    find_unargmaxable(weight[:300])  # loads what is loaded once
    if weight.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    taken = torch.cuda.memory_allocated() if weight.is_cuda else 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    report = find_unargmaxable(weight)
    seconds = time.perf_counter() - begin
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    device = f", {(torch.cuda.max_memory_allocated() - taken) / 2**20:.0f} MB on the device" if weight.is_cuda else ""
    print(f"{name} {list(weight.shape)} {str(weight.dtype)[6:]}: {report}, {seconds:.2f} s, {memory:.0f} MB{device}",
          flush=True)  # fmt: skip
    sample = [report.claim(k) for k in range(0, len(report), max(1, len(report) // 20))]
    wrong = verify(weight.cpu(), None, sample)
    print(f"  {len(sample)} certificates checked in float64: {len(wrong) - 1} wrong")  # one says that it is a sample


def gpu() -> None:
    """The whole search of both dtypes, which copies the layer to the CPU and hashes its rows there."""
    for dtype in (torch.bfloat16, torch.float32):
        vocabulary("random rows", random_rows(151_936, 4096, device="cuda").to(dtype))


def layers(count: int) -> None:
    for name in ("g2pm", "ppocrv3_rec", "ppocrv4_rec"):
        file = np.load(Path(os.environ["SUPY_DATA"], "heads", f"{name}.npz"), allow_pickle=False)
        weight, bias = file["weight"], file["bias"]
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            report = find_unargmaxable(weight, bias)
            seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        problems = verify(weight, bias, report)
        checked = time.perf_counter() - begin
        print(f"{name} {list(weight.shape)}: {report}, {min(seconds):.3f} s")
        print(f"  verify: {checked:.2f} s, {len(problems)} wrong")
        problem = _Problem(read_layer("benchmark", weight, bias, None, False, None, None), np.arange(len(weight)))
        easy, exact = EasyWitnesses(problem), _Exact(len(weight))
        with tqdm(disable=True) as bar:
            easy.search(None, lambda row: None, bar)
            exact.popularity = easy.popularity
            left = np.flatnonzero(~easy.found)
            begin = time.perf_counter()
            problem.decide(easy, exact, {}, 1e-12, bar, lambda: None)
            ours = (time.perf_counter() - begin) / len(left)
        print(f"  left by the cheap witnesses: {len(left)}; supy, two threads: {1e3 * ours:.3f} ms a class")
        sample = left[:: max(1, len(left) // count)][:count]
        rows = np.column_stack([weight, bias]).astype(np.float64)
        for label, solve in (("rows added lazily", lazy), ("all rows", full)):
            classes = sample if solve is lazy else sample[: max(1, count // 5)]
            begin = time.perf_counter()
            agree = sum(solve(rows, k) == (report[k] == "argmaxable") for k in classes)
            each = (time.perf_counter() - begin) / len(classes)
            print(f"  scipy, {label}: {1e3 * each:.1f} ms a class, {each / ours:.0f} times;"
                  f" {agree} of {len(classes)} agree")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="classes of a layer for which linear programs are timed")
    parser.add_argument("--first-pass", action="store_true", help="time the first pass alone, on random rows")
    parser.add_argument("--vocabulary", action="store_true", help="time 50,257 x 768 random rows, or --file")
    parser.add_argument("--file", help="with --vocabulary: a file or folder that supy argmax check reads")
    parser.add_argument("--gpu", action="store_true", help="time 151,936 x 4096 random rows on a CUDA device")
    options = parser.parse_args()
    if options.gpu:
        gpu()
    elif options.first_pass:
        for classes, size in ((50_000, 16), (50_000, 32), (50_000, 64), (30_522, 384), (50_257, 768)):
            first_pass(classes, size)
    elif options.vocabulary and options.file:
        vocabulary(options.file, torch.from_numpy(read_head(options.file)[0]))
    elif options.vocabulary:
        vocabulary("random rows", random_rows(50_257, 768))
    else:
        layers(options.count)


if __name__ == "__main__":
    main()
