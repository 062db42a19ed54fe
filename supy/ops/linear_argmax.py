"""The argmax of a linear layer, without its logits."""

from __future__ import annotations

import torch

from supy import _extension
from supy._checks import Shapes
from supy._library import Kernel, define
from supy.ops._arguments import NATIVE, triton_kernel, unit_stride
from supy.reference._masks import stats_dtype
from supy.reference.linear_argmax import linear_argmax as reference

OP = "linear_argmax"


def _empty(x, *_):
    return x.new_empty(x.shape[0], dtype=stats_dtype(x.dtype)), x.new_empty(x.shape[0], dtype=torch.int64)


def _cpp(x, weight, bias, exclude, floor):
    if x.shape[1] == 0:
        return reference(x, weight, bias, exclude, floor)
    values, classes = _empty(x)
    small = (y if y is None else y.contiguous() for y in (bias, exclude, floor))
    _extension.C.linear_argmax(unit_stride(x), unit_stride(weight), *small, values, classes)
    return values, classes


_linear_argmax = define(
    "linear_argmax(Tensor x, Tensor weight, Tensor? bias, Tensor? exclude, Tensor? floor) -> (Tensor, Tensor)",
    reference,
    fake=_empty,
    kernels=(Kernel("CPU", "cpp", _cpp, NATIVE), triton_kernel("linear_argmax", "linear_argmax")),
)


def linear_argmax(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    exclude: torch.Tensor | None = None,
    floor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of ``x @ weight.T + bias`` in each row, and its class: (values `[M]`, classes int64 `[M]`).

    The logits `[M, K]` are never stored. Of equal ones the first class is taken, and NaN is the largest, as by
    ``torch.max``. Not differentiable.

    Args:
        x: `[M, d]`, any floating-point dtype. Half precision accumulates in float32.
        weight: `[K, d]`, the dtype of ``x``.
        bias: `[K]`, any floating-point dtype; -inf leaves a class out.
        exclude: int64 `[M]`, a class that does not count in this row; a number that is no class excludes none.
        floor: `[M]`, any floating-point dtype: logits below it do not count. Blocks of classes that cannot reach it, as
            |x . w| <= |x| |w|, are not computed, which pays where classes are sorted by the length of their rows.

    Returns:
        The value, float64 for float64 and float32 otherwise, and the class; -inf and -1 in a row without a class that
        counts.

    Raises:
        ValueError: the shapes or devices disagree.
        TypeError: an argument is not a tensor of the right dtype.

    >>> import torch, supy
    >>> x, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [3.0, 1.0], [2.0, 5.0]])
    >>> supy.ops.linear_argmax(x, weight, exclude=torch.tensor([1, 0]))
    (tensor([2., 5.]), tensor([2, 2]))
    >>> supy.ops.linear_argmax(x, weight, floor=torch.tensor([4.0, 4.0]))
    (tensor([-inf, 5.]), tensor([-1,  2]))
    """
    shapes = Shapes(OP)
    shapes.floating("x", x)
    shapes.match("x", x, "M d")
    shapes.match("weight", weight, "K d", x.dtype)
    shapes.same_device("weight", weight, "x", x)
    for name, tensor, dims in (("bias", bias, "K"), ("exclude", exclude, "M"), ("floor", floor, "M")):
        if tensor is None:
            continue
        shapes.match(name, tensor, dims, torch.int64 if name == "exclude" else None)
        shapes.same_device(name, tensor, "x", x)
        if name != "exclude":
            shapes.floating(name, tensor)
    precise = stats_dtype(x.dtype)
    bias, floor = (y if y is None else y.to(precise) for y in (bias, floor))
    return _linear_argmax(x, weight, bias, exclude, floor)
