"""Triton kernels without a GPU: each compiles ahead of time for sm_90 and runs in Triton's interpreter."""

import functools
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

from triton.backends.compiler import GPUTarget  # noqa: E402 below the skips, as it needs Triton
from triton.compiler import ASTSource  # noqa: E402 below the skips, as it needs Triton

import supy.kernels  # noqa: E402 below the skips, as it needs Triton
from supy.kernels._tiles import _FLOAT, _HALF, _TF32  # noqa: E402 below the skips, as it needs Triton
from supy.kernels._tiles import LAUNCH as TILE_LAUNCH  # noqa: E402 below the skips, as it needs Triton
from supy.kernels._tiles import PAIRED, PAIRED_LONG  # noqa: E402 below the skips, as it needs Triton
from supy.kernels.gau_attention import SLOPE, SWISH  # noqa: E402 below the skips, as it needs Triton
from supy.kernels.global_pointer import LAUNCH  # noqa: E402 below the skips, as it needs Triton

INTEGER, CONSTANT = "i32", "constexpr"


def _rotary(dtype, **constants):
    pointers = {"x": dtype, "cosine": "*fp32", "sine": "*fp32", "out": dtype}
    sizes = ("rows", "n1", "n2", "half", *(f"{tensor}{axis}" for tensor in "xto" for axis in range(4)))
    return pointers | dict.fromkeys(sizes, INTEGER), constants


def _multilabel(names, floats, **constants):
    """Parameters named in ``names``; float32 pointers but for those in ``floats``, whose types are given."""
    return {name: floats.get(name, "*fp32" if name in POINTERS else INTEGER) for name in names.split()}, constants


POINTERS = ("parts", "negative", "positive", "grad_negative", "grad_positive", "losses", "grad")
_SUMS = "scores targets parts classes positives ignore score_row target_row chunks"
_SLOPES = (
    "scores targets negative positive grad_negative grad_positive ds classes positives ignore score_row target_row "
    "negative_step positive_step"
)
_TASKS = "tasks classes chunks s0 s1 s2 t0 t1 t2"


# Arguments of the kernels of both GlobalPointers; what is not here is a size or a stride.
_POINTER_TYPES = (
    dict.fromkeys(("lengths", "tiles"), "*i32")
    | dict.fromkeys("keys counts ends spans given status".split(), "*i64")
    | dict.fromkeys("ex ey top_y peak peak_y base sums tops totals log_negative log_positive loss".split(), "*fp32")
    | dict.fromkeys("ds da dq dk dx dy".split(), "*fp32")
    | dict.fromkeys("scale share limit threshold".split(), "fp32")
)


def _pointer(module, kernel, dtype, tensors, *, strided, warps=4, **constants):
    """A row; ``tensors`` names the arguments that have the dtype of q. The last stride is 1 unless ``strided``."""
    name = f"{module.removesuffix('_spans')}_{kernel}_kernel"
    arguments = getattr(importlib.import_module(f"supy.kernels.{module}"), name).arg_names
    last = 3 if module == "global_pointer" else 2
    if not strided:
        constants |= {f"{x}{last}": 1 for x in ("q", "k", "x", "y", "own", "other") if f"{x}{last}" in arguments}
    types = {x: dtype if x in tensors.split() else _POINTER_TYPES.get(x, INTEGER) for x in arguments}
    options = LAUNCH | {"num_warps": warps} if "DEPTH" in arguments and kernel != "combine" else {"num_warps": warps}
    constants = {x: value for x, value in constants.items() if x in arguments}
    return module, name, ({x: t for x, t in types.items() if x not in constants}, constants, options)


