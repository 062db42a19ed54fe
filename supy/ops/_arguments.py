"""Checks of arguments that several operators take; they read shapes and dtypes only, never data."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

import torch

from supy._checks import Shapes, require
from supy._library import Gradient, Kernel, define

INTEGERS = (torch.int32, torch.int64)
NATIVE = (torch.float32, torch.bfloat16)  # what the C++ kernels read
TRITON = (*NATIVE, torch.float16)  # and the CUDA and Triton kernels


def check_lengths(shapes: Shapes, lengths: torch.Tensor | None, x: torch.Tensor) -> None:
    """``lengths`` is None or int `[B]` on the device of q, which is ``x``."""
    if lengths is not None:
        shapes.match("lengths", lengths, "B")
        check_integer(shapes, "lengths", lengths)
        shapes.same_device("lengths", lengths, "q", x)


def check_integer(shapes: Shapes, name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in INTEGERS:
        raise TypeError(
            f"supy.{shapes.op}: {name} has dtype {tensor.dtype}, expected torch.int32 or int64"
        )


def check_like(
    shapes: Shapes, name: str, tensor: torch.Tensor, dims: str, x: torch.Tensor
) -> None:
    """``tensor`` has these dimensions and the dtype and device of q, which is ``x``."""
    shapes.match(name, tensor, dims, x.dtype)
    shapes.same_device(name, tensor, "q", x)


def check_spans(shapes: Shapes, spans: torch.Tensor, x: torch.Tensor) -> None:
    """``spans`` is int64 `[N, 4]` on the device of q, which is ``x``."""
    shapes.match("spans", spans, "N 4", torch.int64)
    require(
        spans.shape[1] == 4, shapes.op, f"spans has shape {list(spans.shape)}, expected [N, 4]"
    )
    shapes.same_device("spans", spans, "q", x)


def check_targets(shapes: Shapes, scores: torch.Tensor, targets: torch.Tensor, dims: str) -> None:
    """``scores`` are floating-point with the axes ``dims`` at the end; ``targets`` have their shape, and no gradient."""
    op = shapes.op
    shapes.floating("scores", scores)
    shapes.tensor("targets", targets)
    shape = list(scores.shape)
    enough = scores.ndim >= len(dims.split())
    require(enough, op, f"scores has shape {shape}, expected [..., {dims.replace(' ', ', ')}]")
    agrees = targets.shape == scores.shape
    require(agrees, op, f"targets has shape {list(targets.shape)}, expected {shape} (from scores)")
    shapes.same_device("targets", targets, "scores", scores)
    require(
        not targets.requires_grad,
        op,
        "targets requires a gradient, which is not implemented: pass targets.detach()",
    )


def triton_kernel(module: str, name: str) -> Kernel:
    """The function of this name in ``supy.kernels.<module>``, imported when it is first called."""

    def run(*args):
        return getattr(importlib.import_module(f"supy.kernels.{module}"), name)(*args)

    return Kernel("CUDA", "triton", run, TRITON)


def unit_kernel(module: str, name: str, other: Callable) -> Kernel:
    """As `triton_kernel`, for a gated layer; ``other`` runs where rows of E or S cannot be read 16 bytes at a time."""
    kernel = triton_kernel(module, name)
    skipped = int(name.endswith("_backward"))  # the slope of the result, before x, w_in, w_out and gamma

    def run(*args):
        x, _, w_out, gamma = args[skipped : skipped + 4]
        E, S = w_out.shape[1], gamma.shape[1]
        aligned = E % 16 == 0 and S % 16 == 0 and min(x.numel(), E, S) > 0
        return (kernel.run if aligned else other)(*args)

    return replace(kernel, run=run)


def default_scale(scale: float | None, size: int) -> float:
    return float(max(size, 1) ** -0.5 if scale is None else scale)


def wants_gradient(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def unit_stride(x: torch.Tensor | None) -> torch.Tensor | None:
    """``x``, copied where its last axis is not contiguous: kernels read rows in one piece."""
    return x if x is None or x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous()


def check_unit(shapes: Shapes, x, w_in, w_out, gamma, beta, heads: str) -> None:
    """x `[B, T, D]`, w_in `[2 E + S, D]`, w_out `[D, E]`, gamma and beta `[heads, S]`: the tensors of a gated layer."""
    op = shapes.op
    shapes.floating("x", x)
    shapes.match("x", x, "B T D")
    shapes.match("w_out", w_out, "D E", x.dtype)
    shapes.match("gamma", gamma, f"{heads} S")
    shapes.match("beta", beta, f"{heads} S")
    shapes.match("w_in", w_in, "2E+S D", x.dtype)
    E, S = shapes["E"], shapes["S"]
    require(w_in.shape[0] == 2 * E + S, op, f"w_in has {w_in.shape[0]} rows, expected 2 E + S = {2 * E + S}")
    even = shapes[heads] == int(heads) and S % 2 == 0
    require(even, op, f"gamma has shape {list(gamma.shape)}, expected [{heads}, S] with S even")
    for name, tensor in (("w_in", w_in), ("w_out", w_out), ("gamma", gamma), ("beta", beta)):
        shapes.floating(name, tensor)
        shapes.same_device(name, tensor, "x", x)


def define_loss(
    name: str,
    tensors: tuple[str, ...],
    others: str,
    reference: Callable,
    fake: Callable,
    kernels: tuple[Kernel, ...] = (),
) -> Callable:
    """Registers a loss operator that returns (loss, *gradients for ``tensors``), and its backward.

    The forward pass knows all that the gradients need, so it computes them at once where its last
    argument, ``gradients``, says so; the backward operator scales them, on every backend that the
    loss has. It takes the tensors too, so that a second derivative finds it, and raises.
    """
    count = len(tensors)

    def save(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else backward is handed zeros for each of these outputs
        ctx.save_for_backward(*output[1:], *inputs[:count])
        ctx.others = len(inputs) - count

    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * (count + ctx.others)
        saved = ctx.saved_tensors
        if not _is_plain(grad):
            grads = run_backward(grad, *saved)
        elif _is_one(grad, saved):
            grads = saved[:count]
        else:
            grads = scale(grad, *saved)
        return *grads, *(None,) * ctx.others

    def scale(grad, *saved):
        scaled = torch._foreach_mul(saved[:count], grad)  # one kernel for all of them
        return tuple(d.to(x.dtype) for d, x in zip(scaled, saved[count:]))

    def fake_scale(grad, *saved):
        return tuple(x.new_empty(x.shape) for x in saved[count:])

    arguments = ", ".join(f"Tensor {x}" for x in tensors)
    saved = ", ".join(f"Tensor d{x}" for x in tensors)
    run_backward = define(
        f"{name}_backward(Tensor grad, {saved}, {arguments}) -> ({', '.join(['Tensor'] * count)})",
        scale,
        fake=fake_scale,
        kernels=tuple(replace(kernel, run=scale) for kernel in kernels),
    )
    return define(
        f"{name}({arguments}, {others}, bool gradients) -> ({', '.join(['Tensor'] * (count + 1))})",
        reference,
        fake=fake,
        gradient=Gradient(save, backward),
        kernels=kernels,
    )


def _is_plain(grad: torch.Tensor) -> bool:
    """Whether the dispatcher would only run the kernel: nothing records, traces or transforms."""
    if type(grad) is not torch.Tensor or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not torch._C._len_torch_dispatch_stack() and torch._C._functorch.peek_interpreter_stack() is None


def _is_one(grad: torch.Tensor, saved: tuple[torch.Tensor, ...]) -> bool:
    """Whether scaling the saved gradients would only copy them, as after ``loss.backward()``; the CPU is asked alone."""
    return grad.device.type == "cpu" and saved[0].dtype == saved[-1].dtype and grad.item() == 1


def fake_spans(q, *_):
    count = torch.library.get_ctx().new_dynamic_size()
    return q.new_empty(count, 4, dtype=torch.int64), q.new_empty(count)
