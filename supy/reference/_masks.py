"""What the references share: visible tokens and cells, checks of data, sums by group."""

from __future__ import annotations

import torch

from supy._checks import require


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype to accumulate in: float64 for float64, else float32."""
    return x.to(stats_dtype(x.dtype))


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over what is in ``dtype``, as of :func:`wide`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_lengths(op: str, lengths: torch.Tensor | None, tokens: int) -> None:
    """Raises ValueError at the first length outside 0 to T.

    It reads the data, so it belongs in an operator, where torch.compile does not trace it.
    """
    if lengths is None:
        return
    outside = ((lengths < 0) | (lengths > tokens)).nonzero()
    if len(outside):
        at = int(outside[0])
        raise ValueError(f"supy.{op}: lengths[{at}] is {int(lengths[at])}, expected 0 to T={tokens}")


def padding(lengths: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """`[B, T, 1]`, True at and beyond each sample's length; None without lengths."""
    if lengths is None:
        return None
    return (torch.arange(tokens, device=lengths.device) >= lengths[:, None])[..., None]


def clear(x: torch.Tensor, padded: torch.Tensor | None, value: float = 0.0) -> torch.Tensor:
    """``x`` with padded tokens replaced, so that what stands there, even NaN, goes nowhere."""
    return x if padded is None else x.masked_fill(padded, value)


def visible_cells(
    tokens: int, lengths: torch.Tensor | None, tril: bool, device: torch.device
) -> torch.Tensor:
    """`[1 or B, T, T]`, True where start and end are inside and, with ``tril``, start <= end."""
    token = torch.arange(tokens, device=device)
    cells = token[:, None] <= token if tril else token[:, None] >= 0
    cells = cells.expand(tokens, tokens)[None]
    if lengths is not None:
        inside = token < lengths[:, None]
        cells = cells & inside[:, :, None] & inside[:, None, :]
    return cells


def check_spans(
    op: str,
    spans: torch.Tensor,
    sizes: tuple[int, int, int],
    lengths: torch.Tensor | None,
    tril: bool,
) -> None:
    """Raises ValueError at the first row (batch, head, start, end) that names no visible cell.

    ``sizes`` is (B, H, T).
    """
    if len(spans) == 0:
        return
    batch, _, start, end = spans.unbind(1)
    B, H, T = sizes
    limits = torch.tensor([B, H, T, T], device=spans.device)
    outside = ((spans < 0) | (spans >= limits)).any(1)
    limit = f"batch < {B}, head < {H}, start and end < {T}"
    if lengths is not None and not outside.any():
        outside = torch.maximum(start, end) >= lengths[batch]
        limit = "start and end below the sample's length"
    if tril and not outside.any():
        outside = start > end
        limit = "start <= end, because of tril=True"
    if outside.any():
        row = int(outside.nonzero()[0])
        require(False, op, f"spans[{row}] is {spans[row].tolist()}, expected {limit}")


def add_rows(out: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``out[index[n]] += rows[n]`` in place, for any index, with the same bits on every run."""
    # index_put_ sorts on CUDA, where index_add_ races; on the CPU it is the other way round.
    if out.is_cuda:
        return out.index_put_((index,), rows, accumulate=True)
    return out.index_add_(0, index, rows)


def grouped_logsumexp(terms: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """Log-sum-exp over the rows of ``terms`` that share a group; -inf for an empty group.

    terms `[N, ...]`, group `[N]`, result `[groups, ...]`.
    """
    shape = (groups, *terms.shape[1:])
    index = group.view(-1, *(1,) * (terms.ndim - 1)).expand_as(terms)
    top = terms.new_full(shape, -torch.inf).scatter_reduce_(0, index, terms, "amax")
    top.masked_fill_(top.isinf(), 0)
    return top + add_rows(terms.new_zeros(shape), group, (terms - top[group]).exp()).log()


def log_one_plus(log_sum: torch.Tensor) -> torch.Tensor:
    """log(1 + e^log_sum), precise where it is next to nothing."""
    return torch.logaddexp(log_sum, torch.zeros_like(log_sum))
