"""Tests of the synthetic tasks, each against a slower solver that shares no code with it."""

import random
import re
import tracemalloc
from collections import Counter
from itertools import pairwise, product

import pytest

from coconut.data.examples import Example
from coconut.data.generators import arithmetic, graphs, multiplication, search
from coconut.data.generators.arithmetic import ChainedArithmetic
from coconut.data.generators.graphs import Graph
from coconut.data.generators.multiplication import Multiplication
from coconut.data.generators.search import Search
from coconut.data.streams import generate
from test_sources import read, shared

ARITHMETIC = ChainedArithmetic("chained_arithmetic", num_operations=4, modulus=11)
SENTENCES = Graph("graph_sentences", num_nodes=23, num_edges=36, min_hops=3, max_hops=6)
SYMBOLS = Graph("graph_symbols", num_nodes=23, num_edges=36, min_hops=3, max_hops=6)
MULTIPLICATION = Multiplication("multiplication", num_digits=4)

SEARCH = Search("search", branches=2, hops=3, edges="words")

every_task = pytest.mark.parametrize(
    "task",
    [ARITHMETIC, SENTENCES, SYMBOLS, SEARCH, Search("search", branches=2, hops=3, edges="sentences"), MULTIPLICATION],
    ids=lambda t: f"{t.task} in {t.edges}" if isinstance(t, Search) else t.task,
)


# --- every task -----------------------------------------------------------------------------


@every_task
def test_a_seed_gives_the_same_examples_again_and_another_seed_others(task):
    examples = generate(task, 50, seed=3)
    random.seed(99)  # The global state must not matter.
    assert generate(task, 50, seed=3) == examples
    assert not {e.question for e in generate(task, 50, seed=4)} & {e.question for e in examples}


@every_task
def test_asking_for_more_examples_changes_none_of_the_first(task):
    assert generate(task, 80, seed=0)[:30] == generate(task, 30, seed=0)


@every_task
def test_no_question_repeats(task):
    assert len({e.question for e in generate(task, 1000, seed=0)}) == 1000


def test_a_generator_leaves_the_global_random_state_alone():
    random.seed(1)
    state = random.getstate()
    generate(SENTENCES, 5, seed=0)
    assert random.getstate() == state


# --- chained arithmetic ---------------------------------------------------------------------


def test_the_example_of_the_task_page_comes_out_word_for_word():
    example = arithmetic.solve(10, [("-", 10), ("-", 5), ("+", 8), ("-", 5)], 11)
    assert example == Example("10 - 10 - 5 + 8 - 5 ?", ["0", "6", "3", "9"], "9")


def calculator(question, modulus):
    """Count on a ring of `modulus` places, one place at a time: values after each operation."""
    words = question.removesuffix(" ?").split()
    value, values = int(words[0]), []
    for symbol, operand in zip(words[1::2], words[2::2], strict=True):
        moves, start = (value * (int(operand) - 1), value) if symbol == "*" else (int(operand), value)
        for _ in range(moves):
            start = (modulus - 1 if start == 0 else start - 1) if symbol == "-" else (start + 1) % modulus
        value = start
        values.append(str(value))
    return values


@pytest.mark.parametrize(("num_operations", "modulus"), [(4, 11), (1, 3), (2, 7), (20, 13)])
def test_arithmetic_agrees_with_counting_on_a_ring(num_operations, modulus):
    task = ChainedArithmetic("chained_arithmetic", num_operations, modulus)
    for example in generate(task, min(300, arithmetic.count(task)), seed=1):
        assert list(example.steps) == calculator(example.question, modulus)
        assert example.answer == example.steps[-1]
        assert len(example.steps) == num_operations


def test_small_arithmetic_can_be_drawn_to_the_last_question_and_no_further():
    task = ChainedArithmetic("chained_arithmetic", num_operations=1, modulus=5)
    operations = [*product("+-", range(1, 5)), *product("*", range(2, 5))]
    every_question = {f"{start} {symbol} {operand} ?" for start in range(5) for symbol, operand in operations}
    assert len(every_question) == 5 * (3 * 5 - 4) == 55
    assert {e.question for e in generate(task, 55, seed=0)} == every_question
    with pytest.raises(ValueError, match=r"56 distinct questions asked .* has only 55"):
        generate(task, 56, seed=0)


