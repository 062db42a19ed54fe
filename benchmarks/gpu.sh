#!/usr/bin/env bash
# All that needs a GPU, in one go: the tests of the kernels on it, then the benchmarks, whose results are written to
# benchmarks/results/<device>.json. With pytest-xdist installed, JOBS=12 compiles kernels for tests and benchmarks in parallel.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
jobs=${JOBS:+-n $JOBS}
status=0
"$python" -m supy.info
"$python" -m pytest -q -m gpu tests $jobs || status=1
# Compares results only, and leaves compiled kernels in the caches of Triton and torch.compile.
"$python" -m pytest -q benchmarks/test_table.py --device cuda $jobs --benchmark-disable || status=1
"$python" -m pytest -q benchmarks/test_table.py --device cuda --results || status=1
exit $status
