"""LAMB, against its formula in NumPy and torch's Adam; the schedule; the moving average."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from supy.models import PatchGAU, PatchGAUConfig, UNet, UNetConfig
from supy.optim import Lamb, ddpm_schedule, lamb_groups, warm_average


def numpy_lamb(weight, gradients, lr, b1, b2, eps, decay, adapt):
    m = v = np.zeros_like(weight)
    for number, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        u = (m / (1 - b1**number)) / (np.sqrt(v / (1 - b2**number)) + eps) + decay * weight
        sizes = np.sqrt((weight**2).sum()), np.sqrt((u**2).sum())
        ratio = sizes[0] / sizes[1] if adapt and min(sizes) > 0 else 1
        weight = weight - lr * ratio * u
    return weight


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_is_the_formula(decay):
    random = np.random.default_rng(0)
    # A small, a large, an empty and a zero weight, and one that never has a gradient.
    weights = [random.normal(size=(3, 4)), 100 * random.normal(size=(5, 2, 2)), np.zeros((0, 3)), np.zeros(4)]
    gradients = [[random.normal(size=w.shape) for w in weights] for _ in range(6)]
    parameters = [[nn.Parameter(torch.tensor(w)) for w in weights] for _ in range(2)]
    alone = nn.Parameter(torch.ones(2))
    groups = [{"params": [*parameters[0], alone]}, {"params": parameters[1], "adapt": False, "betas": (0.8, 0.9)}]
    optimizer = Lamb(groups, lr=0.05, weight_decay=decay)
    for number in range(6):
        for part in parameters:
            for parameter, gradient in zip(part, gradients[number]):
                parameter.grad = torch.tensor(gradient)
        optimizer.step()
    for part, adapt, betas in ((parameters[0], True, (0.9, 0.999)), (parameters[1], False, (0.8, 0.9))):
        for i, parameter in enumerate(part):
            expected = numpy_lamb(weights[i], [g[i] for g in gradients], 0.05, *betas, 1e-6, decay, adapt)
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(alone.data, torch.ones(2))


def test_without_adaptation_it_is_adam():
    torch.manual_seed(0)
    ours, adams = (nn.Parameter(torch.arange(6.0)) for _ in range(2))
    optimizers = Lamb([ours], lr=0.1, adapt=False), torch.optim.Adam([adams], lr=0.1, eps=1e-6)
    for _ in range(5):
        ours.grad = adams.grad = torch.randn(6)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, adams, rtol=1e-6, atol=1e-6)


def test_state_goes_on():
    def run(steps, states=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        average = AveragedModel(model, multi_avg_fn=warm_average(0.999))
        optimizer = Lamb(lamb_groups(model))
        for part, state in zip((model, average, optimizer), states or ()):
            part.load_state_dict(state)
        for step in steps:
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            average.update_parameters(model)
        return [part.state_dict() for part in (model, average, optimizer)]

    whole = run(range(6))
    halves = run(range(3, 6), run(range(3)))
    for a, b in zip(whole[:2], halves[:2]):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(
        torch.equal(value, halves[2]["state"][i][name])
        for i, values in whole[2]["state"].items()
        for name, value in values.items()
    )
    assert all(isinstance(value, torch.Tensor) for values in whole[2]["state"].values() for value in values.values())


def test_norms_and_biases_are_not_adapted():
    layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Embedding(3, 4), nn.Linear(2, 2), nn.RMSNorm(2))
    adapted, others = lamb_groups(layers)
    assert [p.shape for p in adapted["params"]] == [(2, 1, 3, 3), (3, 4), (2, 2)] and adapted["adapt"]
    assert [p.shape for p in others["params"]] == [(2,)] * 5 and not others["adapt"]
    unit = PatchGAU(PatchGAUConfig(hidden_size=8, intermediate_size=8, attention_key_size=4, num_hidden_layers=1))
    assert [tuple(p.shape) for p in lamb_groups(unit)[1]["params"]] == [(8,), (2, 4), (2, 4), (8,)]
    model = UNet(UNetConfig.small(8, base=8))
    groups = lamb_groups(model)
    assert {id(p) for g in groups for p in g["params"]} == set(map(id, model.parameters()))


def test_closure_and_arguments():
    weight = nn.Parameter(torch.ones(2))
    optimizer = Lamb([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    assert optimizer.step(closure).item() < 2
    for arguments, message in (
        ({"lr": -1.0}, "supy.Lamb: lr is -1.0, expected 0 or more"),
        ({"betas": (0.9, 1.0)}, r"supy.Lamb: betas is \(0.9, 1.0\), expected two numbers from 0 to below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Lamb([weight], **arguments)


def test_schedule():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: ddpm_schedule(step, 400))
    rates = []
    for _ in range(401):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert [rates[i] for i in (0, 20, 40, 120, 200, 300, 400)] == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.3, 0.1])


def test_average_starts_warm():
    model = nn.Linear(1, 1, bias=False)
    average = AveragedModel(model, multi_avg_fn=warm_average(0.9))
    expected = None
    for step in range(200):
        nn.init.constant_(model.weight, float(step))
        average.update_parameters(model)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = float(step) if step == 0 else decay * expected + (1 - decay) * step
    assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)  # float32 against float64
