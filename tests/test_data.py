"""Files in GLUE's layout to batches and figures; every bad file is an error that names the line."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_glue import tokenizer, write_sst

from kdlsq_fx import data, job, metrics, rows
from kdlsq_fx.errors import ConfigError, InputError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_quotes_and_odd_breaks_are_plain_characters(tmp_path: Path) -> None:
    got = rows.read_file(write(tmp_path / "train.tsv", 'sentence\tlabel\n" good\t1\nbad\x0c "" film\t0\n'))
    assert got.first == ['" good', 'bad\x0c "" film'] and got.target == ["1", "0"] and got.lines == [2, 3]


def test_gzip_and_jsonl_read_the_same(tmp_path: Path) -> None:
    text = "sentence\tsentence2\tscore\ngood film\tnice story\t4.5\nbad\tgood\t0\n"
    (tmp_path / "train.tsv.gz").write_bytes(gzip.compress(text.encode()))
    lines = [("good film", "nice story", 4.5), ("bad", "good", 0)]
    objects = [dict(zip(("sentence1", "sentence2", "score"), x)) for x in lines]
    write(tmp_path / "dev.jsonl", "".join(json.dumps(x) + "\n" for x in objects))
    tsv, jsonl = rows.read_file(tmp_path / "train.tsv.gz"), rows.read_file(tmp_path / "dev.jsonl")
    assert (tsv.first, tsv.second) == (jsonl.first, jsonl.second)
    got = data.load(tmp_path, tokenizer())
    assert got.task.regression and got.task.outputs == 1
    np.testing.assert_array_equal(got.train.labels, np.array([4.5, 0], dtype=np.float32))
    np.testing.assert_array_equal(got.train.ids, got.dev.ids)
    assert got.train.types is not None and got.train.types.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no rows"),
        ("sentence\tlabel\n", "no rows"),
        ("text1\tlabel\ngood\t1\n", "columns are 'text1', 'label'"),
        ("sentence\tclass\ngood\t1\n", "columns are 'sentence', 'class'"),
        ("sentence\tlabel\ngood\t1\nbad\n", "train.tsv:3"),
        ("sentence\tlabel\n\t1\n", "train.tsv:2"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        rows.read_file(write(tmp_path / "train.tsv", text))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train.jsonl:2"):
        rows.read_file(write(tmp_path / "train.jsonl", '{"sentence": "good", "label": 1}\nno json\n'))
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress(b"sentence\tlabel\n" + bytes(range(256)) * 50)[:-40])
    with pytest.raises(InputError, match="cannot be read"):
        rows.read_file(tmp_path / "cut.tsv.gz")
    (tmp_path / "latin.tsv").write_bytes(b"sentence\tlabel\n\xe9\t1\n")
    with pytest.raises(InputError, match="UTF-8"):
        rows.read_file(tmp_path / "latin.tsv")
    with pytest.raises(InputError, match="no dev file"):
        rows.read(write(tmp_path / "set" / "train.tsv", "sentence\tlabel\ngood\t1\n").parent)
    with pytest.raises(InputError, match="no such data folder"):
        rows.read("./nowhere")
    with pytest.raises(InputError, match="datasets"):
        rows.read("glue/no-such-task")


def test_names_that_the_datasets_library_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own answers in place of a hub: what is asked of it, and what is made of them."""
    pair = {"premise": "A.", "hypothesis": "B.", "label": 2, "idx": 0}
    scored = {"sentence1": "A.", "sentence2": "B.", "label": 4.5, "idx": 0}
    plain = {"text": "A.", "label": 1}
    known = {
        ("glue", "mnli"): {"train": [pair], "validation_matched": [pair], "test_matched": [pair]},
        ("glue", "stsb"): {"train": [scored], "validation": [scored]},
        ("nyu-mll/glue", "mnli"): {"train": [pair], "validation_matched": [pair]},
        ("owner/films",): {"train": [plain], "validation": [plain, plain]},
        ("imdb",): {"train": [plain], "test": [plain]},
    }
    library = SimpleNamespace(load_dataset=lambda *names: known[names])
    monkeypatch.setitem(sys.modules, "datasets", library)
    for name, task, target in (
        ("glue/mnli", "mnli", "2"), ("nyu-mll/glue/mnli", "mnli", "2"), ("glue/stsb", "stsb", "4.5"),
        ("owner/films", "films", "1"),
    ):  # fmt: skip
        train, dev, found = rows.read(name)
        assert (train.first, train.target, found) == (["A."], [target], task) and len(dev) == 1 + (task == "films")
        assert (train.second == ["B."]) == (task != "films") and (train.column == "score") == (task == "stsb")
    with pytest.raises(InputError, match="its splits are train, test; train and validation are needed"):
        rows.read("imdb")


