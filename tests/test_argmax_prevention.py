"""Layers in which every class can win, and the monitor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from supy.argmax import Monitor, find_unargmaxable, half_square_bias, prevent_unargmaxable_


def dead(layer):
    return len(find_unargmaxable(layer.weight, layer.bias).classes("unargmaxable"))


def spread_out(layer, seed=0):
    """Weights with norms so different that, left alone, many classes are dead."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        norms = torch.logspace(-1, 1, len(layer.weight))[:, None]
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * norms)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parametrized", [True, False])
def test_no_class_is_dead(bias, parametrized):
    layer = spread_out(nn.Linear(3, 60, bias=bias))
    assert dead(layer) > 0
    assert prevent_unargmaxable_(layer, parametrize_it=parametrized) is layer
    assert dead(layer) == 0
    assert parametrize.is_parametrized(layer) == parametrized


@pytest.mark.parametrize("bias", [True, False])
def test_a_parametrisation_holds_during_training(bias):
    layer = prevent_unargmaxable_(spread_out(nn.Linear(2, 40, bias=bias)), parametrize_it=True)
    monitor = Monitor(layer)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    before = layer.weight.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(torch.randn(64, 2)), torch.randint(40, (64,))).backward()
        optimizer.step()
        assert monitor()["unargmaxable"] == 0
    assert not torch.equal(layer.weight, before) and len(monitor.history) == 5 and monitor.history[-1]["seconds"] > 0
    if bias:
        assert torch.allclose(layer.bias, half_square_bias(layer.weight))


def test_copies_and_checkpoints_follow_their_own_weight():
    layer = prevent_unargmaxable_(nn.Linear(4, 6), parametrize_it=True)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.mul_(3)
    assert torch.allclose(other.bias, 9 * layer.bias)
    layer.load_state_dict(other.state_dict())
    assert torch.allclose(layer.bias, other.bias)
    expected = other.bias.detach()
    parametrize.remove_parametrizations(layer, "bias")
    assert torch.allclose(layer.bias, expected) and set(layer.state_dict()) == {"weight", "bias"}


def test_a_monitor_counts():
    layer = nn.Linear(1, 3, bias=False)
    layer.weight.data = torch.tensor([[1.0], [2.0], [3.0]])
    monitor = Monitor(layer, nonnegative=True)
    counts = monitor()
    assert counts["unargmaxable"] == 2 and counts["argmaxable"] == 1
    assert monitor.report.certificate(0).dominators == {2: 1.0} or monitor.report.certificate(0).dominators


def test_only_linear_layers():
    with pytest.raises(TypeError, match="linear is a Conv1d"):
        prevent_unargmaxable_(nn.Conv1d(2, 3, 1))
