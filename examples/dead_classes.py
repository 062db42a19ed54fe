"""Which classes of an output layer can no input ever predict? The pinyin readings of g2pM, or a layer of random rows.

    pip install g2pM && python examples/dead_classes.py

g2pM (Park and Lee, 2020, arXiv 2004.03136; Apache-2.0) turns Chinese characters into pinyin. The layer is read from the
installed package, whose code is not run, or from heads/g2pm.npz in ``SUPY_DATA``; without either, it is one of rows of
very different lengths.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import time
from pathlib import Path

import numpy as np

from supy.argmax import find_unargmaxable, verify


class ArraysOnly(pickle.Unpickler):
    """Reads a pickle of NumPy arrays, numbers and strings; what asks for another function or class is refused."""

    def find_class(self, module, name):
        allowed = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
                   ("numpy.core.multiarray", "_reconstruct"): empty_array}  # fmt: skip
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not an array")
        return allowed[module, name]


def empty_array(kind, shape, dtype):
    """What the pickle of an array begins with; its state follows."""
    if kind is not np.ndarray:
        raise pickle.UnpicklingError("not an array")
    return np.ndarray(shape, dtype)


def g2pm_layer():
    """Weight, bias and labels of g2pM's output layer, or None where there is none."""
    path = Path(os.environ.get("SUPY_DATA") or ".", "heads", "g2pm.npz")
    if path.exists():
        file = np.load(path, allow_pickle=False)
        return file["weight"], file["bias"], file["labels"].tolist()
    package = importlib.util.find_spec("g2pM")  # found, not imported
    if package is None:
        return None
    folder = Path(package.submodule_search_locations[0])
    with open(folder / "np_ckpt.pkl", "rb") as arrays, open(folder / "class2idx.pkl", "rb") as classes:
        state, numbers = ArraysOnly(arrays).load(), ArraysOnly(classes).load()
    return state["logit_layer.2.weight"], state["logit_layer.2.bias"], sorted(numbers, key=numbers.get)


def show(report, labels: list[str]) -> None:
    dead = report.classes("unargmaxable")
    print("  " + " ".join(labels[k] for k in dead[:60]) + (" ..." if len(dead) > 60 else ""))
    if dead:
        proof = report.certificate(dead[0])
        mix = " + ".join(f"{value:.3f} {labels[k]}" for k, value in list(proof.dominators.items())[:4])
        print(f"Proof for {labels[dead[0]]}: whatever the input, its logit is {proof.surplus:.4f} or more below {mix} "
              f"+ ... ({len(proof.dominators)} classes, multipliers of sum one).")  # fmt: skip


def main() -> None:
    layer = g2pm_layer()
    if layer is not None:
        weight, bias, labels = layer
        print("The output layer of g2pM, a published converter from Chinese characters to pinyin:")
    else:
        random = np.random.default_rng(0)
        weight = random.normal(size=(500, 16)) * random.lognormal(sigma=0.5, size=(500, 1))
        bias, labels = None, [str(k) for k in range(500)]
        print("Neither the package g2pM nor heads/g2pm.npz in SUPY_DATA, so here is a layer of rows of varied length:")
    begin = time.perf_counter()
    report = find_unargmaxable(weight, bias)
    seconds = time.perf_counter() - begin
    problems = verify(weight, bias, report)
    dead = report.classes("unargmaxable")
    print(f"{len(dead)} of {len(report)} classes can never be predicted, whatever the input ({seconds:.2f} s):")
    show(report, labels)
    print(f"All {len(report)} certificates checked again in float64: {len(problems)} wrong.")
    if layer is not None:
        behind = find_unargmaxable(weight, bias, nonnegative=True)
        dead = behind.classes("unargmaxable")
        print(f"The layer stands behind a ReLU: for inputs of at least 0 they are {len(dead)}, certificates of which "
              f"{len(verify(weight, bias, behind, nonnegative=True))} are wrong.")  # fmt: skip


if __name__ == "__main__":
    main()
