"""An LV-BERT found by search, then more steps in floats, with quantizers, and with quantizers and a teacher.

    python benchmarks/lv_bert_qat.py             # writes lv_bert_qat.md; about 10 minutes on a free core
    python benchmarks/lv_bert_qat.py --report    # only writes the page again

examples/lv_bert_search.py on SST-2 without pre-training: a supernet, the search of an order within a budget, the winner
trained in floats. From there every row goes on for as many steps, at one learning rate, on the same sentences in the
same order: in floats (the control), with quantizers on the labels, and with quantizers on the float network's hidden
states and logits (the KDLSQ loss, no labels). What the quantizers cost is the difference from the control.
One JSON under results/lv_bert_qat/, rewritten after every row. The recipe was set before any figure was seen.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import HERE, origin, say

sys.path.insert(0, str(HERE.parent / "examples"))

from lv_bert_search import Sentences, cross_entropy, load, search, supernet, train  # noqa: E402

import kdlsq_fx as kq  # noqa: E402
from kdlsq_fx.files import make_folder, read_json, write_json, write_text  # noqa: E402

RESULTS, REPORT = HERE / "results" / "lv_bert_qat", HERE / "lv_bert_qat.md"
SEARCH = {"steps": 300, "orders": 30, "tried": 5, "most": 2.3 * 2**20}  # bytes; three convolutions in six at most
DEPTH, HIDDEN, STEPS, MORE, LR, MORE_LR = 6, 128, 300, 150, 5e-4, 2e-4
PRESETS = ("W8E8A8-int", "W4E4A8-int")
CONTROL = "float, more steps"
SEEDS = {"supernet": 1, "float": 2, "calibration": 3, "more": 4}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data", help="folder with the tasks")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--report", action="store_true")
    args = p.parse_args()
    path = RESULTS / "sst2.json"
    if not args.report:
        torch.set_num_threads(args.threads)
        measure(args.data, path)
    write_text(REPORT, page(read_json(path)))
    say(f"written to {REPORT}")
    return 0


def measure(folder: Path, path: Path) -> None:
    learn, judge, dev = load(folder)
    began = time.process_time()
    net = supernet(DEPTH, HIDDEN)
    found = search(net, learn, judge, **SEARCH)  # type: ignore[arg-type]
    model = net.member(found.winner)
    out: dict[str, Any] = {
        "search": SEARCH, "tried": found.tried, "table": found.table.round(5).tolist(), "winner": found.winner,
        "sentences": {"train": len(learn.labels), "held_out": len(judge.labels), "dev": len(dev.labels)},
        "recipe": {"depth": DEPTH, "hidden": HIDDEN, "steps": STEPS, "more": MORE, "lr": LR, "more_lr": MORE_LR},
        "seeds": SEEDS, "rows": {}, "threads": torch.get_num_threads(), **origin(),
    }  # fmt: skip
    make_folder(RESULTS)

    def row(name: str, measured: torch.nn.Module, curve: list[float] | None = None) -> None:
        losses, right = dev.judged(measured)
        parts = np.array_split(np.array(curve), 10) if curve else []
        out["rows"][name] = {
            "losses": losses.round(5).tolist(), "right": right.astype(int).tolist(),
            "curve": [round(float(part.mean()), 5) for part in parts],
        }  # fmt: skip
        out["cpu_seconds"], out["load"] = round(time.process_time() - began), round(os.getloadavg()[0], 1)
        write_json(path, out)
        say(f"{name}: dev loss {losses.mean():.4f}, accuracy {right.mean():.4f}; {out['cpu_seconds']} CPU seconds")

    row("float", model, train(model, learn, STEPS, LR, SEEDS["float"]))
    longer = deepcopy(model)
    row(CONTROL, longer, train(longer, learn, MORE, MORE_LR, SEEDS["more"], cross_entropy))
    for preset in PRESETS:
        calibrated = prepared(model, preset, learn)
        row(f"{preset}, calibrated", calibrated)
        for kind in ("labels", "teacher"):
            qat = prepared(model, preset, learn)
            row(f"{preset}, {kind}", qat, trained(qat, model, learn, kind))
            row(f"{preset}, {kind}, integers", kq.convert(qat))


def prepared(model: torch.nn.Module, preset: str, learn: Sentences) -> Any:
    qat = kq.prepare_qat(model, preset, example=learn.batch(torch.arange(4))[0])
    kq.calibrate(qat, [inputs for inputs, _ in learn.shuffled(8, 64, SEEDS["calibration"])], progress=False)
    return qat.eval()


def trained(qat: Any, model: torch.nn.Module, learn: Sentences, kind: str) -> list[float]:
    """More steps, on the labels or on what the float model says; the losses."""
    if kind == "labels":
        return train(qat, learn, MORE, MORE_LR, SEEDS["more"])
    for module in qat.modules():  # the teacher has none, and its values are the target
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    kd = kq.distill(qat, model)
    return train(kd, learn, MORE, MORE_LR, SEEDS["more"], lambda kd, inputs, _: kd(**inputs).loss)


# --- the page


def page(out: dict[str, Any]) -> str:
    r, tried = out["recipe"], out["tried"]
    lines = [
        "# LV-BERT: more steps with and without quantizers",
        "",
        "Written by `benchmarks/lv_bert_qat.py`, which says how. "
        f"SST-2, no pre-training; {r['depth']} sub-layers, {r['hidden']} wide,",
        f"{r['steps']} steps of 64 in floats, then {r['more']} more in each row (learning rate {r['more_lr']:g}, "
        "the same sentences in the same",
        "order; `-int` presets; dropout 0.1 but in `teacher`). Figures are of the last step on the "
        f"{out['sentences']['dev']} sentences of dev. ± is one standard error",
        "of dev, paired in the last two columns; one seed, so the spread over seeds is not in it.",
        "",
        f"| order {out['winner']} | loss in training, first and last tenth | dev loss | accuracy "
        f"| dev loss less the control's | accuracy less the control's |",
        "|---" * 6 + "|",
    ]
    control = out["rows"][CONTROL]
    for name, found in out["rows"].items():
        curve = "{:.3f} → {:.3f}".format(found["curve"][0], found["curve"][-1]) if found["curve"] else "–"
        loss, right = np.array(found["losses"]), 100 * np.array(found["right"], float)
        gaps = [spread(loss - control["losses"], "+.3f"), spread(right - 100 * np.array(control["right"]), "+.1f")]
        cells = [curve, spread(loss, ".3f"), spread(right, ".1f"), *(["", ""] if name == CONTROL else gaps)]
        lines.append(f"| {name}{' (the control)' if name == CONTROL else ''} | {' | '.join(cells)} |")
    s = out["search"]
    lines += [
        "",
        "`teacher`: learns from the float network alone, from hidden states, attention scores and logits, without "
        "dropout, so its loss",
        "in training is another than that of the rows on labels.",
        "",
        "## The search before it",
        "",
        f"A supernet, {s['steps']} steps with random orders; {s['orders']} random orders on "
        f"{out['sentences']['held_out']} sentences held out of train",
        f"make the table; at most {s['most'] / 2**20:.1f} MiB.",
        "",
        "| position | 0 convolution | 1 attention | 2 feed-forward |",
        "|---|---|---|---|",
    ]
    lines += [f"| {i + 1} | {' | '.join(f'{v:+.4f}' for v in row)} |" for i, row in enumerate(out["table"])]
    lines += ["", "| order tried | held-out loss |", "|---|---|", *(f"| {o} | {v:.4f} |" for o, v in tried.items())]
    versions = ", ".join(f"{k} {v}" for k, v in out["versions"].items() if v != "absent")
    where = f"{out['machine']}, {out['cores']} cores, {out['threads']} thread(s), load {out['load']}"
    seeds = ", ".join(f"{k} {v}" for k, v in out["seeds"].items())
    took = f"{out['cpu_seconds'] / 60:.0f} CPU minutes in all"
    lines += ["", f"Seeds: {seeds}. {took}; {where}; {versions}; commit {out['commit']}; {out['date']}."]
    return "\n".join([*lines, ""])


def spread(values: np.ndarray, form: str) -> str:
    return f"{values.mean():{form}} ± {values.std(ddof=1) / np.sqrt(len(values)):{form.lstrip('+')}}"


if __name__ == "__main__":
    sys.exit(main())
