"""What probes measure: right on thoughts of which it is known what they hold, and on thoughts that do nothing."""

import csv
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from coconut.data.examples import Example
from coconut.probing.attention import measure_attention
from coconut.probing.conclusion import conclude
from coconut.probing.decoding import effective_rank, measure_decoded, measure_geometry
from coconut.probing.entry import SUMMARY, probe, summarise
from coconut.probing.graphs import Graphs, Search, kind_of_text, measure_graphs, read_search
from coconut.probing.linear import fit_probe, measure_probes
from coconut.probing.replacing import measure_replaced
from coconut.probing.rows import Row, find_row, mean_row, share_row, value_of, write_rows
from coconut.probing.shown import choose
from inprocess import canonical_splits, make_folder, stage, succeed, sums
from inprocess import write_rows as write_raw
from project import write_params
from test_thoughts import make_subject

GRAPH = Example("5>3 1>7 9>1 3>8 5>0 9>6 0>2 6>4 [Q] 4 8 [R] 5", ["3", "8"], "8")


# --- rows -----------------------------------------------------------------------------------


def test_a_share_has_wilsons_interval_and_the_exact_paired_test() -> None:
    row = share_row([True] * 8 + [False] * 2, [True] * 10, measure="replaced", condition="zero")
    assert (row.value, row.num) == (0.8, 10)
    assert row.low is not None
    assert row.high is not None
    assert row.low < 0.8 < row.high
    assert row.p == 0.5, "two questions of two, either way: 2 x (1/2)^2"
    assert share_row([], measure="x").value is None


def test_rows_are_written_as_numbers_a_reader_gets_back() -> None:
    rows = [mean_row([1.0, 2.0, 6.0], measure="entropy", thought=2), Row(measure="mass", group="no graph, none")]
    first, second = csv.DictReader(io.StringIO(write_rows(rows)))
    assert (first["measure"], first["thought"], float(first["value"]), first["num"]) == ("entropy", "2", 3.0, "3")
    assert (second["value"], second["group"]) == ("", "no graph, none")


# --- decoded thoughts and geometry ----------------------------------------------------------


def test_thoughts_that_hold_their_steps_are_found_and_those_of_other_questions_are_not() -> None:
    subject = make_subject()
    labels = torch.tensor([[ids[0] for ids in row.steps_ids] for row in subject.encoded])
    vocabulary = subject.evaluator.model.get_input_embeddings().weight.shape[0]
    probs_NKV = torch.nn.functional.one_hot(labels, vocabulary).float()
    rows = measure_decoded(subject, probs_NKV, c_thought=1)
    assert value_of(rows, "decoded", condition="own_top1", thought=None) == 1.0
    # Steps 3 6, 4 4 and 2 8: no thought of one question is the same step of another.
    assert value_of(rows, "decoded", condition="own_top1_shuffled", thought=None) == 0.0
    swapped = measure_decoded(subject, probs_NKV.flip(1), c_thought=1)
    assert value_of(swapped, "decoded", condition="own_top1", thought=None) == pytest.approx(1 / 3)  # Only 4 4.
    assert value_of(swapped, "decoded", condition="any_top1", thought=None) == 1.0


def test_geometry_of_pause_slots_is_that_of_one_point() -> None:
    subject = make_subject(method="pause_as_thought", c_thought=2)
    probs_NKV = subject.decoded(subject.trace.states_NJD[:, :-1])
    rows = measure_geometry(subject, probs_NKV)
    assert value_of(rows, "effective_rank", thought=1) == 0.0
    assert value_of(rows, "cosine", thought=2) == pytest.approx(1.0)


def test_the_effective_rank_counts_directions() -> None:
    line = torch.linspace(-1, 1, 50)[:, None] * torch.ones(1, 8)
    assert effective_rank(line) == pytest.approx(1.0, abs=1e-3)
    generator = torch.Generator().manual_seed(0)
    assert effective_rank(torch.randn(4000, 8, generator=generator)) == pytest.approx(8.0, abs=0.05)


# --- is a thought needed? -------------------------------------------------------------------


def test_of_pause_slots_it_says_that_the_thoughts_do_nothing() -> None:
    subject = make_subject(method="pause_as_thought", c_thought=2)
    rows = measure_replaced(subject)
    for condition in ("mean", "other_question", "reordered"):
        assert value_of(rows, "replaced_changed", condition=condition, group="all") == 0.0
        assert value_of(rows, "replaced_log_p", condition=condition, group="all") == pytest.approx(0.0, abs=1e-4)
    assert conclude(rows) == "the thoughts do nothing here: those of another question change no answer of 3"


