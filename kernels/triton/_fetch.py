"""Values that the host looks at before an operator returns."""

from __future__ import annotations

import torch


def fetch(values):
    """Begins to copy to the host, which goes on launching; the function that is returned waits and gives the list."""
    copy = values.to("cpu", non_blocking=True)
    if not values.is_cuda:
        return copy.tolist
    event = torch.cuda.Event()
    event.record()

    def wait():
        event.synchronize()
        return copy.tolist()

    return wait
