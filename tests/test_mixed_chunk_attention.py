"""supy.ops.mixed_chunk_attention against a loop over tokens, and its recurrent step against the whole."""

import math
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing

import supy
from _compare import assert_close_to_reference
from supy.ops import MixedChunkState, mixed_chunk_attention, mixed_chunk_step

NAMES = ("q_quad", "k_quad", "q_lin", "k_lin", "v", "u")

# name: (B, T, S, E, c, lengths)
REGIMES = {
    "one token": (2, 1, 4, 3, 4, None),
    "15 tokens in chunks of 16": (1, 15, 4, 3, 16, None),
    "one chunk, full": (1, 16, 4, 3, 16, None),
    "one chunk and one token": (2, 17, 5, 3, 16, None),
    "chunks of one token": (1, 6, 3, 2, 1, None),
    "a chunk less one token": (2, 11, 4, 5, 4, None),
    "whole chunks": (1, 12, 4, 3, 4, None),
    "a chunk and one token more": (1, 13, 4, 3, 4, None),
    "lengths 0, in the first chunk, at its end, T": (4, 14, 4, 3, 5, [0, 3, 5, 14]),
    "lengths in chunks that are padding": (2, 20, 3, 4, 4, [13, 8]),
    "sizes above a vector": (1, 70, 33, 40, 32, [67]),
}
every_regime = pytest.mark.parametrize("regime", REGIMES)
both_forms = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def _make(regime, dtype=torch.float64):
    B, T, S, E, c, lengths = REGIMES[regime]
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn((B, T, n), generator=generator, dtype=torch.float64) for n in (S, S, S, S, E, E)]
    options = {"chunk_size": c, "lengths": None if lengths is None else torch.tensor(lengths)}
    return [x.to(dtype).requires_grad_() for x in tensors], options


def by_tokens(q_quad, k_quad, q_lin, k_lin, v, u, chunk_size, causal, lengths=None, normalizer="tokens"):
    """Each row from its own two lists of tokens; no product k^T v is ever formed."""
    B, T, S = q_quad.shape
    c = chunk_size
    rows = []
    for b in range(B):
        n = T if lengths is None else int(lengths[b])
        for i in range(T):
            row = v[b, i].nan_to_num() * 0
            if i < n:
                first = i - i % c
                for j in range(first, i + 1 if causal else min(first + c, n)):
                    score = (q_quad[b, i] * k_quad[b, j]).sum() / math.sqrt(S)
                    row = row + torch.relu(score) ** 2 / c * v[b, j]
                seen = first if causal else n
                divisor = seen
                if causal and normalizer == "chunk_size":
                    divisor = c
                elif causal and normalizer == "chunks":
                    divisor = first // c * math.ceil(n / c)
                for j in range(seen):
                    row = row + (q_lin[b, i] * k_lin[b, j]).sum() * v[b, j] / divisor
                if u is not None:
                    row = row * u[b, i]
            rows.append(row)
    return torch.stack(rows).view(v.shape)


def _gradients(function, tensors, weight):
    out = function(*tensors)
    return [out, *torch.autograd.grad((out * weight).sum(), tensors, allow_unused=True, materialize_grads=True)]


@both_forms
@every_regime
def test_float64_is_the_loop_over_tokens(regime, causal):
    tensors, options = _make(regime)
    weight = torch.randn(tensors[4].shape, dtype=torch.float64)
    for count in (5, 6):  # without and with the gate
        given = tensors[:count]
        got = _gradients(lambda *x: mixed_chunk_attention(*x, causal=causal, **options), given, weight)
        expected = _gradients(lambda *x: by_tokens(*x, *[None] * (6 - count), causal=causal, **options), given, weight)
        for name, a, b in zip(("out", *NAMES), got, expected):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("normalizer", ["chunk_size", "chunks"])