def test_of_answers_that_hang_on_the_thoughts_it_says_so() -> None:
    """With a p below .01, which three questions cannot give: rows as a run of 500 would leave them."""
    rights = [True] * 20
    rows = [
        share_row([False] * 20, rights, measure="replaced", condition="other_question", group="all"),
        share_row([True] * 20, measure="replaced_changed", condition="other_question", group="all"),
    ]
    assert conclude(rows).startswith("the answers depend on the thoughts: with those of another question accuracy is 0")
    few = [
        share_row([False] + [True] * 19, rights, measure="replaced", condition="other_question", group="all"),
        share_row([True] + [False] * 19, measure="replaced_changed", condition="other_question", group="all"),
    ]
    assert conclude(few).startswith("no effect of the thoughts on accuracy was found")


def test_every_slot_and_every_side_of_it_is_replaced_once() -> None:
    subject = make_subject(c_thought=2)
    rows = [row for row in measure_replaced(subject) if row.measure == "replaced" and row.condition == "zero"]
    places = [(row.group, row.thought) for row in rows]
    one = [("one", slot) for slot in (1, 2, 3, 4)]
    assert places == [("all", None), *one, ("before", 3), ("before", 4), ("after", 1), ("after", 2)]
    assert len(set(places)) == len(places)


# --- linear probes --------------------------------------------------------------------------


def test_a_probe_reads_what_is_there_and_nothing_of_permuted_labels() -> None:
    generator = torch.Generator().manual_seed(1)
    labels_N = torch.randint(0, 4, (400,), generator=generator)
    states_ND = torch.randn(400, 16, generator=generator)
    states_ND[:, :4] += 6 * torch.nn.functional.one_hot(labels_N, 4)
    right = fit_probe(states_ND, labels_N)
    assert len(right) == 200
    assert sum(right) / 200 > 0.97
    permuted = fit_probe(states_ND, labels_N[torch.randperm(400, generator=generator)])
    assert sum(permuted) / 200 < 0.4
    assert len(fit_probe(states_ND, torch.where(torch.arange(400) < 100, -1, labels_N))) == 150, "without the step"


def test_few_questions_give_a_reason_in_place_of_a_probe() -> None:
    (row,) = measure_probes(make_subject(), c_thought=1)
    assert (row.value, row.group) == (None, "fewer than 40 questions")


# --- graphs ---------------------------------------------------------------------------------


def search() -> Search:
    found = read_search(GRAPH)
    assert found is not None
    return found


def test_groups_of_nodes_are_those_of_a_breadth_first_search() -> None:
    found = search()
    assert sorted(found.group("frontier", 1)) == ["0", "3"]
    assert sorted(found.group("frontier", 2)) == ["2", "8"]
    assert sorted(found.group("reachable", 2)) == ["0", "2", "3", "8"]
    assert found.group("path", 1) == ["3"]
    assert sorted(found.group("unreachable", 1)) == ["1", "4", "6", "7", "9"]
    assert found.other_root() == "9"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("3\n8\n### 8", "right"),
        ("3\n7\n### 7", "invented_edge"),
        ("0\n2\n### 2", "dead_end"),
        ("0\n2\n### 4", "wrong_target"),
        ("### 8", "right"),
        ("3\n### 3", "other"),
    ],
)
def test_texts_are_sorted_by_what_is_wrong_with_them(text: str, kind: str) -> None:
    assert kind_of_text(search(), text) == kind


def test_sentences_are_graphs_too() -> None:
    found = read_search(
        Example(
            "Every lempus is a rompus. Tom is a lempus. Bob is a zumpus. Is Tom a zumpus or rompus?",
            ["Tom is a lempus.", "Every lempus is a rompus."],
            "Tom is a rompus.",
        )
    )
    assert found is not None
    assert found.path == ["lempus", "rompus"]
    assert found.group("frontier", 2) == ["rompus"]
    assert kind_of_text(found, "Tom is a lempus.\nEvery lempus is a rompus.\n### Tom is a rompus.") == "right"


ACQUAINTANCES = "Tom knows Ann. Ben knows Kim. Tom knows Sam. Kim knows Leo. Ann knows Eve. Ben knows Joe."
IN_SENTENCES = [
    Example(f"{ACQUAINTANCES} Who is reached from Tom, Leo or Eve?", ["Ann", "Eve"], "Eve"),
    Example(f"{ACQUAINTANCES} Who is reached from Ben, Leo or Eve?", ["Kim", "Leo"], "Leo"),
]


