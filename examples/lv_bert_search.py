"""Search the order of an LV-BERT's sub-layers on SST-2, then train the one found with quantizers.

    python examples/lv_bert_search.py DATA [--depth 6] [--steps 600] [--mib 8.0] [--qconfig W8E8A8-int]

``DATA`` has ``sst2/train.tsv.gz``, ``sst2/dev.tsv`` and ``vocab/bert-base-uncased-tokenizer.json``. A supernet holds
all three kinds of sub-layer at every position and is trained with random orders. A table says what a kind at a position
adds to the loss: least squares over random orders, on sentences held out from training. The exact search of
kdlsq_fx/family_search.py (kinds stand for its widths) proposes orders within a budget of bytes; the best few are run,
and the winner goes on with the supernet's weights through ``prepare_qat`` and ``convert``.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
from collections.abc import Iterator
from dataclasses import replace
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
from kdlsq_fx.family_search import Tables, best

Batch = dict[str, Tensor]


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
        """What the exact search reads: ``loss`` [positions, kinds], and the bytes of int8 weights."""
        size = [[float(sum(p.numel() for p in layer[k].parameters())) for k in KINDS] for layer in self.layers]  # type: ignore[index]
        rest = float(sum(p.numel() for n, p in self.named_parameters() if not n.startswith("layers.")))
        places = range(len(self.layers))
        return Tables(
            bits=tuple(range(len(KINDS))), names=tuple(f"layers.{i}" for i in places), blocks=(-1,) * len(self.layers),
            loss=loss, costs={"bytes": np.array(size)}, fixed={"bytes": rest}, per_block={"bytes": np.zeros(0)},
            depths={(): 0.0},
        )  # fmt: skip


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

    def measure(self, model: nn.Module, size: int = 128) -> tuple[float, float]:
        """(mean cross entropy, accuracy) of a model in eval mode."""
        loss, right = 0.0, 0
        with torch.no_grad():
            for rows in torch.arange(len(self.labels)).split(size):
                inputs, labels = self.batch(rows)
                logits = model(**inputs)["logits"]
                loss += float(F.cross_entropy(logits, labels, reduction="sum"))
                right += int((logits.argmax(-1) == labels).sum())
        return loss / len(self.labels), right / len(self.labels)


def train(model: nn.Module, data: Sentences, steps: int, rate: float, rng: np.random.Generator | None = None) -> None:
    """AdamW, batches of 64, a rate that falls to zero; with ``rng`` each step runs an order of its own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for inputs, labels in tqdm(data.shuffled(steps, 64, 1), total=steps, disable=None):
        if rng is not None:
            model.order = drawn(rng, len(model.layers))  # type: ignore[arg-type, assignment]
        loss = F.cross_entropy(model(**inputs)["logits"], labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    for name, value in (("depth", 6), ("steps", 600), ("orders", 60), ("tried", 5), ("hidden", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--mib", type=float, default=8.0, help="int8 bytes of all weights at most")
    parser.add_argument("--qconfig", default="W8E8A8-int")
    args = parser.parse_args()
    torch.manual_seed(0)
    words = str(args.data / "vocab" / "bert-base-uncased-tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=words, pad_token="[PAD]", unk_token="[UNK]")
    texts, labels = read(args.data / "sst2" / "train.tsv.gz")
    held = len(texts) - 512
    learn = Sentences(tokenizer, texts[:held], labels[:held])
    judge = Sentences(tokenizer, texts[held:], labels[held:])
    dev = Sentences(tokenizer, *read(args.data / "sst2" / "dev.tsv"))

    sizes = {"embedding_size": 64, "hidden_size": args.hidden, "intermediate_size": 2 * args.hidden}
    net = SuperNet(LVBertConfig(order="0" * args.depth, positions=64, **sizes))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    train(net, learn, args.steps, 1e-3, rng)
    table = table_of(net, judge, rng, args.orders)
    print("loss of a kind (0 convolution, 1 attention, 2 feed-forward) at a position, above its mean:")
    print(np.array2string(table, precision=4, suppress_small=True))

    found: list[Member] = best(net.tables(table), {"bytes": args.mib * 2**20}, args.tried)
    orders = ["".join(map(str, m.bits)) for m in found]
    true = {order: loss_of(net, judge, order) for order in orders}
    for order, loss in true.items():
        print(f"  {order}: held-out loss {loss:.4f}")
    winner = min(true, key=true.__getitem__)

    model = net.member(winner)
    train(model, learn, args.steps, 5e-4)
    print(f"{winner} float: dev loss and accuracy {dev.measure(model)}")
    qat = kq.prepare_qat(model, args.qconfig, example=learn.batch(torch.arange(4))[0])
    kq.calibrate(qat, [inputs for inputs, _ in learn.shuffled(8, 64, 2)])
    print(f"{winner} {args.qconfig}, calibrated: {dev.measure(qat.eval())}")
    train(qat, learn, args.steps // 2, 2e-4)
    print(f"{winner} {args.qconfig}, trained: {dev.measure(qat)}; integers: {dev.measure(kq.convert(qat))}")


if __name__ == "__main__":
    main()