def test_other_normalizers(normalizer):
    for regime in ("a chunk less one token", "lengths in chunks that are padding"):
        tensors, options = _make(regime)
        weight = torch.randn(tensors[4].shape, dtype=torch.float64)
        options = {**options, "causal": True, "normalizer": normalizer}
        got = _gradients(lambda *x: mixed_chunk_attention(*x, **options), tensors, weight)
        expected = _gradients(lambda *x: by_tokens(*x, **options), tensors, weight)
        for name, a, b in zip(("out", *NAMES), got, expected):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda m: f"{name}: {m}")
        options["causal"] = False
        full = mixed_chunk_attention(*tensors, **options)
        assert torch.equal(full, mixed_chunk_attention(*tensors, **{**options, "normalizer": "tokens"}))


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_regime
def test_values_and_gradients_in_each_dtype(regime, dtype, causal):
    tensors, options = _make(regime, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    weight = torch.randn(tensors[4].shape).to(dtype)

    def run(function, given):
        return _gradients(function, given, weight.to(given[0].dtype))

    def ours(*given):
        return mixed_chunk_attention(*given, causal=causal, **options)

    got, exact = run(ours, tensors), run(ours, exact)
    plain = run(lambda *x: by_tokens(*x, causal=causal, **options), tensors)
    for i, name in enumerate(("out", *NAMES)):
        factor = 2 if i == 0 else 3
        assert_close_to_reference(f"mixed_chunk_attention: {name}", got[i], exact[i], plain[i], factor)


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chunk_of_several_blocks_of_rows(dtype, causal):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn((2, 430, n), generator=generator, dtype=torch.float64) for n in (20, 20, 20, 20, 50, 50)]
    options = {"chunk_size": 150, "causal": causal, "lengths": torch.tensor([430, 270])}
    weight = torch.randn(tensors[4].shape).to(dtype)

    def run(working):
        given = [x.to(dtype).to(working).requires_grad_() for x in tensors]
        return _gradients(lambda *x: mixed_chunk_attention(*x, **options), given, weight.to(working))

    exact, got = run(torch.float64), run(dtype)
    with supy.use_backend("reference"):
        plain = run(dtype)
    for i, name in enumerate(("out", *NAMES)):
        assert_close_to_reference(f"mixed_chunk_attention: {name}", got[i], exact[i], plain[i], 3 if i else 2)


@both_forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_padding_has_no_effect(dtype, causal):
    """NaN in the padding reaches neither the values nor a gradient; rows there are 0, and so are their gradients."""
    tensors, options = _make("lengths in chunks that are padding", dtype)
    dirty = [x.detach().clone() for x in tensors]
    for x in dirty:
        x[0, 13:] = torch.nan
    dirty = [x.requires_grad_() for x in dirty]
    clean = None
    for given in (tensors, dirty):
        out = mixed_chunk_attention(*given, causal=causal, **options)
        grad = torch.ones_like(out)
        grad[0, 13:] = torch.nan if given is dirty else 1
        grads = torch.autograd.grad(out, given, grad)
        assert (out[0, 13:] == 0).all() and all((x[0, 13:] == 0).all() for x in grads)
        clean = clean or (out, *grads)
    for a, b in zip((out, *grads), clean):
        assert torch.equal(a, b)
    alone = mixed_chunk_attention(*(x[:1, :13] for x in tensors), causal=causal, chunk_size=4)
    torch.testing.assert_close(alone[0], out[0, :13])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_causal_rows_do_not_look_ahead(dtype):
    tensors, _ = _make("a chunk less one token", dtype)
    out = mixed_chunk_attention(*tensors, chunk_size=4, causal=True)
    later = [torch.cat((x[:, :6], torch.full_like(x[:, 6:], torch.inf)), 1) for x in tensors]
    later[4] = torch.cat((tensors[4][:, :6], 9 * tensors[4][:, 6:]), 1)  # 0 times infinity is no secret either
    assert torch.equal(mixed_chunk_attention(*later, chunk_size=4, causal=True)[:, :6], out[:, :6])


@both_forms
@pytest.mark.parametrize("chunk_size", [17, 40])
def test_one_chunk_is_gau_attention(chunk_size, causal):
    """From T on, the quadratic part is all of gau_attention with the kernel relu2 and the divisor c."""
    tensors, _ = _make("one chunk and one token")
    q, k, _, k_lin, v, u = tensors
    zero = torch.zeros_like(q)
    got = mixed_chunk_attention(q, k, zero, k_lin, v, u, chunk_size=chunk_size, causal=causal)
    expected = supy.ops.gau_attention(q, k, v, u, kernel="relu2", relu2_length=chunk_size, causal=causal)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def _step_by_step(tensors, state, first=0, **options):
    rows = range(first, tensors[4].shape[1])
    return [mixed_chunk_step(*(x[:, t] for x in tensors), state=state, **options) for t in rows]


def _state_for(tensors, chunk_size):
    B, _, S = tensors[0].shape
    return MixedChunkState(B, S, tensors[4].shape[2], chunk_size, tensors[0].dtype)


