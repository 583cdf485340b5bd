"""Questions as rows of tokens, ``[CLS] question [SEP] part of the context [SEP]``, with the way back to the text.

A context that does not fit is read in several windows, each ``stride`` tokens further on, as BERT's script for SQuAD
does. Every paragraph is tokenized once, whatever the number of its questions.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from tqdm import tqdm

from kdlsq_fx.data import Encoded
from kdlsq_fx.errors import ConfigError, InputError
from kdlsq_fx.squad import Question, Squad

STRIDE, LONGEST_QUESTION = 128, 64  # tokens, as in BERT's and KDLSQ's scripts
CHUNK = 500  # texts that are tokenized between two moves of the progress bar


@dataclass(frozen=True)
class Tokens:
    """Tokens of texts, ragged: text ``i`` has those of ``starts[i]:starts[i+1]``. ``ids`` int32 [tokens]; ``offsets``
    int32 [tokens, 2]: the token's first character, and the one behind its last."""

    ids: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray

    def span(self, text: int) -> slice:
        return slice(int(self.starts[text]), int(self.starts[text + 1]))


@dataclass(frozen=True)
class Place:
    """What a window is of: the ``question``'s number; its context's tokens ``first`` to ``first + count``, which begin
    at ``begin`` in the row."""

    question: int
    begin: int
    first: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Windows(Encoded):
    """Rows are windows. ``labels`` int64 [rows, 2]: where the answer's first and last token stand in the row; both 0
    (the first token) where the window does not hold the whole answer, as in BERT's script. ``contexts``: the
    paragraphs' tokens."""

    squad: Squad
    contexts: Tokens
    places: tuple[Place, ...]

    def batch(
        self, rows: Sequence[int] | np.ndarray, *, labels: bool = True, part: slice = slice(None)
    ) -> dict[str, torch.Tensor]:
        """As :meth:`Encoded.batch`; the labels are ``start_positions`` and ``end_positions``, int64 [rows]."""
        out = super().batch(rows, labels=labels, part=part)
        if "labels" in out:
            out["start_positions"], out["end_positions"] = out.pop("labels").unbind(1)
        return out

    def head(self, rows: int) -> Windows:
        return replace(cast(Windows, super().head(rows)), places=self.places[:rows])

    def pick(self, rows: np.ndarray) -> Windows:
        return replace(cast(Windows, super().pick(rows)), places=tuple(self.places[i] for i in rows))

    def joined(self, other: Encoded) -> Encoded:
        """Plain rows without labels: any pair of texts can be followed in a teacher's two rows of logits."""
        return Encoded(self.ids, self.types, self.starts, None, self.pad_id).joined(other)

    @property
    def fingerprint(self) -> str:
        """Of tokens and labels, and of the answers that predictions are held against."""
        known = json.dumps([(q.id, q.answers) for q in self.squad.questions])
        return f"{super().fingerprint}-{hashlib.sha256(known.encode()).hexdigest()[:16]}"


