"""The modules: what they compute, against their own formulas written another way, and that they train and compile."""

import math

import pytest
import torch

from supy.nn import EfficientGlobalPointer, GatedAttentionUnit, GlobalPointer


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
