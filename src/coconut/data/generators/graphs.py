"""ProsQA-like reachability in a directed acyclic graph with two roots.

A question names two targets. One can be reached from the root in the question, the other only from the
other root. Both are leaves, at the same distance from their roots, with one shortest path each. Swapping
the roots therefore swaps the answers: only the path through the graph tells which target is right.

Graphs grow as in ProsQA (arXiv:2412.06769, appendix). Nodes are added one by one; 35 % of them get parents
below the first root only, 35 % below the second only, and 30 % anywhere. Deep parents are preferred.
In contrast to ProsQA, the number of edges is exact, the two roots have the only names, the wrong target is
as deep as the right one, and the shortest path is unique (ProsQA has 1.6 of them on average).
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Annotated, Literal, NamedTuple, TypeVar

from coconut.config.schema import Count
from coconut.config.strict import Range
from coconut.data.examples import Example

PAPER_STATISTICS = {"nodes": 23.0, "edges": 36.0, "path": 3.8, "shortest_paths": 1.6}
"""Means over ProsQA, from the paper's appendix."""

MAX_ATTEMPTS = 1_000
"""Number of graphs that are grown before the parameters count as impossible."""

# fmt: off
_NAMES = [
    "Alex", "Bob", "Carol", "Davis", "Eva", "Fae", "Gabriel", "Jack", "Max", "Oliver", "Polly", "Rex", "Sally",
    "Sam", "Stella", "Tom", "Wren",
]
_CONCEPTS = [
    "bompus", "boompus", "brimpus", "chorpus", "dumpus", "felpus", "fompus", "gerpus", "gorpus", "grimpus",
    "gwompus", "hilpus", "impus", "jelpus", "jompus", "kerpus", "lempus", "lorpus", "numpus", "quimpus", "rempus",
    "rompus", "rorpus", "scrompus", "shumpus", "sterpus", "storpus", "terpus", "timpus", "tumpus", "vumpus",
    "worpus", "wumpus", "yerpus", "yimpus", "yumpus", "zhorpus", "zumpus",
]
# fmt: on

_ANYWHERE = 2
_Edge = tuple[int, int]
_Node = TypeVar("_Node", int, str)


@dataclass(frozen=True)
class Puzzle:
    """A graph whose roots are nodes 0 and 1, with a path from each root to its target."""

    edges: Sequence[_Edge]
    paths: tuple[list[int], list[int]]
    """The nodes from each root to its target."""


EdgeStyle = Literal["words", "triples"]


@dataclass(frozen=True)
class Graph:
    """Reachability in a graph, like ProsQA: in the paper's sentences or in symbols."""

    task: Literal["graph_sentences", "graph_symbols"]
    num_nodes: Annotated[int, Range(4, 10_000)]
    num_edges: Annotated[int, Range(3, 1_000_000)]
    min_hops: Count
    max_hops: Count
    edges: EdgeStyle = "triples"
    """How symbols write an edge: `a>b`, one word, or `a b |`, three. Sentences have one form."""


class ParsedQuestion(NamedTuple):
    """The content of a question, with names and concepts as they are written."""

    edges: list[tuple[str, str]]
    targets: tuple[str, ...]
    root: str


def count(config: Graph) -> int | None:
    """Refuse impossible parameters. The number of distinct questions is not known, so return None."""
    where = "data.generator"
    if config.min_hops > config.max_hops:
        raise ValueError(f"{where}.min_hops: found {config.min_hops}, wanted at most max_hops, {config.max_hops}")
    least, most = config.num_nodes - 2, (config.num_nodes - 2) * (config.num_nodes + 1) // 2
    if not least <= config.num_edges <= most:
        raise ValueError(
            f"{where}.num_edges: found {config.num_edges}, wanted between {least} and {most}"
            f" with num_nodes: {config.num_nodes} (each node but the two roots has a parent)"
        )
    if 2 * config.max_hops > config.num_nodes - 2:
        raise ValueError(
            f"{where}.max_hops: found {config.max_hops}, wanted at most {(config.num_nodes - 2) // 2} with"
            f" num_nodes: {config.num_nodes} (two paths that share no node); enlarge num_nodes, or lower max_hops"
        )
    if config.task == "graph_sentences" and config.num_nodes > len(_CONCEPTS) + 2:
        raise ValueError(
            f"{where}.num_nodes: found {config.num_nodes}, wanted at most {len(_CONCEPTS) + 2}, for there are"
            f" {len(_CONCEPTS)} words; take fewer nodes, or task: graph_symbols"
        )
    return None


