"""The public operators; each is documented where it is defined, in the file of its name."""

from supy.ops.ddim_step import ddim_step
from supy.ops.ddpm_add_noise import ddpm_add_noise
from supy.ops.ddpm_step import ddpm_step
from supy.ops.deep_norm import deep_norm
from supy.ops.efficient_global_pointer import (
    efficient_global_pointer_loss,
    efficient_global_pointer_scores,
    efficient_global_pointer_spans,
)
from supy.ops.gated_attention_unit import gated_attention_unit
from supy.ops.gau_attention import gau_attention
from supy.ops.global_pointer import (
    global_pointer_loss,
    global_pointer_scores,
    global_pointer_spans,
)
from supy.ops.linear_argmax import linear_argmax
from supy.ops.maximal_cliques import (
    BatchedCliques,
    CliqueLimitError,
    Cliques,
    batched_maximal_cliques,
    maximal_cliques,
)
from supy.ops.mixed_chunk_attention import (
    MixedChunkState,
    mixed_chunk_attention,
    mixed_chunk_step,
)
from supy.ops.mixed_chunk_layer import mixed_chunk_layer
from supy.ops.multilabel_cross_entropy import multilabel_cross_entropy
from supy.ops.multitask_cross_entropy import multitask_cross_entropy
from supy.ops.philox_normal import philox_normal
from supy.ops.rotary import rotary
from supy.ops.sparse_multilabel_cross_entropy import sparse_multilabel_cross_entropy

__all__ = [
    "BatchedCliques",
    "CliqueLimitError",
    "Cliques",
    "MixedChunkState",
    "batched_maximal_cliques",
    "ddim_step",
    "ddpm_add_noise",
    "ddpm_step",
    "deep_norm",
    "efficient_global_pointer_loss",
    "efficient_global_pointer_scores",
    "efficient_global_pointer_spans",
    "gated_attention_unit",
    "gau_attention",
    "global_pointer_loss",
    "global_pointer_scores",
    "global_pointer_spans",
    "linear_argmax",
    "maximal_cliques",
    "mixed_chunk_attention",
    "mixed_chunk_layer",
    "mixed_chunk_step",
    "multilabel_cross_entropy",
    "multitask_cross_entropy",
    "philox_normal",
    "rotary",
    "sparse_multilabel_cross_entropy",
]