def test_two_operations_modulo_11_have_9251_questions_and_asking_for_9252_ends_at_once():
    task = ChainedArithmetic("chained_arithmetic", num_operations=2, modulus=11)
    assert len({e.question for e in generate(task, 9251, seed=0)}) == 9251
    with pytest.raises(ValueError, match="has only 9251; ask for fewer rows, or enlarge the task"):
        generate(task, 9252, seed=0)


def test_over_all_questions_every_answer_is_equally_likely():
    task = ChainedArithmetic("chained_arithmetic", num_operations=2, modulus=7)
    answers = Counter(e.answer for e in generate(task, arithmetic.count(task), seed=0))
    assert set(answers.values()) == {(3 * 7 - 4) ** 2}


@pytest.mark.parametrize("modulus", [3, 5, 11, 101])
def test_arithmetic_draws_what_a_choice_from_the_list_of_all_operations_would(modulus):
    """Byte for byte: data that were made with the list are still the same."""
    operations = [*product("+-", range(1, modulus)), *product("*", range(2, modulus))]
    task = ChainedArithmetic("chained_arithmetic", 3, modulus)
    rng, twin = random.Random(7), random.Random(7)
    for _ in range(200):
        start = twin.randrange(modulus)
        wanted = arithmetic.solve(start, [twin.choice(operations) for _ in range(3)], modulus)
        assert arithmetic.draw(task, rng) == wanted


