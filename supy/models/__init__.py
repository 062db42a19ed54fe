"""Complete networks over `supy.nn`, with their files."""

from supy.models.flash_lm import FlashLM, FlashLMConfig
from supy.models.gau_alpha import GAUAlpha, GAUAlphaConfig
from supy.models.patch_gau import PatchGAU, PatchGAUConfig
from supy.models.unet import PostNormUNet, UNet, UNetConfig

__all__ = [
    "FlashLM",
    "FlashLMConfig",
    "GAUAlpha",
    "GAUAlphaConfig",
    "PatchGAU",
    "PatchGAUConfig",
    "PostNormUNet",
    "UNet",
    "UNetConfig",
]
