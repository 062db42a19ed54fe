"""Modules over supy's operators, ready for a user's own network and training loop."""

from supy.nn.convert import load_bert4keras_, load_bert4torch_
from supy.nn.deep_encoder import DeepEncoder, DeepNormEncoder
from supy.nn.deep_norm import DeepNorm
from supy.nn.deepnorm_init import DeepNormConstants, deepnorm_constants, deepnorm_init_
from supy.nn.efficient_global_pointer import EfficientGlobalPointer
from supy.nn.gated_attention_unit import GatedAttentionUnit
from supy.nn.global_pointer import GlobalPointer
from supy.nn.mixed_chunk_attention import MixedChunkAttention
from supy.nn.scale_norm import ScaleNorm

__all__ = [
    "DeepEncoder",
    "DeepNorm",
    "DeepNormConstants",
    "DeepNormEncoder",
    "EfficientGlobalPointer",
    "GatedAttentionUnit",
    "GlobalPointer",
    "MixedChunkAttention",
    "ScaleNorm",
    "deepnorm_constants",
    "deepnorm_init_",
    "load_bert4keras_",
    "load_bert4torch_",
]