def make_windows(
    squad: Squad, tokenizer: Any, *, max_length: int, stride: int = STRIDE, labelled: bool = False, title: str = "squad"
) -> Windows:
    """Windows of ``max_length`` tokens at most, special ones included, for every question, in order.

    ``stride``: tokens from the beginning of one window to that of the next (less where a window is shorter: no token is
    left out). Questions are cut to 64 tokens, and to half of the row. ``labelled``: for training, with labels;
    questions without a certain place of their answer, or whose answer has no token, are left out then.

    Raises :class:`ConfigError` for a tokenizer that cannot tell offsets, or lengths that hold nothing.
    """
    frame = Frame.of(tokenizer)
    room = max_length - frame.length
    if room < 2 or stride < 1:
        what = f"{max_length} tokens and a stride of {stride} hold no question"
        raise ConfigError(what, where="max_length", do=f"give {frame.length + 2} tokens or more, and a stride above 0")
    contexts = tokenized(squad.contexts, tokenizer, f"tokenize {title}")
    questions = tokenized([q.text.strip() for q in squad.questions], tokenizer, f"tokenize {title}'s questions")
    made = [_answer_tokens(q, contexts) for q in squad.questions] if labelled else [None] * len(squad.questions)
    rows: list[np.ndarray] = []
    types: list[np.ndarray] = []
    labels: list[tuple[int, int]] = []
    places: list[Place] = []
    for number, (question, answer) in enumerate(zip(squad.questions, made)):
        if labelled and answer is None:
            continue
        asked = questions.ids[questions.span(number)][: min(LONGEST_QUESTION, room // 2)]
        context = contexts.ids[contexts.span(question.paragraph)]
        begin = frame.begin(len(asked))
        for first, count in parts(len(context), room - len(asked), stride):
            row, kinds = frame.row(asked, context[first : first + count])
            rows.append(row)
            types.append(kinds)
            places.append(Place(number, begin, first, count))
            labels.append(_label(answer, places[-1]))
    if not rows:
        raise InputError("no question has a certain answer", where=title, do="give questions whose answers have places")
    starts = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
    typed = np.concatenate(types) if "token_type_ids" in tokenizer.model_input_names else None
    return Windows(
        np.concatenate(rows), typed, starts, np.array(labels, dtype=np.int64) if labelled else None,
        int(tokenizer.pad_token_id or 0), squad=squad, contexts=contexts, places=tuple(places),
    )  # fmt: skip


def parts(length: int, room: int, stride: int) -> Iterator[tuple[int, int]]:
    """First token and number of tokens of every window over ``length`` tokens; the last one ends with them."""
    first = 0
    while first + room < length:
        yield first, room
        first += min(stride, room)
    yield first, length - first


@dataclass(frozen=True)
class Frame:
    """What a tokenizer puts around two texts: the special tokens ``before``, ``between`` and ``after`` them, each as
    int32 [2, tokens] (ids and token types), and the token types of the two texts."""

    before: np.ndarray
    between: np.ndarray
    after: np.ndarray
    types: tuple[int, int]

    @classmethod
    def of(cls, tokenizer: Any) -> Frame:
        """Read off a pair of texts; ConfigError for a tokenizer that cannot tell which token is of which text."""
        if not getattr(tokenizer, "is_fast", False):
            do = "use the fast tokenizer of the model (tokenizer.json)"
            raise ConfigError("the tokenizer does not tell where its tokens stand in the text", do=do)
        pair = tokenizer("a", "a", return_token_type_ids=True)
        ids, of = np.array([pair["input_ids"], pair["token_type_ids"]], dtype=np.int32), pair.sequence_ids(0)
        if of.count(0) == 0 or of.count(1) == 0:
            raise ConfigError("the tokenizer makes no token of a letter", do="use the tokenizer of a BERT-like encoder")
        a, b = of.index(0), of.index(1)
        behind = (a + of.count(0), b + of.count(1))
        return cls(ids[:, :a], ids[:, behind[0] : b], ids[:, behind[1] :], (int(ids[1, a]), int(ids[1, b])))

    @property
    def length(self) -> int:
        """Special tokens of a row."""
        return self.before.shape[1] + self.between.shape[1] + self.after.shape[1]

    def begin(self, question: int) -> int:
        """Where the context begins behind a question of so many tokens."""
        return self.before.shape[1] + question + self.between.shape[1]

    def row(self, question: np.ndarray, context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and token types of a row, int32."""
        one, two = (np.full(len(x), kind, dtype=np.int32) for x, kind in zip((question, context), self.types))
        ids = [self.before[0], question, self.between[0], context, self.after[0]]
        return np.concatenate(ids), np.concatenate([self.before[1], one, self.between[1], two, self.after[1]])


def tokenized(texts: Sequence[str], tokenizer: Any, title: str) -> Tokens:
    """Every text without special tokens, with offsets."""
    ids: list[np.ndarray] = []
    offsets: list[np.ndarray] = []
    with tqdm(total=len(texts), desc=title, disable=not sys.stderr.isatty(), unit="text", dynamic_ncols=True) as bar:
        for at in range(0, len(texts), CHUNK):
            chunk = list(texts[at : at + CHUNK])
            got = tokenizer(
                chunk, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False,
                return_token_type_ids=False, verbose=False,
            )  # fmt: skip
            ids += [np.array(x, dtype=np.int32) for x in got["input_ids"]]
            offsets += [np.array(x, dtype=np.int32).reshape(-1, 2) for x in got["offset_mapping"]]
            bar.update(len(chunk))
    starts = np.concatenate([[0], np.cumsum([len(x) for x in ids])]).astype(np.int64)
    return Tokens(np.concatenate(ids), np.concatenate(offsets), starts)


def _answer_tokens(question: Question, contexts: Tokens) -> tuple[int, int] | None:
    """The paragraph's first and last token that hold a character of the answer; None where its place is not certain,
    or no token does."""
    if question.start is None:
        return None
    here = contexts.offsets[contexts.span(question.paragraph)]
    first = int(np.searchsorted(here[:, 1], question.start, side="right"))
    last = int(np.searchsorted(here[:, 0], question.start + len(question.answers[0]), side="left")) - 1
    return (first, last) if first <= last else None


def _label(answer: tuple[int, int] | None, place: Place) -> tuple[int, int]:
    """Where the answer's first and last token stand in a window; (0, 0) where they do not."""
    if answer is None or answer[0] < place.first or answer[1] >= place.first + place.count:
        return 0, 0
    return tuple(place.begin + token - place.first for token in answer)  # type: ignore[return-value]
