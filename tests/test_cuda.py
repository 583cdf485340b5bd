"""Training on a GPU: the CPU's loss curve, fused as plain, and at most one wait for the GPU in a step."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Steep
from tiny_glue import bert, tokenizer, write_sst

from kdlsq_fx import data, fused, train
from kdlsq_fx.api import convert, prepare_qat
from kdlsq_fx.calibration import calibrate, param_groups
from kdlsq_fx.distillation import distill
from kdlsq_fx.errors import TrainingError
from kdlsq_fx.watching import Stop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
STEPS = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> data.Dataset:
    return data.load(write_sst(tmp_path_factory.mktemp("data") / "sst2"), tokenizer())


def distiller(dataset: data.Dataset, preset: str) -> Any:
    torch.manual_seed(0)
    model = bert()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    qat = prepare_qat(model, preset)
    rows = dataset.train.order(batch_size=8, seed=0, epoch=0)
    calibrate(qat, [dataset.train.batch(r) for r in rows[:3]], progress=False)
    return distill(qat, model)


def losses(kd: Any, dataset: data.Dataset, folder: Path) -> list[float]:
    groups = param_groups(kd.student, lr=1e-3)
    train.fit(kd, dataset.train, out_dir=folder, steps=STEPS, lr=1e-3, batch_size=8, groups=groups)
    return [float(line.split("\t")[1]) for line in (folder / "log.tsv").read_text().splitlines()[1:]]


def test_a_model_on_the_gpu_is_prepared_there_and_converted_for_the_cpu(dataset: data.Dataset) -> None:
    model = bert().eval()
    batch = {k: v for k, v in dataset.train.batch([0, 1, 2]).items() if k != "labels"}
    here, there = prepare_qat(model, "W4E4A8"), prepare_qat(copy.deepcopy(model).cuda(), "W4E4A8")
    assert there.device.type == "cuda" and next(model.parameters()).device.type == "cpu"
    for qat in (here, there):
        calibrate(qat, [batch], progress=False)
    moved = {k: v.cuda() for k, v in batch.items()}
    torch.testing.assert_close(there(**moved).logits.cpu(), here(**batch).logits, rtol=1e-2, atol=1e-2)
    distill(there, copy.deepcopy(model).cuda())(**moved).loss.backward()
    want = convert(copy.deepcopy(there).cpu())(**batch).logits
    torch.testing.assert_close(convert(there)(**batch).logits, want, rtol=0, atol=0)


@pytest.mark.parametrize("preset", ["W4E4A8", "W4E4A8-lsq+", "W4E4A8-lsq-int"])
def test_loss_curve_is_the_cpus(preset: str, dataset: data.Dataset, tmp_path: Path) -> None:
    kd = distiller(dataset, preset)
    curves = {}
    for name, device, on in (("cpu", "cpu", True), ("fused", "cuda", True), ("plain", "cuda", False)):
        fused.use(on)
        try:
            curves[name] = losses(copy.deepcopy(kd).to(device), dataset, tmp_path / name)
        finally:
            fused.use(True)
    want = torch.tensor(curves["cpu"])
    for name in ("fused", "plain"):  # one code of 255 that falls the other way moves the loss this little
        torch.testing.assert_close(torch.tensor(curves[name]), want, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("preset", ["W4E4A8", "W2E2A8-lsq+"])
def test_a_step_waits_for_the_gpu_once(preset: str, dataset: data.Dataset) -> None:
    kd = distiller(dataset, preset).to("cuda").train()
    loop, optimizer = train._Loss(kd, "fp32"), torch.optim.AdamW(kd.parameters(), lr=1e-3, fused=True)
    rows = dataset.train.order(batch_size=8, seed=0, epoch=0)
    for _ in range(2):  # kernels are built, readiness is looked at
        train._step(loop, optimizer, dataset.train, rows[0], 1.0, Stop(), "")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            train._step(loop, optimizer, dataset.train, rows[1], 1.0, Stop(), "")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in seen if "synchronizing" in str(w.message)]
    assert len(waits) <= 1, [f"{w.filename}:{w.lineno}" for w in waits]


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_infinite_gradient_is_said_a_step_later_and_changes_nothing(
    clip: float, dataset: data.Dataset, tmp_path: Path
) -> None:
    for steps in (3, 8):  # at the last step it is said at once
        model, seen = Steep(3).cuda(), []
        with pytest.raises(TrainingError, match=r"norm of the gradients is (nan|inf) \[at step 3,"):
            train.fit(
                model, dataset.train, out_dir=tmp_path / str(steps), steps=steps, batch_size=8, clip=clip,
                on_step=lambda _, m, seen=seen: seen.append(m.w.tolist()),
            )  # fmt: skip
        assert model.w.tolist() == seen[1]


def test_a_resumed_run_on_the_gpu_ends_as_a_whole_one(dataset: data.Dataset, tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    def cut(step: int, _: torch.nn.Module) -> None:
        if step == 3:
            raise Cut

    options: dict[str, Any] = {"steps": 5, "batch_size": 8, "save_every": 2}
    whole, resumed = bert().cuda(), bert().cuda()
    train.fit(whole, dataset.train, out_dir=tmp_path / "whole", **options)
    with pytest.raises(Cut):
        train.fit(resumed, dataset.train, out_dir=tmp_path / "cut", on_step=cut, **options)
    train.fit(resumed, dataset.train, out_dir=tmp_path / "cut", **options)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
