"""supy.ops.philox_normal: the published words, the distribution, and one stream on every path."""

import math
import os
import subprocess
import sys

import pytest
import torch

import supy
from supy import _extension
from supy.reference.philox_normal import philox

normal = supy.ops.philox_normal
MILLIONS = 10**7
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_cpp = pytest.mark.skipif(_extension.C is None, reason="needs supy._C")


@pytest.fixture(scope="module")
def many():
    return normal(MILLIONS, seed=11)


# philox4x32-10 in the file kat_vectors of Random123: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_known_answers_of_random123(counter, key, words):
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert [int(word) for word in philox([torch.tensor(word) for word in counter], tuple(key))] == words


def by_the_definition(seed, index):
    """Number ``index`` of the stream in Python integers and floats."""
    a, b, c, d = (index // 4) & 0xFFFFFFFF, index // 4 >> 32, 0, 0
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = second >> 32 ^ b ^ k0, second & 0xFFFFFFFF, first >> 32 ^ d ^ k1, first & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    w0, w1 = (a, b) if index % 4 < 2 else (c, d)
    u = torch.tensor(w0).float().div(2**32).add(2**-33).item()
    turn = math.cos if index % 2 == 0 else math.sin
    return math.sqrt(-2 * math.log(u)) * turn(2 * math.pi * w1 / 2**32)


# The second word of the counter changes inside a vector; the last blocks of the stream; a negative seed.
STREAMS = [(0, 0), (5, 3), (2**40 + 1, 1025), (3, 4 * 2**32 - 29), (-1, 2**63 - 1 - 300)]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("seed, offset", STREAMS)
def test_numbers_are_those_of_the_definition(backend, seed, offset):
    expected = torch.tensor([by_the_definition(seed, offset + i) for i in range(150)], dtype=torch.float64)
    with supy.use_backend(backend):
        got = normal(150, seed, offset=offset).double()
    # Logarithm, root, sine, product: each about 1 ulp of float32 of the number itself, however small it is.
    torch.testing.assert_close(got, expected, rtol=4 * 2**-23, atol=0)


def test_every_number_is_precise():
    """A million numbers, relative to each: also near zero, where sine, cosine or logarithm vanish."""
    with supy.use_backend("reference"):
        expected = normal(10**6, seed=2, dtype=torch.float64)
    error = (normal(10**6, seed=2).double() - expected).abs() / expected.abs()
    assert error.max() < 4 * 2**-23


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision_rounds_float32(dtype):
    assert normal(10_001, seed=4, offset=5, dtype=dtype).equal(normal(10_001, seed=4, offset=5).to(dtype))


def test_threads_and_splits_give_the_same_bits(many):
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert normal(100_003, seed=11).equal(many[:100_003])
    finally:
        torch.set_num_threads(threads)
    begin = 0
    for size in (1, 2, 3, 4, 61, 64, 65, 1023, 1024, 30_000, 8193):
        assert normal(size, seed=11, offset=begin).equal(many[begin : begin + size]), begin
        begin += size


def test_moments(many):
    """Each within five standard deviations of its estimate."""
    moments = [many.double().pow(k).mean().item() for k in (1, 2, 3, 4, 6)]
    spread = [1, 2, 15, 96, 10170]  # the variances of x^k: E x^2k - (E x^k)^2
    for moment, expected, variance in zip(moments, (0, 1, 0, 3, 15), spread):
        assert abs(moment - expected) < 5 * math.sqrt(variance / MILLIONS)


def test_tails(many):
    """How many are beyond 3, 4 and 5 standard deviations, each within five of the count's own; none is beyond 6.77."""
    for bound in (3.0, 4.0, 5.0):
        expected = MILLIONS * math.erfc(bound / math.sqrt(2))
        assert abs((many.abs() > bound).sum().item() - expected) < 5 * math.sqrt(expected)
    assert many.abs().max() < 6.77


def uniform(x):
    return torch.special.ndtr(x.double())


def test_chi_square(many):
    """1000 equally probable bins: chi-square of 999 degrees, mean 999, deviation 44.7."""
    counts = torch.histc(uniform(many).float(), 1000, 0, 1).double()
    assert abs((counts - 1e4).square().sum().item() / 1e4 - 999) < 5 * math.sqrt(2 * 999)


def test_kolmogorov_smirnov(many):
    ordered = uniform(many.sort().values)
    steps = torch.arange(MILLIONS + 1, dtype=torch.float64) / MILLIONS
    distance = max((ordered - steps[:-1]).max().item(), (steps[1:] - ordered).max().item())
    assert distance * math.sqrt(MILLIONS) < 1.95  # exceeded once in a thousand streams


def test_independence(many):
    """Correlations with neighbours and of streams of neighbouring seeds, also of squares: five deviations of a mean."""
    others = {
        **{f"distance {lag}": many[lag : 10**6 + lag] for lag in (1, 2, 3, 4, 5, 8, 64, 1024)},
        "the next seed": normal(10**6, seed=12),
        "a seed with another upper half": normal(10**6, seed=11 + 2**32),
        "far away": normal(10**6, seed=11, offset=2**40),
    }
    x = many[: 10**6].double()
    for name, other in others.items():
        other = other.double()
        assert abs((x * other).mean()) < 5e-3, name
        assert abs(((x * x - 1) * (other * other - 1)).mean()) < 2 * 5e-3, name
    assert not many[: 10**6].equal(others["the next seed"])


ISA_SCRIPT = """
import sys, torch, supy
normal = supy.ops.philox_normal
with supy.use_backend("cpp"):
    made = [normal(10_001, seed=3, offset=k, dtype=d) for k in (0, 1) for d in (torch.float32, torch.bfloat16)]
torch.save(made, sys.argv[1])
"""


@needs_cpp
def test_every_instruction_set_agrees(tmp_path):
    results = {}
    for isa in ("generic", "avx2", "avx512"):
        environment = {**os.environ, "SUPY_ISA": isa}
        subprocess.run([sys.executable, "-c", ISA_SCRIPT, tmp_path / isa], env=environment, check=True, timeout=120)
        results[isa] = torch.load(tmp_path / isa)
    for isa in ("avx2", "avx512"):
        for got, generic in zip(results[isa], results["generic"], strict=True):
            # They differ by whether a multiplication and an addition round together.
            digit = max(4 * 2**-23, torch.finfo(got.dtype).eps if got.dtype != torch.float32 else 0)
            torch.testing.assert_close(got, generic, rtol=digit, atol=0, msg=lambda m: f"{isa}: {m}")


def test_out_and_shapes():
    out = torch.empty(4, 6)
    assert normal((4, 6), seed=1, out=out) is out
    assert out.equal(normal(24, seed=1).view(4, 6))
    turned = torch.empty(6, 4).t()
    assert normal((4, 6), seed=1, out=turned).equal(out)
    assert normal((0, 3), seed=1).shape == (0, 3)
    assert normal((), seed=1).equal(normal(1, seed=1)[0])


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((3, 0.5), {}, TypeError, "seed is a float, expected an int"),
        ((3, 2**63), {}, ValueError, r"seed is 9223372036854775808, expected -9223372036854775808 to 2\^63 - 1"),
        ((3, 0), {"offset": -1}, ValueError, "offset is -1, expected 0 to"),
        ((-3, 0), {}, ValueError, r"shape is \[-3\], expected no negative size"),
        ((3, 0), {"dtype": torch.int64}, TypeError, "dtype is torch.int64"),
        ((3, 0), {"out": torch.empty(4)}, ValueError, r"out has shape \[4\], expected \[3\]"),
        ((3, 0), {"out": torch.empty(3, requires_grad=True)}, ValueError, "out requires a gradient"),
        ((3, 0), {"out": [0.0]}, TypeError, "out is a list"),
    ],
)
def test_errors_say_what_is_wrong(arguments, options, error, message):
    with pytest.raises(error, match=r"supy\.philox_normal: " + message):
        normal(*arguments, **options)
