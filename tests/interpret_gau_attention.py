"""Gated attention in Triton's interpreter, against the float64 reference; run by test_triton_kernels.py.

Tiles of 32 by 32 in two pieces, products of 16 at a time and bands of two blocks: few tokens make several of each.
"""

import math

import pytest
import torch

from _compare import assert_close_to_reference
from _spans import LargestTensor
from supy.kernels import gau_attention as kernels
from supy.reference import gau_attention as reference

TILES = {"BLOCK": 32, "PART": 16, "DEPTH": 16, "COLUMNS": 16, "PRECISION": "tf32"}
NAMES = ("out", "attended", "stats", "dq", "dk", "dv", "du")

# name: (B, T, S, E, options)
REGIMES = {
    "one token": (2, 1, 4, 3, {}),
    "below the floor of 16 keys, below a tile": (2, 13, 16, 16, {}),
    "a tile, causal": (2, 32, 16, 32, {"causal": True}),
    "a tile and a token, no gate": (1, 33, 5, 20, {"gate": False}),
    "more bands than one, more features than a product takes, causal": (2, 70, 20, 40, {"causal": True}),
    "samples of length 0, 1, a tile and T": (4, 40, 8, 16, {"lengths": [0, 1, 32, 40]}),
    "causal and padded, no gate": (3, 70, 16, 16, {"lengths": [69, 3, 33], "causal": True, "gate": False}),
    "packed, with an empty sequence and several in a tile": (1, 70, 16, 16, {"cu_seqlens": [0, 1, 1, 40, 47, 70]}),
    "packed and causal": (1, 70, 4, 18, {"cu_seqlens": [0, 18, 33, 70], "causal": True}),
    "own scale and divisor": (1, 20, 4, 8, {"scale": -0.7, "relu2_length": 512.0}),
    "every sample masked": (2, 5, 4, 3, {"lengths": [0, 0]}),
}


def _make(regime, kernel, dtype):
    """grad, q, k, v and u with samples side by side and NaN in padding, and the operator's other arguments."""
    B, T, S, E, options = REGIMES[regime]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(T, B, n, generator=generator).transpose(0, 1).to(dtype) for n in (E, S, S, E, E)]
    lengths, cu_seqlens = (torch.tensor(options[x]) if x in options else None for x in ("lengths", "cu_seqlens"))
    if lengths is not None:
        for x in tensors:
            x[torch.arange(T) >= lengths[:, None]] = math.nan
    if not options.get("gate", True):
        tensors[4] = None
    scale = options.get("scale", 1 / math.sqrt(S))
    return tensors, (lengths, cu_seqlens, kernel, options.get("causal", False), scale, options.get("relu2_length"))


def _run(module, tensors, options, **sizes):
    out, attended, stats = module.gau_attention(*tensors[1:], *options, True, **sizes)
    saved = out if tensors[4] is None else attended, stats
    return out, attended, stats, *module.gau_attention_backward(*tensors, *saved, *options, **sizes)


@pytest.fixture(autouse=True)
def few_splits(monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 4)


# The kernel of softmax is that of softmax_plus, which has other factors.
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("relu2", torch.float32), ("softmax", torch.float32), ("softmax_plus", torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("regime", REGIMES)
def test_values_and_gradients(regime, kernel, dtype):
    tensors, options = _make(regime, kernel, dtype)
    exact = _run(reference, [x if x is None else x.double() for x in tensors], options)
    plain = _run(reference, tensors, options)
    got = _run(kernels, tensors, options, tiles=TILES, band=2)
    for i, name in enumerate(NAMES):
        assert_close_to_reference(f"{kernel}: {name}", got[i], exact[i], plain[i], 2 if i < 3 else 3)
    assert torch.equal(kernels.gau_attention(*tensors[1:], *options, False, tiles=TILES)[0], got[0])
    if options[0] is not None:
        padded = torch.arange(tensors[0].shape[1]) >= options[0][:, None]
        assert all((x[padded] == 0).all() for x, name in zip(got, NAMES) if x.numel() and name != "stats")


@pytest.mark.parametrize("kernel", ["relu2", "softmax"])
def test_nan_gives_nan(kernel):
    tensors, options = _make("a tile, causal", kernel, torch.float32)
    tensors[1][1, 20] = math.nan
    out, _, _, dq, dk, dv, du = _run(kernels, tensors, options, tiles=TILES)
    assert out[1, 20].isnan().all() and not out[1, :20].isnan().any() and not out[0].isnan().any()
    assert dq[1, 20].isnan().all() and dk[1, :21].isnan().all() and dv[1, :21].isnan().all() and du[1, 20].isnan().all()


def test_small_gradients_in_float16_do_not_vanish():
    """dS is about 4e-8, which float16 has as 0 or 6e-8; its sums with large keys are not small."""
    tensors, options = _make("a tile and a token, no gate", "softmax", torch.float16)
    for i, factor in enumerate((6e-7, 0.01, 100)):
        tensors[i] *= factor
    exact = _run(reference, [x if x is None else x.double() for x in tensors], options)
    plain = _run(reference, tensors, options)
    got = _run(kernels, tensors, options, tiles=TILES)
    assert_close_to_reference("dq", got[3], exact[3], plain[3], 3)


def test_memory_is_linear_in_the_tokens(monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    B, T, S, E = 1, 64, 16, 16
    tensors = [torch.randn(B, T, n) for n in (E, S, S, E, E)]
    with LargestTensor() as seen:
        _run(kernels, tensors, (None, None, "softmax", False, 0.25, None), tiles=TILES | {"BLOCK": 16}, band=1)
    # The interpreter copies tensors as bytes.
    assert seen.elements <= 4 * max(16, kernels.PROGRAMS * S) * T < 4 * T * T
