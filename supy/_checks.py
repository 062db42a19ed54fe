"""Checks of arguments, and the one form of their messages."""

from __future__ import annotations

import argparse

import torch


def require(condition: bool, op: str, message: str) -> None:
    """Raises ``ValueError("supy.<op>: <message>")`` unless the condition holds."""
    if not condition:
        raise ValueError(f"supy.{op}: {message}")


def positive(text: str) -> int:
    """An option of a command: a number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


class Shapes:
    """Names the sizes of one call's tensors and refuses the first tensor that disagrees.

    >>> shapes = Shapes("gau_attention")
    >>> shapes.match("q", torch.zeros(2, 64, 4), "B T S")
    >>> shapes.match("k", torch.zeros(2, 63, 4), "B T S")
    Traceback (most recent call last):
    ValueError: supy.gau_attention: k has shape [2, 63, 4], expected [B, T, S] with B=2, T=64, S=4 (from q)
    """

    def __init__(self, op: str):
        self.op = op
        self.sizes: dict[str, int] = {}
        self.origin: dict[str, str] = {}

    def __getitem__(self, dim: str) -> int:
        return self.sizes[dim]

    def match(self, name: str, tensor: torch.Tensor, dims: str, dtype: torch.dtype | None = None) -> None:
        """Binds the names in ``dims`` to the tensor's sizes, or compares them where they are bound already."""
        self.tensor(name, tensor)
        names = dims.split()
        agrees = tensor.ndim == len(names) and all(
            self.sizes.get(dim, size) == size for dim, size in zip(names, tensor.shape)
        )
        if not agrees:
            known = [dim for dim in names if dim in self.sizes]
            origins = dict.fromkeys(self.origin[dim] for dim in known)
            detail = ", ".join(f"{dim}={self.sizes[dim]}" for dim in known)
            detail = f" with {detail} (from {', '.join(origins)})" if known else ""
            raise ValueError(
                f"supy.{self.op}: {name} has shape {list(tensor.shape)}, expected [{', '.join(names)}]{detail}"
            )
        if dtype is not None and tensor.dtype != dtype:
            raise TypeError(f"supy.{self.op}: {name} has dtype {tensor.dtype}, expected {dtype}")
        for dim, size in zip(names, tensor.shape):
            if dim not in self.sizes:
                self.sizes[dim], self.origin[dim] = size, name

    def floating(self, name: str, tensor: torch.Tensor) -> None:
        self.tensor(name, tensor)
        if not tensor.is_floating_point():
            raise TypeError(f"supy.{self.op}: {name} has dtype {tensor.dtype}, expected a floating-point dtype")

    def same_device(self, name: str, tensor: torch.Tensor, other: str, reference: torch.Tensor) -> None:
        require(
            tensor.device == reference.device,
            self.op,
            f"{name} is on {tensor.device}, expected {reference.device} (from {other})",
        )

    def tensor(self, name: str, value: object) -> None:
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"supy.{self.op}: {name} is a {type(value).__name__}, expected a torch.Tensor")
