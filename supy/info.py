"""``python -m supy.info``: which operator runs on which backend here, and why one is missing."""

from __future__ import annotations

import platform

import torch

import supy
from supy import _extension
from supy._library import OPERATORS

BACKENDS = (("CPU", "cpp"), ("CUDA", "cuda"), ("CUDA", "triton"))


def info() -> str:
    """The table that ``supy info`` prints."""
    lines = [f"supy {supy.__version__}, torch {torch.__version__}, Python {platform.python_version()}"]
    if _extension.C is None:
        lines.append(f"native kernels: none: {_extension.missing}")
    else:
        build = _extension.C.build_info()
        cuda = f"CUDA {build['cuda']} for {build['cuda_architectures']}" if build["cuda"] else "no CUDA (no nvcc)"
        lines.append(
            f"native kernels: {build['compiler']}, {'OpenMP' if build['openmp'] else 'one thread'}, "
            f"{build['instruction_set']}, {cuda}; {torch.get_num_threads()} threads"
        )
    public = {name: op for name, op in OPERATORS.items() if not name.endswith(("_backward", "_out", "_limits"))}
    width = max(map(len, public), default=0)
    lines += ["", f"{'operator':{width}}  gradient  reference  cpp      cuda     triton"]
    notes: dict[str, None] = {}
    for name, operator in sorted(public.items()):
        cells = []
        for device, backend in BACKENDS:
            kernels = [k for k in operator.kernels if (k.device, k.backend) == (device, backend)]
            reason = kernels[0].missing() if kernels else None
            cells.append("-" if not kernels else "missing" if reason else "ready")
            if reason:
                notes[f"{backend}: {reason}"] = None
        lines.append(
            f"{name:{width}}  {'yes' if operator.differentiable else '-':8}  {'ready':9}  "
            + "  ".join(f"{cell:7}" for cell in cells).rstrip()
        )
    lines += ["", "-: the reference serves it, on every device and dtype"]
    lines += [f"missing, {note}" for note in notes]
    return "\n".join(lines)


if __name__ == "__main__":
    print(info())
