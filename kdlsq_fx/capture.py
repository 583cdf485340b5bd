"""nn.Module -> float-stage GraphModule of declared ATen ops, with the module path of every node kept."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from . import ops as _ops  # noqa: F401  (fills the op table)
from .errors import CaptureError
from .hushed import hushed
from .normalize import normalize
from .verify import verify

CHOICES_DO = "capture the encoder inside it and score every choice as a row of its own: input_ids (batch, length)"
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Captured:
    """A float-stage graph and what the thin module around it needs.

    ``outputs`` are the field names of the model's output in the order of the graph's flat outputs, or () when the
    model returns plain tensors; ``output_type`` is the class to rebuild.
    """

    gm: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    output_type: type | None
    example: dict[str, Any]


def capture(model: nn.Module | torch.export.ExportedProgram, example: Any = None) -> Captured:
    """Capture ``model`` in train mode with eager attention; the model itself is not changed.

    Args:
        model: a Hugging Face encoder; any ``nn.Module`` with ``example``; a GraphModule of ATen ops or an
            ExportedProgram (captured already).
        example: keyword arguments (a mapping) or positional ones (a tuple) to call the model with. Dimensions 0 and 1
            of every tensor stay dynamic where the model allows it; with ``input_ids`` all of them. Weights and floats
            of another precision are captured in float32.

    Raises:
        CaptureError: names the construct or the op that has no meaning here, and its site.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(model, torch.export.ExportedProgram):
        return _from_graph(model.module(check_guards=False))
    if not isinstance(model, nn.Module):
        raise CaptureError(f"cannot capture a {type(model).__name__}", do="pass an nn.Module or an ExportedProgram")
    inner = getattr(model, "gm", None)
    if isinstance(inner, fx.GraphModule) and "stage" in inner.meta:
        do = "pass the model that it was made from"
        raise CaptureError(f"this is a captured model, in stage {inner.meta['stage']}", do=do)
    if isinstance(model, fx.GraphModule) and example is None:
        return _from_graph(model)
    _check_weights(model)
    # on the CPU, wherever the model is; one in half precision trains in float32, as its scales do
    own = copy.deepcopy(model).cpu().float().train()
    _use_eager_attention(own)
    kwargs = _example_inputs(own, example)
    try:
        inspect.signature(own.forward).bind(**kwargs)
    except TypeError as err:
        what = f"the example is no call of {type(own).__name__}: {err}"
        raise CaptureError(
            what, do="give example= the arguments of one call of the model, by name or in order"
        ) from err
    program = _export(own, kwargs)
    own.eval()
    with torch.no_grad():
        result = own(**kwargs)
    _check_flat(result)
    return _from_program(program, kwargs, result)


def _check_weights(model: nn.Module) -> None:
    """CaptureError for weights that are not there (the meta device)."""
    absent = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if absent is not None:
        do = "load the weights before prepare_qat (from_pretrained without device_map)"
        raise CaptureError("a weight is on the meta device and has no values", where=absent, do=do)


def _check_flat(result: Any) -> None:
    """CaptureError for an output within an output: the graph returns a flat row of tensors."""
    fields = result if isinstance(result, Mapping) else dict(enumerate(result)) if _is_row(result) else {}
    nested = next((k for k, v in fields.items() if _is_row(v) or isinstance(v, Mapping)), None)
    if nested is not None:
        what = f"output {nested!r} of the model is a {type(fields[nested]).__name__} of its own"
        raise CaptureError(what, do="return tensors, or one dictionary or tuple of tensors")


