"""Accelerated PyTorch operators, modules and pipelines for gated attention, GlobalPointer, GPLinker and their kin.

>>> import torch, supy
>>> supy.ops.rotary(torch.ones(1, 2, 4)).shape
torch.Size([1, 2, 4])
"""

from supy import argmax, depth, diffusion, events, models, nn, ops
from supy._library import use_backend
from supy.ops import CliqueLimitError

__version__ = "0.1.0"
__all__ = ["CliqueLimitError", "argmax", "depth", "diffusion", "events", "models", "nn", "ops", "use_backend", "__version__"]
