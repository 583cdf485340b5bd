"""Quantized tensors of a training forward are not kept for backward but made again from what they were rounded from.

Autograd keeps the operands of every product. In a QAT model these are rounded copies of tensors that the quantizers'
own backward keeps already, as large as all weights and most activations. Rounding again costs one pass over the data.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Make = Callable[[], Tensor]


@dataclass
class _Made:
    """A quantized tensor, alive or not, and how to make it again."""

    make: Make
    tensor: weakref.ref[Tensor]
    again: weakref.ref[Tensor] | None = None

    def get(self) -> Tensor:
        tensor = None if self.again is None else self.again()
        if tensor is None:
            with torch.no_grad():
                tensor = self.make()
            self.again = weakref.ref(tensor)
        return tensor


@dataclass(frozen=True)
class _View:
    """What autograd keeps in place of a tensor: a view of one that can be made again."""

    made: _Made
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def get(self) -> Tensor:
        return self.made.get().as_strided(self.size, self.stride, self.offset)


@dataclass
class _Notes:
    """The quantized tensors of one forward by the address of their storage."""

    made: dict[int, _Made] = field(default_factory=dict)

    def pack(self, tensor: Tensor) -> Tensor | _View:
        made = self.made.get(tensor.untyped_storage().data_ptr()) if type(tensor) is Tensor else None
        whole = None if made is None else made.tensor()
        if made is None or whole is None or whole.dtype != tensor.dtype:  # the address may be another tensor's by now
            return tensor
        return _View(made, tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: Tensor | _View) -> Tensor:
    return kept.get() if isinstance(kept, _View) else kept


_notes: ContextVar[_Notes | None] = ContextVar("quantized tensors of this forward", default=None)


def note(tensor: Tensor, make: Make) -> None:
    """``make()`` gives the values of ``tensor`` again, in the same layout, until the next optimizer step."""
    notes = _notes.get()
    if notes is not None and tensor.grad_fn is not None:
        notes.made[tensor.untyped_storage().data_ptr()] = _Made(make, weakref.ref(tensor))


@contextmanager
def recomputing() -> Iterator[None]:
    """Around a training forward. Nothing changes where no gradient is wanted."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield
        return
    notes = _Notes()
    before = _notes.set(notes)
    hooks: Any = torch.autograd.graph.saved_tensors_hooks(notes.pack, _unpack)
    try:
        with hooks:
            yield
    finally:
        _notes.reset(before)