def _is_row(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def _use_eager_attention(model: nn.Module) -> None:
    """sdpa hides the scores and probabilities in one node; eager attention shows them. Encoders inside a module too."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None or not hasattr(config, "_attn_implementation"):
            continue
        config._attn_implementation = "eager"
        for name in ("output_attentions", "output_hidden_states", "use_cache"):
            if getattr(config, name, False):
                setattr(config, name, False)
        config.return_dict = True


def _example_inputs(model: nn.Module, example: Any) -> dict[str, Any]:
    params = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in params if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if example is not None:
        return _given(names, example)
    config = getattr(model, "config", None)
    vocab = getattr(config, "vocab_size", None)
    if vocab is None or "input_ids" not in names:
        raise CaptureError(
            f"{type(model).__name__} does not say what its inputs look like",
            do="pass example=, a dict of keyword arguments or a tuple of positional ones",
        )
    if type(model).__name__.endswith("ForMultipleChoice"):
        raise CaptureError(f"{type(model).__name__} takes (batch, choices, length)", do=CHOICES_DO)
    length = min(12, int(getattr(config, "max_position_embeddings", 12) or 12) - 2)
    ids = torch.arange(3 * length).reshape(3, length) * 7 % max(vocab - 3, 1) + min(3, vocab - 1)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    one_type = int(getattr(config, "type_vocab_size", 2) or 0) < 2  # RoBERTa's: zeros are all there is to hand in
    return {k: given[k] for k in TEXT_INPUTS if k in names and not (k == "token_type_ids" and one_type)}


def _given(names: list[str], example: Any) -> dict[str, Any]:
    """The user's example by argument name, floats in float32. A batch of one row is doubled: torch.export takes a size
    of 1 for a constant, and the batch is to stay free."""
    if not isinstance(example, Mapping):
        args = example if isinstance(example, (tuple, list)) else (example,)
        if len(args) > len(names):
            raise CaptureError(f"the example has {len(args)} values, forward takes {len(names)}", do=", ".join(names))
        example = dict(zip(names, args))
    unknown = [k for k in example if k not in names]
    if unknown and names:
        do = f"forward takes {', '.join(names)}"
        raise CaptureError(f"the example has {', '.join(unknown)}, which forward does not take", do=do)
    given = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in example.items()}
    given = {k: v.float() if _is_float(v) else v for k, v in given.items()}
    ids = given.get("input_ids")
    if isinstance(ids, torch.Tensor) and ids.dim() != 2:
        do = CHOICES_DO if ids.dim() > 2 else "give a batch of texts: input_ids (batch, length)"
        raise CaptureError(f"the example's input_ids have shape {tuple(ids.shape)}", do=do)
    if not isinstance(ids, torch.Tensor):
        tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor) and v.dim() > 0}
        alone = bool(tensors) and all(v.shape[0] == 1 for v in tensors.values())
        return {**given, **{k: torch.cat([v, v]) for k, v in tensors.items()}} if alone else given
    if ids.shape[1] < 2:
        raise CaptureError("the example has one token a row: its length would stay fixed", do="give a longer example")
    if ids.shape[0] > 1:
        return given
    one_row = {k for k, v in given.items() if isinstance(v, torch.Tensor) and v.dim() > 1 and v.shape[0] == 1}
    return {k: torch.cat([v, v]) if k in one_row else v for k, v in given.items()}


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _export(model: nn.Module, kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    strict_dims = "input_ids" in kwargs  # text models must stay dynamic; for others torch decides what can

    def dims(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        free, auto = torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO  # a size of 1 (position ids of all rows) may stay
        strict = strict_dims and value.dtype == torch.int64
        count = value.dim() if strict_dims else min(value.dim(), 2)
        return {i: free if strict and value.shape[i] > 1 else auto for i in range(count)}

    with warnings.catch_warnings(), hushed():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(
                model, (), kwargs, dynamic_shapes={k: pytree.tree_map(dims, v) for k, v in kwargs.items()}, strict=False
            )
        except Exception as err:
            first = next((line for line in str(err).splitlines() if line.strip()), type(err).__name__)
            raise CaptureError(
                f"{type(model).__name__} cannot be captured: {type(err).__name__}: {first[:300]}",
                where=_user_frame(err),
                do="remove the data-dependent control flow, or hand in a GraphModule or ExportedProgram of your own",
            ) from err


def _user_frame(err: BaseException) -> str:
    """File and line of the innermost frame outside torch, where the construct that fails stands."""
    where, tb = "", err.__traceback__
    while tb is not None:
        name = tb.tb_frame.f_code.co_filename
        if "/torch/" not in name and "kdlsq_fx" not in name:
            where = f"{'/'.join(name.split('/')[-3:])}:{tb.tb_lineno} in {tb.tb_frame.f_code.co_name}"
        tb = tb.tb_next
    return where


def _from_program(program: torch.export.ExportedProgram, kwargs: dict[str, Any], result: Any) -> Captured:
    gm = program.module(check_guards=False)
    if not isinstance(gm, fx.GraphModule):
        raise CaptureError("the exported program holds no GraphModule")
    flat = pytree.tree_leaves(next(iter(gm.graph.find_nodes(op="output"))).args[0])
    names = tuple(result.keys()) if isinstance(result, Mapping) else ()
    return _finish(gm, flat, names, type(result) if names else None, kwargs)


def _from_graph(model: fx.GraphModule) -> Captured:
    if model.meta.get("stage", "float") != "float":
        raise CaptureError(f"the graph is in stage {model.meta['stage']} already", do="pass a float graph")
    gm = copy.deepcopy(model)
    gm.meta = dict(model.meta)
    for old, new in zip(model.graph.nodes, gm.graph.nodes):  # deepcopy keeps meta of nodes; keep it exactly
        new.meta = dict(old.meta)
    flat = pytree.tree_leaves(next(iter(gm.graph.find_nodes(op="output"))).args[0])
    missing = [n for n in gm.graph.nodes if n.op.startswith("call_") and "val" not in n.meta and n.users]
    if missing:
        raise CaptureError(
            "the GraphModule was not made by torch.export: its nodes carry no shapes",
            where=missing[0].name,
            do="hand in the module itself with example=, or torch.export.export(...).module()",
        )
    return _finish(gm, flat, (), None, _example_of(gm))


def _example_of(gm: fx.GraphModule) -> dict[str, Any]:
    """Zeros in the shapes the placeholders were captured with (dynamic dimensions: 2 and 8)."""
    made: dict[str, Any] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            sizes = [s if isinstance(s, int) else (2, 8)[min(i, 1)] for i, s in enumerate(value.shape)]
            made[str(node.target)] = torch.zeros(sizes, dtype=value.dtype)
    return made


def _finish(
    gm: fx.GraphModule, flat: list[Any], names: tuple[str, ...], output_type: type | None, example: dict[str, Any]
) -> Captured:
    graph = gm.graph
    (out,) = graph.find_nodes(op="output")
    out.args = (tuple(flat),)
    graph.set_codegen(fx.graph.CodeGen())
    gm.meta["stage"] = "float"
    for unwanted in ("train", "eval"):  # export forbids both on its modules; ours really switch
        gm.__dict__.pop(unwanted, None)
    clean = fx.GraphModule(gm, graph)
    clean.meta = dict(gm.meta)
    normalize(clean)
    inputs = tuple(str(n.target) for n in graph.find_nodes(op="placeholder"))
    verify(clean, after_pass="capture")
    return Captured(clean, inputs, names, output_type, example)
