"""Mixed-chunk attention in Triton: inside chunks the attention of `gau_attention`, for which each chunk is a sample.

The linear part is added where its rows are: a product of q_lin with what the chunk remembers of others, `[S, E]`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from supy.kernels._tiles import LAUNCH, _load, aligned, cut, power_of_two, strides, tiles_for
from supy.kernels.gau_attention import BAND, _Bands
from supy.reference.mixed_chunk_attention import check_lengths, weights

PIECE = 256  # tokens of a sum, where it is over all
WORKSPACE = 256  # weights in memory for each token; more only where a band of blocks has more


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
    CAUSAL: tl.constexpr, REVERSED: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """weight * the sum of states of earlier chunks, `[B, chunks, SIZE]`; ``REVERSED``: of weight * later ones.

    Not ``CAUSAL``: of all, `[B, SIZE]`.
    """
    at = tl.program_id(0) % parts * PART + tl.arange(0, PART)
    sample = (tl.program_id(0) // parts).to(tl.int64)
    states += sample * chunks * SIZE
    weight += sample * chunks
    total = tl.zeros([PART], tl.float32)
    for step in range(0, chunks):
        chunk = step
        if REVERSED:
            chunk = chunks - 1 - step
        state = tl.load(states + tl.cast(chunk, tl.int64) * SIZE + at, mask=at < SIZE, other=0.0)
        factor = tl.load(weight + chunk)
        if CAUSAL:
            to = memories + (sample * chunks + chunk) * SIZE + at
            if REVERSED:
                tl.store(to, total.to(memories.dtype.element_ty), mask=at < SIZE)
                total += state * factor
            else:
                tl.store(to, (total * factor).to(memories.dtype.element_ty), mask=at < SIZE)
                total += state
        else:
            total += state * factor
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


class _Chunks:
    """What forward and backward share: tensors by chunks, and what chunks remember."""

    def __init__(self, v, S, lengths, chunk_size, causal, normalizer, tiles):
        self.B, self.T, self.E = v.shape
        self.S, self.causal = S, causal
        self.size = min(chunk_size, self.T)
        self.count = triton.cdiv(self.T, self.size)
        self.linear = not causal or self.count > 1
        self.group = 1 if causal else self.count  # chunks that share a memory
        tiles = tiles or tiles_for(v.dtype)
        self.block = power_of_two(self.size, tiles["BLOCK"])
        self.tiles = tiles | {"BLOCK": self.block, "COLUMNS": min(self.block, tiles["COLUMNS"])}
        self.product = {"DEPTH": tiles["DEPTH"], "PRECISION": tiles["PRECISION"]} | LAUNCH

        full = torch.full((self.B,), self.T, dtype=torch.int32, device=v.device)
        self.lengths = full if lengths is None else lengths.int().contiguous()
        first = torch.arange(0, self.count * self.size, self.size, dtype=torch.int32, device=v.device)
        self.chunk_lengths = (self.lengths[:, None] - first).clamp(0, self.size).flatten()
        # Sums over all tokens need not keep to the chunks.
        self.piece = self.size if causal else PIECE
        self.pieces = triton.cdiv(self.T, self.piece)
        weight = weights(v, self.T, lengths, chunk_size, causal, normalizer)
        self.weight = weight.expand(self.B, self.pieces).contiguous()

    def fold(self, *tensors):
        """The tensors with zeros up to whole chunks, `[B * count, size, n]`."""
        missing = -self.T % self.size
        tensors = (torch.nn.functional.pad(x, (0, 0, 0, missing)) if x is not None and missing else x for x in tensors)
        return [x if x is None else x.unflatten(1, (-1, self.size)).flatten(0, 1) for x in aligned(*tensors)]

    def unfold(self, x, features):
        return x.view(self.B, -1, x.shape[-1])[:, : self.T, :features].contiguous()

    def bands(self, q, chunk_size):
        width = triton.cdiv(self.size, self.block) * self.block
        band = max(BAND, q.shape[0] * self.size * WORKSPACE // (self.block * width))
        options = None, "relu2", self.causal, max(self.S, 1) ** -0.5, chunk_size, self.tiles, band
        return _Bands(q, self.chunk_lengths, *options)

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
            k, v, self.lengths, states, self.pieces, self.piece, parts, *strides(k, v),
            S=S, E=E, ROWS=rows, PART=part, **self.product,
        )  # fmt: skip
        memories = v.new_empty(self.B * self.count // self.group, S, E)
        parts = triton.cdiv(S * E, 1024)
        mixed_chunk_attention_memories_kernel[(self.B * parts,)](
            states, self.weight, memories, self.pieces, parts,
            CAUSAL=self.causal, REVERSED=reverse, SIZE=S * E, PART=1024,
        )  # fmt: skip
        return memories

    def linear_gradient(self, y, memories, like):
        if memories is None:
            return torch.zeros_like(like)
        out = like.new_empty(like.shape)
        S = like.shape[2]
        part = power_of_two(S, min(128, self.tiles["PART"]))
        blocks, parts = triton.cdiv(self.size, self.block), triton.cdiv(S, part)
        mixed_chunk_attention_linear_gradient_kernel[(len(y) * blocks * parts,)](
            y, memories, self.chunk_lengths, out, self.size, self.group, blocks, parts, *strides(y),
            S=S, E=y.shape[2], BLOCK=self.block, PART=part, **self.product,
        )  # fmt: skip
        return out


def _values(run, bands, q, k, linear, memories, v, gate):
    """gate * (A v + linear memory)."""
    out, tiles = v.new_empty(v.shape), bands.workspace(q, v.dtype)
    linear = None if memories is None else linear
    for band in bands.bands:
        bands.weights(band, q, k, bands.level, tiles)
        bands.values(band, tiles, v, gate, bands.key_blocks, out, None, linear, memories, run.group)
    return run.unfold(out, run.E)


def mixed_chunk_attention(
    q_quad, k_quad, q_lin, k_lin, v, u, lengths, chunk_size, causal, normalizer, *, tiles=None
):
    B, T, E = v.shape
    check_lengths("mixed_chunk_attention", lengths, T)
    if B * T * E == 0:
        return v.new_empty(v.shape)
    run = _Chunks(v, q_quad.shape[2], lengths, chunk_size, causal, normalizer, tiles)
    q_quad, k_quad, q_lin, k_lin, v, u = run.fold(q_quad, k_quad, q_lin, k_lin, v, u)
    bands = run.bands(q_quad, chunk_size)
    return _values(run, bands, q_quad, k_quad, q_lin, run.memories(k_lin, v), v, u)


def mixed_chunk_attention_backward(
    grad, q_quad, k_quad, q_lin, k_lin, v, u, lengths, chunk_size, causal, normalizer, *, tiles=None
):
    """dq_quad, dk_quad, dq_lin, dk_lin, dv and du, which is empty without a gate."""
    B, T, E = v.shape
    S = q_quad.shape[2]
    if B * T * E == 0:
        du = v.new_zeros(0 if u is None else v.shape)
        return *(x.new_zeros(x.shape) for x in (q_quad, k_quad, q_lin, k_lin, v)), du
    run = _Chunks(v, S, lengths, chunk_size, causal, normalizer, tiles)
    g = grad if u is None else grad * u
    grad, g, q_quad, k_quad, q_lin, k_lin, v = run.fold(grad, g, q_quad, k_quad, q_lin, k_lin, v)
    bands = run.bands(q_quad, chunk_size)
    memories, slopes = run.memories(k_lin, v), run.memories(q_lin, g, reverse=True)
    du = v.new_empty(0)
    if u is not None:
        du = _values(run, bands, q_quad, k_quad, q_lin, memories, v, grad)
    linear = None if slopes is None else k_lin
    dq, dk, dv = bands.gradients(q_quad, k_quad, v, g, bands.level, bands.level, 1, linear, slopes, run.group)
    dq_lin, dk_lin = run.linear_gradient(g, memories, q_lin), run.linear_gradient(v, slopes, k_lin)
    return *(run.unfold(x, S) for x in (dq, dk, dq_lin, dk_lin)), run.unfold(dv, E), du
