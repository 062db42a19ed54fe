"""supy.ops.ddpm_add_noise, ddpm_step and ddim_step against the posts' formulas, term by term."""

import os
import subprocess
import sys

import pytest
import torch

import _diffusion
import supy
from _compare import assert_close_to_reference
from supy import _extension

ops = supy.ops
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# name: (operator, formula, scalar coefficients, the coefficient that is also tried a sample, with its values)
STEPS = {
    "ddpm_step": (
        ops.ddpm_step,
        _diffusion.ddpm,
        {"alpha": 0.96, "beta": 0.28, "beta_bar": 0.6, "sigma": 0.2},
        ("beta_bar", [0.28, 0.6, 0.95]),
    ),
    "ddim_step": (
        ops.ddim_step,
        _diffusion.ddim,
        {"alpha_bar": 0.5, "alpha_bar_prev": 0.8, "eta": 0.7},
        ("alpha_bar", [0.1, 0.5, 0.79]),
    ),
}
SHAPES = {
    "less than a vector": (3, 2, 1),
    "a block ends inside the second sample": (3, 7, 97),
    "a sample is whole blocks": (3, 2048),
    "for several threads": (3, 3, 64, 64),
}
CLIPS = {
    "plain": {},
    "clip": {"clip": 0.4},
    "threshold": {"threshold": 0.9},
    "threshold and clip": {"threshold": 0.305, "clip": 0.1},
    "threshold near the maximum": {"threshold": 0.9999, "clip": 0.1},
}
every_step = pytest.mark.parametrize("name", STEPS)
needs_cpp = pytest.mark.skipif(_extension.C is None, reason="needs supy._C")
both_backends = pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])


def tensors(shape, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(4)]


def with_gradients(function, x, eps, noise, grad, keywords):
    leaves = [t.detach().requires_grad_() for t in (x, eps, noise)]
    out = function(*leaves[:2], noise=leaves[2], **keywords)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@every_step
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("per_sample", [False, True], ids=["numbers", "a tensor"])
def test_float64_is_the_formula(name, clip, per_sample):
    step, formula, coefficients, (which, values) = STEPS[name]
    if per_sample:
        coefficients = coefficients | {which: torch.tensor(values, dtype=torch.float64)}
    got = with_gradients(step, *tensors((3, 5, 7)), coefficients | clip)
    expected = with_gradients(formula, *tensors((3, 5, 7)), coefficients | clip)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@every_step
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_in_each_dtype(name, shape, clip, dtype):
    step, _, coefficients, (which, values) = STEPS[name]
    coefficients = coefficients | {which: torch.tensor(values, dtype=torch.float64)} | clip
    inputs = tensors(shape, dtype)
    got = with_gradients(step, *inputs, coefficients)
    exact = with_gradients(step, *(t.double() for t in inputs), coefficients)
    with supy.use_backend("reference"):
        plain = with_gradients(step, *inputs, coefficients)
    for part, factor, a, b, c in zip(("out", "dx", "deps", "dnoise"), (2, 3, 3, 3), got, exact, plain, strict=True):
        if part in ("dx", "deps") and clip:
            # Where |x0| is within rounding of the bound, either side of the step of the gradient is right.
            a = torch.where(near_the_bound(name, inputs, coefficients), b.to(dtype), a)
        # x0 = (x - beta_bar eps) / alpha_bar is up to ten times as large as x, and rounds in float32.
        assert_close_to_reference(f"{name}: {part}", a, b, c, factor, ulps=16 if clip else 4)


def near_the_bound(name, inputs, coefficients):
    """|x0| is within 1e-5 of what it is clipped to."""
    x, eps = (t.double() for t in inputs[:2])
    now = coefficients.get("alpha_bar")
    now = _diffusion.along((1 - coefficients["beta_bar"] ** 2).sqrt() if now is None else now, x)
    x0 = ((x - (1 - now**2).sqrt() * eps) / now).abs()
    clip = coefficients.get("clip", 1.0)
    bound = torch.tensor(clip)
    if "threshold" in coefficients:
        bound = _diffusion.along(torch.quantile(x0.flatten(1), coefficients["threshold"], dim=1).clamp(min=clip), x)
    return (x0 - bound).abs() < 1e-5 * (1 + bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_add_noise(shape, dtype):
    x0, noise, grad, _ = tensors(shape, dtype)
    for alpha_bar in (0.6, torch.tensor([0.6, 0.0, 1.0], dtype=torch.float64)):
        leaves = x0.requires_grad_(), noise.requires_grad_()
        got, same = ops.ddpm_add_noise(*leaves[:1], alpha_bar, 0.8, noise=leaves[1])
        assert same is noise
        exact = _diffusion.add_noise(x0.double(), alpha_bar, 0.8, noise.double())
        assert_close_to_reference("ddpm_add_noise: x_t", got.detach(), exact.detach(), exact.detach().to(dtype), 2)
        dx0, dnoise = torch.autograd.grad(got, leaves, grad)
        factor = _diffusion.along(alpha_bar, x0)
        assert_close_to_reference("dx0", dx0, factor * grad.double(), (factor * grad.double()).to(dtype), 3)
        assert_close_to_reference("dnoise", dnoise, 0.8 * grad.double(), (0.8 * grad.double()).to(dtype), 3)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 97), (5000, 2), (3, 2048)], ids=str)
