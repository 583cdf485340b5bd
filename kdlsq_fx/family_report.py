"""What a family's run tells people: tables in Markdown and JSON, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from kdlsq_fx import family_picture, job
from kdlsq_fx.family_job import TERM, Job, MemberRow
from kdlsq_fx.family_tables import measure_losses
from kdlsq_fx.files import read_json, write_json, write_text


def write_sensitivity(task: Job) -> str:
    """``sensitivity.md``, ``.json`` and ``.svg``; the table as text, the most sensitive weight first."""
    family = task.family
    with task.losses() as losses:
        table, _ = measure_losses(losses, TERM)
        total, _ = measure_losses(losses, "loss")
    rows = [
        {"weight": s.name, "elements": family.weight(i).numel(), "read_by": [site for site, _, _ in s.readers]}
        | {"output": _by_width(family.bits, table[i]), "loss": _by_width(family.bits, total[i])}
        for i, s in enumerate(family.switches)
    ]
    write_json(task.out / "sensitivity.json", {"format": 1, "rows": losses.rows, "weights": rows})
    names, widths = [s.name for s in family.switches], family.bits[:-1]
    title = f"{_measure(task)} added by one weight alone, all others at {family.bits[-1]} bits"
    family_picture.write(
        family_picture.sensitivity(names, widths, table[:, :-1].tolist(), title), task.out / "sensitivity.svg"
    )
    order = np.argsort(-table[:, 0])
    lines = [f"{title}; {losses.rows} rows held out of train.", ""]
    lines += [
        "| weight | elements | " + " | ".join(f"{b} bits" for b in widths) + " |",
        "|---" * (2 + len(widths)) + "|",
    ]
    for i in order:
        cells = " | ".join(f"{v:.2g}" for v in table[i, :-1])
        lines.append(f"| {names[i]} | {family.weight(i).numel()} | {cells} |")
    text = "\n".join(lines)
    write_text(task.out / "sensitivity.md", text + "\n")
    return text


def _by_width(bits: Sequence[int], values: Any) -> dict[str, float]:
    return {str(b): float(v) for b, v in zip(bits, values)}


def _measure(task: Job) -> str:
    return "squared error of the output" if task.dataset.task.outputs == 1 else "KL to the teacher (nats)"


def write_table(task: Job, rows: Sequence[MemberRow]) -> str:
    """``table.md``, ``table.json`` and ``pareto.svg`` of these members and those that an earlier call wrote, with the
    float model on top; the table as text."""
    rows = sorted({r.name: r for r in (*_earlier(task), *rows)}.values(), key=lambda r: r.size)
    fp32 = job.measure("fp32", "fp32", task.start, replace(task.dataset, device="cpu"))
    size = sum(p.numel() * p.element_size() for p in task.start.parameters())
    text = table_text(rows, replace(fp32, size=size), _measure(task))
    write_text(task.out / "table.md", text + "\n")
    write_json(task.out / "table.json", {"format": 1, "members": [asdict(r) for r in rows], "fp32": fp32.scores})
    members = [(r.size / 2**20, r.scores["headline"], r.scores["headline_se"]) for r in rows]
    level = [(at, fp32.scores["headline"], 0.0) for at in (0.0, max(m[0] for m in members))]
    series = [
        family_picture.Points("members of the family", members, [r.name for r in rows]),
        family_picture.Points("fp32", level),
    ]
    title = f"{task.dataset.task.name}: one training, {len(rows)} models"
    picture = family_picture.scatter(series, title=title, x="MiB of constants.safetensors", y="points on dev")
    family_picture.write(picture, task.out / "pareto.svg")
    return text


def _earlier(task: Job) -> list[MemberRow]:
    path = task.out / "table.json"
    known = read_json(path)["members"] if path.is_file() else []
    whole = ({**m, "widths": {int(b): share for b, share in m["widths"].items()}} for m in known)
    return [MemberRow(**{**m, "left_out": tuple(m["left_out"])}) for m in whole]


def table_text(rows: Sequence[MemberRow], fp32: job.Row, measure: str) -> str:
    """Markdown, one line a member."""
    first = "| budget | MiB | elements at each width | blocks left out | bit operations (G) | ms"
    lines = [f"{first} | {measure}, held out | dev |", "|---" * 8 + "|"]
    score = f"{fp32.scores['headline']:.1f} ± {fp32.scores['headline_se']:.1f}"
    lines.append(f"| fp32 | {fp32.size / 2**20:.1f} | | | | | | {score} |")
    for row in rows:
        widths = ", ".join(f"{b}: {100 * share:.0f} %" for b, share in row.widths.items() if share)
        gone = ", ".join(map(str, row.left_out)) or "none"
        ms = "" if row.ms is None else f"{row.ms:.1f}"
        score = f"{row.scores['headline']:.1f} ± {row.scores['headline_se']:.1f}"
        lines.append(
            f"| {row.name} | {row.size / 2**20:.2f} | {widths} | {gone} | {row.bitops / 1e9:.1f} | {ms} | "
            f"{row.held_out:.3g} | {score} |"
        )
    return "\n".join(lines)
