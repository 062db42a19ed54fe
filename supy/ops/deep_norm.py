"""The sum of a residual branch, normalised."""

from __future__ import annotations


import torch

from supy import _extension
from supy._checks import Shapes, require
from supy._library import Gradient, Kernel, define, is_plain
from supy.ops._arguments import TRITON as DTYPES
from supy.ops._arguments import triton_kernel
from supy.ops._steps import check_stream
from supy.reference import deep_norm as reference

OP = "deep_norm"
KINDS = ("layer", "rms")


# --- the operators, to which alpha and the seed are tensors with one number -------------------------------------------

_ARGUMENTS = "Tensor x, Tensor branch, Tensor alpha, Tensor? weight, Tensor? bias, Tensor? seed, SymInt offset"
_ARGUMENTS += ", float dropout, float eps, bool rms"


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _gradients(x, weight, bias, wanted):
    """For x, branch, weight and bias; without elements where not wanted, as where there is no weight or bias."""
    sources = x, x, weight, bias
    return tuple(_like(part) if want else x.new_empty(0) for part, want in zip(sources, wanted))


def _reference(*arguments):
    return reference.deep_norm(*arguments).contiguous()


def _reference_backward(grad, x, branch, alpha, weight, bias, *arguments):
    *arguments, wanted = arguments
    parts = reference.deep_norm_backward(grad, x, branch, alpha, weight, bias, *arguments)
    into = _gradients(x, weight, bias, wanted)
    return tuple(out.copy_(part) if want else out for part, out, want in zip(parts, into, wanted))


def _number(tensor, x, dtype):
    """A tensor's one number; where both are in GPU memory the tensor, because a kernel reads it without waiting."""
    return tensor.to(dtype) if tensor.is_cuda and x.is_cuda else tensor.item()


def _cpp(x, branch, alpha, weight, bias, seed, *others):
    out = _like(x)
    x, branch, weight, bias = _contiguous(x, branch, weight, bias)
    numbers = _number(alpha, x, torch.float32), weight, bias, seed if seed is None else _number(seed, x, torch.int64)
    _extension.C.deep_norm(x, branch, *numbers, *others, out, None, None)
    return out


def _cpp_backward(grad, x, branch, alpha, weight, bias, seed, *others):
    *others, wanted = others
    parts = _gradients(x, weight, bias, wanted)
    if x.numel() == 0:
        return tuple(part.zero_() for part in parts)
    grad, x, branch, weight, bias = _contiguous(grad, x, branch, weight, bias)
    numbers = _number(alpha, x, torch.float32), weight, bias, seed if seed is None else _number(seed, x, torch.int64)
    into = (part if want else None for part, want in zip(parts, wanted))
    _extension.C.deep_norm_backward(grad, x, branch, *numbers, *others, *into, None, None, None, _partial(grad))
    return parts


