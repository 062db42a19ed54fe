"""What every test shares: ``gpu`` tests are skipped without a CUDA device, ``slow`` ones where not asked for, and fresh
memory is poisoned."""

import sys

import pytest
import torch

# ``with torch.device("meta")`` looks a constructor up among those that were there at its first use: before the poisoning.
with torch.device("meta"):
    torch.empty(0)


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes long: -m slow"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def freed_device():
    """Several processes may test on one device: none keeps what it no longer needs."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What supy allocates uninitialised holds NaN, or the smallest integer, so that an unwritten output shows."""

    def poison(allocate):
        def allocated(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if sys._getframe(1).f_globals.get("__name__", "").startswith("supy"):
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)
                elif tensor.dtype != torch.bool:
                    tensor.fill_(torch.iinfo(tensor.dtype).min)
            return tensor

        return allocated

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
