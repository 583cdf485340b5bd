"""KG-BERT's three tasks as data sets of the ordinary job (job.py), and how each is measured.

kg-triples     is a triple true? accuracy
kg-links       which entity is missing? ranks among all entities, filtered
kg-relations   which relation holds between two entities? ranks among all relations, filtered
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdlsq_fx import job
from kdlsq_fx.data import Dataset, Encoded, Task
from kdlsq_fx.errors import InputError
from kdlsq_fx.evaluation import evaluate
from kdlsq_fx.kg_graph import RELATION, Graph, Triples, read_graph
from kdlsq_fx.kg_metrics import FIGURES, rank_scores, relation_ranks
from kdlsq_fx.kg_negatives import Fresh, with_negatives
from kdlsq_fx.kg_progress import identity
from kdlsq_fx.kg_ranking import Plan, rank
from kdlsq_fx.kg_text import Texts

NEGATIVES = {"kg-triples": 1, "kg-links": 5, "kg-relations": 0}  # of a true triple in training: the released scripts'
MEASURED_SEED = 42  # of the false triples that a measured split lacks
# tokens of a sequence in the released scripts, by folder name without `kg` and signs; 128 for others
MAX_LENGTH = {"umls": 15, "wn11": 20, "fb13": 200, "fb15k": 25, "wn18rr": 50, "fb15k237": 150}


@dataclass(frozen=True, kw_only=True)
class KgDataset(Dataset):
    """A task of a graph. ``dev`` holds the sequences of the measured split (of kg-links its true triples alone, whose
    ranks are measured). ``batch_size``: of measuring. ``states``: folder where rankings are written down, None for
    none; ``finished``: those that were, this far."""

    kind: str
    graph: Graph
    texts: Texts
    split: str
    measured: Triples
    batch_size: int = 256
    states: Path | None = None
    finished: list[Path] = field(default_factory=list)

    def extents(self, *, train: bool = True) -> dict[str, tuple[int, int, int]]:
        """Of all sequences of the graph: ranks and negatives take any entity."""
        return {self.graph.name: self.texts.extent(relations=self.kind != "kg-relations")}


def load(
    source: str | Path,
    tokenizer: Any,
    kind: str,
    *,
    split: str = "dev",
    max_length: int | None = None,
    negatives: int | None = None,
    fresh: bool = False,
    seed: int = 42,
    long_texts: bool = False,
    **fields: Any,
) -> KgDataset:
    """Read a graph and tokenize it for one of the tasks. ``negatives`` of each true triple in training (None: as
    ``NEGATIVES``), drawn once from ``seed``, or with ``fresh`` in every epoch. A measured split without false triples
    gets one for each true one in kg-triples, which no split knows as true, the same for every ``seed``. ``fields``: of
    :class:`KgDataset`."""
    graph = read_graph(source, long_texts=long_texts)
    if split not in graph.splits:
        raise InputError(f"no {split} file", where=str(source), do=f"splits here: {', '.join(graph.splits)}")
    length = max_length or MAX_LENGTH.get(re.sub(r"^kg|[^a-z0-9]", "", graph.name.lower()), 128)
    texts = Texts(graph, tokenizer, max_length=length)
    classes = graph.relations if kind == "kg-relations" else ("0", "1")
    task = Task(name=graph.name, metric="accuracy", labels=classes, max_length=length)
    per = NEGATIVES[kind] if negatives is None else negatives
    train = _train(graph, texts, kind, per=per, fresh=fresh, seed=seed)
    measured = _measured(graph, kind, split)
    if kind == "kg-relations":
        dev = texts.pairs(measured.rows, measured.rows[:, RELATION])
    else:
        dev = texts.triples(measured.rows, measured.labels)
    return KgDataset(task, train, dev, kind=kind, graph=graph, texts=texts, split=split, measured=measured, **fields)


def _train(graph: Graph, texts: Texts, kind: str, *, per: int, fresh: bool, seed: int) -> Encoded | Fresh:
    rows = graph.splits["train"].true
    if kind == "kg-relations":
        return texts.pairs(rows, rows[:, RELATION])
    if per < 1:
        raise InputError("without false triples there is nothing to tell apart", do="draw 1 negative or more")
    if fresh:
        return Fresh(rows, graph.facts("train"), texts, per=per, seed=seed)
    made = with_negatives(rows, graph.facts("train"), per=per, seed=seed)
    return texts.triples(made.rows, made.labels)


def _measured(graph: Graph, kind: str, split: str) -> Triples:
    """The triples of the split that the task is measured on."""
    found = graph.splits[split]
    if not len(found.true):
        raise InputError(f"{split} holds no true triple", where=graph.name, do="label true triples 1")
    if kind != "kg-triples":
        return Triples(found.true, np.ones(len(found.true), dtype=np.int64))
    if not found.labels.all():
        return found
    return with_negatives(found.rows, graph.facts(), per=1, seed=MEASURED_SEED)


def notes(dataset: KgDataset) -> list[str]:
    """What the user should know about how the folder was read."""
    made = len(dataset.measured) - len(dataset.graph.splits[dataset.split])
    drew = [f"{dataset.split} holds no false triples: {made} were drawn, one for each true one"] if made > 0 else []
    return [*dataset.graph.notes, *drew]


def figures(kind: str) -> tuple[str, ...]:
    """The names of the figures of a task; () for those of its metric."""
    return () if kind == "kg-triples" else tuple(FIGURES)


def measure(name: str, preset: str, model: Any, dataset: KgDataset, *, size: int = 0) -> job.Row:
    """One line of the table. Ranks stand in ``predictions``, head and tail of each triple in turn."""
    if dataset.kind == "kg-triples":
        return job.measure(name, preset, model, dataset, size=size, batch_size=dataset.batch_size)
    began = time.monotonic()
    if dataset.kind == "kg-relations":
        ranks, seconds = _rank_relations(model, dataset), time.monotonic() - began
    else:
        title, plan = f"rank {preset} {name}", Plan(dataset.measured.rows, dataset.graph.facts())
        state = _state(model, plan, dataset, title)
        with job.on_device(model, dataset.device):
            done = rank(model, plan, dataset.texts, batch_size=dataset.batch_size, state=state, title=title)
        dataset.finished.extend([state] if state else [])
        ranks, seconds = done.ranks, done.seconds
    scores = rank_scores(ranks, "Hits@1" if dataset.kind == "kg-relations" else "Hits@10")  # the papers' own
    return job.Row(name, preset, scores, size, seconds, ranks.reshape(-1).tolist(), [])


def _state(model: Any, plan: Plan, dataset: KgDataset, title: str) -> Path | None:
    """The file of a ranking, named by what it is of: one of other weights, triples or lengths has another name."""
    if dataset.states is None:
        return None
    name = re.sub(r"[^A-Za-z0-9]+", "-", title)
    return dataset.states / f"{name}-{identity(model, plan.triples, plan.facts, dataset.texts)[:12]}.safetensors"


def _rank_relations(model: Any, dataset: KgDataset) -> np.ndarray:
    """Filtered ranks of the true relations: float64 [triples, 1]."""
    with job.on_device(model, dataset.device):
        logits = evaluate(model, dataset.dev, batch_size=dataset.batch_size, title="eval relations")
    width = len(dataset.graph.relations)
    if logits.shape[1] != width:
        do = "evaluate a model that `kdlsq-fx train --task kg-relations` made on this graph"
        raise InputError(f"the model has {logits.shape[1]} outputs, the graph {width} relations", do=do)
    rows, facts = dataset.measured.rows, dataset.graph.facts()
    every = np.repeat(rows[:, None], width, axis=1)
    every[:, :, RELATION] = np.arange(width)
    return relation_ranks(logits, rows, facts.hold(every))
