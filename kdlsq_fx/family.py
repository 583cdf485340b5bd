"""A family: one trained graph whose weights can be read at several widths, and whose blocks can be left out.

A *switch* is a weight or table with one trained quantizer for each width; the one that stands in the graph is the
width that is read. A *member* says the width of every switch and the blocks that are left out. Between two calls the
graph stands at the largest member, so that what is saved is always the same. papers.md 6 has NAS-BERT, whose
idea this is; here the paths are widths and depth.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from .depth import block_parameters, renumbered, without
from .distillation import Distiller, distill
from .errors import ConfigError
from .graph import fetch, site_of
from .kd_targets import Remembered
from .lsq import Lsq, make_quantizer
from .model import QuantModel
from .qconfig import QConfig, resolve
from .switches import Switch, find_switches

WIDTHS = (2, 3, 4, 6, 8)
DRAWS = ("one", "sandwich")


@dataclass(frozen=True)
class Member:
    """Which of the family: ``bits``, one for each switch, and ``left_out``, the family's blocks counted from 0."""

    bits: tuple[int, ...]
    left_out: tuple[int, ...] = ()


def at_width(qconfig: Any, bits: int) -> QConfig:
    """The qconfig with every weight and table at this width; activations stay as they are."""
    config = resolve(qconfig)
    rules = (r if r.weight is None else replace(r, weight=replace(r.weight, bits=bits)) for r in config.rules)
    return replace(config, rules=tuple(rules), name=f"{config.name} W{bits}" if config.name else "")


