"""Tied weights in a state dict: each once, under its first name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def _ties(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(a name, an earlier name of the same parameter or buffer): the decoder of a masked-LM head is its embedding."""
    first: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if first.setdefault(id(tensor), name) != name:
            yield name, first[id(tensor)]


def leave_out_ties(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """safetensors, and so the Trainer, refuse a state in which two names share memory."""
    for name, _source in _ties(model):
        state.pop(prefix + name, None)


def fill_in_ties(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Every name again, for a state that holds each tensor once."""
    for name, source in _ties(model):
        if prefix + source in state:
            state.setdefault(prefix + name, state[prefix + source])
