"""What is timed: one row an operator and a size. Adding an operator to the benchmarks adds a row here and nothing else.

A row names its implementations, "supy" first; every one gets the same inputs and must return what the first function of
``exact`` returns on float64 copies of them. A peer imports its package inside its function: where the package is
missing, it is skipped with a note. `torch.compile` of a function is one more implementation: ``compiled(function)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

import supy
from supy import _extension
from supy.reference.rotary import rotary as rotary_reference


@dataclass(frozen=True)
class Row:
    operator: str
    case: str  # shape, dtype, what is special
    inputs: Callable[[], tuple]
    implementations: dict[str, Callable]
    exact: Callable | None = None  # None: there is no result to compare
    bytes: int = 0  # read and written at the least: inputs once, outputs once
    flops: int = 0
    same: Callable | None = None  # same(result, expected) -> bool; None: one tensor, within a tolerance
    gradients: bool = False  # whether autograd records; the functions ask for their gradients themselves


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


# --- rotary -----------------------------------------------------------------------------------------------------------


def _rotary_inputs(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    angle = torch.outer(torch.arange(shape[-2]), 10000.0 ** (-torch.arange(0, shape[-1], 2).double() / shape[-1]))
    return x, angle.cos().float(), angle.sin().float()


def _rotate_half(x, cosine, sine):  # as Hugging Face's models write it
    a, b = x.chunk(2, -1)
    cosine, sine = (torch.cat((part, part), -1).to(x.dtype) for part in (cosine, sine))
    return x * cosine + torch.cat((-b, a), -1) * sine


@functools.cache
def _rotary_embedding(dim):
    from rotary_embedding_torch import RotaryEmbedding

    return RotaryEmbedding(dim)


def _rotary_row(shape, dtype, interleaved):
    def eager(x, cosine, sine):
        return rotary_reference(x, cosine, sine, interleaved, False)

    peers = {
        True: {"rotary-embedding-torch": lambda x, *_: _rotary_embedding(x.shape[-1]).rotate_queries_or_keys(x)},
        False: {"rotate_half": _rotate_half, "rotate_half compiled": compiled(_rotate_half)},
    }
    numel = functools.reduce(int.__mul__, shape)
    return Row(
        "rotary",
        f"{list(shape)} {str(dtype)[6:]} {'interleaved' if interleaved else 'halves'}",
        lambda: _rotary_inputs(shape, dtype),
        {
            "supy": lambda x, *_: supy.ops.rotary(x, interleaved=interleaved),
            "eager": eager,
            "torch.compile": compiled(eager),
            **peers[interleaved],
        },
        exact=eager,
        bytes=2 * numel * dtype.itemsize + 4 * shape[-2] * shape[-1],
        flops=3 * numel,
    )


# --- the cost of a call -----------------------------------------------------------------------------------------------


def _tiny():
    return _rotary_inputs((1, 1, 2, 4), torch.float32)


def _touch(x, y, *_):
    if _extension.C is None:
        raise ImportError(_extension.missing)
    return _extension.C.touch(x, y)


ROWS = [
    _rotary_row((16, 12, 512, 64), torch.float32, True),
    _rotary_row((16, 12, 512, 64), torch.bfloat16, True),
    _rotary_row((16, 12, 512, 64), torch.float32, False),
    _rotary_row((16, 12, 512, 64), torch.bfloat16, False),
    Row(
        "call overhead",
        "tiny tensors, nothing to compute",
        _tiny,
        {
            "supy": lambda x, *_: supy.ops.rotary(x),
            "operator alone": lambda x, c, s: torch.ops.supy.rotary(x, c, s, True, False),
            "binding alone": _touch,
            "eager": lambda x, c, s: rotary_reference(x, c, s, True, False),
            "torch.add": lambda x, *_: x + x,
        },
    ),
    # The next operator's rows go here. A peer of its own is one more function in the dict, for instance
    # {"supy": ..., "igraph": _igraph_cliques}; a result that is not one tensor comes with its own `same`.
]
