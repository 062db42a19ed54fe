"""Mixed-chunk attention and its layer in Triton: inside chunks the attention of `gau_attention`, each chunk a sample.

The linear part is added where its rows are: a product of q_lin with what the chunk remembers of others, `[S, E]`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from supy.kernels._tiles import LAUNCH, _load, aligned, constants, power_of_two, strides, tiles_for
from supy.kernels.gated_projection import activate, activate_backward
from supy.kernels.gau_attention import GATE, SWISH, _Bands
from supy.reference._masks import clear, padding
from supy.reference.mixed_chunk_attention import check_lengths, weights

PIECE = 256  # tokens of a sum, where it is over all


@triton.jit
def mixed_chunk_attention_states_kernel(
    k, v, lengths, states, chunks, size, parts, k_b, k_t, v_b, v_t,
    S: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """k^T v of each chunk, `[B, chunks, S, E]` in float32."""
    part = tl.program_id(0) % parts
    block = tl.program_id(0) // parts % tl.cdiv(S, ROWS)
    number = (tl.program_id(0) // parts // tl.cdiv(S, ROWS)).to(tl.int64)
    sample = number // chunks
    start = (number % chunks).to(tl.int32) * size
    end = tl.minimum(start + size, tl.load(lengths + sample))
    k += sample * k_b
    v += sample * v_b
    d = block * ROWS + tl.arange(0, ROWS)
    e = part * PART + tl.arange(0, PART)
    total = tl.zeros([ROWS, PART], tl.float32)
    for token in range(start, end, DEPTH):
        t = token + tl.arange(0, DEPTH)
        a = _load(k, t, d, end, k_t, S)
        total = tl.dot(tl.trans(a), _load(v, t, e, end, v_t, E), total, input_precision=PRECISION)
    at = states + number * (S * E) + d[:, None] * E + e[None, :]
    tl.store(at, total, mask=(d < S)[:, None] & (e < E)[None, :])


@triton.jit
def mixed_chunk_attention_memories_kernel(
    states, weight, memories, chunks, parts,
    CAUSAL: tl.constexpr, REVERSED: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """weight * the sum of states of earlier chunks, `[B, chunks, SIZE]`; ``REVERSED``: of weight * later ones.

    Not ``CAUSAL``: of all, `[B, SIZE]`.
    """
    at = tl.program_id(0) % parts * PART + tl.arange(0, PART)
    sample = (tl.program_id(0) // parts).to(tl.int64)
    weight += sample * chunks
    total = tl.zeros([PART], tl.float32)
    for start in range(0, chunks, STEP):
        to = start + tl.arange(0, STEP)
        added = to
        if CAUSAL:
            added = to - 1
        inside = (to < chunks)[:, None] & (at < SIZE)[None, :]
        known = (added >= 0) & (added < chunks)
        if REVERSED:
            to = chunks - 1 - to
            added = chunks - 1 - added
        row = (sample * chunks + added)[:, None] * SIZE
        state = tl.load(states + row + at[None, :], mask=known[:, None] & (at < SIZE)[None, :], other=0.0)
        if REVERSED or not CAUSAL:
            state *= tl.load(weight + added, mask=known, other=0.0)[:, None]
        if CAUSAL:
            sums = total[None, :] + tl.cumsum(state, 0)
            if not REVERSED:
                sums *= tl.load(weight + to, mask=to < chunks, other=0.0)[:, None]
            row = (sample * chunks + to)[:, None] * SIZE
            tl.store(memories + row + at[None, :], sums.to(memories.dtype.element_ty), mask=inside)
        total += tl.sum(state, 0)
    if not CAUSAL:
        tl.store(memories + sample * SIZE + at, total.to(memories.dtype.element_ty), mask=at < SIZE)


@triton.jit
def mixed_chunk_attention_linear_gradient_kernel(
    y, memories, lengths, out, T, group, blocks, parts, y_b, y_t, S: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y memory^T of each chunk, `[chunks, T, S]`, with a memory for every ``group`` of chunks."""
    part = tl.program_id(0) % parts
    block = tl.program_id(0) // parts % blocks
    chunk = (tl.program_id(0) // parts // blocks).to(tl.int64)
    n = tl.load(lengths + chunk)
    y += chunk * y_b
    memories += chunk // group * (S * E)
    i = block * BLOCK + tl.arange(0, BLOCK)
    d = part * PART + tl.arange(0, PART)
    total = tl.zeros([BLOCK, PART], tl.float32)
    for first in range(0, E, DEPTH):
        e = first + tl.arange(0, DEPTH)
        b = _load(memories, d, e, S, E, E)
        total = tl.dot(_load(y, i, e, n, y_t, E), tl.trans(b), total, input_precision=PRECISION)
    at = out + (chunk * T + i)[:, None] * S + d[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(i < T)[:, None] & (d < S)[None, :])


class _Lengths(NamedTuple):
    """Of samples, and of chunks, int32; and what the linear part of each chunk is multiplied by."""

    samples: torch.Tensor
    chunks: torch.Tensor
    weight: torch.Tensor


def _find_lengths(B, T, chunk_size, causal, normalizer, dtype, device, lengths=None):
    size = min(chunk_size, T)
    full = torch.full((B,), T, dtype=torch.int32, device=device)
    samples = full if lengths is None else lengths.int().contiguous()
    first = torch.arange(0, T, size, dtype=torch.int32, device=device)
    weight = weights(torch.empty(0, dtype=dtype, device=device), T, lengths, chunk_size, causal, normalizer)
    # Sums over all tokens need not keep to the chunks.
    weight = weight.expand(B, triton.cdiv(T, size if causal else PIECE)).contiguous()
    return _Lengths(samples, (samples[:, None] - first).clamp(0, size).flatten(), weight)


class _Chunks:
    """What forward and backward share: tensors by chunks, and what chunks remember."""

    def __init__(self, like, E, S, lengths, chunk_size, causal, normalizer, tiles):
        self.B, self.T, _ = like.shape
        self.E, self.S, self.causal, self.chunk_size = E, S, causal, chunk_size
        self.size = min(chunk_size, self.T)
        self.count = triton.cdiv(self.T, self.size)
        self.missing = -self.T % self.size
        self.linear = not causal or self.count > 1
        self.group = 1 if causal else self.count  # chunks that share a memory
        tiles = tiles or tiles_for(like.dtype)
        self.block = power_of_two(self.size, tiles["BLOCK"])
        self.tiles = tiles | {"BLOCK": self.block, "COLUMNS": min(self.block, tiles["COLUMNS"])}
        self.product = {"DEPTH": tiles["DEPTH"], "PRECISION": tiles["PRECISION"]} | LAUNCH
        key = self.B, self.T, chunk_size, causal, normalizer, like.dtype, like.device
        self.lengths = constants(_find_lengths, key, lengths)
        self.whole = lengths is None and not self.missing
        self.piece = self.size if causal else PIECE
        self.pieces = self.lengths.weight.shape[1]

    def fill(self, x):
        """x with zeros up to whole chunks."""
        return torch.nn.functional.pad(x, (0, 0, 0, self.missing)) if self.missing else x

    def chunks(self, *tensors):
        """The tensors, of whole chunks, as `[B * count, size, n]`."""
        return [x.unflatten(1, (-1, self.size)).flatten(0, 1) for x in tensors]

    def fold(self, *tensors):
        """The tensors by chunks, filled up, and aligned."""
        return aligned(*(x if x is None else self.chunks(self.fill(x))[0] for x in tensors))

    def unfold(self, x, features):
        return x.view(self.B, -1, x.shape[-1])[:, : self.T, :features].contiguous()

    def bands(self, q):
        lengths = None if self.whole else self.lengths.chunks
        scale = max(self.S, 1) ** -0.5
        options = lengths, None, "relu2", self.causal, scale, float(self.chunk_size), self.tiles, None
        return _Bands(q, q.shape[2], *options)

    def memories(self, k, v, reverse=False):
        """`[B * count / group, S, E]` in the dtype of v, or None where no chunk remembers another."""
        if not self.linear:
            return None
        S, E = k.shape[2], v.shape[2]
        states = torch.empty(self.B, self.pieces, S, E, dtype=torch.float32, device=v.device)
        rows, part = power_of_two(S, 128), power_of_two(E, self.tiles["PART"])
        parts = triton.cdiv(E, part)
        k, v = (x.reshape(self.B, -1, x.shape[2]) for x in (k, v))
        mixed_chunk_attention_states_kernel[(self.B * self.pieces * triton.cdiv(S, rows) * parts,)](
            k, v, self.lengths.samples, states, self.pieces, self.piece, parts, *strides(k, v),
            S=S, E=E, ROWS=rows, PART=part, **self.product,
        )  # fmt: skip
        memories = v.new_empty(self.B * self.count // self.group, S, E)
        parts = triton.cdiv(S * E, 256)
        mixed_chunk_attention_memories_kernel[(self.B * parts,)](
            states, self.lengths.weight, memories, self.pieces, parts,
            CAUSAL=self.causal, REVERSED=reverse, SIZE=S * E, STEP=16, PART=256,
        )  # fmt: skip
        return memories

    def linear_gradient(self, y, memories, like):
        if memories is None:
            return torch.zeros_like(like)
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        S = like.shape[2]
        part = power_of_two(S, min(128, self.tiles["PART"]))
        blocks, parts = triton.cdiv(self.size, self.block), triton.cdiv(S, part)
        mixed_chunk_attention_linear_gradient_kernel[(len(y) * blocks * parts,)](
            y, memories, self.lengths.chunks, out, self.size, self.group, blocks, parts, *strides(y),
            S=S, E=y.shape[2], BLOCK=self.block, PART=part, **self.product,
        )  # fmt: skip
        return out

    def values(self, bands, q, k, linear, memories, v, gate=None, gated=GATE):
        """A v + linear memory, times the gate."""
        out = v.new_empty(v.shape)
        linear = None if memories is None else linear
        bands.forward(q, k, v, out, gate, gated, None, linear, memories, self.group)
        return out

    def gradients(self, bands, q_quad, k_quad, q_lin, k_lin, v, g, memories, slopes, dv, gate=None):
        """Those of the heads, the first two in float32; dv is written, as by `_Bands.gradients`."""
        linear, level = None if slopes is None else k_lin, bands.seen.level
        dq, dk = bands.gradients(q_quad, k_quad, v, g, level, level, dv, gate, False, linear, slopes, self.group)
        return dq, dk[0], self.linear_gradient(g, memories, q_lin), self.linear_gradient(v, slopes, k_lin)


def mixed_chunk_attention(
    q_quad, k_quad, q_lin, k_lin, v, u, lengths, chunk_size, causal, normalizer, *, tiles=None
):
    B, T, E = v.shape
    check_lengths("mixed_chunk_attention", lengths, T)
    if B * T * E == 0:
        return v.new_empty(v.shape)
    run = _Chunks(v, E, q_quad.shape[2], lengths, chunk_size, causal, normalizer, tiles)
    q_quad, k_quad, q_lin, k_lin, v, u = run.fold(q_quad, k_quad, q_lin, k_lin, v, u)
    out = run.values(run.bands(q_quad), q_quad, k_quad, q_lin, run.memories(k_lin, v), v, u)
    return run.unfold(out, E)


def mixed_chunk_attention_backward(
    grad, q_quad, k_quad, q_lin, k_lin, v, u, lengths, chunk_size, causal, normalizer, *, tiles=None
):
    """dq_quad, dk_quad, dq_lin, dk_lin, dv and du, which is empty without a gate."""
    B, T, E = v.shape
    S = q_quad.shape[2]
    if B * T * E == 0:
        du = v.new_zeros(0 if u is None else v.shape)
        return *(x.new_zeros(x.shape) for x in (q_quad, k_quad, q_lin, k_lin, v)), du
    run = _Chunks(v, E, S, lengths, chunk_size, causal, normalizer, tiles)
    g = grad if u is None else grad * u
    grad, g, q_quad, k_quad, q_lin, k_lin, v = run.fold(grad, g, q_quad, k_quad, q_lin, k_lin, v)
    bands = run.bands(q_quad)
    memories, slopes = run.memories(k_lin, v), run.memories(q_lin, g, reverse=True)
    du = v.new_empty(0)
    if u is not None:
        du = run.unfold(run.values(bands, q_quad, k_quad, q_lin, memories, v, grad), E)
    dv = v.new_empty(v.shape)
    dheads = run.gradients(bands, q_quad, k_quad, q_lin, k_lin, v, g, memories, slopes, dv)
    return *(run.unfold(x.to(v.dtype), S) for x in dheads), run.unfold(dv, E), du


def mixed_chunk_layer(
    x, w_in, w_out, gamma, beta, cosine, sine, lengths, chunk_size, causal, normalizer, _, keep, *, tiles=None
):
    """y, no sums, and x w_in^T where it is to be kept; what stands in padding of it is not read."""
    B, T, _ = x.shape
    E = w_out.shape[1]
    check_lengths("mixed_chunk_layer", lengths, T)
    run = _Chunks(x, E, gamma.shape[1], lengths, chunk_size, causal, normalizer, tiles)
    h = run.fill(x) @ w_in.mT
    given = activate(h, E, gamma, beta, cosine, sine, run.lengths.samples)
    h_u, v, q_quad, k_quad, q_lin, k_lin = run.chunks(h[..., :E], *given)
    out = run.values(run.bands(q_quad), q_quad, k_quad, q_lin, run.memories(k_lin, v), v, h_u, SWISH)
    y = out.view(B, -1, E) @ w_out.mT
    h = h[:, :T].contiguous() if keep else x.new_empty(0)
    return y[:, :T].contiguous(), x.new_empty(0, dtype=torch.float32), h


def mixed_chunk_layer_backward(
    grad, x, w_in, w_out, gamma, beta, cosine, sine, _, h, lengths, chunk_size, causal, normalizer, __, keep,
    *, tiles=None,
):  # fmt: skip
    """Gradients for x, w_in, w_out, gamma and beta; h is computed again where it was not kept."""
    T, E = x.shape[1], w_out.shape[1]
    run = _Chunks(x, E, gamma.shape[1], lengths, chunk_size, causal, normalizer, tiles)
    padded = padding(lengths, T)
    x, grad = (run.fill(clear(y, padded)) for y in (x, grad))
    h = run.fill(h) if keep else x @ w_in.mT
    affine = gamma, beta, cosine, sine, run.lengths.samples
    dh, given = torch.empty_like(h), activate(h, E, *affine)
    h_u, h_v, dh_u, dh_v = run.chunks(h[..., :E], h[..., E : 2 * E], dh[..., :E], dh[..., E : 2 * E])
    v, q_quad, k_quad, q_lin, k_lin = run.chunks(*given)
    (g,) = run.chunks(grad @ w_out)
    bands, memories = run.bands(q_quad), run.memories(k_lin, v)
    attended = run.values(bands, q_quad, k_quad, q_lin, memories, v)
    out = torch.empty_like(v)
    bands.gate_gradient(g, h_u, attended, g, dh_u, out, SWISH)
    slopes = run.memories(q_lin, g, reverse=True)
    dheads = run.gradients(bands, q_quad, k_quad, q_lin, k_lin, v, g, memories, slopes, dh_v, h_v)
    dgamma, dbeta = activate_backward(dheads, 1, h, E, *affine, dh)
    dw_in = dh.flatten(0, 1).mT @ x.flatten(0, 1)
    dw_out = grad.flatten(0, 1).mT @ out.flatten(0, 1)
    return (dh @ w_in)[:, :T].contiguous(), dw_in, dw_out, dgamma, dbeta
