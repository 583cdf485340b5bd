"""One training and its members, step by step; each step leaves files behind and is skipped when they are there.

out/fp32/              the fine-tuned model, where one was not given
out/family/            the trained weights and the scales of every width
out/losses.json        one change at a time, on other rows held out; sensitivity.md, .json and .svg show it
out/largest/int/       the largest member, from which sizes are known
out/held_out.json      candidates, measured on rows held out of train
out/<budget>/          a member: qat/, int/ and rules.json, which prepare_qat takes
out/table.md, table.json, pareto.svg
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdlsq_fx import data as kd_data
from kdlsq_fx import job
from kdlsq_fx.errors import CheckpointError, ConfigError
from kdlsq_fx.evaluation import evaluate
from kdlsq_fx.family import WIDTHS, Family, Member, make_family
from kdlsq_fx.family_choices import Choices, member_key, member_of
from kdlsq_fx.family_costs import LATENCY, LENGTH, bit_operations, keep_latency, measure_latency, read_latency
from kdlsq_fx.family_search import Tables, best, check_budgets, near, proposals, refuse_below, steps_from
from kdlsq_fx.family_sizes import Sizes
from kdlsq_fx.family_tables import Losses, make_tables, output_distances
from kdlsq_fx.files import INFO, make_folder, read_json, read_tensors, write_json, write_tensors, write_text
from kdlsq_fx.train import fit
from kdlsq_fx.watching import progress

STATE = "model.safetensors"
EVAL_ROWS = 64
TERM = "output"  # what the search makes small: the distance of the outputs from the teacher's
UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a family is made and searched. ``steps`` 0: nothing is trained. ``calibration``: so many of the rows held out
    are those that tables are made on, the others choose; ``candidates``: members of a budget that the others are asked
    about; ``rounds``: how often tables are made again around the best member of a budget, to search on from there."""

    qconfig: Any = "W8E8A8"
    bits: tuple[int, ...] = WIDTHS
    leave_out: int = 0
    draws: str = "one"
    steps: int = 1000
    lr: float = 2e-4
    batch_size: int = 32
    seed: int = 42
    precision: str = "fp32"
    calibration: int = 128
    candidates: int = 6
    rounds: int = 2


