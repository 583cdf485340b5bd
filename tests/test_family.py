"""A family: switches, members read out, blocks left out, sizes."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import batch, for_model, tiny
from tiny_glue import bert, tokenizer, write_sst

import kdlsq_fx as kq
from kdlsq_fx.data import load
from kdlsq_fx.depth import renumbered
from kdlsq_fx.errors import ConfigError
from kdlsq_fx.family import WIDTHS, Family, Member, make_family
from kdlsq_fx.family_costs import bit_operations, latency, run_in_turn
from kdlsq_fx.family_sizes import Sizes
from kdlsq_fx.family_tables import Losses, measure_losses
from kdlsq_fx.files import read_tensors, write_tensors
from kdlsq_fx.qconfig import resolve
from kdlsq_fx.train import plain_groups


@functools.cache
def ready(family: str = "bert", qconfig: str = "W8E8A8") -> tuple[Family, Any, dict[str, torch.Tensor]]:
    """One for several tests, which change nothing of it; in eval mode."""
    one, model, data = made(family, qconfig)
    return one.eval(), model, data


def made(family: str = "bert", qconfig: str = "W8E8A8", **options: Any) -> tuple[Family, Any, dict[str, torch.Tensor]]:
    model = tiny(family).eval()
    data = for_model(model, batch())
    return make_family(model, model, qconfig, batches=[data], **{"leave_out": 1, **options}), model, data


def mixed(family: Family, *left_out: int, seed: int = 0) -> Member:
    rng = np.random.default_rng(seed)
    return Member(tuple(int(b) for b in rng.choice(family.bits, len(family.switches))), left_out)


@pytest.mark.parametrize(
    ("name", "qconfig", "left_out"),
    [
        ("bert", "W8E8A8", ()),
        ("bert", "W8E8A8", (1,)),
        ("bert", "W8E8A8-int", (0,)),
        ("bert", "W8E8A8-lsq", (1,)),
        ("albert", "W8E8A8", (0,)),
        ("modernbert", "W8E8A8", (1,)),
    ],
)
def test_a_member_read_out_is_the_family_set_to_it(name: str, qconfig: str, left_out: tuple[int, ...]) -> None:
    family, model, data = ready(name, qconfig)
    member = mixed(family, *left_out)
    with family.at(member) as kd:
        want = kd.student(**data).logits
    alone = family.member(member, model)
    assert torch.equal(alone(**data).logits, want)
    assert not torch.equal(family.student(**data).logits, want)  # it stands at the largest again
    assert kq.QConfig.from_json(family.qconfig(member).to_json()) == alone.qconfig
    for switch, bits in zip(family.switches, member.bits):
        if switch.block is None or switch.block not in left_out:
            assert alone.gm.get_submodule(switch.quantizer).spec.bits == bits


def test_the_rules_of_a_member_fit_no_other_model() -> None:
    family, _, _ = ready("bert")
    with pytest.raises(ConfigError, match="matches nothing"):
        kq.prepare_qat(tiny("distilbert"), family.qconfig(mixed(family)))


def test_a_member_goes_through_all_stages_and_folders(tmp_path: Path) -> None:
    family, model, data = ready("bert", "W8E8A8-int")
    alone = family.member(mixed(family, 0), model)
    want = alone(**data).logits
    alone.save_pretrained(tmp_path / "qat")
    assert torch.equal(kq.from_pretrained(tmp_path / "qat")(**data).logits, want)
    torch.testing.assert_close(kq.convert(alone)(**data).logits, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("draws", ["one", "sandwich"])
def test_a_step_trains_what_it_drew_and_can_be_resumed(draws: str) -> None:
    family, _, data = made(draws=draws)
    begun = copy.deepcopy(family.state_dict())
    drawn = []
    for _ in range(2):
        family.load_state_dict(begun)
        family.train()
        seen = []
        for _ in range(4):
            seen.append(family.draw())
            family(**data)
        drawn.append(seen)
    assert drawn[0] == drawn[1] and len({str(m) for m in drawn[0]}) > 1
    members = family.draw()
    assert len(members) == (1 if draws == "one" else 3)
    family.zero_grad()
    family(**data).loss.backward()
    for i in range(len(family.switches)):
        used = {m.bits[i] for m in members if family.switches[i].block not in m.left_out}
        for bits in family.bits:
            grad = family.quantizer(i, bits).raw.grad
            assert (grad is not None) == (bits in used)


def test_training_brings_the_narrow_members_nearer_to_the_teacher() -> None:
    family, _, data = made()
    least = family.uniform(2)

    def loss() -> float:
        family.eval()
        with torch.no_grad(), family.at(least) as kd:
            parts = kd(**data).parts
        return float(parts["hidden"] + parts["attention"])  # 0 where the student is its teacher

    before = loss()
    optimizer = torch.optim.AdamW(kq.param_groups(family, lr=1e-3))
    named = {id(p) for g in plain_groups(family, lr=1.0) for p in g["params"]}
    assert named == {id(p) for g in optimizer.param_groups for p in g["params"]}
    family.train()
    for _ in range(40):
        optimizer.zero_grad()
        family(**data).loss.backward()
        optimizer.step()
    assert loss() < 0.8 * before


def test_the_state_of_a_family_is_all_of_it(tmp_path: Path) -> None:
    family, _, data = made()
    begun = copy.deepcopy(family.state_dict())

    def logits() -> torch.Tensor:
        with torch.no_grad(), family.eval().at(mixed(family, 1)) as kd:
            return kd.student(**data).logits

    with torch.no_grad():
        for p in family.parameters():
            p.mul_(1.01)
    want = logits()
    write_tensors(tmp_path / "state.safetensors", family.state_dict())
    family.load_state_dict(begun)
    assert not torch.equal(logits(), want)
    family.load_state_dict(read_tensors(tmp_path / "state.safetensors"))
    assert torch.equal(logits(), want)
    assert not any("teacher" in name for name in family.state_dict())


def test_the_example_in_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "family.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    rows = load(write_sst(tmp_path / "sst2", train=20), tokenizer()).train
    model = bert().eval()
    known = {"model": model, "teacher": model, "data": rows, "batches": [rows.batch([0, 1], labels=False)]}
    known["batch"] = known["batches"][0]
    exec(compile(code.replace("steps=1000", "steps=3"), "example", "exec"), known)  # our own text
    assert known["qat"].qconfig == known["rules"] and known["rules"].left_out == (1,)


@pytest.mark.parametrize(
    ("name", "qconfig"), [("bert", "W8E8A8"), ("bert", "W8E8A4-int"), ("albert", "W8E8A8"), ("modernbert", "W8E8A8")]
)
def test_sizes_are_those_of_the_files(tmp_path: Path, name: str, qconfig: str) -> None:
    family, model, _ = ready(name, qconfig)
    kq.convert(family.student).save_pretrained(tmp_path / "largest")
    sizes = Sizes(family, tmp_path / "largest")
    table, fixed, blocks = sizes.tables()
    for number, member in enumerate((mixed(family), mixed(family, 0), mixed(family, 1), family.uniform(2))):
        folder = tmp_path / str(number)
        kq.convert(family.member(member, model)).save_pretrained(folder)
        size = (folder / "constants.safetensors").stat().st_size
        assert sizes.of(member) == size >= sizes.smallest()
        there = [i for i, s in enumerate(family.switches) if s.block is None or s.block not in member.left_out]
        summed = fixed - blocks[list(member.left_out)].sum()
        summed += sum(table[i, WIDTHS.index(member.bits[i])] for i in there)
        assert size - 8 * (len(table) + 100) < summed <= size


def test_a_uniform_member_has_the_size_of_the_model_of_its_width(tmp_path: Path) -> None:
    family, model, data = ready("bert", "W8E8A8")
    kq.convert(family.student).save_pretrained(tmp_path / "largest")
    sizes = Sizes(family, tmp_path / "largest")
    for bits in (2, 4, 6):
        alone = kq.prepare_qat(model, f"W{bits}E{bits}A8").eval()
        kq.calibrate(alone, [data], progress=False)
        kq.convert(alone).save_pretrained(tmp_path / str(bits))
        size = (tmp_path / str(bits) / "constants.safetensors").stat().st_size
        assert abs(sizes.of(family.uniform(bits)) - size) < 64  # the header's "first" and "levels" of other codes


def test_the_time_of_blocks_is_what_a_model_lacks_without_them() -> None:
    family, _, _ = ready("bert")
    ran = []

    def in_turn(members: Sequence[Member]) -> np.ndarray:
        ran.extend(m.left_out for m in members)
        busy = np.array([0.0, 1.0, 2.0, 40.0, 50.0])  # the machine gets slower while it measures
        return np.array([[10.0 - 3.0 * len(m.left_out) for m in members]]) + busy[:, None]

    whole, blocks = latency(family, in_turn)
    assert whole == 12.0 and blocks.tolist() == [3.0, 3.0] and ran == [(), (0,)]  # blocks of equal work once
    _, slower = latency(family, lambda members: np.array([[10.0, 11.0]]))
    assert slower.tolist() == [0.0, 0.0]


def test_members_are_timed_in_turn() -> None:
    family, model, _ = ready("bert")
    ms = run_in_turn(family, [family.largest, replace(family.largest, left_out=(0,))], model, seconds=0)
    assert ms.shape == (5, 2) and (ms > 0).all()


@pytest.mark.parametrize("name", ["bert", "albert"])
def test_a_family_of_rules_that_leave_blocks_out(name: str) -> None:
    """Its own blocks are counted without those."""
    model = tiny(name, num_hidden_layers=4).eval()
    data = for_model(model, batch())
    family = make_family(model, model, replace(resolve("W8E8A8"), left_out=(1,)), batches=[data], leave_out=1).eval()
    member = replace(mixed(family), left_out=(1,))
    assert family.blocks == 3 and family.left_out(member) == (1, 2) and family.left_out(family.largest) == (1,)
    with family.at(member) as kd, torch.no_grad():
        want = kd.student(**data).logits
    torch.testing.assert_close(family.member(member, model)(**data).logits, want, rtol=0, atol=0)
    assert renumbered((0, 1, 2), (0, 2)) == (1, 3, 4) and renumbered((), (1,)) == ()


def test_losses_of_other_rows_are_not_taken(tmp_path: Path) -> None:
    family, model, data = ready("bert")
    found = []
    for rows, text in (("a", 1), ("b", 2)):
        batches = [{k: v[:text] for k, v in data.items()}]
        with Losses(family, batches, tmp_path / "losses.json", rows) as losses:
            found.append(losses.of("", family.largest))
    assert found[0] != found[1]


class Told:
    """Losses that are a formula of the member."""

    def __init__(self, family: Any, blocks: list[float]) -> None:
        self.family, self.blocks = family, blocks

    def of(self, key: str, member: Member) -> dict[str, float]:
        narrow = sum((i + 1) / bits for i, bits in enumerate(member.bits))
        return {"output": 5 + narrow + sum(self.blocks[b] for b in member.left_out) + 0.1 * len(member.left_out) ** 2}


def test_tables_of_losses_hold_one_change_at_a_time() -> None:
    family, _, _ = ready("bert")
    table, depths = measure_losses(Told(family, [0.5, 0.25]), "output")  # type: ignore[arg-type]
    want = (np.arange(len(family.switches)) + 1)[:, None] * (1 / np.array(WIDTHS) - 1 / 8)
    np.testing.assert_allclose(table, want, atol=1e-12)
    assert depths == {(): 0.0, (0,): pytest.approx(0.6), (1,): pytest.approx(0.35)}


def test_sets_of_blocks_grow_from_the_best_smaller_ones() -> None:
    family = SimpleNamespace(
        largest=Member((8,)),
        bits=(2, 8),
        switches=[SimpleNamespace(name="w")],
        removable=list(range(6)),
        most_left_out=2,
    )
    _, depths = measure_losses(Told(family, [5.0, 1.0, 4.0, 2.0, 3.0, 6.0]), "output")  # type: ignore[arg-type]
    best = {1, 3, 4}
    want = {tuple(sorted((a, b))) for a in best for b in range(6) if a != b}
    assert {d for d in depths if len(d) == 2} == want and len(depths) == 1 + 6 + len(want)
    assert depths[1, 3] == pytest.approx(3.0 + 0.4)


def test_bit_operations_are_those_counted_by_hand() -> None:
    family, model, _ = ready("bert", "W8E8A8")
    h, inner, length = model.config.hidden_size, model.config.intermediate_size, 16
    table, rest, blocks = bit_operations(family, length)
    of = {s.name: table[i] for i, s in enumerate(family.switches)}
    np.testing.assert_array_equal(
        of["bert.encoder.layer.1.intermediate.dense.weight"], length * h * inner * 8 * np.array(WIDTHS)
    )
    np.testing.assert_array_equal(of["bert.pooler.dense.weight"], h * h * 8 * np.array(WIDTHS))
    assert not of["bert.embeddings.word_embeddings.weight"].any()
    assert rest == blocks.sum() == 2 * 2 * length * length * h * 64  # layers x (scores, context)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": (8,)}, "two or more"),
        ({"bits": (2, 9)}, "from 2 to 8"),
        ({"draws": "all"}, "unknown"),
        ({"leave_out": 2}, "leave out 0 to 1"),
        ({"qconfig": "W2E2A8-twn"}, "ternary"),
    ],
)
def test_what_makes_no_family_is_an_error(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        made(**options)


@pytest.mark.parametrize(
    ("blocks", "says"),
    [([5], "there are 2 blocks"), ([-1], "names no blocks"), ("x", "names no"), ([1, 0], "all 2 blocks are left out")],
)
def test_blocks_that_are_not_there_cannot_be_left_out(blocks: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        kq.prepare_qat(tiny("bert"), kq.QConfig(rules=kq.preset("W8E8A8").rules, left_out=blocks))


def test_a_model_without_a_block_is_the_model_whose_layer_was_deleted() -> None:
    model = tiny("bert").eval()
    data = for_model(model, batch())
    qat = kq.prepare_qat(model, kq.QConfig(rules=(), left_out=(0,))).eval()
    model.bert.encoder.layer = model.bert.encoder.layer[1:]
    assert torch.equal(qat(**data).logits, model(**data).logits)
    assert not any("layer.0." in name for name in qat.gm.state_dict())
