"""supy.ops.gau_attention against a loop over rows."""

import math

import pytest
import torch

import supy
from _compare import assert_close_to_reference

NAMES = ("q", "k", "v", "u")
KERNELS = ("relu2", "softmax", "softmax_plus")

# name: (B, T, S, E, options)
REGIMES = {
    "one token": (2, 1, 4, 3, {}),
    "below the floor of 16 keys": (2, 7, 5, 3, {}),
    "causal rows pass the floor": (1, 23, 8, 5, {"causal": True}),
    "samples of length 0, 1 and T": (3, 18, 4, 7, {"lengths": [0, 1, 18]}),
    "causal and padded": (2, 20, 4, 4, {"lengths": [17, 3], "causal": True}),
    "packed, with an empty sequence": (1, 22, 4, 3, {"cu_seqlens": [0, 1, 1, 19, 22]}),
    "packed and causal": (1, 20, 4, 3, {"cu_seqlens": [0, 18, 20], "causal": True}),
    "own scale and divisor": (1, 6, 4, 2, {"scale": -0.7, "relu2_length": 512}),
}


def _make(regime, dtype=torch.float64):
    B, T, S, E, options = REGIMES[regime]
    generator = torch.Generator().manual_seed(1)
    shapes = ((B, T, S), (B, T, S), (B, T, E), (B, T, E))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors = [x.to(dtype).requires_grad_() for x in tensors]
    options = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in options.items()}
    return tensors, options


def by_rows(q, k, v, u, kernel, causal=False, lengths=None, cu_seqlens=None, scale=None, relu2_length=None):
    """Each row from its own list of visible keys."""
    B, T, S = q.shape
    scale = 1 / math.sqrt(S) if scale is None else scale
    rows = []
    for b in range(B):
        for i in range(T):
            first, last = 0, T if lengths is None else int(lengths[b])
            ends = [] if cu_seqlens is None else cu_seqlens.tolist()
            for start, end in zip(ends, ends[1:]):
                if start <= i < end:
                    first, last = start, end
            keys = [j for j in range(first, last) if i < last and (j <= i or not causal)]
            if not keys:
                rows.append(v[b, i] * 0)
                continue
            scores = torch.stack([(q[b, i] * k[b, j]).sum() * scale for j in keys])
            if kernel == "relu2":
                weights = scores.clamp(min=0) ** 2 / (relu2_length or len(keys))
            else:
                if kernel == "softmax_plus":
                    scores = scores * math.log(max(len(keys), 16)) / math.log(512)
                weights = (scores - scores.max()).exp()
                weights = weights / weights.sum()
            row = sum(w * v[b, j] for w, j in zip(weights, keys))
            rows.append(row if u is None else row * u[b, i])
    return torch.stack(rows).view(v.shape)


