"""The state of a running training loop on disk: enough to go on to the same weights, bit for bit.

A run folder holds ``run.json`` (counters, recipe, the name of the state file) and ``state-<step>.safetensors`` (model
and optimizer). The state is written first, then ``run.json`` is replaced in one step, so that a run killed at any
moment leaves a whole checkpoint behind: the old one or the new one. Nothing in it depends on the number of processes:
the model and the optimizer are the same in each, and random numbers are drawn anew from the seed at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kdlsq_fx.errors import CheckpointError, TrainingError
from kdlsq_fx.files import FORMAT, RUN, make_folder, not_finite, read_json, read_tensors, write_json, write_tensors


def read_run(folder: Path) -> dict[str, Any] | None:
    """The counters of the run in this folder, or None where none was started."""
    return read_json(folder / RUN) if (folder / RUN).exists() else None


def save(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, run: dict[str, Any]) -> None:
    """Write a whole checkpoint, then drop the one before. ``run`` holds JSON values, among them ``step`` and ``done``;
    a run that is done needs no optimizer state any more. CheckpointError where it cannot be written, TrainingError
    where a weight is not finite; the checkpoint before is then still whole."""
    make_folder(folder)
    name = f"state-{run['step']}.safetensors"
    tensors = {key: value.detach().cpu() for key, value in _state(model, optimizer, run["done"])}
    bad = not_finite([f"model/{k}" for k, _ in model.named_parameters()], tensors)  # a buffer may: a mask, say
    if bad:
        do = "lower the learning rate; what was saved before is still there, run again to go on from it"
        raise TrainingError(f"{bad.removeprefix('model/')} is not finite", where=f"step {run['step']}, {folder}", do=do)
    write_tensors(folder / name, tensors)
    write_json(folder / RUN, {**run, "format": FORMAT, "state": name})
    for old in (*folder.glob("state-*.safetensors"), *folder.glob(".state-*")):  # the latter: killed while written
        if old.name != name:
            old.unlink(missing_ok=True)


def restore(folder: Path, run: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the run's state into the model and the optimizer, in place."""
    path = folder / str(run["state"])
    tensors = read_tensors(path)
    for key, here in _named(model):
        there = tensors.get(f"model/{key}")
        if there is None or there.shape != here.shape or there.dtype != here.dtype:
            do = "resume with the model and qconfig that the run was started with, or remove the folder"
            raise CheckpointError(f"the checkpoint does not fit the model at {key}", where=str(path), do=do)
    with torch.no_grad():
        for key, here in _named(model):
            here.copy_(tensors[f"model/{key}"])
    for i, parameter in enumerate(_parameters(optimizer)):
        prefix = f"optimizer/{i}/"
        got = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        # a fused optimizer reads its step counters on the parameters' device; others keep them on the CPU
        stays = set() if optimizer.defaults.get("fused") else {"step"}
        optimizer.state[parameter] = {k: v if k in stays else v.to(parameter.device) for k, v in got.items()}


def _named(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, each once (a tied weight has one name here)."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, done: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in _named(model):
        yield f"model/{key}", value
    if done:
        return
    for i, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                yield f"optimizer/{i}/{key}", value
