"""What one step of training does to a network, at several depths."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from supy._checks import require
from supy.nn.deep_encoder import DeepEncoder
from supy.nn.deepnorm_init import deepnorm_constants
from supy.optim import Lamb, lamb_groups

OP = "depth.probe"
RATES = {"sgd": 1e-3, "adam": 1e-5, "lamb": 1e-4}  # small, so that a step shows the gradient and not the curvature
CLASSES = 10  # of the loss for a model that brings none


@dataclass(frozen=True)
class Step:
    """One step of an optimiser from the initial weights.

    update, update_matrices: root mean square, over all numbers of the output, of F(x; new weights) - F(x; old weights):
        with all weights moved, and with those alone that have two axes or more.
    loss_change: of the loss, all weights moved. promised: what the gradient says it would be, <gradient, step>.
    """

    update: float
    update_matrices: float
    loss_change: float
    promised: float


@dataclass(frozen=True)
class Layer:
    """One of the layers that the depth counts, x its input and y its output, with initial weights.

    input, output: root mean square of x and of y. change: |y - x| / |x|; NaN where their shapes differ.
    spread: |y - its mean over the tokens| / |y|; 0 if all tokens are the same, when the rank has collapsed.
    gradient: length of the loss's gradient with respect to all weights of the layer.
    probe: length of its gradient with respect to the sizes of the layer's matrices: for W = lambda U, U as close to
        orthogonal as scaling brings it, dL/dlambda = <dL/dW, U> (post 8978). Packed queries, keys and values are three.
    """

    input: float
    output: float
    change: float
    spread: float
    gradient: float
    probe: float


@dataclass(frozen=True)
class Probe:
    """A network of one depth; numbers are means over the seeds, of Step's updates geometric ones."""

    depth: int
    parameters: int
    loss: float
    steps: dict[str, Step]
    layers: list[Layer]

    def finite(self) -> bool:
        numbers = [self.loss, *(n for step in self.steps.values() for n in asdict(step).values())]
        return all(map(math.isfinite, numbers))


