"""Search in trees that share no node: which of the candidates lies below the root in the question.

Every root has `branches` children, and a path goes on from each child until `hops` edges below the root. One leaf of
every tree is a candidate, and one root is asked: the answer is its candidate. With 2 branches and 2 hops:

         5           9          5>3 1>7 9>1 3>8 5>0 9>6 0>2 6>4 [Q] 4 8 [R] 5
       3   0       1   6        steps 3, 8; answer 8
       8   2       7   4

Whoever writes the path down must choose the first node before knowing which branch leads to a candidate, so a greedy
chain of thought is right in one of `branches` questions. Nodes are numbered anew for every question, and edges stand in
a random order, so nothing can be memorised.

In sentences, nodes are first names: "Tom knows Ann. Ben knows Kim. ... Who is reached from Tom, Kim or Max?"
"""

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from coconut.config.strict import Range
from coconut.data.examples import Example
from coconut.data.generators.graphs import EdgeStyle, write_question

MAX_NODES = 10_000

# One token each in the vocabulary of SmolLM2, with and without a blank before it.
# fmt: off
NAMES = [
    "Adam", "Alex", "Alexander", "Alice", "Andrew", "Ann", "Anna", "Anne", "Arthur", "Ben", "Bill", "Bob", "Carl",
    "Charles", "Chris", "Dan", "Daniel", "David", "Donald", "Ed", "Edward", "Elizabeth", "Emily", "Frank", "Fred",
    "George", "Greg", "Henry", "Jack", "Jacob", "James", "Jamie", "Jane", "Jean", "Jeff", "Jim", "John", "Jon",
    "Joseph", "Ken", "Kim", "Lee", "Leon", "Lewis", "Lily", "Louis", "Luke", "Marc", "Maria", "Marie", "Martin",
    "Mary", "Matt", "Matthew", "Max", "Maya", "Michael", "Michel", "Neil", "Nick", "Paul", "Peter", "Phil", "Richard",
    "Robert", "Ross", "Sam", "Samuel", "Sarah", "Scott", "Simon", "Stephen", "Thomas", "Tim", "Tom", "Victor",
    "William",
]
# fmt: on


@dataclass(frozen=True)
class Search:
    """Which candidate lies below a root, in trees of `branches` paths that do not meet."""

    task: Literal["search"]
    branches: Annotated[int, Range(1, 1_000)]
    """Paths below every root. A chain of words that chooses the first node is right in one of so many."""
    hops: Annotated[int, Range(1, 1_000)]
    """Edges from a root to each of its leaves, and steps of an example."""
    edges: Literal[EdgeStyle, "sentences"]
    """`words` writes an edge as one word, `a>b`; `triples` as three, `a b |`; `sentences` as `Tom knows Ann.`"""
    roots: Annotated[int, Range(2, 1_000)] = 2
    """Trees of the graph, one candidate in each."""


def count(config: Search) -> int | None:
    """Refuse a graph that is too large. The number of distinct questions is not known, so return None."""
    num_nodes = config.roots * (1 + config.branches * config.hops)
    if num_nodes > MAX_NODES:
        raise ValueError(
            f"data.generator: {config.roots} roots with {config.branches} branches of {config.hops} hops make"
            f" {num_nodes} nodes, wanted at most {MAX_NODES}; lower one of the three"
        )
    if config.edges == "sentences" and num_nodes > len(NAMES):
        raise ValueError(
            f"data.generator: {config.roots} roots with {config.branches} branches of {config.hops} hops make"
            f" {num_nodes} nodes, but there are only {len(NAMES)} names; lower one of the three, or take edges: words"
        )
    return None


def draw(config: Search, rng: random.Random) -> Example:
    """Draw the numbers or names of the nodes, the candidates, the root in the question, and every order."""
    num_nodes = config.roots * (1 + config.branches * config.hops)
    nodes = rng.sample(NAMES if config.edges == "sentences" else [str(n) for n in range(num_nodes)], num_nodes)
    trees = [nodes[start :: config.roots] for start in range(config.roots)]
    # A path begins at the root and goes down one branch: `hops` nodes that no other path holds.
    paths = [[[tree[0], *tree[1 + branch :: config.branches]] for branch in range(config.branches)] for tree in trees]
    edges = [edge for tree in paths for path in tree for edge in pairwise(path)]
    rng.shuffle(edges)
    chosen = [rng.choice(tree) for tree in paths]
    asked = chosen[0]
    rng.shuffle(chosen)
    question = write_question(edges, [path[-1] for path in chosen], asked[0], config.edges)
    return Example(question, asked[1:], asked[-1])
