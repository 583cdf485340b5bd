"""SQuAD 1.1 as a data set of the ordinary job (job.py), and how it is measured."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kdlsq_fx import job
from kdlsq_fx.data import Dataset, Task
from kdlsq_fx.evaluation import evaluate_tokens
from kdlsq_fx.squad import find_file, read_squad
from kdlsq_fx.squad_answers import texts_of
from kdlsq_fx.squad_metrics import per_question, squad_scores
from kdlsq_fx.squad_windows import STRIDE, Windows, make_windows

SQUAD = Task(name="squad", metric="squad", max_length=384, labels=("start", "end"), spans=True)


@dataclass(frozen=True)
class SquadDataset(Dataset):
    """``train``: windows with labels, or None where nothing is trained; ``dev``: those of the measured split, without
    labels."""

    train: Windows | None
    dev: Windows


def load(
    source: str | Path,
    tokenizer: Any,
    *,
    split: str = "dev",
    max_length: int | None = None,
    doc_stride: int = STRIDE,
    training: bool = True,
    device: str = "cpu",
) -> SquadDataset:
    """Read a folder (squad.py) and make its windows (squad_windows.py). ``split``: the one that is measured.
    Without ``training`` no train file is read, unless it is that one."""
    task = SQUAD if max_length is None else replace(SQUAD, max_length=max_length)
    make = partial(make_windows, tokenizer=tokenizer, max_length=task.max_length, stride=doc_stride)
    dev = make(read_squad(find_file(source, split)), title=split)
    train = make(read_squad(find_file(source, "train")), labelled=True, title="train") if training else None
    return SquadDataset(task, train, dev, device)


def notes(dataset: SquadDataset) -> list[str]:
    """What the user should know about how the folder was read."""
    told = [f"measured: {len(dataset.dev.squad.questions)} questions in {len(dataset.dev)} windows"]
    train = dataset.train
    if train is None or train.labels is None:
        return told
    asked, used = len(train.squad.questions), len({p.question for p in train.places})
    lacks = int((train.labels == 0).all(axis=1).sum())
    told.append(f"train: {used} questions in {len(train)} windows, {lacks} of them without the whole answer")
    if asked > used:
        told.append(f"train: {asked - used} questions are left out, their answers have no certain place or no token")
    return told


def measure(
    name: str, preset: str, model: Any, dataset: SquadDataset, *, size: int = 0, batch_size: int = 32
) -> job.Row:
    """One line of the table: EM and F1 over all questions. ``predictions`` are the answers' texts, and ``labels`` the
    texts that count as right, both in the file's order."""
    began = time.monotonic()
    with job.on_device(model, dataset.device):
        logits = evaluate_tokens(model, dataset.dev, batch_size=batch_size, title=f"eval {name}")
    seconds = time.monotonic() - began
    guess = texts_of(dataset.dev, logits)
    answers = [list(q.answers) for q in dataset.dev.squad.questions]
    return job.Row(name, preset, squad_scores(per_question(guess, answers)), size, seconds, guess, answers)