def _pointers():
    for dtype, D, tril in (("*fp32", 64, True), ("*bf16", 64, False), ("*fp16", 150, True)):
        tile = {"TRIL": tril, "BLOCK": 64, "D": D, "DEPTH": 64, "PART": 64, "strided": dtype == "*fp16"}
        full, efficient = "global_pointer", "efficient_global_pointer"
        cells = {"CELLS": 16, "GRADIENTS": True, "HEADS": 64}
        yield _pointer(full, "scores", dtype, "q k out", **tile)
        yield _pointer(full, "rows", dtype, "q k", **tile)
        yield _pointer(full, "combine", dtype, "q k", **tile | cells)
        yield _pointer(full, "gradient", dtype, "q k", **tile)
        yield _pointer(full, "spans", dtype, "q k scores", warps=8, **tile)
        biased = "q k x y"
        yield _pointer(efficient, "scores", dtype, "q k x y out", **tile | {"PART": 16})
        narrow = tile | cells | {"BLOCK": 32, "HEADS": 128}
        yield _pointer(efficient, "peaks", dtype, biased, **narrow)
        for kernel in ("rows", "combine", "biases"):
            yield _pointer(efficient, kernel, dtype, biased, warps=8, **narrow)
        yield _pointer(efficient, "gradient", dtype, "q k", warps=8, **narrow | {"HEADS": 16})
        yield _pointer("efficient_global_pointer_spans", "spans", dtype, f"{biased} scores", warps=8, **tile, HEADS=16)
    integers = dict.fromkeys("N B H T blocks spans0 spans1 given0 count steps".split(), INTEGER)
    pointers = dict.fromkeys(("spans", "keys"), "*i64") | dict.fromkeys(("given", "lengths", "tiles"), "*i32")
    integers |= {"per_tile": INTEGER}
    for by_head, given in ((True, {}), (False, {"given": None})):
        constants = {"SORTED": by_head, "BY_HEAD": by_head, "TRIL": by_head, "BLOCK": 64, "SIZE": 64} | given
        names = "spans given lengths keys N B H T blocks spans0 spans1 given0".split()
        types = {x: (pointers | integers)[x] for x in names if x not in constants}
        yield "_spans", "span_keys_kernel", (types, constants)
    names = "keys tiles N count per_tile steps".split()
    yield "_spans", "span_tiles_kernel", ({x: (pointers | integers)[x] for x in names}, {"SIZE": 256})


_TILE_TYPES = (
    dict.fromkeys("q k v u g h x y gate weights grad attended out du dh own other linear memories".split(), "{0}:16")
    | dict.fromkeys("heads dq_lin dk_lin".split(), "{0}:16")
    | dict.fromkeys("ds dq dk factor level levels mean slope states weight".split(), "*fp32:16")
    | dict.fromkeys("gamma beta cosine sine sums".split(), "*fp32:16")
    | dict.fromkeys("keys key_blocks query_blocks tokens seen lengths".split(), "*i32:16")
    | dict.fromkeys(("scale", "divisor"), "fp32")
)


def _tile(module, kernel, dtype, tiles, types=None, launch=TILE_LAUNCH, **constants):
    """A row; rows of tensors are aligned, which the operator sees to. ``{0}`` in a type is the dtype of q."""
    name = f"{module}_{kernel}_kernel"
    arguments = getattr(importlib.import_module(f"supy.kernels.{module}"), name).arg_names
    constants = {x: tiles[x] for x in tiles if x in arguments} | constants
    steps = {x: f"{INTEGER}:16" for x in arguments if x.endswith(("_b", "_t"))}
    types = _TILE_TYPES | steps | (types or {})
    types = {x: types.get(x, INTEGER).format(dtype) for x in arguments if x not in constants}
    return module, name, (types, constants, launch)


_SMALL = _HALF | dict.fromkeys(("BLOCK", "DEPTH", "COLUMNS"), 16)  # of chunks of 16 tokens


