"""Which nodes of a student graph correspond to which of a teacher graph.

Quantizers and dropout are looked through, so that graphs of any stage can be compared. First by name: the same module
path, op and operand ports, where one side's paths may carry another prefix. networkx isomorphism pairs what is left.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import networkx as nx
from torch import fx, nn

from .taps import member_calls
from .views import View, view_of


@dataclass(frozen=True)
class Pair:
    """Two corresponding nodes by their sites, and what told so."""

    student: str
    teacher: str
    how: Literal["path", "isomorphism"]


@dataclass(frozen=True)
class Match:
    """The pairs in graph order, and the sites that found no partner. Every site stands in at most one pair.

    ``prefix``: what a student's path starts with, and what the teacher has in its place.
    """

    pairs: tuple[Pair, ...]
    student_only: tuple[str, ...]
    teacher_only: tuple[str, ...]
    prefix: tuple[str, str] = ("", "")

    def partner(self, site: str) -> str | None:
        """The teacher's site for a site of the student; None where there is none."""
        return next((p.teacher for p in self.pairs if p.student == site), None)

    def report(self) -> str:
        """Counts, the prefix, every pair found by isomorphism, and every unmatched site."""
        count = Counter(p.how for p in self.pairs)
        lines = [f"{len(self.pairs)} pairs: {count['path']} by path, {count['isomorphism']} by isomorphism"]
        if any(self.prefix):
            lines.append(f"prefix: student {self.prefix[0]!r}, teacher {self.prefix[1]!r}")
        lines += [f"  {p.student}  <->  {p.teacher}" for p in self.pairs if p.how == "isomorphism"]
        for side, sites in (("student", self.student_only), ("teacher", self.teacher_only)):
            lines.append(f"unmatched in the {side}: {len(sites)}")
            lines += [f"  {s}" for s in sites]
        return "\n".join(lines)


def match_graphs(student: nn.Module, teacher: nn.Module) -> Match:
    """Match two graphs: GraphModules of any stage, or QuantModels. Neither is changed."""
    ours, theirs = view_of(_graph_of(student)), view_of(_graph_of(teacher))
    prefix = _prefix(ours, theirs)
    pairs = _by_path(ours, theirs, prefix)
    named = len(pairs)
    _by_isomorphism(ours, theirs, pairs)
    how: list[Literal["path", "isomorphism"]] = ["path" if i < named else "isomorphism" for i in range(len(pairs))]
    order = {n: i for i, n in enumerate(ours.nodes)}
    found = sorted(zip(pairs.items(), how), key=lambda row: order[row[0][0]])
    taken = set(pairs.values())
    return Match(
        tuple(Pair(ours.key(a), theirs.key(b), h) for (a, b), h in found),
        tuple(ours.key(n) for n in ours.nodes if n not in pairs),
        tuple(theirs.key(n) for n in theirs.nodes if n not in taken),
        prefix,
    )


def _graph_of(model: nn.Module) -> fx.GraphModule:
    return model if isinstance(model, fx.GraphModule) else model.gm  # type: ignore[return-value]


def _prefix(ours: View, theirs: View) -> tuple[str, str]:
    """The pair of path prefixes under which most names agree; only wrappers (over half of all names) are tried."""
    a, b = ([view.key(n) for n in view.nodes if "." in view.key(n)] for view in (ours, theirs))
    known = set(b)
    best, most = ("", ""), sum(k in known for k in a)
    for p in _wrappers(a):
        for q in _wrappers(b):
            hits = sum(shifted in known for k in a if (shifted := _shift(k, p, q)) is not None)
            if hits > most:
                best, most = (p, q), hits
    return best


def _wrappers(keys: list[str]) -> list[str]:
    count: Counter[str] = Counter()
    for key in keys:
        parts = key.rpartition("/")[0].split(".") if "/" in key else key.split(".")[:-1]
        count.update(".".join(parts[:i]) + "." for i in range(1, min(4, len(parts) + 1)))
    return ["", *(p for p, n in count.items() if n > len(keys) / 2)]


def _shift(key: str, p: str, q: str) -> str | None:
    """``key`` with the path prefix ``p`` replaced by ``q``: ``bert/add`` with ("bert.", "") is ``/add``."""
    path, slash, op = key.rpartition("/")
    start = key if not slash else path + "." if path else ""
    if not start.startswith(p):
        return None
    moved = q + start[len(p) :]
    return f"{moved[:-1]}/{op}" if slash else moved


def _by_path(ours: View, theirs: View, prefix: tuple[str, str]) -> dict[fx.Node, fx.Node]:
    """Two rounds: all operands that have a partner agree at every port; then at one port at least (what feeds a module
    may differ between the graphs while its weights are the same)."""
    names = {theirs.name(n): n for n in theirs.nodes}
    pairs: dict[fx.Node, fx.Node] = {}
    taken: set[fx.Node] = set()
    for agree in (_ports_agree, _a_port_agrees):
        for node in ours.nodes:
            key = ours.name(node)
            for other in (names.get(key), names.get(_shift(key, *prefix) or key)):
                if other is None or other in taken or node in pairs or ours.label(node) != theirs.label(other):
                    continue
                if agree(ours.operands[node], theirs.operands[other], pairs, taken):
                    pairs[node] = other
                    taken.add(other)
    return pairs


Operands = tuple[fx.Node, ...]


def _ports_agree(a: Operands, b: Operands, pairs: dict[fx.Node, fx.Node], taken: set[fx.Node]) -> bool:
    return _alike(a, b) and all(pairs.get(x) is y if x in pairs else y not in taken for x, y in zip(a, b))


