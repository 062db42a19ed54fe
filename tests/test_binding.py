"""Where Python meets the kernels: struct layouts, refusal of bad arguments, a missing extension, a named backend."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import supy
from supy import _extension

ROOT = Path(__file__).parent.parent
needs_extension = pytest.mark.skipif(_extension.C is None, reason=f"no extension: {_extension.missing}")

# --- csrc/dlpack.h against the installed torch ------------------------------------------------------------------------

# Our struct, theirs, and the fields whose names differ (ours: theirs).
STRUCTS = {
    "Version": ("DLPackVersion", {"major": "major", "minor": "minor"}),
    "Device": ("DLDevice", {"type": "device_type", "id": "device_id"}),
    "DataType": ("DLDataType", {"code": "code", "bits": "bits", "lanes": "lanes"}),
    "Tensor": (
        "DLTensor",
        {name: name for name in ("data", "device", "ndim", "dtype", "shape", "strides", "byte_offset")},
    ),
    "ManagedTensor": (
        "DLManagedTensorVersioned",
        {
            "version": "version",
            "context": "manager_ctx",
            "deleter": "deleter",
            "flags": "flags",
            "tensor": "dl_tensor",
        },
    ),
    "ExchangeAPI": (
        "DLPackExchangeAPI",
        {
            "version": "header.version",
            "previous": "header.prev_api",
            "allocate": "managed_tensor_allocator",
            "managed_from_object": "managed_tensor_from_py_object_no_sync",
            "managed_to_object": "managed_tensor_to_py_object_no_sync",
            "view_from_object": "dltensor_from_py_object_no_sync",
            "current_stream": "current_work_stream",
        },
    ),
}
ENUMS = ("kCPU", "kCUDA", "kInt", "kUInt", "kFloat", "kBfloat", "kBool")


def test_layouts_equal_those_of_the_installed_torch(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    headers = Path(torch.__file__).parent / "include"
    if compiler is None or not (headers / "ATen/dlpack.h").exists():
        pytest.skip("needs a C++ compiler and torch's headers")
    asserts = [f"static_assert(int(ours::{name}) == int(kDL{name[1:]}));" for name in ENUMS]
    for ours, (theirs, fields) in STRUCTS.items():
        asserts.append(f"static_assert(sizeof(ours::{ours}) == sizeof({theirs}));")
        for mine, other in fields.items():
            asserts.append(f"static_assert(offsetof(ours::{ours}, {mine}) == offsetof({theirs}, {other}));")
            asserts.append(
                f"static_assert(sizeof(std::declval<ours::{ours}>().{mine})"
                f" == sizeof(std::declval<{theirs}>().{other}));"
            )
    source = tmp_path / "layout.cpp"
    includes = ("<cstddef>", "<utility>", "<ATen/dlpack.h>", '"dlpack.h"')
    source.write_text(
        "\n".join(f"#include {name}" for name in includes)
        + "\nnamespace ours = supy::dlpack;\n"
        + "\n".join(asserts)
    )
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{headers}", f"-I{ROOT / 'csrc'}", source]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_layout_test_knows_every_declaration():
    text = (ROOT / "csrc/dlpack.h").read_text(encoding="utf-8")
    assert set(re.findall(r"^struct (\w+)", text, re.M)) == set(STRUCTS)
    assert set(re.findall(r"\bk[A-Z]\w+(?= =)", text)) == set(ENUMS)


# --- the caster -------------------------------------------------------------------------------------------------------


def _fake(**options):
    return FakeTensorMode(**options).from_tensor(torch.zeros(3, 5))


class _Subclass(torch.Tensor):
    pass


def _without_storage():
    tensor = torch.zeros(3)
    tensor.untyped_storage().resize_(0)
    return tensor


# Each is built inside its test: some torch builds lack some of these kinds.
REFUSED = {
    "int": (TypeError, lambda: 3),
    "None": (TypeError, lambda: None),
    "list": (TypeError, lambda: [1.0]),
    "str": (TypeError, lambda: "tensor"),
    "numpy": (TypeError, lambda: np.zeros(3)),
    "the class itself": (TypeError, lambda: torch.Tensor),
    "claims to be a tensor": (TypeError, lambda: type("Claim", (), {"__class__": torch.Tensor})()),
    "complex": (TypeError, lambda: torch.zeros(3, dtype=torch.complex64)),
    "float8": (TypeError, lambda: torch.zeros(3).to(torch.float8_e4m3fn)),
    "int16": (TypeError, lambda: torch.zeros(3, dtype=torch.int16)),
    "meta": (ValueError, lambda: torch.zeros(3, device="meta")),
    "fake": (ValueError, _fake),
    "fake, symbolic sizes": (ValueError, lambda: _fake(shape_env=ShapeEnv())),
    "bits": (ValueError, lambda: torch.empty(3, dtype=torch.bits8)),
    "sparse": (ValueError, lambda: torch.eye(3).to_sparse()),
    "compressed sparse": (ValueError, lambda: torch.eye(3).to_sparse_csr()),
    "nested": (ValueError, lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])),
    "nested, jagged": (
        ValueError,
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
    ),
    "storage freed": (ValueError, _without_storage),
    "functionalised": (ValueError, lambda: torch._to_functional_tensor(torch.zeros(3))),
}

ACCEPTED = {
    "0-dim": (torch.tensor(1.0), 1),
    "zero-size": (torch.empty(0, 3), 0),
    "Parameter": (torch.nn.Parameter(torch.zeros(3)), 3),
    "requires_grad": (torch.zeros(3, requires_grad=True) * 2, 3),
    "subclass": (torch.zeros(3).as_subclass(_Subclass), 3),
    "expanded": (torch.zeros(1).expand(5), 5),
    "strided": (torch.zeros(8, 6)[::2, 1:].t(), 20),
    "many axes": (torch.zeros([1] * 40), 1),
    **{
        str(dtype): (torch.zeros(3, dtype=dtype), 3)
        for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int32, torch.int64, torch.bool)
    },
}


@needs_extension
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", REFUSED)
def test_caster_refuses(case):
    error, make = REFUSED[case]
    value = make()
    for arguments in ((value, torch.zeros(1)), (torch.zeros(1), value)):
        with pytest.raises(error) as raised:
            _extension.C.touch(*arguments)
        text = str(raised.value)
        assert text and "\n" not in text and len(text) < 250, text


@needs_extension
def test_caster_refuses_tensors_inside_a_transform():
    def body(x):
        with pytest.raises(ValueError, match="no memory that a kernel can read"):
            _extension.C.touch(x, x)
        return x

    torch.vmap(body)(torch.zeros(3, 2))


@needs_extension
@pytest.mark.parametrize("case", ACCEPTED)
def test_caster_accepts(case):
    tensor, numel = ACCEPTED[case]
    assert _extension.C.touch(tensor, tensor) == 2 * numel


@needs_extension
@pytest.mark.parametrize("arguments", [(), (torch.zeros(1),), (torch.zeros(1),) * 3], ids=len)
def test_wrong_number_of_arguments(arguments):
    with pytest.raises(TypeError):
        _extension.C.touch(*arguments)


def test_lazy_negation_reaches_kernels_resolved():
    # The imaginary part of a conjugate is a view of unnegated memory with a flag; the dispatcher resolves it.
    lazy = torch.randn(2, 4, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    torch.testing.assert_close(supy.ops.rotary(lazy), supy.ops.rotary(lazy.resolve_neg().contiguous()))


def test_cached_tables_do_not_leak_between_modes():
    # rotary keeps its tables; one made in inference mode, or a fake one, must not reach a later plain call.
    def train(length):
        x = torch.randn(length, 4, requires_grad=True)
        supy.ops.rotary(x).sum().backward()
        return type(x.grad)

    with torch.inference_mode():
        supy.ops.rotary(torch.randn(101, 4))
    assert train(101) is torch.Tensor
    with FakeTensorMode():
        supy.ops.rotary(torch.randn(102, 4))
    assert train(102) is torch.Tensor
    with FakeTensorMode():
        assert supy.ops.rotary(torch.randn(102, 4)).shape == (102, 4)


# --- a missing or unfit extension -------------------------------------------------------------------------------------

MISSING = "sys.modules['supy._C'] = None"
OLD = "sys.modules['supy._C'] = types.SimpleNamespace(build_info=lambda: {'version': '0.0.0'})"


def _python(*statements):
    code = "\n".join(("import logging, runpy, sys, types", *statements))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize(("hide", "reason"), [(MISSING, "does not load"), (OLD, "was built for supy 0.0.0")])
def test_without_a_fit_extension_the_reference_runs(hide, reason):
    result = _python(
        "logging.basicConfig(level='INFO', format='%(name)s|%(levelname)s|%(message)s')",
        hide,
        "import torch, supy",
        "from supy import _extension",
        "assert _extension.C is None and _extension.missing",
        "x = torch.randn(2, 5, 6, requires_grad=True)",
        "y = supy.ops.rotary(x)",
        "with supy.use_backend('reference'): assert torch.equal(y, supy.ops.rotary(x))",
        "y.sum().backward()",
        "assert x.grad.shape == x.shape",
        "try:",
        "    with supy.use_backend('cpp'): supy.ops.rotary(x)",
        "except RuntimeError as error: print(error)",
    )
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("supy|")]
    assert line.startswith("supy|INFO|") and reason in line and "reference" in line
    assert "'cpp'" in result.stdout and "reinstall supy" in result.stdout


@pytest.mark.parametrize(("hide", "reason"), [(MISSING, "does not load"), (OLD, "was built for supy 0.0.0")])
def test_info_explains_an_unfit_extension(hide, reason):
    result = _python(hide, "runpy.run_module('supy.info', run_name='__main__')")
    assert result.returncode == 0, result.stderr
    assert f"native kernels: none: supy._C {reason}" in result.stdout
    assert f"missing, cpp: supy._C {reason}" in result.stdout


def test_a_fit_extension_is_silent():
    result = _python("logging.basicConfig(level='INFO')", "import supy")
    assert result.returncode == 0 and "supy" not in result.stderr, result.stderr


# --- use_backend ------------------------------------------------------------------------------------------------------


def test_unknown_backend():
    with pytest.raises(ValueError, match="'vulkan', expected 'reference', 'cpp', 'cuda' or 'triton'"):
        with supy.use_backend("vulkan"):
            pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_named_backend_that_is_missing(backend):
    with supy.use_backend(backend), pytest.raises(RuntimeError, match=f"'{backend}' was asked for, but ") as raised:
        supy.ops.rotary(torch.ones(1, 2))
    assert re.search("install|no CUDA device", str(raised.value))


@needs_extension
def test_named_backend_that_lacks_the_dtype():
    with supy.use_backend("cpp"), pytest.raises(RuntimeError, match="no such kernel for torch.float64"):
        supy.ops.rotary(torch.ones(1, 2, dtype=torch.float64))


def test_backend_is_restored_after_an_error():
    with pytest.raises(KeyError):
        with supy.use_backend("reference"):
            raise KeyError
    supy.ops.rotary(torch.ones(1, 2))