def draw(config: Graph, rng: random.Random) -> Example:
    """Draw a graph and ask about one of its roots, in sentences or in symbols."""
    puzzle = _draw_puzzle(config, rng)
    edges = list(puzzle.edges)
    rng.shuffle(edges)
    # The root in the question is drawn at random, so that the order of the targets gives no information.
    root = rng.randrange(2)
    targets = [path[-1] for path in puzzle.paths]
    if config.task == "graph_symbols":
        symbols = rng.sample(range(config.num_nodes), config.num_nodes)
        return _in_symbols(edges, targets, puzzle.paths[root], symbols, config.edges)
    names, concepts = rng.sample(_NAMES, 2), rng.sample(_CONCEPTS, config.num_nodes - 2)
    return _in_sentences(edges, targets, puzzle.paths[root], names + concepts)


def _in_sentences(edges: list[_Edge], targets: list[int], path: list[int], words: list[str]) -> Example:
    def sentence(parent: int, child: int) -> str:
        return f"{'' if parent < 2 else 'Every '}{words[parent]} is a {words[child]}."

    facts = " ".join(sentence(*edge) for edge in edges)
    question = f"{facts} Is {words[path[0]]} a {words[targets[0]]} or {words[targets[1]]}?"
    steps = [sentence(*edge) for edge in pairwise(path)]
    return Example(question, steps, sentence(path[0], path[-1]))


def _in_symbols(
    edges: list[_Edge], targets: list[int], path: list[int], symbols: list[int], style: EdgeStyle
) -> Example:
    named = [(symbols[parent], symbols[child]) for parent, child in edges]
    question = write_question(named, [symbols[target] for target in targets], symbols[path[0]], style)
    # A step is one token, the node that is reached: thought k is the state that predicts step k.
    return Example(question, [str(symbols[node]) for node in path[1:]], str(symbols[path[-1]]))


def write_question(
    edges: Sequence[tuple[_Node, _Node]], targets: Sequence[_Node], root: _Node, style: Literal[EdgeStyle, "sentences"]
) -> str:
    """Write a question about nodes that are numbers, or names in sentences; `read_question` reads it again.

    >>> write_question([(5, 0), (3, 5)], [4, 0], 3, "words")
    '5>0 3>5 [Q] 4 0 [R] 3'
    >>> write_question([(5, 0), (3, 5)], [4, 0], 3, "triples")
    '5 0 | 3 5 [Q] 4 0 [R] 3'
    >>> write_question([("Ann", "Max"), ("Tom", "Ann")], ["Kim", "Max"], "Tom", "sentences")
    'Ann knows Max. Tom knows Ann. Who is reached from Tom, Kim or Max?'
    """
    if style == "sentences":
        *others, last = map(str, targets)
        facts = " ".join(f"{parent} knows {child}." for parent, child in edges)
        return f"{facts} Who is reached from {root}, {', '.join(others)} or {last}?"
    mark, between = (">", " ") if style == "words" else (" ", " | ")
    facts = between.join(f"{parent}{mark}{child}" for parent, child in edges)
    return f"{facts} [Q] {' '.join(map(str, targets))} [R] {root}"


# --- growing a graph ------------------------------------------------------------------------


def _draw_puzzle(config: Graph, rng: random.Random) -> Puzzle:
    # This is binomial. For 3 to 6 hops the shares are .42 .42 .14 .02; ProsQA's validation set has .41 .44 .12 .02.
    num_hops = config.min_hops + sum(rng.random() < 0.25 for _ in range(config.max_hops - config.min_hops))
    for _ in range(MAX_ATTEMPTS):
        puzzle = _grow(config, num_hops, rng)
        if puzzle is not None:
            return puzzle
    raise ValueError(
        f"data.generator: no graph with {config.num_nodes} nodes, {config.num_edges} edges and two paths of"
        f" {num_hops} hops in {MAX_ATTEMPTS} attempts; lower num_edges, or the hops"
    )


