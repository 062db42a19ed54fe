"""Triton kernels without a GPU: each compiles ahead of time for sm_90 and runs in Triton's interpreter."""

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

# Below the skips, so that a machine without Triton can collect this file: hence the E402.
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import supy.kernels  # noqa: E402

INTEGER, CONSTANT = "i32", "constexpr"


def _rotary(dtype, **constants):
    pointers = {"x": dtype, "cosine": "*fp32", "sine": "*fp32", "out": dtype}
    sizes = ("n1", "n2", "half", *(f"{tensor}{axis}" for tensor in "xto" for axis in range(4)))
    return pointers | dict.fromkeys(sizes, INTEGER), constants


def _full(kernel, dtype, **constants):
    """Types of the arguments of a kernel of GlobalPointer, float ones named here, sizes and strides int32."""
    x, y = ("own", "other") if kernel == "gradient" else "qk"
    strides = (f"{tensor}{axis}" for tensor in (x, y) for axis in range(4))
    cells = {"tiles": "*i32", "cells": "*i32"}
    results = {
        "scores": {"out": dtype},
        "rows": cells | {"peak": "*fp32", "total": "*fp32"},
        "gradient": cells | {"log_negative": "*fp32", "out": "*fp32", "parts": INTEGER},
        "spans": {"counts": "*i32", "offsets": "*i64", "spans": "*i64", "scores": dtype}
        | {"write": INTEGER, "threshold": "fp32"},
    }
    types = {x: dtype, y: dtype, "lengths": "*i32", "scale": "fp32"} | results[kernel]
    return types | dict.fromkeys(("T", "H", "blocks", *strides), INTEGER), {"BLOCK": 64, "DEPTH": 64} | constants


# A row: module of supy.kernels, kernel, then what makes (type of each argument that is no constant, constants).
KERNELS = [
    ("rotary", "rotary_kernel", _rotary("*fp32", INTERLEAVED=True, INVERSE=False, BLOCK=32)),
    ("rotary", "rotary_kernel", _rotary("*fp16", INTERLEAVED=True, INVERSE=True, BLOCK=64)),
    ("rotary", "rotary_kernel", _rotary("*bf16", INTERLEAVED=False, INVERSE=False, BLOCK=64)),
    *(
        ("global_pointer", f"global_pointer_{kernel}_kernel", _full(kernel, dtype, D=D, TRIL=tril, **constants))
        for dtype, D, tril in (("*fp32", 64, True), ("*bf16", 64, False), ("*fp16", 150, True))
        for kernel, constants in (
            ("scores", {}),
            ("rows", {}),
            ("gradient", {"COLUMNS": False, "PART": 64}),
            ("gradient", {"COLUMNS": True, "PART": 128}),
            ("spans", {}),
        )
    ),
]


@pytest.mark.parametrize(
    ("module", "kernel", "arguments"), KERNELS, ids=[f"{row[1]}-{i}" for i, row in enumerate(KERNELS)]
)
def test_compiles_for_sm_90(module, kernel, arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # today's default, said aloud: else Triton 3.9 warns
    types, constants = arguments
    function = getattr(importlib.import_module(f"supy.kernels.{module}"), kernel)
    source = ASTSource(function, signature=types | dict.fromkeys(constants, CONSTANT), constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
    assert ".local" not in compiled.asm["ptx"]


def test_every_kernel_is_in_the_table():
    found = set()
    for info in pkgutil.iter_modules(supy.kernels.__path__):
        module = importlib.import_module(f"supy.kernels.{info.name}")
        for name, value in vars(module).items():
            if isinstance(value, triton.runtime.JITFunction) and value.fn.__module__ == module.__name__:
                found.add((info.name, name))
    # A helper that is called from a kernel is compiled with it; its name starts with an underscore.
    assert {(module, name) for module, name in found if not name.startswith("_")} == {row[:2] for row in KERNELS}


def test_kernels_in_the_interpreter():
    # The interpreter is chosen when a kernel is imported, hence the process of its own.
    tests = sorted(Path(__file__).parent.glob("interpret_*.py"))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
