"""Finds ``supy._C`` and says once, at level INFO, why it is missing if it is."""

from __future__ import annotations

import importlib
import logging
from importlib.metadata import PackageNotFoundError, version

log = logging.getLogger("supy")


def _load():
    try:
        _C = importlib.import_module("supy._C")
    except ImportError as error:
        return None, f"supy._C does not load ({error}); reinstall supy with a C++ compiler at hand"
    try:
        installed = version("supy")
    except PackageNotFoundError:  # imported from a plain checkout
        installed = None
    built = _C.build_info()["version"]
    if installed is not None and built != installed:
        return None, f"supy._C was built for supy {built}, this is supy {installed}; reinstall supy"
    try:
        import torch

        _C.touch(torch.empty(0), torch.empty(0))
    except (ImportError, TypeError, ValueError) as error:
        return None, f"supy._C cannot read this torch's tensors ({error})"
    return _C, None


C, missing = _load()
has_cuda = C is not None and bool(C.build_info()["cuda"])
if missing:
    log.info("%s. Operators run on their PyTorch reference.", missing)
