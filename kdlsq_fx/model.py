"""The thin module around a graph: Hugging Face's signature, ModelOutput, loss and checks around any stage."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from .capture import Captured
from .devices import moved, ranges
from .errors import CheckpointError, ConfigError, InputError
from .limits import captured_limits, kinds_of
from .losses import loss_for
from .lowering import Island
from .qconfig import QConfig
from .recompute import recomputing
from .ties import fill_in_ties, leave_out_ties

LABELS = ("labels", "start_positions", "end_positions")
SWITCHES = ("output_attentions", "output_hidden_states")
IGNORED = ("num_items_in_batch", "return_dict")  # the Trainer's own; return_dict is read in forward


class QuantModel(nn.Module):
    """A graph of any stage, called like the Hugging Face model it was captured from.

    ``gm`` is the graph; ``config`` the model's configuration (None for other modules); ``qconfig`` what was asked for.
    A missing attention mask means ones (with a warning where pad ids occur), missing token types mean zeros (of a model
    with one type they are no input of the graph, and zeros are taken). With labels the output's first field is the
    loss, computed outside the graph as Hugging Face does: the mean over the batch, so that the Trainer has to divide it
    by its accumulation steps.
    """

    accepts_loss_kwargs = False  # the Trainer believes a ``**kwargs`` otherwise, and sums the losses it accumulates
    moves_inputs = True  # checked where they lie, then moved: checks of values on the host make no GPU wait

    def __init__(self, captured: Captured, model: nn.Module | None, qconfig: QConfig) -> None:
        super().__init__()
        self.register_state_dict_post_hook(leave_out_ties)
        self.register_load_state_dict_pre_hook(fill_in_ties)
        self.gm = captured.gm
        self.qconfig = qconfig
        self.config = copy.deepcopy(getattr(model, "config", None))  # the Trainer writes into it
        self.model_class = _class_name(model)
        self.input_names = captured.inputs
        self.output_names = captured.outputs
        self.output_type = captured.output_type
        self.signature = _signature(model, captured.inputs)
        self.example = captured.example
        self._limits = captured_limits(self.gm, self.config)

    @property
    def stage(self) -> str:
        return str(self.gm.meta["stage"])

    @property
    def device(self) -> torch.device:
        held: torch.Tensor | None = next(self.parameters(), None)
        held = next(self.buffers(), None) if held is None else held
        return torch.device("cpu") if held is None else held.device

    @property
    def most_tokens(self) -> int:
        """The longest text in tokens; 0 where the model has no such limit."""
        return self._limits[1]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the graph. Raises InputError for ids outside the vocabulary, sequences longer than the positions, NaN,
        and arguments that were not captured. ``return_dict=False`` gives the output's fields as a tuple."""
        labels, inputs = self.split(*args, **kwargs)
        with recomputing() if self.training else nullcontext():
            flat = self.gm(*(inputs[name] for name in self.input_names))
        return self.answer(self.pack(flat, labels), kwargs)

    def answer(self, output: Any, kwargs: dict[str, Any]) -> Any:
        """The output, or its fields as a tuple where the caller said ``return_dict=False``."""
        as_tuple = kwargs.get("return_dict", True) is False and isinstance(output, Mapping)
        return tuple(output.values()) if as_tuple else output

    def split(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments as Hugging Face takes them -> (labels, the graph's inputs with defaults filled in), checked and on
        the model's device."""
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as err:
            raise InputError(f"{self.model_class or 'the model'}: {err}", do=f"it takes {self.signature}") from None
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        given.pop("kwargs", None)
        labels = {k: given.pop(k) for k in LABELS if given.get(k) is not None}
        self._refuse([k for k, v in given.items() if k not in self.input_names and not _neutral(k, v)])
        inputs = {k: v for k, v in given.items() if k in self.input_names and v is not None}
        device = self.device
        return {k: moved(v, device) for k, v in labels.items()}, self.fill(inputs)

    def fill(self, inputs: dict[str, Any], *, values: bool = True) -> dict[str, Any]:
        """The graph's inputs with defaults filled in, checked, on the model's device. ``values=False``: in shape only,
        for inputs whose values were checked before."""
        inputs = dict(inputs)
        self._fill(inputs)
        self._check(inputs, values)
        for name, value in inputs.items():
            if values and _is_broken(name, value):
                raise InputError(f"{name} holds NaN or infinity", where=name, do="look at what made this input")
        device = self.device
        return {k: moved(v, device) for k, v in inputs.items()}

    def covers(self, other: QuantModel) -> bool:
        """Whether every id and token type that ``other`` takes is one that this model takes."""
        mine, theirs = ((m._limits[0], kinds_of(m.config)) for m in (self, other))
        return all(not a or (b and b <= a) for a, b in zip(mine, theirs))

    def _refuse(self, extra: list[str]) -> None:
        """InputError for arguments that are no input of the graph."""
        if not extra:
            return
        what = f"argument {', '.join(extra)} was not captured; the graph takes {', '.join(self.input_names)}"
        do = f"capture with example={{..., {extra[0]!r}: ...}} to make it an input of the graph"
        if extra[0] == "token_type_ids" and self.config is not None and kinds_of(self.config) < 2:
            do = "leave it away, or pass zeros: this model has one token type"
        if extra[0] in SWITCHES:
            do = "leave it away: the graph gives the model's plain outputs; distill() reads inner values at taps"
        raise InputError(what, do=do)

    def pack(self, flat: Any, labels: dict[str, Any] | None = None) -> Any:
        """The graph's flat outputs -> the model's own output class, with the loss when labels are given."""
        values = tuple(flat) if isinstance(flat, (tuple, list)) else (flat,)
        if self.output_type is None:
            return values[0] if len(values) == 1 else values
        fields = dict(zip(self.output_names, values))
        if labels:
            fields = {"loss": loss_for(self.model_class, self.config, fields, labels), **fields}
        return self.output_type(**fields)

    def _fill(self, inputs: dict[str, Any]) -> None:
        for name in TEXT & inputs.keys():
            inputs[name] = _whole_numbers(name, inputs[name])
        ids = inputs.get("input_ids")
        if ids is None:
            missing = [n for n in self.input_names if n not in inputs]
            if missing:
                raise InputError(f"missing input {', '.join(missing)}", do=f"pass all of {', '.join(self.input_names)}")
            return
        if "attention_mask" in self.input_names and "attention_mask" not in inputs:
            pad = getattr(self.config, "pad_token_id", None)
            if not torch.compiler.is_compiling() and pad is not None and bool((ids == pad).any()):
                warnings.warn(
                    "input_ids hold pad ids but no attention_mask was given: padding is attended to", stacklevel=4
                )
            inputs["attention_mask"] = torch.ones_like(ids)
        if "token_type_ids" in self.input_names and "token_type_ids" not in inputs:
            inputs["token_type_ids"] = torch.zeros_like(ids)
        missing = [n for n in self.input_names if n not in inputs]
        if missing:
            raise InputError(f"missing input {', '.join(missing)}", do=f"pass all of {', '.join(self.input_names)}")

    def _check(self, inputs: dict[str, Any], values: bool) -> None:
        ids = inputs.get("input_ids")
        if torch.compiler.is_compiling():
            return
        if ids is None:
            self._check_sizes(inputs)
            return
        vocab, positions = self._limits
        if ids.dim() != 2 or ids.numel() == 0:
            raise InputError(f"input_ids of shape {tuple(ids.shape)}", do="pass a non-empty (batch, length) tensor")
        if positions and ids.shape[1] > positions:
            raise InputError(
                f"a sequence of {ids.shape[1]} ids is longer than the {positions} positions of the model",
                where="input_ids",
                do="truncate in the tokenizer (truncation=True, max_length=...)",
            )
        for name, value in inputs.items():
            if name in TEXT and not self._fits(name, value, ids):
                what = f"{name} has shape {tuple(value.shape)}, input_ids {tuple(ids.shape)}"
                raise InputError(what, where=name, do="pass one number per id, (batch, length)")
        if values:
            self._check_values(ids, inputs.get("token_type_ids"), vocab)

    def _check_sizes(self, inputs: dict[str, Any]) -> None:
        """InputError for a size other than the one that the capture took for a constant."""
        for node in self.gm.graph.find_nodes(op="placeholder"):
            value, known = inputs[str(node.target)], node.meta.get("val")
            if not isinstance(value, torch.Tensor) or not isinstance(known, torch.Tensor):
                continue
            fixed = [(s, n) for s, n in zip(known.shape, value.shape) if isinstance(s, int)]
            if value.dim() != known.dim() or any(s != n for s, n in fixed):
                what = f"{node.target} has shape {tuple(value.shape)}, captured was {tuple(known.shape)}"
                do = "letters stand for any size, numbers are fixed; prepare with an example of other sizes"
                raise InputError(what, where=str(node.target), do=do)

    def _check_values(self, ids: torch.Tensor, types: torch.Tensor | None, vocab: int) -> None:
        kinds = kinds_of(self.config)
        (low, high), *of_types = ranges([ids] if types is None or not kinds else [ids, types])
        do = "use the tokenizer that belongs to this model"
        if vocab and (low < 0 or high >= vocab):
            what = f"input_ids run from {low} to {high}, the vocabulary from 0 to {vocab - 1}"
            raise InputError(what, where="input_ids", do=do)
        for first, last in of_types:
            if not 0 <= first <= last < kinds:
                what = f"token_type_ids run from {first} to {last}, the types from 0 to {kinds - 1}"
                raise InputError(what, where="token_type_ids", do=do)

    @property
    def islands(self) -> tuple[Island, ...]:
        """The ops of an int graph that stay float, and why; empty before lowering."""
        found: tuple[Island, ...] = self.gm.meta.get("islands", ())
        return found

    def _fits(self, name: str, value: torch.Tensor, ids: torch.Tensor) -> bool:
        """One number per id; or, where the graph was captured with a ready mask (batch, 1, length, length), that."""
        captured = self.example.get(name)
        if isinstance(captured, torch.Tensor) and captured.dim() != value.dim():
            return False
        return value.shape == ids.shape if value.dim() == 2 else value.shape[-1:] == ids.shape[-1:]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantModel:
        """``.to``, ``.half`` and the like. ConfigError for less than float32: scales and their codes would be others,
        and every comparison of stages with them."""
        dtype = fn(torch.zeros(1)).dtype
        if dtype not in (torch.float32, torch.float64) and self.stage != "float":
            do = "keep float32 (train with precision='bf16' or under torch.autocast); convert makes it small"
            raise ConfigError(f"a quantized model computes other codes in {dtype}", do=do)
        super()._apply(fn, recurse)
        return self

    def __copy__(self) -> QuantModel:
        made = type(self).__new__(type(self))
        made.__setstate__(dict(self.__dict__))
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantModel:
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        do = "save_pretrained(folder), or torch.save(model.state_dict(), file)"
        raise CheckpointError(f"{type(self).__name__} is not pickled: loading would run what the file says", do=do)

    def save_pretrained(self, path: str | Path, tokenizer: Any = None, **_: Any) -> Path:
        """Write the folder that ``kdlsq_fx.from_pretrained`` reads. CheckpointError where it cannot be written."""
        from .saving import save_qat

        return save_qat(self, path, tokenizer)

    def table(self) -> str:
        """Per site: what it got and by which rule, as text."""
        from .report import site_table

        return site_table(self.gm)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model_class}, stage={self.stage}, {self.qconfig.name})"


