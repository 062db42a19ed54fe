"""Modules over supy's operators, ready for a user's own network and training loop."""

from supy.nn.efficient_global_pointer import EfficientGlobalPointer
from supy.nn.gated_attention_unit import GatedAttentionUnit

__all__ = ["EfficientGlobalPointer", "GatedAttentionUnit"]
