"""The report on literal outputs: whole tables, missing and damaged files, one page without links."""

import json
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from coconut.report.charts import draw_updates
from coconut.report.curves import write_curves
from coconut.report.outcome import describe_outcome, describe_warnings
from coconut.report.page import build_sections, write_report
from coconut.report.paper import find_arms, paper_table
from coconut.report.provenance import Provenance
from coconut.report.reading import read_folder
from coconut.report.render import draw_figures, render_html, render_markdown
from coconut.report.results import find_reference, read_facts, read_results
from coconut.report.speed import explain_speed, speed_table
from coconut.report.tables import Table, accuracy_table, facts_table, methods_table, paired_p
from fake_outputs import (
    CURRICULUM,
    HISTORY_HEAD,
    THOUGHT_ROWS,
    default_tree,
    fake_params,
    fake_question,
    write_entry,
    write_outputs,
    write_thoughts,
)

REPOSITORY = Path(__file__).parents[1]
FIGURES = [
    *("training-loss", "validation-loss", "validation-accuracy", "gradient-norm", "learning-rate"),
    *("accuracy-by-number-of-steps", "ms-an-update", "tokens-a-second"),
]


@pytest.fixture
def outputs_dir(tmp_path):
    write_outputs(tmp_path / "outputs")
    return tmp_path / "outputs"


def read(outputs_dir, **changes):
    return read_results(fake_params(**changes).curriculum, read_folder(outputs_dir))


def report(outputs_dir, **changes):
    write_report(fake_params(**changes), outputs_dir, outputs_dir / "report")
    return outputs_dir / "report"


def test_the_table_has_a_row_for_every_entry_in_the_curriculums_order(outputs_dir):
    assert accuracy_table(read(outputs_dir)).to_text().splitlines() == [
        "entry     method   latent stage       accuracy [95 %]  no answer  generated tokens  thoughts  s/example"
        "  train s  updates  p against latent_2",
        "cot       cot                 0  0.800 [0.490, 0.943]       20 %               3.0       0.0     0.0125"
        "       20        8               1.000",
        "latent_1  coconut             1  0.500 [0.237, 0.763]       50 %               3.0       1.0     0.0125"
        "       30        8               0.125",
        "latent_2  coconut             2  0.900 [0.596, 0.982]       10 %               3.0       2.0     0.0125"
        "       40        8           reference",
        "no_cot    no_cot              0  0.000 [0.000, 0.278]      100 %               3.0       0.0     0.0125"
        "       20        8               0.004",
    ]


def test_the_untouched_model_comes_first_once_it_was_scored(outputs_dir):
    write_entry(outputs_dir, "base", right="----------")
    table = accuracy_table(read(outputs_dir))
    assert [row[:2] for row in table.rows][:2] == [["base", "untouched"], ["cot", "cot"]]


def test_folders_of_entries_that_are_no_longer_in_the_curriculum_are_left_out(outputs_dir):
    write_entry(outputs_dir, "latent_9", right="+")
    assert [result.name for result in read(outputs_dir)] == ["cot", "latent_1", "latent_2", "no_cot"]


def outcome(tmp_path, *, latent="+" * 40, pause="-" * 40, latent_1="-" * 40):
    """What came out on a chain of three entries and a control with as many updates."""
    entries = dict(CURRICULUM)
    del entries["no_cot"]
    entries["pause"] = entries["latent_2"] | {"method": "pause", "latent_stage": 0}
    write_entry(tmp_path, "cot", right="+-" * 20, method="cot")
    write_entry(tmp_path, "latent_1", right=latent_1, thoughts=1)
    write_entry(tmp_path, "latent_2", right=latent, thoughts=2)
    write_entry(tmp_path, "pause", right=pause, method="pause", thoughts=2)
    return describe_outcome(read_results(fake_params(curriculum=entries).curriculum, read_folder(tmp_path)))


def test_a_difference_is_claimed_only_where_the_paired_test_shows_it(tmp_path):
    shown = outcome(tmp_path / "a")
    assert "That is more than the control with as many updates: pause 0 % (p <0.001; as many slots)." in shown
    assert "Whether the answers need the thoughts was not measured." in shown
    close = outcome(tmp_path / "b", pause="+" * 38 + "--")
    assert (
        "That is not shown to be more than pause, with as many updates: pause 95 % (p 0.500; as many slots)." in close
    )
    worse = outcome(tmp_path / "c", latent="-" * 40, pause="+" * 40)
    assert "That is not shown to be more than pause" in worse


def test_the_best_entry_with_thoughts_is_named_whatever_its_place(tmp_path):
    assert "The best entry with thoughts" not in outcome(tmp_path / "a")
    better = outcome(tmp_path / "b", latent="+-" * 20, latent_1="+" * 40)
    assert "The best entry with thoughts: latent_1 100 % (p <0.001)." in better


