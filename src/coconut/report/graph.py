"""The search in a thought: a question's graph, every node as dark as the thought's probability of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from coconut.data.generators.graphs import breadth_first, children_of
from coconut.report.text import visible

MOST_NODES = 40
_COLUMN, _ROW, _RADIUS, _MARGIN = 62, 30, 10, 18


@dataclass(frozen=True)
class Layout:
    """Where the nodes of a question stand: one column for each hop from the root, what it cannot reach below."""

    root: str
    edges: Sequence[tuple[str, str]]
    targets: Sequence[str]
    places: Mapping[str, tuple[int, int]]
    distance: Mapping[str, int]

    @classmethod
    def of(cls, edges: Sequence[tuple[str, str]], root: str, targets: Sequence[str]) -> "Layout":
        """Lay a graph out; nodes of a column stand in the order of their parents."""
        nodes = list(dict.fromkeys([root, *(node for edge in edges for node in edge)]))
        children = children_of(edges, nodes)
        distance, _ = breadth_first(root, children)
        outside = [node for node in nodes if node not in distance]
        has_parent = {child for _, child in edges}
        columns = dict(distance)
        for start in sorted(outside, key=lambda node: node in has_parent):
            if start not in columns:
                hops, _ = breadth_first(start, children)
                columns |= {node: hop for node, hop in hops.items() if node not in columns}
        places: dict[str, tuple[int, int]] = {}
        rows = 0
        for group in (list(distance), outside):
            rows += _place_group(group, columns, edges, places, rows)
        return cls(root, edges, targets, places, distance)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        width, height = (max(place[axis] for place in self.places.values()) for axis in (0, 1))
        return width * _COLUMN + 2 * _MARGIN, height * _ROW + 2 * _MARGIN

    def position(self, node: str) -> tuple[int, int]:
        """Return the centre of a node."""
        column, row = self.places[node]
        return _MARGIN + column * _COLUMN, _MARGIN + row * _ROW


def _place_group(
    group: Sequence[str],
    columns: Mapping[str, int],
    edges: Sequence[tuple[str, str]],
    places: dict[str, tuple[int, int]],
    first_row: int,
) -> int:
    """Place the nodes of a component, column by column; return how many rows it takes."""
    highest = 0
    for column in sorted({columns[node] for node in group}):
        members = [node for node in group if columns[node] == column]

        def parents_row(node: str) -> float:
            rows = [places[parent][1] for parent, child in edges if child == node and parent in places]
            return sum(rows) / len(rows) if rows else 0.0

        members.sort(key=parents_row)
        for row, node in enumerate(members):
            places[node] = (column, first_row + row)
        highest = max(highest, len(members))
    return highest


def draw_graph(layout: Layout, probs: Mapping[str, float], hops: int) -> Markup:
    """Draw one thought's probabilities; the frontier after `hops` hops has a ring, candidates are squares."""
    width, height = layout.size
    frontier = [node for node, hop in layout.distance.items() if hop == hops]
    title = f"Probability of each node: {_describe(probs)}. One hop further: {', '.join(frontier) or 'nothing'}."
    parts = [_edge(layout, *edge) for edge in layout.edges]
    parts += [_node(layout, node, probs.get(node, 0.0), node in frontier) for node in layout.places]
    return Markup('<svg class="graph" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, visible(title), Markup("").join(parts)
    )


def _describe(probs: Mapping[str, float]) -> str:
    best = sorted(probs.items(), key=lambda pair: -pair[1])[:4]
    return ", ".join(f"{node} {p:.2f}" for node, p in best if p >= 0.01)


def _edge(layout: Layout, parent: str, child: str) -> Markup:
    (x1, y1), (x2, y2) = layout.position(parent), layout.position(child)
    length = max(1.0, ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5)
    gap = (_RADIUS + 3) / length
    return Markup('<path class="edge" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(
        x1 + (x2 - x1) * gap, y1 + (y2 - y1) * gap, x2 - (x2 - x1) * gap, y2 - (y2 - y1) * gap
    )


def _node(layout: Layout, node: str, p: float, is_frontier: bool) -> Markup:
    x, y = layout.position(node)
    classes = ["node", *(["frontier"] if is_frontier else []), *(["root"] if node == layout.root else [])]
    shape = Markup('<circle cx="{}" cy="{}" r="{}"').format(x, y, _RADIUS)
    if node in layout.targets:
        corner, side = _RADIUS - 1, 2 * (_RADIUS - 1)
        shape = Markup('<rect x="{}" y="{}" width="{}" height="{}"').format(x - corner, y - corner, side, side)
    name = visible(node) if len(node) <= 7 else visible(node)[:6] + "…"
    return Markup(
        '<g class="{}"><title>{}: {:.3f}</title>{} style="--p:{:.3f}"/><text x="{}" y="{}"{}>{}</text></g>'
    ).format(
        " ".join(classes),
        visible(node),
        p,
        shape,
        min(1.0, max(0.0, p)),
        x,
        y + 3.5,
        Markup(' class="on"') if p > 0.5 else "",
        escape(name),
    )
