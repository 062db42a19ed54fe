"""The layer of FLASH as one operator."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F

from supy import _extension
from supy._checks import Shapes
from supy._library import Gradient, Kernel, define
from supy.ops._arguments import NATIVE, TRITON, check_lengths, check_unit, wants_gradient
from supy.ops.mixed_chunk_attention import OPTIONS, check_options, chunk_weights
from supy.ops.rotary import arange_table
from supy.reference import mixed_chunk_layer as reference
from supy.reference._masks import check_lengths as check_values
from supy.reference._masks import wide

_TENSORS = "Tensor x, Tensor w_in, Tensor w_out, Tensor gamma, Tensor beta, Tensor cosine, Tensor sine"
_SEGMENT = 1024  # tokens whose u, v and z are in memory at once on the CPU
_KEPT = 1 << 25  # bytes of x w_in^T that are kept for the gradient there, of each sample's first tokens


def _save(ctx, inputs, output):
    *tensors, lengths, chunk_size, causal, normalizer, segment, keep = inputs
    ctx.options = chunk_size, causal, normalizer, segment, keep
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:], lengths)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 13
    return *_layer_backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 8


def _fake(x, w_in, w_out, gamma, beta, cosine, sine, lengths, chunk_size, causal, normalizer, segment, keep):
    B, T, _ = x.shape
    count = -(-T // segment) if segment else 0
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = x.new_empty((count, B, gamma.shape[1], w_out.shape[1]) if segment else 0, dtype=precise)
    h = x.new_empty((B, keep, w_in.shape[0]) if keep else 0)
    return x.new_empty(x.shape), sums, h


def _fake_backward(grad, x, w_in, w_out, gamma, beta, *_):
    return tuple(t.new_empty(t.shape) for t in (x, w_in, w_out, gamma, beta))


def _kept_tokens(x, w_in, segment):
    """T, or as many segments as there is room for."""
    B, T, _ = x.shape
    room = _KEPT // max(B * w_in.shape[0] * x.element_size(), 1)
    if room >= T:
        return T
    return room // segment * segment if segment else 0


def segment_of(chunk_size: int) -> int:
    return max(_SEGMENT // chunk_size, 1) * chunk_size


class _Pieces:
    """The tokens in pieces of about a segment: several short samples, or one sample's segments, and all of it where the
    form is not causal. Rows are tokens of all samples of a piece; what is as large as them is in memory once."""

    def __init__(self, x, w_in, w_out, gamma, beta, cosine, sine, lengths, *options):
        chunk_size, causal, normalizer, segment, keep = options
        B, T, self.D = x.shape
        self.step = min(segment_of(chunk_size), T) if causal else T
        self.samples = min(max(_SEGMENT // T, 1), B)
        self.x, self.w_in, self.w_out = x, w_in.contiguous(), w_out.contiguous()
        self.gamma, self.beta, self.cosine, self.sine = gamma, beta, cosine, sine
        self.lengths, self.chunk_size, self.causal = lengths, chunk_size, causal
        self.has_sums, self.kept = segment > 0, keep
        self.weights = chunk_weights(x, lengths, chunk_size, causal, normalizer)
        self.running = x.new_empty(self.samples, gamma.shape[1], w_out.shape[1], dtype=torch.float32)
        self._memory = {}

    def __iter__(self):
        """Samples, and the segments of each: (index, tokens)."""
        B, T, _ = self.x.shape
        for b in range(0, B, self.samples):
            segments = [slice(t, min(t + self.step, T)) for t in range(0, T, self.step)]
            yield slice(b, min(b + self.samples, B)), list(enumerate(segments))

    def new(self, name, samples, tokens, columns):
        """`[samples, tokens, columns]`, in memory that the same name of another piece has held."""
        if name not in self._memory:
            self._memory[name] = self.x.new_empty(self.samples * self.step * columns)
        shape = samples.stop - samples.start, tokens.stop - tokens.start, columns
        return self._memory[name][: shape[0] * shape[1] * columns].view(shape)

    def work(self, gradients):
        """What the kernel works in; the first piece is the largest."""
        if "work" not in self._memory:
            sizes = self.samples, self.step, self.gamma.shape[1], self.w_out.shape[1], self.chunk_size
            kind = self.causal, gradients, self.x.dtype == torch.bfloat16
            count = _extension.C.mixed_chunk_attention_floats(*sizes, *kind)
            self._memory["work"] = self.x.new_empty(count, dtype=torch.float32)
        return self._memory["work"]

    def product(self, name, rows, weight, samples, tokens):
        out = self.new(name, samples, tokens, weight.shape[1])
        torch.mm(rows, weight, out=out.view(-1, weight.shape[1]))
        return out

    def rows(self, x, samples, tokens):
        return x[samples, tokens].reshape(-1, x.shape[2])

    def heads(self, z, tokens):
        return reference.rotated(z, self.gamma, self.beta, self.cosine[tokens], self.sine[tokens], _rotary)

    def options(self, samples, tokens):
        chunks = slice(tokens.start // self.chunk_size, -(-tokens.stop // self.chunk_size))
        inside = None
        if self.lengths is not None:
            inside = (self.lengths[samples] - tokens.start).clamp(0, tokens.stop - tokens.start)
        return inside, self.weights[samples, chunks], self.chunk_size, self.causal


def _cpp(x, w_in, w_out, gamma, beta, cosine, sine, lengths, *given):
    tensors = x, w_in, w_out, gamma, beta, cosine, sine, lengths
    if min(t.numel() for t in tensors[:4]) == 0:
        return reference.mixed_chunk_layer(*tensors, *given)
    check_values("mixed_chunk_layer", lengths, x.shape[1])
    out, sums, kept = _fake(*tensors, *given)
    pieces = _Pieces(*tensors, *given)
    for samples, segments in pieces:
        running = pieces.running[: samples.stop - samples.start].zero_()
        for i, tokens in segments:
            if pieces.has_sums:
                sums[i, samples] = running
            h = pieces.product("h", pieces.rows(x, samples, tokens), pieces.w_in.mT, samples, tokens)
            if tokens.stop <= pieces.kept:
                kept[samples, tokens] = h
            u, v, z = reference.split(F.silu(h, inplace=True), w_out)
            inputs = [*pieces.heads(z, tokens), v, u]
            attended = pieces.new("attended", samples, tokens, u.shape[2])
            options = pieces.options(samples, tokens)
            _extension.C.mixed_chunk_attention(inputs, *options, attended, running, running, pieces.work(False))
            to = out[samples, tokens].view(-1, pieces.D)
            torch.mm(attended.view(-1, u.shape[2]), pieces.w_out.mT, out=to)
    return out, sums, kept


def _cpp_backward(grad, x, w_in, w_out, gamma, beta, cosine, sine, sums, kept, lengths, *given):
    tensors = x, w_in, w_out, gamma, beta, cosine, sine
    if min(t.numel() for t in tensors[:4]) == 0:
        return reference.mixed_chunk_layer_backward(grad, *tensors, sums, kept, lengths, *given)
    dx = x.new_empty(x.shape)
    dw_in, dw_out, dgamma, dbeta = (torch.zeros_like(wide(t)) for t in (w_in, w_out, gamma, beta))
    pieces = _Pieces(*tensors, lengths, *given)
    for samples, segments in pieces:
        running = pieces.running[: samples.stop - samples.start].zero_()
        for i, tokens in reversed(segments):
            rows, grad_rows = pieces.rows(x, samples, tokens), pieces.rows(grad, samples, tokens)
            if tokens.stop <= pieces.kept:
                h = kept[samples, tokens]
            else:
                h = pieces.product("h", rows, pieces.w_in.mT, samples, tokens)
            activated = pieces.new("activated", samples, tokens, h.shape[2])
            u, v, z = reference.split(torch.ops.aten.silu.out(h, out=activated), w_out)
            dh = pieces.new("dh", samples, tokens, h.shape[2])
            du, dv, dz = reference.split(dh, w_out)
            dheads = pieces.new("dheads", samples, tokens, 4 * z.shape[2]).view(len(z), 4, *z.shape[1:])
            attended = pieces.new("attended", samples, tokens, u.shape[2])
            dattended = pieces.product("dattended", grad_rows, pieces.w_out, samples, tokens)
            inputs, outputs = [*pieces.heads(z, tokens), v, u], [*dheads.unbind(1), dv, du, attended]
            before = sums[i, samples] if pieces.has_sums else None
            options = pieces.options(samples, tokens)
            _extension.C.mixed_chunk_attention_backward(
                dattended, inputs, *options, outputs, before, running, running, pieces.work(True)
            )
            table = cosine[tokens], sine[tokens]
            dz_piece, dgamma_piece, dbeta_piece = reference.rotated_backward(dheads, z, gamma, *table, _rotary)
            dz.copy_(dz_piece)
            torch.ops.aten.silu_backward.grad_input(dh, h, grad_input=dh)
            dh = dh.view(-1, dh.shape[2])
            torch.mm(dh, pieces.w_in, out=dx[samples, tokens].view(-1, pieces.D))
            _add_product(dw_in, dh, rows)
            _add_product(dw_out, grad_rows, attended.view(-1, u.shape[2]))
            dgamma += dgamma_piece
            dbeta += dbeta_piece
    return dx, *(d.to(t.dtype) for d, t in ((dw_in, w_in), (dw_out, w_out), (dgamma, gamma), (dbeta, beta)))


def _add_product(total, a, b):
    """total += a^T b, with the sum over segments in float32."""
    if total.dtype == a.dtype:
        total.addmm_(a.mT, b)
    else:
        total += a.mT @ b


_rotary = torch.ops.supy.rotary.default
_attention = torch.ops.supy.mixed_chunk_attention.default
# On CUDA the projections are torch's own products, and the attention between them is supy's operator.
_cuda = functools.partial(reference.mixed_chunk_layer, attention=_attention)
_cuda_backward = functools.partial(
    reference.mixed_chunk_layer_backward,
    attention=_attention,
    attention_backward=torch.ops.supy.mixed_chunk_attention_backward.default,
)

_layer = define(
    f"mixed_chunk_layer({_TENSORS}, Tensor? lengths, {OPTIONS}, int segment, SymInt keep) -> (Tensor, Tensor, Tensor)",
    reference.mixed_chunk_layer,
    fake=_fake,
    gradient=Gradient(_save, _backward),
    kernels=(Kernel("CPU", "cpp", _cpp, NATIVE), Kernel("CUDA", "triton", _cuda, TRITON)),
)
_layer_backward = define(
    f"mixed_chunk_layer_backward(Tensor grad, {_TENSORS}, Tensor sums, Tensor h, Tensor? lengths, {OPTIONS}, "
    "int segment, SymInt keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.mixed_chunk_layer_backward,
    fake=_fake_backward,
    kernels=(Kernel("CPU", "cpp", _cpp_backward, NATIVE), Kernel("CUDA", "triton", _cuda_backward, TRITON)),
)


def mixed_chunk_layer(
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    *,
    chunk_size: int = 256,
    causal: bool = False,
    lengths: torch.Tensor | None = None,
    normalizer: str = "tokens",
) -> torch.Tensor:
    """The whole layer of FLASH (post 8934; arXiv 2202.10447), which :class:`supy.nn.MixedChunkAttention` runs.

        (u, v, z) = swish(x w_in^T),  q_quad, k_quad, q_lin, k_lin = rotary(gamma_i z + beta_i)
        y = (u * (quadratic + linear)) w_out^T    with both parts as in :func:`supy.ops.mixed_chunk_attention`

    Of x w_in^T no more than 32 MB are kept for the gradient, which computes the rest again. On the CPU the causal form
    takes some hundred tokens at a time, forward and backward, so that its memory is that of x, y, their gradients and
    little more.

    Args:
        x: `[B, T, D]`, any floating-point dtype.
        w_in, w_out: `[2 E + S, D]` (rows for u, v and z) and `[D, E]`, in the dtype of x; S even.
        gamma, beta: `[4, S]`, floating-point.
        chunk_size, causal, lengths, normalizer: as in :func:`supy.ops.mixed_chunk_attention`.

    Returns:
        `[B, T, D]` in the dtype of x; 0 at and beyond a sample's length. Differentiable once in x, w_in, w_out, gamma
        and beta.

    Raises:
        ValueError, TypeError: a shape, dtype or option is not as above.

    >>> import torch, supy
    >>> x, w_in, w_out = torch.ones(1, 3, 4), torch.ones(2 * 5 + 2, 4), torch.ones(4, 5)
    >>> supy.ops.mixed_chunk_layer(x, w_in, w_out, torch.zeros(4, 2), torch.ones(4, 2), chunk_size=1, causal=True).shape
    torch.Size([1, 3, 4])
    """
    op = "mixed_chunk_layer"
    shapes = Shapes(op)
    check_unit(shapes, x, w_in, w_out, gamma, beta, "4")
    check_lengths(shapes, lengths, x)
    check_options(op, chunk_size, normalizer)
    tensors = x, w_in, w_out, gamma, beta
    # CUDA computes everything again, of all tokens at once.
    saves = x.device.type == "cpu" and wants_gradient(*tensors)
    segment = segment_of(chunk_size) if saves and causal else 0
    keep = _kept_tokens(x, w_in, segment) if saves else 0
    table = arange_table(x, shapes["T"], shapes["S"] // 2)
    return _layer(*tensors, *table, lengths, chunk_size, causal, normalizer, segment, keep)[0]
