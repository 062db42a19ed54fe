"""Normal numbers of a counter: Philox4x32-10 (Salmon et al., SC 2011, doi:10.1145/2063384.2063405) and Box-Muller."""

from __future__ import annotations

import math

import torch

MASK = 0xFFFFFFFF


def philox(counter: list[torch.Tensor], key: tuple[int, int]) -> list[torch.Tensor]:
    """Ten rounds on four words of 32 bits, each an int64 tensor; the key is two such words."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        (high_a, low_a), (high_c, low_c) = _product(0xD2511F53, a), _product(0xCD9E8D57, c)
        a, b, c, d = high_c ^ b ^ k0, low_c, high_a ^ d ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [a, b, c, d]


def _product(factor: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper and the lower half of a product of 64 bits, which int64 cannot hold."""
    upper = (factor * (word >> 16) + (factor * (word & 0xFFFF) >> 16)) >> 16
    return upper, (factor * word) & MASK


def philox_normal(out: torch.Tensor, seed: int, offset: int) -> None:
    """Fills ``out`` with numbers offset, offset + 1, ... of the stream ``seed``, in row-major order.

    Block n of the stream is Philox4x32-10 of the counter (n, 0) and the key ``seed``, both little-endian. Its words w0
    and w1 make the numbers 4 n and 4 n + 1, w2 and w3 the next two:

        sqrt(-2 log u) cos(2 pi w1 / 2^32),  sqrt(-2 log u) sin(2 pi w1 / 2^32),  u = float32(w0) / 2^32 + 1 / 2^33

    u is rounded to float32 and lies in [2^-33, 1], so no number exceeds 6.77. What follows is computed in float64.
    """
    first = offset // 4
    block = torch.arange(first, (offset + out.numel() + 3) // 4, device=out.device)
    zero = torch.zeros_like(block)
    words = philox([block & MASK, block >> 32, zero, zero], (seed & MASK, seed >> 32 & MASK))
    numbers = []
    for w0, w1 in (words[:2], words[2:]):
        u = w0.float() * 2.0**-32 + 2.0**-33
        radius, angle = (-2 * u.double().log()).sqrt(), w1.double() * (2 * math.pi / 2**32)
        numbers += [radius * angle.cos(), radius * angle.sin()]
    stream = torch.stack(numbers, -1).flatten()
    out.copy_(stream[offset - 4 * first :][: out.numel()].view(out.shape))
