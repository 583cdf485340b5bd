"""``kdlsq-fx family`` on a tiny model and data set."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_glue import write_model, write_sst

import kdlsq_fx as kq
from kdlsq_fx import data, family_costs, family_job, family_tables, opening
from kdlsq_fx.cli import main
from kdlsq_fx.cli_parts import resumable
from kdlsq_fx.cli_train import _qconfigs
from kdlsq_fx.errors import ConfigError
from kdlsq_fx.family import Member
from kdlsq_fx.family_choices import Choices, member_key, member_of, nearest
from kdlsq_fx.family_search import proposals, steps_from
from kdlsq_fx.family_sizes import Sizes

QUICK = ["--steps", "12", "--lr", "1e-3", "--batch-size", "16", "--held-out", "30", "--calibration", "16"]
QUICK += ["--bits", "2,4,8", "--leave-out", "1", "--candidates", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """A finished run, its arguments, and its budgets: somewhat above the smallest size, which an error named."""
    folder = tmp_path_factory.mktemp("family")
    write_sst(folder / "sst2", train=120)
    write_model(folder / "bert")
    out = folder / "out"
    argv = ["family", str(folder / "bert"), "--data", str(folder / "sst2"), *QUICK, "--out", str(out)]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main([*argv, "--budget", "1KiB"]) == 1
    assert "below the smallest model" in said.getvalue() and not list(out.rglob("log.tsv"))
    (least,) = re.findall(r"ask for at least ([0-9.]+) bytes", said.getvalue())
    budgets = [str(int(float(least) * share)) for share in (1.05, 1.3)]
    assert main([*argv, "--budget", ",".join(budgets)]) == 0
    return out / "members", argv, budgets


def test_each_budget_has_a_model_within_it(made: tuple[Path, list[str], list[str]]) -> None:
    out, _, budgets = made
    table = json.loads((out / "table.json").read_text())
    assert [m["name"] for m in table["members"]] == budgets
    for row in table["members"]:
        size = (out / row["name"] / "int" / "constants.safetensors").stat().st_size
        assert size == row["size"] == row["expected"] <= row["budget"]
    for name in ("table.md", "pareto.svg", "sensitivity.md", "sensitivity.svg", "losses.json"):
        assert (out / name).stat().st_size > 200


def test_the_rules_of_a_member_make_its_graph(made: tuple[Path, list[str], list[str]]) -> None:
    out, _, budgets = made
    batch = {"input_ids": torch.tensor([[2, 7, 9, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    for name in budgets:
        qat = kq.from_pretrained(out / name / "qat")
        model = opening.open_hub_model(str(out.parent.parent / "bert"))
        again = kq.prepare_qat(model, out / name / "rules.json")
        again.gm.load_state_dict(qat.gm.state_dict())
        want = qat(**batch).logits
        assert torch.equal(again.eval()(**batch).logits, want)
        torch.testing.assert_close(kq.from_pretrained(out / name / "int")(**batch).logits, want, rtol=0, atol=1e-3)


def test_a_member_is_the_nearest_that_keeps_its_budget(made: tuple[Path, list[str], list[str]]) -> None:
    """By the distances that the run wrote down, and exact sizes."""
    out, argv, budgets = made
    asked = json.loads((out / "held_out.json").read_text())
    assert all(len(rows) == 30 - 16 for rows in asked["members"].values())
    folder = out.parent.parent
    tokenizer = opening.load_tokenizer(str(folder / "bert"))
    dataset, held = data.held_out(data.load(folder / "sst2", tokenizer), 30, seed=42)
    start = opening.open_hub_model(str(folder / "bert"))
    plan = family_job.Plan(leave_out=1, batch_size=16, bits=(2, 4, 8), calibration=16, steps=12)
    task = family_job.Job(start, dataset, held, plan, out)
    task.train()
    sizes = Sizes(task.family, out / "largest" / "int")
    means = {member_of(key): np.mean(rows) for key, rows in asked["members"].items()}
    for row in json.loads((out / "table.json").read_text())["members"]:
        if row["name"] in budgets:
            fit = [m for m in means if sizes.of(m) <= row["budget"]]
            whole = [means[m] for m in fit if not m.left_out]
            assert row["held_out"] == pytest.approx(min(means[m] for m in fit) if row["left_out"] else min(whole))
    tables, losses = task.tables(), json.loads((out / "losses.json").read_text())["losses"]
    for row in json.loads((out / "table.json").read_text())["members"]:
        if row["name"] in budgets:  # who was asked: the tables' proposals, and those around the nearest so far
            budget = {"bytes": row["budget"]}
            assert {member_key(m) for m in proposals(tables, budget, 2)} <= asked["members"].keys()
            winner = member_of(asked["chosen"][json.dumps(budget)])
            around = [m for m in means if all(member_key(o) in losses for _, o in steps_from(tables, m))]
            assert len(around) >= 1 and (winner in around or len(around) >= plan.rounds)
    key, rows = next(iter(asked["members"].items()))
    with task.family.at(member_of(key)) as kd, torch.no_grad():
        batch = task.choosing.batch(range(14), labels=False)
        p, q = (m(**batch).logits.double().softmax(-1).numpy() for m in (start, kd.student))
    np.testing.assert_allclose((p * np.log(p / q)).sum(-1), rows, atol=1e-5)


def test_a_block_is_left_out_only_where_that_is_surely_nearer() -> None:
    whole, shallow, other = Member((8,)), Member((8,), (0,)), Member((2,))
    far = {whole: np.array([1.0, 1.0, 1.0, 1.2]), shallow: np.array([0.9, 1.2, 0.9, 1.1]), other: np.full(4, 5.0)}
    assert nearest(list(far), far) == whole  # nearer by 0.025, with an error of 0.065
    assert nearest(list(far), {**far, shallow: far[shallow] - 0.5}) == shallow
    assert nearest([shallow, other], far) == shallow


def test_a_time_is_measured_once(made: tuple[Path, list[str], list[str]], tmp_path: Path, monkeypatch: Any) -> None:
    """What a latency was held against before the training stands after it too."""
    _, argv, _ = made
    argv = [*argv[: argv.index("--out")], "--out", str(tmp_path), "--budget", "90KiB", "--latency", "9.5"]
    asked: list[int] = []

    def in_turn(family: Any, members: Sequence[Member], model: Any) -> Any:
        asked.append(len(members))
        return np.array([[10.0, 9.0]]) if len(asked) == 1 else np.array([[12.0, 11.9]])

    monkeypatch.setattr(family_costs, "run_in_turn", in_turn)
    assert main(argv) == 0 and asked == [2]
    (row,) = json.loads((tmp_path / "members" / "table.json").read_text())["members"]
    assert row["ms"] == 9.0 and len(row["left_out"]) == 1
    assert main([*argv, "--latency", "8.9"]) == 1 and asked == [2]


def test_another_budget_needs_no_more_training(made: tuple[Path, list[str], list[str]], capsys: Any) -> None:
    out, argv, budgets = made
    before = (out / "family" / "model.safetensors").stat().st_mtime_ns
    losses = json.loads((out / "losses.json").read_text())["losses"]
    assert main([*argv, "--budget", "34KiB", "--latency", "1000", "--bit-operations", "1"]) == 0
    table = capsys.readouterr().out
    assert all(f"| {name} | " in table for name in ("34KiB-1000ms-1G", *budgets))  # those of the first call too
    assert (out / "family" / "model.safetensors").stat().st_mtime_ns == before
    assert losses.items() <= json.loads((out / "losses.json").read_text())["losses"].items()  # none measured again
    assert main([*argv, "--budget", "34KiB", "--bit-operations", "1e-6"]) == 1
    assert "a budget of 1e-06 G bit operations is below the smallest model" in capsys.readouterr().err
    assert main([*argv, "--budget", "34KiB", "--lr", "5"]) == 1
    assert "another plan" in capsys.readouterr().err
    shutil.rmtree(out / budgets[0] / "int")
    assert main([*argv, "--budget", budgets[0]]) == 0
    assert (out / budgets[0] / "int" / "constants.safetensors").is_file()
    files = [str(out / name / "rules.json") for name in budgets]
    assert list(_qconfigs(Namespace(qconfig=files, target="ort-cpu"))) == budgets


def test_sensitivity_trains_nothing(made: tuple[Path, list[str], list[str]], capsys: Any, tmp_path: Path) -> None:
    _, argv, _ = made
    argv = [*argv[: argv.index("--out")], "--out", str(tmp_path)]
    assert main([*argv, "--sensitivity"]) == 0
    said = capsys.readouterr().out
    assert "| bert.pooler.dense.weight | 256 |" in said and "2 bits" in said
    found = json.loads((tmp_path / "sensitivity" / "sensitivity.json").read_text())
    assert len(found["weights"]) == 2 + 2 * 6 + 1 and not (tmp_path / "sensitivity" / "family" / "run").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--budget", "4bananas"], "is no size"),
        (["--budget", " , "], "--sensitivity only to look"),
        ([], "--sensitivity only to look"),
        (["--budget", "30KiB", "--bits", "two"], "names no widths"),
        (["--budget", "30KiB", "--held-out", "90"], "cannot be held out"),
        (["--budget", "30KiB", "--sensitivity"], "writes none"),
        (["--latency", "3", "--sensitivity"], "writes none"),
        (["--budget", "30KiB", "--calibration", "30"], "30 of 30 rows held out"),
        (["--sensitivity", "--bits", "1,8"], "from 2 to 8"),
        (["--budget", "90KiB", "--leave-out", "3"], "leave out 0 to 1"),
        (["--budget", "90KiB", "--latency", "0.00001"], "ms is below the smallest"),
        (["--budget", "90KiB", "--bit-operations", "1e-9"], "below the smallest"),
    ],
)
def test_wrong_options_are_said_before_training(
    made: tuple[Path, list[str], list[str]], tmp_path: Path, capsys: Any, more: list[str], says: str
) -> None:
    _, argv, _ = made
    argv = [*argv[: argv.index("--out")], "--out", str(tmp_path), *more]
    assert main(argv) == 1
    assert says in capsys.readouterr().err
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]  # nothing that a better call would find


def test_ctrl_c_loses_nothing(made: tuple[Path, list[str], list[str]], tmp_path: Path, monkeypatch: Any) -> None:
    """Stopped while it measures, a run goes on with what was measured."""
    out, _, _ = made
    folder = out.parent.parent
    tokenizer = opening.load_tokenizer(str(folder / "bert"))
    dataset, held = data.held_out(data.load(folder / "sst2", tokenizer), 30, seed=42)
    start = opening.load_task_model(str(folder / "bert"), dataset.task, seed=42)
    task = family_job.Job(start, dataset, held, family_job.Plan(steps=0, calibration=16, bits=(2, 8)), tmp_path)
    task.train()
    real, calls = family_tables.losses_of, []

    def stopped(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(family_tables, "losses_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        task.tables()
    assert len(json.loads((tmp_path / "losses.json").read_text())["losses"]) == 7
    monkeypatch.undo()
    tables = task.tables()
    assert tables.loss.shape == (len(task.family.switches), 2) and not tables.loss[:, -1].any()


@pytest.mark.parametrize(("text", "size"), [("6MiB", 6 * 2**20), ("1.5 MB", 1_500_000), ("900", 900), ("2kib", 2048)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert family_job.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "6 MiBs", "0MiB", "-1MiB"])
def test_other_sizes_are_errors(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        family_job.parse_size(text)


def test_a_search_that_ended_gives_the_same_member_again(tmp_path: Path) -> None:
    """Whatever was measured since, and in whatever order; other rows start anew."""
    asked: list[Member] = []

    def measure(member: Member) -> Any:
        asked.append(member)
        return np.full(4, float(member.bits[0]))

    first = Choices(tmp_path / "held_out.json", "rows", measure)
    assert first.nearest([Member((8,)), Member((4,))]) == Member((4,))
    first.choose("a", Member((4,)))
    first.nearest([Member((2,))])  # of a search that was stopped
    again = Choices(tmp_path / "held_out.json", "rows", measure)
    assert again.chosen["a"] == member_key(Member((4,)))
    assert again.before() == [Member((8,)), Member((4,))] and len(asked) == 3
    assert again.nearest([Member((2,)), Member((8,))]) == Member((2,)) and len(asked) == 3
    assert not Choices(tmp_path / "held_out.json", "others", measure).members


def test_sigterm_says_where_it_goes_on(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match=f"what is done is kept in {tmp_path}"), resumable(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == before