@pytest.mark.parametrize("normalizer", ["tokens", "chunk_size"])
@pytest.mark.parametrize("regime", [name for name, sizes in REGIMES.items() if sizes[-1] is None])
def test_steps_are_the_rows(regime, normalizer):
    tensors, options = _make(regime)
    state = _state_for(tensors, options["chunk_size"])
    rows = torch.stack(_step_by_step(tensors, state, normalizer=normalizer), 1)
    expected = mixed_chunk_attention(*tensors, **options, causal=True, normalizer=normalizer)
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-13)
    without = torch.stack(_step_by_step(tensors[:5], _state_for(tensors, options["chunk_size"])), 1)
    torch.testing.assert_close(without, mixed_chunk_attention(*tensors[:5], **options, causal=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_in_each_dtype(dtype):
    tensors, options = _make("a chunk less one token", dtype)
    rows = torch.stack(_step_by_step(tensors, _state_for(tensors, 4)), 1)
    plain = by_tokens(*tensors, causal=True, **options)
    exact = by_tokens(*(x.double() for x in tensors), causal=True, **options)
    assert_close_to_reference("mixed_chunk_step: out", rows, exact, plain, 2)


@pytest.mark.parametrize("prompt", [0, 1, 3, 4, 5, 8, 11])
def test_steps_go_on_from_a_prompt(prompt):
    """Empty, in the first chunk, one whole chunk, several."""
    tensors, options = _make("a chunk less one token")
    q, k, q_lin, k_lin, v, u = tensors
    state = _state_for(tensors, 4)
    _step_by_step(tensors, state)  # what it held is forgotten
    state.read(k[:, :prompt], k_lin[:, :prompt], v[:, :prompt])
    stepped = _state_for(tensors, 4)
    _step_by_step([x[:, :prompt] for x in tensors], stepped)
    expected = mixed_chunk_attention(*tensors, **options, causal=True)[:, prompt:].unbind(1)
    for start in (state, stepped):
        for row, right in zip(_step_by_step(tensors, start, prompt), expected, strict=True):
            torch.testing.assert_close(row, right, rtol=1e-12, atol=1e-13)


def test_prompts_of_different_lengths():
    """Sample b has read its first lengths[b] tokens and goes on with the next; NaN in the padding is not read."""
    tensors, _ = _make("lengths 0, in the first chunk, at its end, T")
    lengths = torch.tensor([0, 3, 5, 8])
    state = _state_for(tensors, 5)
    padded = [x.detach()[:, :8].clone() for x in (tensors[1], tensors[3], tensors[4])]
    for x in padded:
        for b, n in enumerate(lengths):
            x[b, n:] = torch.nan
    state.read(*padded, lengths=lengths)
    assert state.position.tolist() == lengths.tolist()
    expected = mixed_chunk_attention(*tensors, chunk_size=5, causal=True)
    for step in range(6):
        at = lengths + step
        row = mixed_chunk_step(*(x[torch.arange(4), at] for x in tensors), state=state)
        torch.testing.assert_close(row, expected[torch.arange(4), at], rtol=1e-12, atol=1e-13)


def test_steps_take_one_graph_and_no_more_memory():
    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(mixed_chunk_step, fullgraph=True, backend=backend)
    tensors, options = _make("a chunk and one token more")
    state = _state_for(tensors, 4)
    before = {name: (x.data_ptr(), x.shape) for name, x in vars(state).items() if isinstance(x, torch.Tensor)}
    rows = [step(*(x[:, t].detach() for x in tensors), state=state) for t in range(13)]
    expected = mixed_chunk_attention(*tensors, **options, causal=True)
    torch.testing.assert_close(torch.stack(rows, 1), expected)
    assert backend.frame_count == 1
    after = {name: (x.data_ptr(), x.shape) for name, x in vars(state).items() if isinstance(x, torch.Tensor)}
    assert after == before and len(after) == 5 and vars(state).keys() == {*after, "chunk_size"}


MEMORY_SCRIPT = """
import resource, torch, supy
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def run(T):
    tensors = [torch.randn(1, T, n).requires_grad_() for n in (16, 16, 16, 16, 32, 32)]
    before = peak()
    supy.ops.mixed_chunk_attention(*tensors, chunk_size=64, causal=CAUSAL).sum().backward()
    return peak() - before
run(256)
print(*(run(T) for T in (16384, 65536)))
"""


@both_forms
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in kB")
def test_memory_is_linear(causal):
    """A square of 16,384 tokens alone would take 1,024 MB; four times the tokens take four times the memory."""
    script = MEMORY_SCRIPT.replace("CAUSAL", str(causal))
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=300)
    short, long = map(float, result.stdout.split())
    assert short < 64 and long < 256, (short, long)


def _errors():
    q, v = torch.zeros(2, 5, 4), torch.zeros(2, 5, 3)
    full = r"k_lin has shape \[2, 4, 4\], expected \[B, T, S\] with B=2, T=5, S=4 \(from q_quad\)"
    yield (q, q, q, q[:, 1:], v), {}, ValueError, full
    yield (q[0], q, q, q, v), {}, ValueError, r"q_quad has shape \[5, 4\], expected \[B, T, S\]"
    yield (q, q[..., 1:], q, q, v), {}, ValueError, r"k_quad has shape \[2, 5, 3\]"
    yield (q, q, q, q, v[:1]), {}, ValueError, r"v has shape \[1, 5, 3\]"
    yield (q, q, q, q, v, q), {}, ValueError, r"u has shape \[2, 5, 4\]"
    yield (q, q, q.double(), q, v), {}, TypeError, "q_lin has dtype torch.float64, expected torch.float32"
    yield (q, q, q, q, v), {"chunk_size": 0}, ValueError, "chunk_size is 0, expected 1 or more"
    expected = "normalizer is 'n', expected one of tokens, chunk_size, chunks"
    yield (q, q, q, q, v), {"normalizer": "n"}, ValueError, expected
    yield (q, q, q, q, v), {"lengths": torch.tensor([1, 6])}, ValueError, r"lengths\[1\] is 6, expected 0 to T=5"
    yield (q, q, q, q, v), {"lengths": torch.tensor([-1, 5])}, ValueError, r"lengths\[0\] is -1"
    yield (q, q, q, q, v), {"lengths": torch.ones(2)}, TypeError, "lengths has dtype torch.float32"
    yield (q, q, q, q, v), {"lengths": torch.ones(3).long()}, ValueError, r"lengths has shape \[3\]"


@pytest.mark.parametrize("arguments, options, error, message", list(_errors()))
def test_errors_say_what_is_wrong(arguments, options, error, message):
    with pytest.raises(error, match=r"supy\.mixed_chunk_attention: .*" + message):
        mixed_chunk_attention(*arguments, **options)


def _step_errors():
    q, v, state = torch.zeros(2, 4), torch.zeros(2, 3), MixedChunkState(2, 4, 3, 8)
    yield (q, q, q, q[:, 1:], v), {"state": state}, ValueError, r"k_lin has shape \[2, 3\], expected \[B, S\]"
    yield (q[:1], q, q, q, v), {"state": state}, ValueError, r"q_quad has shape \[1, 4\], .* B=2, S=4 \(from state\)"
    yield (q, q, q, q, v[:, 1:]), {"state": state}, ValueError, r"v has shape \[2, 2\]"
    yield (q, q, q, q, v.double()), {"state": state}, TypeError, "v has dtype torch.float64, expected torch.float32"
    yield (q, q, q, q, v), {"state": None}, TypeError, "state is a NoneType, expected a MixedChunkState"
    yield (q, q, q, q, v), {"state": state, "normalizer": "chunks"}, ValueError, "depends on how many tokens follow"


@pytest.mark.parametrize("arguments, options, error, message", list(_step_errors()))
def test_errors_of_a_step_say_what_is_wrong(arguments, options, error, message):
    with pytest.raises(error, match=r"supy\.mixed_chunk_step: .*" + message):
        mixed_chunk_step(*arguments, **options)


def test_errors_of_a_state_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"supy\.MixedChunkState: chunk_size is 0, expected 1 or more"):
        MixedChunkState(1, 4, 4, 0)
    state, k, v = MixedChunkState(2, 4, 3, 8), torch.zeros(2, 5, 4), torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match=r"supy\.MixedChunkState\.read: k_lin has shape \[2, 4, 4\]"):
        state.read(k, k[:, 1:], v)
    with pytest.raises(ValueError, match=r"supy\.MixedChunkState\.read: lengths\[1\] is 6, expected 0 to T=5"):
        state.read(k, k, v, lengths=torch.tensor([5, 6]))