def _gaus():
    gradients = "keys scores_gradient queries_gradient"
    for dtype, tiles, relu2, S, E, kernels in (
        ("*bf16", _HALF, False, 128, 1536, f"rows weights values swish linear gate_gradient {gradients}"),
        ("*bf16", _SMALL, True, 128, 1536, f"weights linear {gradients}"),
        ("*bf16", _HALF, True, 128, 1536, "scores_gradient"),
        ("*fp16", _HALF, False, 128, 1536, gradients),
        ("*fp16", _HALF, True, 80, 1520, "weights values scores_gradient"),
        ("*fp32", _TF32, False, 128, 1536, f"rows weights values {gradients}"),
        ("*fp32", _FLOAT, True, 144, 112, f"rows weights linear {gradients}"),
    ):
        slopes = {"ds": "*fp32:16" if dtype == "*fp16" else "{0}:16"}
        sums = {"weights": slopes["ds"], "out": "*fp32:16", "attended": "*fp32:16"}
        row = functools.partial(_tile, "gau_attention", dtype=dtype, tiles=tiles, types=slopes)
        whole = {"DEPTH": 128, "launch": PAIRED | {"num_warps": 8 if relu2 else 4}} if dtype != "*fp32" else {}
        narrow = {"NARROW": min(64, tiles["COLUMNS"])}
        if dtype == "*bf16":
            narrow = {"NARROW": min(32, tiles["COLUMNS"]), "launch": PAIRED_LONG}
        rows = {
            "rows": row("rows", S=S, **whole),
            "weights": row("weights", RELU2=relu2, LEVELS=1 if relu2 else 8, S=S, **whole),
            "values": row("values", GATED=1, SAVE=True, LINEAR=False, S=E, SIZE=E),
            "swish": row("values", GATED=SWISH, SAVE=True, LINEAR=False, S=E, SIZE=E),
            "linear": row("values", GATED=SLOPE, SAVE=False, LINEAR=True, S=S, SIZE=E),
            "keys": row("values", types=sums, GATED=0, SAVE=False, LINEAR=False, S=S, SIZE=S, PART=128),
            "scores_gradient": row("scores_gradient", RELU2=relu2, S=S, E=E, **narrow),
            "queries_gradient": row("queries_gradient", S=S, PART=64),
            "gate_gradient": row("gate_gradient", GATED=SWISH, E=E, BLOCK=16, PART=256),
        }
        yield from (rows[x] for x in kernels.split())


def _argmax():
    for dtype, tiles in (("*bf16", _HALF), ("*fp16", _HALF), ("*fp32", _FLOAT), ("*fp32", _TF32)):
        for rich in (True, False):
            types = {"bias": "*fp32:16", "exclude": "*i64:16", "ends": "*i32:16", "values": "*fp32:16", "classes": "*i32:16"}
            types |= {"weight": "{0}:16", "x_m": f"{INTEGER}:16", "weight_k": f"{INTEGER}:16"}
            options = {"BIAS": rich, "EXCLUDE": rich, "SIZE": 768, "NONE": 2**31 - 1}
            yield _tile("linear_argmax", "rows", dtype, tiles, types=types, **options)


def _mixed():
    for dtype, tiles, causal, S, E in (
        ("*bf16", _HALF, True, 128, 1536),
        ("*fp16", _HALF, False, 80, 1520),
        ("*fp32", _TF32, True, 128, 1536),
        ("*fp32", _FLOAT, True, 144, 112),
    ):
        row = functools.partial(_tile, "mixed_chunk_attention", dtype=dtype, tiles=tiles, S=S, E=E)
        yield row("states", ROWS=128)
        yield row("linear_gradient", PART=128)
        sizes = {"CAUSAL": causal, "REVERSED": causal, "SIZE": S * E, "STEP": 16, "PART": 256}
        yield _tile("mixed_chunk_attention", "memories", dtype, {}, **sizes)


