"""Knowledge graphs: the layout, sequences of three parts, negatives, ranks, and a ranking that is stopped."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_glue import bert, tokenizer
from tiny_graph import write_graph

from kdlsq_fx import kg_job, kg_ranking, metrics
from kdlsq_fx.data import Task
from kdlsq_fx.errors import CheckpointError, ConfigError, InputError
from kdlsq_fx.kg_graph import Facts, Graph, read_graph
from kdlsq_fx.kg_metrics import rank_difference, rank_scores, relation_ranks
from kdlsq_fx.kg_negatives import Fresh, corrupt, with_negatives
from kdlsq_fx.kg_ranking import Plan, rank, ranks_of
from kdlsq_fx.kg_text import Texts, shorten
from kdlsq_fx.train import Interrupted

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import kg  # noqa: E402

KG = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_graph(tmp_path_factory.mktemp("kg") / "graph")


@pytest.fixture(scope="module")
def graph(folder: Path) -> Graph:
    return read_graph(folder)


@pytest.fixture(scope="module")
def texts(graph: Graph) -> Texts:
    return Texts(graph, tokenizer(), max_length=12)


# --- the layout


def test_both_layouts_are_the_same_graph(tmp_path: Path, graph: Graph) -> None:
    """With a header and .tsv, and as KG-BERT ships them: no header, texts in .txt."""
    plain = read_graph(write_graph(tmp_path / "graph", header=False))
    assert plain.fingerprint == graph.fingerprint and len(graph.entities) == 20 and graph.relations == ("very", "not")
    assert set(graph.splits) == {"train", "dev", "test"} and graph.splits["dev"].labels.all()


def test_labels_are_one_and_minus_one(tmp_path: Path) -> None:
    found = read_graph(write_graph(tmp_path / "graph", labelled=True)).splits["dev"]
    assert set(found.labels) == {0, 1} and (found.labels == 0).sum() > 20


def test_names_that_are_listed_count(tmp_path: Path, graph: Graph) -> None:
    there = write_graph(tmp_path / "graph")
    with (there / "entity2text.tsv").open("a") as file:
        file.write("nobody\tthe film\n")
    assert len(read_graph(there).entities) == 21
    (there / "entities.txt").write_text("\n".join(graph.entities) + "\n")
    assert read_graph(there).entities == graph.entities


BAD = {
    "unknown entity": ("dev.tsv", "good0\tvery\tghost", "unknown entity 'ghost'", "dev.tsv:32"),
    "unknown relation": ("dev.tsv", "good0\tloves\tbad0", "unknown relation 'loves'", "dev.tsv:32"),
    "columns": ("train.tsv", "good0 very bad0", "1 cells", "train.tsv:"),
    "cell": ("train.tsv", "good0\t\tbad0", "an empty cell", "train.tsv:"),
    "text": ("entity2text.tsv", "ghost", "1 cells", "entity2text.tsv:22"),
    "second text": ("relation2text.tsv", "very\tanother", "a second text of 'very'", "relation2text.tsv:4"),
    "label": ("dev.tsv", "good0\tvery\tbad0\tyes", "bad label 'yes'", "dev.tsv:32"),
    "false in train": ("train.tsv", "good0\tvery\tbad0\t-1", "train holds false triples", "train.tsv"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lines_are_told_with_file_and_line(tmp_path: Path, case: str) -> None:
    name, line, says, where = BAD[case]
    there = write_graph(tmp_path / "graph")
    with (there / name).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=says) as told:
        read_graph(there)
    assert where in str(told.value)


def test_files_that_are_absent_or_empty(tmp_path: Path) -> None:
    there = write_graph(tmp_path / "graph")
    with pytest.raises(InputError, match="no such folder"):
        read_graph(tmp_path / "nowhere")
    for name, text in (("dev.tsv", ""), ("train.tsv", "head\trelation\ttail\n"), ("entity2text.tsv", "\n\n")):
        before = (there / name).read_text()
        (there / name).write_text(text)
        with pytest.raises(InputError, match="no rows"):
            read_graph(there)
        (there / name).write_text(before)
    (there / "relation2text.tsv").unlink()
    with pytest.raises(InputError, match="no relation2text file"):
        read_graph(there)


def test_a_triple_twice_and_one_that_is_both(tmp_path: Path) -> None:
    there = write_graph(tmp_path / "graph", labelled=True)
    first = (there / "dev.tsv").read_text().splitlines()[1]
    with (there / "dev.tsv").open("a") as file:
        file.write(first + "\n")
    found = read_graph(there)
    assert found.notes == ("dev.tsv: 1 triples stood there more than once and are kept once",)
    with (there / "dev.tsv").open("a") as file:
        file.write(first[:-1] + "-1\n")
    with pytest.raises(InputError, match="both true and false"):
        read_graph(there)


# --- sequences


def test_three_parts_with_their_types(graph: Graph, texts: Texts) -> None:
    tok, rows = tokenizer(), graph.splits["dev"].rows[:7]
    data = texts.triples(rows, np.arange(7))
    for i, (h, r, t) in enumerate(rows):
        parts = [graph.entity_texts[h], graph.relation_texts[r], graph.entity_texts[t]]
        ids, types = [tok.cls_token_id], [0]
        for kind, text in zip((0, 1, 0), parts):
            tokens = tok(text, add_special_tokens=False)["input_ids"]
            ids, types = ids + tokens + [tok.sep_token_id], types + [kind] * (len(tokens) + 1)
        span = slice(data.starts[i], data.starts[i + 1])
        assert data.ids[span].tolist() == ids and data.types is not None and data.types[span].tolist() == types
    assert data.batch([3])["labels"].tolist() == [3]


def test_pairs_are_what_the_tokenizer_makes_of_two_texts(graph: Graph, texts: Texts) -> None:
    rows = graph.splits["dev"].rows
    data = texts.pairs(rows)
    want = tokenizer()([graph.entity_texts[h] for h in rows[:, 0]], [graph.entity_texts[t] for t in rows[:, 2]])
    assert data.ids.tolist() == [i for row in want["input_ids"] for i in row]
    assert data.types is not None and data.types.tolist() == [i for row in want["token_type_ids"] for i in row]


@given(st.lists(st.lists(st.integers(1, 30), min_size=3, max_size=3), min_size=1, max_size=9), st.integers(3, 40))
def test_the_longest_part_is_cut_one_token_at_a_time(lengths: list[list[int]], room: int) -> None:
    got = shorten(np.array(lengths), room)
    for row, cut in zip(lengths, got.tolist()):
        parts = list(row)
        while sum(parts) > room:
            parts[max(range(3), key=lambda k: (parts[k], k))] -= 1
        assert cut == parts and min(parts) >= 1


def test_lengths_that_hold_no_triple(graph: Graph) -> None:
    with pytest.raises(ConfigError, match="6 tokens hold no triple"):
        Texts(graph, tokenizer(), max_length=6)
    short = Texts(graph, tokenizer(), max_length=7).triples(graph.splits["dev"].rows)
    assert (short.lengths == 7).all()


# --- negatives


@given(st.integers(0, 10**6), st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_negatives_are_false_on_one_side_and_reproducible(seed: int, per: int) -> None:
    rng = np.random.default_rng(seed)
    entities, relations = 6, 2
    rows = np.unique(rng.integers(0, (entities, relations, entities), (25, 3)), axis=0)  # a third of all are true
    facts = Facts(rows, entities, relations)
    made = with_negatives(rows, facts, per=per, seed=seed)
    again = with_negatives(rows, facts, per=per, seed=seed)
    assert np.array_equal(made.rows, again.rows)
    true = set(map(tuple, rows.tolist()))
    groups = made.rows.reshape(-1, 1 + per, 3)
    assert np.array_equal(groups[:, 0], rows) and (made.labels.reshape(-1, 1 + per)[:, 0] == 1).all()
    assert made.labels.sum() == len(rows)
    for group in groups:
        assert not true & set(map(tuple, group[1:].tolist()))
        changed = (group[1:] != group[0]).any(axis=0)
        assert not changed[1] and changed.sum() == 1  # the relation stays, and one side only


def test_both_sides_and_all_entities_are_drawn(graph: Graph) -> None:
    rows = np.repeat(graph.splits["train"].true[:1], 4000, axis=0)
    facts = Facts(rows[:1], 20, 2)
    made = corrupt(rows, facts, per=1, rng=np.random.default_rng(0))[:, 0]
    heads = made[:, 0] != rows[0, 0]
    assert abs(heads.mean() - 0.5) < 0.04  # 5 standard errors
    counts = np.bincount(made[heads, 0], minlength=20)
    assert np.count_nonzero(counts) == 19 and counts.max() < 1.6 * heads.sum() / 19


def test_a_side_that_is_full_is_left_for_the_other() -> None:
    rows = np.array([[0, 0, t] for t in range(4)])  # 0 relates to all: only heads can be false
    made = corrupt(rows, Facts(rows, 4, 1), per=3, rng=np.random.default_rng(0))
    assert (made[..., 2] == rows[:, None, 2]).all() and (made[..., 0] != 0).all()
    full = np.array([[h, 0, t] for h in range(3) for t in range(3)])
    with pytest.raises(InputError, match="no false triple can be made"):
        corrupt(full, Facts(full, 3, 1), per=1, rng=np.random.default_rng(0))


def test_fresh_negatives_change_with_the_epoch_alone(graph: Graph, texts: Texts) -> None:
    rows, facts = graph.splits["train"].true, graph.facts("train")
    a, b = (Fresh(rows, facts, texts, per=2, seed=3) for _ in range(2))
    order = a.order(batch_size=16, seed=1, epoch=1)
    assert sorted(np.concatenate(order)) == list(range(len(a), 2 * len(a)))
    first = a.batch(a.order(batch_size=16, seed=1, epoch=0)[0])
    assert set(first) >= {"labels", "token_type_ids"} and a.fingerprint == b.fingerprint
    for batch in order[:3]:
        assert torch.equal(a.batch(batch)["input_ids"], b.batch(batch)["input_ids"])
    assert not np.array_equal(a.epoch(0).ids, a.epoch(1).ids)
    assert a.fingerprint != Fresh(rows, facts, texts, per=2, seed=4).fingerprint


# --- ranks


class Table:
    """A model whose score of a triple is looked up by its tokens; it counts the sequences it saw."""

    def __init__(self, texts: Texts, scores: np.ndarray, rows: np.ndarray) -> None:
        data = texts.triples(rows)
        self.scores = {tuple(data.ids[a:b]): s for a, b, s in zip(data.starts, data.starts[1:], scores)}
        self.seen = 0

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        self.seen += len(input_ids)
        keys = [tuple(row[: mask.sum()].tolist()) for row, mask in zip(input_ids.numpy(), attention_mask)]
        return torch.tensor([[7.0, self.scores[k]] for k in keys])


def brute_force(graph: Graph, score: dict[tuple[int, ...], float], split: str) -> np.ndarray:
    """Ranks as they are defined, one entity after the other."""
    known = {tuple(r) for t in graph.splits.values() for r in t.true.tolist()}
    out = []
    for row in graph.splits[split].true.tolist():
        pair = []
        for side in (0, 2):
            rivals = [tuple(row[:side] + [e] + row[side + 1 :]) for e in range(len(graph.entities))]
            values = [score[r] for r in rivals if r not in known]
            mine = score[tuple(row)]
            pair.append(1 + sum(v > mine for v in values) + sum(v == mine for v in values) / 2)
        out.append(pair)
    return np.array(out)


def every(graph: Graph) -> np.ndarray:
    sizes = len(graph.entities), len(graph.relations), len(graph.entities)
    return np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), axis=-1).reshape(-1, 3)


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("split", ["dev", "train"])
def test_ranks_are_those_of_the_definition(
    folder: Path, levels: int, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few levels: many ties. Small chunks: many of them. Entities with the same text get the same score."""
    monkeypatch.setattr(kg_ranking, "CHUNK", 50)
    graph = read_graph(folder)
    texts = Texts(graph, tokenizer(), max_length=12)
    rows = every(graph)
    model = Table(texts, np.random.default_rng(levels).integers(levels, size=len(rows)).astype(np.float32), rows)
    data = texts.triples(rows)
    spans = [tuple(data.ids[a:b]) for a, b in zip(data.starts, data.starts[1:])]
    score = {tuple(r): float(model.scores[s]) for r, s in zip(rows.tolist(), spans)}
    plan = Plan(graph.splits[split].true, graph.facts())
    got = rank(model, plan, texts, batch_size=7)
    assert np.array_equal(got.ranks, brute_force(graph, score, split))
    assert model.seen == got.sequences == sum(len(plan.question(i).rows) for i in range(len(plan)))
    if split == "dev":
        asked = {(s, r[1], r[2 - s]) for r in graph.splits[split].true.tolist() for s in (0, 2)}
        assert len(plan) == len(asked) and got.sequences < 2 * 30 * 20  # a question that is asked twice is scored once