def test_bad_labels_name_file_and_line(tmp_path: Path) -> None:
    folder = write_sst(tmp_path / "sst2")
    write(folder / "dev.tsv", "sentence\tlabel\ngood\t1\nbad\t2\n")
    with pytest.raises(InputError, match=r"bad label '2' .*dev.tsv:3"):
        data.load(folder, tokenizer())
    for name in ("train", "dev"):
        write(tmp_path / "stsb" / f"{name}.tsv", "sentence\tsentence2\tscore\ngood\tbad\tnan\n")
    with pytest.raises(InputError, match=r"bad score 'nan' .*train.tsv:2"):
        data.load(tmp_path / "stsb", tokenizer())


def test_tasks_by_name_and_by_columns(tmp_path: Path) -> None:
    sst = data.load(write_sst(tmp_path / "SST-2"), tokenizer()).task
    assert (sst.name, sst.metric, sst.max_length) == ("sst2", "accuracy", 64)
    for name in ("train", "dev"):
        write(tmp_path / "mine" / f"{name}.tsv", "sentence\tlabel\ngood\tplus\nbad\tminus\nfilm\tnone\n")
    mine = data.load(tmp_path / "mine", tokenizer(), max_length=3)
    assert mine.task.labels == ("minus", "none", "plus") and mine.task.max_length == 3
    assert mine.train.labels is not None and mine.train.labels.tolist() == [2, 0, 1]


def test_order_is_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    train = data.load(write_sst(tmp_path / "sst2", train=500), tokenizer()).train
    first = train.order(batch_size=8, seed=1, epoch=3)
    again = train.order(batch_size=8, seed=1, epoch=3)
    assert all((a == b).all() for a, b in zip(first, again))
    other = train.order(batch_size=8, seed=1, epoch=4)
    assert any((a != b).any() for a, b in zip(first, other))
    assert sorted(np.concatenate(first).tolist()) == list(range(500))
    padded = sum(len(b) * int(train.lengths[b].max()) for b in first)
    assert padded < 1.1 * train.lengths.sum()


def test_batch_pads_to_its_longest_row(tmp_path: Path) -> None:
    train = data.load(write_sst(tmp_path / "sst2"), tokenizer()).train
    batch = train.batch([0, 5, 9])
    assert batch["input_ids"].shape == (3, int(train.lengths[[0, 5, 9]].max()))
    np.testing.assert_array_equal(batch["attention_mask"].sum(1), train.lengths[[0, 5, 9]])
    assert bool(((batch["input_ids"] == 0) == (batch["attention_mask"] == 0)).all())
    assert train.labels is not None and batch["labels"].tolist() == train.labels[[0, 5, 9]].tolist()
    assert train.head(7).order(batch_size=3, seed=0, epoch=0) and len(train.head(7)) == 7
    assert train.fingerprint != train.head(7).fingerprint


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_scikit_learn(seed: int) -> None:
    from sklearn.metrics import f1_score, matthews_corrcoef

    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 57)
    guess = np.where(rng.random(57) < 0.7, labels, 1 - labels)
    assert metrics.f1(guess, labels) == pytest.approx(f1_score(labels, guess), abs=1e-12)
    assert metrics.matthews(guess, labels) == pytest.approx(matthews_corrcoef(labels, guess), abs=1e-12)
    three = rng.integers(0, 3, 57)
    assert metrics.matthews(three, labels) == pytest.approx(matthews_corrcoef(labels, three), abs=1e-12)
    assert metrics.matthews(np.zeros(57, dtype=int), labels) == 0 == metrics.f1(np.zeros(57, dtype=int), labels)


def test_scores_and_their_standard_errors() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    guess = np.where(rng.random(400) < 0.9, labels, 1 - labels)
    got = metrics.score(data.GLUE["sst2"], guess, labels)
    p = (guess == labels).mean()
    assert got["headline"] == pytest.approx(100 * p)
    assert got["headline_se"] == pytest.approx(100 * np.sqrt(p * (1 - p) / 400))
    mrpc = metrics.score(data.GLUE["mrpc"], guess, labels)
    assert mrpc["headline"] == pytest.approx((mrpc["accuracy"] + mrpc["f1"]) / 2)
    assert mrpc["accuracy_se"] == pytest.approx(got["accuracy_se"], rel=0.1)  # bootstrap against binomial
    truth = rng.random(400)
    noisy = truth + rng.normal(0, 0.3, 400)
    sts = metrics.score(data.GLUE["stsb"], noisy, truth)
    analytic = 100 * (1 - (sts["pearson"] / 100) ** 2) / np.sqrt(399)
    assert sts["pearson_se"] == pytest.approx(analytic, rel=0.2)
    assert metrics.score(data.GLUE["stsb"], np.zeros(400), truth)["headline"] == 0


def test_paired_difference_is_sharper_than_two_figures() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    a = np.where(rng.random(400) < 0.9, labels, 1 - labels)
    b = np.where(np.arange(400) < 8, 1 - a, a)
    value, error = metrics.difference(data.GLUE["sst2"], a, b, labels)
    assert value == pytest.approx(100 * ((a == labels).mean() - (b == labels).mean()))
    assert error < metrics.score(data.GLUE["sst2"], a, labels)["headline_se"]
    assert metrics.difference(data.GLUE["sst2"], a, a, labels) == (0, 0)


