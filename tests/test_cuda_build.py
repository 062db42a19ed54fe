"""Every CUDA kernel compiles for each architecture without spilling; needs nvcc but no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent.parent / "kernels"
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("sm_80", "sm_90a")

# Files whose kernels index a small local array at run time, which only a stack frame can hold: {"name.cu": bytes}.
STACK_FRAMES: dict[str, int] = {}


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted(KERNELS.glob("cuda/*.cu")), ids=lambda path: path.name)
def test_compiles_without_spills(source, architecture, tmp_path):
    command = [NVCC, "-std=c++17", "-cubin", f"-arch={architecture}", "-Xptxas=-v", "-Werror=all-warnings"]
    command += [f"-I{KERNELS / 'include'}", f"-I{KERNELS / 'common'}", "-o", tmp_path / "kernel.cubin", source]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        result.stderr,
    )
    assert kernels, f"no kernel in the output of ptxas:\n{result.stderr}"
    for name, stack, stores, loads in kernels:
        assert (int(stores), int(loads)) == (0, 0), f"{name} spills {stores} bytes of stores, {loads} of loads"
        allowed = STACK_FRAMES.get(source.name, 0)
        assert int(stack) <= allowed, f"{name} has a stack frame of {stack} bytes, {allowed} allowed"


def test_kernels_know_nothing_of_torch_or_python():
    foreign = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|pybind11|Python\.h)', re.M)
    sources = [path for path in KERNELS.rglob("*") if path.suffix in {".h", ".cuh", ".inl", ".cpp", ".cu"}]
    assert sources
    for path in sources:
        match = foreign.search(path.read_text(encoding="utf-8"))
        assert match is None, f"{path.name}: {match[0]}"
