"""A 4-layer student made from MiniLM's layers, taught by MiniLM itself under several tap plans; no labels.

    python benchmarks/tap_plans.py --out runs/tap_plans             some minutes a row on two cores
    python benchmarks/tap_plans.py --steps 40 --rows "pooled" --rows "uniform"

Each row starts from the same student (blocks 2, 3, 4 and 6 of the teacher: the uniform map) and sees the same batches
of docstring paragraphs; it tells the mean cosine of its sentence vectors to the teacher's on held-out paragraphs.
Stopped at any moment, it goes on where it was. Writes results.json.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from torch import nn

import kdlsq_fx as kq
from kdlsq_fx.corpus import load_corpus
from kdlsq_fx.demo import LOSS, open_encoder
from kdlsq_fx.files import make_folder, read_json, write_json
from kdlsq_fx.layer_maps import layer_pairs
from kdlsq_fx.opening import load_tokenizer, model_source
from kdlsq_fx.sentence import cosines, embed, encode_texts
from kdlsq_fx.train import fit

LAYERS, LENGTH, SEED = 4, 64, 42
ROWS: dict[str, dict[str, Any]] = {
    "pooled": {"kinds": ["pooled"]},
    "uniform": {"layer_map": "uniform"},
    "hsk:5": {"layer_map": "hsk:5"},
    "top": {"layer_map": "top"},
    "skip": {"layer_map": "skip"},
}


def shallower(teacher: nn.Module, layers: int) -> nn.Module:
    """The teacher with the blocks of the uniform map only."""
    student: Any = copy.deepcopy(teacher)
    blocks = student.encoder.layer
    student.encoder.layer = nn.ModuleList(blocks[b - 1] for a, b in layer_pairs("uniform", layers, len(blocks)) if a)
    student.config.num_hidden_layers = layers
    return student  # type: ignore[no-any-return]


def measure(name: str, args: argparse.Namespace, teacher: nn.Module, train: Any, held_out: Any, target: Any) -> Any:
    """One row, made once and then read back."""
    file = args.out / f"{name.replace(':', '')}.json"
    if file.is_file():
        return read_json(file)
    qat = kq.prepare_qat(shallower(teacher, LAYERS), args.qconfig)
    kq.calibrate(qat, train.sample(4, batch_size=args.batch, seed=SEED), progress=False)
    start = cosines(embed(qat.eval(), held_out, title=f"{name}, before"), target)
    plan = kq.plan_taps(qat, teacher, **{"kinds": ["hidden", "attention", "pooled"], **ROWS[name]})
    kd = kq.distill(qat, teacher, plan=plan, **LOSS)
    run = file.with_suffix("")
    done = fit(
        kd, train, out_dir=run, steps=args.steps, lr=args.lr, batch_size=args.batch, seed=SEED,
        groups=kq.param_groups(kd, lr=args.lr), title=name,
    )  # fmt: skip
    end = cosines(embed(qat.eval(), held_out, title=f"{name}, after"), target)
    row = {
        "plan": name, "taps": len(plan.taps), "layers": {str(k): v for k, v in plan.layers().items()},
        "before": float(start.mean()), "after": float(end.mean()), "lowest": float(end.min()), "loss": done.loss,
    }  # fmt: skip
    write_json(file, row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tap_plans"))
    parser.add_argument("--rows", action="append", choices=list(ROWS), help="all of them without it")
    parser.add_argument("--qconfig", default="W8E8A8")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args()
    make_folder(args.out)
    source = model_source("minilm")
    tokenizer, teacher, corpus = load_tokenizer(source), open_encoder(source), load_corpus()
    train = encode_texts(corpus.train, tokenizer, max_length=LENGTH)
    held_out = encode_texts(corpus.held_out[: args.held_out], tokenizer, max_length=LENGTH)
    target = embed(teacher, held_out, title="teacher")
    rows = []
    for name in args.rows or ROWS:
        rows.append(measure(name, args, teacher, train, held_out, target))
        print("{plan:8s} {taps:3d} taps  cosine {before:.4f} -> {after:.4f} (lowest {lowest:.4f})".format(**rows[-1]))
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("out", "rows")}
    write_json(args.out / "results.json", {"settings": settings, "corpus": corpus.describe(), "rows": rows})


if __name__ == "__main__":
    main()