def _a_port_agrees(a: Operands, b: Operands, pairs: dict[fx.Node, fx.Node], taken: set[fx.Node]) -> bool:
    return _alike(a, b) and any(pairs.get(x) is y for x, y in zip(a, b))


def _alike(a: Operands, b: Operands) -> bool:
    """As many ports, and the same ports share an operand: ``x * x`` is not ``x * y``."""
    return [a.index(x) for x in a] == [b.index(y) for y in b]


def _by_isomorphism(ours: View, theirs: View, pairs: dict[fx.Node, fx.Node]) -> None:
    """Add the pairs of what is left: connected pieces as a whole, then the members of module lists in order."""
    _pair_up(ours, theirs, pairs, _pieces, unique=False)
    _pair_up(ours, theirs, pairs, _members, unique=True)


def _pair_up(
    ours: View,
    theirs: View,
    pairs: dict[fx.Node, fx.Node],
    split: Callable[[View, set[fx.Node]], list[list[fx.Node]]],
    *,
    unique: bool,
) -> None:
    """Each part of ours takes the first part of theirs that it is isomorphic to, known pairs around it included.

    ``unique``: only where no two nodes of a part look alike, for a member is cut out of its surroundings.
    """
    back = {t: s for s, t in pairs.items()}
    here = [_labelled(ours, part, {n: n for n in pairs}, inner=unique) for part in split(ours, set(pairs))]
    there = [_labelled(theirs, part, back, inner=unique) for part in split(theirs, set(back))]
    for g in here:
        for h in there:
            found = _isomorphic(g, h, unique=unique)
            if found:
                pairs.update(found)
                there.remove(h)
                break


def _pieces(view: View, matched: set[fx.Node]) -> list[list[fx.Node]]:
    """Connected components of the unmatched nodes, in graph order."""
    graph = nx.Graph()
    rest = [n for n in view.nodes if n not in matched]
    graph.add_nodes_from(rest)
    graph.add_edges_from((o, n) for n in rest for o in view.operands[n] if o not in matched)
    order = {n: i for i, n in enumerate(view.nodes)}
    found = [sorted(c, key=order.__getitem__) for c in nx.connected_components(graph)]
    return sorted(found, key=lambda c: order[c[0]])


def _members(view: View, matched: set[fx.Node]) -> list[list[fx.Node]]:
    """The unmatched nodes of each call of a module list's member (``layer.3``), with the constants only it reads."""
    groups: dict[str, list[fx.Node]] = defaultdict(list)
    for node in view.nodes:
        calls = member_calls(node)
        if node.op == "get_attr" and not calls:
            readers = [c[0] for _, u in view.users[node] if (c := member_calls(u))]
            calls = readers if len(set(readers)) == 1 and len(readers) == len(view.users[node]) else []
        if calls and node not in matched:
            groups[calls[0]].append(node)
    return list(groups.values())


def _labelled(view: View, part: list[fx.Node], known: dict[fx.Node, fx.Node], *, inner: bool) -> nx.DiGraph:
    """A part as a DiGraph: ops and matched neighbours on nodes, ports on edges (``x * x`` is one edge, two ports).

    ``known``: matched node -> the student's node of its pair; with ``inner`` only those of the same member count.
    """
    inside = set(part)
    home = member_calls(part[-1])[:1]
    anchors = {n: s for n, s in known.items() if member_calls(n)[:1] == home} if inner else known
    graph = nx.DiGraph()
    for node in part:
        around = [("in", p, anchors[o]) for p, o in enumerate(view.operands[node]) if o in anchors]
        around += [("out", p, anchors[u]) for p, u in view.users[node] if u in anchors]
        graph.add_node(node, op=view.label(node), around=frozenset(around))
    for node in part:
        ports: dict[fx.Node, list[int]] = defaultdict(list)
        for port, operand in enumerate(view.operands[node]):
            if operand in inside:
                ports[operand].append(port)
        for operand, at in ports.items():
            graph.add_edge(operand, node, ports=tuple(at))
    return graph


def _isomorphic(g: nx.DiGraph, h: nx.DiGraph, *, unique: bool) -> dict[fx.Node, fx.Node]:
    """Node of g -> node of h; empty where they are not isomorphic in ops, ports and matched neighbours."""
    if len(g) != len(h) or g.number_of_edges() != h.number_of_edges():
        return {}
    a, b = _refined(g), _refined(h)
    if Counter(a.values()) != Counter(b.values()) or (unique and len(set(a.values())) < len(a)):
        return {}
    nx.set_node_attributes(g, a, "label")
    nx.set_node_attributes(h, b, "label")
    matcher = nx.algorithms.isomorphism.DiGraphMatcher(
        g, h, node_match=lambda x, y: x["label"] == y["label"], edge_match=lambda x, y: x["ports"] == y["ports"]
    )
    return dict(matcher.mapping) if matcher.is_isomorphic() else {}


def _refined(graph: nx.DiGraph) -> dict[fx.Node, int]:
    """Labels that tell a node's surroundings too (Weisfeiler-Lehman): the search then hardly ever has to go back."""
    label = {n: hash((d["op"], d["around"])) for n, d in graph.nodes(data=True)}
    for _ in range(12):
        label = {
            n: hash((
                label[n],
                tuple(sorted((d["ports"], label[o]) for o, _, d in graph.in_edges(n, data=True))),
                tuple(sorted((d["ports"], label[u]) for _, u, d in graph.out_edges(n, data=True))),
            ))
            for n in graph
        }  # fmt: skip
    return label
