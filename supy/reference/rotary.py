"""Rotary position embedding: kexue.fm post 8265; arXiv 2104.09864."""

from __future__ import annotations

import torch


def rotary(
    x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, interleaved: bool, inverse: bool
) -> torch.Tensor:
    """Rotates pair i of the last axis by the angle whose cosine and sine are given.

        (a, b) -> (a cos - b sin, b cos + a sin)

    x `[..., D]`, cosine and sine broadcast to `[..., D / 2]`. A pair is (2i, 2i + 1) when ``interleaved``, else (i, i + D / 2).
    ``inverse`` turns the other way, which is the transpose and so the gradient. Half precision computes in float32.
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, -1)
    sine = -sine if inverse else sine
    pair = a * cosine - b * sine, b * cosine + a * sine
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return rotated.to(x.dtype)
