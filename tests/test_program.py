"""Integer models as folders: the same results after loading, clear errors for damaged ones, no transformers needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import calibrated, converted
from families import batch
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import BertForSequenceClassification

from kdlsq_fx.api import from_pretrained
from kdlsq_fx.backends.reference import ReferenceModel
from kdlsq_fx.errors import CheckpointError, ConfigError
from kdlsq_fx.files import CONSTANTS
from kdlsq_fx.program import PROGRAM, load_program, program_text, save_program

DATA = batch(rows=4, length=9, seed=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int")
    converted("W4E4A4-lsq+-int", "reference").save_pretrained(path)
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_loaded_program_gives_the_same_results(folder: Path) -> None:
    for backend in ("torch", "reference"):
        want, model = converted("W4E4A4-lsq+-int", backend), from_pretrained(folder, backend=backend)
        assert torch.equal(model(**DATA).logits, want(**DATA).logits)
        assert type(model(**DATA)) is type(want(**DATA))
        assert model.islands == want.islands and model.qconfig == want.qconfig
    gm, original = load_program(folder), converted("W4E4A4-lsq+-int").gm
    assert program_text(gm) == program_text(original)
    assert [n.meta.get("site") for n in gm.graph.nodes] == [n.meta.get("site") for n in original.graph.nodes]
    assert ReferenceModel(gm)(**DATA)[0].shape == (4, 2)


def test_saving_again_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    from_pretrained(folder).save_pretrained(tmp_path)
    for name in (PROGRAM, CONSTANTS, "kdlsq.json", "run_int.py"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_transformers_takes_it_for_no_float_model(folder: Path) -> None:
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        BertForSequenceClassification.from_pretrained(folder)


def test_labels_give_the_loss_after_loading(folder: Path) -> None:
    labels = torch.tensor([0, 1, 1, 0])
    want = converted("W4E4A4-lsq+-int")(**DATA, labels=labels).loss
    assert torch.equal(from_pretrained(folder, backend="torch")(**DATA, labels=labels).loss, want)


def test_inputs_have_defaults_and_limits_after_loading(folder: Path) -> None:
    model = from_pretrained(folder)
    full = model(DATA["input_ids"].clamp(min=1), attention_mask=torch.ones_like(DATA["input_ids"]))
    assert torch.equal(model(DATA["input_ids"].clamp(min=1)).logits, full.logits)
    with pytest.raises(ValueError, match="vocabulary"):
        model(DATA["input_ids"] + 1000)


NO_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None
import torch
from pathlib import Path
from kdlsq_fx.backends import load_executor
model = load_executor(Path(sys.argv[1]), "reference")
out = model(input_ids=torch.arange(1, 9).reshape(2, 4))
assert "onnx" not in sys.modules
print(type(out).__name__, tuple(out.logits.shape), float(out.logits[0, 0]))
"""


def test_loading_needs_no_transformers(folder: Path) -> None:
    run = [sys.executable, "-c", NO_TRANSFORMERS, str(folder)]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    name, *_, value = done.stdout.split()
    want = from_pretrained(folder)(input_ids=torch.arange(1, 9).reshape(2, 4)).logits[0, 0]
    assert name == "Fields" and float(value) == float(want)


def edit(path: Path, change: Any) -> None:
    program = json.loads((path / PROGRAM).read_text())
    change(program)
    (path / PROGRAM).write_text(json.dumps(program))


def test_a_truncated_safetensors_file(copied: Path) -> None:
    whole = (copied / CONSTANTS).read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        (copied / CONSTANTS).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=CONSTANTS):
            load_program(copied)


def test_constants_of_another_program(copied: Path, tmp_path: Path) -> None:
    converted("W8E8A8-int").save_pretrained(tmp_path / "other")
    (copied / CONSTANTS).write_bytes((tmp_path / "other" / CONSTANTS).read_bytes())
    with pytest.raises(CheckpointError, match="is not the file"):
        load_program(copied)