TEXT = {"input_ids", "attention_mask", "token_type_ids"}


def _neutral(name: str, value: Any) -> bool:
    """Arguments that change nothing: None, the defaults of the output switches, and token types that are all zero."""
    if name == "token_type_ids" and isinstance(value, torch.Tensor):
        return torch.compiler.is_compiling() or not bool(value.any())
    return value is None or name in IGNORED or (name in SWITCHES and value is False)


def _whole_numbers(name: str, value: Any) -> torch.Tensor:
    """Ids, masks and types as tensors the graph can take; a float mask stays what it is."""
    if not isinstance(value, torch.Tensor):
        do = 'pass tensors: tokenizer(..., return_tensors="pt")'
        raise InputError(f"{name} is a {type(value).__name__}, not a tensor", where=name, do=do)
    if value.is_floating_point() and name != "attention_mask":
        raise InputError(f"{name} is {value.dtype}", where=name, do="pass whole numbers: ids.long()")
    return value if value.is_floating_point() else value.long()


def _is_broken(name: str, value: Any) -> bool:
    """NaN in a float input, or infinity but in a ready mask, where it means a masked key."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or torch.compiler.is_compiling():
        return False
    bad = torch.isnan(value) if name == "attention_mask" else ~torch.isfinite(value)
    return bool(bad.any())


def _class_name(model: nn.Module | None) -> str:
    """The model's class; of a class derived from one of Hugging Face's models that one, which names the loss."""
    if model is None:
        return ""
    known = (c.__name__ for c in type(model).__mro__ if c.__module__.startswith("transformers.models."))
    return next((name for name in known if not name.endswith("PreTrainedModel")), type(model).__name__)


def _signature(model: nn.Module | None, inputs: tuple[str, ...]) -> inspect.Signature:
    if model is None or isinstance(model, fx.GraphModule):
        params = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in inputs]
        return inspect.Signature(params)
    return inspect.signature(model.forward)


def wrap(captured: Captured, model: nn.Module | None, qconfig: QConfig) -> QuantModel:
    """A QuantModel on the device of the captured model, whose ``forward`` shows that model's own signature (Trainer and
    accelerate read it)."""
    signature = _signature(model, captured.inputs)

    def forward(self: QuantModel, *args: Any, **kwargs: Any) -> Any:
        return QuantModel.forward(self, *args, **kwargs)

    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *_loose(signature)],
        return_annotation=inspect.Signature.empty,
    )
    name = f"Quantized{type(model).__name__}" if model is not None else "QuantizedGraph"
    cls = type(name, (QuantModel,), {"forward": forward, "__module__": __name__, "__doc__": QuantModel.__doc__})
    made = cls(captured, model, qconfig)
    first = next(model.parameters(), None) if model is not None else None
    return made if first is None else made.to(first.device)


def _loose(signature: inspect.Signature) -> list[inspect.Parameter]:
    """Positional-or-keyword parameters without annotations, so that ``self`` may stand before them."""
    return [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