class Family(nn.Module):
    """A qat model with switches and the distillation loss around it: what :func:`kdlsq_fx.train.fit` trains.

    Made by :func:`make_family`. ``family(**batch)`` in training draws members, runs each, and returns the mean of
    their losses; in eval mode it is the largest member. ``at(member)`` sets a member for a while.

    ``draws``   "one": a random member a step; "sandwich": the largest, the smallest and a random one (Yu et al. 2019,
                universally slimmable networks), which costs three times as much.
    ``drawn``   steps so far, in the state dict: a resumed run draws what it would have drawn, on any number of
                processes.
    """

    accepts_loss_kwargs = False
    moves_inputs = True
    drawn: torch.Tensor

    def __init__(self, kd: Distiller, *, bits: Sequence[int], leave_out: int, draws: str, seed: int) -> None:
        super().__init__()
        self.kd, self.bits, self.draws, self.seed = kd, tuple(sorted(bits)), draws, seed
        self.remembered = Remembered(kd.targets)
        self.own = block_parameters(self.student.gm)
        self.removable = [block for block, own in enumerate(self.own) if own is not None]
        self.most_left_out = leave_out
        most = min(len(self.removable), max(self.blocks - 1, 0))
        if not 0 <= leave_out <= most:
            what = f"{leave_out} of {self.blocks} blocks cannot be left out"
            raise ConfigError(what, where="leave_out", do=f"leave out 0 to {most}")
        self.switches = find_switches(self.student, self.own)
        self.widths = nn.ModuleList(self._widths_of(s) for s in self.switches)
        self.register_buffer("drawn", torch.zeros((), dtype=torch.int64))
        self._depths: dict[tuple[int, ...], Distiller] = {}  # by the blocks left out; in a dict: no submodules
        self._set(self.largest)

    @property
    def student(self) -> QuantModel:
        """The qat model; between calls at the largest member."""
        return self.kd.student

    @property
    def blocks(self) -> int:
        """How many blocks the student has."""
        return len(self.own)

    @property
    def owner(self) -> tuple[int, ...]:
        """The block that each switch goes with, -1: none."""
        return tuple(-1 if s.block is None else s.block for s in self.switches)

    @property
    def largest(self) -> Member:
        return Member((self.bits[-1],) * len(self.switches))

    def uniform(self, bits: int) -> Member:
        """Every switch at one width, no block left out."""
        return Member((bits,) * len(self.switches))

    def quantizer(self, switch: int, bits: int) -> Lsq:
        """The quantizer of a switch at a width."""
        found: Lsq = self.widths[switch][str(bits)]  # type: ignore[index]
        return found

    def weight(self, switch: int) -> torch.Tensor:
        """The float weight behind a switch."""
        weight: torch.Tensor = fetch(self.student.gm, self.switches[switch].name)
        return weight.detach()

    def _widths_of(self, switch: Switch) -> nn.ModuleDict:
        """A quantizer for each width; that of the largest is the one in the graph."""
        gm = self.student.gm
        own, weight = fetch(gm, switch.quantizer), fetch(gm, switch.name)
        channels = own.raw.numel() if own.raw.ndim else None
        made = nn.ModuleDict()
        for bits in self.bits:
            spec = replace(own.spec, bits=bits)
            new = own
            if spec != own.spec:
                new = make_quantizer(spec, channels=channels, numel=weight.numel(), role="weight", site=own.site)
                new.to(weight.device).init_from(weight.detach())
            made[str(bits)] = new
        return made

    # members

    @contextmanager
    def at(self, member: Member) -> Iterator[Distiller]:
        """The student with its loss as this member, until the block ends. Its targets are remembered per batch."""
        made = self._at_depth(member.left_out)
        self._set(member)
        try:
            yield made
        finally:
            self._set(self.largest)

    def _set(self, member: Member) -> None:
        if len(member.bits) != len(self.switches) or not set(member.bits) <= set(self.bits):
            what = f"{len(member.bits)} widths {sorted(set(member.bits))} for {len(self.switches)} switches"
            raise ConfigError(what, where="member", do=f"give one of {self.bits} for each switch")
        for i, (switch, bits) in enumerate(zip(self.switches, member.bits)):
            place(self.student.gm, switch.quantizer, self.quantizer(i, bits))

    def _at_depth(self, blocks: tuple[int, ...]) -> Distiller:
        """The student without some blocks, over the very same modules, with the taps that are left."""
        if blocks not in self._depths:
            self._depths[blocks] = shallower(self.kd, self.remembered, blocks)
        made = self._depths[blocks]
        made.training, made.progress = self.training, self.kd.progress
        return made

    def draw(self) -> list[Member]:
        """The members of this step: a function of the seed and of :attr:`drawn`."""
        rng = np.random.default_rng([self.seed, int(self.drawn)])
        some = self._random(rng)
        if self.draws == "one":
            return [some]
        return [self.largest, Member(self.uniform(self.bits[0]).bits, some.left_out), some]

    def _random(self, rng: np.random.Generator) -> Member:
        """Widths between a low and a high one, each switch for itself; every second time also some blocks left out.

        The high one is any width, the low one any up to it: one time in five (of five widths) all switches are at the
        smallest, which has the most to learn, and the largest by itself is rare.
        """
        high = int(rng.integers(len(self.bits)))
        low = int(rng.integers(high + 1))
        bits = tuple(self.bits[i] for i in rng.integers(low, high + 1, len(self.switches)))
        count = int(rng.integers(1, self.most_left_out + 1)) if self.most_left_out and rng.random() < 0.5 else 0
        gone = rng.choice(self.removable, count, replace=False).tolist() if count else []
        return Member(bits, tuple(sorted(gone)))

    # training

    @property
    def progress(self) -> float | None:
        return self.kd.progress

    @progress.setter
    def progress(self, done: float) -> None:
        self.kd.progress = done

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A :class:`DistillOutput`; in training the loss is the mean over the members of the step."""
        if not self.training:
            return self.kd(*args, **kwargs)
        members = self.draw()
        self.drawn += 1
        outputs = []
        for member in members:
            with self.at(member) as kd:
                outputs.append(kd(*args, **kwargs))
        last = outputs[-1]
        last["loss"] = sum((o.loss for o in outputs), start=torch.zeros_like(last.loss)) / len(outputs)
        return last

    def left_out(self, member: Member) -> tuple[int, ...]:
        """Blocks of the float model that a member lacks, those among them that the family's own rules leave out."""
        base = self.student.qconfig.left_out
        return tuple(sorted({*base, *renumbered(member.left_out, base)}))

    def qconfig(self, member: Member) -> QConfig:
        """The rules of a member: what ``prepare_qat`` makes its graph from."""
        base = self.student.qconfig
        there = {site_of(n) for n in self._at_depth(member.left_out).student.gm.graph.nodes}
        rules = []
        for switch, bits in zip(self.switches, member.bits):
            for site, op, rule in switch.readers:
                if site in there:
                    assert rule.weight is not None
                    weight = replace(rule.weight, bits=bits)
                    why = f"{bits} bits in this member"
                    rules.append(replace(rule, site=site, op=op, weight=weight, why=why, optional=False))
        others = (replace(rule, optional=True) for rule in base.rules)  # what they are for may be gone or decided
        return replace(base, rules=(*rules, *others), left_out=self.left_out(member), name="family member")

    def member(self, member: Member, model: nn.Module) -> QuantModel:
        """A member as a qat model of its own: ``prepare_qat(model, rules)`` with the family's weights and scales.

        ``model``: what the family was made from; it gives the architecture. The result equals the family set to the
        member, bit for bit, and is an ordinary qat model: ``convert``, ``export_onnx`` and ``save_pretrained`` take it.
        """
        from .api import prepare_qat

        made = prepare_qat(model, self.qconfig(member), example=self.student.example if not _hf(model) else None)
        with self.at(member):
            own = self.student.gm.state_dict()
        made.gm.load_state_dict({name: own[name].cpu() for name in made.gm.state_dict()})
        return made.eval()


