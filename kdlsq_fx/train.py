"""One plain training loop for fine-tuning, QAT and distillation; it can be stopped and resumed at any moment.

``fit`` runs whatever module returns an output with a ``.loss``: a Hugging Face model, a qat module, or a distillation
wrapper. AdamW, linear decay to zero after an optional warm-up: the recipe of the KDLSQ release (its run script).
"""

from __future__ import annotations

import math
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from kdlsq_fx import checkpoint
from kdlsq_fx.devices import Pending, moved
from kdlsq_fx.errors import ConfigError, TrainingError
from kdlsq_fx.files import make_folder, write_atomic

NO_DECAY = ("bias", "LayerNorm.weight", "layer_norm.weight", "layernorm.weight")


class Source(Protocol):
    """What ``fit`` needs of a data set; :class:`kdlsq_fx.data.Encoded` is one."""

    def order(self, *, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]: ...
    def batch(self, rows: np.ndarray) -> dict[str, torch.Tensor]: ...
    @property
    def fingerprint(self) -> str: ...


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM after its state was saved; the text says where and how to go on."""


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
    (autocast; parameters and optimizer state stay float32); evaluation is float32 in any case. A checkpoint is written
    every ``save_every`` steps and every ``save_seconds`` seconds, and at the end. With ``resume`` a run found in
    ``out_dir`` goes on where it was saved; a finished one is only loaded. Sets the global random seed. ``log.tsv``
    holds one line a step.

    Raises :class:`TrainingError` for a loss that is not finite or a run that had another recipe,
    :class:`Interrupted` after Ctrl-C or SIGTERM.
    """
    folder = Path(out_dir)
    per_epoch = len(data.order(batch_size=batch_size, seed=seed, epoch=0))
    total = steps if steps is not None else math.ceil(epochs * per_epoch)
    if total < 1 or batch_size < 1:
        raise ConfigError(f"{total} steps of {batch_size} rows", do="train for at least one step of one row")
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
    state = _start(folder, model, optimizer, recipe, resume=resume, seed=seed)
    log = Log(folder / "log.tsv", state["step"])
    first, began, saved = state["step"], time.monotonic() - state["seconds"], time.monotonic()
    model.train()
    with Stop() as stop, log, _bar(title, total, first) as bar:
        for step, rows in _rows(data, batch_size, seed, per_epoch, first, total):
            factor = schedule(step, total, warmup)
            for group, rate in zip(optimizer.param_groups, base):
                group["lr"] = rate * factor
            _tell(model, step / total)
            loss, parts = _step(model, optimizer, data.batch(rows), clip, precision, step, folder)
            state |= {"step": step + 1, "seconds": time.monotonic() - began, "done": step + 1 == total}
            state["recent"] = (state["recent"] + [loss])[-50:]
            log.write(step + 1, loss, lr * factor, state["seconds"], parts)
            bar.update(1)
            bar.set_postfix_str(f"loss {np.mean(state['recent']):.4f}", refresh=False)
            due = save_every and (step + 1) % save_every == 0
            if due or stop.asked or state["done"] or time.monotonic() - saved > save_seconds:
                log.flush()
                checkpoint.save(folder, model, optimizer, state)
                saved = time.monotonic()
            if stop.asked and not state["done"]:
                raise Interrupted(f"stopped at step {step + 1} of {total}; saved in {folder}, run again to go on")
            if on_step is not None:
                on_step(step + 1, model)
    model.eval()
    return Fit(total, state["seconds"], float(np.mean(state["recent"])), first)


def schedule(step: int, total: int, warmup: float = 0.0) -> float:
    """Factor of the learning rate at a step (from 0): up over the first ``warmup`` share, then down to 0."""
    rise = int(total * warmup)
    return (step + 1) / rise if step < rise else (total - step) / max(total - rise, 1)


def _tell(model: torch.nn.Module, done: float) -> None:
    """A loss with a schedule (a Distiller's) goes by the share of the run that is done."""
    inner = getattr(model, "module", model)  # DistributedDataParallel holds it there
    if hasattr(inner, "progress"):
        inner.progress = done


def _step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    clip: float,
    precision: str,
    step: int,
    folder: Path,
) -> tuple[float, dict[str, float]]:
    """One optimizer step; no parameter is changed where the loss is not finite. Waits for a GPU once, for the loss."""
    device = next(model.parameters()).device
    if not getattr(model, "moves_inputs", False):
        batch = {k: moved(v, device) for k, v in batch.items()}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        output = model(**batch)
    pending = Pending({"loss": output.loss, **(getattr(output, "parts", None) or {})})
    optimizer.zero_grad(set_to_none=True)
    output.loss.backward()  # queued before the loss is looked at
    parts = pending.numbers()
    loss = parts.pop("loss")
    if not math.isfinite(loss):
        do = f"lower the learning rate, or start again from the last checkpoint in {folder}"
        raise TrainingError(f"the loss is {loss} at step {step + 1}", do=do)
    if clip > 0:
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    return loss, parts


def _start(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    *,
    resume: bool,
    seed: int,
) -> dict[str, Any]:
    """Counters of the run in the folder with its state restored, or fresh ones."""
    run = checkpoint.read_run(folder) if resume else None
    if run is None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        return {"step": 0, "seconds": 0.0, "done": False, "recent": [], "recipe": vars(recipe)}
    changed = [k for k, v in vars(recipe).items() if run["recipe"].get(k) != v]
    if changed:
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


def _bar(title: str, total: int, first: int) -> Any:
    """A progress bar; silent where stderr is no terminal."""
    quiet = not sys.stderr.isatty()
    return tqdm(total=total, initial=first, desc=title, disable=quiet, unit="step", dynamic_ncols=True)


class Log:
    """``log.tsv``: step, loss, lr, seconds, and the parts of the loss as ``name=value``. Lines after the checkpoint
    that a run resumes from are dropped, so each step stands there once."""

    def __init__(self, path: Path, step: int) -> None:
        make_folder(path.parent)
        kept = path.read_text(encoding="utf-8").splitlines()[1 : step + 1] if step and path.exists() else []
        text = "\n".join(["step\tloss\tlr\tseconds\tparts", *kept]) + "\n"
        write_atomic(path, lambda name: _write(name, text))
        self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, loss: float, lr: float, seconds: float, parts: dict[str, float]) -> None:
        text = " ".join(f"{k}={v:.6g}" for k, v in parts.items())
        self.file.write(f"{step}\t{loss:.8g}\t{lr:.6g}\t{seconds:.2f}\t{text}\n")

    def flush(self) -> None:
        self.file.flush()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _write(name: str, text: str) -> None:
    Path(name).write_text(text, encoding="utf-8")


class Stop:
    """Turns the first Ctrl-C or SIGTERM into a wish that the loop grants between two steps; a second Ctrl-C stops at
    once. Outside the main thread Python allows no handlers, and nothing is changed."""

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
