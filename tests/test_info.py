"""``python -m supy.info``."""

import subprocess
import sys

import torch

import supy
from supy._library import OPERATORS
from supy.info import BACKENDS, info


def test_command_prints_the_table():
    result = subprocess.run([sys.executable, "-m", "supy.info"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.strip() == info()


def test_header_names_the_versions():
    text = info()
    assert f"supy {supy.__version__}, torch {torch.__version__}" in text
    assert "native kernels: " in text


def test_every_operator_has_a_row_and_every_missing_backend_a_reason():
    text = info()
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    public = [name for name in OPERATORS if not name.endswith(("_backward", "_out", "_limits"))]
    assert "rotary" in public
    for name in public:
        operator = OPERATORS[name]
        row = rows[name]
        assert row[1:3] == ["yes" if operator.differentiable else "-", "ready"]
        for cell, (device, backend) in zip(row[3:], BACKENDS, strict=True):
            kernels = [k for k in operator.kernels if (k.device, k.backend) == (device, backend)]
            reason = kernels[0].missing() if kernels else None
            assert cell == ("-" if not kernels else "missing" if reason else "ready")
            if reason:
                assert f"missing, {backend}: {reason}" in text
    assert not any(name in rows for name in OPERATORS if name.endswith(("_backward", "_out", "_limits")))
