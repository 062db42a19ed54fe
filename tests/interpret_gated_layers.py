"""The gated layers in Triton's interpreter, against the float64 reference; run by test_triton_kernels.py.

Tiles as in the tests of their attentions; a program has 8 tokens, or sums gradients over 8.
"""

import math

import pytest
import torch

from _compare import assert_close_to_reference
from supy.kernels import gated_attention_unit as unit
from supy.kernels import gated_projection, gau_attention
from supy.kernels import mixed_chunk_attention as layer
from supy.ops.rotary import arange_table
from supy.reference import gated_attention_unit as unit_reference
from supy.reference import mixed_chunk_layer as layer_reference

TILES = {"BLOCK": 32, "PART": 16, "DEPTH": 16, "COLUMNS": 16, "PRECISION": "tf32"}
NAMES = ("dx", "dw_in", "dw_out", "dgamma", "dbeta")

# name: (B, T, D, S, E, options)
UNIT = {
    "one token": (1, 1, 4, 16, 16, {"kernel": "relu2"}),
    "a tile and a token, several parts and bands": (2, 33, 8, 48, 48, {"band": 2}),
    "causal and padded": (3, 10, 6, 16, 16, {"lengths": [10, 0, 3], "causal": True}),
    "packed": (1, 20, 6, 16, 16, {"cu_seqlens": [0, 1, 1, 20], "kernel": "relu2", "relu2_length": 8.0}),
}
CHUNKS = {
    "one token, causal": (1, 1, 4, 16, 16, {"causal": True}),
    "a chunk and a token, causal": (1, 17, 8, 48, 32, {"causal": True}),
    "padded": (2, 32, 6, 16, 16, {"lengths": [32, 5]}),
    "causal and padded": (3, 20, 6, 16, 16, {"lengths": [20, 0, 17], "causal": True}),
}


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    monkeypatch.setattr(gau_attention, "PROGRAMS", 4)
    monkeypatch.setattr(gated_projection, "ROWS", 8)
    monkeypatch.setattr(gated_projection, "PART", 32)
    monkeypatch.setattr(gated_projection, "GRADIENT_ROWS", 8)


def _make(row, heads, dtype):
    """Slope, x, w_in, w_out, gamma and beta, with NaN in padding; cosine and sine; the options, their tensors made."""
    B, T, D, S, E, options = row
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, D), (B, T, D), (2 * E + S, D), (D, E), (heads, S), (heads, S))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[2] /= D**0.5
    options = {x: torch.tensor(y) if isinstance(y, list) else y for x, y in options.items()}
    if "lengths" in options:
        for x in tensors[:2]:
            x[torch.arange(T) >= options["lengths"][:, None]] = math.nan
    # gamma and beta stay in float32, as modules have them.
    return [x.to(dtype) for x in tensors[:4]] + tensors[4:], arange_table(tensors[0], T, S // 2), options


# Each regime in one dtype: the interpreter is slow.
def _check(run, module, reference, tensors):
    exact = run(reference, [x.double() for x in tensors])
    plain = run(reference, tensors)
    got = run(module, tensors)
    for name, *results in zip(("out", *NAMES), got, exact, plain, strict=True):
        assert_close_to_reference(name, *results, 2 if name == "out" else 3)


@pytest.mark.parametrize(("regime", "dtype"), list(zip(UNIT, [torch.float16, torch.float32] * 2)), ids=str)
def test_gated_attention_unit(regime, dtype):
    tensors, table, options = _make(UNIT[regime], 2, dtype)
    S = tensors[4].shape[1]
    band = options.pop("band", None)
    given = options.get("lengths"), options.get("cu_seqlens"), options.get("kernel", "softmax_plus")
    given = *given, options.get("causal", False), S**-0.5, options.get("relu2_length")

    def run(module, tensors):
        more = {"tiles": TILES, "band": band} if module is unit else {}
        rotation = [x.to(torch.float64 if tensors[0].dtype == torch.float64 else torch.float32) for x in table]
        slope, *tensors = tensors
        out, *saved = module.gated_attention_unit(*tensors, *rotation, *given, True, **more)
        if more:
            short = module.gated_attention_unit(*tensors, *rotation, *given, False, **more)
            assert torch.equal(short[0], out) and not any(x.numel() for x in short[1:])
        return out, *module.gated_attention_unit_backward(slope, *tensors, *rotation, *saved, *given, **more)

    _check(run, unit, unit_reference, tensors)


@pytest.mark.parametrize(("regime", "dtype"), list(zip(CHUNKS, [torch.float16, torch.float32] * 2)), ids=str)
def test_mixed_chunk_layer(regime, dtype, monkeypatch):
    monkeypatch.setattr(layer, "PIECE", 16)
    tensors, table, options = _make(CHUNKS[regime], 4, dtype)
    T = tensors[0].shape[1]
    lengths = options.get("lengths")
    given = 16, options.get("causal", False), "tokens"

    def run(module, tensors, keep=T):
        more = {"tiles": TILES} if module is layer else {}
        rotation = [x.to(torch.float64 if tensors[0].dtype == torch.float64 else torch.float32) for x in table]
        slope, *tensors = tensors
        out, *saved = module.mixed_chunk_layer(*tensors, *rotation, lengths, *given, 0, keep, **more)
        backward = module.mixed_chunk_layer_backward
        return out, *backward(slope, *tensors, *rotation, *saved, lengths, *given, 0, keep, **more)

    _check(run, layer, layer_reference, tensors)
    if T < 20:
        kept, again = (run(layer, tensors, keep) for keep in (T, 0))
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
