"""Options, the heap, and the table at the end. Times are the minimum of many rounds; ratios are to supy's time."""

from __future__ import annotations

import ctypes
import datetime
import json
import platform
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch
from ceilings import copy_rate, gemm_rate

import supy

RESULTS = pytest.StashKey[list]()
PACKAGES = ("torch", "triton", "rotary-embedding-torch", "FLASH-pytorch", "networkx", "igraph", "diffusers")


def pytest_addoption(parser):
    group = parser.getgroup("supy benchmarks")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where the tensors are")
    group.addoption("--results", action="store_true", help="write benchmarks/results/<device>.json")
    group.addoption("--default-malloc", action="store_true", help="let glibc return large blocks to the system")


def pytest_configure(config):
    config.stash[RESULTS] = []
    config.option.benchmark_disable_gc = True
    if not config.option.default_malloc:
        _keep_freed_memory()


def _keep_freed_memory():
    """A warm heap: else each tensor above 32 MB gets fresh pages, and page faults are most of what is measured."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


@pytest.fixture(autouse=True)
def freed_device():
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def record(request):
    """record(row, implementation, seconds, note, peak): a line of the final table; without a time, the note."""
    device = request.config.option.device

    def add(row, implementation, seconds, note="", peak=None):
        moving = row.bytes / copy_rate(row.bytes, device) if row.bytes else 0
        computing = row.flops / gemm_rate(device, row.dtype) if row.flops else 0
        request.config.stash[RESULTS].append(
            {
                "operator": row.operator,
                "case": row.case,
                "implementation": implementation,
                "seconds": seconds,
                "ceiling_seconds": max(moving, computing) or None,
                "peak_bytes": peak,
                "note": note,
                "date": datetime.date.today().isoformat(),
            }
        )
        if request.config.option.results:
            _write(_report(request.config))

    return add


def _name_of(device) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        model = found[1] if found else model
    return f"{model}, {torch.get_num_threads()} threads"


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cells(result, supy_seconds):
    names = (result["operator"], result["case"], result["implementation"])
    seconds = result["seconds"]
    if seconds is None:
        return (*names, "-", "-", "-", "-", result["note"])
    ratio = f"{seconds / supy_seconds:.2f}" if supy_seconds else "-"
    ceiling = f"{100 * result['ceiling_seconds'] / seconds:.0f}" if result["ceiling_seconds"] else "-"
    peak = "-" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 2**20:.0f}"
    return (*names, f"{1e3 * seconds:.4f}", ratio, ceiling, peak, "")


def _kept(path, results):
    """Earlier lines of rows that this run has not measured; each line has its own date."""
    if not path.exists():
        return []
    measured = {(r["operator"], r["case"]) for r in results}
    before = json.loads(path.read_text(encoding="utf-8"))
    return [
        {"date": before["date"]} | r for r in before["results"] if (r["operator"], r["case"]) not in measured
    ]


def _report(config):
    device = config.option.device
    return {
        "date": datetime.date.today().isoformat(),
        "device": _name_of(device),
        "malloc": "default malloc" if config.option.default_malloc else "warm heap",
        "supy": supy.__version__,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "copy_bytes_per_second": {f"{size >> 20} MB": copy_rate(size, device) for size in (2**24, 2**28)},
        "gemm_flops_per_second": gemm_rate(device),
        "gemm_flops_per_second_bfloat16": gemm_rate(device, torch.bfloat16),
        "results": config.stash[RESULTS],
    }


def _write(report):
    """benchmarks/results/<device>.json, anew after each row: a run that is stopped keeps what it has measured."""
    name = re.sub(r"[^a-z0-9]+", "-", report["device"].lower())
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    results = _kept(path, report["results"]) + report["results"]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report | {"results": results}, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    results = config.stash[RESULTS]
    if not results:
        return
    of_supy = {(r["operator"], r["case"]): r["seconds"] for r in results if r["implementation"] == "supy"}
    table = [("operator", "case", "implementation", "min ms", "x supy", "% ceiling", "peak MB", "")]
    table += [_cells(r, of_supy.get((r["operator"], r["case"]))) for r in results]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    report = _report(config)
    copies = ", ".join(f"{rate / 1e9:.0f} ({size})" for size, rate in report["copy_bytes_per_second"].items())
    line = terminalreporter.line
    terminalreporter.section("supy benchmarks")
    line(f"{report['date']}, {report['device']}, torch {torch.__version__}, {report['malloc']}")
    line(f"ceilings: copy {copies} GB/s, float32 GEMM {report['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s")
    for row in table:
        cells = (c.rjust(w) if 3 <= i <= 6 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        line("  ".join(cells).rstrip())
    if config.option.results:
        line(f"written: {_write(report)}")