def _grow(config: Graph, num_hops: int, rng: random.Random) -> Puzzle | None:
    """Give every node but 0 and 1 a parent among earlier nodes, then add edges up to the requested number.

    Returns:
        The puzzle, or None if the drawn nodes leave no room for so many edges.
    """
    sides, paths = _place_nodes(config.num_nodes, num_hops, rng)
    before = {child: parent for path in paths for parent, child in pairwise(path)}
    targets = (paths[0][-1], paths[1][-1])
    depth = [0, 0]
    edges, spare = [], []
    for node in range(2, config.num_nodes):
        parents = [p for p in range(node) if p not in targets and sides[node] in (_ANYWHERE, sides[p])]
        if node in before:
            parent = before[node]
        else:
            parent = rng.choices(parents, weights=[1.5 * depth[p] + 1 for p in parents])[0]
        depth.append(depth[parent] + 1)
        edges.append((parent, node))
        spare += [(p, node) for p in parents if p != parent]
    children = children_of(edges, range(config.num_nodes))
    for parent, node in _shuffle_weighted(spare, [1.5 * depth[p] + 1 for p, _ in spare], rng):
        if len(edges) == config.num_edges:
            break
        if sides[node] == _ANYWHERE or not _rivals(parent, node, paths[sides[node]], children):
            children[parent].append(node)
            edges.append((parent, node))
    return Puzzle(edges, paths) if len(edges) == config.num_edges else None


def _place_nodes(num_nodes: int, num_hops: int, rng: random.Random) -> tuple[list[int], tuple[list[int], list[int]]]:
    """Draw which root each node may descend from (or both), and which nodes are on the two paths."""
    owners: list[int | None] = [0, 1] * num_hops + [None] * (num_nodes - 2 - 2 * num_hops)
    rng.shuffle(owners)
    sides, paths = [0, 1], ([0], [1])
    for node, owner in enumerate(owners, start=2):
        if owner is None:
            sides.append(rng.choices((0, 1, _ANYWHERE), weights=(0.35, 0.35, 0.3))[0])
        else:
            sides.append(owner)
            paths[owner].append(node)
    return sides, paths


def _shuffle_weighted(edges: list[_Edge], weights: list[float], rng: random.Random) -> list[_Edge]:
    # Sorting by u^(1/w) draws by weight without replacement (Efraimidis and Spirakis 2006).
    keys = [rng.random() ** (1 / weight) for weight in weights]
    return [edges[i] for i in sorted(range(len(edges)), key=keys.__getitem__, reverse=True)]


def _rivals(parent: int, node: int, path: list[int], children: Mapping[int, Iterable[int]]) -> bool:
    """Tell whether an edge would create another path between the ends of `path` that is not longer."""
    from_root, _ = breadth_first(path[0], children)
    if parent not in from_root:
        return False
    from_node, _ = breadth_first(node, children)
    return path[-1] in from_node and from_root[parent] + 1 + from_node[path[-1]] < len(path)


def breadth_first(root: _Node, children: Mapping[_Node, Iterable[_Node]]) -> tuple[dict[_Node, int], dict[_Node, int]]:
    """Search breadth-first for the distance of each reachable node and the number of shortest paths to it."""
    distance, num_paths = {root: 0}, {root: 1}
    queue = [root]
    for node in queue:
        for child in children[node]:
            if child not in distance:
                distance[child], num_paths[child] = distance[node] + 1, 0
                queue.append(child)
            if distance[child] == distance[node] + 1:
                num_paths[child] += num_paths[node]
    return distance, num_paths


def children_of(edges: Iterable[tuple[_Node, _Node]], nodes: Iterable[_Node]) -> dict[_Node, list[_Node]]:
    """Return the children of every node, in the order of the edges."""
    children: dict[_Node, list[_Node]] = {node: [] for node in nodes}
    for parent, child in edges:
        children[parent].append(child)
    return children


# --- statistics -----------------------------------------------------------------------------