def test_a_search_in_sentences_is_a_graph_of_names() -> None:
    found = read_search(IN_SENTENCES[0])
    assert found is not None
    assert (found.path, found.other_root()) == (["Ann", "Eve"], "Ben")
    assert (found.group("frontier", 1), found.group("frontier", 2)) == (["Ann", "Sam"], ["Eve"])
    texts = ["Ann\nEve\n### Eve", "Ann\nLeo\n### Leo", "Sam\n### Leo"]
    assert [kind_of_text(found, text) for text in texts] == ["right", "invented_edge", "wrong_target"]


def test_a_search_in_sentences_is_probed_and_asked_from_its_other_root() -> None:
    subject = make_subject(examples=IN_SENTENCES)
    graphs = Graphs.of(subject)
    assert graphs is not None
    probs_NKV = torch.zeros(2, 2, subject.evaluator.model.get_input_embeddings().weight.shape[0])
    probs_NKV[0, 0, graphs.tokens["Ann"]] = 0.5
    rows = measure_graphs(subject, graphs, probs_NKV)
    assert value_of(rows, "mass", thought=1, group="frontier") == 0.25, "the mean of one half and of nothing"
    assert value_of(rows, "share_of_nodes", thought=1, group="frontier") == 0.25
    assert value_of(rows, "donor", condition="moved_to_donor") is not None
    attention = measure_attention(subject, graphs)
    assert value_of(attention, "share_of_edges", thought=1, group="frontier") == 2 / 6


GRAPHS = [
    GRAPH,
    Example("1>2 3>4 2>6 4>5 [Q] 6 5 [R] 1", ["2", "6"], "6"),  # Fewer edges: its columns are padded on the left.
    Example("7>8 8>2 1>3 3>6 9>0 [Q] 2 6 [R] 7", ["8", "2"], "2"),
]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_attention_to_edges_is_that_of_a_row_alone(family: str) -> None:
    """Each row by itself, with the model's own attention, its columns looked up in the text by eye."""
    subject = make_subject(family, examples=GRAPHS)
    rows = measure_attention(subject, Graphs.of(subject))
    model = subject.evaluator.model
    for slot, hops in ((0, 1), (1, 2)):
        shares, totals = [], []
        for number, example in enumerate(GRAPHS):
            words = example.question.split()
            edges = [place for place, word in enumerate(words) if ">" in word]
            length = len(subject.encoded[number].question_ids)
            embeds = model.get_input_embeddings()(torch.tensor([subject.encoded[number].question_ids]))
            embeds = torch.cat([embeds, subject.trace.vectors_NKD[number : number + 1]], dim=1)
            model.set_attn_implementation("eager")
            with torch.no_grad():
                look = model.base_model(inputs_embeds=embeds, output_attentions=True).attentions[-1].mean(dim=1)[0]
            model.set_attn_implementation("sdpa")
            look = look[length - 1 + slot]
            search = read_search(example)
            assert search is not None
            frontier = [place for place in edges if words[place].split(">")[1] in search.group("frontier", hops)]
            totals.append(float(look[edges].sum()))
            shares.append(float(look[frontier].sum()) / totals[-1])
        assert value_of(rows, "attention", thought=slot + 1, group="frontier") == pytest.approx(
            sum(shares) / 3, abs=1e-5
        )
        assert value_of(rows, "attention_to_edges", thought=slot + 1) == pytest.approx(sum(totals) / 3, abs=1e-5)
    expected = (2 / 8 + 1 / 4 + 1 / 5) / 3
    assert value_of(rows, "share_of_edges", thought=1, group="frontier") == pytest.approx(expected)
    assert model.config._attn_implementation == "sdpa", "as it was before"


def test_without_a_graph_or_places_of_tokens_attention_gives_its_reason() -> None:
    subject = make_subject()
    assert measure_attention(subject, None)[0].group == "no graph in these questions"
    graphs = make_subject(examples=GRAPHS)
    longer = [row._replace(question_ids=[*row.question_ids, 2]) for row in graphs.encoded]
    (row,) = measure_attention(dataclasses.replace(graphs, encoded=longer), Graphs.of(graphs))
    assert (row.measure, row.value) == ("attention", None)
    assert row.group == "the tokenizer does not say where its tokens stand in the question"


