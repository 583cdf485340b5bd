"""What each process of a group runs in tests/test_processes.py: ``torchrun tests/ranks.py SCENARIO FOLDER``.

Importable too, so that the test runs the same function in one process.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_glue import bert, tokenizer

from kdlsq_fx import data, processes, train
from kdlsq_fx.api import prepare_qat
from kdlsq_fx.calibration import calibrate, param_groups
from kdlsq_fx.distillation import distill
from kdlsq_fx.errors import TrainingError
from kdlsq_fx.kd_cache import Cache
from kdlsq_fx.kd_cache_build import build_cache

STEPS = {"W2E2A8": 50}  # of the other cases 15
# Qconfig and options of the loss, in float64: two processes add up in another order than one, in float32 codes flip at
# near-ties, and curves part after some twenty steps, as they do when the rows of a batch are reordered. SAME_SUMS: two
# micro-batches are added up as two processes are, so that float32, dropout and all are the very same.
CASES: dict[str, dict[str, Any]] = {
    "W2E2A8": {},
    "W4E4A8-lsq+": {"logits": 0.0, "padding": "paper"},  # the head is returned and gets no gradient
    "W8E8A8-ema": {"gold": 1.0},
    "W4E4A8": {"cached": True},  # no teacher
}
SAME_SUMS: dict[str, Any] = {"micro_batches": 2, "steps": 50, "plain": True}


class Cut(Exception):
    pass


def cached(rows: data.Encoded, folder: Path) -> Cache:
    """The teacher's targets of all rows; read by the processes from where one has put them."""
    if not folder.exists():
        build_cache(loop("W2E2A8", rows), rows, folder, store="fp32")
    return Cache.open(folder)


def loop(case: str, rows: data.Encoded, cache: Path | None = None, *, plain: bool = False) -> Any:
    """A distilled student, in float64 and without dropout unless ``plain``; other processes than the first calibrate on
    other batches."""
    torch.manual_seed(0)
    still = {} if plain else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    qat = prepare_qat(bert(**still), case)
    calibrate(qat, rows.sample(2, batch_size=8, seed=processes.rank()), progress=False)
    teacher = bert(**still).eval()
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(1.5)
    options = CASES.get(case, {})
    kd = distill(qat, cache=cached(rows, cache)) if cache and "cached" in options else distill(qat, teacher, **options)
    return kd if plain else kd.double()


def run(case: str, folder: Path, out: Path, *, stop_at: int = 0, plain: bool = False, **options: Any) -> Any:
    """Train for so many steps; the first step's gradients and the last weights are written by the first process."""
    rows = data.load(folder, tokenizer()).train
    cache = folder / "cache" if "cached" in CASES[case] else None
    kd = loop(case, rows, cache, plain=plain)
    source = rows if cache is None else cached(rows, cache).source(rows)

    def on_step(step: int, _: torch.nn.Module) -> None:
        if step == 1 and processes.first():
            grads = {k: p.grad.clone() for k, p in kd.named_parameters() if p.grad is not None}
            save_file(grads, out / "gradients.safetensors")
        if step == stop_at:
            raise Cut

    train.fit(
        kd, source, out_dir=out, lr=1e-4, seed=7, save_every=10, on_step=on_step,
        groups=param_groups(kd, lr=1e-4, lr_scale_act=1e-3),
        **{"steps": STEPS.get(case, 15), "batch_size": 8} | options,
    )  # fmt: skip
    if processes.first():
        save_file({k: v.clone() for k, v in kd.state_dict().items()}, out / "weights.safetensors")
    same_everywhere(kd)
    return kd


def same_everywhere(module: torch.nn.Module) -> None:
    """Every process ends with the very same parameters and buffers."""
    for tensor in (*module.parameters(), *module.buffers()):
        value = tensor.detach().double()
        assert torch.equal(processes.largest(value), value) and torch.equal(-processes.largest(-value), value)


