"""The layer of FLASH: a gated attention unit that is quadratic inside chunks and linear across them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from supy import ops


class MixedChunkAttention(nn.Module):
    """O = (U * (quadratic + linear part of V)) W_o, in time linear in the tokens (arXiv 2202.10447; post 8934).

    U, V `[B, T, value_size]` and Z `[B, T, key_size]` are swish(x W), as in :class:`supy.nn.GatedAttentionUnit`. The
    queries and keys of both parts are Z times a learned vector plus a learned offset each, then rotated by position. No
    residual, norm or dropout: those belong to the network around it.

    Args:
        dim: size of the input and output.
        value_size: size of U and V; default 2 dim.
        key_size: size of queries and keys, even.
        chunk_size, causal, normalizer: as in :func:`supy.ops.mixed_chunk_attention`.

    >>> layer = MixedChunkAttention(32, chunk_size=4, causal=True)
    >>> x = torch.randn(2, 9, 32)
    >>> out, state = layer.prefill(x[:, :8])
    >>> torch.testing.assert_close(layer.step(x[:, 8], state), layer(x)[:, 8])
    """

    def __init__(
        self,
        dim: int,
        *,
        value_size: int | None = None,
        key_size: int = 128,
        chunk_size: int = 256,
        causal: bool = False,
        normalizer: str = "tokens",
    ):
        super().__init__()
        self.sizes = (value_size or 2 * dim, value_size or 2 * dim, key_size)
        self.chunk_size = chunk_size
        self.causal = causal
        self.normalizer = normalizer
        self.project_in = nn.Linear(dim, sum(self.sizes), bias=False)
        self.project_out = nn.Linear(self.sizes[0], dim, bias=False)
        self.scale = nn.Parameter(torch.ones(4, key_size))  # of q and k, quadratic; q and k, linear
        self.offset = nn.Parameter(torch.zeros(4, key_size))
        for projection in (self.project_in, self.project_out):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def forward(self, x: torch.Tensor, *, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """x `[B, T, dim]`, lengths int `[B]` or None: `[B, T, dim]`."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return ops.mixed_chunk_layer(
            x.to(dtype),
            self.project_in.weight.to(dtype),
            self.project_out.weight.to(dtype),
            self.scale,
            self.offset,
            chunk_size=self.chunk_size,
            causal=self.causal,
            lengths=lengths,
            normalizer=self.normalizer,
        )

    def state(self, batch: int, dtype: torch.dtype | None = None) -> ops.MixedChunkState:
        """An empty state for :meth:`step`; dtype: what the projections give, default the parameters' own."""
        weight = self.project_in.weight
        sizes = self.sizes[2], self.sizes[0], self.chunk_size
        return ops.MixedChunkState(batch, *sizes, dtype or weight.dtype, weight.device)

    def prefill(
        self, x: torch.Tensor, *, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ops.MixedChunkState]:
        """The result of :meth:`forward`, and the state after each sample's tokens, from which :meth:`step` goes on."""
        self._check_causal()
        heads, v, u = self._project(x)
        state = self.state(len(x), v.dtype)
        state.read(heads[1], heads[3], v, lengths=lengths)
        options = {"chunk_size": self.chunk_size, "normalizer": self.normalizer}
        attended = ops.mixed_chunk_attention(*heads, v, u, causal=True, lengths=lengths, **options)
        return self.project_out(attended), state

    @torch.no_grad()
    def step(self, x: torch.Tensor, state: ops.MixedChunkState) -> torch.Tensor:
        """The next token of each sequence, x `[B, dim]`: its row of :meth:`forward`, `[B, dim]`. Changes ``state``."""
        self._check_causal()
        heads, v, u = self._project(x[:, None], state.position[:, None])
        row = (y[:, 0] for y in (*heads, v, u))
        return self.project_out(ops.mixed_chunk_step(*row, state=state, normalizer=self.normalizer))

    def _project(self, x, positions=None):
        u, v, z = F.silu(self.project_in(x)).split(self.sizes, -1)
        scale, offset = self.scale.to(z.dtype), self.offset.to(z.dtype)
        heads = [ops.rotary(z * scale[i] + offset[i], positions=positions) for i in range(4)]
        return heads, v, u

    def _check_causal(self):
        if not self.causal:
            raise ValueError("supy.MixedChunkAttention: only a layer with causal=True goes token by token")