def test_a_seed_is_that_noise(shape, dtype):
    """To the bit, with numbers that begin inside a block of the stream, and where samples are shorter than one."""
    x, eps, *_ = tensors(shape, dtype)
    noise = ops.philox_normal(shape, 5, offset=7, dtype=dtype)
    stream = {"seed": 5, "offset": 7}
    sigma = torch.linspace(0, 1, shape[0], dtype=torch.float64)
    for clip in CLIPS.values():
        for value in (0.3, sigma):
            given = ops.ddpm_step(x, eps, 0.96, 0.28, 0.6, value, noise=noise, **clip)
            assert ops.ddpm_step(x, eps, 0.96, 0.28, 0.6, value, **stream, **clip).equal(given)
        given = ops.ddim_step(x, eps, 0.5, 0.8, eta=sigma, noise=noise, **clip)
        assert ops.ddim_step(x, eps, 0.5, 0.8, eta=sigma, **stream, **clip).equal(given)
    x_t, made = ops.ddpm_add_noise(x, 0.6, sigma, **stream)
    assert made.equal(noise) and x_t.equal(ops.ddpm_add_noise(x, 0.6, sigma, noise=noise)[0])
    x_t, made = ops.ddpm_add_noise(x.requires_grad_(), 0.6, sigma, **stream)
    assert made.equal(noise) and x_t.grad_fn is not None


