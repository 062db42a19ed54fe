"""Mixed-chunk attention in Triton's interpreter, against the float64 reference; run by test_triton_kernels.py.

Tiles of 32 by 16 and products of 16 at a time, so that few tokens make several of each.
"""

import math

import pytest
import torch

from _compare import assert_close_to_reference
from supy.kernels import gau_attention
from supy.kernels import mixed_chunk_attention as kernels
from supy.reference import mixed_chunk_attention as reference

TILES = {"BLOCK": 32, "PART": 16, "DEPTH": 16, "COLUMNS": 16, "PRECISION": "tf32"}
NAMES = ("out", "dq_quad", "dk_quad", "dq_lin", "dk_lin", "dv", "du")

# name: (B, T, S, E, chunk_size, options)
REGIMES = {
    "one token": (2, 1, 4, 3, 4, {}),
    "one token, causal": (2, 1, 4, 3, 4, {"causal": True}),
    "chunks of one token, causal": (1, 5, 16, 16, 1, {"causal": True}),
    "a token less than a chunk": (1, 15, 5, 20, 16, {}),
    "a chunk, causal": (1, 16, 16, 16, 16, {"causal": True}),
    "a chunk and a token, causal": (2, 17, 16, 16, 16, {"causal": True}),
    "chunks of several tiles, no gate": (1, 70, 16, 16, 40, {"gate": False}),
    "chunks of several tiles, causal, odd sizes": (1, 70, 20, 18, 33, {"causal": True}),
    "samples of length 0, 1, a chunk and T": (4, 21, 8, 16, 8, {"lengths": [0, 1, 8, 21]}),
    "causal and padded, no gate": (3, 21, 8, 16, 8, {"lengths": [20, 3, 9], "causal": True, "gate": False}),
    "divided by the chunk": (1, 20, 8, 16, 5, {"causal": True, "normalizer": "chunk_size"}),
    "divided by the number of chunks": (2, 20, 8, 16, 5, {"causal": True, "normalizer": "chunks", "lengths": [20, 7]}),
}


def _make(regime, dtype):
    """grad, the operator's tensors with samples side by side and NaN in padding, and its other arguments."""
    B, T, S, E, chunk_size, options = REGIMES[regime]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(T, B, n, generator=generator).transpose(0, 1).to(dtype) for n in (E, S, S, S, S, E, E)]
    lengths = torch.tensor(options["lengths"]) if "lengths" in options else None
    if lengths is not None:
        for x in tensors:
            x[torch.arange(T) >= lengths[:, None]] = math.nan
    if not options.get("gate", True):
        tensors[-1] = None
    return tensors, (lengths, chunk_size, options.get("causal", False), options.get("normalizer", "tokens"))


def _run(module, tensors, options, **sizes):
    out = module.mixed_chunk_attention(*tensors[1:], *options, **sizes)
    return out, *module.mixed_chunk_attention_backward(*tensors, *options, **sizes)


@pytest.fixture(autouse=True)
def small_bands(monkeypatch):
    monkeypatch.setattr(gau_attention, "BAND", 3)
    monkeypatch.setattr(gau_attention, "WORKSPACE", 0)
    monkeypatch.setattr(kernels, "PIECE", 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_values_and_gradients(regime, dtype):
    tensors, options = _make(regime, dtype)
    exact = _run(reference, [x if x is None else x.double() for x in tensors], options)
    plain = _run(reference, tensors, options)
    got = _run(kernels, tensors, options, tiles=TILES)
    for i, name in enumerate(NAMES):
        assert_close_to_reference(name, got[i], exact[i], plain[i], 2 if i == 0 else 3)
    if options[0] is not None:
        padded = torch.arange(tensors[0].shape[1]) >= options[0][:, None]
        assert all((x[padded] == 0).all() for x in got if x.numel())


def test_nan_gives_nan():
    tensors, options = _make("a chunk and a token, causal", torch.float32)
    tensors[1][1, 10] = math.nan  # q_quad
    out, dq_quad, dk_quad, _, _, dv, du = _run(kernels, tensors, options, tiles=TILES)
    assert out[1, 10].isnan().all() and not out[1, :10].isnan().any() and not out[0].isnan().any()
    assert dq_quad[1, 10].isnan().all() and dk_quad[1, :11].isnan().all()
    assert dv[1, :11].isnan().all() and du[1, 10].isnan().all()
