"""Encoders of up to a thousand layers and more: DeepNorm, and what it is compared with."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from supy._checks import Shapes, require
from supy.nn.deep_norm import DeepNorm
from supy.nn.deepnorm_init import deepnorm_constants, deepnorm_init_
from supy.nn.gated_attention_unit import GatedAttentionUnit

RESIDUALS = ("deepnorm", "post", "pre", "none", "rezero", "admin")
BLOCKS = ("transformer", "gau")


class DeepEncoder(nn.Module):
    """``layers`` times attention and a feed-forward network, each in a residual connection of the kind asked for.

    A branch f is attention or the feed-forward network, Norm a LayerNorm or RMSNorm with weights.

    | residual | x becomes | source |
    |---|---|---|
    | `"deepnorm"` | Norm(alpha x + f(x)), initial matrices times beta | arXiv 2203.00555 |
    | `"post"` | Norm(x + f(x)) | arXiv 1706.03762 |
    | `"pre"` | x + f(Norm(x)), and a last Norm | arXiv 2002.04745 |
    | `"none"` | Norm(f(x)) | post 8994 |
    | `"rezero"` | x + g f(x), with a learned number g, first 0, and no norms | arXiv 2003.04887 |
    | `"admin"` | Norm(omega * x + f(x)), with a learned vector omega that :meth:`profile_` begins | arXiv 2004.08249 |

    Matrices begin as Xavier's normal numbers (those of gated attention units as theirs), biases as 0. The feed-forward
    network has ReLU between its layers. Positions and embeddings belong to the network around it.

    Args:
        layers: N, each of two branches.
        width: D, of the input and output.
        heads: of attention; they divide the width. Gated attention units have one.
        hidden: size of the feed-forward network inside; default 4 D. A gated attention unit's value size is half of it.
        residual: see above.
        block: `"transformer"`, or `"gau"` for two :class:`supy.nn.GatedAttentionUnit` a layer, about as many weights;
            DeepNorm's beta is then the root of the paper's.
        norm: `"layer"` or `"rms"`.
        affine: norms have weights and, LayerNorms, biases. DeepNorm's analysis leaves them out, and in very deep
            networks most of a step is theirs (docs/depth.md).
        dropout: of each branch's result.
        causal: a token sees no later ones.
        alpha, beta: instead of those of :func:`deepnorm_constants`.
        segment: with gradients, only the inputs of every ``segment`` layers are kept, and the layers computed again for
            the backward pass: a third more time, and the memory of ``segment`` layers. None keeps everything.

    >>> encoder = DeepEncoder(24, 32, heads=4, residual="pre")
    >>> encoder(torch.randn(2, 7, 32), lengths=torch.tensor([7, 3])).shape
    torch.Size([2, 7, 32])
    """

    def __init__(
        self,
        layers: int,
        width: int,
        *,
        heads: int = 4,
        hidden: int | None = None,
        residual: str = "deepnorm",
        block: str = "transformer",
        norm: str = "layer",
        affine: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        alpha: float | None = None,
        beta: float | None = None,
        segment: int | None = None,
    ):
        super().__init__()
        op, hidden = type(self).__name__, hidden or 4 * width
        require(layers >= 1, op, f"layers is {layers}, expected at least 1")
        require(residual in RESIDUALS, op, f"residual is {residual!r}, expected one of {', '.join(RESIDUALS)}")
        require(block in BLOCKS, op, f"block is {block!r}, expected one of {', '.join(BLOCKS)}")
        require(norm in ("layer", "rms"), op, f"norm is {norm!r}, expected layer or rms")
        require(heads >= 1 and width >= 1 and width % heads == 0, op,
                f"width is {width}, expected a multiple of heads={heads}")  # fmt: skip
        require(segment is None or segment >= 1, op, f"segment is {segment}, expected at least 1, or None")
        paper = deepnorm_constants("encoder", layers)
        scaled = residual == "deepnorm"
        self.width, self.residual, self.segment, self.causal = width, residual, segment, causal
        alpha = (paper.alpha if alpha is None else alpha) if scaled else 1.0
        options = {"kind": norm, "affine": affine, "dropout": dropout}

        def branches():
            if block == "gau":
                sizes = {"value_size": hidden // 2, "key_size": max(2, min(128, width) // 2 * 2)}
                return [GatedAttentionUnit(width, causal=causal, **sizes) for _ in range(2)]
            return [_Attention(width, heads, causal), _FeedForward(width, hidden)]

        self.layers = nn.ModuleList(
            _Layer(_Residual(branch, width, residual, alpha, options) for branch in branches())
            for _ in range(layers)
        )
        self.norm = _norm(width, norm, affine) if residual == "pre" else nn.Identity()
        if scaled:
            # Of the three matrices in a row of a gated unit, two scale the third one's gradient, and so share beta.
            deepnorm_init_(self, beta if beta is not None else paper.beta ** (0.5 if block == "gau" else 1.0))

    def forward(self, x: torch.Tensor, *, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """x `[B, T, D]`, lengths int `[B]` or None: `[B, T, D]`.

        No token sees those at and beyond a sample's length, whose own rows mean nothing.
        """
        self._check(x, lengths)
        padding = self._padding(x, lengths)
        if self.segment is None or not torch.is_grad_enabled():
            x = self._run(x, lengths, padding, 0, len(self.layers))
        else:
            for start in range(0, len(self.layers), self.segment):
                stop = start + self.segment
                x = checkpoint(self._run, x, lengths, padding, start, stop, use_reentrant=False)
        return self.norm(x)

    @torch.no_grad()
    def profile_(self, x: torch.Tensor, *, lengths: torch.Tensor | None = None) -> DeepEncoder:
        """Gives Admin's omegas their first values, from one forward pass over x `[B, T, D]`; returns the encoder.

        omega_1 = 1 and omega_(i+1)^2 = Var(omega_i x_i) + Var(f_i(x_i)), over all numbers of the tokens within lengths.
        """
        require(self.residual == "admin", type(self).__name__, f"residual is {self.residual!r}: only admin is profiled")
        self._check(x, lengths)
        padding = self._padding(x, lengths)
        real = slice(None)
        if lengths is not None:
            real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        scale = torch.ones((), device=x.device)
        for layer in self.layers:
            for part in layer.parts:
                part.omega.fill_(scale)
                branch = part.run(x, lengths, padding)
                scale = ((part.omega * x)[real].var(correction=0) + branch[real].var(correction=0)).sqrt()
                x = part.join(x, branch)
        return self

    def extra_repr(self) -> str:
        return f"width={self.width}, residual={self.residual!r}, causal={self.causal}, segment={self.segment}"

    def _run(self, x, lengths, padding, start, stop):
        for layer in self.layers[start:stop]:
            x = layer(x, lengths, padding)
        return x

    def _check(self, x, lengths):
        shapes = Shapes(type(self).__name__)
        shapes.floating("x", x)
        shapes.match("x", x, "B T D")
        require(x.shape[2] == self.width, shapes.op, f"x has shape {list(x.shape)}, expected [B, T, {self.width}]")
        if lengths is not None:
            shapes.match("lengths", lengths, "B")
            shapes.same_device("lengths", lengths, "x", x)

    def _padding(self, x, lengths):
        """bool `[B, 1, 1, T]`, True for tokens that are seen; the first always is, as a softmax over none is NaN."""
        if lengths is None:
            return None
        places = torch.arange(x.shape[1], device=x.device)
        return (places < lengths.clamp(min=1)[:, None])[:, None, None]


class DeepNormEncoder(DeepEncoder):
    """The encoder of DeepNet (arXiv 2203.00555): :class:`DeepEncoder` with ``residual="deepnorm"``.

    >>> encoder = DeepNormEncoder(100, 16, segment=10)
    >>> encoder(torch.randn(1, 5, 16)).std().sub(1).abs().item() < 0.01
    True
    """

    def __init__(self, layers: int, width: int, **options):
        super().__init__(layers, width, residual="deepnorm", **options)


class _Layer(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x, lengths=None, padding=None):
        for part in self.parts:
            x = part(x, lengths, padding)
        return x


class _Residual(nn.Module):
    """A branch and how its result joins what it was computed from."""

    def __init__(self, branch, width, residual, alpha, options):
        super().__init__()
        self.branch, self.residual, self.dropout = branch, residual, options["dropout"]
        if residual in ("deepnorm", "post", "admin"):
            self.norm = DeepNorm(width, alpha, **options)
        elif residual in ("pre", "none"):
            self.norm = _norm(width, options["kind"], options["affine"])
        if residual == "rezero":
            self.gain = nn.Parameter(torch.zeros(()))
        if residual == "admin":
            self.omega = nn.Parameter(torch.ones(width))

    def forward(self, x, lengths, padding):
        return self.join(x, self.run(self.norm(x) if self.residual == "pre" else x, lengths, padding))

    def run(self, x, lengths, padding):
        if isinstance(self.branch, _Attention):
            return self.branch(x, padding)
        return self.branch(x, lengths=lengths) if isinstance(self.branch, GatedAttentionUnit) else self.branch(x)

    def join(self, x, branch):
        if self.residual in ("deepnorm", "post"):
            return self.norm(x, branch)
        if self.residual == "admin":
            return self.norm(self.omega * x, branch)
        branch = F.dropout(branch, self.dropout, self.training)
        if self.residual == "none":
            return self.norm(branch)
        return x + (branch if self.residual == "pre" else self.gain * branch)


class _Attention(nn.Module):
    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.value_rows = slice(2 * width, 3 * width)
        self.in_proj = nn.Linear(width, 3 * width)  # rows of queries, keys, values
        self.out_proj = nn.Linear(width, width)
        for weight in (*self.in_proj.weight.detach().chunk(3), self.out_proj.weight):
            nn.init.xavier_normal_(weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, padding):
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        causal = self.causal
        if causal and padding is not None:
            causal, places = False, torch.arange(x.shape[1], device=x.device)
            padding = padding & (places <= places[:, None])
        y = F.scaled_dot_product_attention(q, k, v, padding, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


def _norm(width, kind, affine):
    return {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[kind](width, eps=1e-6, elementwise_affine=affine)