def parse_size(text: str) -> int:
    """``6MiB``, ``8.5MB``, ``900KiB`` or bytes. ConfigError for anything else."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS or not float(found[1]) > 0:
        raise ConfigError(f"{text!r} is no size", where="--budget", do="write sizes as 6MiB, 8.5MB or bytes")
    return int(float(found[1]) * UNITS[found[2].upper()])


class Job:
    """The steps, for one data set. ``start``: the float model that the family starts from and learns from."""

    def __init__(
        self, start: torch.nn.Module, dataset: kd_data.Dataset, held_out: kd_data.Encoded, plan: Plan, out: Path
    ) -> None:
        self.start, self.dataset, self.plan = start.eval(), dataset, plan
        self.measured, self.choosing = split(held_out, plan)
        self.out = make_folder(out)
        self._wanted: torch.Tensor | None = None  # the teacher's outputs on the rows held out
        self.family = family_of(self.start, dataset, plan)

    # training

    def train(self) -> float:
        """Train, or load what was trained; the seconds it took."""
        folder = self.out / "family"
        if (folder / STATE).is_file():
            self.family.load_state_dict(read_tensors(folder / STATE))
            self.family.eval().cpu()
            return float(read_json(folder / "done.json")["seconds"])
        from kdlsq_fx.calibration import param_groups

        plan, seconds = self.plan, 0.0
        make_folder(folder)
        if plan.steps:
            done = fit(
                self.family, self.dataset.train, out_dir=folder / "run", steps=plan.steps, lr=plan.lr,
                batch_size=plan.batch_size, seed=plan.seed, precision=plan.precision, title="family",
                groups=param_groups(self.family, lr=plan.lr),
            )  # fmt: skip
            seconds = done.seconds
        self.family.eval().cpu()
        write_json(folder / "done.json", {"format": 1, "steps": plan.steps, "seconds": seconds})
        write_tensors(folder / STATE, self.family.state_dict())
        job.drop_state(folder / "run")
        return seconds

    # tables

    def batches(self, rows: kd_data.Encoded) -> list[dict[str, torch.Tensor]]:
        return [rows.batch(r, labels=False) for r in rows.sorted_batches(EVAL_ROWS)]

    def losses(self) -> Losses:
        """What was measured so far, one change at a time; use it as a context, so that nothing is lost."""
        return Losses(self.family, self.batches(self.measured), self.out / "losses.json", self.measured.fingerprint)

    def tables(self, *, with_latency: bool = False) -> Tables:
        """Every table, measured or loaded."""
        from kdlsq_fx.api import convert

        folder = self.out / "largest" / "int"
        if not (folder / INFO).is_file():
            self.family.eval()
            convert(self.family.student).save_pretrained(folder)
        if with_latency and not (self.out / LATENCY).is_file():
            keep_latency(self.out, measure_latency(self.family, self.start))
        ms = read_latency(self.out) if with_latency else None
        with self.losses() as losses:
            return make_tables(losses, term=TERM, folder=folder, ms=ms)

    # members

    def choose(self, tables: Tables, budgets: Mapping[str, float]) -> tuple[Member, float]:
        """The member whose outputs are nearest to the teacher's on the rows that choose, and how near; one without some
        block only where it is nearer than all with more blocks by more than the standard error of the difference. Asked
        are the :func:`proposals` of the tables, and what earlier searches measured and keeps the budgets; then,
        ``rounds`` times, the best by tables made around the nearest so far. ConfigError where no member keeps all the
        budgets."""
        known = Choices(self.out / "held_out.json", self.choosing.fingerprint, self.distances)
        asked = json.dumps(dict(sorted(budgets.items())))
        if asked not in known.chosen:
            before = [m for m in known.before() if tables.keeps(m, budgets)]
            first = [*proposals(tables, budgets, self.plan.candidates), *before]
            if not first:
                told = ", ".join(f"{most:g} {cost}" for cost, most in budgets.items())
                raise ConfigError("no member keeps all of it", where=told, do="allow more of one of them")
            winner = known.nearest(first)
            for _ in range(self.plan.rounds):
                around, last = self._around(tables, winner), winner
                moves = len(self.family.switches)
                tried = [best(around, {**budgets, "moves": moves // part})[0] for part in (1, 4, 16)]
                winner = known.nearest([last, *tried])
                if winner == last:
                    break
            known.choose(asked, winner)
        winner = member_of(known.chosen[asked])
        return winner, float(np.mean(known.members[known.chosen[asked]]))

    def _around(self, tables: Tables, member: Member) -> Tables:
        """Tables of single steps from a member, on the rows that all tables are made on."""
        steps = steps_from(tables, member)
        with self.losses() as losses, progress("one step at a time", len(steps), 0) as bar:
            here = losses.of(member_key(member), member)[TERM]
            found = {}
            for step, other in steps:
                found[step] = losses.of(member_key(other), other)[TERM] - here
                bar.update(1)
        return near(tables, member, found)

    def distances(self, member: Member) -> NDArray[np.float64]:
        """:func:`output_distances` of a member on the rows that choose."""
        if self._wanted is None:
            self._wanted = torch.from_numpy(evaluate(self.start, self.choosing, title="teacher"))
        with self.family.at(member) as kd:
            logits = evaluate(kd.student, self.choosing, title="candidate")
        return output_distances(torch.from_numpy(logits), self._wanted).numpy()

    def write(self, member: Member, name: str, tokenizer: Any) -> tuple[Path, Any]:
        """``out/name`` with ``qat/``, ``int/`` and ``rules.json``, and the qat model; loaded where it is there."""
        from kdlsq_fx.api import convert, from_pretrained

        folder = make_folder(self.out / name)
        rules, text = folder / "rules.json", self.family.qconfig(member).to_json() + "\n"
        whole = all((folder / part / INFO).is_file() for part in ("qat", "int"))
        if whole and rules.is_file() and rules.read_text(encoding="utf-8") == text:
            return folder, from_pretrained(folder / "qat")
        rules.unlink(missing_ok=True)  # written last
        qat = self.family.member(member, self.start)
        qat.save_pretrained(folder / "qat", tokenizer)
        convert(qat).save_pretrained(folder / "int")
        tokenizer.save_pretrained(folder / "int")
        write_text(rules, text)
        return folder, qat


def family_of(start: torch.nn.Module, dataset: kd_data.Dataset, plan: Plan) -> Family:
    """A family that is not trained yet."""
    batches = dataset.train.sample(job.CALIBRATION_BATCHES, batch_size=plan.batch_size, seed=plan.seed)
    return make_family(
        start, start, plan.qconfig, batches=batches, bits=plan.bits, leave_out=plan.leave_out, draws=plan.draws,
        seed=plan.seed, device=dataset.device,
    )  # fmt: skip


def split(held_out: kd_data.Encoded, plan: Plan) -> tuple[kd_data.Encoded, kd_data.Encoded]:
    """The rows held out that tables are made on, and those that choose."""
    if not 0 < plan.calibration < len(held_out):
        what = f"{plan.calibration} of {len(held_out)} rows held out are to make tables, the others to choose"
        raise ConfigError(what, where="--calibration", do=f"ask for 1 to {len(held_out) - 1}, or --held-out more")
    rows = np.random.default_rng(plan.seed).permutation(len(held_out))
    return held_out.pick(rows[: plan.calibration]), held_out.pick(rows[plan.calibration :])


def check(
    model: torch.nn.Module, dataset: kd_data.Dataset, held_out: kd_data.Encoded, plan: Plan,
    budgets: Mapping[str, float], out: Path,
) -> tuple[float, NDArray[np.float64]] | None:  # fmt: skip
    """Before anything is trained or written: ConfigError for a plan that makes no family of this model, and for budgets
    (cost -> at most) that no member can keep. Training changes little about costs. ``model``: the float model as it is.
    What it measured of time (:func:`keep_latency`) is returned, so that it is not measured again with another result;
    where that stands in ``out`` already it is read.
    """
    from kdlsq_fx.api import convert

    split(held_out, plan)
    family = family_of(model.eval(), replace(dataset, device="cpu"), plan).eval()
    if "bytes" in budgets:
        with tempfile.TemporaryDirectory() as folder:
            convert(family.student).save_pretrained(folder)
            refuse_below(budgets["bytes"], Sizes(family, Path(folder)).smallest())
    ms = None
    if "ms" in budgets:
        whole, blocks = ms = read_latency(out) if (out / LATENCY).is_file() else measure_latency(family, model)
        refuse_below(budgets["ms"], whole - float(np.sort(blocks)[::-1][: plan.leave_out].sum()), "ms")
    if "bitops" in budgets:
        work, rest, blocks = bit_operations(family, LENGTH)
        narrow, owner = work.min(axis=1), np.asarray(family.owner)
        less = [float(narrow[owner == b].sum() + blocks[b]) for b in range(family.blocks)]
        refuse_below(budgets["bitops"], narrow.sum() + rest - sum(sorted(less)[::-1][: plan.leave_out]), "bitops")
    return ms


@dataclass(frozen=True)
class MemberRow:
    """One member in the table. Bytes of ``constants.safetensors``; ``held_out``: distance to the teacher's outputs
    on rows held out of train; ``widths``: share of the weights' elements at each width."""

    name: str
    budget: float
    expected: float
    size: int
    bitops: float
    ms: float | None
    widths: dict[int, float]
    left_out: tuple[int, ...]
    held_out: float
    scores: dict[str, float]


