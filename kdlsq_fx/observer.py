"""What calibration remembers of one activation: a few running figures and a bounded sample, O(1) memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdlsq_fx.errors import CalibrationError

CAPACITY = 2**17
TAIL = 2**12


class Observer:
    """Streamed figures of one value over batches.

    ``count`` elements; ``rows`` samples (first dimension); ``batches``; ``low, high``; ``abs_sum``; ``peak_sum``, the
    sum of each batch's largest magnitude; ``values()``, a uniform sample of at most 2**17 elements; ``tail``, the 2**12
    of largest magnitude. The sample is random (a fixed seed): every k-th element of an activation would be the same
    few features. The tail is exact: a few outliers hold most of the error of a narrow range.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.count = self.rows = self.batches = 0
        self.low, self.high = math.inf, -math.inf
        self.abs_sum = self.peak_sum = 0.0
        self._capacity, self._halvings = capacity, 0
        self._parts: list[Tensor] = []
        self._held = 0
        self.tail = torch.empty(0)
        self._rng = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def add(self, x: Tensor, *, where: str = "") -> None:
        """Take in one batch, ``x`` of any shape with the batch first; CalibrationError for NaN or infinity."""
        if x.numel() == 0:
            return
        low, high = (float(v) for v in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            what = "an activation holds NaN or infinity"
            raise CalibrationError(what, where=where, do="look at the batch and at the weights of the layers before it")
        self.count += x.numel()
        self.rows += x.shape[0] if x.ndim else 1
        self.batches += 1
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.abs_sum += float(x.abs().sum(dtype=torch.float64))
        self.peak_sum += max(-low, high)
        flat = x.detach().reshape(-1)
        self._keep(flat)
        self._keep_largest(flat)

    def _keep(self, flat: Tensor) -> None:
        """Each element is held with probability 2**-halvings; when the store overflows, every second one goes."""
        wanted = flat.numel() * 0.5**self._halvings
        while self._held + wanted > self._capacity:
            self._halvings += 1
            wanted /= 2
            self._thin()
        if self._halvings:
            number = int(wanted) + int(torch.rand((), generator=self._rng) < wanted % 1)
            index = torch.randint(flat.numel(), (number,), generator=self._rng)
            flat = flat[index.to(flat.device)]
        self._parts.append(flat.to("cpu", copy=True))
        self._held += flat.numel()

    def _keep_largest(self, flat: Tensor) -> None:
        bound = self.tail.abs().min() if self.tail.numel() == TAIL else self._guess(flat)
        above = flat[flat.abs() > bound.to(flat.device)]
        if self.tail.numel() + above.numel() >= min(TAIL, self.count):  # else the guess was too high
            flat = above
        both = torch.cat([self.tail.to(flat), flat])
        largest = torch.topk(both.abs(), min(TAIL, both.numel()), sorted=False).indices
        self.tail = both[largest].cpu()

    def _guess(self, flat: Tensor) -> Tensor:
        """A magnitude that about twice TAIL elements exceed: a search among those is far quicker than among all."""
        part = self._parts[-1].abs()
        share = 2 * TAIL / flat.numel()
        k = part.numel() - int(share * part.numel())
        return torch.kthvalue(part, k).values if k > 0 and share < 0.5 else part.new_tensor(-1.0)

    def _thin(self) -> None:
        values = self.values()
        self._parts = [values[torch.rand(values.numel(), generator=self._rng) < 0.5]]
        self._held = self._parts[0].numel()

    def values(self) -> Tensor:
        """The sample, [n] with n <= 2**17, in the dtype of what was seen."""
        return torch.cat(self._parts) if self._parts else torch.empty(0)

    @property
    def is_sampled(self) -> bool:
        """True where ``values()`` is less than all that was seen."""
        return self._held < self.count

    @property
    def mean_abs(self) -> float:
        return self.abs_sum / self.count if self.count else 0.0

    @property
    def features(self) -> float:
        """Elements per sample, the batch dimension left out: N_F of the LSQ paper."""
        return self.count / self.rows if self.rows else 0.0
