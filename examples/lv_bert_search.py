"""Search the order of an LV-BERT's sub-layers on SST-2, then train the one found with quantizers.

    python examples/lv_bert_search.py DATA [--depth 6] [--steps 600] [--mib 8.0] [--qconfig W8E8A8-int]

``DATA`` has ``sst2/train.tsv.gz``, ``sst2/dev.tsv`` and ``vocab/bert-base-uncased-tokenizer.json``. A supernet holds
all three kinds of sub-layer at every position and is trained with random orders. A table says what a kind at a position
adds to the loss: least squares over random orders, on sentences held out from training. The exact search of
kdlsq_fx/family_search.py (kinds stand for its widths) proposes orders within a budget of bytes; the best few are run,
and the winner goes on with the supernet's weights through ``prepare_qat`` and ``convert``, beside the same network
trained for as many more steps in floats. Every part of the training has sentences of its own draw.
benchmarks/lv_bert_qat.py measures this with more rows.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from lv_bert import KINDS, LVBert, LVBertConfig, SubLayer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import kdlsq_fx as kq
from kdlsq_fx.family import Member
from kdlsq_fx.family_search import Tables, best, smallest

Batch = dict[str, Tensor]
FILES = ("sst2/train.tsv.gz", "sst2/dev.tsv", "vocab/bert-base-uncased-tokenizer.json")
HELD_OUT = 512  # sentences of train that choose the order; an eighth of a smaller train


class SuperNet(LVBert):
    """An LV-BERT with one sub-layer of every kind at each position; ``order`` says which of them run."""

    def __init__(self, config: LVBertConfig) -> None:
        super().__init__(config)
        each = [nn.ModuleDict({k: SubLayer(k, config) for k in KINDS}) for _ in config.order]
        self.layers = nn.ModuleList(each)
        self.order = config.order

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """As :class:`LVBert`, through the sub-layers that ``order`` names."""
        x = self.embeddings(input_ids)
        for layer, kind in zip(self.layers, self.order, strict=True):
            x = layer[kind](x, attention_mask)  # type: ignore[index]
        return {"logits": self.head(x, attention_mask)}

    def member(self, order: str) -> LVBert:
        """The LV-BERT of that order, with copies of the weights."""
        made = LVBert(replace(self.config, order=order))
        own = {k: v for k, v in self.state_dict().items() if not k.startswith("layers.")}
        for i, kind in enumerate(order):
            own |= {f"layers.{i}.{k}": v for k, v in self.layers[i][kind].state_dict().items()}  # type: ignore[index]
        made.load_state_dict(own)
        return made

    def tables(self, loss: np.ndarray) -> Tables:
        """What the exact search reads: ``loss`` [positions, kinds], and bytes (:func:`stored`)."""
        size = [[sum(map(stored, layer[k].parameters())) for k in KINDS] for layer in self.layers]  # type: ignore[index]
        rest = float(sum(stored(p) for n, p in self.named_parameters() if not n.startswith("layers.")))
        places = range(len(self.layers))
        return Tables(
            bits=tuple(range(len(KINDS))), names=tuple(f"layers.{i}" for i in places), blocks=(-1,) * len(self.layers),
            loss=loss, costs={"bytes": np.array(size, float)}, fixed={"bytes": rest}, per_block={"bytes": np.zeros(0)},
            depths={(): 0.0},
        )  # fmt: skip


def stored(p: Tensor) -> int:
    """Bytes of a parameter at 8 bits: one a number of a weight or table, four a number of a bias or LayerNorm.

    What integers hold besides (a table of exponentials, LayerNorms in 64 bits) is not counted.
    """
    return p.numel() * (1 if p.dim() > 1 else 4)


def read(path: Path) -> tuple[list[str], Tensor]:
    """Sentences and labels of a table with a header."""
    data = path.read_bytes()
    with io.StringIO((gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")) as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [r["sentence"] for r in rows], torch.tensor([int(r["label"]) for r in rows])


class Sentences:
    """Encoded sentences with labels, in batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: list[str], labels: Tensor) -> None:
        coded = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
        self.inputs, self.labels = {k: coded[k] for k in ("input_ids", "attention_mask")}, labels

    def batch(self, rows: Tensor) -> tuple[Batch, Tensor]:
        longest = int(self.inputs["attention_mask"][rows].sum(1).max())
        return {k: v[rows, :longest] for k, v in self.inputs.items()}, self.labels[rows]

    def shuffled(self, steps: int, size: int, seed: int) -> Iterator[tuple[Batch, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield self.batch(torch.randint(len(self.labels), (size,), generator=generator))

    def judged(self, model: nn.Module, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
        """(cross entropy, whether the class is right) of every sentence, of a model in eval mode."""
        losses, right = [], []
        with torch.no_grad():
            for rows in torch.arange(len(self.labels)).split(size):
                inputs, labels = self.batch(rows)
                logits = model(**inputs)["logits"]
                losses.append(F.cross_entropy(logits, labels, reduction="none").numpy())
                right.append((logits.argmax(-1) == labels).numpy())
        return np.concatenate(losses).astype(float), np.concatenate(right)

    def measure(self, model: nn.Module) -> tuple[float, float]:
        """(mean cross entropy, accuracy) of a model in eval mode."""
        losses, right = self.judged(model)
        return float(losses.mean()), float(right.mean())


def load(folder: Path) -> tuple[Sentences, Sentences, Sentences]:
    """SST-2 of a folder of tasks: what trains, what is held out of train to judge orders, dev."""
    train, dev, words = (folder / name for name in FILES)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(words), pad_token="[PAD]", unk_token="[UNK]")
    texts, labels = read(train)
    at = len(texts) - min(HELD_OUT, len(texts) // 8)
    parts = ((texts[:at], labels[:at]), (texts[at:], labels[at:]), read(dev))
    return tuple(Sentences(tokenizer, *part) for part in parts)  # type: ignore[return-value]


def cross_entropy(model: nn.Module, inputs: Batch, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(**inputs)["logits"], labels)


def train(
    model: nn.Module,
    data: Sentences,
    steps: int,
    rate: float,
    seed: int,
    loss: Callable[[nn.Module, Batch, Tensor], Tensor] = cross_entropy,
) -> list[float]:
    """AdamW, batches of 64, a rate that falls to zero; the losses. ``seed`` draws the sentences and the dropout."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(kq.param_groups(model, lr=rate))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    seen = []
    for inputs, labels in tqdm(data.shuffled(steps, 64, seed), total=steps, disable=None):
        now = loss(model, inputs, labels)
        optimizer.zero_grad()
        now.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen.append(float(now.detach()))
    model.eval()
    return seen


def drawn(rng: np.random.Generator, depth: int) -> str:
    return "".join(map(str, rng.integers(0, len(KINDS), depth)))


def loss_of(net: SuperNet, data: Sentences, order: str) -> float:
    net.order = order
    return data.measure(net)[0]


def table_of(net: SuperNet, data: Sentences, rng: np.random.Generator, orders: int) -> np.ndarray:
    """[positions, kinds]: least squares of the losses of random orders, every position's mean taken off."""
    depth, kinds = len(net.layers), len(KINDS)
    seen = [drawn(rng, depth) for _ in range(orders)]
    has = np.zeros((orders, depth, kinds))
    for row, order in zip(has, seen):
        row[np.arange(depth), [int(k) for k in order]] = 1
    losses = np.array([loss_of(net, data, order) for order in tqdm(seen, disable=None)])
    found, *_ = np.linalg.lstsq(has.reshape(orders, -1), losses - losses.mean(), rcond=1e-6)
    table: np.ndarray = found.reshape(depth, kinds)
    return table - table.mean(axis=1, keepdims=True)


@dataclass(frozen=True)
class Found:
    """What a search saw: ``table`` [positions, kinds], and the held-out loss of each order that was run."""

    table: np.ndarray
    tried: dict[str, float]

    @property
    def winner(self) -> str:
        return min(self.tried, key=self.tried.__getitem__)


def search(
    net: SuperNet, learn: Sentences, judge: Sentences, *, steps: int, orders: int, tried: int, most: float
) -> Found:
    """Train the supernet with random orders, make its table from ``orders`` of them, run the ``tried`` orders that
    the table puts first among those of at most ``most`` bytes."""
    rng = np.random.default_rng(0)

    def of_an_order(model: nn.Module, inputs: Batch, labels: Tensor) -> Tensor:
        net.order = drawn(rng, len(net.layers))
        return cross_entropy(model, inputs, labels)

    train(net, learn, steps, 1e-3, 1, of_an_order)
    table = table_of(net, judge, rng, orders)
    found: list[Member] = best(net.tables(table), {"bytes": most}, tried)
    return Found(table, {order: loss_of(net, judge, order) for order in ("".join(map(str, m.bits)) for m in found)})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    for name, value in (("depth", 6), ("steps", 600), ("orders", 60), ("tried", 5), ("hidden", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--mib", type=float, default=8.0, help="at most; weights at 8 bits, all else four bytes each")
    parser.add_argument("--qconfig", default="W8E8A8-int")
    args = parser.parse_args(argv)
    net = supernet(args.depth, args.hidden)
    least = smallest(net.tables(np.zeros((args.depth, len(KINDS))))) / 2**20
    if args.mib < least:
        parser.error(f"--mib {args.mib:g}: the smallest of these orders takes {np.ceil(1e3 * least) / 1e3:g} MiB")
    if missing := [name for name in FILES if not (args.data / name).is_file()]:
        parser.error(f"{args.data} has no {missing[0]}")
    learn, judge, dev = load(args.data)
    found = search(
        net, learn, judge, steps=args.steps, orders=args.orders, tried=args.tried, most=args.mib * 2**20
    )  # fmt: skip
    print("loss of a kind (0 convolution, 1 attention, 2 feed-forward) at a position, above its mean:")
    print(np.array2string(found.table, precision=4, suppress_small=True))
    for order, loss in found.tried.items():
        print(f"  {order}: held-out loss {loss:.4f}")

    def say(name: str, measured: nn.Module) -> None:
        print("{} {}: dev loss {:.4f}, accuracy {:.4f}".format(found.winner, name, *dev.measure(measured)))

    model = net.member(found.winner)
    train(model, learn, args.steps, 5e-4, 2)
    say("float", model)
    qat = kq.prepare_qat(model, args.qconfig, example=learn.batch(torch.arange(4))[0])
    kq.calibrate(qat, [inputs for inputs, _ in learn.shuffled(8, 64, 3)])
    say(f"{args.qconfig}, calibrated", qat.eval())
    longer = deepcopy(model)
    for name, trained in (("float, trained on", longer), (f"{args.qconfig}, trained on", qat)):
        train(trained, learn, args.steps // 2, 2e-4, 4)
        say(name, trained)
    say(f"{args.qconfig}, integers", kq.convert(qat))


def supernet(depth: int, hidden: int) -> SuperNet:
    """A random supernet of ``depth`` positions, ``hidden`` wide."""
    torch.manual_seed(0)
    sizes = {"embedding_size": hidden // 2, "hidden_size": hidden, "intermediate_size": 2 * hidden}
    return SuperNet(LVBertConfig(order="0" * depth, positions=64, **sizes))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
