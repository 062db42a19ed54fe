"""The gated attention unit beside the ways in which it is written elsewhere, all with the same numbers.

`python benchmarks/gated_attention.py` prints what the table has no column for: peaks of memory at T = 4096, each in a process
of its own, and the times that belong to them.
"""

from __future__ import annotations

import functools
import math
import resource
import subprocess
import sys
import time

import torch
from torch.nn import functional as F

import supy

BATCH, DIM, KEYS, VALUES = 8, 768, 128, 1536


def inputs(T, dtype=torch.float32, batch=BATCH):
    """x, w_in, w_out, gamma, beta, tables of the rotation, and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    w_in, w_out = random(2 * VALUES + KEYS, DIM) / DIM**0.5, random(DIM, VALUES) / VALUES**0.5
    angle = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(0, KEYS, 2).double() / KEYS))
    tensors = random(batch, T, DIM), w_in, w_out, 1 + 0.1 * random(2, KEYS), 0.1 * random(2, KEYS), angle.cos(), angle.sin()
    return tuple(x.to(dtype) for x in (*tensors, random(batch, T, DIM)))


def flops(T, causal, training):
    """Multiplications and additions; a causal row sees half of the keys."""
    attention = T * T * (KEYS + VALUES) // (2 if causal else 1)
    return 2 * BATCH * (T * DIM * (3 * VALUES + KEYS) + attention) * (3 if training else 1)


def forward(layer):
    def run(*tensors):
        with torch.no_grad():
            return layer(*tensors[:-1])

    return run


def backward(layer):
    """Forward and backward; returns the gradient for x, and computes those for all parameters."""

    def run(*tensors):
        leaves = [x.detach().requires_grad_() for x in tensors[:5]]
        out = layer(*leaves, *tensors[5:-1])
        return torch.autograd.grad(out, leaves, tensors[-1])[0]

    return run


def ours(kernel, causal):
    return lambda *tensors: supy.ops.gated_attention_unit(*tensors[:5], kernel=kernel, causal=causal)


def _rotated(x, cosine, sine):
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cosine - b * sine, b * cosine + a * sine), -1).flatten(-2)


def _factors(kernel, causal, T, like):
    """What scores are multiplied by, [T, 1], and the number of keys that a row sees."""
    seen = torch.arange(1, T + 1, device=like.device) if causal else torch.full((T,), T, device=like.device)
    plus = seen.clamp(min=16).log() / math.log(512) if kernel == "softmax_plus" else torch.ones_like(seen)
    return (plus / KEYS**0.5).to(like.dtype)[:, None], seen.to(like.dtype)[:, None]


def _written(kernel, causal, attend):
    """The unit as a user writes it in PyTorch, and as bert4torch does step by step."""

    def layer(x, w_in, w_out, gamma, beta, cosine, sine):
        u, v, z = F.silu(F.linear(x, w_in)).split((VALUES, VALUES, KEYS), -1)
        q, k = (_rotated(z * gamma[i] + beta[i], cosine, sine) for i in (0, 1))
        factor, seen = _factors(kernel, causal, x.shape[1], x)
        return F.linear(u * attend(q * factor, k, v, seen), w_out)

    return layer


def eager(kernel, causal):
    def attend(q, k, v, seen):
        scores = q @ k.mT
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(1) if causal else None
        if kernel == "relu2":
            weights = F.relu(scores).square() / seen
            return (weights if hidden is None else weights.masked_fill(hidden, 0)) @ v
        return (scores if hidden is None else scores.masked_fill(hidden, -torch.inf)).softmax(-1) @ v

    return _written(kernel, causal, attend)


def scaled_dot_product(kernel, causal):
    def attend(q, k, v, _):
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=causal, scale=1.0)[:, 0]

    return _written(kernel, causal, attend)


@functools.cache
def _flash(causal):
    from flash_pytorch import GAU

    return GAU(dim=DIM, query_key_dim=KEYS, causal=causal, add_residual=False, norm_klass=lambda dim: torch.nn.Identity())


def flash_pytorch(causal, training):
    """FLASH-pytorch's own unit: no rotation, a T5 bias, scores divided by T before they are squared; not the same numbers."""

    def run(x, *tensors):
        layer = _flash(causal).to(x)
        if not training:
            with torch.no_grad():
                return layer(x)
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(layer(leaf), [leaf, *layer.parameters()], tensors[-1])[0]

    return run


def layers(kernel, causal, training):
    make = backward if training else forward
    every = {"supy": make(ours(kernel, causal)), "eager": make(eager(kernel, causal))}
    if kernel == "relu2":
        every["FLASH-pytorch"] = flash_pytorch(causal, training)
    else:
        every["scaled_dot_product_attention"] = make(scaled_dot_product(kernel, causal))
    return every


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _measure(kernel, name, T):
    run = layers(kernel, causal=False, training=True)[name]
    run(*inputs(64, batch=1))  # loads what a first call loads
    tensors = inputs(T)
    before, best = _peak(), math.inf
    for _ in range(2):
        start = time.perf_counter()
        run(*tensors)
        best = min(best, time.perf_counter() - start)
    print(_peak() - before, best)


def main():
    if len(sys.argv) > 1:
        return _measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    print(f"{torch.get_num_threads()} threads, float32, B = {BATCH}, d = {DIM}, T = 4096, forward and backward")
    for kernel in ("relu2", "softmax_plus"):
        for name in layers(kernel, causal=False, training=True):
            command = [sys.executable, __file__, kernel, name, "4096"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            megabytes, seconds = map(float, done.stdout.split())
            print(f"{kernel:12}  {name:30} {megabytes:6.0f} MB beside the inputs  {1e3 * seconds:6.0f} ms")


if __name__ == "__main__":
    main()
