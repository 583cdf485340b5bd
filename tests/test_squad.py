"""SQuAD 1.1: the layout, windows against the tokenizer's own, spans against brute force, EM and F1 against the rule."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_glue import tokenizer
from tiny_squad import squad, write_squad

from kdlsq_fx import squad_job
from kdlsq_fx.errors import ConfigError, InputError
from kdlsq_fx.squad import Squad, read_squad
from kdlsq_fx.squad_answers import best_answers, texts_of
from kdlsq_fx.squad_metrics import exact, f1, normalized, per_question, squad_scores
from kdlsq_fx.squad_windows import Windows, make_windows, parts

# --- the layout


def written(folder: Path, content: Any) -> Path:
    path = folder / "train-v1.1.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def first(root: dict[str, Any]) -> dict[str, Any]:
    return root["data"][0]["paragraphs"][0]["qas"][0]


def test_gzip_reads_the_same(tmp_path: Path) -> None:
    path = written(tmp_path, squad(6))
    found = read_squad(path)
    (tmp_path / "dev.json.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read_squad(tmp_path / "dev.json.gz") == found
    assert len(found.contexts) == 3 and len(found.questions) == 6 and found.questions[5].paragraph == 2
    for q in found.questions:
        assert q.start is not None and found.contexts[q.paragraph][q.start :].startswith(q.answers[0])


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str]] = {
    "no answers key": (lambda r: first(r).pop("answers"), "no 'answers'", "data[0].paragraphs[0].qas[0]"),
    "no id": (lambda r: first(r).pop("id"), "no 'id'", "qas[0]"),
    "no start": (lambda r: first(r)["answers"][0].pop("answer_start"), "no 'answer_start'", "answers[0]"),
    "start": (lambda r: first(r)["answers"][0].update(answer_start="7"), "answer_start is '7'", "answers[0]"),
    "elsewhere": (lambda r: first(r)["answers"][0].update(answer_start=10**6), "does not stand at", "answers[0]"),
    "below zero": (lambda r: first(r)["answers"][0].update(answer_start=-1), "does not stand at", "answers[0]"),
    "not there": (lambda r: first(r)["answers"][0].update(text="ghost"), "'ghost' does not stand at", "answers[0]"),
    "unanswerable": (lambda r: first(r).update(answers=[]), "without an answer", "qas[0]"),
    "empty text": (lambda r: first(r)["answers"][0].update(text=" "), "text is ' '", "answers[0]"),
    "twice": (lambda r: first(r).update(id="0-0-1"), "stands twice", "qas[1]"),
    "no list": (lambda r: r.update(data={"a": 1}), "data is no list", "train-v1.1.json"),
    "no object": (lambda r: r["data"].insert(0, "text"), "a str where an object", "data[0]"),
    "no questions": (lambda r: r.update(data=[]), "no questions", "train-v1.1.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_told_with_their_place(case: str, tmp_path: Path) -> None:
    spoil, says, where = BAD[case]
    root = squad(6)
    spoil(root)
    with pytest.raises(InputError) as told:
        read_squad(written(tmp_path, root))
    assert says in str(told.value) and where in str(told.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "the file is empty"), ("{", "no JSON"), ("[1]", "a list where an object"), ('{"rows": []}', "no 'data'")],
)
def test_other_files(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        read_squad(written(tmp_path, text))
    with pytest.raises(InputError, match="no dev file"):
        squad_job.load(tmp_path, tokenizer())
    with pytest.raises(InputError, match="no such folder"):
        squad_job.load(tmp_path / "nowhere", tokenizer())


# --- windows


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Squad:
    return read_squad(written(tmp_path_factory.mktemp("squad"), squad(40)))


@given(st.integers(1, 300), st.integers(1, 90), st.integers(1, 90))
def test_windows_leave_no_token_out(length: int, room: int, stride: int) -> None:
    made = list(parts(length, room, stride))
    assert set().union(*(range(a, a + n) for a, n in made)) == set(range(length))
    assert all(n == room for _, n in made[:-1]) and 0 < made[-1][1] <= room
    assert all(b - a == min(stride, room) for (a, _), (b, _) in itertools.pairwise(made))


def test_windows_are_the_tokenizers_own(found: Squad) -> None:
    """Tokenizers count how many tokens two windows share, BERT's script how far one begins behind the other."""
    tok, length, stride = tokenizer(), 20, 6
    data = make_windows(found, tok, max_length=length, stride=stride)
    at = 0
    for question in found.questions:
        room = length - 3 - len(tok(question.text, add_special_tokens=False)["input_ids"])
        want = tok(
            question.text, found.contexts[question.paragraph], truncation="only_second", max_length=length,
            stride=room - stride, return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        for k, ids in enumerate(want["input_ids"]):
            row = slice(data.starts[at], data.starts[at + 1])
            assert data.ids[row].tolist() == ids
            assert data.types is not None and data.types[row].tolist() == want["token_type_ids"][k]
            place, inside = data.places[at], [s == 1 for s in want.sequence_ids(k)]
            assert inside.index(True) == place.begin and sum(inside) == place.count
            offsets = data.contexts.offsets[data.contexts.span(question.paragraph)][place.first :][: place.count]
            assert offsets.tolist() == [list(o) for o, here in zip(want["offset_mapping"][k], inside) if here]
            at += 1
    assert at == len(data) > len(found.questions)


def test_labels_are_the_answer_or_the_first_token(found: Squad) -> None:
    data = make_windows(found, tokenizer(), max_length=20, stride=6, labelled=True)
    assert data.labels is not None
    kinds, held = set(), set()
    for place, (a, b) in zip(data.places, data.labels):
        question = data.squad.questions[place.question]
        context, start = data.squad.contexts[question.paragraph], question.start
        assert start is not None
        offsets = data.contexts.offsets[data.contexts.span(question.paragraph)][place.first :][: place.count]
        inside = offsets[0, 0] <= start and start + len(question.answers[0]) <= offsets[-1, 1]
        kinds.add(inside)
        if not inside:
            assert a == b == 0
            continue
        held.add(place.question)
        characters = offsets[a - place.begin, 0], offsets[b - place.begin, 1]
        assert characters[0] == start and context[slice(*characters)] == question.answers[0]
    assert kinds == {True, False} and held == set(range(len(found.questions)))
    batch = data.batch([0, 3, 1])
    assert batch["start_positions"].tolist() == data.labels[[0, 3, 1], 0].tolist() and "labels" not in batch
    assert batch["end_positions"].shape == (3,) and "start_positions" not in data.batch([0], labels=False)


def test_an_answer_inside_a_token_and_places_that_are_guessed(tmp_path: Path) -> None:
    root = squad(6)
    inside = {"text": "il", "answer_start": root["data"][0]["paragraphs"][1]["context"].find("film") + 1}
    root["data"][0]["paragraphs"][1]["context"] = "film " + root["data"][0]["paragraphs"][1]["context"]
    inside["answer_start"] = 1
    root["data"][0]["paragraphs"][1]["qas"] = [{"id": "x", "question": "film", "answers": [inside]}]
    first(root)["start_certain"] = False
    path = written(tmp_path, root)
    path.with_name("dev.json").write_bytes(path.read_bytes())
    data = squad_job.load(tmp_path, tokenizer(), max_length=40)
    assert data.train is not None and data.train.labels is not None
    assert {p.question for p in data.train.places} == {1, 2, 3, 4}
    row = [p.question for p in data.train.places].index(2)
    assert data.train.labels[row].tolist() == [data.train.places[row].begin] * 2  # the whole token
    assert {p.question for p in data.dev.places} == {0, 1, 2, 3, 4}  # all are measured
    assert any("1 questions are left out" in note for note in squad_job.notes(data))


def test_parts_of_a_data_set(found: Squad) -> None:
    data = make_windows(found, tokenizer(), max_length=20, stride=6, labelled=True)
    assert data.labels is not None
    some = data.head(7)
    assert len(some) == 7 and len(some.places) == 7 and len(best_answers(some, zeros(some))) < 7
    turned = data.pick(np.arange(len(data))[::-1])
    assert turned.places == data.places[::-1] and turned.batch([0])["end_positions"] == data.labels[-1, 1]
    assert best_answers(turned, zeros(data)) == best_answers(data, zeros(data))
    more = data.joined(data)
    assert len(more) == 2 * len(data) and "start_positions" not in more.batch([0])
    changed = Squad(found.contexts, (*found.questions[:-1], type(found.questions[0])(
        **{**vars(found.questions[-1]), "answers": ("another",)})))  # fmt: skip
    prints = [make_windows(s, tokenizer(), max_length=20, stride=6).fingerprint for s in (found, found, changed)]
    assert prints[0] == prints[1] != prints[2]


def test_lengths_that_hold_nothing(found: Squad) -> None:
    with pytest.raises(ConfigError, match="4 tokens and a stride of 128 hold no question"):
        make_windows(found, tokenizer(), max_length=4)
    short = make_windows(found, tokenizer(), max_length=5, stride=1)
    assert (short.lengths <= 5).all()
    with pytest.raises(ConfigError, match="does not tell where"):
        make_windows(found, object(), max_length=20)


# --- spans


def zeros(data: Windows) -> np.ndarray:
    return np.zeros((data.starts[-1], 2), dtype=np.float32)


@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_spans_are_those_of_brute_force(found: Squad, seed: int, longest: int, best: int) -> None:
    data = make_windows(found, tokenizer(), max_length=20, stride=6).head(12)
    logits = np.random.default_rng(seed).normal(size=(data.starts[-1], 2)).astype(np.float32)
    logits[data.starts[:-1]] = 99  # the first token is no answer, however sure the model is
    got = best_answers(data, logits, best=best, longest=longest)
    for number in {p.question for p in data.places}:
        context = found.contexts[found.questions[number].paragraph]
        scores: dict[tuple[int, int], float] = {}
        for row, place in enumerate(data.places):
            if place.question != number:
                continue
            offsets = data.contexts.offsets[data.contexts.span(found.questions[number].paragraph)]
            for a in range(place.count):
                for b in range(a, min(a + longest, place.count)):
                    s, e = (logits[data.starts[row] + place.begin + k] for k in (a, b))
                    span = int(offsets[place.first + a, 0]), int(offsets[place.first + b, 1])
                    scores[span] = max(float(s[0]) + float(e[1]), scores.get(span, -1e9))
        want = sorted(scores, key=lambda k: -scores[k])[:best]
        assert [(a.start, a.text) for a in got[number]] == [(a, context[a:b]) for a, b in want]
        np.testing.assert_allclose([a.score for a in got[number]], [scores[k] for k in want])
        shares = np.exp([scores[k] for k in want])
        np.testing.assert_allclose([a.probability for a in got[number]], shares / shares.sum(), rtol=1e-9)


def test_equal_scores_give_the_earliest_and_shortest(found: Squad) -> None:
    data = make_windows(found, tokenizer(), max_length=20, stride=6)
    texts = texts_of(data, zeros(data))
    assert texts == [found.contexts[q.paragraph].split()[0] for q in found.questions]
    assert [a[0].text for a in best_answers(data, zeros(data)).values()] == texts


def test_logits_that_are_none(found: Squad) -> None:
    data = make_windows(found, tokenizer(), max_length=20)
    with pytest.raises(InputError, match="logits of shape"):
        best_answers(data, zeros(data)[:-1])
    with pytest.raises(InputError, match="NaN or infinity"):
        texts_of(data, zeros(data) * np.nan)


# --- EM and F1


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("The  Big\tCat.", "big cat"),
        ("the-rapist", "therapist"),  # punctuation goes before articles
        ("A. Smith", "smith"),
        ("a an the", ""),
        ("an apple, a pear", "apple pear"),
        ("theatre of banana", "theatre of banana"),
        ("$3.5 million", "35 million"),
        ("1990–91", "1990–91"),  # a dash is no ASCII punctuation
        ("ÉCOLE", "école"),
    ],
)
def test_normalized(text: str, want: str) -> None:
    assert normalized(text) == want