@dataclass(frozen=True)
class Study:
    """A model's probes, from the least depth to the greatest."""

    model: str
    probes: list[Probe]

    def exponent(self, optimizer: str, which: str = "update") -> float:
        """p of the fit c depth^p through the probes' numbers ``which`` of :class:`Step`; NaN where there is none."""
        points = [(probe.depth, getattr(probe.steps[optimizer], which)) for probe in self.probes]
        points = [(math.log(x), math.log(y)) for x, y in points if math.isfinite(y) and y > 0]
        if len(points) < 2:
            return math.nan
        x, y = (torch.tensor(part, dtype=torch.float64) for part in zip(*points))
        return ((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()


Factory = Callable[[int], Any]


def probe(
    model: str | Factory,
    depths: Sequence[int],
    *,
    rates: Mapping[str, float] | None = None,
    seeds: int = 3,
    shape: tuple[int, int, int] = (8, 16, 64),
    layers: str | None = None,
    token_axis: int = 1,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Study:
    """Measures networks of several depths at their initial weights and after one step of each optimiser.

    Args:
        model: a built-in family (:data:`FAMILIES`), a function, or its import path ``package.module:name``. Called with
            a depth, it returns a module, or (module, batch, loss): batch is what the module is called with, a tensor,
            a tuple of arguments or a dictionary of keywords, and loss takes what the module returns and gives a tensor
            with one number. A module alone is called with normal numbers of ``shape``. Without a loss (None) it is the
            cross entropy of random labels against a random linear layer over the output.
        depths: numbers of layers, above 0.
        rates: learning rates of the optimisers to try, out of sgd, adam and lamb; default :data:`RATES`.
        seeds: how many times, with new weights and data.
        shape: (samples, tokens, width) of the inputs, for built-in families and modules alone.
        layers: the name of the list of layers in the module. Default: every ModuleList or Sequential, and none inside
            another, that has as many entries of one class as the depth says.
        token_axis: of tensors with three axes or more; those of two have samples for tokens.
        device: where the model and the batch are put.
        progress: show a bar.

    Raises:
        ValueError: a depth is below 1, the model cannot be imported or built, has no such layers, or its loss is not
            one number that depends on the weights. A loss that is NaN or infinite is a result, not an error.

    The module runs in evaluation mode, so without dropout, and in the dtype it has. Families have float64; in float32
    an update of less than about 1e-6 is mostly rounding.

    >>> study = probe("deepnorm", [6, 24], rates={"sgd": 1e-3}, seeds=1, shape=(2, 5, 16))
    >>> [(p.depth, len(p.layers)) for p in study.probes], abs(study.exponent("sgd", "update_matrices")) < 0.5
    ([(6, 6), (24, 24)], True)
    """
    depths = sorted(set(depths))
    require(len(depths) > 0, OP, "depths is empty")
    for depth in depths:
        good = isinstance(depth, int) and not isinstance(depth, bool) and depth >= 1
        require(good, OP, f"depth is {depth!r}, expected a whole number of at least 1")
    require(seeds >= 1, OP, f"seeds is {seeds}, expected at least 1")
    rates = dict(RATES if rates is None else rates)
    for name, rate in rates.items():
        require(name in RATES, OP, f"optimizer is {name!r}, expected one of {', '.join(RATES)}")
        require(rate > 0, OP, f"the learning rate of {name} is {rate}, expected a number above 0")
    name, factory = _factory(model, shape)
    jobs = [(depth, seed) for depth in depths for seed in range(seeds)]
    results: dict[int, list[Probe]] = {depth: [] for depth in depths}
    device = _users(f"device is {str(device)!r}", lambda: torch.empty(0, device=device).device)
    for depth, seed in tqdm(jobs, desc=name, unit="model", disable=not progress):
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            built = _build(name, factory, depth, shape, device)
            results[depth].append(_probe(name, depth, built, rates, layers, token_axis))
    return Study(name, [_mean(probes) for probes in results.values()])


def _encoder(shape, residual, depth, **options):
    samples, tokens, width = shape
    heads = 2 if width % 2 == 0 else 1
    model = DeepEncoder(depth, width, heads=heads, hidden=2 * width, residual=residual, **options).double()
    batch = torch.randn(samples, tokens, width, dtype=torch.float64)
    if residual == "admin":
        model.profile_(torch.randn_like(batch))
    return model, batch, None


def _row(shape, depth, *, optimizer):
    alpha, beta = deepnorm_constants("encoder", depth, optimizer=optimizer)
    return _encoder(shape, "deepnorm", depth, alpha=alpha, beta=beta)


# Called with shape and depth. Feed-forward networks are twice the width and attention has two heads, as in the paper's
# measurement (64-128-2).
FAMILIES: dict[str, Callable] = {
    **{
        name: (lambda shape, depth, name=name: _encoder(shape, name, depth))
        for name in ("deepnorm", "post", "pre", "none", "rezero", "admin")
    },
    "gau": lambda shape, depth: _encoder(shape, "deepnorm", depth, block="gau"),
    "gau-post": lambda shape, depth: _encoder(shape, "post", depth, block="gau"),
    **{f"deepnorm-{name}": partial(_row, optimizer=name) for name in RATES},
}


def _factory(model, shape) -> tuple[str, Factory]:
    if callable(model):
        return getattr(model, "__name__", type(model).__name__), model
    if model in FAMILIES:
        require(len(shape) == 3 and min(shape) >= 1, OP, f"shape is {shape}, expected three numbers above 0")
        return model, partial(FAMILIES[model], shape)
    module, colon, name = model.partition(":")
    known = f"expected package.module:function, or one of {', '.join(FAMILIES)}"
    require(bool(colon and module and name), OP, f"model is {model!r}, {known}")
    function = _users(f"cannot import {model}", lambda: attrgetter(name)(importlib.import_module(module)))
    require(callable(function), OP, f"{model} is a {type(function).__name__}, expected a function of the depth")
    return model, function


def _build(name, factory, depth, shape, device):
    """module, how to call it, loss."""
    built = _users(f"{name}({depth}) fails", lambda: factory(depth))
    if isinstance(built, nn.Module):
        dtype = next((p.dtype for p in built.parameters() if p.is_floating_point()), torch.float32)
        built = built, torch.randn(shape, dtype=dtype), None
    good = isinstance(built, tuple) and len(built) == 3 and isinstance(built[0], nn.Module)
    kinds = ", ".join(type(part).__name__ for part in built) if isinstance(built, tuple) else type(built).__name__
    require(good, OP, f"{name}({depth}) returned {kinds}, expected a module or (module, batch, loss)")
    model, batch, loss = built
    model = model.to(device).eval()
    batch = _to(batch, device)

    def call():
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)

    def run():
        return _users(f"{name}({depth}) cannot be called", call)

    with torch.no_grad():
        output = run()
    require(_tensor(output) is not None, OP, f"{name}({depth}) gives no tensor of floating-point numbers")
    return model, run, loss if loss is not None else _random_loss(_tensor(output))


def _users(failure: str, call: Callable[[], Any]) -> Any:
    """The result of code that is not ours: what it raises, anything, becomes one line."""
    try:
        return call()
    except Exception as error:
        problem = f"{failure}: {type(error).__name__}: {error}"
        raise ValueError(f"supy.{OP}: {problem}") from error


def _random_loss(output):
    weight = torch.randn(output.shape[-1], CLASSES) / output.shape[-1] ** 0.5
    labels = torch.randint(CLASSES, (output[..., 0].numel(),))
    weight, labels = weight.to(output), labels.to(output.device)
    return lambda y: F.cross_entropy((_tensor(y) @ weight).flatten(0, -2), labels)


def _to(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(part, device) for key, part in value.items()}
    return tuple(_to(part, device) for part in value) if isinstance(value, (tuple, list)) else value


def _tensor(value) -> torch.Tensor | None:
    """The first tensor of floating-point numbers in what a module takes or gives."""
    if isinstance(value, torch.Tensor):
        return value if value.is_floating_point() else None
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for part in parts if (found := _tensor(part)) is not None), None)