def curves(folder: Path, out: Path) -> None:
    processes.join()
    for case in CASES:
        run(case, folder, out / case)
    run("W2E2A8", folder, out / "one-row", batch_size=1, steps=8)  # one process has no row at all
    run("W2E2A8", folder, out / "same-sums", **SAME_SUMS)
    run("W4E4A8-lsq+", folder, out / "in-four", micro_batches=4)
    run("W2E2A8", folder, out / "begun-alone")
    with suppress(Cut):
        run("W2E2A8", folder, out / "begun-together", stop_at=25)
    processes.leave()


def slow(folder: Path, out: Path) -> None:
    """A run that takes long enough to be interrupted."""
    rows = data.load(folder, tokenizer()).train
    try:
        train.fit(bert(), rows, out_dir=out, steps=2000, batch_size=8, on_step=lambda *_: time.sleep(0.1))
    except train.Interrupted as e:
        print(f"process {processes.rank()}: {e}", flush=True)
        sys.exit(130)


def fails(folder: Path, out: Path) -> None:
    """The second process breaks at step 4."""
    rows = data.load(folder, tokenizer()).train

    def on_step(step: int, _: torch.nn.Module) -> None:
        if step == 4 and processes.rank() == 1:
            raise ValueError("a broken shard")

    train.fit(bert(), rows, out_dir=out, steps=2000, batch_size=8, save_every=2, on_step=on_step)


class Steep(torch.nn.Module):
    """A finite loss whose gradient is infinite from its call number ``at`` on."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.w, self.at, self.calls = torch.nn.Parameter(torch.ones(3)), at, 0

    def forward(self, **_: Any) -> Any:
        self.calls += 1
        bend = (self.w - self.w.detach()).abs().sqrt()  # sqrt has no slope at 0
        return SimpleNamespace(loss=(bend if self.calls >= self.at else self.w).sum())


def steep(folder: Path, out: Path) -> None:
    """The second process has an infinite gradient at step 3."""
    model = Steep(3 if os.environ["RANK"] == "1" else 99)
    try:
        train.fit(model, data.load(folder, tokenizer()).train, out_dir=out, steps=5, batch_size=8, clip=1.0)
    except TrainingError as e:
        (out / f"said-{processes.rank()}.txt").write_text(f"{e} {model.w.tolist()}")


def trainer(folder: Path, out: Path, rows: int = 4) -> None:
    """The Hugging Face Trainer and plain accelerate around a distilled student, so many rows a process and step."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    encoded = data.load(folder, tokenizer()).train.head(64)
    examples = [{k: v[0] for k, v in encoded.batch([i]).items()} for i in range(64)]
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=4, per_device_train_batch_size=rows, use_cpu=True, optim="sgd", seed=0,
        report_to=[], save_strategy="no", logging_steps=1, learning_rate=1e-2, max_grad_norm=0, disable_tqdm=True,
    )  # fmt: skip
    collate = DataCollatorWithPadding(tokenizer())
    kd = loop("W8E8A8-lsq+", encoded)
    Trainer(model=kd, args=arguments, train_dataset=examples, data_collator=collate).train()
    same_everywhere(kd)
    if processes.first():
        save_file({k: v.clone() for k, v in kd.state_dict().items()}, out / "weights.safetensors")

    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    kd = loop("W2E2A8", encoded)
    optimizer = torch.optim.AdamW(param_groups(kd, lr=1e-3))
    loader = torch.utils.data.DataLoader(examples, batch_size=rows, collate_fn=collate)  # type: ignore[arg-type]
    wrapped, optimizer, loader = accelerator.prepare(kd.train(), optimizer, loader)
    for batch in loader:
        accelerator.backward(wrapped(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    same_everywhere(kd)
    if processes.first():
        save_file({k: v.clone() for k, v in kd.state_dict().items()}, out / "accelerate.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    scenario = {"curves": curves, "slow": slow, "fails": fails, "steep": steep, "trainer": trainer}[sys.argv[1]]
    scenario(Path(sys.argv[2]), Path(sys.argv[3]))
