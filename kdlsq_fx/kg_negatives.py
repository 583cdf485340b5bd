"""False triples for training: a true one whose head or tail is another entity (KG-BERT, section 3.2).

Head or tail with probability 1/2, all negatives of a triple on the same side; the entity is uniform over the graph's;
what is a true triple of train is drawn again (dev and test stay unseen). As in the released code they are drawn once
and kept over the epochs; ``Fresh`` draws them anew in every epoch.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from kdlsq_fx.data import Encoded
from kdlsq_fx.errors import InputError
from kdlsq_fx.kg_graph import HEAD, TAIL, Facts, Triples
from kdlsq_fx.kg_text import Texts

ROUNDS = 30  # of drawing again; what is still true then gets its entity from the list of all that are left


def corrupt(rows: np.ndarray, facts: Facts, *, per: int, rng: np.random.Generator) -> np.ndarray:
    """``per`` false triples for each of the true ones int64 [n, 3]: int64 [n, per, 3], none of them in ``facts``.

    A side on which no entity makes a false triple is left for the other. InputError where neither side has one.
    """
    side = np.where(rng.random(len(rows)) < 0.5, HEAD, TAIL)
    out = np.repeat(rows[:, None], per, axis=1)
    at, which = np.divmod(np.arange(len(rows) * per), per)
    for _ in range(ROUNDS):
        out[at, which, side[at]] = rng.integers(facts.entities, size=len(at))
        true = facts.hold(out[at, which])
        at, which = at[true], which[true]
        if not len(at):
            return out
    for i in np.unique(at):
        out[i] = _from_the_rest(rows[i], int(side[i]), facts, per, rng)
    return out


def _from_the_rest(row: np.ndarray, side: int, facts: Facts, per: int, rng: np.random.Generator) -> np.ndarray:
    """``per`` false triples of a row whose side is nearly or wholly taken: int64 [per, 3]."""
    for column in (side, HEAD + TAIL - side):
        every = np.repeat(row[None], facts.entities, axis=0)
        every[:, column] = np.arange(facts.entities)
        free = every[~facts.hold(every)]
        if len(free):
            return np.asarray(free[rng.integers(len(free), size=per)])
    do = "add entities, or drop the triple: every entity in its place makes a true triple"
    raise InputError(f"no false triple can be made of triple {row.tolist()} (head, relation, tail numbers)", do=do)


def with_negatives(rows: np.ndarray, facts: Facts, *, per: int, seed: int, epoch: int = 0) -> Triples:
    """True triples int64 [n, 3] (label 1) and ``per`` negatives of each (label 0): row ``i * (1 + per)`` is triple
    ``i``, its negatives follow. A function of (seed, epoch) alone."""
    false = corrupt(rows, facts, per=per, rng=np.random.default_rng([seed, epoch]))
    both = np.concatenate([rows[:, None], false], axis=1)
    labels = np.zeros(both.shape[:2], dtype=np.int64)
    labels[:, 0] = 1
    return Triples(both.reshape(-1, 3), labels.reshape(-1))


class Fresh:
    """Training rows whose negatives are drawn anew in every epoch, from (seed, epoch): a ``train.Source``, in which
    row ``epoch * len(self) + i`` is row ``i`` of that epoch."""

    def __init__(self, rows: np.ndarray, facts: Facts, texts: Texts, *, per: int, seed: int) -> None:
        self.rows, self.facts, self.texts, self.per, self.seed = rows, facts, texts, per, seed
        self._kept: tuple[int, Encoded] | None = None

    def __len__(self) -> int:
        return len(self.rows) * (1 + self.per)

    def epoch(self, epoch: int) -> Encoded:
        if self._kept is None or self._kept[0] != epoch:
            made = with_negatives(self.rows, self.facts, per=self.per, seed=self.seed, epoch=epoch)
            self._kept = (epoch, self.texts.triples(made.rows, made.labels))
        return self._kept[1]

    def order(self, *, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        of = self.epoch(epoch).order(batch_size=batch_size, seed=seed, epoch=epoch)
        return [rows + epoch * len(self) for rows in of]

    def batch(self, rows: np.ndarray, *, part: slice = slice(None)) -> dict[str, torch.Tensor]:
        return self.epoch(int(rows[0]) // len(self)).batch(rows % len(self), part=part)

    def sample(self, batches: int, *, batch_size: int, seed: int) -> list[dict[str, torch.Tensor]]:
        return self.epoch(0).sample(batches, batch_size=batch_size, seed=seed)

    @property
    def fingerprint(self) -> str:
        """Of the first epoch; the others follow from the same seed."""
        return hashlib.sha256(f"fresh {self.seed} {self.epoch(0).fingerprint}".encode()).hexdigest()[:16]
