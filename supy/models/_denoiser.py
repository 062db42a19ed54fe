"""What the networks of a diffusion have in common: their arguments, the labels, and gradient checkpointing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from supy._checks import Shapes, require
from supy.models._pretrained import Pretrained, check_config


@dataclass(frozen=True)
class DenoiserConfig:
    """What the configs of the networks of a diffusion begin with.

    channels: of the pictures. out_channels: of the prediction; 0: as many (twice as many predict a variance too).
    steps: T of the diffusion. classes: K, of labels; 0: none.
    """

    channels: int = 3
    out_channels: int = 0
    steps: int = 1000
    classes: int = 0

    def __post_init__(self):
        if self.out_channels == 0:
            object.__setattr__(self, "out_channels", self.channels)
        channels = (1, 4096)
        check_config(self, channels=channels, out_channels=channels, classes=(0, 2**20), **self._limits())

    def _limits(self) -> dict[str, tuple[float, float]]:
        return {}


class Denoiser(Pretrained):
    """A network that reads noisy pictures, how noisy they are, and perhaps what they show.

    In training, ``checkpointing = True`` keeps the input of each block alone and computes the block again for its
    gradients: less memory, about a third more time. It belongs to the run, not to the config.
    """

    checkpointing: bool = False

    def __init__(self, config: Any):
        super().__init__(config)
        self.labels: nn.Embedding | None = None

    def _multiple(self, H: int, W: int) -> int:
        """What the sides of a picture of this size must be multiples of."""
        raise NotImplementedError  # each network has its own; this class is none

    def _check(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> None:
        op, config, shapes = type(self).__name__, self.config, Shapes(type(self).__name__)
        shapes.match("x", x, "B C H W")
        shapes.floating("x", x)
        _, C, H, W = x.shape
        expected = f"expected [B, C, H, W] with C={config.channels}"
        require(C == config.channels, op, f"x has shape {list(x.shape)}, {expected}")
        multiple, fitting = self._multiple(H, W), self._fitting(H, W)
        sides = f"expected sides that are multiples of {multiple}, such as {fitting[0]} x {fitting[1]}"
        require((H, W) == fitting, op, f"x is {H} x {W}, {sides}")
        self._check_index(shapes, "t", t, x, config.steps)
        require(
            labels is None or config.classes > 0,
            op,
            "labels are given, but the config has classes 0: expected labels None",
        )
        if labels is not None:
            self._check_index(shapes, "labels", labels, x, config.classes + 1)

    def _check_index(self, shapes: Shapes, name: str, index: torch.Tensor, x: torch.Tensor, end: int) -> None:
        shapes.match(name, index, "B", torch.int64)
        shapes.same_device(name, index, "x", x)
        # On the CPU alone, where looking at values neither waits for a GPU nor breaks a compiled graph.
        if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
            low, high = torch.aminmax(index)
            require(
                bool(low >= 0) and bool(high < end),
                shapes.op,
                f"{name} has values from {low} to {high}, expected 0 to {end - 1}",
            )

    def _fitting(self, H: int, W: int) -> tuple[int, int]:
        """The next larger size that the network takes."""
        while True:
            multiple = self._multiple(H, W)
            larger = tuple(max(-(-side // multiple), 1) * multiple for side in (H, W))
            if larger == (H, W):
                return larger
            H, W = larger

    def _with_labels(self, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Adds the embedding of the labels to that of the times, `[B, D]`."""
        if self.labels is None:
            return t
        if labels is None:
            return t + self.labels.weight[-1]
        return t + self.labels(labels)

    def _run(self, block: nn.Module, *inputs: Any) -> torch.Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def make_labels(config: DenoiserConfig, dim: int) -> nn.Embedding | None:
    """Embeddings of the K labels and of "no label", initially 0.05 at most, as Keras has them; None for no labels."""
    return uniform_embedding(config.classes + 1, dim) if config.classes else None


def uniform_embedding(count: int, dim: int) -> nn.Embedding:
    embedding = nn.Embedding(count, dim)
    nn.init.uniform_(embedding.weight, -0.05, 0.05)
    return embedding


def glorot(layer: nn.Module, scale: float = 1.0) -> nn.Module:
    """Keras's VarianceScaling(scale, "fan_avg", "uniform"): variance 2 scale / (inputs + outputs)."""
    nn.init.xavier_uniform_(layer.weight, gain=scale**0.5)
    return layer