def test_a_save_over_another_model_that_was_stopped(copied: Path, tmp_path: Path) -> None:
    converted("W8E8A8-int").save_pretrained(tmp_path / "other")
    for name in (CONSTANTS, PROGRAM):  # written before kdlsq.json
        (copied / name).write_bytes((tmp_path / "other" / name).read_bytes())
    assert load_program(copied)
    with pytest.raises(CheckpointError, match=r"(?s)kdlsq.json belongs to another.*save the model again"):
        from_pretrained(copied)


@pytest.mark.parametrize("version, do", [(99, "upgrade"), (2, "convert the model again"), (None, "")])
def test_another_format(copied: Path, version: Any, do: str) -> None:
    edit(copied, lambda p: p.update(format=version))
    with pytest.raises(CheckpointError, match=rf"(?s)format {version}.*{do}"):
        load_program(copied)
    with pytest.raises(CheckpointError, match=f"format {version}"):
        from_pretrained(copied)


def test_codes_outside_a_packed_range(tmp_path: Path) -> None:
    converted("W2E2A8-int").save_pretrained(tmp_path)
    assert load_program(tmp_path)
    with safe_open(tmp_path / CONSTANTS, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    name = next(n for n, row in json.loads(metadata["layout"])["packed"].items() if row["levels"] == 3)
    tensors[name][1] = 243
    save_file(tensors, tmp_path / CONSTANTS, metadata)
    with pytest.raises(CheckpointError, match=f"{name} is damaged: byte 1 is 243"):
        load_program(tmp_path)


def test_missing_files(copied: Path) -> None:
    (copied / CONSTANTS).unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        load_program(copied)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_program(copied / "nowhere")
    with pytest.raises(CheckpointError, match="does not exist"):
        from_pretrained(copied / "nowhere")


def test_an_unknown_op(copied: Path) -> None:
    def change(program: Any) -> None:
        next(n for n in program["nodes"] if n.get("op") == "requantize")["op"] = "teleport"

    edit(copied, change)
    with pytest.raises(CheckpointError, match="'teleport'.*query/linear/q"):
        load_program(copied)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.pop("nodes"),
        lambda p: p["nodes"].pop(3),
        lambda p: p["nodes"][-1].pop("args"),
        lambda p: p.update(outputs={"node": "nobody"}),
        lambda p: p["nodes"][-1].update(args=[{"pickle": "x"}]),
        lambda p: p["nodes"][-1].update(args=[{"dtype": "Tensor"}]),
        lambda p: p.update(constants=None),
    ],
)
def test_damaged_programs(copied: Path, change: Any) -> None:
    edit(copied, change)
    with pytest.raises(CheckpointError):
        load_program(copied)


def test_a_constant_that_is_missing(copied: Path) -> None:
    def change(program: Any) -> None:
        next(n for n in program["nodes"] if "constant" in n)["constant"] = "gone"

    edit(copied, change)
    with pytest.raises(CheckpointError, match="gone"):
        load_program(copied)


def test_unwritable_targets(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot write"):
        converted("W8E8A8-int").save_pretrained(tmp_path / "file")


def test_only_graphs_of_declared_functions_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="convert the model first"):
        save_program(calibrated("W8E8A8").gm, tmp_path)
    assert not list(tmp_path.iterdir())


def test_arguments_a_folder_has_no_use_for(folder: Path, tmp_path: Path) -> None:
    calibrated("W8E8A8").save_pretrained(tmp_path)
    for path, options, says in (
        (folder, {"model": torch.nn.Identity()}, "no model= and no passes="),
        (folder, {"passes": [print]}, "no model= and no passes="),
        (tmp_path, {"backend": "native"}, "for an int folder only"),
    ):
        with pytest.raises(ConfigError, match=says):
            from_pretrained(path, **options)


def test_unknown_backend(folder: Path) -> None:
    with pytest.raises(ConfigError, match="reference, torch"):
        from_pretrained(folder, backend="fpga")
