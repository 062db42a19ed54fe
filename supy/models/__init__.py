"""Complete networks over `supy.nn`, with their files."""

from supy.models.flash_lm import FlashLM, FlashLMConfig
from supy.models.gau_alpha import GAUAlpha, GAUAlphaConfig

__all__ = ["FlashLM", "FlashLMConfig", "GAUAlpha", "GAUAlphaConfig"]