@pytest.mark.timeout(30)  # Milliseconds; a list of all operations would take 3 GB and minutes.
def test_a_modulus_of_a_billion_costs_neither_time_nor_memory():
    task = ChainedArithmetic("chained_arithmetic", 2, 1_000_000_007)
    tracemalloc.start()
    try:
        examples = generate(task, 100, seed=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10e6
    # Too far to count on a ring; the integers as a whole, reduced at the end, are another way.
    for example in examples:
        start, first, x, second, y, _ = example.question.split()
        signed = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
        whole = signed[second](signed[first](int(start), int(x)), int(y))
        assert int(example.answer) == whole % 1_000_000_007


@pytest.mark.parametrize("modulus", [4, 9, 15, 121])
def test_a_modulus_that_is_no_prime_is_refused(modulus):
    with pytest.raises(ValueError, match=rf"data\.generator\.modulus: found {modulus} = .*wanted a prime"):
        generate(ChainedArithmetic("chained_arithmetic", 2, modulus), 10, seed=0)


# --- graphs ---------------------------------------------------------------------------------


def parse(question):
    """Read a question of either form, by other means than the generator's own reader."""
    if question.endswith("?"):
        *facts, query = re.split(r"(?<=\.) ", question)
        edges = [re.sub("^Every ", "", fact.rstrip(".")).split(" is a ") for fact in facts]
        root, first, second = re.sub(r"^Is |\?$", "", query).replace(" or ", " a ").split(" a ")
    else:
        facts, query = question.split(" [Q] ")
        edges = [pair.split(" ") for pair in facts.split(" | ")]
        targets, root = query.split(" [R] ")
        first, second = targets.split(" ")
    return [tuple(edge) for edge in edges], root, (first, second)


def paths_between(edges, start, end, trail=()):
    """Enumerate all paths by trying every edge: slow, and nothing to get wrong."""
    if start == end:
        return [[*trail, end]]
    return [
        path for parent, child in edges if parent == start for path in paths_between(edges, child, end, (*trail, start))
    ]


def roots_of(edges):
    return {parent for parent, _ in edges} - {child for _, child in edges}


@pytest.mark.parametrize(
    "task",
    [
        SENTENCES,
        SYMBOLS,
        Graph("graph_sentences", num_nodes=40, num_edges=70, min_hops=2, max_hops=8),
        Graph("graph_symbols", num_nodes=12, num_edges=16, min_hops=2, max_hops=3),
        Graph("graph_symbols", num_nodes=4, num_edges=2, min_hops=1, max_hops=1),
        Graph("graph_symbols", num_nodes=10, num_edges=8, min_hops=4, max_hops=4),
    ],
    ids=["sentences", "symbols", "large", "small", "smallest", "two chains"],
)
def test_graph_puzzles_hold_what_their_parameters_and_the_paper_say(task):
    for example in generate(task, 12 if task.num_nodes == 4 else 40, seed=5):
        edges, root, targets = parse(example.question)
        nodes = {node for edge in edges for node in edge}
        assert (len(nodes), len(edges), len(set(edges))) == (task.num_nodes, task.num_edges, task.num_edges)
        (other_root,) = roots_of(edges) - {root}
        assert root in roots_of(edges)

        answer = example.answer.rstrip(".").split()[-1]
        (wrong,) = set(targets) - {answer}
        paths = sorted(paths_between(edges, root, answer), key=len)
        shortest = paths[0]
        assert len(paths) == 1 or len(paths[1]) > len(shortest), "the shortest path is unique"
        assert task.min_hops <= len(shortest) - 1 <= task.max_hops
        assert not paths_between(edges, root, wrong)
        assert not paths_between(edges, other_root, answer)
        # The roots are alike: swapping them swaps the answers, and both targets lie equally deep.
        other_paths = sorted(paths_between(edges, other_root, wrong), key=len)
        assert len(other_paths[0]) == len(shortest)
        assert not {parent for parent, _ in edges} & set(targets), "targets are leaves"

        if task.task == "graph_symbols":
            assert list(example.steps) == shortest[1:]
        else:
            sentences = example.question.split(" Is ")[0]
            assert all(step in sentences for step in example.steps)
            walked = [re.sub("^Every ", "", step.rstrip(".")).split(" is a ") for step in example.steps]
            assert walked == [list(edge) for edge in pairwise(shortest)]
            assert example.answer == f"{root} is a {answer}."


def test_only_roots_are_persons_as_in_the_real_sentences():
    for example in generate(SENTENCES, 20, seed=0):
        edges, root, _ = parse(example.question)
        assert {node for edge in edges for node in edge if node[0].isupper()} == roots_of(edges)
        assert re.fullmatch(r"((Every [a-z]+|[A-Z][a-z]+) is a [a-z]+\. )+Is [A-Z]\w+ a \w+ or \w+\?", example.question)
        assert example.steps[0].startswith(f"{root} is a ")


def test_with_the_papers_parameters_the_statistics_are_the_papers():
    statistics = graphs.statistics(generate(SENTENCES, 2000, seed=0))
    assert (statistics["nodes"], statistics["edges"], statistics["shortest_paths"]) == (23, 36, 1)
    assert statistics["path"] == pytest.approx(graphs.PAPER_STATISTICS["path"], abs=0.1)


def test_statistics_of_the_real_prosqa_file_are_the_papers():
    examples = read(shared("prosqa_valid.json"), "prosqa").examples
    assert graphs.statistics(examples) == {"nodes": 22.82, "edges": 36.26, "path": 3.753, "shortest_paths": 1.613}


def test_statistics_of_anything_else_are_none():
    assert graphs.statistics(generate(ARITHMETIC, 5, seed=0)) is None
    assert graphs.statistics([]) is None
    assert graphs.statistics([Example("Is Tom a dog or cat?", ["so"], "Tom is a cat.")]) is None


def test_neither_order_nor_number_nor_indegree_gives_the_answer_away():
    first, smaller, more_parents, ties = 0, 0, 0, 0
    examples = generate(SYMBOLS, 2000, seed=7)
    for example in examples:
        edges, _, targets = parse(example.question)
        parents = Counter(child for _, child in edges)
        wrong = next(target for target in targets if target != example.answer)
        first += targets[0] == example.answer
        smaller += int(example.answer) < int(wrong)
        more_parents += parents[example.answer] > parents[wrong]
        ties += parents[example.answer] == parents[wrong]
    # Four standard deviations of 2000 fair coins are 89.
    assert abs(first - 1000) < 90
    assert abs(smaller - 1000) < 90
    assert abs(more_parents - (2000 - ties) / 2) < 90


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_hops": 7}, r"min_hops: found 7, wanted at most max_hops, 6"),
        ({"max_hops": 11}, r"max_hops: found 11, wanted at most 10 with num_nodes: 23"),
        ({"num_edges": 20}, r"num_edges: found 20, wanted between 21 and 252"),
        ({"num_edges": 253}, r"num_edges: found 253, wanted between 21 and 252"),
        ({"num_edges": 250}, r"no graph with 23 nodes, 250 edges .* lower num_edges, or the hops"),
        ({"num_nodes": 41, "num_edges": 60}, r"num_nodes: found 41, wanted at most 40, for there are 38 words"),
    ],
)
def test_impossible_graphs_are_refused_with_the_cure(changes, message):
    with pytest.raises(ValueError, match=rf"data\.generator.*{message}"):
        generate(Graph(**vars(SENTENCES) | changes), 3, seed=0)


