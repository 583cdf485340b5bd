"""The examples of README and docs, run as they are written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch, tiny

import kdlsq_fx as kq
from kdlsq_fx.op import BY_NAME, BY_TARGET
from kdlsq_fx.qconfig import (
    HEADS,
    INIT_NAMES,
    NONLINEAR_NAMES,
    PLACEMENTS,
    QUANTIZER_NAMES,
    QConfig,
    QSpec,
    Rule,
)

ROOT = Path(__file__).parents[1]


def blocks(name: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(code: str, known: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "example", "exec"), known)  # our own text
    return known


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("bert").eval()
    known = run(blocks("README.md")[0], {"model": model, "batches": [batch(seed=1), batch(seed=2)]})
    assert "same codes" in capsys.readouterr().out
    assert {"qat", "int", "model.onnx"} <= {p.name for p in folder.iterdir()}
    data = batch(seed=3)
    loaded = [kq.from_pretrained(name)(**data).logits for name in ("qat", "int")]
    assert torch.equal(loaded[0], known["qat"](**data).logits) and torch.equal(
        loaded[1], known["int_model"](**data).logits
    )


def test_pages_that_are_named_are_there() -> None:
    files = [p for name in ("kdlsq_fx", "passes", "backends", "docs") for p in (ROOT / name).rglob("*.*")]
    named = {m for p in files if p.suffix in (".py", ".md") for m in re.findall(r"\bdocs/[\w/-]+\.\w+", p.read_text())}
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 5 and len(links) > 5
    assert not [name for name in {*named, *links} if not (ROOT / name).exists()]


def test_the_rule_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (rule,) = re.findall(r"`(kq\.preset\([^`]*\))`", text)
    qat = kq.prepare_qat(tiny("bert"), eval(rule, {"kq": kq}))  # our own text
    bits = {name: m.spec.bits for name, m in qat.named_modules() if getattr(m, "role", "") == "weight"}
    first = {b for name, b in bits.items() if ".layer.0." in name}
    rest = {b for name, b in bits.items() if ".layer.0." not in name}
    assert first == {8} and rest == {2}


def test_the_qconfig_page() -> None:
    text = (ROOT / "docs/qconfig.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```json\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    config = QConfig.from_json(example)
    table = kq.prepare_qat(tiny("bert"), config).table()
    assert "weight:lsq8 per channel" in table and "weight:lsq4 per row" in table
    for cls in (QConfig, Rule, QSpec):
        (part,) = re.findall(rf"^### `{cls.__name__}`.*?\n(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE)
        rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|", part, re.MULTILINE))
        assert set(rows) - {"format"} == {f.name for f in fields(cls)}
        for f in fields(cls):
            needed = f.default is MISSING
            assert (rows[f.name].strip() == "required") is needed, f.name
            if not needed:
                default = list(f.default) if isinstance(f.default, tuple) else f.default
                assert rows[f.name].strip() == f"`{json.dumps(default)}`", f.name
    for name in (*QUANTIZER_NAMES, *INIT_NAMES, *NONLINEAR_NAMES, *PLACEMENTS, *HEADS):
        assert f'`"{name}"`' in text, name
    run(blocks("docs/qconfig.md")[0], {"model": tiny("bert").eval()})


def test_writing_a_pass(capsys: pytest.CaptureFixture[str]) -> None:
    aten = torch.ops.aten

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.transpose(0, 1).transpose(0, 1))  # type: ignore[no-any-return]

    first, second = blocks("docs/writing_a_pass.md")
    known = run(first, {"model": tiny("bert").eval()})
    assert known["qat"].stage == "qat"
    known["my_pass"] = known["fold_double_transpose"]
    known["my_pass"].__name__ = "my_pass"
    run(second, known)
    assert "my_pass" in capsys.readouterr().out
    folded = kq.prepare_qat(Twice(), "W8E8A8", example=(torch.randn(3, 6),), passes=[known["my_pass"]])
    assert not folded.gm.graph.find_nodes(op="call_function", target=aten.transpose.int)
    kept = kq.prepare_qat(Twice(), "W8E8A8", example=(torch.randn(3, 6),))
    assert len(kept.gm.graph.find_nodes(op="call_function", target=aten.transpose.int)) == 2


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Ops declared by a test are gone afterwards."""
    before = dict(BY_NAME), dict(BY_TARGET)
    yield
    for table, kept in zip((BY_NAME, BY_TARGET), before):
        table.clear()
        table.update(kept)


def test_declaring_an_op(forgotten: None, tmp_path: Path) -> None:
    model = tiny("bert", hidden_act="mish").eval()
    with pytest.raises(kq.KdlsqError, match=r"mish.*layer\.0\.intermediate"):
        kq.prepare_qat(model, "W8E8A8")
    (code,) = blocks("docs/declaring_an_op.md")
    op = run(code, {})["MISH"]
    (x,), _ = op.sample()
    torch.testing.assert_close(torch.from_numpy(op.numpy(x.numpy())), torch.nn.functional.mish(x))
    rules = kq.preset("W8E8A8").with_rules(kq.Rule(op="mish", act=kq.QSpec(bits=8)))
    qat = kq.prepare_qat(model, rules)
    kq.calibrate(qat, [batch()], progress=False)
    qat.eval()
    program = kq.convert(qat)
    assert not any(island.op == "mish" for island in program.islands)
    assert kq.compare(qat, program, batch(seed=4)).max_steps <= 1
    torch.testing.assert_close(program(**batch()).logits, qat(**batch()).logits, atol=0.02, rtol=0)
    kq.export_onnx(qat, tmp_path / "model.onnx")


def test_an_export_compared_site_by_site(capsys: pytest.CaptureFixture[str]) -> None:
    qat = kq.prepare_qat(tiny("bert").eval(), "W8E8A8")
    kq.calibrate(qat, [batch()], progress=False)
    run(blocks("docs/targets.md")[0], {"kq": kq, "qat": qat.eval(), "batch": batch(seed=4)})
    assert "end to end: off" in capsys.readouterr().out


def test_a_plan_as_the_page_makes_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = tiny("bert", hidden_size=48, num_hidden_layers=4).eval()
    qat = kq.prepare_qat(tiny("bert"), "W8E8A8")
    kq.calibrate(qat, [batch()], progress=False)
    known = run(blocks("docs/distillation.md")[0], {"kq": kq, "torch": torch, "qat": qat, "teacher": teacher})
    assert "projection hidden: 32 -> 48" in capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {"plan.svg", "plan.json"}
    trained = {id(p) for group in known["optimizer"].param_groups for p in group["params"]}
    assert all(id(p) in trained for p in known["kd"].projections.parameters())
    assert torch.isfinite(known["kd"](**batch()).loss)


def test_two_stages_with_rates_of_their_own(folder: Path) -> None:
    from test_kd_cache import data

    qat = kq.prepare_qat(tiny("bert"), "W8E8A8")
    kq.calibrate(qat, [batch()], progress=False)
    known = {"kq": kq, "qat": qat, "teacher": tiny("bert", seed=1).eval(), "train": data(8)}
    run(next(code for code in blocks("docs/distillation.md") if 'schedule="joint"' in code), known)
    for stage, term in (("states", "hidden"), ("logits", "logits")):
        lines = (folder / stage / "log.tsv").read_text().splitlines()[1:]
        assert lines and all(term in line for line in lines)
        assert set(known[stage](**batch()).parts) == {term}