@pytest.mark.parametrize("reference", ["cot", "no_cot", "latent_1"])
def test_any_entry_may_be_what_the_page_is_about_and_is_not_compared_with_itself(outputs_dir, reference):
    curriculum = fake_params().curriculum
    results = read_results(curriculum, read_folder(outputs_dir), reference=reference)
    said = describe_outcome(results)
    assert said.startswith(f"{reference} answers ")
    assert re.search(rf"\b{reference} [\d.]+ %", said) is None, "not compared with itself"
    assert "other methods" not in said, "the best of the one other method is named as the best"
    alone = read_results({reference: curriculum[reference]}, read_folder(outputs_dir), reference=reference)
    assert describe_outcome(alone).startswith(f"{reference} answers ")


def test_a_warm_up_that_never_ended_is_said(tmp_path):
    """Its validation loss falls from 2.1 to 1.1 in its last epoch."""
    outcome(tmp_path)
    results = read_results(fake_params().curriculum, read_folder(tmp_path))
    said = "cot was still learning when it ended (its validation loss fell by 48% in its last epoch)"
    assert said in describe_warnings(results)
    history = tmp_path / "cot/history.csv"
    history.write_text(history.read_text().replace(",1.1,", ",2.0,"))
    results = read_results(fake_params().curriculum, read_folder(tmp_path))
    assert "still learning" not in describe_warnings(results)