@pytest.mark.parametrize(
    ("guess", "right", "em", "points"),
    [
        ("The Cat", "cat!", 1, 1),
        ("the big red dog", "red dog barks", 0, 2 / 3),
        ("dog dog", "dog", 0, 2 / 3),
        ("dog dog", "dog dog dog dog", 0, 2 / 3),
        ("cat", "dog", 0, 0),
        ("", "dog", 0, 0),
        ("the", "a", 1, 0),  # two empty ones: version 1.1 gives the match, and no F1
        ("New York City", "City, New York", 0, 1),
    ],
)
def test_figures_of_a_pair(guess: str, right: str, em: float, points: float) -> None:
    assert exact(guess, right) == em and f1(guess, right) == pytest.approx(points)


@given(st.lists(st.sampled_from(["a", "the", "The-", "x", "Y.", "y", " ", "\n", "an,x", "–"]), max_size=9),
       st.lists(st.sampled_from(["a", "the", "THE", "x", "y", "x y", "!", "\t"]), max_size=9))  # fmt: skip
def test_f1_by_precision_and_recall(one: list[str], two: list[str]) -> None:
    """The rule in other words: letter by letter, word by word."""

    def words(text: str) -> list[str]:
        kept = "".join(
            c for c in text.lower() if not (c.isascii() and c.isprintable() and not c.isalnum() and c != " ")
        )
        parts = "".join(c if c.isalnum() else f" {c} " if not c.isspace() else " " for c in kept).split()
        return [w for w in parts if w not in ("a", "an", "the")]

    guess, right = (" ".join(x) for x in (one, two))
    a, b = words(guess), words(right)
    left, shared = list(b), 0
    for word in a:
        if word in left:
            left.remove(word)
            shared += 1
    want = 0.0
    if shared:
        precision, recall = shared / len(a), shared / len(b)
        want = 2 * precision * recall / (precision + recall)
    assert f1(guess, right) == pytest.approx(want) and exact(guess, right) == (a == b)


