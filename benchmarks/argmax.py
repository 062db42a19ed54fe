"""Classes that can never win: supy against linear programs through scipy. ``python benchmarks/argmax.py [CLASSES]``.

On output layers of ``SUPY_DATA`` it times the whole search, and for a sample of the classes that the cheap witnesses
leave, one program with all rows (HiGHS), and one to which violated rows are added until none is left, in the same run.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
from scipy.optimize import linprog

from supy.argmax import find_unargmaxable, verify
from supy.argmax.search import _Problem, read_layer

TIGHT = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


def program(rows: np.ndarray) -> tuple[float, np.ndarray]:
    """max t with rows . u >= t, |u| <= 1: (t, u)."""
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


def main(count: int) -> None:
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

        class Bar:
            update = staticmethod(lambda count: None)

        easy, found, popularity = problem.easy_witnesses(Bar)
        left = np.flatnonzero(~found)
        begin = time.perf_counter()
        problem.decide(left, popularity, {}, 1e-12, Bar)
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


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