def _hf(model: nn.Module) -> bool:
    return getattr(model, "config", None) is not None


def make_family(
    model: nn.Module,
    teacher: nn.Module,
    qconfig: Any = "W8E8A8",
    *,
    batches: Any,
    bits: Sequence[int] = WIDTHS,
    leave_out: int = 0,
    draws: str = "one",
    seed: int = 42,
    device: str = "cpu",
    **distil: Any,
) -> Family:
    """A family that starts from ``model`` and learns from ``teacher``; nothing is trained yet.

    Args:
        model, teacher: float models; both are copied.
        qconfig: rules or a preset for everything but the weights' widths: activations, quantizer, placement.
        batches: calibrate the activations (:func:`kdlsq_fx.calibrate`).
        bits: the widths of a switch. ``leave_out``: at most so many blocks are left out of a member.
        draws, seed: see :class:`Family`. ``distil``: keywords of :func:`kdlsq_fx.distill`.
    Raises ConfigError for widths that are none, a draw of another name, or more blocks than there are.
    """
    from .api import prepare_qat
    from .calibration import calibrate

    if len(set(bits)) < 2 or any(type(b) is not int or not 2 <= b <= 8 for b in bits):
        raise ConfigError(f"bits={tuple(bits)!r}", where="bits", do="give two or more different widths from 2 to 8")
    if draws not in DRAWS:
        raise ConfigError(f"draws={draws!r} is unknown", do=f"use one of {', '.join(DRAWS)}")
    qat = prepare_qat(model, at_width(qconfig, max(bits))).to(device)
    calibrate(qat, batches)
    for module in qat.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the teacher has none, and its values are the target
    return Family(distill(qat, teacher, **distil), bits=bits, leave_out=leave_out, draws=draws, seed=seed)


def shallower(kd: Distiller, targets: Remembered, blocks: tuple[int, ...]) -> Distiller:
    """The Distiller of a student without some blocks: same modules, same teacher, the taps of the blocks that stay."""
    student = copy.copy(kd.student)
    student.__dict__["_modules"] = dict(kd.student._modules)
    student.gm = without(kd.student.gm, blocks) if blocks else kd.student.gm
    there = {site_of(n) for n in student.gm.graph.nodes}
    kept = [i for i, tap in enumerate(kd.taps) if tap.student in there]
    plan = replace(kd.plan, taps=tuple(kd.taps[i] for i in kept))
    made = type(kd)(student, targets.only(kept), plan, kd.weights, kd.loss)
    made.projections = kd.projections
    return made


def place(gm: fx.GraphModule, target: str, module: nn.Module) -> None:
    """Let ``module`` stand under a dotted name, among its neighbours as before."""
    owner, _, last = target.rpartition(".")
    gm.get_submodule(owner)._modules[last] = module