def test_the_report_is_written_whole(outputs_dir):
    report_dir = report(outputs_dir)
    assert sorted(path.name for path in report_dir.iterdir()) == sorted(
        ["curves.csv", "report.html", "report.md", *(f"{name}.svg" for name in FIGURES)]
    )
    text = (report_dir / "report.md").read_text(encoding="utf-8")
    lead = (
        "latent_2 answers 9 of 10 test questions right. No control had as many updates: no_cot 0 % (p 0.004) had 8,"
        " latent_2 24. cot 80 % (p 1.000) with its steps in words."
    )
    assert text.startswith(f"# models/two-layers, seed 0\n\n{lead}")
    assert re.findall(r"\]\(([\w-]+)\.svg\)", text) == FIGURES
    assert "| latent_2 | coconut |            2 | 0.900 [0.596, 0.982] |" in text
    assert "| train.dropped.duplicate |     1 |" in text
    assert "not there" not in text
    for name in FIGURES:
        assert ElementTree.parse(report_dir / f"{name}.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_a_figures_file_says_what_it_shows_and_which_line_is_whose(outputs_dir):
    root = ElementTree.parse(report(outputs_dir) / "training-loss.svg").getroot()
    texts = [one.text for one in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Training loss", "nats per token", "cot", "latent_1", "latent_2", "no_cot"} <= set(texts)
    _, top, width, height = map(float, root.get("viewBox").split())
    places = [(float(one.get("x")), float(one.get("y"))) for one in root.iter("{http://www.w3.org/2000/svg}text")]
    assert all(0 <= x <= width and top <= y <= top + height for x, y in places)


def test_the_same_outputs_give_the_same_bytes(outputs_dir):
    first = {path.name: path.read_bytes() for path in report(outputs_dir).iterdir()}
    shutil.rmtree(outputs_dir / "report")
    assert {path.name: path.read_bytes() for path in report(outputs_dir).iterdir()} == first


class Page(HTMLParser):
    """Collects tags, the addresses they name, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_its_figures_and_names_no_other_address(outputs_dir):
    page = Page((report(outputs_dir) / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("figure") == len(FIGURES)
    assert all(re.fullmatch(r"#[\w-]+|\.\./\w+/\w+\.(csv|jsonl)", address) for address in page.addresses)
    assert "../latent_2/updates.csv" in page.addresses
    assert "url(" not in page.text
    assert "@import" not in page.text
    assert page.tags.count("script") == 1


def test_every_question_stands_beside_the_answers_of_all_entries(outputs_dir, tmp_path):
    examples = tmp_path / "examples"
    examples.mkdir()
    rows = [{"question": f"</script> {n} ?", "steps": ["1", "2"], "answer": str(n % 11)} for n in range(9)]
    rows.append({"question": "another set's", "steps": [], "answer": "none"})
    (examples / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(fake_params(), outputs_dir, outputs_dir / "report", examples_dir=examples)
    html = (outputs_dir / "report/report.html").read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    found = json.loads(data)
    assert found["entries"] == ["cot", "latent_1", "latent_2", "no_cot"]
    assert [row["index"] for row in found["rows"]] == list(range(9)), "whose answer the entries were scored on"
    assert found["rows"][0]["question"] == "</script> 0 ?"
    assert found["rows"][0]["steps"] == "1 → 2"
    cot = read(outputs_dir)[0]
    assert [row["answers"][0] for row in found["rows"]] == [
        [one.answer or "-", one.right] for one in cot.predictions[:9]
    ]
    text = (outputs_dir / "report/report.md").read_text(encoding="utf-8")
    task = sections_of(text)["The task"]
    assert task.strip().startswith("Data: generated, search.")
    assert "&lt;/script> 0 ?" in task
    assert "1 → 2" in task
    assert "The first 9 of 10 questions" in text
    (examples / "test.jsonl").write_text("{")
    write_report(fake_params(), outputs_dir, outputs_dir / "report", examples_dir=examples)
    assert "The task" not in (outputs_dir / "report/report.md").read_text(encoding="utf-8")


def test_generated_text_cannot_become_markup(outputs_dir):
    report_dir = report(outputs_dir, model="models/<b>&tiny")
    page = Page((report_dir / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1
    assert "b" not in page.tags
    assert "<script>alert('&')</script> | no answer" in page.text
    assert page.text.count("models/<b>&tiny") == 2
    assert "| &lt;script>alert('&')&lt;/script> \\| no answer |" in (report_dir / "report.md").read_text()


def sections_of(text: str) -> dict[str, str]:
    """The parts of a Markdown page by their titles."""
    parts = re.split(r"^## (.*)\n", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_probes_are_tables_with_their_control_and_questions_with_their_thoughts(outputs_dir):
    write_thoughts(outputs_dir, "latent_2", questions=[fake_question(3, right=True)], rows=THOUGHT_ROWS)
    # The arm `no_cot` stands here for one with slots that hold no thought.
    report_dir = report(outputs_dir, curriculum=CURRICULUM | {"no_cot": CURRICULUM["no_cot"] | {"method": "pause"}})
    parts = sections_of((report_dir / "report.md").read_text(encoding="utf-8"))
    edits = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in parts["Do answers need the thoughts?"].splitlines()
        if line.startswith("|")
    ]
    assert edits[2:] == [
        ["its own thoughts", "1.000 [0.970, 1.000]", "-", "-"],
        ["no slots at all", "0.500 [0.450, 0.550]", "-", "0.001"],
        ["zeros", "0.480 [0.440, 0.520]", "52.0%", "0.001"],
        ["the thoughts of another question", "0.100 [0.080, 0.130]", "90.0%", "0.001"],
        ["thought 1: the mean of the nodes at 1 hop", "0.990 [0.970, 1.000]", "-", "0.500"],
        ["thought 1: a node that cannot be reached", "0.260 [0.220, 0.300]", "-", "0.001"],
    ]
    assert "Not measured here, or in part: donor: a graph has one root only." in parts["What thoughts hold"]
    (line,) = [line for line in parts["What thoughts hold"].splitlines() if line.startswith("| 1 ")]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1:] == [
        "0.500 [0.400, 0.600]",
        "0.060 [0.020, 0.100]",
        "0.995 [0.990, 1.000]",
        "0.140",
        "0.650",
        "0.080",
        "0.67",
        "1.02",
    ]
    assert "| 2        | 10 0.90, 2 0.10 " in parts["Thoughts of single questions"]
    assert "The answers depend on the thoughts: with those of another question accuracy is 0.100." in (
        report_dir / "report.md"
    ).read_text(encoding="utf-8")


def test_the_search_is_drawn_once_a_thought(outputs_dir):
    questions = [fake_question(3, right=True), fake_question(5, right=False)]
    write_thoughts(outputs_dir, "latent_2", questions=questions, rows=THOUGHT_ROWS)
    html = (report(outputs_dir) / "report.html").read_text(encoding="utf-8")
    graphs = re.findall(r'<svg class="graph".*?</svg>', html, re.S)
    assert len(graphs) == 4
    assert 'aria-label="Probability of each node: 4 0.60, 9 0.40. One hop further: 4, 9."' in graphs[0]
    assert 'aria-label="Probability of each node: 10 0.90, 4 0.60, 9 0.40. One hop further: 2, 10."' in graphs[1]
    assert graphs[0].count('class="edge"') == 4
    assert graphs[0].count('class="node frontier"') == 2
    assert graphs[0].count("<rect") == 1, "the candidate that is in the graph"
    assert graphs[0].count("<circle") == 4
    assert "latent_2, test question 5: wrong" in html


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({"graph": None, "thoughts": []}, '<svg class="graph"'),
        ({"graph": None}, '<svg class="graph"'),
        ({"steps": []}, "<dt>steps"),
    ],
)
def test_a_question_without_graph_thoughts_or_steps_is_shown_without(outputs_dir, change, missing):
    write_thoughts(outputs_dir, "latent_2", questions=[fake_question(3, right=True, **change)], rows=THOUGHT_ROWS)
    html = (report(outputs_dir) / "report.html").read_text(encoding="utf-8")
    assert "latent_2, test question 3: right" in html
    assert missing not in html


def test_a_graph_of_many_nodes_is_not_drawn_and_the_page_says_so(outputs_dir):
    edges = [[str(number), str(number + 1)] for number in range(60)]
    question = fake_question(3, right=True, graph={"edges": edges, "root": "0", "candidates": ["60", "59"]})
    write_thoughts(outputs_dir, "latent_2", questions=[question], rows=THOUGHT_ROWS)
    html = (report(outputs_dir) / "report.html").read_text(encoding="utf-8")
    assert "The graph has 61 nodes and is not drawn." in html
    assert '<svg class="graph"' not in html


def test_a_graph_with_a_circle_is_drawn(outputs_dir):
    graph = {"edges": [["a", "b"], ["b", "a"], ["c", "d"], ["d", "c"]], "root": "a", "candidates": ["b"]}
    write_thoughts(outputs_dir, "latent_2", questions=[fake_question(3, right=True, graph=graph)], rows=THOUGHT_ROWS)
    html = (report(outputs_dir) / "report.html").read_text(encoding="utf-8")
    assert html.count('class="edge"') == 8


def test_the_tree_shows_every_entry_below_its_parent(outputs_dir):
    write_entry(outputs_dir, "base", right="----------")
    parts = sections_of((report(outputs_dir) / "report.md").read_text(encoding="utf-8"))
    names = [
        line.split("|")[1].replace("\N{NO-BREAK SPACE}", " ").rstrip()
        for line in parts["Curriculum"].splitlines()
        if line.startswith("| ")
    ]
    assert names[1:] == [" base", " └ cot", "    └ latent_1", "       └ latent_2", " └ no_cot"]


@pytest.mark.parametrize("name", list(CURRICULUM))
def test_an_entry_of_which_everything_is_missing_is_not_there(outputs_dir, name):
    shutil.rmtree(outputs_dir / name)
    rows = {row[0]: row for row in accuracy_table(read(outputs_dir)).rows}
    assert rows[name][3:] == ["not there", "-", "-", "-", "-", "-", "-", "-"]
    text = (report(outputs_dir) / "report.md").read_text(encoding="utf-8")
    assert f"Not there: {name}; `dvc repro` makes them." in text


@pytest.mark.parametrize("file", ["metrics.json", "history.csv", "predictions.jsonl", "../preprocess.json"])
def test_any_missing_file_leaves_a_report(outputs_dir, file):
    (outputs_dir / "latent_2" / file).unlink()
    assert {"report.md", "report.html"} <= {path.name for path in report(outputs_dir).iterdir()}


def test_a_report_on_nothing_says_so(tmp_path):
    report_dir = report(tmp_path / "outputs")
    assert sorted(path.name for path in report_dir.iterdir()) == ["curves.csv", "report.html", "report.md"]
    text = (report_dir / "report.md").read_text(encoding="utf-8")
    assert re.findall("^## (.*)", text, re.M) == ["Curriculum", "Results", "Mistakes", "Data"]
    assert text.startswith("# models/two-layers, seed 0\n\nNothing is evaluated yet.\n")
    assert "Not there: cot, latent_1, latent_2, no_cot;" in text
    assert "Predictions: not there." in text
    assert "outputs/preprocess.json: not there" in text


def test_arms_are_compared_with_the_last_coconut_entry_that_is_there(outputs_dir):
    (outputs_dir / "latent_2" / "predictions.jsonl").unlink()
    table = accuracy_table(read(outputs_dir))
    assert table.header[-1] == "p against latent_1"
    assert [row[-1] for row in table.rows] == ["0.250", "reference", "-", "0.062"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("cot/metrics.json", '{"accuracy": 0.5', r"cot/metrics\.json: found no valid JSON .*, wanted a JSON object; "),
        ("cot/metrics.json", "[]", r"cot/metrics\.json: found list, wanted a JSON object"),
        ("cot/metrics.json", '{"accuracy": "<b>"}', r"cot/metrics\.json: accuracy: found '<b>', wanted a number"),
        ("cot/metrics.json", '{"accuracy": true}', r"cot/metrics\.json: accuracy: found True, wanted a number"),
        ("cot/metrics.json", '{"accuracy": 1.5}', r"cot/metrics\.json: found accuracy 1\.5 in .*, wanted a share"),
        (
            "cot/metrics.json",
            '{"accuracy": 0.5, "accuracy_low": 0.6}',
            r"cot/metrics\.json: found accuracy 0\.5 in \[0\.6, ",
        ),
        ("cot/metrics.json", f'{{"loss": 1{"0" * 400}}}', r"cot/metrics\.json: loss: found a number beyond 1e\+100"),
        ("cot/metrics.json", f'{{"loss": 1{"0" * 5000}}}', r"cot/metrics\.json: found no valid JSON"),
        ("cot/metrics.json", '{"a":' * 100_000, r"cot/metrics\.json: found no valid JSON"),
        ("preprocess.json", '{"a":' * 300 + "1" + "}" * 300, r"preprocess\.json: found more than 20 levels"),
        ("cot/predictions.jsonl", '{"index": 0}\n', r"cot/predictions\.jsonl:1: found no num_steps, wanted an object"),
        ("cot/predictions.jsonl", '{"index": []}\n', r"cot/predictions\.jsonl:1: found index: \[\], wanted"),
        ("cot/predictions.jsonl", '{}\n{"index"', r"cot/predictions\.jsonl:2: found no valid JSON"),
        ("cot/history.csv", f"{HISTORY_HEAD}\ncot,one\n", r"cot/history\.csv:2: found could not convert .*'one'"),
        ("cot/history.csv", f"{HISTORY_HEAD}\n{',' * 20}\n", r"cot/history\.csv:2: "),
        ("cot/history.csv", f"a\n{'1' * 200_000}\n", r"cot/history\.csv:\d: found field larger than field limit"),
        ("preprocess.json", "", r"preprocess\.json: found no valid JSON"),
        ("cot/updates.csv", "update,loss\n1,x\n", r"cot/updates\.csv:2: found could not convert .*'x'"),
        ("latent_2/thoughts.csv", "measure,value\nmass,x\n", r"latent_2/thoughts\.csv:2: found could not"),
        ("latent_2/thoughts.jsonl", '{"index": 0}\n', r"latent_2/thoughts\.jsonl:1: found no question, wanted"),
        (
            "latent_2/thoughts.jsonl",
            json.dumps(fake_question(3, right=True, thoughts=[{"tokens": [["a", "b"]]}])),
            r"latent_2/thoughts\.jsonl:1: thoughts: found tokens: \[\['a', 'b'\]\], wanted an object with tokens",
        ),
        (
            "latent_2/thoughts.jsonl",
            json.dumps(fake_question(3, right=True, graph={"edges": [[1, 2]], "root": "a", "candidates": []})),
            r"latent_2/thoughts\.jsonl:1: graph: found edges: \[\[1, 2\]\], wanted",
        ),
    ],
)
def test_a_damaged_file_is_named(outputs_dir, file, text, message):
    (outputs_dir / file).write_text(text)
    with pytest.raises(ValueError, match=f"outputs/{message}") as raised:
        report(outputs_dir)
    assert str(raised.value).endswith("; delete the file and run `dvc repro`, which makes it anew")


READ = [
    *("cot/metrics.json", "cot/predictions.jsonl", "cot/history.csv", "preprocess.json"),
    *("cot/updates.csv", "cot/train.json", "latent_2/thoughts.csv", "latent_2/thoughts.jsonl"),
]


@pytest.mark.parametrize("file", READ)
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 25))])
def test_any_damage_leaves_a_report_or_one_message_that_names_the_file(outputs_dir, file, seed):
    write_thoughts(outputs_dir, "latent_2", questions=[fake_question(3, right=True)], rows=THOUGHT_ROWS)
    path = outputs_dir / file
    path.write_bytes(damage(path.read_bytes(), random.Random(seed)))
    read_text = read_folder(outputs_dir)
    message = f"outputs/{file}: nothing found"
    try:
        results = read(outputs_dir)
        sections = build_sections(results, facts=read_facts(read_text), provenance=Provenance())
        render_markdown("t", "", sections).encode()
        render_html("t", "", sections).encode()
        draw_figures(sections)
        write_curves(results)
    except ValueError as error:
        message = str(error)
    assert message.startswith(f"outputs/{file}")


def damage(content: bytes, draw: random.Random) -> bytes:
    """Cut it, flip bits of it, or replace a value by one of another type or size."""
    place = draw.randrange(len(content))
    kind = draw.randrange(4)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
    old = draw.choice(sorted(set(re.findall(rb"-?\d+\.?\d*|true|false|null|\"[^\"]*\"", content))))
    new = [
        b"1e308",
        b"-1",
        b"NaN",
        b"-Infinity",
        b"null",
        b"[]",
        b"{}",
        b'"\\ud800"',
        b'"\\u001b[2J"',
        b"1" * 400,
        b"1,2",
    ]
    return content.replace(old, draw.choice(new), 1 if kind == 2 else -1)


def test_numbers_that_are_not_finite_are_drawn_as_if_they_were_missing(outputs_dir):
    path = outputs_dir / "cot" / "history.csv"
    text = path.read_text()
    path.write_text(text.replace("2.0,1.0,0.002,2.1", "nan,1.0,0.002,inf"))
    not_finite = (report(outputs_dir) / "validation-loss.svg").read_bytes()
    path.write_text(text.replace("2.0,1.0,0.002,2.1", ",1.0,0.002,"))
    assert (report(outputs_dir) / "validation-loss.svg").read_bytes() == not_finite
    path.write_text(text)
    assert (report(outputs_dir) / "validation-loss.svg").read_bytes() != not_finite


def test_a_generated_line_separator_does_not_end_a_row(outputs_dir):
    path = outputs_dir / "cot" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["text"] = "a\u2028b"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read(outputs_dir)[0].predictions[0].text == "a\u2028b"


def test_predictions_on_another_test_set_are_not_paired(outputs_dir):
    path = outputs_dir / "cot" / "predictions.jsonl"
    path.write_text(path.read_text().replace('"gold": "3"', '"gold": "4"'))
    results = read(outputs_dir)
    assert paired_p(results[0], results[2]) is None
    assert paired_p(results[1], results[2]) == 0.125


def test_pairs_are_found_by_index_and_not_by_line(outputs_dir):
    path = outputs_dir / "latent_1" / "predictions.jsonl"
    path.write_text("".join(sorted(path.read_text().splitlines(keepends=True), reverse=True)))
    results = read(outputs_dir)
    assert paired_p(results[1], results[2]) == 0.125


def test_the_speed_of_an_entry_is_explained_by_its_tokens_and_its_rate(outputs_dir):
    results = read(outputs_dir)
    assert speed_table(results).to_text().splitlines()[:4] == [
        "entry     latents  tokens/update  padding share  tokens/s  ms/update  in first epoch  in last epoch"
        "  CPU ms/update  load",
        "cot           0.0            500          0.125     10000       50.0            50.0           50.0"
        "           50.0   0.5",
        "latent_1      1.0            500          0.125      5000        100             100            100"
        "            100   0.5",
        "latent_2      2.0            500          0.125      3333        150             150            150"
        "            150   0.5",
    ]
    assert explain_speed(results) == (
        "An update of latent_2 takes 3.00 times the CPU seconds of one of cot, and 3.00 times as long by the clock."
        " It holds 1.00 times the tokens, and a token takes 3.00 times the CPU seconds"
        " (latents 2.0 against 0.0, padding share 0.125 against 0.125)."
    )
    assert explain_speed(results[:1]) == ""


def test_a_busy_machine_is_not_explained_with_thoughts(outputs_dir):
    shutil.rmtree(outputs_dir / "latent_2")
    write_entry(outputs_dir, "latent_2", right="+++++++++-", thoughts=2, cpu_share=0.4)
    assert explain_speed(read(outputs_dir)) == (
        "An update of latent_1 takes 2.00 times the CPU seconds of one of cot, and 2.00 times as long by the clock."
        " It holds 1.00 times the tokens, and a token takes 2.00 times the CPU seconds"
        " (latents 1.0 against 0.0, padding share 0.125 against 0.125)."
    )
    assert explain_speed([result for result in read(outputs_dir) if result.name in ("cot", "latent_2")]) == (
        "An update of latent_2 takes 1.20 times the CPU seconds of one of cot, and 3.00 times as long by the clock."
        " The two differ: the clock also counts waiting for other programs (load average per core 0.5 against 0.5),"
        " for a disk or for a GPU. It holds 1.00 times the tokens, and a token takes 1.20 times the CPU seconds"
        " (latents 2.0 against 0.0, padding share 0.125 against 0.125)."
    )


def test_without_cpu_seconds_a_slow_entry_is_explained_by_nothing(outputs_dir):
    path = outputs_dir / "cot/history.csv"
    rows = [line.rsplit(",", 2)[0] for line in path.read_text().splitlines()]
    path.write_text("\n".join(rows) + "\n")
    text = explain_speed(read(outputs_dir))
    assert text.startswith("An update of latent_2 takes 3.00 times as long as one of cot by the clock, and holds 1.00")
    assert text.endswith("is not known, because the histories hold no CPU seconds.")
    assert "latents" not in text


ARMS = CURRICULUM | {
    "no_thoughts_1": {"parent": "cot", "method": "no_thoughts", "latent_stage": 1, "epochs": 1, "lr": 0.001},
    "no_thoughts_2": {"parent": "no_thoughts_1", "method": "no_thoughts", "latent_stage": 2, "epochs": 1, "lr": 0.001},
    "pause_as_thought": {"parent": "cot", "method": "pause_as_thought", "latent_stage": 2, "epochs": 1, "lr": 0.001},
    "straight": {"parent": "cot", "method": "coconut", "latent_stage": 2, "epochs": 1, "lr": 0.001},
    "variant": {"parent": "latent_1", "method": "coconut", "latent_stage": 2, "epochs": 1, "lr": 0.001},
}


def test_each_arm_of_the_paper_is_the_end_of_its_curriculum(outputs_dir):
    arms = find_arms(read(outputs_dir, curriculum=ARMS))
    assert {arm: result.name for arm, result in arms.items()} == {
        "CoT": "cot",
        "No-CoT": "no_cot",
        "Coconut": "latent_2",
        "- w/o curriculum": "straight",
        "- w/o thought": "no_thoughts_2",
        "- pause as thought": "pause_as_thought",
    }


def test_the_papers_table_stands_beside_ours_where_its_arms_were_run(outputs_dir):
    write_entry(outputs_dir, "straight", right="-----+----", thoughts=2)
    table = paper_table(read(outputs_dir, curriculum=ARMS))
    assert table.header[:5] == ["arm", "our entry", "our accuracy [95 %]", "our tokens", "p"]
    assert table.header[5:] == ["paper: GSM8K", "paper: ProntoQA", "paper: ProsQA"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert list(rows)[:5] == ["CoT", "No-CoT", "iCoT", "Pause token", "Coconut"]
    assert list(rows)[5:] == ["- w/o curriculum", "- w/o thought", "- pause as thought"]
    assert rows["Coconut"][:5] == ["latent_2", "0.900 [0.596, 0.982]", "5.0", "-", "34.1 ±1.5, 8.2"]
    assert rows["- w/o curriculum"][:4] == ["straight", "0.100 [0.018, 0.404]", "5.0", "0.008"]
    assert rows["- w/o thought"][:4] == ["no_thoughts_2", "not there", "-", "-"]
    assert rows["iCoT"] == ["-", "-", "-", "-", "30.0, 2.2", "99.8, 3.0", "98.2, 8.2"]


def test_an_arm_whose_end_is_not_evaluated_is_not_there_in_the_papers_table(outputs_dir):
    for file in ("metrics.json", "predictions.jsonl"):
        (outputs_dir / "latent_2" / file).unlink()
    rows = {row[0]: row[1:5] for row in paper_table(read(outputs_dir, curriculum=ARMS)).rows}
    assert rows["Coconut"] == ["latent_2", "not there", "-", "-"]
    assert rows["No-CoT"][3] == "-", "no reference, no test"


def test_a_warm_up_with_markers_is_no_latent_stage(outputs_dir):
    marked = {"marked": {"parent": "cot", "method": "coconut", "latent_stage": 0, "epochs": 1, "lr": 0.001}}
    children = {name: ARMS[name] | {"parent": "marked"} for name in ("latent_1", "straight")}
    arms = find_arms(read(outputs_dir, curriculum={"cot": ARMS["cot"]} | marked | ARMS | children))
    assert arms["- w/o curriculum"].name == "straight"


def test_without_an_ablation_the_papers_table_is_left_out(outputs_dir):
    assert paper_table(read(outputs_dir)) is None
    assert "paper" not in (report(outputs_dir) / "report.md").read_text(encoding="utf-8")


CODI = {"parent": "base", "method": "codi", "latent_stage": 0, "epochs": 1, "lr": 1e-3}


def with_codi(outputs_dir):
    """CODI beside the fake outputs: as right as latent_2, with the parts of its loss in its files."""
    shutil.copytree(outputs_dir / "latent_2", outputs_dir / "codi")
    (outputs_dir / "codi/updates.csv").write_text(
        "update,loss,lr,grad_norm,teacher,nll,distill\n1,3.0,0.1,1.0,2.0,1.0,0.5\n2,2.0,0.1,1.0,1.5,0.5,0.25\n"
    )
    return CURRICULUM | {"codi": CODI}


def test_the_reference_is_the_end_of_the_longest_chain_of_a_main_method_or_the_chosen_entry(outputs_dir):
    curriculum = with_codi(outputs_dir)
    results = read(outputs_dir, curriculum=curriculum)
    assert find_reference(results).method == "coconut"
    text = read_folder(outputs_dir)
    chosen = read_results(fake_params(curriculum=curriculum).curriculum, text, reference="codi")
    assert find_reference(chosen).name == "codi"
    assert accuracy_table(chosen).header[-1] == "p against codi"
    alone = {name: entry for name, entry in curriculum.items() if entry["method"] != "coconut"}
    assert find_reference(read(outputs_dir, curriculum=alone)).name == "codi"


def test_two_main_methods_stand_beside_each_other_with_paired_tests(outputs_dir):
    results = read(outputs_dir, curriculum=with_codi(outputs_dir))
    table = methods_table(results)
    assert [row[1] for row in table.rows] == ["coconut", "codi"]
    assert table.rows[0][4] == table.rows[1][3], "a paired test is symmetric"
    assert methods_table(read(outputs_dir)) is None


def test_every_part_of_a_loss_is_drawn(outputs_dir):
    curriculum = with_codi(outputs_dir)
    titles = [chart.title for chart in draw_updates(read(outputs_dir, curriculum=curriculum))]
    assert [title for title in titles if title.startswith("Training loss: ")] == [
        "Training loss: teacher",
        "Training loss: nll",
        "Training loss: distill",
    ]
    page = (report(outputs_dir, curriculum=curriculum) / "report.html").read_text(encoding="utf-8")
    assert "Training loss: distill" in page
    assert "Methods beside each other" in page


def test_a_method_that_is_not_here_any_more_is_a_control_without_controls(outputs_dir):
    results = [replace(one, method="gone") if one.method == "coconut" else one for one in read(outputs_dir)]
    assert find_reference(results) is None
    assert {one.kind.role for one in results if one.method == "gone"} == {"control"}
    assert accuracy_table(results).rows


def test_without_a_coconut_entry_nothing_is_paired(outputs_dir):
    results = read(outputs_dir, curriculum={"cot": CURRICULUM["cot"], "no_cot": CURRICULUM["no_cot"]})
    assert find_reference(results) is None
    assert accuracy_table(results).header[-1] == "updates"
    assert "Coconut" not in find_arms(results)


def test_facts_are_lines_of_dotted_keys(outputs_dir):
    facts = {"a": {"b": 1, "c": [1, 2]}, "d": {}, "e": 0.123456, "f": None}
    (outputs_dir / "preprocess.json").write_text(json.dumps(facts))
    assert facts_table(read_facts(read_folder(outputs_dir))).rows == [
        ["a.b", "1"],
        ["a.c", "1, 2"],
        ["d", "none"],
        ["e", "0.123"],
        ["f", "-"],
    ]


def test_a_markdown_cell_stays_in_its_cell():
    text = Table(["a"], [["x|y\n<b>*`"], ["![](http://x)"], ["<0.001 [1, 2]"]]).to_markdown()
    assert text.splitlines()[2:] == ["| x\\|y\\\\n&lt;b>\\*\\` |", "| ![]\\(http://x)    |", "| <0.001 [1, 2]     |"]


CLEAR_SCREEN, RIGHT_TO_LEFT, SURROGATE = "\x1b[2J", "\u202e", "\ud800"


def test_control_and_bidirectional_characters_of_data_are_shown_and_not_obeyed(outputs_dir):
    path = outputs_dir / "latent_2/predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    hostile = f"a{CLEAR_SCREEN}b{RIGHT_TO_LEFT}c{SURROGATE}d\r\x07\u2066\u2028e"
    for row in rows:
        row |= {"right": False, "text": hostile, "answer": hostile, "gold": hostile}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (outputs_dir / "preprocess.json").write_text(json.dumps({hostile: hostile}))
    report_dir = report(outputs_dir, model=f"models/{hostile}")
    shown = "a\\x1b[2Jb\\u202ec\\ud800d\\r\\x07\\u2066\\u2028e"
    for name, expected in (("report.html", shown), ("report.md", shown.replace("\\", "\\\\"))):
        text = (report_dir / name).read_text(encoding="utf-8")
        hidden = {character for character in text if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp")}
        assert hidden == {"\n"}, name
        assert text.count(expected) >= 2 + 3 * len(rows), name
    assert f"# models/{shown}, seed 0" in (report_dir / "report.md").read_text()
    terminal = Table([hostile], [[hostile]]).to_text()
    assert terminal == f"{shown}\n{shown}"


def test_a_small_test_set_and_missing_answers_are_said(outputs_dir):
    write_entry(outputs_dir, "base", right="----------")  # Nobody has taught it the form of an answer.
    text = (report(outputs_dir) / "report.md").read_text()
    assert "The test split is small: with 10 examples one more right answer is worth 0.100." in text
    assert "No answer to at least half of the questions: latent_1, no_cot. A model that" in text
    for name in ("base", *CURRICULUM):
        shutil.rmtree(outputs_dir / name)
        write_entry(outputs_dir, name, right="+" * 100)
    text = (report(outputs_dir) / "report.md").read_text()
    assert "small" not in text
    assert "No answer" not in text


def test_the_curves_of_all_entries_stand_in_one_file(outputs_dir):
    path = outputs_dir / "no_cot/history.csv"
    path.write_text(path.read_text().replace("2.0,1.0,0.002,2.1", "nan,1.0,0.002,2.1"))
    assert (report(outputs_dir) / "curves.csv").read_text().splitlines() == [
        "entry,epoch,updates,train_loss,valid_loss,valid_accuracy",
        "cot,1,4,2,2.1,0.25",
        "cot,2,8,1,1.1,0.5",
        "latent_1,1,12,2,2.1,0.25",
        "latent_1,2,16,1,1.1,0.5",
        "latent_2,1,20,2,2.1,0.25",
        "latent_2,2,24,1,1.1,0.5",
        "no_cot,1,4,,2.1,0.25",
        "no_cot,2,8,1,1.1,0.5",
    ]


def run_in(folder, *command):
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False)


def test_the_stage_and_the_table_run_as_processes_without_torch(outputs_dir):
    (outputs_dir.parent / "params.yaml").write_text(json.dumps(default_tree()))
    stage = run_in(outputs_dir.parent, str(REPOSITORY / "stages" / "report.py"))
    assert stage.returncode == 0, stage.stderr
    assert (outputs_dir / "report" / "report.html").exists()
    table = run_in(outputs_dir.parent, "-m", "coconut", "table")
    assert table.stdout.startswith(accuracy_table(read(outputs_dir)).to_text() + "\n")
    code = (
        "import sys, coconut.report.page, coconut.report.compare; print(*{'torch', 'scipy', 'dvc'} & set(sys.modules))"
    )
    assert run_in(outputs_dir.parent, "-c", code).stdout == "\n"


def test_a_users_mistake_is_one_line_and_exit_code_1(tmp_path):
    for command in (["-m", "coconut", "table"], [str(REPOSITORY / "stages" / "report.py")]):
        failed = run_in(tmp_path, *command)
        assert failed.returncode == 1
        assert "params.yaml: no such file; run from the repository's top folder" in failed.stderr
        assert "Traceback" not in failed.stderr
