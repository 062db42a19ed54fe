"""Mixed-chunk attention of FLASH: all tokens at once, and one token after another."""

from __future__ import annotations

import torch

from supy import _extension
from supy._checks import Shapes, require
from supy._library import Gradient, Kernel, define
from supy.ops._arguments import (
    NATIVE,
    check_integer,
    check_lengths,
    check_like,
    default_scale,
    triton_kernel,
    unit_stride,
)
from supy.reference import mixed_chunk_attention as reference

NORMALIZERS = ("tokens", "chunk_size", "chunks")
_NAMES = ("q_quad", "k_quad", "q_lin", "k_lin")
_TENSORS = "Tensor q_quad, Tensor k_quad, Tensor q_lin, Tensor k_lin, Tensor v, Tensor? u, Tensor? lengths"
OPTIONS = "int chunk_size, bool causal, str normalizer"
_SEGMENT = 512  # tokens that the CPU's kernels work on at once, in 1 to 32 chunks


def segment_of(chunk_size: int) -> int:
    return min(max(_SEGMENT // chunk_size, 1), 32) * chunk_size


def chunk_weights(x, lengths, chunk_size, causal, normalizer):
    """What the kernel multiplies the linear part of each chunk by, `[B, chunks]`, for x `[B, T, n]`."""
    B, T, _ = x.shape
    found = reference.weights(x, T, lengths, chunk_size, causal, normalizer)
    return found.expand(B, -(-T // chunk_size))


def _cpp(q_quad, k_quad, q_lin, k_lin, v, u, *options):
    lengths, chunk_size, causal, _ = options
    if v.numel() == 0 or q_quad.numel() == 0:
        return reference.mixed_chunk_attention(q_quad, k_quad, q_lin, k_lin, v, u, *options)
    inputs = [unit_stride(x) for x in (q_quad, k_quad, q_lin, k_lin, v, u) if x is not None]
    out = v.new_empty(v.shape)
    sizes = chunk_size, segment_of(chunk_size)
    _extension.C.mixed_chunk_attention(inputs, None, lengths, chunk_weights(v, *options), *sizes, causal, [out])
    return out


def _cpp_backward(grad, *arguments):
    inputs, (lengths, chunk_size, causal, _) = arguments[:6], arguments[6:]
    if grad.numel() == 0 or inputs[0].numel() == 0:
        return reference.mixed_chunk_attention_backward(grad, *arguments)
    grads = _fake_backward(grad, *inputs)
    given = [unit_stride(x) for x in inputs if x is not None]
    options = lengths, chunk_weights(grad, *arguments[6:]), chunk_size, segment_of(chunk_size), causal
    _extension.C.mixed_chunk_attention(given, unit_stride(grad), *options, grads[: len(given)])
    return grads


def _save(ctx, inputs, output):
    *tensors, ctx.chunk_size, ctx.causal, ctx.normalizer = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    *tensors, u, lengths = ctx.saved_tensors
    options = ctx.chunk_size, ctx.causal, ctx.normalizer
    *grads, du = _mixed_chunk_attention_backward(grad, *tensors, u, lengths, *options)
    return *grads, None if u is None else du, *(None,) * 4


def _fake_backward(grad, q_quad, k_quad, q_lin, k_lin, v, u, *_):
    grads = (x.new_empty(x.shape) for x in (q_quad, k_quad, q_lin, k_lin, v))
    return *grads, v.new_empty(0 if u is None else u.shape)


_mixed_chunk_attention = define(
    f"mixed_chunk_attention({_TENSORS}, {OPTIONS}) -> Tensor",
    reference.mixed_chunk_attention,
    fake=lambda q_quad, k_quad, q_lin, k_lin, v, *_: v.new_empty(v.shape),
    gradient=Gradient(_save, _backward),
    kernels=(Kernel("CPU", "cpp", _cpp, NATIVE), triton_kernel("mixed_chunk_attention", "mixed_chunk_attention")),
)
_mixed_chunk_attention_backward = define(
    f"mixed_chunk_attention_backward(Tensor grad, {_TENSORS}, {OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.mixed_chunk_attention_backward,
    fake=_fake_backward,
    kernels=(
        Kernel("CPU", "cpp", _cpp_backward, NATIVE),
        triton_kernel("mixed_chunk_attention", "mixed_chunk_attention_backward"),
    ),
)


def mixed_chunk_attention(
    q_quad: torch.Tensor,
    k_quad: torch.Tensor,
    q_lin: torch.Tensor,
    k_lin: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor | None = None,
    *,
    chunk_size: int = 256,
    causal: bool = False,
    lengths: torch.Tensor | None = None,
    normalizer: str = "tokens",
) -> torch.Tensor:
    """Quadratic attention inside chunks of tokens, linear attention across them (post 8934; arXiv 2202.10447).

    With c = ``chunk_size``, chunks g = 1, 2, ... and n the sample's number of tokens:

        quadratic_g = relu(q_quad_g k_quad_g^T / sqrt(S))^2 / c  v_g    a shorter last chunk divides by c too
        linear_g    = q_lin_g (sum of k_lin_h^T v_h over all chunks h) / n
        result      = u * (quadratic + linear)

    Under ``causal`` a token sees, in its chunk, itself and what came before, and the sum is over the earlier chunks
    h < g only (0 in the first). What this sum is divided by depends on ``normalizer``:

        "tokens"        (g - 1) c, the number of tokens in the sum: an average, as in the form that is not causal
        "chunk_size"    c, whatever g, as FLASH-pytorch does; the sum grows with the position
        "chunks"        (g - 1) times the sample's number of chunks, the 1 / ((g - 1) n / c) that post 8934 prints; rows
                        then depend on how many tokens follow, so that this cannot generate

    Without ``causal``, post, paper and FLASH-pytorch agree on n, and so the result is the same for all three.

    Args:
        q_quad, k_quad, q_lin, k_lin: `[B, T, S]`, positions already applied.
        v: `[B, T, E]`. All tensors have one floating-point dtype; half precision adds up in float32.
        u: the gate, `[B, T, E]`, or None for 1.
        chunk_size: 1 or more; T need not be a multiple. From T on, all is quadratic and, if causal, nothing linear.
        lengths: int32 or int64 `[B]`, 0 to T. Tokens at and beyond a sample's length are no keys, their own rows are 0,
            and so are all their gradients: nothing that stands in the padding, NaN included, has any effect.
        normalizer: see above.

    Returns:
        `[B, T, E]` in the dtype of v. Differentiable once in every tensor but ``lengths``. Time and memory are linear
        in T, forward and backward.

    Raises:
        ValueError: a shape, ``chunk_size``, ``normalizer`` or a length is not as above.
        TypeError: an argument is not a tensor of the right dtype.

    >>> import torch, supy
    >>> x = torch.ones(1, 6, 4)
    >>> v = torch.arange(1.0, 7.0).view(1, 6, 1)
    >>> zero = torch.zeros_like(x)
    >>> supy.ops.mixed_chunk_attention(x, x, zero, x, v, chunk_size=2).flatten()  # 4 / 2 times the chunk's sum
    tensor([ 6.,  6., 14., 14., 22., 22.])
    >>> supy.ops.mixed_chunk_attention(zero, x, x, x, v, chunk_size=2, causal=True).flatten()  # 4 times the mean before
    tensor([ 0.,  0.,  6.,  6., 10., 10.])
    """
    op = "mixed_chunk_attention"
    shapes = Shapes(op)
    shapes.floating("q_quad", q_quad)
    shapes.match("q_quad", q_quad, "B T S")
    for name, x in zip(_NAMES[1:], (k_quad, q_lin, k_lin), strict=True):
        check_like(shapes, name, x, "B T S", q_quad)
    check_like(shapes, "v", v, "B T E", q_quad)
    if u is not None:
        check_like(shapes, "u", u, "B T E", q_quad)
    check_lengths(shapes, lengths, q_quad)
    check_options(op, chunk_size, normalizer)
    return _mixed_chunk_attention(
        q_quad, k_quad, q_lin, k_lin, v, u, lengths, chunk_size, causal, normalizer
    )


def check_options(op, chunk_size, normalizer):
    require(chunk_size >= 1, op, f"chunk_size is {chunk_size}, expected 1 or more")
    expected = ", ".join(NORMALIZERS)
    require(normalizer in NORMALIZERS, op, f"normalizer is {normalizer!r}, expected one of {expected}")


class MixedChunkState:
    """What causal mixed-chunk attention remembers of B sequences: as much after a million tokens as after one.

    That is k_quad and v of the current chunk, and two sums of k_lin^T v: of the current chunk and of all before it. The
    tensors are changed in place by :func:`mixed_chunk_step` and are never differentiated.

    Args:
        batch, key_size, value_size: B, S and E.
        chunk_size: c.
        dtype: of the tensors of each step. Sums are kept in float32, for float64 in float64.

    >>> state = MixedChunkState(2, 16, 32, 256)
    >>> state.position
    tensor([0, 0])
    """

    def __init__(
        self,
        batch: int,
        key_size: int,
        value_size: int,
        chunk_size: int = 256,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        check_options("MixedChunkState", chunk_size, "tokens")
        new = {"dtype": dtype, "device": device}
        self.chunk_size = chunk_size
        self.k_quad = torch.zeros(batch, chunk_size, key_size, **new)
        self.v = torch.zeros(batch, chunk_size, value_size, **new)
        new["dtype"] = torch.float64 if dtype == torch.float64 else torch.float32
        self.current = torch.zeros(batch, key_size, value_size, **new)
        self.before = torch.zeros(batch, key_size, value_size, **new)
        self.position = torch.zeros(batch, dtype=torch.int64, device=device)  # tokens seen, of each sample

    @torch.no_grad()
    def read(
        self,
        k_quad: torch.Tensor,
        k_lin: torch.Tensor,
        v: torch.Tensor,
        *,
        lengths: torch.Tensor | None = None,
    ) -> None:
        """Forgets all, then takes in a prompt in one pass, as if its tokens had been stepped through.

        k_quad, k_lin `[B, T, S]`, v `[B, T, E]`, lengths `[B]` as in :func:`mixed_chunk_attention`, which gives the
        prompt's own results.
        """
        op = "MixedChunkState.read"
        shapes = _check_state(op, self)
        for name, x, dims in (("k_quad", k_quad, "B T S"), ("k_lin", k_lin, "B T S"), ("v", v, "B T E")):
            shapes.match(name, x, dims, self.v.dtype)
            shapes.same_device(name, x, "state", self.v)
        T, c = v.shape[1], self.chunk_size
        token = torch.arange(T, device=v.device)
        if lengths is None:
            self.position.fill_(T)
        else:
            shapes.match("lengths", lengths, "B")
            check_integer(shapes, "lengths", lengths)
            reference.check_lengths(op, lengths, T)
            self.position.copy_(lengths)
        first = self.position // c * c  # of the current chunk
        earlier, current = token < first[:, None], (token >= first[:, None]) & (token < self.position[:, None])
        for sums, tokens in ((self.before, earlier), (self.current, current)):
            sums.zero_()
            for start in range(0, T, 4096):  # in pieces, whose copies in float32 are small
                piece = slice(start, start + 4096)
                inside = tokens[:, piece, None]
                k, x = (y[:, piece].masked_fill(~inside, 0).to(sums.dtype) for y in (k_lin, v))
                sums.baddbmm_(k.mT, x)
        slot = first[:, None] + torch.arange(c, device=v.device)
        empty = (slot >= self.position[:, None])[..., None]
        for cache, x in ((self.k_quad, k_quad), (self.v, v)):
            if T == 0:
                cache.zero_()
                continue
            at = slot.clamp(max=T - 1)[..., None].expand(-1, -1, x.shape[-1])
            cache.copy_(x.gather(1, at).masked_fill_(empty, 0))


def mixed_chunk_step(
    q_quad: torch.Tensor,
    k_quad: torch.Tensor,
    q_lin: torch.Tensor,
    k_lin: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor | None = None,
    *,
    state: MixedChunkState,
    normalizer: str = "tokens",
) -> torch.Tensor:
    """The next row of causal :func:`mixed_chunk_attention`, for one more token of each sequence.

    Every call does the same work, whatever the position, and decides nothing in Python, so that ``torch.compile`` needs
    one graph for all tokens.

    Args:
        q_quad, k_quad, q_lin, k_lin: `[B, S]`, positions already applied (``state.position`` is the token's).
        v: `[B, E]`; all of the dtype and device of ``state``.
        u: the gate, `[B, E]`, or None for 1.
        state: of the tokens before; this one is added.
        normalizer: "tokens" or "chunk_size". "chunks" depends on how many tokens follow.

    Returns:
        `[B, E]`, not differentiable.

    Raises:
        ValueError: a shape or ``normalizer`` is not as above.
        TypeError: an argument is not a tensor of the right dtype.

    >>> import torch, supy
    >>> x, v = torch.ones(1, 6, 4), torch.arange(1.0, 7.0).view(1, 6, 1)
    >>> state = supy.ops.MixedChunkState(1, 4, 1, chunk_size=2)
    >>> rows = [supy.ops.mixed_chunk_step(*[x[:, t]] * 4, v[:, t], state=state) for t in range(6)]
    >>> torch.cat(rows).flatten()
    tensor([ 2.,  6., 12., 20., 20., 32.])
    >>> supy.ops.mixed_chunk_attention(x, x, x, x, v, chunk_size=2, causal=True).flatten()
    tensor([ 2.,  6., 12., 20., 20., 32.])
    """
    op = "mixed_chunk_step"
    shapes = _check_state(op, state)
    for name, x in zip(_NAMES, (q_quad, k_quad, q_lin, k_lin), strict=True):
        shapes.match(name, x, "B S", state.v.dtype)
        shapes.same_device(name, x, "state", state.v)
    for name, x in (("v", v), ("u", u)):
        if x is not None:
            shapes.match(name, x, "B E", state.v.dtype)
            shapes.same_device(name, x, "state", state.v)
    check_options(op, 1, normalizer)
    follows = "normalizer is 'chunks', which depends on how many tokens follow, expected tokens or chunk_size"
    require(normalizer != "chunks", op, follows)
    return _step(q_quad, k_quad, q_lin, k_lin, v, u, state, normalizer)


@torch.no_grad()
def _step(q_quad, k_quad, q_lin, k_lin, v, u, state, normalizer):
    c, dtype, wide = state.chunk_size, state.v.dtype, state.current.dtype
    slot = state.position % c
    begins = (slot == 0)[:, None, None]
    state.before += state.current.masked_fill(~begins, 0)
    state.current.masked_fill_(begins, 0)
    state.k_quad.masked_fill_(begins, 0)  # so that what an earlier chunk left in v has the weight relu(0)
    sample = torch.arange(len(slot), device=slot.device)
    state.k_quad[sample, slot] = k_quad
    state.v[sample, slot] = v
    state.current += k_lin.to(wide)[:, :, None] * v.to(wide)[:, None]

    scores = (state.k_quad.to(wide) @ q_quad.to(wide)[:, :, None]).mT * default_scale(None, q_quad.shape[1])
    A = scores.relu_().square_() / c
    count = (state.position - slot).clamp(min=1) if normalizer == "tokens" else torch.full_like(slot, c)
    M = q_lin.to(wide)[:, None] @ state.before / count[:, None, None]
    row = (A.to(dtype) @ state.v + M)[:, 0]
    state.position += 1
    return (row if u is None else row * u).to(dtype)


def _check_state(op, state):
    if not isinstance(state, MixedChunkState):
        raise TypeError(f"supy.{op}: state is a {type(state).__name__}, expected a MixedChunkState")
    shapes = Shapes(op)
    shapes.match("state", state.current, "B S E")
    return shapes