def test_the_best_answer_counts_and_questions_are_averaged() -> None:
    figures = per_question(["big cat", "dog", "x"], [["dog", "the cat"], ["Dog", "cat"], ["y"]])
    np.testing.assert_allclose(figures, [[0, 2 / 3], [1, 1], [0, 0]])
    scores = squad_scores(figures)
    assert scores["EM"] == pytest.approx(100 / 3) and scores["headline"] == scores["F1"] == pytest.approx(500 / 9)
    assert scores["EM_se"] == pytest.approx(100 * np.std([0, 1, 0], ddof=1) / np.sqrt(3))
    with pytest.raises(InputError, match="2 predictions for 1 questions"):
        per_question(["a", "b"], [["a"]])


def test_the_right_answers_score_100(tmp_path: Path) -> None:
    """Through offsets and back: logits that mark the labels give every answer."""
    data = squad_job.load(write_squad(tmp_path), tokenizer(), max_length=20, doc_stride=6, split="train")
    assert data.train is not None and data.train.labels is not None
    logits = zeros(data.train)
    for at, label in zip(data.train.starts, data.train.labels):
        if label.any():
            logits[at + label, [0, 1]] = 9
    answers = [q.answers for q in data.dev.squad.questions]
    assert squad_scores(per_question(texts_of(data.train, logits), answers))["EM"] == 100
