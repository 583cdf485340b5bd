"""Trained maps from the student's width to the teacher's, for taps between networks of other widths."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

SEED = 20


def make_projections(widths: Mapping[str, tuple[int, int]]) -> nn.ModuleDict:
    """Name -> Linear(student width, teacher width) with bias (TinyBERT's fit_dense).

    They start orthogonal, with bias 0, so that a projected state is as long as the state; from a generator of their
    own, so that every process and every call begins with the same numbers and no other random draw is moved.
    """
    made = nn.ModuleDict()
    for name, (student, teacher) in widths.items():
        linear = nn.Linear(student, teacher, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            nn.init.orthogonal_(linear.weight, generator=torch.Generator().manual_seed(SEED))
            linear.bias.zero_()
        made[name] = linear
    return made
