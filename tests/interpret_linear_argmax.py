"""linear_argmax in Triton's interpreter, against the float64 reference; run by test_triton_kernels.py."""

import pytest
import torch

from _linear_argmax import REGIMES, check, make
from supy.kernels.linear_argmax import linear_argmax

TILES = {"BLOCK": 64, "COLUMNS": 64, "DEPTH": 32, "PRECISION": "ieee"}


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, about infinity less infinity, which is the case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_values_and_classes(regime, dtype):
    # Float16 with one program a block of rows; float32 with more, which share the classes.
    programs = 1 if dtype == torch.float16 else 6
    check(lambda *tensors: linear_argmax(*tensors, tiles=TILES, programs=programs), *make(regime, dtype))
