"""What people hand to a captured model that they would hand to a Hugging Face one, sensible or not."""

from __future__ import annotations

import copy
import io
import json
import pickle
import resource
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import batch, tiny
from torch import nn

import kdlsq_fx as kq
from kdlsq_fx.errors import CalibrationError, CaptureError, CheckpointError, ConfigError, InputError
from kdlsq_fx.files import write_tensors


def ready(model: nn.Module, preset: str = "W8E8A8", **kwargs: Any) -> Any:
    qat = kq.prepare_qat(model, preset, **kwargs)
    kq.calibrate(qat, [kwargs.get("example") or batch()], progress=False)
    return qat.eval()


@pytest.fixture(scope="module")
def qat() -> Any:
    return ready(tiny("bert").eval())


@pytest.fixture(scope="module")
def models(qat: Any) -> dict[str, Any]:
    return {"qat": qat, "reference": kq.convert(qat), "torch": kq.convert(qat, backend="torch")}


# --- the call


@pytest.mark.parametrize("kind", ["qat", "reference", "torch"])
def test_return_dict_false_gives_the_fields_in_order(models: dict[str, Any], kind: str) -> None:
    data, labels = batch(), torch.tensor([0, 1, 1, 0])
    whole = models[kind](**data, labels=labels)
    loss, logits = models[kind](**data, labels=labels, return_dict=False)
    assert torch.equal(loss, whole.loss) and torch.equal(logits, whole.logits)
    assert type(models[kind](**data, return_dict=False)) is tuple
    assert models[kind](**data, return_dict=True, output_attentions=False, output_hidden_states=None).logits is not None


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_whole_numbers_of_any_type(models: dict[str, Any], dtype: torch.dtype) -> None:
    data = batch()
    for model in models.values():
        want = model(**data).logits
        assert torch.equal(model(**{k: v.to(dtype) for k, v in data.items()}).logits, want)
        for mask in (data["attention_mask"].bool(), data["attention_mask"].float()):
            assert torch.equal(model(**{**data, "attention_mask": mask}).logits, want)


def test_one_row_of_one_token(models: dict[str, Any]) -> None:
    data = batch(rows=1, length=1)
    assert all(m(**data).logits.shape == (1, 2) for m in models.values())


