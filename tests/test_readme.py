"""README.md: its sections for data of your own, put into the shipped params.yaml as printed, train and are scored."""

import json
import re
import sys
from pathlib import Path

import pytest

from project import ROOT, commit, make_project, run, stages_run

PAGE = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own data")[2]
(ROW,) = re.findall(r'^    (\{"question".*\})$', PAGE, re.M)
SECTIONS = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)[0]


def own_rows(first: int, count: int) -> str:
    """Return JSON Lines of the README's row with other numbers."""
    row = json.loads(ROW)
    assert set(row) == {"question", "steps", "answer"}
    lines = []
    for apples in range(first, first + count):
        texts = json.loads(ROW.replace("3 apples", f"{apples} apples").replace("3+8=11", f"{apples}+8={apples + 8}"))
        lines.append(json.dumps(texts | {"answer": str(apples + 8)}))
    return "\n".join(lines) + "\n"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="trainers die with dvc on Linux only")
def test_the_block_for_data_of_your_own_runs_as_printed(tmp_path: Path) -> None:
    project = make_project(tmp_path / "p")
    shipped = (ROOT / "params.yaml").read_text(encoding="utf-8")
    others = re.sub(r"^(?:model: .*|data:(?:\n +.*)+)\n", "", shipped, flags=re.M)
    (project / "params.yaml").write_text(f"{SECTIONS}\n{others}", encoding="utf-8")
    for name, first, count in (("train", 0, 300), ("valid", 300, 20), ("test", 320, 120)):
        (project / f"data/raw/{name}.jsonl").write_text(own_rows(first, count), encoding="utf-8")
    commit(project)
    done = run(project, "dvc", "repro", "evaluate@cot")
    assert {"preprocess", "base", "encode", "train@cot", "evaluate@cot"} <= set(stages_run(done))
    metrics = json.loads((project / "outputs/cot/metrics.json").read_text(encoding="utf-8"))
    assert metrics["num_examples"] == 120
