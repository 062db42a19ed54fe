"""deep_norm beside eager PyTorch, a fused addition, torch.compile of that and Liger-Kernel.

``python benchmarks/deep_norm.py 16384x4096 --device cuda`` prints one size in all forms, as a share of what a copy of the
bytes that a pass has to read and write would take; with gradients 8 a number, though supy in float32 on a CPU needs 7.
"""

from __future__ import annotations

import argparse
import functools
import itertools

import torch
from ceilings import _fastest as fastest
from ceilings import copy_rate
from conftest import _keep_freed_memory
from torch.nn import functional as F

import supy

ALPHA, EPS = 2.2, 1e-6


def inputs(rows, width, dtype):
    """x, branch, weight, bias and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, width),) * 3 + ((width,),) * 2
    x, branch, grad, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    leaves = (t.to(dtype).requires_grad_() for t in (x, branch, 1 + weight / 8, bias / 8))
    return *leaves, grad.to(dtype)


def ours(x, branch, weight, bias):
    return supy.ops.deep_norm(x, branch, ALPHA, weight, bias, eps=EPS)


def triton(x, branch, weight, bias):
    if not x.is_cuda:
        raise ImportError("Triton needs a CUDA device")
    with supy.use_backend("triton"):
        return ours(x, branch, weight, bias)


def eager(x, branch, weight, bias):
    return F.layer_norm(ALPHA * x + branch, x.shape[-1:], weight, bias, EPS)


def fused(x, branch, weight, bias):
    return F.layer_norm(torch.add(branch, x, alpha=ALPHA), x.shape[-1:], weight, bias, EPS)


def liger(x, branch, weight, bias):
    """It has no sum of two tensors in its layer norm, so PyTorch makes that."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(torch.add(branch, x, alpha=ALPHA), weight, bias, EPS)


def forward(function):
    def run(*tensors):
        with torch.no_grad():
            return (function(*tensors[:4]),)

    return run


def with_gradients(function):
    def run(*tensors):
        *leaves, grad = tensors
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    return run


def same(results, expected):
    """To a few roundings of sums that are rounded to the dtype themselves, as some peers' are."""
    tolerance = {torch.float32: 2e-4, torch.bfloat16: 3e-2}
    return all(
        (a.double() - b).abs().max() <= tolerance[a.dtype] * b.abs().max()
        for a, b in zip(results, expected, strict=True)
    )


def main():
    """One size after the other, the functions that need no compilation first; each line as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", default=["8192x768", "4096x4096"], help="ROWSxWIDTH")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    functions = {"supy": ours, "supy, Triton": triton, "add(alpha)": fused, "eager": eager, "Liger-Kernel": liger}
    if options.device == "cpu":
        _keep_freed_memory()
    for names in (functions, {"torch.compile": torch.compile(fused, dynamic=False)}):
        for size in options.sizes:
            rows, width = map(int, size.split("x"))
            for dtype, make in itertools.product((torch.float32, torch.bfloat16), (forward, with_gradients)):
                tensors = [t.detach().to(options.device).requires_grad_() for t in inputs(rows, width, dtype)]
                moved = (3 if make is forward else 8) * rows * width * dtype.itemsize
                ceiling = moved / copy_rate(moved, options.device)
                for name, function in names.items():
                    try:
                        seconds = fastest(functools.partial(make(function), *tensors), options.device, 0.1)
                    except ImportError as error:
                        print(f"{name}: {error}", flush=True)
                        continue
                    what = f"{size} {str(dtype)[6:]} {make.__name__}"
                    print(f"{what}: {name} {1e3 * seconds:.4f} ms, {ceiling / seconds:.0%} of a copy", flush=True)


if __name__ == "__main__":
    main()