def test_threads_and_splits_give_the_same_bits():
    x, eps, *_ = tensors((4, 30_001), torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(ops.ddpm_step(x, eps, 0.96, 0.28, 0.6, 0.3, seed=1, clip=1.0))
    finally:
        torch.set_num_threads(threads)
    parts = [
        ops.ddpm_step(a, b, 0.96, 0.28, 0.6, 0.3, seed=1, offset=30_001 * i, clip=1.0)
        for i, (a, b) in enumerate(zip(x.split(1), eps.split(1)))
    ]
    assert results[0].equal(results[1]) and results[0].equal(torch.cat(parts))


@every_step
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_in_place(name, dtype):
    step, _, coefficients, _ = STEPS[name]
    x, eps, noise, _ = tensors((3, 4, 5, 6), dtype)
    expected = step(x, eps, noise=noise, **coefficients)
    for into in ("new", "x", "eps", "channels last", "every other"):
        a, b = x.clone(), eps.clone()
        out = {"x": a, "eps": b, "new": torch.empty_like(a)}.get(into)
        if into == "channels last":
            a, out = a.to(memory_format=torch.channels_last), torch.empty_like(a, memory_format=torch.channels_last)
        if into == "every other":
            out = torch.empty(3, 4, 5, 12, dtype=dtype)[..., ::2]
        version = out._version
        assert step(a, b, noise=noise, out=out, **coefficients) is out
        assert out.equal(expected), into
        assert out._version > version, "autograd would not see the change"
    # A slice of the batch is one of x too.
    a = x.clone()
    step(a[1:2], eps[1:2], noise=noise[1:2], out=a[1:2], **coefficients)
    assert a.equal(torch.cat([x[:1], expected[1:2], x[2:]]))


@needs_cpp
def test_out_that_overlaps_in_part_is_refused():
    base = torch.zeros(9)
    with pytest.raises(ValueError, match="out overlaps an input in part"):
        ops.ddim_step(base[:8], torch.zeros(8), 0.5, 0.8, out=base[1:])


@every_step
def test_nan_and_infinity(name):
    """A NaN stays where it is, also when clipped; a threshold spreads it over its sample. Silent noise is not read."""
    step, _, coefficients, _ = STEPS[name]
    quiet = coefficients | ({"sigma": 0.0} if name == "ddpm_step" else {"eta": 0.0})
    for dtype in (torch.float32, torch.float64):
        x, eps, noise, _ = tensors((2, 40), dtype)
        x[0, 3], eps[0, 35] = torch.nan, torch.nan
        for clip in ({}, {"clip": 1.0}):
            assert step(x, eps, **quiet, **clip).isnan().nonzero().tolist() == [[0, 3], [0, 35]]
        assert step(x, eps, threshold=0.5, **quiet).isnan().all(1).tolist() == [True, False]
        noise[:] = torch.nan
        assert step(x, eps, noise=noise, **quiet).isnan().sum() == 2
        x[1, 0] = torch.inf
        assert step(x, eps, clip=1.0, **quiet)[1].isinf().sum() <= 1


def test_limits_of_the_coefficients():
    x, eps, *_ = tensors((2, 5))
    # Nothing was added yet: beta_bar = beta = 0.
    assert ops.ddpm_step(x, eps, 1.0, 0.0, 0.0, 0.0).equal(x)
    assert ops.ddpm_step(x, eps, 1.0, 0.0, 0.0, 0.0, clip=0.5).equal(x.clamp(-0.5, 0.5))
    assert ops.ddim_step(x, eps, 1.0, 1.0, eta=1.0).equal(x)
    assert ops.ddim_step(x, eps, 1.0, 1.0, clip=0.5).equal(x.clamp(-0.5, 0.5))
    # From data to noise and all the way.
    torch.testing.assert_close(ops.ddim_step(x, eps, 1.0, 0.6), 0.6 * x + 0.8 * eps)
    torch.testing.assert_close(ops.ddim_step(x, eps, 0.6, 0.0), eps)
    # To the data: x0, and no noise whatever eta is.
    x0 = (x - 0.8 * eps) / 0.6
    torch.testing.assert_close(ops.ddim_step(x, eps, 0.6, 1.0, eta=1.0), x0)
    torch.testing.assert_close(ops.ddim_step(x, eps, 0.6, 1.0, clip=0.5), x0.clamp(-0.5, 0.5))
    # eta = 1 is the ancestral step with sigma = beta_bar_prev beta / beta_bar.
    now, previous = torch.tensor([0.5, 0.8], dtype=torch.float64)
    alpha = now / previous
    beta, beta_bar, before = ((1 - a**2).sqrt() for a in (alpha, now, previous))
    ancestral = ops.ddpm_step(x, eps, alpha, beta, beta_bar, before * beta / beta_bar, seed=1)
    torch.testing.assert_close(ops.ddim_step(x, eps, now, previous, eta=1.0, seed=1), ancestral)


@every_step
def test_coefficients_may_be_tensors_of_any_kind(name):
    """Of no axis, of float32 or half precision, strided; a NumPy number."""
    step, _, coefficients, (which, values) = STEPS[name]
    x, eps, noise, _ = tensors((3, 4), torch.float32)
    expected = step(x, eps, noise=noise, **coefficients)
    number = torch.tensor(coefficients[which], dtype=torch.float64)
    for value in (number, number.expand(3), torch.stack([number, 0 * number] * 3)[::2], number.numpy()[()]):
        assert step(x, eps, noise=noise, **coefficients | {which: value}).equal(expected)
    near = step(x, eps, noise=noise, **coefficients | {which: torch.tensor(coefficients[which])})
    torch.testing.assert_close(near, expected, rtol=1e-5, atol=1e-5)
    rough = step(x, eps, noise=noise, **coefficients | {which: torch.tensor([0.5] * 3).half()})
    torch.testing.assert_close(rough, step(x, eps, noise=noise, **coefficients | {which: 0.5}), rtol=0, atol=0)


ISA_SCRIPT = """
import sys, torch, supy
torch.manual_seed(0)
x, eps = torch.randn(2, 3, 1037)
made = []
with supy.use_backend("cpp"):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = x.to(dtype), eps.to(dtype)
        a.requires_grad_()
        for options in ({}, {"clip": 0.5}, {"threshold": 0.9}):
            out = supy.ops.ddpm_step(a, b, 0.96, 0.28, 0.6, 0.3, seed=1, offset=1, **options)
            made += [out.detach(), torch.autograd.grad(out.sum(), a)[0]]
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
            # They differ by whether a multiplication and an addition round together, and in the noise by a few ulp.
            digit = 8 * 2**-23 if got.dtype == torch.float32 else 2 * torch.finfo(got.dtype).eps
            torch.testing.assert_close(got, generic, rtol=digit, atol=digit, msg=lambda m: f"{isa}: {m}")


X = torch.zeros(2, 3)


@both_backends
@pytest.mark.parametrize(
    "name, change, error, message",
    [
        ("ddpm_step", {"eps": None}, TypeError, "eps is a NoneType, expected a torch.Tensor"),
        ("ddpm_step", {"eps": torch.zeros(2, 4)}, ValueError, r"eps has shape \[2, 4\], expected \[2, 3\] \(from x\)"),
        ("ddpm_step", {"eps": X.double()}, TypeError, "eps has dtype torch.float64, expected torch.float32"),
        ("ddpm_step", {"noise": X, "seed": 1}, ValueError, "got both noise and seed"),
        ("ddpm_step", {"noise": None}, ValueError, "the noise has a weight other than 0: pass noise or seed"),
        ("ddim_step", {"noise": None}, ValueError, "the noise has a weight other than 0: pass noise or seed"),
        ("ddpm_step", {"noise": None, "seed": 1.5}, TypeError, "seed is a float, expected an int"),
        ("ddpm_step", {"noise": None, "seed": 1, "offset": -1}, ValueError, "offset is -1"),
        ("ddpm_step", {"alpha": 0.0}, ValueError, r"alpha is \[?0.*, expected more than 0"),
        ("ddpm_step", {"alpha": torch.nan}, ValueError, r"alpha is \[?nan.*, expected more than 0"),
        ("ddpm_step", {"sigma": -1}, ValueError, r"sigma is \[?-1.*, expected at least 0"),
        ("ddpm_step", {"beta_bar": 0.0}, ValueError, "beta_bar is .*0"),
        ("ddpm_step", {"beta_bar": 1.0, "clip": 1.0}, ValueError, r"beta_bar is \[?1.*, expected less than 1"),
        ("ddpm_step", {"alpha": "0.5x"}, TypeError, "alpha is a str, expected a float or a torch.Tensor"),
        ("ddpm_step", {"alpha": torch.ones(3)}, ValueError, r"alpha has shape \[3\], expected \[\] or \[2\]"),
        ("ddpm_step", {"alpha": torch.ones(2).long()}, TypeError, "alpha has dtype torch.int64"),
        ("ddpm_step", {"alpha": torch.ones(2, requires_grad=True)}, ValueError, "alpha requires a gradient"),
        ("ddpm_step", {"clip": 0}, ValueError, "clip is 0.0, expected more than 0"),
        ("ddpm_step", {"threshold": 1.5}, ValueError, "threshold is 1.5, expected a quantile from 0 to 1"),
        ("ddpm_step", {"out": torch.zeros(3)}, ValueError, r"out has shape \[3\], expected \[2, 3\] \(from x\)"),
        ("ddpm_step", {"x": X.clone().requires_grad_(), "out": X.clone()}, ValueError, "out= records no gradient"),
        ("ddim_step", {"alpha_bar": 0.0}, ValueError, r"alpha_bar is \[?0.*, expected above 0 to 1"),
        ("ddim_step", {"alpha_bar": torch.tensor([0.5, 1.5])}, ValueError, "alpha_bar is .*1.5.*, expected above 0"),
        ("ddim_step", {"alpha_bar_prev": 1.1}, ValueError, r"alpha_bar_prev is \[?1.1.*, expected 0 to 1"),
        ("ddim_step", {"alpha_bar_prev": 0.1}, ValueError, "alpha_bar_prev is .*alpha_bar where eta is not 0"),
        ("ddim_step", {"eta": -0.5}, ValueError, r"eta is \[?-0.5.*, expected at least 0"),
        ("ddim_step", {"alpha_bar": 1.0, "alpha_bar_prev": 0.5, "eta": 0, "clip": 1}, ValueError, "alpha_bar is .*1"),
    ],
)
def test_errors_say_what_is_wrong(name, change, error, message, backend):
    step, _, coefficients, _ = STEPS[name]
    with supy.use_backend(backend), pytest.raises(error, match=rf"supy\.{name}: " + message):
        step(**{"x": X, "eps": X, "noise": X} | coefficients | change)


def test_add_noise_errors():
    for options in ({}, {"noise": X, "seed": 1}):
        with pytest.raises(ValueError, match=r"supy\.ddpm_add_noise: expected exactly one of noise and seed"):
            ops.ddpm_add_noise(X, 0.6, 0.8, **options)
    with pytest.raises(ValueError, match=r"supy\.ddpm_add_noise: alpha_bar is .*nan.*, expected .*finite"):
        ops.ddpm_add_noise(X, float("nan"), 0.8, seed=1)
    with pytest.raises(TypeError, match=r"supy\.ddpm_add_noise: x0 has dtype torch.int64"):
        ops.ddpm_add_noise(X.long(), 0.6, 0.8, seed=1)
