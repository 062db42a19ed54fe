"""A network of gated attention units over patches, for diffusion (Keras-DDPM's ddpm-gau.py; post 9984)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import nn

from supy._checks import require
from supy.models._denoiser import Denoiser, DenoiserConfig, glorot, make_labels, uniform_embedding
from supy.nn.gated_attention_unit import GatedAttentionUnit
from supy.ops.rotary import position_table


@dataclass(frozen=True)
class PatchGAUConfig(DenoiserConfig):
    """Sizes of :class:`PatchGAU`; small by default, and `full()` are those of Keras-DDPM.

    channels, out_channels, steps, classes: as in every network here (3 channels, as many out, T = 1000, no labels).
    patch: pixels of a patch's side. attention_key_size: a multiple of 4, half of which turns with the row, half with
    the column. rotary_base: the longest wavelength is 2 pi times it, in patches.
    """

    patch: int = 4
    hidden_size: int = 192
    intermediate_size: int = 384
    attention_key_size: int = 64
    num_hidden_layers: int = 6
    rotary_base: float = 1000.0

    def __post_init__(self):
        super().__post_init__()
        fits = self.attention_key_size % 4 == 0
        require(fits, "PatchGAUConfig", f"attention_key_size is {self.attention_key_size}, expected a multiple of 4")

    def _limits(self):
        return {"num_hidden_layers": (1, 1000), "patch": (1, 1024), "rotary_base": (1, 1e9)}

    @classmethod
    def full(cls, **others) -> Self:
        """The sizes of Keras-DDPM, 88 million parameters, for pictures of 128 x 128.

        >>> PatchGAUConfig.full().num_hidden_layers
        24
        """
        sizes = {"patch": 8, "hidden_size": 768, "intermediate_size": 1536, "attention_key_size": 128}
        return cls(**{**sizes, "num_hidden_layers": 24, **others})

    @classmethod
    def small(cls, side: int, **others) -> Self:
        """What trains in minutes on a CPU: a picture of ``side`` pixels, up to 32, has 64 patches at most.

        >>> PatchGAUConfig.small(8).patch, PatchGAUConfig.small(32).patch
        (2, 4)
        """
        return cls(**{"patch": 2 if side <= 16 else 4, **others})


class PatchGAU(Denoiser):
    """Pre-normalised gated attention units over the patches of a picture.

        x = patches W + embedding of t (+ of the label)
        x = x + GAU(RMSNorm(x))                              for each layer
        patches of the prediction = RMSNorm(x) W'

    A token is a patch, with its pixels row by row and the channels of each together. The units are
    :class:`supy.nn.GatedAttentionUnit` with plain softmax; the first half of the pairs of q and k turns with the
    patch's row, the second with its column. Norms have a weight each. Against Keras-DDPM, the projections of the
    units have no biases, and initial values are those of :func:`supy.nn.gated_attention_unit.gau_normal_`.

    The weights fit every size of picture whose sides are multiples of a patch's.

    >>> model = PatchGAU(PatchGAUConfig(patch=2, hidden_size=16, intermediate_size=32, attention_key_size=8, classes=2))
    >>> model(torch.zeros(2, 3, 4, 6), torch.tensor([0, 999]), torch.tensor([1, 2])).shape
    torch.Size([2, 3, 4, 6])
    """

    Config: ClassVar[type] = PatchGAUConfig
    model_type: ClassVar[str] = "supy_patch_gau"

    def __init__(self, config: PatchGAUConfig = PatchGAUConfig()):
        super().__init__(config)
        dim, area = config.hidden_size, config.patch**2
        self.time = uniform_embedding(config.steps, dim)
        self.labels = make_labels(config, dim)
        self.first = glorot(nn.Linear(config.channels * area, dim, bias=False))
        self.units = nn.ModuleList(_Unit(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(dim, eps=1e-7)
        self.last = glorot(nn.Linear(dim, config.out_channels * area, bias=False))

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """As :meth:`supy.models.PostNormUNet.forward`; H and W are multiples of a patch's side."""
        self._check(x, t, labels)
        patch = self.config.patch
        H, W = x.shape[2] // patch, x.shape[3] // patch
        rotation = self._rotation(H, W, x)
        x = x.unflatten(3, (W, patch)).unflatten(2, (H, patch))  # [B, C, H, patch, W, patch]
        x = self.first(x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        x = x + self._with_labels(self.time(t), labels)[:, None]
        for unit in self.units:
            x = self._run(unit, x, rotation)
        x = self.last(self.norm(x)).unflatten(2, (patch, patch, -1)).unflatten(1, (H, W))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def _rotation(self, H: int, W: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the angles of each patch, row by row: `[H W, attention_key_size / 2]`."""
        place = torch.arange(H * W, device=x.device)
        precise = torch.float64 if x.dtype == torch.float64 else torch.float32
        places = place // W, place % W
        quarter, base = self.config.attention_key_size // 4, self.config.rotary_base
        tables = [position_table(p, quarter, base, precise) for p in places]
        cosine, sine = (torch.cat(parts, 1) for parts in zip(*tables))
        return cosine, sine

    def _multiple(self, H, W):
        return self.config.patch


class _Unit(nn.Module):
    def __init__(self, config: PatchGAUConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-7)
        self.unit = GatedAttentionUnit(
            config.hidden_size,
            value_size=config.intermediate_size,
            key_size=config.attention_key_size,
            kernel="softmax",
            layers=config.num_hidden_layers,
        )

    def forward(self, x, rotation):
        return x + self.unit(self.norm(x), rotation=rotation)
