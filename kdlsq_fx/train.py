"""One plain training loop for fine-tuning, QAT and distillation; it can be stopped and resumed at any moment.

``fit`` runs whatever module returns an output with a ``.loss``: a Hugging Face model, a qat module, or a distillation
wrapper. AdamW, linear decay to zero after an optional warm-up: the recipe of the KDLSQ release (its run script).

Several processes (``torchrun``, ``accelerate launch``) take the same steps as one: each computes its rows of the same
batch, padded as the whole batch is, and its mean loss counts by its share of the rows. So do micro-batches, the parts
that one process computes one after the other. docs/training.md.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from kdlsq_fx import checkpoint, processes
from kdlsq_fx.devices import Pending, moved
from kdlsq_fx.errors import ConfigError, TrainingError
from kdlsq_fx.files import differences
from kdlsq_fx.watching import Interrupted, Log, Stop, progress

__all__ = ["Fit", "Interrupted", "Source", "fit", "plain_groups", "schedule"]

NO_DECAY = ("bias", "LayerNorm.weight", "layer_norm.weight", "layernorm.weight")
LOWER = "lower the learning rate, or start again from the last checkpoint in the folder"


class Source(Protocol):
    """What ``fit`` needs of a data set; :class:`kdlsq_fx.data.Encoded` is one.

    ``order``: the rows of each batch of an epoch, a function of its arguments alone. ``batch``: the rows of ``part``
    among ``rows``, padded as all of ``rows`` would be: one of several processes reads no rows but its own.
    """

    def order(self, *, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]: ...
    def batch(self, rows: np.ndarray, *, part: slice = ...) -> dict[str, torch.Tensor]: ...
    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Fit:
    """What a run did: optimizer steps in all, seconds over all its parts, and the mean loss of the last steps."""

    steps: int
    seconds: float
    loss: float
    resumed_at: int = 0


@dataclass(kw_only=True)
class Recipe:
    """Everything that decides the weights a run ends with, besides the model it starts from."""

    lr: float
    batch_size: int
    seed: int
    steps: int
    warmup: float
    clip: float
    precision: str
    data: str
    groups: list[dict[str, Any]] = field(default_factory=list)


def plain_groups(model: torch.nn.Module, *, lr: float, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Two groups of an ordinary model: biases and LayerNorm weights are not decayed."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if not n.endswith(NO_DECAY)]
    rest = [p for n, p in named if n.endswith(NO_DECAY)]
    groups = [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"params": rest, "lr": lr, "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def fit(
    model: torch.nn.Module,
    data: Source,
    *,
    out_dir: str | Path,
    epochs: float = 3,
    steps: int | None = None,
    lr: float = 5e-5,
    batch_size: int = 32,
    seed: int = 42,
    warmup: float = 0.0,
    clip: float = 0.0,
    precision: str = "fp32",
    micro_batches: int = 0,
    groups: list[dict[str, Any]] | None = None,
    resume: bool = True,
    save_every: int = 0,
    save_seconds: float = 120.0,
    title: str = "train",
    on_step: Callable[[int, torch.nn.Module], None] | None = None,
) -> Fit:
    """Train ``model`` in place and leave it in eval mode.

    ``epochs`` may be a fraction; ``steps`` overrides it. ``groups`` are AdamW's parameter groups with their own lr
    (``kq.param_groups`` for a qat module; plain ones without it). ``warmup`` is a share of the steps. ``clip`` bounds
    the norm of the gradient (0: not clipped). ``precision="bf16"`` runs the matrix products of training in bfloat16
    (autocast; parameters and optimizer state stay float32); evaluation is float32 in any case. ``micro_batches`` cuts
    every batch into so many, shared out over the processes, which take theirs one after the other and add up the
    gradients: less memory, and with two of them one process adds what two processes add (0: one for each process). It
    may change from one call to the next, as the number of processes may.

    A checkpoint is written every ``save_every`` steps and every ``save_seconds`` seconds, and at the end. With
    ``resume`` a run found in ``out_dir`` goes on where it was saved; a finished one is only loaded. Sets the global
    random seeds, at each step anew. ``log.tsv`` holds one line a step.

    Under a launcher all its processes call ``fit`` with the same arguments. ``batch_size`` is that of all together;
    parameters and buffers start as the first process's; only that one writes, and ``on_step`` runs in each. The loss
    has to be a mean over the rows of a batch. ``out_dir`` is one folder that all can read; a run goes on with any
    number of processes.

    Raises :class:`TrainingError` for a loss that is not finite, a run that had another recipe, or another process
    that ended; :class:`Interrupted` after Ctrl-C or SIGTERM (to any of the processes).
    """
    processes.join()
    folder = Path(out_dir)
    per_epoch = len(data.order(batch_size=batch_size, seed=seed, epoch=0))
    total = steps if steps is not None else math.ceil(epochs * per_epoch)
    if total < 1 or batch_size < 1:
        raise ConfigError(f"{total} steps of {batch_size} rows", do="train for at least one step of one row")
    check_micro_batches(micro_batches, batch_size)
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"precision={precision!r} is unknown", do="use 'fp32' or 'bf16'")
    groups = plain_groups(model, lr=lr) if groups is None else groups
    recipe = Recipe(
        lr=lr, batch_size=batch_size, seed=seed, steps=total, warmup=warmup, clip=clip, precision=precision,
        data=data.fingerprint,
        groups=[{k: v for k, v in g.items() if k != "params"} | {"tensors": len(g["params"])} for g in groups],
    )  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=lr, eps=1e-8, fused=True)
    base = [g["lr"] for g in optimizer.param_groups]
    state = _start(folder, model, optimizer, recipe, resume=resume)
    loop, writes = _shared(_Loss(model, precision)), processes.first()
    log = Log(folder / "log.tsv", state["step"]) if writes else None
    mean: _Mean | None = None
    first, began, saved = state["step"], time.monotonic() - state["seconds"], time.monotonic()
    model.train()
    with Stop() as stop, log or nullcontext(), progress(title, total, first) as bar:
        for step, rows in _rows(data, batch_size, seed, per_epoch, first, total):
            factor = schedule(step, total, warmup)
            for group, rate in zip(optimizer.param_groups, base):
                group["lr"] = rate * factor
            tell(model, step / total)
            losses = _backward(loop, optimizer, data, rows, micro_batches or processes.size(), (seed, step))
            behind, mean = mean, _step(optimizer, losses, clip, stop, f"step {step + 1}, {folder}")
            if behind is not None:
                behind.check()
            state |= {"step": step + 1, "seconds": time.monotonic() - began, "done": step + 1 == total}
            state["recent"] = (state["recent"] + [mean.loss])[-50:]
            bar.update(1)
            bar.set_postfix_str(f"loss {np.mean(state['recent']):.4f}", refresh=False)
            late = writes and time.monotonic() - saved > save_seconds
            due = late or mean.stop or state["done"] or (save_every and (step + 1) % save_every == 0)
            if due:
                mean.check()
            if log is not None:
                log.write(step + 1, mean.loss, lr * factor, state["seconds"], mean.parts)
                if due:
                    log.flush()
                    checkpoint.save(folder, model, optimizer, state)
                    saved = time.monotonic()
            if mean.stop and not state["done"]:
                processes.wait()  # a launcher ends the others as soon as one has ended
                raise Interrupted(f"stopped at step {step + 1} of {total}; saved in {folder}, run again to go on")
            if on_step is not None:
                on_step(step + 1, model)
    model.eval()
    return Fit(total, state["seconds"], float(np.mean(state["recent"])), first)


def check_micro_batches(count: int, batch_size: int) -> None:
    """ConfigError where batches cannot be cut into so many, to be shared out over the processes there are."""
    if count % processes.size() or not 0 <= count <= batch_size:
        what = f"{count} micro-batches of {batch_size} rows in {processes.size()} processes"
        raise ConfigError(what, do="cut a batch into a multiple of the number of processes, of one row at least")


def schedule(step: int, total: int, warmup: float = 0.0) -> float:
    """Factor of the learning rate at a step (from 0): up over the first ``warmup`` share, then down to 0."""
    rise = int(total * warmup)
    return (step + 1) / rise if step < rise else (total - step) / max(total - rise, 1)


def tell(model: torch.nn.Module, done: float) -> None:
    """A loss with a schedule (a Distiller's) goes by the share of the run that is done."""
    if hasattr(model, "progress"):
        setattr(model, "progress", done)  # noqa: B010 (nn.Module types its attributes as tensors)


def seed_generators(seed: int, step: int, share: int) -> None:
    """Seed torch's, Python's and NumPy's global generators (dropout may draw from any of them) for one share of a
    batch: a function of these numbers alone, so that a resumed run needs no state of theirs."""
    words = np.random.SeedSequence([seed, step, share]).generate_state(1)
    torch.manual_seed(int(words[0]))
    random.seed(int(words[0]))
    np.random.seed(words)


class _Loss(torch.nn.Module):
    """A batch to its loss and the parts of it, and nothing else: DistributedDataParallel waits for a gradient of every
    parameter behind an output, and a distilled student returns logits that its loss need not read."""

    def __init__(self, model: torch.nn.Module, precision: str) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        device = next(self.model.parameters()).device
        if not getattr(self.model, "moves_inputs", False):
            batch = {k: moved(v, device) for k, v in batch.items()}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            output = self.model(**batch)
        return output.loss, {k: v.detach() for k, v in (getattr(output, "parts", None) or {}).items()}


def _shared(loss: _Loss) -> torch.nn.Module:
    """The same module in every process, its gradients averaged over them; one process needs no wrapper."""
    if processes.size() == 1:
        return loss
    processes.copy_from_first(loss)
    return DistributedDataParallel(loss, find_unused_parameters=True, forward_sync_buffers=False)


@dataclass(frozen=True)
class _Mean:
    """One step over the whole batch: the mean loss, its parts, whether any process was asked to stop, and the norm of
    the gradients, the same in every process."""

    loss: float
    parts: dict[str, float]
    stop: bool
    norm: Pending
    where: str

    def check(self) -> None:
        """TrainingError where the norm is not finite. Waits for a GPU that has not finished the step's backward."""
        for norm in self.norm.numbers().values():
            if not math.isfinite(norm):
                raise TrainingError(f"the norm of the gradients is {norm}", where=self.where, do=LOWER)


def _backward(
    loop: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Source,
    rows: np.ndarray,
    count: int,
    seeds: tuple[int, int],
) -> list[tuple[float, Pending]]:
    """The gradients of one batch in ``count`` shares, and the losses of this process's with their shares of the rows.
    Nothing waits for a GPU.

    A share with ``n`` of the ``N`` rows weighs its mean loss by ``n / N``; the average over processes that follows
    divides by their number. A process without rows computes a row of another's with weight 0, to stay in step.
    """
    optimizer.zero_grad(set_to_none=True)
    losses, shares = [], processes.shares(len(rows), count)
    for number, share in shares.items():
        own = share.stop - share.start
        if not own and processes.size() == 1:
            continue
        seed_generators(*seeds, number)
        batch = data.batch(rows, part=share if own else slice(0, 1)) if own < len(rows) else data.batch(rows)
        more = number != max(shares)
        with loop.no_sync() if more and isinstance(loop, DistributedDataParallel) else nullcontext():
            loss, terms = loop(batch)
            losses.append((own / len(rows), Pending({"loss": loss, **terms})))
            (loss * (own * processes.size() / len(rows))).backward()  # queued before the loss is looked at
    return losses


def _step(
    optimizer: torch.optim.Optimizer, losses: list[tuple[float, Pending]], clip: float, stop: Stop, where: str
) -> _Mean:
    """One optimizer step by the gradients that are there; no parameter is changed in any process where the loss is not
    finite in one, nor where the norm of the gradients is not. Waits for a GPU once, for the loss: the norm is looked at
    a step later there (:meth:`_Mean.check`), and until then the optimizer itself leaves the step out."""
    mine: dict[str, float] = {}
    for share, pending in losses:
        for name, value in pending.numbers().items():
            mine[name] = mine.get(name, 0.0) + share * value
    asked, *sums = processes.total([float(stop.asked), *mine.values()])
    if not math.isfinite(sums[0]):
        raise TrainingError(f"the loss is {sums[0]}", where=where, do=LOWER)
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    if clip > 0:
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    mean = _Mean(sums[0], dict(zip([*mine][1:], sums[1:])), asked > 0, Pending({"norm": norm}), where)
    if norm.is_cuda:
        leave_out_unless_finite(optimizer, norm)
    else:
        mean.check()
    optimizer.step()
    return mean


def leave_out_unless_finite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
    """Make the next step of a fused optimizer change nothing where ``norm`` is not finite, without a look at it: what
    torch's GradScaler does."""
    setattr(optimizer, "found_inf", (~torch.isfinite(norm)).float())  # noqa: B010 (torch declares no such field)


def _start(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    *,
    resume: bool,
) -> dict[str, Any]:
    """Counters of the run in the folder with its state restored, or fresh ones."""
    run = checkpoint.read_run(folder) if resume else None
    if run is None:
        return {"step": 0, "seconds": 0.0, "done": False, "recent": [], "recipe": vars(recipe)}
    if changed := differences(run["recipe"], vars(recipe)):
        do = "give the same settings, another output folder, or start anew with resume=False"
        raise TrainingError(f"a run with another {', '.join(changed)} is in the folder", where=str(folder), do=do)
    checkpoint.restore(folder, run, model, optimizer)
    return run


def _rows(
    data: Source, batch_size: int, seed: int, per_epoch: int, first: int, total: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(step, rows of its batch) from step ``first`` on; the same whether or not the run was resumed."""
    for epoch in range(first // per_epoch, math.ceil(total / per_epoch)):
        order = data.order(batch_size=batch_size, seed=seed, epoch=epoch)
        for step in range(max(first, epoch * per_epoch), min(total, (epoch + 1) * per_epoch)):
            yield step, order[step - epoch * per_epoch]
