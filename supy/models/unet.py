"""The two U-Nets of Keras-DDPM (posts 9119 and 9152)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import nn
from torch.nn import functional as F

from supy._checks import require
from supy.models._denoiser import Denoiser, DenoiserConfig, glorot, make_labels, uniform_embedding

SMALLEST = 4  # sides that PostNormUNet does not pool further


@dataclass(frozen=True)
class UNetConfig(DenoiserConfig):
    """Sizes of :class:`PostNormUNet` and :class:`UNet`; the defaults are Keras-DDPM's, for 64 or 128 pixels.

    channels, out_channels, steps, classes: as in every network here (3 channels, as many out, T = 1000, no labels).
    base: channels of the first level. multipliers: of ``base``, a level each. blocks: of a level, each way. groups:
    of the normalisation; 0: those of four channels at the first level where ``base`` allows, at most 32, as there are
    with 128.
    """

    base: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4, 4)
    blocks: int = 2
    groups: int = 0

    def __post_init__(self):
        super().__post_init__()
        levels = len(self.multipliers)
        require(levels <= 16, "UNetConfig", f"multipliers has {levels} levels, expected 16 at most")
        require(self.base % 2 == 0, "UNetConfig", f"base is {self.base}, expected an even number")
        if self.groups == 0:
            most = max(min(32, self.base // 4), 1)
            object.__setattr__(self, "groups", max(g for g in range(1, most + 1) if self.base % g == 0))
        whole = self.base % self.groups == 0
        require(whole, "UNetConfig", f"groups is {self.groups}, expected a divisor of base, which is {self.base}")

    def _limits(self):
        return {"base": (2, 2**14), "multipliers": (1, 64), "blocks": (1, 100), "groups": (0, 2**14)}

    @classmethod
    def small(cls, side: int, **others) -> Self:
        """What trains in minutes on a CPU, with pictures of ``side`` pixels.

        >>> UNetConfig.small(8, channels=1).multipliers, UNetConfig.small(32).multipliers
        ((1, 2), (1, 1, 2, 2))
        """
        multipliers = (1, 2) if side <= 8 else (1, 2, 2) if side <= 16 else (1, 1, 2, 2)
        return cls(**{"base": 64 if side <= 16 else 32, "multipliers": multipliers, **others})


class PostNormUNet(Denoiser):
    """The U-Net of Keras-DDPM's ddpm.py: skips are added, and each block is normalised last (post 9152).

        block(x, t) = GroupNorm(swish(conv(swish(conv(x + W t)))) + x)      for the last x, x W' where channels change

    On the way down a level has ``blocks`` blocks, and then averages 2 x 2 pixels while the shorter side is above 4.
    What the first convolution, each block and each averaging gives is added on the way up, from the last to the first:
    after each block, and after each doubling of the pixels, which a level there begins with. t is a trained embedding;
    only norms have biases. Convolutions are 3 x 3, initially uniform with variance 2 / (inputs + outputs), in blocks
    divided by sqrt(2 levels + 1).

    Keras-DDPM's 32 groups have channel c in group c mod 32. Here the channels of a group are neighbours, which is
    what torch's norm computes: channel c there is channel (c mod 32) C/32 + c // 32 here, of every tensor alike, so
    the network is the same one with other numbers for its channels.

    The weights fit every size of picture. Runs under autocast, and with channels_last.

    >>> model = PostNormUNet(UNetConfig.small(8, channels=1, classes=10))
    >>> x, t = torch.zeros(2, 1, 8, 8), torch.tensor([0, 999])
    >>> model(x, t).shape, model(x, t, torch.tensor([3, 10])).shape              # 10: no label
    (torch.Size([2, 1, 8, 8]), torch.Size([2, 1, 8, 8]))
    """

    Config: ClassVar[type] = UNetConfig
    model_type: ClassVar[str] = "supy_post_norm_unet"

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__(config)
        base, groups, levels = config.base, config.groups, len(config.multipliers)
        widths = [base] + [base * m for m in config.multipliers for _ in range(config.blocks)]
        self.time = uniform_embedding(config.steps, base)
        self.labels = make_labels(config, base)
        self.first = glorot(_conv(config.channels, base))

        def level(pairs):
            return nn.ModuleList(_PostNormBlock(*pair, base, groups, levels) for pair in pairs)

        down = list(zip(widths, widths[1:]))
        up = [(high, low) for low, high in reversed(down)]
        starts = range(0, len(down), config.blocks)
        self.down = nn.ModuleList(level(down[i : i + config.blocks]) for i in starts)
        self.middle = _PostNormBlock(widths[-1], widths[-1], base, groups, levels)
        self.up = nn.ModuleList(level(up[i : i + config.blocks]) for i in starts)
        self.norm = _norm(groups, base)
        self.last = glorot(_conv(base, config.out_channels))

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """What the pictures' noise is predicted to be (or x0, or v: whatever it was trained for).

        Args:
            x: `[B, C, H, W]`, values of about -1 to 1; H and W such that every averaging halves them.
            t: int64 `[B]`, 0 for the least noise, to T - 1.
            labels: int64 `[B]`, 0 to K - 1, or K for no label; None: no label for all.

        Returns:
            `[B, out_channels, H, W]`.

        Raises:
            ValueError, TypeError: an argument is not as above.
        """
        self._check(x, t, labels)
        t = self._with_labels(self.time(t), labels)
        poolings = self._poolings(*x.shape[2:])
        x = self.first(x)
        skips = [x]
        for level, blocks in enumerate(self.down):
            for block in blocks:
                x = self._run(block, x, t)
                skips.append(x)
            if level < poolings:
                x = F.avg_pool2d(x, 2)
                skips.append(x)
        x = self._run(self.middle, x, t)
        skips.pop()  # the middle block has read it
        for level, blocks in zip(reversed(range(len(self.down))), self.up):
            if level < poolings:
                x = _double(x) + skips.pop()
            for block in blocks:
                x = self._run(block, x, t) + skips.pop()
        return self.last(self.norm(x))

    def _poolings(self, H: int, W: int) -> int:
        count, side = 0, min(H, W)
        while side > SMALLEST and count < len(self.config.multipliers):
            count, side = count + 1, side // 2
        return count

    def _multiple(self, H, W):
        return 2 ** self._poolings(H, W)


class UNet(Denoiser):
    """The U-Net of Keras-DDPM's ddpm2.py: skips are concatenated; close to the first DDPM's (post 9152).

        block(x, t) = conv(swish(GroupNorm(conv(swish(GroupNorm(x))) + W t))) + x       x W' as above

    On the way down each level but the last ends with the average of 2 x 2 pixels; the output of each block and each
    averaging, and of the first convolution, is concatenated to the input of a block on the way up, which has one
    block more a level. A block's second convolution begins near 0, so that a new block passes its input on; LAMB, which
    moves weights by fractions of themselves, takes thousands of steps to change that, and Adam few. t is sines and
    cosines, then two layers with swish, which labels' embeddings are added to. Groups are numbered as in
    :class:`PostNormUNet`, and channels are concatenated group by group, so that a group has channels of both, as in
    Keras-DDPM.

    The weights fit every size of picture that can be halved (levels - 1) times, and do not depend on T. Runs under
    autocast, and with channels_last.

    >>> model = UNet(UNetConfig.small(8, channels=1, out_channels=2))
    >>> model(torch.zeros(3, 1, 8, 8), torch.tensor([0, 5, 999])).shape
    torch.Size([3, 2, 8, 8])
    """

    Config: ClassVar[type] = UNetConfig
    model_type: ClassVar[str] = "supy_unet"

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__(config)
        base, groups, levels = config.base, config.groups, len(config.multipliers)
        layers = (glorot(_dense(size, 4 * base)) for size in (base, 4 * base))
        self.time = nn.Sequential(next(layers), nn.SiLU(), next(layers), nn.SiLU())
        self.labels = make_labels(config, 4 * base)
        self.first = glorot(_conv(config.channels, base))
        width, skips = base, [base]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, multiplier in enumerate(config.multipliers):
            self.down.append(nn.ModuleList())
            for _ in range(config.blocks):
                self.down[-1].append(_Block(width, base * multiplier, 4 * base, groups))
                width = base * multiplier
                skips.append(width)
            if level < levels - 1:
                skips.append(width)
        self.middle = _Block(width, width, 4 * base, groups)
        for multiplier in reversed(config.multipliers):
            self.up.append(nn.ModuleList())
            for _ in range(config.blocks + 1):
                self.up[-1].append(_Block(width + skips.pop(), base * multiplier, 4 * base, groups))
                width = base * multiplier
        self.norm = _norm(groups, width)
        self.last = glorot(_conv(width, config.out_channels))

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """As :meth:`PostNormUNet.forward`."""
        self._check(x, t, labels)
        t = self._with_labels(self.time(sinusoidal(t, self.config.base).to(x.dtype)), labels)
        x = self.first(x)
        skips = [x]
        for level, blocks in enumerate(self.down):
            for block in blocks:
                x = self._run(block, x, t)
                skips.append(x)
            if level < len(self.down) - 1:
                x = F.avg_pool2d(x, 2)
                skips.append(x)
        x = self._run(self.middle, x, t)
        for level, blocks in enumerate(self.up):
            for block in blocks:
                x = self._run(block, _join(x, skips.pop(), self.config.groups), t)
            if level < len(self.up) - 1:
                x = _double(x)
        return self.last(F.silu(self.norm(x)))

    def _multiple(self, H, W):
        return 2 ** (len(self.config.multipliers) - 1)


class _PostNormBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int, groups: int, levels: int):
        super().__init__()
        scale = (2 * levels + 1) ** -0.5
        self.shift = glorot(_dense(time, inputs))
        self.conv1 = glorot(_conv(inputs, outputs), scale)
        self.conv2 = glorot(_conv(outputs, outputs), scale)
        self.shortcut = nn.Identity() if inputs == outputs else glorot(_conv(inputs, outputs, 1))
        self.norm = _norm(groups, outputs)

    def forward(self, x, t):
        y = F.silu(self.conv1(x + self.shift(t)[:, :, None, None]))
        return self.norm(F.silu(self.conv2(y)) + self.shortcut(x))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int, groups: int):
        super().__init__()
        self.norm1 = _norm(groups, inputs)
        self.conv1 = glorot(_conv(inputs, outputs))
        self.shift = glorot(_dense(time, outputs))
        self.norm2 = _norm(groups, outputs)
        self.conv2 = glorot(_conv(outputs, outputs), 1e-10)
        self.shortcut = nn.Identity() if inputs == outputs else glorot(_conv(inputs, outputs, 1))

    def forward(self, x, t):
        y = self.conv1(F.silu(self.norm1(x))) + self.shift(t)[:, :, None, None]
        return self.conv2(F.silu(self.norm2(y))) + self.shortcut(x)


def sinusoidal(t: torch.Tensor, dim: int, base: float = 10000.0) -> torch.Tensor:
    """sin and cos of t base^(-2i / dim) as entries 2i and 2i + 1, `[B, dim]` in float64 (arXiv 1706.03762).

    >>> sinusoidal(torch.tensor([1]), 2)
    tensor([[0.8415, 0.5403]], dtype=torch.float64)
    """
    frequency = base ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=t.device) / dim)
    angle = t[:, None] * frequency
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)


def _join(x: torch.Tensor, skip: torch.Tensor, groups: int) -> torch.Tensor:
    """Concatenates channels group by group, so that groups of the result are made of the same groups of both."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    axis = -1 if last else 1
    parts = [(y.permute(0, 2, 3, 1) if last else y).unflatten(axis, (groups, -1)) for y in (x, skip)]
    joined = torch.cat(parts, axis if last else 2).flatten(-2 if last else 1, -1 if last else 2)
    return joined.permute(0, 3, 1, 2) if last else joined


def _double(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _conv(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)


def _dense(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def _norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)
