"""What the machine can do at the most, measured in the same run as the operators."""

from __future__ import annotations

import functools
import time

import torch


def device_seconds(function, seconds=0.1):
    """The shortest time on the device, between events around one call; its second-level cache is overwritten before each."""
    from triton.testing import do_bench

    return do_bench(function, warmup=25, rep=int(1e3 * seconds), return_mode="min") / 1e3


def device_peak(function):
    """Bytes that a call takes at the most beside what is there before it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _fastest(function, device, seconds):
    if device == "cuda":
        return device_seconds(function, seconds)
    best, stop = float("inf"), time.perf_counter() + seconds
    function()
    while time.perf_counter() < stop:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def copy_rate(size: int, device: str) -> float:
    """Bytes a second, read and written together, of a copy that moves ``size`` bytes in all."""
    source = torch.ones(max(size // 8, 1), device=device)  # not zeros, whose pages may be one page of the system
    target = torch.ones_like(source)
    return 8 * source.numel() / _fastest(lambda: target.copy_(source), device, 0.3)


@functools.cache
def gemm_rate(device: str, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of a square matrix product."""
    n = 2048 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * n**3 / _fastest(lambda: torch.mm(a, a, out=out), device, 1.0)
