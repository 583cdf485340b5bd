"""The pass runner: cleans up, names new nodes, verifies and reports after every pass."""

from __future__ import annotations

import difflib
import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TextIO

from torch import fx

from .errors import ConfigError, PassError, VerifyError
from .graph import assign_sites, mark_plumbing, output_args, text
from .op import op_of
from .shapes import check_kept, infer_types
from .verify import STAGES, verify

Pass = Callable[[fx.GraphModule], None]


def graph_pass(stages: str) -> Callable[[Pass], Pass]:
    """Mark a function ``gm -> None`` as a pass: ``"float"`` stays in its stage, ``"float->qat"`` moves it on.

    The function edits ``gm`` in place. It never calls ``recompile`` or ``eliminate_dead_code``: the runner does.
    """
    before, _, after = stages.partition("->")
    if before not in STAGES or (after or before) not in STAGES:
        raise ConfigError(f"graph_pass({stages!r}): no such stage", do=f"use one of {', '.join(STAGES)}, or a->b")

    def mark(fn: Pass) -> Pass:
        @functools.wraps(fn)
        def run(gm: fx.GraphModule) -> None:
            fn(gm)

        run.stages = (before, after or before)  # type: ignore[attr-defined]
        return run

    return mark


@dataclass
class Trace:
    """What the runner saw: per pass its name, seconds, and the text diff where ``diffs`` was asked for."""

    diffs: bool = False
    out: TextIO | None = None
    rows: list[tuple[str, str, float, int]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, stage: str, seconds: float, nodes: int, diff: str) -> None:
        self.rows.append((name, stage, seconds, nodes))
        self.texts[name] = diff
        if self.out is not None:
            print(f"{name:32s} {stage:6s} {seconds:7.3f} s {nodes:5d} nodes", file=self.out)
            if self.diffs and diff:
                print(diff, file=self.out)

    def __str__(self) -> str:
        return "\n".join(f"{n:32s} {s:6s} {t:7.3f} s {k:5d} nodes" for n, s, t, k in self.rows)


def run_passes(
    gm: fx.GraphModule,
    passes: Iterable[Pass],
    *,
    user: Iterable[Pass] = (),
    stop_after: str | None = None,
    trace: Trace | None = None,
) -> fx.GraphModule:
    """Run ``passes`` in order on ``gm`` in place; a user's pass runs at the end of its stage.

    ``stop_after`` names the pass after which to stop (ConfigError when there is none of that name).
    Raises VerifyError naming the pass that broke a promise of the stage, and PassError naming the user's pass that
    raised. After a user's pass every value that was there before must have the shape it had.
    """
    own = list(user)
    plan = _with_user_passes(list(passes), own, str(gm.meta["stage"]))
    names = [p.__name__ for p in plan]
    if stop_after is not None and stop_after not in names:
        raise ConfigError(f"stop_after={stop_after!r} is no pass of this pipeline", do=f"use one of {', '.join(names)}")
    for step in plan:
        _run_one(gm, step, trace, own=step in own)
        if step in own:
            gm.meta["user_passes"] = [*gm.meta.get("user_passes", []), step.__name__]  # saved with a qat folder
        if step.__name__ == stop_after:
            break
    return gm


def _stages(step: Pass) -> tuple[str, str]:
    stages = getattr(step, "stages", None)
    if stages is None:
        raise ConfigError(
            f"{getattr(step, '__name__', step)} is not a pass", do='decorate it with @graph_pass("float")'
        )
    return stages


def _with_user_passes(plan: list[Pass], user: list[Pass], stage: str) -> list[Pass]:
    """Put each user pass after the last pass that leaves its stage in place, before the one that moves it on."""
    for step in user:
        before, after = _stages(step)
        if before != after:
            raise ConfigError(f"pass {step.__name__} moves {before} to {after}", do="a user's pass stays in its stage")
        reached = stage == before
        at = None
        current = stage
        for i, p in enumerate(plan):
            if current == before and _stages(p)[1] != before:
                at = i
            current = _stages(p)[1]
            reached = reached or current == before
        if not reached:
            raise ConfigError(
                f"pass {step.__name__} wants stage {before}", do="give it to the verb that has this stage"
            )
        plan.insert(len(plan) if at is None else at, step)
    return plan


def _run_one(gm: fx.GraphModule, step: Pass, trace: Trace | None, *, own: bool) -> None:
    """One pass, ours or the user's ``own``."""
    before, after = _stages(step)
    if gm.meta["stage"] != before:
        raise ConfigError(f"pass {step.__name__} wants stage {before}, the graph is {gm.meta['stage']}")
    old = text(gm) if trace is not None and trace.diffs else ""
    start = time.perf_counter()
    if own:
        _run_own(gm, step)
    else:
        step(gm)
        _clean_up(gm)
    gm.meta["stage"] = after
    if after == "float":
        mark_plumbing(gm)
    verify(gm, after_pass=step.__name__)
    if trace is not None:
        new = text(gm) if trace.diffs else ""
        diff = "\n".join(difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=1))
        trace.add(step.__name__, after, time.perf_counter() - start, len(gm.graph.nodes), diff)


def _run_own(gm: fx.GraphModule, step: Pass) -> None:
    """A user's pass: what it raises is said to be its, its new nodes get types, and all others keep their shapes."""
    before, outputs = infer_types(gm), len(output_args(gm.graph))
    try:
        step(gm)
        _clean_up(gm)
    except Exception as error:
        what = f"pass {step.__name__} failed with {type(error).__name__}: {error}"
        raise PassError(what, do="correct the pass; nothing of yours was changed") from error
    found = len(output_args(gm.graph))
    if found != outputs:
        what = f"the graph returned {outputs} values, it returns {found} now"
        raise VerifyError(what, where="output", do=f"pass {step.__name__} must keep them")
    for node in gm.graph.nodes:
        if op_of(node) is None and node.op.startswith("call_"):
            return  # the verifier names it
    check_kept(before, infer_types(gm, after_pass=step.__name__), after_pass=step.__name__)


def _clean_up(gm: fx.GraphModule) -> None:
    gm.graph.eliminate_dead_code()
    assign_sites(gm.graph)
    gm.graph.lint()
    gm.recompile()
