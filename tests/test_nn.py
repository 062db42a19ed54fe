"""The modules: what they compute, against their own formulas written another way, and that they train and compile."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from supy.nn import EfficientGlobalPointer, GatedAttentionUnit, GlobalPointer, MixedChunkAttention, ScaleNorm


def complex_rotary(x):
    frequency = 10000.0 ** (-torch.arange(0, x.shape[2], 2, dtype=x.dtype) / x.shape[2])
    angle = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), frequency)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2)


def test_gated_attention_unit_is_its_formula():
    torch.manual_seed(0)
    unit = GatedAttentionUnit(12, value_size=20, key_size=8).double()
    with torch.no_grad():
        unit.scale.normal_()
        unit.offset.normal_()
    x = torch.randn(2, 19, 12, dtype=torch.float64)
    u, v, z = (part * part.sigmoid() for part in (x @ unit.project_in.weight.T).split((20, 20, 8), -1))
    q, k = (complex_rotary(z * unit.scale[i] + unit.offset[i]) for i in (0, 1))
    factor = math.log(19) / math.log(512) / math.sqrt(8)
    expected = (u * ((q @ k.mT * factor).softmax(-1) @ v)) @ unit.project_out.weight.T
    torch.testing.assert_close(unit(x), expected, rtol=1e-10, atol=1e-12)


def test_gated_attention_unit_sees_no_padding():
    unit = GatedAttentionUnit(8, key_size=4)
    x = torch.randn(2, 6, 8)
    padded = x.clone()
    padded[0, 3:] = 100.0
    lengths = torch.tensor([3, 6])
    assert torch.equal(unit(x, lengths=lengths)[0, :3], unit(padded, lengths=lengths)[0, :3])
    torch.testing.assert_close(unit(x[:1, :3])[0], unit(x, lengths=lengths)[0, :3])


def test_causal_unit_does_not_look_ahead():
    unit = GatedAttentionUnit(8, key_size=4, causal=True)
    x = torch.randn(1, 6, 8)
    later = x.clone()
    later[:, 4:] += 1
    torch.testing.assert_close(unit(x)[:, :4], unit(later)[:, :4])


@pytest.mark.parametrize("causal", [False, True])
def test_mixed_chunk_attention_is_its_formula(causal):
    torch.manual_seed(0)
    layer = MixedChunkAttention(12, value_size=20, key_size=8, chunk_size=6, causal=causal).double()
    with torch.no_grad():
        layer.scale.normal_()
        layer.offset.normal_()
    x = torch.randn(2, 18, 12, dtype=torch.float64)
    u, v, z = (part * part.sigmoid() for part in (x @ layer.project_in.weight.T).split((20, 20, 8), -1))
    q, k, q_lin, k_lin = (complex_rotary(z * layer.scale[i] + layer.offset[i]) for i in range(4))
    chunk = torch.arange(18) // 6
    same, earlier = chunk[:, None] == chunk, (chunk[:, None] > chunk).double()
    near = (q @ k.mT / math.sqrt(8)).relu() ** 2 / 6 * (same.tril() if causal else same)
    far = q_lin @ k_lin.mT * (earlier / earlier.sum(1, keepdim=True).clamp(min=1) if causal else 1 / 18)
    expected = (u * ((near + far) @ v)) @ layer.project_out.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


def test_mixed_chunk_attention_sees_no_padding():
    layer = MixedChunkAttention(8, key_size=4, chunk_size=2)
    x = torch.randn(2, 6, 8)
    padded = x.clone()
    padded[0, 3:] = 100.0
    lengths = torch.tensor([3, 6])
    assert torch.equal(layer(x, lengths=lengths)[0, :3], layer(padded, lengths=lengths)[0, :3])
    torch.testing.assert_close(layer(x[:1, :3])[0], layer(x, lengths=lengths)[0, :3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_chunk_attention_goes_token_by_token(dtype):
    torch.manual_seed(0)
    layer = MixedChunkAttention(8, key_size=4, chunk_size=3, causal=True, normalizer="chunk_size").to(dtype)
    x = torch.randn(3, 10, 8).to(dtype)
    state = layer.state(3)
    rows = torch.stack([layer.step(x[:, t], state) for t in range(10)], 1)
    # They round at different places, and each is off by one or two ulp of the largest value.
    tolerance = {"rtol": 0, "atol": 4 * 2**-7 * layer(x).abs().max().item()} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(rows, layer(x), **tolerance)

    lengths = torch.tensor([0, 4, 7])  # each sample goes on where its prompt ends
    prompt, state = layer.prefill(x[:, :7], lengths=lengths)
    torch.testing.assert_close(prompt, layer(x[:, :7], lengths=lengths), **tolerance)
    for step in range(3):
        at = lengths + step
        row = layer.step(x[torch.arange(3), at], state)
        torch.testing.assert_close(row, layer(x)[torch.arange(3), at], **tolerance)

    with torch.autocast("cpu", torch.bfloat16):  # whose projections are bfloat16, whatever the parameters are
        _, state = layer.prefill(x)
        assert layer.step(x[:, 0], state).dtype == torch.bfloat16 == state.v.dtype
    with pytest.raises(ValueError, match=r"supy\.MixedChunkAttention: only a layer with causal=True"):
        MixedChunkAttention(8).prefill(x)


def test_scale_norm_is_its_formula():
    norm = ScaleNorm(5, eps=0.5).double()
    with torch.no_grad():
        norm.scale.fill_(-3)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    expected = -3 * x / (x.square().sum(-1, keepdim=True) / 5 + 0.5).sqrt()
    torch.testing.assert_close(norm(x), expected)
    for a, b in zip(torch.autograd.grad(norm(x).prod(), x), torch.autograd.grad(expected.prod(), x)):
        torch.testing.assert_close(a, b)
    large = torch.full((4,), 300.0, dtype=torch.float16)  # whose square is no float16
    torch.testing.assert_close(ScaleNorm(4).half()(large), torch.ones(4, dtype=torch.float16))


UNITS = pytest.mark.parametrize("Unit", [GatedAttentionUnit, MixedChunkAttention])


@UNITS
def test_units_under_gradient_checkpointing(Unit):
    torch.manual_seed(0)
    norm, unit = ScaleNorm(8), Unit(8, key_size=4, causal=True)
    parameters = [*norm.parameters(), *unit.parameters()]
    x, lengths = torch.randn(2, 9, 8, requires_grad=True), torch.tensor([9, 5])

    def layer(x):
        return x + unit(norm(x), lengths=lengths)

    expected = torch.autograd.grad(layer(x).square().sum(), [x, *parameters])
    kept = checkpoint(layer, x, use_reentrant=False)
    got = torch.autograd.grad(kept.square().sum(), [x, *parameters])
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@UNITS
def test_units_compile_without_graph_breaks(Unit):
    torch._dynamo.reset()
    torch.manual_seed(0)
    norm, unit = ScaleNorm(8), Unit(8, key_size=4, causal=True)
    parameters = [*norm.parameters(), *unit.parameters()]

    def loss(x, lengths):
        return (x + unit(norm(x), lengths=lengths)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for length in (5, 11):
        x, lengths = torch.randn(2, length, 8), torch.tensor([3, length])
        values = [function(x, lengths) for function in (compiled, loss)]
        torch.testing.assert_close(*values)
        for a, b in zip(*(torch.autograd.grad(value, parameters) for value in values), strict=True):
            torch.testing.assert_close(a, b)


def test_compiled_steps_take_one_graph():
    backend = CompileCounterWithBackend("aot_eager")
    layer = MixedChunkAttention(8, key_size=4, chunk_size=3, causal=True)
    step = torch.compile(layer.step, fullgraph=True, backend=backend)
    x, state = torch.randn(2, 8, 8), layer.state(2)
    rows = torch.stack([step(x[:, t], state) for t in range(8)], 1)
    torch.testing.assert_close(rows, layer(x))
    assert backend.frame_count == 1


def assert_is(pointer, hidden, expected):
    """Scores, spans and loss of a pointer, against all scores."""
    scores = pointer.scores(hidden)
    torch.testing.assert_close(scores, expected)

    spans, values = pointer.spans(hidden, threshold=0.3)
    assert spans.tolist() == (expected > 0.3).nonzero().tolist()
    torch.testing.assert_close(values, expected[expected > 0.3])

    positive = torch.tensor([[0, 1, 2, 4], [1, 0, 0, 0], [1, 2, 3, 6]])
    target = torch.zeros_like(expected).index_put(tuple(positive.T), torch.ones(3))
    negatives = expected.masked_fill(target == 1, -torch.inf).flatten(2).exp().sum(2)
    positives = (-expected).masked_fill(target == 0, -torch.inf).flatten(2).exp().sum(2)
    by_hand = (negatives.log1p() + positives.log1p()).sum(1).mean()
    torch.testing.assert_close(pointer.loss(hidden, positive), by_hand)


@pytest.mark.parametrize("rotary", [True, False])
def test_global_pointer_is_its_formula(rotary):
    torch.manual_seed(0)
    pointer = GlobalPointer(10, heads=3, head_size=4, rotary=rotary)
    hidden = torch.randn(2, 7, 10)
    expected = []
    for rows, bias in zip(pointer.query_key.weight.split(8), pointer.query_key.bias.split(8)):  # head by head
        q, k = (hidden @ rows.T + bias).split(4, -1)
        if rotary:
            q, k = complex_rotary(q), complex_rotary(k)
        expected.append(torch.einsum("bid,bjd->bij", q, k) / 2)
    expected = torch.stack(expected, 1).masked_fill(torch.ones(7, 7).tril(-1).bool(), -torch.inf)
    assert_is(pointer, hidden, expected)


@pytest.mark.parametrize("rotary", [True, False])
def test_efficient_global_pointer_is_its_formula(rotary):
    torch.manual_seed(0)
    pointer = EfficientGlobalPointer(10, heads=3, head_size=4, rotary=rotary)
    hidden = torch.randn(2, 7, 10)
    both = hidden @ pointer.query_key.weight.T + pointer.query_key.bias
    q, k = both.split(4, -1)
    x, y = (both @ pointer.biases.weight.T + pointer.biases.bias).split(3, -1)
    if rotary:
        q, k = complex_rotary(q), complex_rotary(k)
    expected = torch.einsum("bid,bjd->bij", q, k)[:, None] / 2 + x.mT[..., None] + y.mT[:, :, None]
    expected = expected.masked_fill(torch.ones(7, 7).tril(-1).bool(), -torch.inf)
    assert_is(pointer, hidden, expected)


POINTERS = pytest.mark.parametrize("Pointer", [GlobalPointer, EfficientGlobalPointer])


@POINTERS
def test_pointers_compute_in_the_dtype_of_their_parameters(Pointer):
    pointer = Pointer(10, heads=2, head_size=4)
    hidden = torch.randn(2, 5, 10)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pointer.scores(hidden), pointer.scores(hidden.double()))
        assert pointer.scores(hidden.bfloat16()).dtype == torch.float32
    precise = pointer.double().scores(hidden)
    assert precise.dtype == torch.float64
    torch.testing.assert_close(precise.float(), pointer.float().scores(hidden))


@POINTERS
def test_pointers_without_bias_or_with_both_triangles(Pointer):
    torch.manual_seed(0)
    pointer = Pointer(10, heads=2, head_size=4, bias=False, tril=False)
    assert all(parameter.ndim == 2 for parameter in pointer.parameters())
    assert torch.equal(pointer.scores(torch.zeros(1, 3, 10)), torch.zeros(1, 2, 3, 3))
    scores = pointer.scores(torch.randn(2, 5, 10), lengths=torch.tensor([5, 2]))
    assert scores[0].isfinite().all() and scores[1].isfinite().sum() == 2 * 2 * 2


@POINTERS
def test_pointers_of_nothing(Pointer):
    pointer = Pointer(10, heads=2, head_size=4)
    for shape in ((0, 5, 10), (2, 0, 10)):
        hidden = torch.zeros(shape)
        assert pointer.scores(hidden).shape == (shape[0], 2, shape[1], shape[1])
        assert pointer.spans(hidden)[0].shape == (0, 4)


def test_loss_among_marked_tokens_ignores_the_others():
    torch.manual_seed(0)
    pointer = EfficientGlobalPointer(10, heads=2, head_size=4, rotary=False)
    hidden = torch.randn(1, 6, 10)
    marked = [1, 3, 4]
    among = torch.zeros(1, 6, dtype=torch.bool)
    among[0, marked] = True
    loss = pointer.loss(hidden, torch.tensor([[0, 1, 1, 4]]), among=among)
    alone = pointer.loss(hidden[:, marked], torch.tensor([[0, 1, 0, 2]]))
    torch.testing.assert_close(loss, alone)


@POINTERS
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
def test_modules_train(autocast, Pointer):
    torch.manual_seed(0)
    unit, pointer = GatedAttentionUnit(16, key_size=8), Pointer(16, heads=2, head_size=8)
    parameters = [*unit.parameters(), *pointer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    x, spans = torch.randn(2, 9, 16), torch.tensor([[0, 0, 1, 2], [1, 1, 3, 8]])
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = x + unit(x)
        loss = pointer.loss(hidden, spans)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@POINTERS
def test_modules_compile_without_graph_breaks(Pointer):
    unit, pointer = GatedAttentionUnit(8, key_size=4), Pointer(8, heads=2, head_size=4)

    def loss(x, spans, lengths):
        return pointer.loss(x + unit(x, lengths=lengths), spans, lengths=lengths)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for length in (5, 11):
        x = torch.randn(2, length, 8)
        arguments = x, torch.tensor([[0, 0, 1, 2]]), torch.tensor([3, length])
        torch.testing.assert_close(compiled(*arguments), loss(*arguments))
