"""Why there are residual connections (post 8994), and how large a gated unit's result is at first (post 8990)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from supy._checks import require
from supy.depth.report import new_figure, write_figure
from supy.nn.gated_attention_unit import GatedAttentionUnit
from supy.ops.gau_attention import gau_attention


@dataclass(frozen=True)
class ResidualGain:
    """What :func:`residual_gain` measured.

    epsilons: as given. widths: for each width the gains of one layer with each epsilon, root mean square of
        (|v + epsilon v J| / |v|)^2 - 1, and of `layers` layers, the 95 % quantile of |v_layers| / |v_0|.
    cosines: for each width the root mean square cosine of v and v J; 1 / sqrt(width) if they are independent.
    plain: for pairs (n, m) of sizes, the variance of a layer x W without residual whose W keeps the forward variance,
        1 / n, forward and backward; the backward one is m / n whatever the initial values.
    """

    layers: int
    epsilons: list[float]
    one: dict[int, list[float]]
    many: dict[int, list[float]]
    cosines: dict[int, float]
    plain: dict[str, tuple[float, float]]

    def sentences(self) -> list[str]:
        narrow, wide = min(self.one), max(self.one)
        powers = [_power(self.epsilons, self.one[width]) for width in (narrow, wide)]
        return [
            f"One layer x + epsilon f(x) changes a square length by epsilon^{powers[0]:.2f} at width {narrow} and by "
            f"epsilon^{powers[1]:.2f} at width {wide}.",
            f"At width {wide} the cosine of v and v J is {self.cosines[wide]:.3f}: they are nearly orthogonal, their "
            "squares add, and epsilon = 1 / sqrt(layers) is small enough; at width 1 it would take 1 / layers.",
            "Without a residual, initial values that keep the forward variance leave the backward variance at "
            "outputs / inputs, here "
            + ", ".join(f"{name}: {backward:.2f}" for name, (_, backward) in self.plain.items())
            + ": nothing is left to make gradients smaller with the depth.",
        ]

    def to_json(self):
        return {"layers": self.layers, "epsilons": self.epsilons, "one layer": self.one, "all layers": self.many,
                "cosines": self.cosines, "plain": self.plain, "sentences": self.sentences()}  # fmt: skip


def residual_gain(
    widths: Sequence[int] = (1, 4, 16, 64, 256, 1024),
    epsilons: Sequence[float] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    *,
    layers: int = 100,
    samples: int = 64,
    seed: int = 0,
) -> ResidualGain:
    """How a residual connection x + epsilon f(x) lengthens what passes through it, forward or backward (post 8994).

    J is a random Jacobian, normal numbers of variance 1 / width, new in each layer and, up to a width of 64, for each
    sample.

    >>> gain = residual_gain((1, 256), (0.05, 0.1), layers=10, samples=32)
    >>> gain.cosines[1], round(gain.cosines[256], 1)
    (1.0, 0.1)
    """
    op = "depth.residual_gain"
    require(len(widths) > 0 and min(widths) >= 1, op, f"widths are {list(widths)}, expected numbers above 0")
    require(len(epsilons) > 1 and min(epsilons) > 0, op, f"epsilons are {list(epsilons)}, expected two above 0 or more")
    require(layers >= 1 and samples >= 1, op, f"layers, samples are {layers}, {samples}, expected at least 1")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    one, many, cosines, plain = {}, {}, {}, {}
    scale = torch.tensor(epsilons)[:, None, None, None]
    for width in widths:
        batch = samples if width <= 64 else 1  # a wide matrix is like every other
        start = normal(batch, samples // batch, width)
        v = start.expand(len(epsilons), -1, -1, -1)
        for layer in range(layers):
            through = v @ (normal(batch, width, width) / width**0.5)
            v, old = v + scale * through, v
            if layer == 0:
                change = v.square().sum(-1) / old.square().sum(-1) - 1
                one[width] = change.square().mean((1, 2)).sqrt().tolist()
                cosine = torch.cosine_similarity(old[0].double(), through[0].double(), dim=-1)
                cosines[width] = cosine.square().mean().sqrt().item()
        many[width] = (v.norm(dim=-1) / start.norm(dim=-1)).flatten(1).quantile(0.95, dim=1).tolist()
    for n, m in ((512, 512), (512, 2048), (2048, 512)):
        weight = normal(n, m) / n**0.5
        forward, backward = normal(samples, n) @ weight, normal(samples, m) @ weight.T
        plain[f"{n} to {m}"] = forward.var().item(), backward.var().item()
    return ResidualGain(layers, list(epsilons), one, many, cosines, plain)


def save_gain_picture(path: str | Path, gain: ResidualGain) -> None:
    """A PNG: gains against epsilon, of one layer and of all, and cosines against the width. Needs matplotlib."""
    figure = new_figure(15, 4)
    one, many, cosine = figure.subplots(1, 3)
    for width, values in gain.one.items():
        one.plot(gain.epsilons, values, ".-", label=f"width {width}")
        many.plot(gain.epsilons, gain.many[width], ".-")
    one.plot(gain.epsilons, [2 * e for e in gain.epsilons], "k:", label="2 epsilon")
    one.plot(gain.epsilons, [e**2 for e in gain.epsilons], "k--", label="epsilon^2")
    many.plot(gain.epsilons, [(1 + e * e) ** (gain.layers / 2) for e in gain.epsilons], "k--",
              label="(1 + epsilon^2)^(layers / 2)")  # fmt: skip
    one.set(title="one layer: change of the square length", xlabel="epsilon", xscale="log", yscale="log")
    many.set(title=f"{gain.layers} layers: length, 95 % quantile", xlabel="epsilon", xscale="log", yscale="log",
             ylim=(0.5, 50))
    widths = list(gain.cosines)
    cosine.plot(widths, list(gain.cosines.values()), ".-")
    cosine.plot(widths, [width**-0.5 for width in widths], "k--", label="1 / sqrt(width)")
    cosine.set(title="cosine of v and v J", xlabel="width", xscale="log", yscale="log")
    for axes in (one, many, cosine):
        axes.legend(fontsize="small")
    write_figure(path, figure)


@dataclass(frozen=True)
class GauScale:
    """What :func:`gau_scale` measured.

    mean, square: of swish of a normal number. expected_ratio: (square / mean^2)^2, of a diagonal score of attention to
        the others on average. ratio: as measured. output: for each kernel the root mean square of the unit's result.
    exponents: for each kernel p of output ~ lambda^p, when all matrices are multiplied by lambda, from 1 to 1/2 and
        from 1/2 to 1/4. branch_exponents: the same when those that :func:`supy.nn.deepnorm_init_` scales are.
    """

    mean: float
    square: float
    expected_ratio: float
    ratio: float
    output: dict[str, float]
    exponents: dict[str, tuple[float, float]]
    branch_exponents: dict[str, tuple[float, float]]

    def sentences(self) -> list[str]:
        sizes = ", ".join(f"{value:.3f} with {name}" for name, value in self.output.items())
        powers = ", ".join(f"{a:.1f} then {b:.1f} with {name}" for name, (a, b) in self.exponents.items())
        branch = ", ".join(f"{a:.1f} then {b:.1f} with {name}" for name, (a, b) in self.branch_exponents.items())
        return [
            f"A token's score for itself is {self.ratio:.0f} times that for another (expected "
            f"{self.expected_ratio:.0f}): attention begins close to the identity.",
            f"The unit's result for inputs of size 1 is {sizes}: a residual block begins close to the identity, also "
            "without small initial weights.",
            f"Its power of a factor on all matrices, halved once and again: {powers}.",
            f"Of a factor on u, v and the output alone: {branch}.",
        ]

    def to_json(self):
        return {**self.__dict__, "sentences": self.sentences()}


def gau_scale(
    dim: int = 768, value_size: int = 1536, key_size: int = 128, tokens: int = 512, *, seed: int = 0
) -> GauScale:
    """How large the result of a gated attention unit with LeCun's initial weights is, for normal inputs (post 8990).

    The post's estimates (0.01 with relu2, and powers 7 and 3) leave out that swish has a mean, so that the other tokens
    do not cancel out; measured are sizes several times larger, and other powers.

    >>> scale = gau_scale(64, 128, 32, 64)
    >>> f"{scale.mean:.3f} {scale.square:.3f} {scale.expected_ratio:.0f}"
    '0.207 0.356 69'
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        points = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
        swish, density = points * points.sigmoid(), torch.exp(-points.square() / 2) / math.sqrt(2 * math.pi)
        mean, square = (torch.trapezoid(f * density, points).item() for f in (swish, swish.square()))
        x = torch.randn(1, tokens, dim)
        unit = GatedAttentionUnit(dim, value_size=value_size, key_size=key_size)
        z = torch.nn.functional.silu(x @ unit.project_in.weight[2 * value_size :].T)
        # Scores before the rotation, squared as relu2 does. With eyes for values the result is the matrix itself.
        scores = gau_attention(z, z, torch.eye(tokens)[None], kernel="relu2")[0]
        diagonal = scores.diagonal().mean().item()
        ratio = diagonal / ((scores.sum().item() / tokens - diagonal) / (tokens - 1))
        output, powers = {}, {False: {}, True: {}}
        for kernel in ("relu2", "softmax"):
            unit.kernel = kernel
            output[kernel] = unit(x).square().mean().sqrt().item()
            for branch in (False, True):
                sizes = [_scaled(unit, x, factor, branch) for factor in (1.0, 0.5, 0.25)]
                powers[branch][kernel] = tuple(math.log2(a / b) for a, b in zip(sizes, sizes[1:]))
        return GauScale(mean, square, (square / mean**2) ** 2, ratio, output, powers[False], powers[True])


def _scaled(unit, x, factor, branch):
    copy = GatedAttentionUnit(x.shape[2], value_size=unit.sizes[0], key_size=unit.sizes[2], kernel=unit.kernel)
    copy.load_state_dict(unit.state_dict())
    rows = 2 * unit.sizes[0] if branch else None
    copy.project_in.weight[:rows] *= factor
    copy.project_out.weight *= factor
    return copy(x).double().square().mean().sqrt().item()


def _power(x, y) -> float:
    """p of the least-squares fit y = c x^p."""
    x, y = (torch.tensor(part, dtype=torch.float64).log() for part in (x, y))
    return ((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()