def _projections():
    for dtype, heads, S, E in (("*bf16", 2, 128, 1536), ("*fp16", 4, 48, 48), ("*fp32", 4, 128, 1536)):
        row = functools.partial(_tile, "gated_projection", dtype=dtype, tiles={}, HEADS=heads, S=S, E=E, launch={})
        size = 1 << (S - 1).bit_length()
        yield row("activate", ROWS=8, PART=min(512, 1 << (E - 1).bit_length()), SIZE=size)
        yield row("gradient", ROWS=32, SIZE=size)
    for kernel in range(3):
        sizes = {"KERNEL": kernel, "BLOCK": 128, "ENDS": 32, "CAUSAL": kernel > 0, "DIVIDED": kernel > 1}
        given = {"PADDED": kernel == 1, "PACKED": kernel == 2}
        types = {"lengths": "*i64:16", "ends": "*i64:16"}
        yield _tile("gau_attention", "seen", "*bf16", {}, types, {}, **sizes, **given)


_STEP_TYPES = (
    dict.fromkeys("x eps noise out made_noise grad dx deps dnoise".split(), "{0}")
    | dict.fromkeys(("table", "limits"), "*fp32")
    | dict.fromkeys("clip rest w_x w_eps w_x0 w_noise x_to_x0 eps_to_x0".split(), "fp32")
    | dict.fromkeys(("seed", "first"), "i64")
)


def _steps():
    """All that a step can do at once, and the least."""
    for dtype in ("*fp32", "*bf16", "*fp16"):
        for rich in (True, False):
            names = "EPS SEEDED MADE CLIPPED TABLE LIMITS X NOISE".split()
            for kernel in ("normal", "step", "backward", "limits"):
                arguments = getattr(importlib.import_module("supy.kernels.ddpm_steps"), f"{kernel}_kernel").arg_names
                constants = {x: rich for x in names if x in arguments} | {"BLOCK": 1024}
                types = {x: _STEP_TYPES.get(x, INTEGER).format(dtype) for x in arguments if x not in constants}
                yield "ddpm_steps", f"{kernel}_kernel", (types, constants)


def _deep_norms():
    """Rows of 768 to 8192 numbers; alpha, seed, weight and bias in each of their forms."""
    for dtype, weights, rich, size, warps in (
        ("*fp32", "*fp32", False, 1024, 2),
        ("*fp32", "*fp32", True, 1024, 8),
        ("*bf16", "*fp32", True, 4096, 8),
        ("*fp16", "*fp16", False, 8192, 16),
    ):
        tensors = {x: f"{dtype}:16" for x in "grad x branch out dx dbranch".split()}
        tensors |= {"weight": f"{weights}:16", "bias": f"{weights}:16", "partial": "*fp32:16", "width": "i32:16"}
        tensors |= {"alpha": "*fp32" if rich else "fp32", "seed": "*i64" if rich else "i64", "first": "i64"}
        tensors |= {"threshold": "i64", "scale": "fp32", "eps": "fp32"}
        flags = {"ALPHA": rich, "SEED": rich, "WEIGHT": True, "BIAS": True, "RMS": not rich, "DROPOUT": rich}
        flags |= {"QUADS": dtype == "*bf16", "DX": True, "DBRANCH": True, "SUMS": True, "BLOCK": size}
        for kernel in ("forward_kernel", "backward_kernel"):
            arguments = getattr(importlib.import_module("supy.kernels.deep_norm"), kernel).arg_names
            constants = {x: flags[x] for x in arguments if x in flags}
            types = {x: tensors.get(x, INTEGER) for x in arguments if x not in flags}
            yield "deep_norm", kernel, (types, constants, {"num_warps": warps})