@given(st.lists(st.integers(0, 4), min_size=2, max_size=12), st.data())
def test_expected_ranks(values: list[int], data: st.DataObject) -> None:
    """The mean of the ranks over all orders in which equal scores can stand: of the best and the worst of them."""
    scores = np.array(values, dtype=np.float32)
    k = data.draw(st.integers(1, len(values) - 1))
    answers = np.array(data.draw(st.permutations(range(len(values)))))[:k]
    rivals = np.delete(scores, answers)
    for got, answer in zip(ranks_of(scores, answers), answers):
        best, worst = 1 + sum(rivals > scores[answer]), 1 + sum(rivals >= scores[answer])
        assert got == (best + worst) / 2


def test_figures_of_ranks() -> None:
    ranks = np.array([[1, 2.5], [1, 10], [40, 4]])
    got = rank_scores(ranks)
    assert got["MR"] == pytest.approx(58.5 / 6) and got["Hits@1"] == pytest.approx(100 * 2 / 6)
    assert got["MRR"] == pytest.approx(100 * (1 + 1 / 2.5 + 1 + 0.1 + 1 / 40 + 1 / 4) / 6)
    assert rank_scores(ranks, "Hits@1")["headline"] == got["Hits@1"]
    assert got["Hits@3"] == pytest.approx(50) and got["Hits@10"] == got["headline"] == pytest.approx(500 / 6)
    assert got["MR_se"] == pytest.approx(np.std([1.75, 5.5, 22], ddof=1) / 3**0.5)
    assert rank_difference(ranks, ranks, "MR") == (0, 0)
    assert rank_difference(ranks + 1, ranks, "MR")[0] == pytest.approx(1)
    for bad in (np.zeros((0, 2)), np.array([[np.nan, 1]]), np.array([[0.5, 1]])):
        with pytest.raises(InputError, match="no ranks"):
            rank_scores(bad)