def _gradients(function, tensors, weight):
    out = function(*tensors)
    return [out, *torch.autograd.grad((out * weight).sum(), tensors)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("regime", REGIMES)
def test_float64_is_the_loop_over_rows(regime, kernel):
    tensors, options = _make(regime)
    torch.manual_seed(0)
    weight = torch.randn(tensors[2].shape, dtype=torch.float64)
    for count in (3, 4):  # without and with the gate
        given = tensors[:count]
        got = _gradients(lambda *x: supy.ops.gau_attention(*x, kernel=kernel, **options), given, weight)
        expected = _gradients(lambda *x: by_rows(*x, *[None] * (4 - count), kernel, **options), given, weight)
        for name, a, b in zip(("out", *NAMES), got, expected):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("regime", REGIMES)
def test_values_and_gradients_in_each_dtype(regime, kernel, dtype):
    tensors, options = _make(regime, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    torch.manual_seed(0)
    weight = torch.randn(tensors[2].shape).to(dtype)

    def run(function, given):
        return _gradients(function, given, weight.to(given[0].dtype))

    got, exact = (
        run(lambda *x: supy.ops.gau_attention(*x, kernel=kernel, **options), given)
        for given in (tensors, exact)
    )
    plain = run(lambda *x: by_rows(*x, kernel, **options), tensors)
    for i, name in enumerate(("out", *NAMES)):
        label, factor = f"gau_attention {kernel}: {name}", 2 if i == 0 else 3
        assert_close_to_reference(label, got[i], exact[i], plain[i], factor)


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_has_no_effect(kernel):
    """NaN in the padding reaches neither the values nor a gradient; rows there are 0, and so are their gradients."""
    tensors, _ = _make("below the floor of 16 keys")
    lengths = torch.tensor([4, 7])
    dirty = [x.detach().clone() for x in tensors]
    for x in dirty:
        x[0, 4:] = torch.nan
    dirty = [x.requires_grad_() for x in dirty]
    for given in (tensors, dirty):
        out = supy.ops.gau_attention(*given, kernel=kernel, lengths=lengths)
        grads = torch.autograd.grad(out, given, torch.ones_like(out))
        assert (out[0, 4:] == 0).all() and all((x[0, 4:] == 0).all() for x in grads)
        if given is tensors:
            clean = out, *grads
    for a, b in zip((out, *grads), clean):
        assert torch.equal(a, b)


def test_packed_sequences_equal_separate_ones():
    tensors, _ = _make("packed, with an empty sequence")
    ends = [0, 5, 22]
    together = supy.ops.gau_attention(*tensors, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    for first, last in zip(ends, ends[1:]):
        alone = supy.ops.gau_attention(*(x[:, first:last] for x in tensors))
        torch.testing.assert_close(together[:, first:last], alone)


def _errors():
    q, v = torch.zeros(2, 5, 4), torch.zeros(2, 5, 3)
    one = torch.zeros(1, 5, 4)
    full = r"k has shape \[2, 4, 4\], expected \[B, T, S\] with B=2, T=5, S=4 \(from q\)"
    yield (q, q[:, 1:], v), {}, ValueError, full
    yield (q, q, v[:1]), {}, ValueError, r"v has shape \[1, 5, 3\]"
    yield (q, q, v, q), {}, ValueError, r"u has shape \[2, 5, 4\]"
    yield (q[0], q, v), {}, ValueError, r"q has shape \[5, 4\], expected \[B, T, S\]"
    yield (q, q.double(), v), {}, TypeError, "k has dtype torch.float64, expected torch.float32"
    yield (q, q, v), {"kernel": "relu"}, ValueError, "kernel is 'relu', expected one of relu2"
    yield (q, q, v), {"lengths": torch.tensor([1, 6])}, ValueError, r"lengths\[1\] is 6, expected 0 to T=5"
    yield (q, q, v), {"lengths": torch.tensor([-1, 5])}, ValueError, r"lengths\[0\] is -1"
    yield (q, q, v), {"lengths": torch.ones(2)}, TypeError, "lengths has dtype torch.float32"
    yield (q, q, v), {"lengths": torch.ones(3).long()}, ValueError, r"lengths has shape \[3\]"
    yield (q, q, v), {"cu_seqlens": torch.tensor([0, 5])}, ValueError, "q has batch size 2, expected 1"
    for ends in ([0, 4], [1, 5], [0, 3, 2, 5], []):
        ends = torch.tensor(ends, dtype=torch.int64)
        yield (one, one, one), {"cu_seqlens": ends}, ValueError, "cu_seqlens must ascend from 0 to T=5"
    both = {"cu_seqlens": torch.tensor([0, 5]), "lengths": torch.tensor([5])}
    yield (one, one, one), both, ValueError, "exclude each other"
    yield (q, q, v), {"relu2_length": 0}, ValueError, "relu2_length is 0"


@pytest.mark.parametrize("arguments, options, error, message", list(_errors()))
def test_errors_say_what_is_wrong(arguments, options, error, message):
    with pytest.raises(error, match=r"supy\.gau_attention: .*" + message):
        supy.ops.gau_attention(*arguments, **options)