# A row: module of supy.kernels, kernel, (type of each argument that is no constant, constants, launch options if any).
# ":16" after a type: a pointer or number that 16 divides.
KERNELS = [
    ("rotary", "rotary_kernel", _rotary("*fp32", INTERLEAVED=True, INVERSE=False, ROWS=16, BLOCK=32)),
    ("rotary", "rotary_kernel", _rotary("*fp16", INTERLEAVED=True, INVERSE=True, ROWS=16, BLOCK=64)),
    ("rotary", "rotary_kernel", _rotary("*bf16", INTERLEAVED=False, INVERSE=False, ROWS=16, BLOCK=64)),
    *(
        ("multilabel_cross_entropy", kernel, _multilabel(names, types, **sizes, **indices))
        for types, indices, lanes in (
            ({"scores": "*fp32", "targets": "*fp32", "ds": "*fp32"}, {"INDICES": False, "HARD": False}, 512),
            ({"scores": "*bf16", "targets": "*u8", "ds": "*bf16"}, {"INDICES": False, "HARD": True}, 2048),
            ({"scores": "*fp16", "targets": "*i64", "ds": "*fp16"}, {"INDICES": True, "HARD": True}, 1024),
        )
        for kernel, names, sizes in (
            ("forward_kernel", _SUMS, {"CHUNK": 8192, "LANES": lanes, "AT_ONCE": 4096 // lanes}),
            ("backward_kernel", _SLOPES, {"BLOCK": 4096}),
        )
    ),
    (
        "multilabel_cross_entropy",
        "combine_kernel",
        _multilabel("parts negative positive chunks", {}, BLOCK=8),
    ),
    *(
        (
            "multilabel_cross_entropy",
            "outside_kernel",
            _multilabel("labels found numel last ignore", {"labels": dtype, "found": "*i32"}, BLOCK=4096),
        )
        for dtype in ("*fp32", "*bf16", "*u8", "*i64")
    ),
    *(
        (
            "multitask_cross_entropy",
            "forward_kernel",
            _multilabel(f"scores targets parts {_TASKS}", types, **sizes),
        )
        for types, sizes in (
            (
                {"scores": "*fp32", "targets": "*fp32"},
                {"HARD": True, "CHUNK": 256, "TASKS": 64, "BLOCK": 16},
            ),
            (
                {"scores": "*bf16", "targets": "*u8"},
                {"HARD": False, "CHUNK": 4, "TASKS": 1, "BLOCK": 8192},
            ),
        )
    ),
    (
        "multitask_cross_entropy",
        "combine_kernel",
        _multilabel("parts losses classes chunks", {}, BLOCK=256),
    ),
    *(
        (
            "multitask_cross_entropy",
            "backward_kernel",
            _multilabel("scores targets losses grad ds tasks classes s0 s1 s2 t0 t1 t2 grad0 grad1", types, **sizes),
        )
        for types, sizes in (
            ({"scores": "*fp32", "targets": "*fp32", "ds": "*fp32"}, {"HARD": True, "TASKS": 1, "BLOCK": 8192}),
            ({"scores": "*fp16", "targets": "*u8", "ds": "*fp16"}, {"HARD": False, "TASKS": 64, "BLOCK": 16}),
        )
    ),
    *_steps(),
    *_deep_norms(),
    *_pointers(),
    *_gaus(),
    *_mixed(),
    *_argmax(),
    *_projections(),
]


@pytest.mark.parametrize(
    ("module", "kernel", "arguments"), KERNELS, ids=[f"{row[1]}-{i}" for i, row in enumerate(KERNELS)]
)
def test_compiles_for_sm_90(module, kernel, arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # today's default, said aloud: else Triton 3.9 warns
    types, constants, *options = arguments
    function = getattr(importlib.import_module(f"supy.kernels.{module}"), kernel)
    divisible = {(function.arg_names.index(x),): [["tt.divisibility", 16]] for x in types if types[x].endswith(":16")}
    types = {x: types[x].removesuffix(":16") for x in types}
    source = ASTSource(function, types | dict.fromkeys(constants, CONSTANT), constants, divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(*options))
    assert ".local" not in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 * 1024
    if not divisible:
        return  # without these the compiler knows less than at run time, and registers may spill
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", tmp_path / "kernel.cubin"]
    assert " STACK:0 " in subprocess.run(dump, capture_output=True, text=True, check=True).stdout, "registers spill"


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
