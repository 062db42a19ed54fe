"""Registers supy's operators with PyTorch's dispatcher: the one place where it is decided what runs where.

An operator is a schema, a reference in plain PyTorch, a rule for the shape of its result and, optionally, a gradient and
faster kernels. The reference serves every device and dtype; a kernel takes over on its device for the dtypes it knows.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from supy import _extension

_library = torch.library.Library("supy", "DEF")
_wanted: str | None = None  # the backend chosen by use_backend, or None for the fastest


@dataclass(frozen=True)
class Kernel:
    """One fast implementation: ``run`` takes the operator's arguments on ``device`` ("CPU" or "CUDA")."""

    device: str
    backend: str  # "cpp", "cuda" or "triton"
    run: Callable
    dtypes: tuple[torch.dtype, ...]  # of the first tensor argument

    def __call__(self, *args):
        if self.backend != "triton":
            return self.run(*args)
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, torch.Tensor))):
            return self.run(*args)

    def missing(self) -> str | None:
        """Why this kernel cannot run here, or None."""
        if self.backend == "triton" and importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install triton"
        if self.backend in ("cpp", "cuda") and _extension.C is None:
            return _extension.missing
        if self.backend == "cuda" and not _extension.C.build_info()["cuda"]:
            return "supy._C was built without nvcc; install the CUDA toolkit and reinstall supy"
        if self.device == "CUDA" and not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return None


class Gradient(NamedTuple):
    """``save(ctx, inputs, output)`` keeps what ``backward(ctx, *grads)`` needs, as in torch.library.register_autograd."""

    save: Callable
    backward: Callable


@dataclass(frozen=True)
class Operator:
    name: str
    reference: Callable
    kernels: tuple[Kernel, ...]
    differentiable: bool


OPERATORS: dict[str, Operator] = {}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operator of the block on one backend: "reference", "cpp", "cuda" or "triton".

    An operator that lacks the backend for its inputs raises RuntimeError and says what to install or why.

    >>> import supy, torch
    >>> with supy.use_backend("reference"):
    ...     supy.ops.rotary(torch.ones(1, 2), positions=torch.zeros(1))
    tensor([[1., 1.]])
    """
    global _wanted
    if name not in ("reference", "cpp", "cuda", "triton"):
        raise ValueError(f"supy.use_backend: got {name!r}, expected 'reference', 'cpp', 'cuda' or 'triton'")
    before, _wanted = _wanted, name
    try:
        yield
    finally:
        _wanted = before


def is_plain(*tensors: torch.Tensor | None, gradients: bool = False, cuda: bool = False) -> bool:
    """Whether the dispatcher would do no more than call the C++ kernel of these tensors.

    A small operator calls it at once then, for the dispatcher takes longer than 10,000 numbers. With ``gradients`` the
    caller records them itself, and with ``cuda`` it has a kernel for tensors in GPU memory too.
    """
    if _wanted is not None or _extension.C is None or torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    records = not gradients and torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
            return False
        if not (tensor.is_cpu or (cuda and tensor.is_cuda and _extension.has_cuda)) or tensor.is_neg():
            return False
        if records and tensor.requires_grad:
            return False
    return True


def define(
    schema: str,
    reference: Callable,
    *,
    fake: Callable,
    gradient: Gradient | None = None,
    kernels: tuple[Kernel, ...] = (),
) -> Callable:
    """Registers an operator and returns it: ``torch.ops.supy.<name>``.

    An operator without a gradient raises when one is asked of it, instead of silently giving none. One that
    writes into an argument, "Tensor(a!)", can have none; its public function refuses what requires one.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    torch.library.register_fake(f"supy::{name}", fake, lib=_library)
    if gradient is None:
        gradient = Gradient(_save_nothing, _no_gradient(name))
    if "!" not in schema:
        torch.library.register_autograd(
            f"supy::{name}", gradient.backward, setup_context=gradient.save, lib=_library
        )
    _library.impl(name, _route(name, reference, kernels, None), "CompositeExplicitAutograd")
    for device in dict.fromkeys(kernel.device for kernel in kernels):
        _library.impl(name, _route(name, reference, kernels, device), device)
    OPERATORS[name] = Operator(name, reference, kernels, gradient.save is not _save_nothing)
    return getattr(torch.ops.supy, name).default


def _route(name: str, reference: Callable, kernels: tuple[Kernel, ...], device: str | None) -> Callable:
    """The function that the dispatcher calls on ``device``; None: on every device without a kernel."""
    usable = [kernel for kernel in kernels if kernel.device == device and kernel.missing() is None]
    fastest = {dtype: kernel for kernel in reversed(usable) for dtype in kernel.dtypes}

    def run(*args):
        if _wanted == "reference":
            return reference(*args)
        dtype = next((arg.dtype for arg in args if isinstance(arg, torch.Tensor)), None)
        if _wanted is None:
            return fastest.get(dtype, reference)(*args)
        for kernel in usable:
            if kernel.backend == _wanted and dtype in kernel.dtypes:
                return kernel(*args)
        reasons = [kernel.missing() for kernel in kernels if kernel.backend == _wanted]
        reason = next(filter(None, reasons), f"it has no such kernel for {dtype} on this device")
        raise RuntimeError(f"supy.{name}: backend {_wanted!r} was asked for, but {reason}")

    return run


def _save_nothing(ctx, inputs, output) -> None:
    pass


def _no_gradient(name: str) -> Callable:
    def backward(ctx, *grads):
        what = name.removesuffix("_backward")
        order = "a second derivative" if name.endswith("_backward") else "a derivative"
        raise RuntimeError(f"supy.{what} has no implementation of {order}")

    return backward
