"""Between the host and an accelerator: batches go over, numbers come back, and neither waits longer than it must."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def moved(value: Any, device: torch.device) -> Any:
    """A tensor on ``device``; through pinned memory where that spares the host the wait. Other values as they are."""
    if not isinstance(value, Tensor) or value.device == device:
        return value
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def ranges(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """(smallest, largest) of each whole-number tensor, none of them empty; one transfer from an accelerator for all."""
    ends = [torch.stack(torch.aminmax(t.long())) for t in tensors]
    return [(low, high) for low, high in torch.stack(ends).tolist()] if ends else []


class Pending:
    """Scalars on their way to the host: made where they exist, read with :meth:`numbers` once later work is queued.

    From a GPU that waits for what was queued before it was made, not for what came after.
    """

    def __init__(self, scalars: Mapping[str, Tensor]) -> None:
        self._names = list(scalars)
        self._values = torch.stack([v.detach().reshape(()) for v in scalars.values()])
        self._event: torch.cuda.Event | None = None
        if self._values.is_cuda:
            self._values = torch.empty_like(self._values, device="cpu", pin_memory=True).copy_(
                self._values, non_blocking=True
            )
            self._event = torch.cuda.Event()
            self._event.record()

    def numbers(self) -> dict[str, float]:
        """The scalars by name."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._names, self._values.tolist()))