IDS = batch()["input_ids"]
BAD = {
    "output_hidden_states": ({"output_hidden_states": True}, "distill.. reads inner values at taps"),
    "output_attentions": ({"output_attentions": True}, "output_attentions was not captured"),
    "inputs_embeds": ({"inputs_embeds": torch.zeros(4, 9, 32)}, "inputs_embeds was not captured"),
    "unknown": ({"foo": 1}, "foo was not captured"),
    "a list": ({"input_ids": IDS.tolist()}, "is a list, not a tensor"),
    "an array": ({"attention_mask": IDS.numpy()}, "is a ndarray, not a tensor"),
    "float ids": ({"input_ids": IDS.float()}, "torch.float32"),
    "one row of ids": ({"input_ids": IDS[0]}, "non-empty .batch, length. tensor"),
    "a mask of another length": ({"attention_mask": torch.ones(4, 8)}, r"shape \(4, 8\), input_ids \(4, 9\)"),
    "a mask of one row": ({"attention_mask": torch.ones(1, 9)}, r"shape \(1, 9\)"),
    "a ready mask": ({"attention_mask": torch.zeros(4, 1, 9, 9)}, r"shape \(4, 1, 9, 9\)"),
    "types": ({"token_type_ids": torch.full_like(IDS, 2)}, "types from 0 to 1"),
    "negative types": ({"token_type_ids": torch.full_like(IDS, -1)}, "types from 0 to 1"),
    "a NaN mask": ({"attention_mask": torch.full((4, 9), float("nan"))}, "NaN"),
    "class numbers": ({"labels": torch.tensor([0, 1, 2, 0])}, "labels do not fit"),
    "negative class": ({"labels": torch.tensor([0, 1, -7, 0])}, "labels do not fit"),
    "labels of another batch": ({"labels": torch.tensor([0, 1])}, "labels do not fit"),
    "float labels of one column": ({"labels": torch.zeros(4)}, r"labels \(4,\) torch.float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_told(models: dict[str, Any], case: str) -> None:
    changes, says = BAD[case]
    for model in models.values():
        with pytest.raises(InputError, match=says):
            model(**{**batch(), **changes})


@pytest.mark.parametrize("family", ["RobertaPreLayerNorm", "Data2VecText", "XLMRobertaXL", "XLMRoberta", "MPNet"])
def test_positions_counted_from_the_pad_id(family: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=99, max_position_embeddings=12, pad_token_id=1, **sizes
    )
    model = getattr(transformers, f"{family}Model")(config).eval()
    qat = kq.prepare_qat(model, "W8E8A8", fuel=0)
    ids = torch.full((1, 11), 5)
    longest = {"input_ids": ids[:, :10], "attention_mask": torch.ones(1, 10).long()}
    assert model(**longest).last_hidden_state.shape[1] == qat(**longest).last_hidden_state.shape[1] == 10
    with pytest.raises(InputError, match="11 ids is longer than the 10 positions"):
        qat(input_ids=ids, attention_mask=torch.ones_like(ids))


# --- losses


class Derived(transformers.BertForSequenceClassification):
    """A user's own class on top of Hugging Face's."""


@pytest.mark.parametrize("cls", [transformers.BertForSequenceClassification, Derived])
@pytest.mark.parametrize(
    ("kind", "width", "labels"),
    [
        ("regression", 1, torch.randn(4)),
        ("regression", 1, torch.randn(4, 1)),
        ("regression", 2, torch.randn(4, 2)),
        ("multi_label_classification", 3, torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])),
        ("single_label_classification", 4, torch.tensor([0, 3, 1, 2])),
        (None, 1, torch.randn(4)),
        (None, 3, torch.rand(4, 3)),
    ],
)
def test_problem_types(cls: Any, kind: str | None, width: int, labels: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = cls(tiny("bert", num_labels=width, problem_type=kind).config).eval()
    model.set_attn_implementation("eager")
    student = kq.prepare_qat(model, "W8E8A8", fuel=0).eval()
    got, want = student(**batch(), labels=labels).loss, model(**batch(), labels=labels).loss
    torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-6)


def test_a_head_whose_loss_is_not_known_says_so() -> None:
    """Hugging Face shifts the labels of a causal head; a plain cross-entropy would be another loss."""
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(
        transformers.BertConfig(**{**tiny("bert").config.to_dict(), "is_decoder": True})
    )
    student = kq.prepare_qat(model, "W8E8A8", fuel=0).eval()
    with pytest.raises(InputError, match="BertLMHeadModel has no loss"):
        student(**batch(), labels=IDS)


def test_a_derived_class_loads_as_hugging_faces(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = ready(Derived(tiny("bert").config))
    student.save_pretrained(tmp_path)
    assert torch.equal(kq.from_pretrained(tmp_path)(**batch()).logits, student(**batch()).logits)


# --- the model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32(dtype: torch.dtype) -> None:
    model = tiny("bert").eval().to(dtype)
    same = tiny("bert").eval().to(dtype).float()
    student, want = ready(model, "W4E4A8"), ready(same, "W4E4A8")
    assert next(model.parameters()).dtype == dtype  # the user's model keeps its own
    assert student(**batch()).logits.dtype == torch.float32
    assert torch.equal(student(**batch()).logits, want(**batch()).logits)
    kd = kq.distill(student, model).train()
    kd(**batch()).loss.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in student.parameters())


def test_weights_that_are_not_there() -> None:
    with pytest.raises(CaptureError, match=r"meta device.*word_embeddings\.weight"):
        kq.prepare_qat(tiny("bert").to("meta"), "W8E8A8")