def test_scoring_bad_predictions() -> None:
    with pytest.raises(InputError, match="NaN"):
        metrics.score(data.GLUE["stsb"], np.array([1.0, np.nan]), np.array([1.0, 2.0]))
    with pytest.raises(InputError, match="1 predictions for 2 labels"):
        metrics.score(data.GLUE["sst2"], np.array([1]), np.array([1, 0]))


def test_more_texts_join_train_without_any_label(tmp_path: Path) -> None:
    write_sst(tmp_path / "sst2")
    words = tokenizer()
    own = data.load(tmp_path / "sst2", words)
    bare = write(tmp_path / "texts.jsonl", '{"sentence": "good story"}\n{"sentence": "bad"}\n')  # no label column
    recipe = job.Recipe()
    joined = job.with_texts(own, [bare, tmp_path / "sst2"], words, recipe).train
    assert len(joined) == 2 * len(own.train) + 2 and joined.labels is None
    alone = data.load_texts(bare, own.task, words)
    n = len(own.train)
    got, want = joined.batch([0, n, n + 1]), (own.train.batch([0]), alone.batch([0, 1]))
    assert "labels" not in got and "labels" not in want[1]
    ids = got["input_ids"]
    assert ids[0][got["attention_mask"][0] > 0].tolist() == want[0]["input_ids"][0].tolist()
    assert ids[1][: want[1]["input_ids"].shape[1]].tolist() == want[1]["input_ids"][0].tolist()
    assert len(data.load_texts(bare, own.task, words, limit=1)) == 1
    for wrong in (job.Recipe(gold=True), job.Recipe(teacher=False)):
        with pytest.raises(ConfigError, match="only be learned from a teacher"):
            job.with_texts(own, [bare], words, wrong)
    with pytest.raises(InputError, match="columns are 'words'"):
        data.load_texts(write(tmp_path / "no.jsonl", '{"words": "good"}\n'), own.task, words)


@pytest.mark.data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the experiment data is not here")
@pytest.mark.parametrize(
    ("name", "train", "dev"),
    [("sst2", 67349, 436), ("mrpc", 3668, 408), ("rte", 2490, 277), ("cola", 8551, 522), ("stsb", 5749, 750)],
)
def test_row_counts_of_glue(name: str, train: int, dev: int) -> None:
    a, b, _ = rows.read(SHARED / name)
    assert (len(a), len(b)) == (train, dev)
    task = data.task_of(name, a)
    assert task is data.GLUE[name] and len(data.targets(a, task)) == train


OFFICIAL = {  # header (or none) and two rows of each task as published, with words of our own
    "cola": ("train", "", ["aa01\t1\t\tA cat sat.", "aa01\t0\t*\tA cat sit."], [1, 0]),
    "mrpc": (
        "train", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", ["1\t7\t8\tOne.\tTwo.", "0\t9\t3\tTwo.\tSix."], [1, 0],
    ),
    "qqp": (
        "train", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ["0\t1\t2\tWho?\tWhy?\t0", "1\t3\t4\tA?\tA?\t1"], [0, 1],
    ),
    "rte": (
        "train", "index\tsentence1\tsentence2\tlabel",
        ["0\tA.\tB.\tnot_entailment", "1\tA.\tA.\tentailment"], [1, 0],
    ),
    "qnli": (
        "train", "index\tquestion\tsentence\tlabel",
        ["0\tA?\tB.\tentailment", "1\tA?\tA.\tnot_entailment"], [0, 1],
    ),
    "wnli": ("train", "index\tsentence1\tsentence2\tlabel", ["0\tA.\tB.\t1", "1\tA.\tA.\t0"], [1, 0]),
    "sst2": ("train", "sentence\tlabel", ["fine\t1", "poor\t0"], [1, 0]),
    "stsb": (
        "train",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        ["0\tg\tf\t2012\t1\tn\tn\tA.\tB.\t5.0", "1\tg\tf\t2012\t2\tn\tn\tA.\tC.\t1.5"], [5.0, 1.5],
    ),
    "mnli": (
        "dev_matched",
        "index\tpromptID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
        ["0\t1\tg\tA.\tB.\tneutral\tcontradiction", "1\t2\tg\tA.\tA.\tneutral\tentailment"], [2, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", OFFICIAL)
def test_glue_is_read_as_it_is_published(tmp_path: Path, task: str) -> None:
    split, header, lines, labels = OFFICIAL[task]
    text = "\n".join([*([header] if header else []), *lines]) + "\n"
    (tmp_path / f"{split}.tsv").write_text("\ufeff" * (task == "mrpc") + text, encoding="utf-8")
    found = rows.read_file(rows.find_split(tmp_path, split.split("_")[0]))
    made = data.task_of(task, found)
    assert made.metric == data.GLUE[task].metric and made.outputs == data.GLUE[task].outputs
    assert data.targets(found, made).tolist() == labels
    assert found.first[0].split()[0].strip(".?") in ("A", "One", "Who", "fine")
    assert (found.second is None) == (task in ("cola", "sst2"))
