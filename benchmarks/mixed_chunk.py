"""The layer of FLASH beside FLASH-pytorch 0.1.9 (`pip install FLASH-pytorch`) and the plain formula, all with the same
numbers.

`python benchmarks/mixed_chunk.py` prints what the table has no column for: peaks of memory, each in a process of its
own, how time grows with the number of tokens, and what a generated token costs early and late.
"""

from __future__ import annotations

import functools
import math
import resource
import subprocess
import sys
import time

import torch
from gated_attention import backward, forward

import supy
from supy.reference.mixed_chunk_layer import mixed_chunk_layer as formula

DIM, KEYS, VALUES, CHUNK = 768, 128, 1536, 256


def inputs(T, dtype=torch.float32):
    """x, w_in, w_out, gamma, beta, tables of the rotation, and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    w_in, w_out = random(2 * VALUES + KEYS, DIM) / DIM**0.5, random(DIM, VALUES) / VALUES**0.5
    angle = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(0, KEYS, 2).double() / KEYS))
    affine = 1 + 0.1 * random(4, KEYS), 0.1 * random(4, KEYS)
    tensors = random(1, T, DIM), w_in, w_out, *affine, angle.cos(), angle.sin(), random(1, T, DIM)
    return tuple(x.to(dtype) for x in tensors)


def ours(x, w_in, w_out, gamma, beta, *_):
    options = {"chunk_size": CHUNK, "causal": True, "normalizer": "chunk_size"}  # the one of FLASH-pytorch
    return supy.ops.mixed_chunk_layer(x, w_in, w_out, gamma, beta, **options)


def eager(*tensors):
    return formula(*tensors, None, CHUNK, True, "chunk_size", 0, 0)[0]


@functools.cache
def _flash():
    """FLASH-pytorch's layer, with its norm an identity and its biases, T5's too, 0, which costs it the same."""
    from flash_pytorch import FLASH
    from rotary_embedding_torch import RotaryEmbedding

    _, w_in, w_out, gamma, beta, *_ = inputs(0)
    layer = FLASH(
        dim=DIM, group_size=CHUNK, query_key_dim=KEYS, causal=True, rotary_pos_emb=RotaryEmbedding(KEYS),
        norm_klass=lambda dim: torch.nn.Identity(),
    )  # fmt: skip
    u, v, z = w_in.split((VALUES, VALUES, KEYS))
    order = [0, 2, 1, 3]  # its queries come first; its scores are divided by the chunk size before they are squared
    gamma, beta = gamma[order], beta[order]
    gamma[0] *= (CHUNK / KEYS) ** 0.5
    beta[0] *= (CHUNK / KEYS) ** 0.5
    values = {
        "to_hidden.0.weight": torch.cat((v, u)), "to_qk.0.weight": z, "to_out.weight": w_out,
        "qk_offset_scale.gamma": gamma, "qk_offset_scale.beta": beta,
    }  # fmt: skip
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "rotary" not in name:
                parameter.copy_(values.get(name, torch.zeros(())))
    return layer


def flash_forward(x, *_):
    with torch.no_grad():
        return _flash().to(x)(x) - x  # it adds x


def flash_backward(x, *tensors):
    layer, leaf = _flash().to(x), x.detach().requires_grad_()
    leaves = [leaf, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return torch.autograd.grad(layer(leaf), leaves, tensors[-1])[0] - tensors[-1]


LAYERS = {"supy": (forward(ours), backward(ours)), "FLASH-pytorch": (flash_forward, flash_backward)}
LAYERS["eager"] = forward(eager), backward(eager)


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _measure(name, T):
    """Peak of memory and the time of forward and backward, in this process."""
    run = LAYERS[name][1]
    run(*inputs(CHUNK))  # loads what a first call loads
    tensors = inputs(T)
    before, best = _peak(), math.inf
    for _ in range(3 if T < 65536 else 1):
        start = time.perf_counter()
        run(*tensors)
        best = min(best, time.perf_counter() - start)
    print(_peak() - before, best)


def _step_seconds(position, count=200):
    """Of one token, after so many; the state holds the same, so that no prompt has to be read for it."""
    layer = supy.nn.MixedChunkAttention(DIM, causal=True)
    state, x = layer.state(1), torch.randn(1, DIM)
    state.position.fill_(position)
    best = math.inf
    for _ in range(count):
        start = time.perf_counter()
        layer.step(x, state)
        best = min(best, time.perf_counter() - start)
    return best


def main():
    if len(sys.argv) > 1:
        return _measure(sys.argv[1], int(sys.argv[2]))

    def measured(name, T):
        command = [sys.executable, __file__, name, str(T)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return map(float, done.stdout.split())

    print(f"{torch.get_num_threads()} threads, float32, B = 1, causal, forward and backward")
    for name in LAYERS:
        megabytes, seconds = measured(name, 16384)
        print(f"T = 16384  {name:14} {megabytes:6.0f} MB beside the inputs  {1e3 * seconds:6.0f} ms")
    lengths = [16384, 32768, 65536, 131072, 262144]
    times = [list(measured("supy", T))[1] for T in lengths]
    for T, seconds in zip(lengths, times, strict=True):
        print(f"T = {T:6}  {1e6 * seconds / T:.1f} us a token")
    x, y = torch.tensor(lengths).double().log(), torch.tensor(times).double().log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    print(f"time grows as T^{slope:.3f}")
    for position in (100, 100_000):
        print(f"a generated token after {position}: {1e3 * _step_seconds(position):.2f} ms")


if __name__ == "__main__":
    main()