def test_a_graph_task_that_runs_out_of_questions_says_how_many_it_found():
    # Two edges in 2 orders, 4 numbers in 24 orders, 2 orders of the targets, either root.
    every = generate(Graph("graph_symbols", num_nodes=4, num_edges=2, min_hops=1, max_hops=1), 96, seed=0)
    assert len({e.question for e in every}) == 96
    with pytest.raises(ValueError, match=r"97 distinct questions asked .* only 96 turned up"):
        generate(Graph("graph_symbols", num_nodes=4, num_edges=2, min_hops=1, max_hops=1), 97, seed=0)


# --- multiplication -------------------------------------------------------------------------


def test_every_real_row_of_4_digit_multiplication_is_solved_to_the_character():
    examples = read(shared("mult_4x4_valid.txt"), "multiplication").examples
    assert len(examples) == 1000
    for example in examples:
        left, right = (int(factor.replace(" ", "")[::-1]) for factor in example.question.split(" * "))
        assert multiplication.solve(left, right) == example


@pytest.mark.parametrize("num_digits", [1, 2, 3, 4, 9])
def test_multiplication_agrees_with_repeated_addition_of_shifted_digits(num_digits):
    for example in generate(Multiplication("multiplication", num_digits), 50, seed=2):
        number = lambda text: sum(int(d) * 10**i for i, d in enumerate(text.split()))  # noqa: E731
        left, right = example.question.split(" * ")
        assert len(left.split()) == len(right.split()) == num_digits == len(example.steps)
        assert number(example.answer) == sum(number(left) for _ in range(number(right) % 1000)) + (
            number(right) // 1000 * 1000 * number(left)
        )
        assert len(example.answer.split()) == 2 * num_digits
        total = 0
        for i, step in enumerate(example.steps):
            partial, _, so_far = step.removesuffix(" )").partition(" ( ")
            total += number(partial)
            assert number(partial) == number(left) * int(right.split()[i]) * 10**i
            assert bool(so_far) == (0 < i < num_digits - 1)
            assert not so_far or number(so_far) == total
        assert total == number(example.answer)


def test_one_digit_multiplication_has_81_questions():
    task = Multiplication("multiplication", num_digits=1)
    assert len({e.question for e in generate(task, 81, seed=0)}) == 81
    with pytest.raises(ValueError, match=r"82 distinct questions asked .* has only 81"):
        generate(task, 82, seed=0)
    assert multiplication.count(MULTIPLICATION) == 9000**2


# --- search ---------------------------------------------------------------------------------

SEARCHES = [
    Search("search", branches=2, hops=3, edges="words"),
    Search("search", branches=3, hops=2, edges="triples", roots=4),
    Search("search", branches=1, hops=1, edges="words"),
    Search("search", branches=2, hops=6, edges="sentences", roots=3),
    Search("search", branches=2, hops=1, edges="sentences"),
]


@pytest.mark.parametrize("task", SEARCHES, ids=str)
def test_a_search_has_trees_of_single_paths_and_one_candidate_below_the_root(task):
    for example in generate(task, 30 if task.branches > 1 else 5, seed=2):
        parsed = graphs.read_question(example.question)
        assert [parse_edge(example.question[a:b]) for a, b in graphs.edge_spans(example.question)] == parsed.edges
        children = {}
        for parent, child in parsed.edges:
            children.setdefault(parent, []).append(child)
        nodes = {node for edge in parsed.edges for node in edge}
        num_nodes = task.roots * (1 + task.branches * task.hops)
        if task.edges == "sentences":
            assert len(nodes) == num_nodes
            assert nodes <= set(search.NAMES)
        else:
            assert nodes == {str(number) for number in range(num_nodes)}
        roots = nodes - {child for _, child in parsed.edges}
        assert len(roots) == task.roots
        leaves_by_root = {root: dict(walk(root, children)) for root in roots}
        for leaves in leaves_by_root.values():
            assert len(leaves) == task.branches
            assert {len(path) for path in leaves.values()} == {task.hops + 1}
        assert len(parsed.targets) == task.roots
        assert all(sum(target in leaves for target in parsed.targets) == 1 for leaves in leaves_by_root.values())
        (answer,) = (target for target in parsed.targets if target in leaves_by_root[parsed.root])
        assert example.answer == answer
        assert (parsed.root, *example.steps) == leaves_by_root[parsed.root][answer]