def test_a_captured_model_is_not_captured_again(qat: Any) -> None:
    with pytest.raises(CaptureError, match="stage qat"):
        kq.prepare_qat(qat, "W8E8A8")


def test_a_float_weight_that_became_nan_is_refused_by_convert() -> None:
    student = ready(tiny("bert"))
    with torch.no_grad():
        dict(student.gm.named_parameters())["bert.encoder.layer.0.output.LayerNorm.bias"][3] = float("nan")
    with pytest.raises(CalibrationError, match=r"layer\.0\.output\.LayerNorm\.bias"):
        kq.convert(student)


@pytest.mark.parametrize("fuel", [-1, 1.0, "3", True])
def test_impossible_fuel(fuel: Any) -> None:
    with pytest.raises(ConfigError, match="no number of quantizers"):
        kq.prepare_qat(tiny("bert"), "W8E8A8", fuel=fuel)


# --- examples


def test_an_example_of_one_row_leaves_the_batch_free() -> None:
    example = {k: v[:1] for k, v in batch().items()}
    student = ready(tiny("bert").eval(), example=example)
    assert student(**batch(rows=5, length=13)).logits.shape == (5, 2)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.reshape(x.shape[0], -1))


def test_sizes_of_other_modules() -> None:
    """The batch stays free after an example of one row; a size that the capture fixed is named."""
    model = Flat()
    student = kq.prepare_qat(model, "W8E8A8", fuel=0, example=(torch.randn(1, 3, 4),))
    x = torch.randn(5, 3, 4)
    assert torch.equal(student.eval()(x), model(x))
    fixed = kq.prepare_qat(torch.export.export(model, (x,)), "W8E8A8", fuel=0)
    for bad in (torch.randn(2, 3, 4), x[0]):
        with pytest.raises(InputError, match=r"x has shape .*, captured was \(5, 3, 4\)"):
            fixed(bad)


def test_the_config_is_a_copy() -> None:
    """The Trainer writes into it (use_cache, special tokens)."""
    model = tiny("bert")
    student = kq.prepare_qat(model, "W8E8A8", fuel=0)
    student.config.pad_token_id = 7
    assert model.config.pad_token_id == 0


def test_position_ids_as_an_input() -> None:
    example = {**batch(), "position_ids": torch.arange(9)[None]}
    model = tiny("bert").eval()
    student = kq.prepare_qat(model, "W8E8A8", fuel=0, example=example).eval()
    data = {**batch(rows=2, length=5), "position_ids": torch.arange(5).flip(0)[None]}
    torch.testing.assert_close(student(**data).logits, model(**data).logits, atol=1e-5, rtol=1e-5)


def test_embeddings_as_an_input() -> None:
    model = tiny("bert").eval()
    student = ready(model, example={"inputs_embeds": torch.randn(2, 6, 32)})
    x = torch.randn(3, 4, 32)
    torch.testing.assert_close(student(inputs_embeds=x).logits, model(inputs_embeds=x).logits, atol=0.05, rtol=0)
    for broken in (float("nan"), float("inf")):
        bad = x.clone()
        bad[1, 2, 3] = broken
        for each in (student, kq.convert(student)):
            with pytest.raises(InputError, match="inputs_embeds holds NaN or infinity"):
                each(inputs_embeds=bad)


def test_a_ready_mask_as_an_input() -> None:
    """Additive, (batch, 1, length, length), as Hugging Face takes it; -inf masks a key."""
    ids = batch()["input_ids"]
    model = tiny("bert").eval()
    model.set_attn_implementation("eager")
    mask = torch.zeros(4, 1, 9, 9)
    student = kq.prepare_qat(model, "W8E8A8", fuel=0, example={"input_ids": ids, "attention_mask": mask}).eval()
    mask = torch.zeros(2, 1, 5, 5)
    mask[:, :, :, 3:] = -torch.inf
    data = {"input_ids": ids[:2, :5], "attention_mask": mask}
    torch.testing.assert_close(student(**data).logits, model(**data).logits, atol=1e-6, rtol=1e-6)


