"""The training loop: learns, logs, stops cleanly, and a killed run ends with the weights of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Steep
from tiny_glue import bert, tokenizer, write_sst

from kdlsq_fx import checkpoint, data, train
from kdlsq_fx.api import prepare_qat
from kdlsq_fx.calibration import calibrate, param_groups
from kdlsq_fx.distillation import distill
from kdlsq_fx.errors import CheckpointError, ConfigError, TrainingError
from kdlsq_fx.evaluation import evaluate

TESTS = Path(__file__).resolve().parent
SETTINGS: dict[str, Any] = {"epochs": 2, "lr": 3e-3, "batch_size": 8, "seed": 7, "warmup": 0.1, "clip": 1.0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> data.Dataset:
    return data.load(write_sst(tmp_path_factory.mktemp("data") / "sst2"), tokenizer())


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_learns_and_logs_every_step(tmp_path: Path, dataset: data.Dataset) -> None:
    model = bert()
    got = train.fit(model, dataset.train, out_dir=tmp_path, **{**SETTINGS, "epochs": 12, "lr": 1e-2})
    assert dataset.dev.labels is not None and not model.training
    logits = evaluate(model, dataset.dev, batch_size=5)
    assert (logits.argmax(-1) == dataset.dev.labels).mean() > 0.8  # chance is 0.5
    lines = (tmp_path / "log.tsv").read_text().splitlines()
    assert len(lines) == 1 + got.steps == 1 + 12 * 12
    assert [int(line.split("\t")[0]) for line in lines[1:]] == list(range(1, got.steps + 1))


def test_schedule_rises_then_falls_to_zero() -> None:
    factors = [train.schedule(k, 20, 0.2) for k in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0] and factors[4] == 1.0 and factors[-1] == pytest.approx(1 / 16)
    assert [train.schedule(k, 4) for k in range(4)] == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bit_exact_with_dropout(tmp_path: Path, dataset: data.Dataset, precision: str) -> None:
    settings = {**SETTINGS, "precision": precision}
    whole = bert()
    train.fit(whole, dataset.train, out_dir=tmp_path / "whole", **settings)

    class Enough(Exception):
        pass

    def stop_at(step: int, model: torch.nn.Module) -> None:
        if step == 17:
            raise Enough

    with pytest.raises(Enough):
        train.fit(bert(), dataset.train, out_dir=tmp_path / "cut", save_every=5, on_step=stop_at, **settings)
    torch.rand(3), np.random.rand(3)  # whatever happens between the two runs
    resumed = bert()
    got = train.fit(resumed, dataset.train, out_dir=tmp_path / "cut", save_every=5, **settings)
    assert got.resumed_at == 15 and same(weights(whole), weights(resumed))

    def columns(folder: str) -> list[list[str]]:
        lines = (tmp_path / folder / "log.tsv").read_text().splitlines()
        return [line.split("\t")[:3] for line in lines]

    assert columns("whole") == columns("cut")
    loaded = bert()  # a finished run is only loaded
    assert train.fit(loaded, dataset.train, out_dir=tmp_path / "cut", save_every=5, **settings).resumed_at == 24
    assert same(weights(whole), weights(loaded))


CHILD = """
import sys, time, torch
from pathlib import Path
from tiny_glue import bert, tokenizer
from kdlsq_fx import data, train
torch.set_num_threads(1)
folder, out, slow = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
model = bert()
try:
    train.fit(model, data.load(folder, tokenizer()).train, out_dir=out, epochs=2, lr=3e-3, batch_size=8, seed=7,
              save_every=4, on_step=lambda step, m: time.sleep(slow))
except train.Interrupted as e:
    print(e)
    sys.exit(130)