def find_layers(model: nn.Module, depth: int, name: str | None = None) -> list[nn.Module]:
    """The layers that the depth counts: see ``layers`` of :func:`probe`.

    >>> len(find_layers(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 3), 3))
    3
    """
    kind = type(model).__name__
    if name is not None:
        try:
            found = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"supy.{OP}: {kind} has no module {name!r}") from None
        listed = isinstance(found, (nn.ModuleList, nn.Sequential)) and len(found) > 0
        require(listed, OP, f"{name} of {kind} is a {type(found).__name__}, expected a list of layers")
        return list(found)
    layers, others, done = [], [], None
    for path, part in model.named_modules():  # a module comes right before what is in it
        if done is not None and path.startswith(done):
            continue
        if isinstance(part, (nn.ModuleList, nn.Sequential)) and len({type(layer) for layer in part}) == 1:
            if len(part) == depth:
                layers += part
                done = f"{path}." if path else ""
            else:
                others.append(f"{path or kind} with {len(part)}")
    there = f"there are {', '.join(others[:3])}" if others else "there is no list of layers at all"
    require(bool(layers), OP, f"{kind} has no list of {depth} layers: {there}; name the list (layers)")
    return layers


def _probe(name, depth, built, rates, layers, token_axis) -> Probe:
    model, run, loss = built
    blocks = find_layers(model, depth, layers)
    scales = [[math.nan] * 4 for _ in blocks]
    hooks = [
        block.register_forward_hook(partial(_see, row, token_axis), with_kwargs=True)
        for block, row in zip(blocks, scales)
    ]
    with torch.no_grad():
        before = _tensor(run()).clone()
    for hook in hooks:
        hook.remove()
    value = _users(f"the loss of {name}({depth}) fails", lambda: loss(run()))
    good = isinstance(value, torch.Tensor) and value.numel() == 1 and value.requires_grad
    require(good, OP, f"the loss of {name}({depth}) is not one number that depends on the model's weights")
    _users(f"the gradient of {name}({depth}) fails", value.backward)
    rows = [Layer(*scale, *_gradients(block)) for scale, block in zip(scales, blocks)]
    with torch.no_grad():
        steps = {key: _step(key, rate, model, run, loss, before, value) for key, rate in rates.items()}
    return Probe(depth, sum(p.numel() for p in model.parameters()), value.item(), steps, rows)


