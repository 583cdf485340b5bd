"""A cache of targets gives the loss of the running teacher, belongs to its data, and can be interrupted."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache as once
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny
from test_distillation import float_student

import kdlsq_fx as kq
from kdlsq_fx import fused, kd_cache_build, train
from kdlsq_fx.compression import Compression
from kdlsq_fx.data import Encoded
from kdlsq_fx.distillation import Distiller, distill
from kdlsq_fx.errors import CheckpointError, ConfigError, InputError, TrainingError
from kdlsq_fx.kd_cache import Cache
from kdlsq_fx.kd_cache_build import build_cache
from kdlsq_fx.model import QuantModel

torch.set_num_threads(1)
SEP = 3
HSK = Compression(depth=1, length=4, width=0.25, separator=SEP)
EXACT = {"fp32": 1e-6, "fp16": 2e-3, "int8": 2e-2}


def data(rows: int = 30, seed: int = 0) -> Encoded:
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(rng.integers(2, 12, rows))])
    ids = rng.integers(4, 99, starts[-1]).astype(np.int32)
    ids[starts[1:] - 1] = SEP
    return Encoded(ids, np.zeros_like(ids), starts, rng.integers(0, 2, rows))


@once
def models(head: str = "ForSequenceClassification", **options: Any) -> tuple[QuantModel, QuantModel]:
    """A student and a teacher, captured once: look, do not change."""
    both = (float_student(tiny("bert", head, seed=s, **options)) for s in (0, 1))
    return tuple(both)  # type: ignore[return-value]


def live(head: str = "ForSequenceClassification", **options: Any) -> Distiller:
    return distill(*models(head), **options).eval()


PLANS: dict[str, dict[str, Any]] = {
    "hsk": {"loss": "hsk", "compress": HSK, "schedule": "joint"},
    "both": {"loss": "hsk", "compress": replace(HSK, mask="both"), "schedule": "joint"},
    "random": {"attention": 0, "compress": Compression(width=0.25, features="random")},
    "uniform": {"attention": 0, "compress": Compression(length=3, width=0.5, features="uniform", tokens="right")},
    "cls": {"attention": 0, "compress": Compression(tokens="cls")},
    "tokens": {"attention": 0, "compress": Compression(length=5, tokens="attention")},
    "whole": {},
}


@pytest.mark.parametrize("store", list(EXACT))
@pytest.mark.parametrize("plan", list(PLANS))
def test_loss_and_gradient_are_the_running_teachers(plan: str, store: str, tmp_path: Path) -> None:
    kd, rows = live(**PLANS[plan]), data()
    cache = build_cache(kd, rows, tmp_path, store=store, batch_size=7, shard_bytes=1000)
    assert len(cache.index["shards"]) > 2
    again = distill(kd.student, cache=tmp_path).eval()
    for numbers in (np.array([3, 29, 0, 17]), np.array([5])):
        batch = cache.source(rows).batch(numbers)
        a, b = kd(**{k: v for k, v in batch.items() if k != "example_id"}), again(**batch)
        assert set(a.parts) == set(b.parts)
        for term, value in a.parts.items():
            assert b.parts[term].item() == pytest.approx(value.item(), rel=EXACT[store], abs=EXACT[store] / 100)
        grads = [torch.autograd.grad(out.loss, wanted(kd), allow_unused=True) for out in (a, b)]
        for x, y in zip(*grads):
            if x is not None and y is not None:
                torch.testing.assert_close(x, y, rtol=0, atol=3 * EXACT[store] * float(x.abs().max()) + 1e-7)


def wanted(kd: Distiller) -> list[torch.Tensor]:
    return [p for p in kd.student.parameters() if p.requires_grad]


@pytest.mark.parametrize("head", ["ForQuestionAnswering", "ForTokenClassification", "Model"])
def test_every_head(head: str, tmp_path: Path) -> None:
    options = {"hidden": 0, "attention": 0, **({"pooled": 1.0} if head == "Model" else {})}
    kd, rows = live(head, **options), replace(data(), labels=None)
    cache = build_cache(kd, rows, tmp_path, store="fp32")
    batch = cache.source(rows).batch(np.array([3, 29, 0, 17]))
    got = distill(kd.student, cache=cache).eval()(**batch)
    want = kd(**{k: v for k, v in batch.items() if k != "example_id"})
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-5) and want.loss.item() > 0


def test_padding_on_the_left_and_more_of_it(tmp_path: Path) -> None:
    kd, rows = live(**PLANS["hsk"]), data()
    again = distill(kd.student, cache=build_cache(kd, rows, tmp_path, store="fp32")).eval()
    batch = Cache.open(tmp_path).source(rows).batch(np.array([3, 29, 0, 17]))
    moved = {k: v.clone() for k, v in batch.items()}
    for r, n in enumerate(batch["attention_mask"].sum(1).tolist()):
        for k in ("input_ids", "attention_mask"):
            moved[k][r] = batch[k][r].roll(batch[k].shape[1] - n)
    # positions move with the padding, so the models see another input; what must agree is where the targets stand
    left = again.targets.wanted(moved, moved).taps[0]
    right = again.targets.wanted(batch, batch).taps[0]
    shift = batch["attention_mask"].shape[1] - batch["attention_mask"].sum(1, keepdim=True)
    assert left.positions is not None and right.positions is not None and right.real is not None
    assert torch.equal(left.positions, torch.where(right.real > 0, right.positions + shift, 0))


def test_the_student_trains_to_the_same_curve_with_no_teacher_in_memory(tmp_path: Path) -> None:
    rows, curves = data(64), {}
    teacher = models()[1]
    for kind in ("live", "cache"):
        qat = kq.prepare_qat(tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), "W4E4A8")
        kq.calibrate(qat, rows.sample(2, batch_size=16, seed=0), progress=False)
        loss = {"loss": "hsk", "compress": HSK, "share": 0.5, "gold": 0.5}
        kd = distill(qat, teacher, **loss)
        source: Any = rows
        if kind == "cache":
            built = build_cache(kd, rows, tmp_path / "cache")
            del kd
            kd = distill(qat, cache=built)
            source = built.source(rows)
            with pytest.raises(ConfigError, match="no teacher"):
                kd.teacher  # noqa: B018
        train.fit(kd, source, out_dir=tmp_path / kind, steps=12, lr=1e-3, batch_size=8)
        lines = (tmp_path / kind / "log.tsv").read_text().splitlines()[1:]
        curves[kind] = [float(line.split("\t")[1]) for line in lines]
        stages = ["hidden" in line for line in lines]
        assert stages == [True] * 6 + [False] * 6 and all("gold" in line for line in lines[6:])
    np.testing.assert_allclose(curves["cache"], curves["live"], rtol=3e-3)
    assert curves["live"][0] != curves["live"][5]


def test_a_stopped_build_goes_on_and_ends_with_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kd, rows = live(**PLANS["hsk"]), data()
    whole = build_cache(kd, rows, tmp_path / "whole", shard_bytes=2000)
    calls = []

    def stop(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(*args)

    run = kd_cache_build._run
    monkeypatch.setattr(kd_cache_build, "_run", stop)
    with pytest.raises(KeyboardInterrupt):
        build_cache(kd, rows, tmp_path / "cut", shard_bytes=2000)
    monkeypatch.setattr(kd_cache_build, "_run", run)
    with pytest.raises(CheckpointError, match="not finished"):
        Cache.open(tmp_path / "cut")
    shards = json.loads((tmp_path / "cut" / "cache.json").read_text())["shards"]
    assert 0 < len(shards) < len(whole.index["shards"])
    before = {s["file"]: (tmp_path / "cut" / s["file"]).stat().st_mtime_ns for s in shards}
    build_cache(kd, rows, tmp_path / "cut", shard_bytes=2000)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()
    assert all((tmp_path / "cut" / f).stat().st_mtime_ns == t for f, t in before.items())


def test_damage_is_told(tmp_path: Path) -> None:
    kd, rows = live(**PLANS["hsk"]), data()
    build_cache(kd, rows, tmp_path, shard_bytes=2000)
    path = tmp_path / "shard-00001.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    cache = Cache.open(tmp_path)
    batch = cache.source(rows).batch(np.arange(30))
    with pytest.raises(CheckpointError, match="checksum"):
        distill(kd.student, cache=cache)(**batch)
    path.write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        Cache.open(tmp_path)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))  # of the right size
    others = {p: p.stat().st_mtime_ns for p in tmp_path.glob("shard-*") if p != path}
    build_cache(kd, rows, tmp_path, shard_bytes=2000)  # makes the bad one again, and no other
    assert path.read_bytes() == good and len(others) > 1
    assert all(p.stat().st_mtime_ns == t for p, t in others.items())
    index = json.loads((tmp_path / "cache.json").read_text())
    for wrong, told in (
        ({k: v for k, v in index.items() if k != "plan"}, "the entry 'plan' is missing"),
        (index | {"shards": [*index["shards"], index["shards"][0]]}, "shards where"),
        (index | {"shards": index["shards"][1:]}, "the first shard-00000"),
    ):
        (tmp_path / "cache.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=told):
            Cache.open(tmp_path)
    with pytest.raises(CheckpointError, match="no distillation cache there"):
        Cache.open(tmp_path / "nothing")


def test_other_data_and_other_plans_are_refused(tmp_path: Path) -> None:
    kd, rows = live(**PLANS["hsk"]), data()
    cache = build_cache(kd, rows, tmp_path)
    with pytest.raises(InputError, match="another data set"):
        cache.source(data(seed=1))
    with pytest.raises(InputError, match="another data set"):
        cache.source(rows.head(20))
    with pytest.raises(InputError, match="both have 30 rows, but tokens, lengths or labels differ"):
        cache.source(replace(rows, labels=1 - rows.labels))  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="another data"):
        build_cache(kd, data(seed=1), tmp_path)
    with pytest.raises(CheckpointError, match="another .*loss"):
        build_cache(live(loss="hsk", compress=replace(HSK, length=2), schedule="joint"), rows, tmp_path)
    with pytest.raises(CheckpointError, match="another teacher"):
        other = distill(models()[0], tiny("bert", seed=7), **PLANS["hsk"])
        build_cache(other, rows, tmp_path)
    with pytest.raises(CheckpointError, match="another teacher"):  # the same weights, another function of them
        other = distill(models()[0], tiny("bert", seed=1, hidden_act="relu"), **PLANS["hsk"])
        build_cache(other, rows, tmp_path)
    student = distill(kd.student, cache=cache)
    with pytest.raises(InputError, match="no example_id"):
        student(**rows.batch([0, 1]))
    with pytest.raises(InputError, match="example 3 has other tokens"):
        student(**rows.batch([4]), example_id=torch.tensor([3]))
    with pytest.raises(InputError, match="examples 0 to 29"):
        student(**rows.batch([4]), example_id=torch.tensor([30]))
    for ids in (torch.tensor([4]), torch.tensor([[4], [5]]), torch.tensor([4.0, 5.0]), [4, 5]):
        with pytest.raises(InputError, match="example_id is .*, the batch has 2 rows"):
            student(**rows.batch([4, 5]), example_id=ids)
    with pytest.raises(ConfigError, match="a student of 2 layers, this one has 3"):
        distill(float_student(tiny("bert", num_hidden_layers=3)), cache=cache)
    with pytest.raises(ConfigError, match="compress was fixed"):
        distill(kd.student, cache=cache, compress="2t")
    with pytest.raises(ConfigError, match="attention has a weight"):
        distill(kd.student, cache=cache, attention=1.0)
    with pytest.raises(ConfigError, match="teacher or from a cache"):
        distill(kd.student, models()[1], cache=cache)
    with pytest.raises(ConfigError, match="teacher or from a cache"):
        distill(kd.student)
    with pytest.raises(ConfigError, match="64 wide|32 wide"):
        distill(float_student(tiny("bert", hidden_size=64)), cache=cache)
    assert distill(kd.student, cache=cache, hidden=2.0, temperature=3.0).loss.temperature == 3.0


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    rows = data()
    with pytest.raises(ConfigError, match="padded positions"):
        build_cache(live(padding="paper"), rows, tmp_path / "a")
    with pytest.raises(ConfigError, match="depends on the batch"):
        build_cache(live(compress=Compression(width=0.5, features="magnitude-batch")), rows, tmp_path / "b")
    with pytest.raises(ConfigError, match="store"):
        build_cache(live(), rows, tmp_path / "c", store="fp8")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a model stands in"):
        build_cache(live(), rows, tmp_path / "model")
    big = tiny("bert", seed=1)
    with torch.no_grad():
        big.bert.encoder.layer[1].output.LayerNorm.weight.mul_(1e6)  # type: ignore[union-attr,index]
    kd = distill(models()[0], big, **PLANS["hsk"])
    with pytest.raises(InputError, match="65504"):
        build_cache(kd, rows, tmp_path / "d")
    assert build_cache(kd, rows, tmp_path / "e", store="int8").rows == 30
    with torch.no_grad():
        big.bert.encoder.layer[1].output.LayerNorm.weight[3] = float("nan")  # type: ignore[union-attr,index]
    kd = distill(models()[0], big, **PLANS["hsk"])
    for store in EXACT:
        with pytest.raises(InputError, match="tap0 is not finite"):
            build_cache(kd, rows, tmp_path / store, store=store)


def test_a_run_is_not_continued_on_the_targets_of_another_teacher(tmp_path: Path) -> None:
    rows = data()
    student = models()[0]
    for seed in (1, 2):
        kd = distill(student, tiny("bert", seed=seed), **PLANS["hsk"])
        build_cache(kd, rows, tmp_path / str(seed))
    options = {"steps": 2, "lr": 1e-5, "batch_size": 8}
    for name in ("1", "2"):
        copy = float_student(tiny("bert"))
        cache = Cache.open(tmp_path / name)
        run = {"out_dir": tmp_path / "run", **options}
        if name == "1":
            train.fit(distill(copy, cache=cache), cache.source(rows), **run)
        else:
            with pytest.raises(TrainingError, match="data"):
                train.fit(distill(copy, cache=cache), cache.source(rows), **run)


def test_both_sides_need_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of one row would stretch over all of a batch, and a kernel would read past their end."""
    kd, rows = live(), data()
    run = kd.targets.wanted
    monkeypatch.setattr(kd.targets, "wanted", lambda _, inputs: run({}, {k: v[:1] for k, v in inputs.items()}))
    with pytest.raises(InputError, match="reads 4 rows, the teacher's side has shape .1, "):
        kd(**rows.batch(np.arange(4)))
    assert not fused.squares_fit(torch.zeros(4, 8, 16), torch.zeros(1, 8, 16), None)