def _partial(grad):
    """Where the CUDA kernel keeps the sums of some of the rows."""
    if not grad.is_cuda:
        return None
    width = grad.shape[-1]
    count = _extension.C.deep_norm_partials(grad.numel() // width)
    return torch.empty(2, count, width, dtype=torch.float32, device=grad.device)


def _contiguous(*tensors):
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def _save(ctx, inputs, output):
    x, branch, alpha, weight, bias, seed, *ctx.others = inputs
    ctx.save_for_backward(x, branch, alpha, weight, bias, seed)


def _backward(ctx, grad):
    dx, dbranch, _, dweight, dbias = ctx.needs_input_grad[:5]
    wanted = [dx, dbranch, dweight, dbias]
    parts = _deep_norm_backward(grad, *ctx.saved_tensors, *ctx.others, wanted)
    dx, dbranch, dweight, dbias = (part if want else None for part, want in zip(parts, wanted))
    return dx, dbranch, None, dweight, dbias, *(None,) * 5


_deep_norm_backward = define(
    f"deep_norm_backward(Tensor grad, {_ARGUMENTS}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    _reference_backward,
    fake=lambda grad, x, branch, alpha, weight, bias, *others: _gradients(x, weight, bias, others[-1]),
    kernels=(
        Kernel("CPU", "cpp", _cpp_backward, DTYPES),
        Kernel("CUDA", "cuda", _cpp_backward, DTYPES),
        triton_kernel("deep_norm", "deep_norm_backward"),
    ),
)
_deep_norm = define(
    f"deep_norm({_ARGUMENTS}) -> Tensor",
    _reference,
    fake=lambda x, *_: _like(x),
    gradient=Gradient(_save, _backward),
    kernels=(
        Kernel("CPU", "cpp", _cpp, DTYPES),
        Kernel("CUDA", "cuda", _cpp, DTYPES),
        triton_kernel("deep_norm", "deep_norm"),
    ),
)


class _Direct(torch.autograd.Function):
    """The same for plain tensors, without the dispatcher, whose way to a gradient takes longer than 100,000 numbers."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, alpha, *others):
        out = torch.empty_like(x)
        rstd = mean = None
        if x.is_cpu:
            if x.dtype is torch.float32:  # then out may be enough for the gradients
                rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
            elif not others[-1]:  # rms
                rstd, mean = (torch.empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
        if _extension.C.deep_norm(x, branch, alpha, weight, bias, *others, out, rstd, mean):
            ctx.save_for_backward(None, None, weight, bias, out, rstd, None)
        else:
            ctx.save_for_backward(x, branch, weight, bias, None, rstd if mean is not None else None, mean)
        ctx.numbers = alpha, others
        return out

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            parts = _Derivative.apply(grad, *saved, ctx.numbers, wanted)
        else:
            parts = _derivative(grad, *saved, ctx.numbers, wanted)
        return *parts, None, None, None, None, None, None


class _Derivative(torch.autograd.Function):
    """What a second derivative finds."""

    @staticmethod
    def forward(ctx, *arguments):
        return _derivative(*arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("supy.deep_norm has no implementation of a second derivative")


def _derivative(grad, x, branch, weight, bias, out, rstd, mean, numbers, wanted):
    """Gradients for x, branch, weight and bias, or None."""
    alpha, others = numbers
    dx, dbranch, dweight, dbias = wanted
    # With alpha = 1 x and branch have the same gradient, which may be one tensor, as that of an addition is.
    shared = dx and dbranch and not isinstance(alpha, torch.Tensor) and alpha == 1 and not others[2]  # dropout
    grad = grad.contiguous()
    dx = torch.empty_like(grad) if dx and not shared else None
    dbranch = torch.empty_like(grad) if dbranch else None
    dweight = torch.empty_like(weight) if dweight else None
    dbias = torch.empty_like(bias) if dbias else None
    if grad.numel():
        rest = dx, dbranch, dweight, dbias, out, rstd, mean, _partial(grad)
        _extension.C.deep_norm_backward(grad, x, branch, alpha, weight, bias, *others, *rest)
    else:
        for part in (dweight, dbias):
            if part is not None:
                part.zero_()
    return dbranch if shared else dx, dbranch, dweight, dbias


def _records(*tensors):
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


# --- the public function ----------------------------------------------------------------------------------------------


def deep_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    alpha: float | torch.Tensor = 1.0,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    kind: str = "layer",
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
    offset: int = 0,
) -> torch.Tensor:
    """Norm(alpha * x + branch) over the last axis, in one pass over memory (post 8978; arXiv 2203.00555).

    With z = alpha x + branch, ``"layer"`` is (z - mean(z)) / sqrt(var(z) + eps) * weight + bias and ``"rms"`` is
    z / sqrt(mean(z^2) + eps) * weight + bias. x is the input of a residual block and branch what the block computes
    from it. The branch that grows in during training, x + a F with a from 0 to 1 (post 8998), is
    ``deep_norm(F, x, a)``.

    Args:
        x: `[..., D]`, any floating-point dtype. Half precision computes in float32.
        branch: of the shape of x; another floating-point dtype is converted to that of x.
        alpha: a number, or a tensor with one; it is not differentiated. It may change from step to step: a graph of
            torch.compile is made twice at the most, for the first number and for all others.
        weight, bias: `[D]`, of the dtype of x or float32; or None.
        eps: at least 0.
        kind: ``"layer"`` or ``"rms"``.
        dropout: share of the elements of branch that are set to 0, from 0 to less than 1; the others are divided by
            1 - dropout. The mask is computed anew for the gradients, not kept.
        seed, offset: elements take the numbers offset, offset + 1, ... of the stream ``seed`` of
            :func:`philox_normal`'s generator: the same mask on every backend. A seed may be an int64 tensor with one
            number; with dropout there must be one.

    Returns:
        A contiguous tensor like x. Differentiable once with respect to x, branch, weight and bias. For that it keeps
        x and branch (and on a CPU two numbers a row in half precision) or, in float32 on a CPU, itself and one number a
        row instead, so that changing it in place before the backward pass raises autograd's error; never the mask. The
        gradients of weight and bias have the same bits for any number of threads.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree; a number is out of its range; alpha asks for a
            gradient; dropout without a seed.

    >>> import torch, supy
    >>> supy.ops.deep_norm(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0]), 2.0, eps=0.0)
    tensor([-1.,  1.])
    """
    known = x is not None and branch is not None and kind in KINDS
    if known and is_plain(x, branch, weight, bias, gradients=True, cuda=True) and x.dtype in DTYPES:
        out = _directly(x, branch, weight, bias, alpha, seed, offset, dropout, eps, kind == "rms")
        if out is not None:
            return out
    shapes = Shapes(OP)
    shapes.floating("x", x)
    require(x.ndim > 0, OP, "x has shape [], expected [..., D]")
    shapes.floating("branch", branch)
    agrees = branch.shape == x.shape
    require(agrees, OP, f"branch has shape {list(branch.shape)}, expected {list(x.shape)} (from x)")
    shapes.same_device("branch", branch, "x", x)
    shapes.sizes["D"], shapes.origin["D"] = x.shape[-1], "x"
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            shapes.match(name, tensor, "D")
            shapes.same_device(name, tensor, "x", x)
            if tensor.dtype not in (x.dtype, torch.float32):
                expected = f"{x.dtype} (from x) or torch.float32"
                raise TypeError(f"supy.{OP}: {name} has dtype {tensor.dtype}, expected {expected}")
    require(kind in KINDS, OP, f"kind is {kind!r}, expected 'layer' or 'rms'")
    eps = _float("eps", eps)
    require(eps >= 0, OP, f"eps is {eps}, expected at least 0")
    dropout = _float("dropout", dropout)
    require(0 <= dropout < 1, OP, f"dropout is {dropout}, expected 0 to less than 1")
    if dropout:
        require(seed is not None, OP, "dropout needs a seed")
        seed = _seed(seed, offset)
    else:
        seed = None
    branch = branch if branch.dtype == x.dtype else branch.to(x.dtype)
    return _deep_norm(x, branch, _alpha(alpha), weight, bias, seed, offset, dropout, eps, kind == "rms")


def _directly(x, branch, weight, bias, alpha, seed, offset, dropout, eps, rms):
    """None where an argument is not what the kernel takes, before anything was computed."""
    if isinstance(alpha, torch.Tensor):
        alpha = _number(_alpha(alpha), x, torch.float32)
    if not dropout:
        seed = None
    elif isinstance(seed, torch.Tensor):
        seed = _number(_seed(seed, offset), x, torch.int64)
    if branch.dtype != x.dtype and branch.is_floating_point():
        branch = branch.to(x.dtype)
    try:
        if _records(x, branch, weight, bias):
            return _Direct.apply(x, branch, weight, bias, alpha, seed, offset, dropout, eps, rms)
        out = torch.empty_like(x)
        _extension.C.deep_norm(x, branch, alpha, weight, bias, seed, offset, dropout, eps, rms, out, None, None)
        return out
    except (TypeError, ValueError):
        return None  # what follows copes with it, or says what is wrong


def _alpha(alpha) -> torch.Tensor:
    """A tensor with one number."""
    if isinstance(alpha, torch.Tensor):
        if not alpha.is_floating_point():
            raise TypeError(f"supy.{OP}: alpha has dtype {alpha.dtype}, expected a floating-point dtype")
        require(alpha.numel() == 1, OP, f"alpha has shape {list(alpha.shape)}, expected one number")
        wanted = torch.is_grad_enabled() and alpha.requires_grad
        require(not wanted, OP, "alpha requires a gradient, which is not implemented: detach it")
        return alpha
    if torch.compiler.is_compiling():
        # Dynamo keeps a number that changes as a symbol only where it meets a tensor in arithmetic.
        return torch.ones((), dtype=torch.float64) * alpha
    return torch.tensor(_float("alpha", alpha), dtype=torch.float64)


def _seed(seed, offset) -> torch.Tensor:
    if not isinstance(seed, torch.Tensor):
        check_stream(OP, seed, offset)
        return torch.full((), seed, dtype=torch.int64)
    check_stream(OP, 0, offset)
    if seed.dtype != torch.int64:
        raise TypeError(f"supy.{OP}: seed has dtype {seed.dtype}, expected torch.int64")
    require(seed.numel() == 1, OP, f"seed has shape {list(seed.shape)}, expected one number")
    return seed


def _float(name: str, value: object) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"supy.{OP}: {name} is a {type(value).__name__}, expected a float") from None