def test_what_the_benchmark_computes_of_its_own(graph: Graph) -> None:
    """The paired error without labels is the bootstrap's with them; the other answers are counted one by one."""
    rng = np.random.default_rng(0)
    labels, flips = rng.integers(2, size=900), rng.random((2, 900)) < [[0.1], [0.2]]
    a, b = np.where(flips, 1 - labels, labels)
    gap, error = metrics.difference(Task(name="x", metric="accuracy"), a, b, labels)
    assert kg.accuracy_error(a, b, gap) == pytest.approx(error, rel=0.1)
    rows = graph.splits["dev"].rows
    pairs = [[(np.delete(x, side) == np.delete(y, side)).all() for x in rows for y in rows] for side in (0, 2)]
    assert kg.other_answers(rows) == pytest.approx(np.sum(pairs) / (2 * len(rows)) - 1)


def test_ranks_of_relations() -> None:
    logits = np.array([[3.0, 2, 2, 1], [0, 5, 5, 5]])
    known = np.array([[True, False, True, False], [False, True, False, False]])
    got = relation_ranks(logits, np.array([[0, 2, 1], [0, 1, 1]]), known)
    assert got.tolist() == [[1.5], [2.0]]  # relation 0 is true as well; two others as good
    with pytest.raises(InputError, match="NaN"):
        relation_ranks(np.full((1, 4), np.nan), np.array([[0, 2, 1]]), known[:1])  # would rank first