_FACT = re.compile(r"(?:Every )?(\w+) is a (\w+)\.")
_QUERY = re.compile(r" Is (\w+) a (\w+) or (\w+)\?$")
_ACQUAINTANCE = re.compile(r"(\w+) knows (\w+)\.")
_ACQUAINTANCES = re.compile(
    r"(?P<edges>\w+ knows \w+\.(?: \w+ knows \w+\.)*)"
    r" Who is reached from (?P<root>\w+), (?P<targets>\w+(?:, \w+)* or \w+)\?"
)
_SYMBOL_EDGE = re.compile(r"(\d+)[ >](\d+)")
_SYMBOLS = re.compile(
    r"(?P<edges>\d+ \d+(?: \| \d+ \d+)*|\d+>\d+(?: \d+>\d+)*) \[Q\] (?P<targets>\d+(?: \d+)+) \[R\] (?P<root>\d+)"
)


def read_question(question: str) -> ParsedQuestion | None:
    """Parse a question in sentences or in symbols; return None for any other text.

    >>> read_question("Every lempus is a rompus. Tom is a lempus. Is Tom a zumpus or rompus?")
    ParsedQuestion(edges=[('lempus', 'rompus'), ('Tom', 'lempus')], targets=('zumpus', 'rompus'), root='Tom')
    >>> read_question("5 0 | 3 5 [Q] 4 0 [R] 3")
    ParsedQuestion(edges=[('5', '0'), ('3', '5')], targets=('4', '0'), root='3')
    >>> read_question("5>0 3>5 [Q] 4 0 1 [R] 3")
    ParsedQuestion(edges=[('5', '0'), ('3', '5')], targets=('4', '0', '1'), root='3')
    >>> read_question("Ann knows Max. Tom knows Ann. Who is reached from Tom, Kim or Max?")
    ParsedQuestion(edges=[('Ann', 'Max'), ('Tom', 'Ann')], targets=('Kim', 'Max'), root='Tom')
    """
    if (query := _QUERY.search(question)) is not None:
        facts = _FACT.findall(question[: query.start()])
        return ParsedQuestion(facts, (query[2], query[3]), query[1])
    for whole, edge, between in ((_SYMBOLS, _SYMBOL_EDGE, " "), (_ACQUAINTANCES, _ACQUAINTANCE, ", | or ")):
        if (match := whole.fullmatch(question)) is not None:
            edges = [(parent, child) for parent, child in edge.findall(match["edges"])]
            return ParsedQuestion(edges, tuple(re.split(between, match["targets"])), match["root"])
    return None


def edge_spans(question: str) -> list[tuple[int, int]]:
    """Return where the edges that `read_question` reads stand in the text, in the same order.

    >>> [text[a:b] for text in ("5>0 3>5 [Q] 4 0 1 [R] 3",) for a, b in edge_spans(text)]
    ['5>0', '3>5']
    """
    for mark, pattern in ((" [Q] ", _SYMBOL_EDGE), (" Who is reached from ", _ACQUAINTANCE), (" Is ", _FACT)):
        if (stop := question.rfind(mark)) >= 0:
            return [match.span() for match in pattern.finditer(question, 0, stop)]
    return []


def statistics(examples: Iterable[Example]) -> dict[str, float] | None:
    """Compute the mean size of the examples' graphs, for comparison with `PAPER_STATISTICS`.

    Returns:
        The means of nodes, edges, path (hops to the target) and shortest_paths (paths of that length),
        or None if a question is not about a graph.
    """
    rows = []
    for example in examples:
        parsed = read_question(example.question)
        if parsed is None or not example.steps:
            return None
        number = {word: i for i, word in enumerate(dict.fromkeys(word for edge in parsed.edges for word in edge))}
        answer = example.answer.rstrip(".").split()[-1]
        if parsed.root not in number or answer not in number:
            return None
        edges = [(number[parent], number[child]) for parent, child in parsed.edges]
        _, num_paths = breadth_first(number[parsed.root], children_of(edges, range(len(number))))
        rows.append((len(number), len(edges), len(example.steps), num_paths.get(number[answer], 0)))
    if not rows:
        return None
    return {key: round(mean(column), 3) for key, column in zip(PAPER_STATISTICS, zip(*rows, strict=True), strict=True)}