model.save_pretrained(out / "model")
"""


def child(folder: Path, out: Path, slow: float = 0.0) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(out), str(slow)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def wait_for_step(out: Path, step: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        run = checkpoint.read_run(out)
        if run is not None and run["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError("the run wrote no checkpoint")


def test_killed_and_interrupted_runs_end_with_the_same_weights(tmp_path: Path) -> None:
    folder = write_sst(tmp_path / "sst2")
    whole = child(folder, tmp_path / "whole")
    killed = child(folder, tmp_path / "killed", slow=0.2)
    wait_for_step(tmp_path / "killed", 8)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    for number in (signal.SIGTERM, signal.SIGINT):
        stopped = child(folder, tmp_path / "stopped", slow=0.2)
        before = (checkpoint.read_run(tmp_path / "stopped") or {"step": 0})["step"]
        wait_for_step(tmp_path / "stopped", before + 4)
        stopped.send_signal(number)
        said, _ = stopped.communicate(timeout=60)
        assert stopped.returncode == 130 and "saved in" in said
    for name in ("killed", "stopped"):
        assert child(folder, tmp_path / name).wait(120) == 0
    assert whole.wait(120) == 0
    wanted = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    for name in ("killed", "stopped"):
        assert (tmp_path / name / "model" / "model.safetensors").read_bytes() == wanted


def test_distillation_resumes_to_the_same_student(tmp_path: Path, dataset: data.Dataset) -> None:
    def loop() -> Any:
        qat = prepare_qat(bert(), "W2E2A8")
        calibrate(qat, dataset.train.sample(2, batch_size=8, seed=7))
        return distill(qat, bert().eval())

    def run(name: str, on_step: Any = None) -> dict[str, torch.Tensor]:
        kd = loop()
        groups = param_groups(kd, lr=1e-3)
        train.fit(kd, dataset.train, out_dir=tmp_path / name, groups=groups, save_every=4, on_step=on_step, **SETTINGS)
        return weights(kd.student)

    def stop_at(step: int, model: torch.nn.Module) -> None:
        if step == 10:
            raise RuntimeError("cut")

    whole = run("whole")
    with pytest.raises(RuntimeError, match="cut"):
        run("cut", stop_at)
    state = checkpoint.read_run(tmp_path / "cut")
    assert state is not None and state["step"] == 8
    resumed = run("cut")
    assert same(whole, resumed)
    assert any("lsq" in name for name in resumed) and not any("teacher" in name for name in resumed)


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path, dataset: data.Dataset) -> None:
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(1))

        def forward(self, **_: torch.Tensor) -> Any:
            return SimpleNamespace(loss=(self.w * float("nan")).sum())

    with pytest.raises(TrainingError, match=r"loss is nan \[at step 1,"):
        train.fit(Broken(), dataset.train, out_dir=tmp_path, **SETTINGS)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_changes_no_weight(tmp_path: Path, dataset: data.Dataset, clip: float) -> None:
    model = Steep(3)
    with pytest.raises(TrainingError, match=r"norm of the gradients is (nan|inf) \[at step 3,"):
        train.fit(model, dataset.train, out_dir=tmp_path, **{**SETTINGS, "clip": clip})
    assert bool(torch.isfinite(model.w).all())


def test_a_fused_optimizer_leaves_out_a_step_that_nobody_has_looked_at() -> None:
    """What a GPU does with an infinite norm until the host knows of it; torch's fused AdamW has it on the CPU too."""
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([w], lr=0.1, fused=True)
    for norm, grad in ((1.0, 1.0), (float("nan"), float("nan")), (float("inf"), 2.0)):
        before = w.detach().clone(), {k: v.clone() for k, v in optimizer.state[w].items()}
        w.grad = torch.full((3,), grad)
        train.leave_out_unless_finite(optimizer, torch.tensor(norm))
        optimizer.step()
        if norm == 1.0:
            assert not torch.equal(w, before[0])
        else:
            assert torch.equal(w, before[0]) and all(
                torch.equal(v, before[1][k]) for k, v in optimizer.state[w].items()
            )


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2,), float("-inf")))  # no weight, and meant so
    optimizer = torch.optim.AdamW(model.parameters())
    (tmp_path / ".state-1.safetensors.x").write_text("of a save that was killed")
    checkpoint.save(tmp_path, model, optimizer, {"step": 1, "done": False})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", "state-1.safetensors"]
    with torch.no_grad():
        model.bias[0] = float("inf")
    with pytest.raises(TrainingError, match="bias is not finite"):
        checkpoint.save(tmp_path, model, optimizer, {"step": 2, "done": False})
    run = checkpoint.read_run(tmp_path)
    assert run is not None and run["step"] == 1


def test_other_settings_or_models_do_not_resume(tmp_path: Path, dataset: data.Dataset) -> None:
    train.fit(bert(), dataset.train, out_dir=tmp_path, **SETTINGS)
    with pytest.raises(TrainingError, match=r"another lr \(0.003 there, 0.001 here\), groups"):
        train.fit(bert(), dataset.train, out_dir=tmp_path, **{**SETTINGS, "lr": 1e-3})
    with pytest.raises(TrainingError, match="another data"):
        train.fit(bert(), dataset.train.head(90), out_dir=tmp_path, **SETTINGS)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        train.fit(bert(intermediate_size=48), dataset.train, out_dir=tmp_path, **SETTINGS)
    with pytest.raises(ConfigError, match="0 steps"):
        train.fit(bert(), dataset.train, out_dir=tmp_path, **{**SETTINGS, "steps": 0})
    with pytest.raises(ConfigError, match="'fp16' is unknown"):
        train.fit(bert(), dataset.train, out_dir=tmp_path, **{**SETTINGS, "precision": "fp16"})
    with pytest.raises(ConfigError, match="99 micro-batches of 8 rows in 1 processes"):
        train.fit(bert(), dataset.train, out_dir=tmp_path, **{**SETTINGS, "micro_batches": 99})
    assert train.fit(bert(), dataset.train, out_dir=tmp_path, **SETTINGS, micro_batches=2).resumed_at > 0


def test_damaged_checkpoints(tmp_path: Path, dataset: data.Dataset) -> None:
    train.fit(bert(), dataset.train, out_dir=tmp_path, **SETTINGS)
    state = next(tmp_path.glob("state-*.safetensors"))
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        train.fit(bert(), dataset.train, out_dir=tmp_path, **SETTINGS)
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**run, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        train.fit(bert(), dataset.train, out_dir=tmp_path, **SETTINGS)


def test_evaluate_keeps_order_and_mode(dataset: data.Dataset) -> None:
    model = bert().train()
    one, many = evaluate(model, dataset.dev, batch_size=1), evaluate(model, dataset.dev, batch_size=7)
    assert model.training
    np.testing.assert_allclose(one, many, atol=1e-5)
    plain = evaluate(lambda **batch: model.eval()(**batch).logits.detach().numpy(), dataset.dev, batch_size=7)
    np.testing.assert_array_equal(plain, many)