def _see(row, token_axis, module, arguments, keywords, output):
    x, y = _tensor((*arguments, *keywords.values())), _tensor(output)
    if x is None or y is None:
        return
    x, y = x.double(), y.double()
    centred = y - y.mean(token_axis if y.ndim > 2 else 0, keepdim=True)
    change = ((y - x).norm() / x.norm()).item() if x.shape == y.shape else math.nan
    row[:] = _rms(x), _rms(y), change, (centred.norm() / y.norm()).item()


def _rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _gradients(block) -> tuple[float, float]:
    """The lengths of the gradients with respect to all weights, and to the sizes of matrices."""
    total = probes = 0.0
    for name, weight in block.named_parameters():
        if weight.grad is None:
            continue
        total += weight.grad.double().square().sum().item()
        if weight.ndim < 2:
            continue
        W, G = weight.detach().double().flatten(1), weight.grad.double().flatten(1)
        parts = 3 if any(part in name for part in ("in_proj", "qkv")) and len(W) == 3 * W.shape[1] else 1
        for w, g in zip(W.chunk(parts), G.chunk(parts)):
            if w.any():  # else it is 0, and no direction is its own
                gram = w @ w.T if len(w) < w.shape[1] else w.T @ w
                size = gram.norm() / w.norm()  # lambda: the k of the least |w w^T / k^2 - 1|
                probes += ((g * w).sum() / size).square().item()
    return math.sqrt(total), math.sqrt(probes)


def _step(name, rate, model, run, loss, before, value) -> Step:
    weights = [weight for weight in model.parameters() if weight.grad is not None]
    old = [weight.detach().clone() for weight in weights]
    if name == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), rate)
    elif name == "adam":
        optimizer = torch.optim.Adam(model.parameters(), rate)
    else:
        optimizer = Lamb(lamb_groups(model), rate)
    optimizer.step()
    promised = sum(((w - o).double() * w.grad.double()).sum().item() for w, o in zip(weights, old))
    output = run()
    after, update = loss(output).item(), _rms(_tensor(output) - before)
    for weight, was in zip(weights, old):
        if weight.ndim < 2:
            weight.copy_(was)
    matrices = _rms(_tensor(run()) - before)
    for weight, was in zip(weights, old):
        weight.copy_(was)
    return Step(update, matrices, after - value.item(), promised)


def _mean(probes: list[Probe]) -> Probe:
    def geometric(values):
        return math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else _average(values)

    first = probes[0]
    steps = {}
    for name in first.steps:
        columns = {key: [getattr(p.steps[name], key) for p in probes] for key in asdict(first.steps[name])}
        steps[name] = Step(**{k: (geometric if k.startswith("update") else _average)(v) for k, v in columns.items()})
    same = zip(*(p.layers for p in probes))
    layers = [Layer(*map(_average, zip(*(asdict(layer).values() for layer in row)))) for row in same]
    return Probe(first.depth, first.parameters, _average([p.loss for p in probes]), steps, layers)


def _average(values) -> float:
    return sum(values) / len(values)