def parse_edge(text):
    return tuple(re.findall("[0-9]+|[A-Z][a-z]+", text))


def walk(node, children, path=()):
    """Yield every leaf with the path that leads to it, depth first."""
    if node not in children:
        yield node, (*path, node)
    for child in children.get(node, []):
        yield from walk(child, children, (*path, node))


def test_neither_place_of_the_candidates_nor_of_the_edges_tells_the_answer():
    examples = generate(SEARCHES[0], 2000, seed=0)
    parsed = [graphs.read_question(example.question) for example in examples]
    first = sum(question.targets[0] == example.answer for question, example in zip(parsed, examples, strict=True))
    assert 900 < first < 1100  # Five standard deviations.
    of_root = [
        [place for place, (parent, _) in enumerate(question.edges) if parent == question.root] for question in parsed
    ]
    assert {place for places in of_root for place in places} == set(range(12))
    through_first = sum(
        question.edges[places[0]][1] == example.steps[0]
        for question, places, example in zip(parsed, of_root, examples, strict=True)
    )
    assert 900 < through_first < 1100


def test_a_search_that_is_too_large_is_refused_before_it_is_drawn():
    with pytest.raises(ValueError, match="2 roots with 1000 branches of 1000 hops make 2000002 nodes, wanted at most"):
        generate(Search("search", 1000, 1000, "words"), 1, seed=0)


def test_a_search_of_more_nodes_than_there_are_names_is_refused():
    assert len(set(search.NAMES)) == len(search.NAMES) == 77
    with pytest.raises(
        ValueError, match=r"make 78 nodes, but there are only 77 names; lower one .* or take edges: wor"
    ):
        generate(Search("search", 5, 5, "sentences", 3), 1, seed=0)
    generate(Search("search", 6, 4, "sentences", 3), 1, seed=0)


def test_a_search_in_words_and_one_in_sentences_are_written_so():
    """Word for word: a test set that was drawn once is still the same."""
    assert generate(Search("search", 2, 2, "words"), 1, seed=0) == [
        Example("9>3 3>7 6>0 2>1 6>4 0>5 9>2 4>8 [Q] 7 5 [R] 6", ["0", "5"], "5")
    ]
    assert generate(Search("search", 2, 2, "sentences"), 1, seed=0) == [
        Example(
            "Matthew knows Phil. Phil knows Louis. Marie knows Ann. Jean knows Joseph. Marie knows Ross."
            " Ann knows Mary. Matthew knows Jean. Ross knows Peter. Who is reached from Marie, Louis or Mary?",
            ["Ann", "Mary"],
            "Mary",
        )
    ]


@pytest.mark.parametrize(
    "question",
    [
        "Tom knows Ann. Who is reached from Tom, Ann?",
        "Tom knows Ann. Bob likes Max. Who is reached from Tom, Ann or Max?",
        "Who is reached from Tom, Ann or Max?",
        "Tom knows Ann. Who is reached from Tom, Ann or Max? Say it.",
    ],
)
def test_other_sentences_about_people_are_no_graph(question):
    assert graphs.read_question(question) is None


def test_edges_as_words_are_the_same_graph_as_in_triples():
    words = Graph("graph_symbols", num_nodes=14, num_edges=20, min_hops=3, max_hops=3, edges="words")
    triples = Graph("graph_symbols", num_nodes=14, num_edges=20, min_hops=3, max_hops=3)
    for in_words, in_triples in zip(generate(words, 20, seed=0), generate(triples, 20, seed=0), strict=True):
        assert graphs.read_question(in_words.question) == graphs.read_question(in_triples.question)
        assert (in_words.steps, in_words.answer) == (in_triples.steps, in_triples.answer)
        assert " | " not in in_words.question
