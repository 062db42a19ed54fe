"""Training steps of very deep encoders: time against depth, supy's operator against PyTorch's, and memory.

    python benchmarks/very_deep.py [depth] [operator] [memory]     # default: all three; one thread

Times are the least of several steps (forward, backward, Adam) on [16, 10, 32] as in examples/very_deep.py unless said.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from supy.nn import DeepNorm, DeepNormEncoder

supy_norm = DeepNorm.forward


def eager_norm(self, x, branch):
    z = torch.add(branch, x, alpha=self.alpha)
    return F.layer_norm(z, (self.dim,), self.weight, self.bias, self.eps)


def no_norm(self, x, branch):
    return branch


def prepare(layers: int, batch: int, tokens: int, width: int, **options):
    """A training step, to be called."""
    encoder = DeepNormEncoder(layers, width, heads=max(1, width // 16), **options)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-6, fused=True)
    x = torch.randn(batch, tokens, width)

    def step():
        optimizer.zero_grad()
        encoder(x).square().mean().backward()
        optimizer.step()

    return step


def seconds(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def depth() -> None:
    depths, times = (12, 50, 100, 200, 500, 1000), []
    for layers in depths:
        step = prepare(layers, 16, 10, 32, affine=False)
        step()
        times.append(min(seconds(step) for _ in range(max(3, 600 // layers))))
        print(f"{layers:5} layers: {1e3 * times[-1]:8.1f} ms a step, {1e3 * times[-1] / layers:.3f} a layer")
    print(f"time = layers^{np.polyfit(np.log(depths), np.log(times), 1)[0]:.3f}")


def operator() -> None:
    for layers, batch, tokens, width in (1000, 16, 10, 32), (50, 16, 10, 64), (50, 64, 32, 64), (6, 8, 128, 256):
        step, times = prepare(layers, batch, tokens, width), {}
        for _ in range(5):
            for name, norm in (("eager", eager_norm), ("supy", supy_norm), ("none", no_norm)):
                DeepNorm.forward = norm
                times.setdefault(name, []).append(seconds(step))
        eager, ours, none = (min(times[name][1:]) for name in ("eager", "supy", "none"))
        print(f"{layers} layers, [{batch}, {tokens}, {width}]: eager {1e3 * eager:.1f} ms, supy {1e3 * ours:.1f}: "
              f"{1 - ours / eager:.1%} of the step saved, of {1 - none / eager:.1%} that the norms take")  # fmt: skip
    DeepNorm.forward = supy_norm


def measure(layers: int, segment: int | None, queue) -> None:
    torch.set_num_threads(1)
    prepare(layers, 64, 32, 64, segment=segment)()
    queue.put(int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6)


def memory() -> None:
    start = multiprocessing.get_context("spawn")
    for layers, segment in (1, None), (100, None), (200, None), (200, 32), (1000, 32):
        queue = start.Queue()
        process = start.Process(target=measure, args=(layers, segment, queue))
        process.start()
        print(f"[64, 32, 64], {layers} layers, segment={segment}: {queue.get():.2f} GB at the most")
        process.join()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[1:] or ("depth", "operator", "memory"):
        {"depth": depth, "operator": operator, "memory": memory}[part]()