def test_bad_examples() -> None:
    model = tiny("bert")
    with pytest.raises(CaptureError, match="inputids, which forward does not take"):
        kq.prepare_qat(model, "W8E8A8", example={"inputids": IDS})
    with pytest.raises(CaptureError, match="one token a row"):
        kq.prepare_qat(model, "W8E8A8", example={"input_ids": IDS[:, :1]})
    with pytest.raises(CaptureError, match="2 values, forward takes 1"):
        kq.prepare_qat(nn.Linear(3, 3), "W8E8A8", example=(torch.randn(2, 3), 1))


# --- folders


@pytest.mark.parametrize("key", ["stage", "model_class", "inputs", "versions", "graph", "qconfig"])
@pytest.mark.parametrize("value", [None, 17])
def test_damaged_descriptions(qat: Any, tmp_path: Path, key: str, value: Any) -> None:
    qat.save_pretrained(tmp_path)
    info = json.loads((tmp_path / "kdlsq.json").read_text())
    (tmp_path / "kdlsq.json").write_text(json.dumps({**info, key: value}))
    with pytest.raises(CheckpointError, match=f"damaged: {key} is {value}"):
        kq.from_pretrained(tmp_path)


def test_a_damaged_config(qat: Any, tmp_path: Path) -> None:
    qat.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        kq.from_pretrained(tmp_path)


def test_a_folder_with_nan(tmp_path: Path) -> None:
    """It is neither written over a good one nor read."""
    student = ready(tiny("bert"))
    student.save_pretrained(tmp_path)
    good = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        dict(student.gm.named_parameters())["classifier.weight"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"nothing is saved.*NaN or infinite \[at classifier\.weight\]"):
        student.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == good
    write_tensors(tmp_path / "model.safetensors", student.gm.state_dict())
    with pytest.raises(CheckpointError, match=r"NaN or infinity.*classifier\.weight"):
        kq.from_pretrained(tmp_path)


def test_a_full_disk_is_said_and_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_tensors(file, {"a": torch.zeros(5)})
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot write .*too large"):
            write_tensors(file, {"a": torch.zeros(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_a_qdq_model_cannot_be_saved(qat: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="qdq model cannot be saved"):
        kq.freeze_qat(qat).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["qat", "qdq", "int", "torch"])
def test_less_than_float32_and_pickles_are_refused_and_change_nothing(stage: str) -> None:
    qat = ready(tiny("bert"))
    make: dict[str, Any] = {"qdq": kq.freeze_qat, "int": kq.convert, "torch": partial(kq.convert, backend="torch")}
    model = make.get(stage, copy.copy)(qat).eval()
    want = model(**batch()).logits
    for change in (
        model.half,
        lambda: model.to(torch.bfloat16),
        lambda: nn.Sequential(model).to("cpu", torch.float16),
    ):
        with pytest.raises(ConfigError, match="other codes in torch.(b?float16)"):
            change()
    for write in (pickle.dumps, partial(torch.save, f=io.BytesIO())):
        with pytest.raises(CheckpointError, match="not pickled"):
            write(model)
    assert all(t.dtype != torch.float16 for t in model.state_dict().values())
    assert torch.equal(copy.deepcopy(model)(**batch()).logits, want) and torch.equal(model(**batch()).logits, want)
    torch.testing.assert_close(model.double()(**batch()).logits.float(), want, rtol=1e-5, atol=1e-6)


def test_a_converted_model_is_not_converted_again() -> None:
    program = kq.convert(ready(tiny("bert")))
    for again in (kq.convert, kq.freeze_qat, partial(kq.export_onnx, path="x.onnx")):
        with pytest.raises(ConfigError, match="converted already"):
            again(program)
