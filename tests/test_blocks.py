"""Blocks by data flow alone: the same values as by module path, in every family, with no path to read."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tiny
from torch import nn

from kdlsq_fx.blocks import inside_of, is_same_inside, states_between_blocks, token_flow
from kdlsq_fx.capture import capture
from kdlsq_fx.graph import site_of
from kdlsq_fx.taps import _is_attention, find_taps
from kdlsq_fx.views import view_of

torch.set_num_threads(1)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_without_its_module_paths(family: str) -> None:
    gm = capture(tiny(family, "Model", **({"n_layers": 3} if family == "distilbert" else {"num_hidden_layers": 3}))).gm
    named = find_taps(gm)
    softmaxes = [n for n in gm.graph.nodes if _is_attention(n, ())]
    found = states_between_blocks(gm, softmaxes)
    assert [site_of(n) for n in found] == [site_of(n) for n in named.hidden]
    for node in gm.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    assert find_taps(gm) == named


class Unrolled(nn.Module):
    """Three encoder layers under names of their own: no list, no numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        for name in ("low", "middle", "high"):
            setattr(self, name, nn.ModuleDict({k: nn.Linear(16, 16) for k in ("q", "k", "v", "out", "up", "down")}))
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        for name in ("low", "middle", "high"):
            layer = getattr(self, name)
            q, k, v = (layer[n](x).unflatten(-1, (2, 8)).transpose(1, 2) for n in ("q", "k", "v"))
            mixed = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
            x = x + layer["out"](mixed.transpose(1, 2).flatten(2))
            x = x + layer["down"](torch.nn.functional.gelu(layer["up"](x)))
        return self.head(x[:, 0])  # type: ignore[no-any-return]


def test_layers_that_stand_in_no_list() -> None:
    gm = capture(Unrolled(), {"input_ids": torch.randint(0, 50, (3, 7))}).gm
    found = find_taps(gm)
    assert [site_of(n) for n in found.hidden][0] == "table/embedding" and len(found.hidden) == 4
    assert len(found.attention) == 3 and all(n.meta["val"].shape[-1] == 16 for n in found.hidden)
    view = view_of(gm)
    flow = token_flow(gm, view)
    blocks = [inside_of(view, flow, a, b) for a, b in zip(found.hidden, found.hidden[1:])]
    assert is_same_inside(blocks[0], blocks[1]) and is_same_inside(blocks[1], blocks[2])
    half = inside_of(view, flow, found.hidden[0], found.hidden[2])
    assert not is_same_inside(blocks[0], half)
