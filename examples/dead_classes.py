"""Which classes of an output layer can no input ever predict? The pinyin readings of g2pM, or a layer of random rows.

    SUPY_DATA=... python examples/dead_classes.py

With ``SUPY_DATA`` it reads heads/g2pm.npz, the output layer of the package g2pM (Park and Lee, 2020, Apache-2.0), which
turns Chinese characters into pinyin; otherwise it makes a layer whose rows have very different lengths.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from supy.argmax import find_unargmaxable, verify


def main() -> None:
    path = Path(os.environ.get("SUPY_DATA") or ".", "heads", "g2pm.npz")
    if path.exists():
        file = np.load(path, allow_pickle=False)
        weight, bias, labels = file["weight"], file["bias"], file["labels"].tolist()
        print("The output layer of g2pM, a published converter from Chinese characters to pinyin:")
    else:
        random = np.random.default_rng(0)
        weight = random.normal(size=(500, 16)) * random.lognormal(sigma=0.5, size=(500, 1))
        bias, labels = None, [str(k) for k in range(500)]
        print("No heads/g2pm.npz in SUPY_DATA, so here is a layer of random rows of varied length:")
    begin = time.perf_counter()
    report = find_unargmaxable(weight, bias)
    seconds = time.perf_counter() - begin
    problems = verify(weight, bias, report)
    dead = report.classes("unargmaxable")
    print(f"{len(dead)} of {len(report)} classes can never be predicted, whatever the input ({seconds:.2f} s):")
    print("  " + " ".join(labels[k] for k in dead[:60]) + (" ..." if len(dead) > 60 else ""))
    if dead:
        proof = report.certificate(dead[0])
        mix = " + ".join(f"{value:.3f} {labels[k]}" for k, value in list(proof.dominators.items())[:4])
        print(f"Proof for {labels[dead[0]]}: its logit is below {mix} + ... ({len(proof.dominators)} classes, "
              f"multipliers of sum one) by {proof.surplus:.4f} for every input.")  # fmt: skip
    print(f"All {len(report)} certificates checked again in float64: {len(problems)} wrong.")


if __name__ == "__main__":
    main()
