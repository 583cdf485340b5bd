"""Several processes that train one model: ``torchrun`` or ``accelerate launch`` starts them, torch.distributed joins
them. In a single process every function here does the obvious thing at no cost.

Each process (a *rank*) holds the whole model and runs its part of every batch. Process 0 is *first*: it alone writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from kdlsq_fx.errors import TrainingError


def join() -> None:
    """Join the group that the launcher's environment describes (``WORLD_SIZE``, ``RANK`` and the address); nothing to
    do in a single process or where the group was joined before.

    NCCL carries the gradients where every process of a machine has a GPU of its own, else gloo does. The small sums
    and the waiting are gloo's in any case: it tells at once when another process has gone.
    """
    if launched() == 1 or size() > 1:
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE", launched()))
    with_nccl = torch.cuda.is_available() and dist.is_nccl_available() and torch.cuda.device_count() >= local
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    with _answering():
        dist.init_process_group("cpu:gloo,cuda:nccl" if with_nccl else "gloo")


def leave() -> None:
    """End the group; afterwards each process is on its own. All processes call it together."""
    if size() > 1:
        wait()
        dist.destroy_process_group()
        os.environ["WORLD_SIZE"] = "1"  # nobody joins again what is gone


def launched() -> int:
    """Number of processes the launcher says it started, joined or not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def first() -> bool:
    """True in the process that writes; also before :func:`join`, by the launcher's word."""
    return rank() == 0 if size() > 1 or launched() == 1 else os.environ.get("RANK", "0") == "0"


def device() -> torch.device:
    """The GPU of this process where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def shares(rows: int, count: int) -> dict[int, slice]:
    """So many rows cut into ``count`` shares, a multiple of the number of processes: this process's shares by number.
    They are contiguous, their sizes differ by one at most, and may be 0."""
    mine = range(count * rank() // size(), count * (rank() + 1) // size())
    return {i: slice(rows * i // count, rows * (i + 1) // count) for i in mine}


def total(values: Sequence[float]) -> list[float]:
    """Each value summed over all processes. TrainingError where another process has gone."""
    if size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=_device_of_small())
    with _answering():
        dist.all_reduce(sums)
    return sums.tolist()


def largest(value: torch.Tensor) -> torch.Tensor:
    """The largest of all processes' values, entry by entry; in a single process the value itself."""
    if size() > 1:
        value = value.clone()
        with _answering():
            dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def wait() -> None:
    """Until all processes are here. TrainingError where another process has gone."""
    total([0.0])


def copy_from_first(module: torch.nn.Module) -> None:
    """Give every process the first one's parameters and buffers, in place."""
    if size() == 1:
        return
    with _answering(), torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, 0)
            tensor.copy_(whole)


def _device_of_small() -> torch.device:
    """A group that somebody else made may know GPUs only."""
    return torch.device("cpu") if "cpu:" in dist.get_backend_config() else device()


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as err:  # what gloo and NCCL raise; ValueError: an environment without an address
        reason = str(err).strip().splitlines()[0][-200:]
        do = "look for that process's own message; started again, the run goes on from its last checkpoint"
        raise TrainingError(f"another process ended or does not answer ({reason})", do=do) from err