def test_questions_without_a_graph_give_a_reason_each() -> None:
    subject = make_subject()
    rows = measure_graphs(subject, Graphs.of(subject), torch.zeros(3, 2, 8))
    assert [(row.measure, row.group, row.value) for row in rows] == [
        (measure, "no graph in these questions", None) for measure in ("mass", "swapped", "donor")
    ]


# --- all together ---------------------------------------------------------------------------


def test_right_and_wrong_answers_are_shown() -> None:
    assert choose([True] * 8 + [False] * 8, 6) == [0, 1, 2, 8, 9, 10]
    assert choose([True] * 8 + [False], 6) == [0, 1, 2, 3, 4, 8]
    assert choose([False] * 4, 3) == [0, 1, 2]
    assert choose([], 3) == []


def test_an_entry_without_slots_says_so_and_still_has_its_answers() -> None:
    subject = make_subject(method="no_cot")
    rows, shown = probe(subject, 1, count=2, top=3)
    assert {row.group for row in rows if row.measure == "replaced"} == {"the entry has no slots"}
    assert [json.loads(line)["thoughts"] for line in shown.splitlines()] == [[], []]
    assert set(summarise(rows, subject)) == set(SUMMARY)
    assert find_row(rows, "accuracy_with", thought=0) is not None


PROBED: dict[str, Any] = {
    "latent.thought": "hidden[-1]",
    "probe.questions": 1000,
    "probe.shown": 4,
    "curriculum": {
        "cot": {"parent": "base", "method": "cot", "latent_stage": 0, "epochs": 1, "lr": 2e-3},
        "latent_2": {"parent": "cot", "method": "coconut", "latent_stage": 2, "epochs": 1, "lr": 2e-3},
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an entry that has thoughts; more probes are asked for than there are questions."""
    project = make_folder(tmp_path_factory.mktemp("probing") / "project", PROBED | canonical_splits(held_out=20))
    write_raw(project, sums(200))
    succeed(project, "params", "preprocess", "base", "encode", "train@cot", "train@latent_2")
    succeed(project, "evaluate@latent_2", "probe@latent_2")
    return project


def test_the_stage_leaves_files_whose_accuracy_is_the_evaluations(trained: Path) -> None:
    folder = trained / "outputs/latent_2"
    summary = json.loads((folder / "thoughts.json").read_text())
    assert list(summary) == list(SUMMARY)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert summary["accuracy"] == pytest.approx(metrics["accuracy"])
    assert summary["num_questions"] == metrics["num_examples"]
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    shown = [json.loads(line) for line in (folder / "thoughts.jsonl").read_text().splitlines()]
    assert len(shown) == 4
    by_index = {prediction["index"]: prediction for prediction in predictions}
    for row in shown:
        assert (row["text"], row["right"]) == (by_index[row["index"]]["text"], by_index[row["index"]]["right"])
        assert len(row["thoughts"]) == 2
        assert [after["num_thoughts"] for after in row["after"]] == [0, 1, 2]
        assert all(thought["nodes"] is None for thought in row["thoughts"])
    receipt = json.loads((trained / "outputs/probes/latent_2.json").read_text())
    assert list(receipt) == ["thoughts.json", "thoughts.csv", "thoughts.jsonl"]


def test_the_same_checkpoint_gives_the_same_bytes(trained: Path) -> None:
    folder = trained / "outputs/latent_2"
    before = [(folder / name).read_bytes() for name in ("thoughts.json", "thoughts.csv", "thoughts.jsonl")]
    succeed(trained, "probe@latent_2")
    assert [(folder / name).read_bytes() for name in ("thoughts.json", "thoughts.csv", "thoughts.jsonl")] == before


def test_the_switch_leaves_empty_files(trained: Path, tmp_path: Path) -> None:

    project = Path(shutil.copytree(trained, tmp_path / "off", symlinks=True))
    write_params(project, {"probe.enabled": False})
    succeed(project, "probe@latent_2")
    folder = project / "outputs/latent_2"
    assert set(json.loads((folder / "thoughts.json").read_text()).values()) == {None}
    assert (folder / "thoughts.csv").read_text().count("\n") == 1
    assert (folder / "thoughts.jsonl").read_text() == ""


def test_an_entry_that_is_not_there_is_named(trained: Path) -> None:
    assert "curriculum.latent_9: no such entry, wanted base or one of" in stage(trained, "probe@latent_9").error