def widths_of(family: Family, member: Member) -> dict[int, float]:
    """Share of the elements of all weights that are there, by width."""
    sizes = np.array([family.weight(i).numel() for i in range(len(family.switches))], float)
    there = np.array([s.block is None or s.block not in member.left_out for s in family.switches])
    bits = np.asarray(member.bits)
    return {b: float(sizes[there & (bits == b)].sum() / sizes[there].sum()) for b in family.bits}


def run(
    task: Job, budgets: Mapping[str, float], tokenizer: Any, *, limits: Mapping[str, float] | None = None,
    say: Any = print,
) -> list[MemberRow]:  # fmt: skip
    """Everything behind the training: tables, search, members, their scores on dev. ``budgets``: name -> bytes;
    ``limits``: what every member has to keep besides, ``"ms"`` and ``"bitops"``."""
    began = time.monotonic()
    limits = limits or {}
    tables = task.tables(with_latency="ms" in limits)
    for size in sorted(budgets.values()):
        check_budgets(tables, {"bytes": size, **limits})
    say(f"tables after {time.monotonic() - began:.0f} s")
    rows = []
    for name, size in sorted(budgets.items(), key=lambda item: item[1]):
        member, seen = task.choose(tables, {"bytes": size, **limits})
        folder, qat = task.write(member, name, tokenizer)
        found, told = job.weight_bytes(folder / "int"), tables.cost("bytes", member)
        if found != told:
            what = f"the file has {found} bytes, {told:.0f} were foretold"
            raise CheckpointError(what, where=str(folder / "int"), do="report this")
        scored = job.measure(name, name, qat, replace(task.dataset, device="cpu"))
        ms = tables.cost("ms", member) if "ms" in tables.costs else None
        rows.append(
            MemberRow(
                name, size, told, found,
                tables.cost("bitops", member), ms, widths_of(task.family, member), task.family.left_out(member),
                seen, scored.scores,
            )
        )  # fmt: skip
        say(f"{name}: {rows[-1].size / 2**20:.2f} MiB, dev {scored.scores['headline']:.2f}")
    return rows
