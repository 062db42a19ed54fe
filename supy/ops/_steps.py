"""What the diffusion steps share: their operators, the checks of their arguments, and how they reach the kernels.

A step is registered four times: with a result and a gradient; as ``<name>_out``, which writes into a tensor it is
given and records no gradient; as ``<name>_backward``; and as ``<name>_limits``, the quantiles of dynamic thresholding.
A coefficient is a number of ``scalars`` or a tensor `[B]` or `[]` of ``tables``, in the order of the step's formula.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch

from supy import _extension
from supy._checks import Shapes, require
from supy._library import Gradient, Kernel, define, is_plain
from supy.ops._arguments import TRITON as DTYPES
from supy.reference import _steps as reference
from supy.reference.philox_normal import philox_normal as reference_noise

Coefficient = float | torch.Tensor
FORMS = ("ddpm_add_noise", "ddpm_step", "ddim_step")  # in the order of StepForm, kernels/common/step_weights.h


class Step:
    """One kind of step: its name, its coefficients, the weights that they make, and a check of their values."""

    def __init__(self, name: str, coefficients: tuple[str, ...], weights: Callable, check_values: Callable):
        self.name, self.coefficients, self.form = name, coefficients, FORMS.index(name)
        self.label = "x0" if self.form == 0 else "x"
        self.weights_of, self.check_values = weights, check_values
        inputs = "Tensor x, Tensor? eps, Tensor? noise, Tensor?[] tables, float[] scalars, Tensor? limits, float? clip"
        self.run = define(
            f"{name}({inputs}, SymInt? seed, SymInt offset) -> Tensor",
            self._new(self._reference_out),
            fake=lambda x, *_: torch.empty_like(x),
            gradient=Gradient(_save, self._backward),
            kernels=self._kernels(self._new(self._cpp_out), lambda kernel: self._new(kernel), "steps"),
        )
        self.write = define(
            f"{name}_out({inputs}, SymInt? seed, SymInt offset, Tensor(a!) out, Tensor(b!)? made_noise) -> ()",
            self._reference_out,
            fake=lambda *_: None,
            kernels=self._kernels(self._cpp_out, lambda kernel: kernel, "steps"),
        )
        self.run_backward = define(
            f"{name}_backward(Tensor grad, {inputs}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
            self._reference_backward,
            fake=lambda grad, *arguments: _gradients(grad, arguments[-1]),
            kernels=self._kernels(self._cpp_backward, lambda kernel: kernel, "steps_backward"),
        )
        self.run_limits = define(
            f"{name}_limits({inputs}, float quantile) -> Tensor",
            self._reference_limits,
            fake=lambda x, *_: x.new_empty(x.shape[:1], dtype=_limit_dtype(x)),
            kernels=self._kernels(self._cpp_limits, lambda kernel: kernel, "limits"),
        )

    def __call__(self, x, eps, coefficients, noise, seed, offset, clip, threshold, out, made_noise=None):
        """Checks everything but values, which the operators do."""
        name = self.name
        scalars, tables = coefficients, None
        if any(isinstance(value, torch.Tensor) for value in coefficients):
            tables = [value if isinstance(value, torch.Tensor) else None for value in coefficients]
            scalars = [math.nan if table is not None else value for table, value in zip(tables, coefficients)]
        if threshold is None and is_plain(x, eps, noise, out, *(tables or ())):
            into = torch.empty_like(x) if out is None else out
            try:
                _extension.C.ddpm_steps(
                    self.form, x, eps, noise, tables, scalars, None, clip, seed, offset, into, made_noise
                )
            except (TypeError, ValueError):
                pass  # before anything was written; what follows copes with it, or says what is wrong
            else:
                return into if out is None else changed(out)
        shapes = Shapes(name)
        shapes.floating(self.label, x)
        for other, tensor in (("eps", eps), ("noise", noise), ("out", out)):
            if tensor is not None or (other == "eps" and self.form):
                _check_like(shapes, other, tensor, self.label, x)
        tables = [None] * len(coefficients) if tables is None else tables
        named = list(zip(self.coefficients, tables, scalars))
        tables = [None if table is None else self._table(which, table, x) for which, table, _ in named]
        scalars = [math.nan if table is not None else _number(name, which, value) for which, table, value in named]
        require(noise is None or seed is None, name, "got both noise and seed, expected one of them")
        if seed is not None:
            check_stream(name, seed, offset)
        if threshold is not None:
            threshold, clip = _number(name, "threshold", threshold), 1.0 if clip is None else clip
            require(0 <= threshold <= 1, name, f"threshold is {threshold}, expected a quantile from 0 to 1")
            require(x.ndim > 0, name, "x has shape [], expected a first axis of samples with threshold")
        if clip is not None:
            clip = _number(name, "clip", clip)
            require(clip > 0, name, f"clip is {clip}, expected more than 0")
        limits = None
        if threshold is not None:
            with torch.no_grad():
                limits = self.run_limits(x, eps, None, tables, scalars, None, clip, threshold)
        arguments = x, eps, noise, tables, scalars, limits, clip, seed, offset
        leaves = [tensor for tensor in (x, eps, noise, out) if tensor is not None]
        differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in leaves)
        if differentiated:
            require(out is None, name, "out= records no gradient, but a tensor requires one: use torch.no_grad()")
            return self.run(*arguments)
        into = torch.empty_like(x) if out is None else out
        self.write(*arguments, into, made_noise)
        return into if out is None else changed(out)

    def _table(self, name, table, x):
        if not table.is_floating_point():
            raise TypeError(f"supy.{self.name}: {name} has dtype {table.dtype}, expected a floating-point dtype")
        agrees = table.ndim == 0 or (table.ndim == 1 and x.ndim > 0 and table.shape[0] == x.shape[0])
        expected = f"[] or [{x.shape[0]}]" if x.ndim else "[]"
        require(agrees, self.name, f"{name} has shape {list(table.shape)}, expected {expected} (from {self.label})")
        wanted = torch.is_grad_enabled() and table.requires_grad
        require(not wanted, self.name, f"{name} requires a gradient, which is not implemented: detach it")
        if table.dtype in (torch.float16, torch.bfloat16):
            table = table.float()
        return table if table.device == x.device else table.to(x.device)

    # --- what runs ---

    def _new(self, write: Callable) -> Callable:
        """A function that writes, as one with a result."""

        def run(*arguments):
            out = torch.empty_like(arguments[0])
            write(*arguments, out, None)
            return out

        return run

    def _kernels(self, cpp, wrap, name):
        def triton(*arguments):
            return getattr(importlib.import_module("supy.kernels.ddpm_steps"), name)(self.weights, *arguments)

        cuda = Kernel("CUDA", "cuda", cpp, DTYPES)
        return Kernel("CPU", "cpp", cpp, DTYPES), cuda, Kernel("CUDA", "triton", wrap(triton), DTYPES)

    def _cpp_out(self, x, eps, noise, tables, scalars, limits, clip, seed, offset, out, made_noise):
        dense = out if out.is_contiguous() else out.new_empty(out.shape)
        x, eps, noise = _contiguous(x), _contiguous(eps), _contiguous(noise)
        _extension.C.ddpm_steps(
            self.form, x, eps, noise, tables, scalars, limits, clip, seed, offset, dense, made_noise
        )
        if dense is not out:
            out.copy_(dense)

    def _cpp_backward(self, grad, x, eps, noise, tables, scalars, limits, clip, wanted):
        grad, x, eps = _contiguous(grad), _contiguous(x), _contiguous(eps)
        parts = _gradients(grad, wanted)
        into = (part if want else None for part, want in zip(parts, wanted))
        _extension.C.ddpm_steps_backward(self.form, grad, x, eps, tables, scalars, limits, clip, *into)
        return parts

    def _cpp_limits(self, x, eps, noise, tables, scalars, limits, clip, quantile):
        limits = x.new_full(x.shape[:1], clip, dtype=torch.float32)
        x, eps = _contiguous(x), _contiguous(eps)
        _extension.C.ddpm_steps_limits(self.form, x, eps, tables, scalars, clip, quantile, limits)
        return limits

    def weights(self, device, tables, scalars, clipped: bool, noisy: bool) -> reference.Weights:
        """Float64 weights `[B]` or `[1]`, after a check of the coefficients that are in CPU memory."""
        values = [
            torch.tensor([scalar], dtype=torch.float64, device=device) if table is None else table.double().view(-1)
            for table, scalar in zip(tables, scalars)
        ]
        readable = not any(table is not None and table.is_cuda for table in tables)
        if readable:
            self.check_values(self.name, values, clipped)
        weights = self.weights_of(*torch.broadcast_tensors(*values), clipped)
        if not noisy:
            known = "the weight of the noise is in GPU memory and not looked at: pass noise or seed"
            require(readable, self.name, known)
            silent = not bool((weights.noise != 0).any())
            require(silent, self.name, "the noise has a weight other than 0: pass noise or seed")
        return weights

    def _reference_out(self, x, eps, noise, tables, scalars, limits, clip, seed, offset, out, made_noise):
        weights = self.weights(x.device, tables, scalars, clip is not None, noise is not None or seed is not None)
        if seed is not None:
            noise = torch.empty(x.shape, dtype=x.dtype, device=x.device) if made_noise is None else made_noise
            reference_noise(noise, seed, offset)
        out.copy_(reference.step(x, eps, noise, weights, limits, clip))

    def _reference_backward(self, grad, x, eps, noise, tables, scalars, limits, clip, wanted):
        weights = self.weights(x.device, tables, scalars, clip is not None, True)
        parts = reference.step_backward(grad, x, eps, weights, limits, clip)
        return tuple(part if want else part.new_empty(0) for part, want in zip(parts, wanted))

    def _reference_limits(self, x, eps, noise, tables, scalars, limits, clip, quantile):
        weights = self.weights(x.device, tables, scalars, True, True)
        return reference.quantile_limits(x, eps, weights, quantile, clip).to(_limit_dtype(x))

    def _backward(self, ctx, grad):
        x, eps, noise, limits, *tables = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        parts = self.run_backward(grad, x, eps, noise, tables, ctx.scalars, limits, ctx.clip, wanted)
        return *(part if want else None for part, want in zip(parts, wanted)), *(None,) * 6


def _save(ctx, inputs, output):
    x, eps, noise, tables, ctx.scalars, limits, ctx.clip, *_ = inputs
    ctx.save_for_backward(x, eps, noise, limits, *tables)


def changed(out: torch.Tensor) -> torch.Tensor:
    """Tells autograd that a tensor of the caller has other values now."""
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def _gradients(grad, wanted):
    return tuple(grad.new_empty(grad.shape if want else (0,)) for want in wanted)


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None else x.contiguous()


def _limit_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _number(op: str, name: str, value: object) -> float:
    """A Python number, or one of NumPy's."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"supy.{op}: {name} is a {type(value).__name__}, expected a float or a torch.Tensor") from None


def check_stream(op: str, seed: int, offset: int) -> None:
    for name, value, low in (("seed", seed, -(2**63)), ("offset", offset, 0)):
        if not isinstance(value, int):
            raise TypeError(f"supy.{op}: {name} is a {type(value).__name__}, expected an int")
        if not low <= value < 2**63:  # torch.compile cannot write the number of a symbol into a message
            raise ValueError(f"supy.{op}: {name} is {value}, expected {low} to 2^63 - 1")


def _check_like(shapes: Shapes, name: str, tensor, label: str, x) -> None:
    shapes.tensor(name, tensor)
    agrees = tensor.shape == x.shape
    require(agrees, shapes.op, f"{name} has shape {list(tensor.shape)}, expected {list(x.shape)} (from {label})")
    if tensor.dtype != x.dtype:
        raise TypeError(f"supy.{shapes.op}: {name} has dtype {tensor.dtype}, expected {x.dtype} (from {label})")
    shapes.same_device(name, tensor, label, x)