def test_what_cannot_be_ranked(graph: Graph, texts: Texts) -> None:
    plan = Plan(graph.splits["dev"].true, graph.facts())
    with pytest.raises(InputError, match="two logits"):
        rank(bert(num_labels=3), plan, texts)
    with pytest.raises(InputError, match="NaN"):
        rank(lambda input_ids, **_: torch.full((len(input_ids), 2), torch.nan), plan, texts)
    with pytest.raises(InputError, match="no true triples"):
        Plan(graph.splits["dev"].true[:0], graph.facts())
    with pytest.raises(InputError, match="no known fact"):
        Plan(graph.splits["dev"].true, graph.facts("train"))


# --- a ranking that is stopped


@pytest.mark.parametrize("stop", [1, 6, 40])
def test_an_interrupted_ranking_goes_on_and_scores_nothing_twice(
    tmp_path: Path, graph: Graph, texts: Texts, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kg_ranking, "CHUNK", 100)
    rows, plan = every(graph), Plan(graph.splits["dev"].true, graph.facts())
    model = Table(texts, np.random.default_rng(0).normal(size=len(rows)).astype(np.float32), rows)
    whole = rank(model, plan, texts, batch_size=8)
    model.seen, calls, state = 0, 0, tmp_path / "a" / "ranks.safetensors"

    def stopped(**batch: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return model(**batch)

    with pytest.raises(Interrupted, match=rf"of {whole.sequences} sequences; saved in .*run again"):
        rank(stopped, plan, texts, batch_size=8, state=state)
    assert 0 < model.seen < whole.sequences
    again = rank(model, plan, texts, batch_size=5, state=state)  # another batch size does no harm
    assert np.array_equal(again.ranks, whole.ranks) and model.seen == whole.sequences
    assert np.array_equal(rank(model, plan, texts, state=state).ranks, whole.ranks) and model.seen == whole.sequences


@pytest.mark.parametrize(
    ("error", "told", "says"),
    [(OSError("the disk is gone"), OSError, "disk"), (KeyboardInterrupt(), Interrupted, r"of \d+ sequences; saved in")],
)  # the second comes in the middle of a batch: Ctrl-C for the second time
def test_a_failing_model_loses_nothing(
    tmp_path: Path, graph: Graph, texts: Texts, error: BaseException, told: type[BaseException], says: str
) -> None:
    rows, plan = every(graph), Plan(graph.splits["dev"].true, graph.facts())
    model, state = Table(texts, np.arange(len(rows), dtype=np.float32), rows), tmp_path / "ranks.safetensors"

    def failing(**batch: torch.Tensor) -> torch.Tensor:
        if model.seen > 300:
            raise error
        return model(**batch)

    with pytest.raises(told, match=says):
        rank(failing, plan, texts, batch_size=8, state=state)
    rank(model, plan, texts, batch_size=8, state=state)
    assert model.seen == rank(model, plan, texts, state=state).sequences


def test_a_state_of_another_ranking_is_refused(tmp_path: Path, graph: Graph, texts: Texts) -> None:
    state, facts = tmp_path / "ranks.safetensors", graph.facts()
    model = bert()
    rank(model, Plan(graph.splits["test"].true, facts), texts, state=state)
    other = bert()
    with torch.no_grad():
        other.classifier.bias[1] += 1e-3
    for again, rows, length in ((other, "test", 12), (model, "dev", 12), (model, "test", 9)):
        of = Texts(graph, tokenizer(), max_length=length)
        with pytest.raises(CheckpointError, match="another ranking"):
            rank(again, Plan(graph.splits[rows].true, facts), of, state=state)
    half = bert().to(torch.bfloat16)  # NumPy has no such type
    rank(half, Plan(graph.splits["test"].true, facts), texts, state=tmp_path / "half.safetensors")
    state.write_bytes(state.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="damaged"):
        rank(model, Plan(graph.splits["test"].true, facts), texts, state=state)


# --- the tasks


def test_kg_triples_draws_what_the_split_lacks(folder: Path, tmp_path: Path) -> None:
    made = kg_job.load(folder, tokenizer(), "kg-triples")
    assert len(made.dev) == 60 and made.dev.labels is not None and made.dev.labels.sum() == 30
    assert not made.graph.facts().hold(made.measured.rows[made.measured.labels == 0]).any()
    other = kg_job.load(folder, tokenizer(), "kg-triples", seed=7)
    assert np.array_equal(other.measured.rows, made.measured.rows)  # what is measured depends on no seed
    assert other.train.fingerprint != made.train.fingerprint
    assert kg_job.notes(made) == ["dev holds no false triples: 30 were drawn, one for each true one"]
    given = kg_job.load(write_graph(tmp_path / "graph", labelled=True), tokenizer(), "kg-triples")
    assert np.array_equal(given.measured.rows, given.graph.splits["dev"].rows) and not kg_job.notes(given)


def test_every_task_is_measured_in_batches_of_the_size_asked_for(folder: Path) -> None:
    for task in kg_job.NEGATIVES:
        sizes: list[int] = []

        def model(input_ids: torch.Tensor, sizes: list[int] = sizes, **_: Any) -> torch.Tensor:
            sizes.append(len(input_ids))
            return torch.zeros(len(input_ids), 2)

        kg_job.measure("a", "b", model, kg_job.load(folder, tokenizer(), task, batch_size=7))
        assert max(sizes) == 7


def test_lengths_and_negatives_are_the_papers(folder: Path, tmp_path: Path) -> None:
    named = write_graph(tmp_path / "kg_WN18RR")
    made = kg_job.load(named, tokenizer(), "kg-links")
    assert made.task.max_length == 50 and len(made.train) == 6 * len(made.graph.splits["train"])
    assert len(made.dev) == 30 and kg_job.load(folder, tokenizer(), "kg-relations").task.labels == ("very", "not")
    assert len(kg_job.load(named, tokenizer(), "kg-triples", negatives=3).train) == 4 * len(made.graph.splits["train"])
    with pytest.raises(InputError, match="nothing to tell apart"):
        kg_job.load(named, tokenizer(), "kg-links", negatives=0)


@pytest.mark.skipif(not (KG / "kg_umls").is_dir(), reason="no UMLS here")
def test_umls() -> None:
    graph = read_graph(KG / "kg_umls")
    plan = Plan(graph.splits["dev"].true, graph.facts())
    assert (len(graph.entities), len(graph.relations), len(graph.splits["train"])) == (135, 46, 5216)
    sizes = [plan.size(i) for i in range(len(plan))]
    assert sizes == [len(plan.question(i).rows) for i in range(len(plan))]
    assert (len(plan), sum(sizes)) == (718, 88362 + 2 * 652)  # no known fact, but the answers, two a triple


def test_the_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "knowledge_graphs.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    known = {"folder": folder, "tokenizer": tokenizer(), "model": bert(), "state": tmp_path / "ranks.safetensors"}
    exec(compile(code, "example", "exec"), known)  # our own text
    assert 0 < float(capsys.readouterr().out) < 100
