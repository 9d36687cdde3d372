"""Model cards, whose code does what the package does, and what `coconut push` would upload."""

import contextlib
import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from coconut import Reasoner
from coconut.checkpoints.card import CARD_FILE
from coconut.checkpoints.folder import save_checkpoint
from coconut.checkpoints.markers import add_markers
from coconut.checkpoints.meta import CheckpointMeta
from coconut.config.schema import LatentConfig
from coconut.data.tokenizer import build_word_tokenizer
from coconut.layout import checkpoint_dir
from coconut.publish import collect, push, upload
from fake_outputs import default_tree, fake_params, write_entry
from tiny_models import build_tiny_model

QUESTION = "1 + 2 + 3 ?"


def make_reasoner(family: str, *, thought: str = "hidden[-1]", markers: bool = False, seed: int = 0) -> Reasoner:
    tokenizer = build_word_tokenizer([QUESTION, "3", "6", "### 6"])
    model = build_tiny_model(family, seed=seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    add_markers(model, tokenizer)
    latent = LatentConfig(2, 3, True, markers, uniform_prob=0.0, thought=thought, parallel_iterations=0)
    meta = CheckpointMeta.of("coconut", 2, latent, prompt="plain")
    return Reasoner(model, tokenizer, meta)


def run_code(card: str, folder: Path) -> str:
    """Run the card's last block of code on the folder; return what it prints."""
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[-1]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace("FOLDER", str(folder)).replace("QUESTION", QUESTION), {})
    return printed.getvalue().removesuffix("\n")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("thought", ["hidden[-1]", "normalised"])
@pytest.mark.parametrize("markers", [False, True])
def test_the_code_of_a_card_answers_as_the_package_does(
    tmp_path: Path, family: str, thought: str, markers: bool
) -> None:
    texts = set()
    for seed in range(3):
        reasoner = make_reasoner(family, thought=thought, markers=markers, seed=seed)
        reasoner.save_pretrained(tmp_path / "model")
        again = Reasoner.from_pretrained(tmp_path / "model")
        assert again.meta == reasoner.meta
        wanted = again.solve([QUESTION], max_new_tokens=64)[0].text
        assert run_code((tmp_path / "model" / CARD_FILE).read_text(encoding="utf-8"), tmp_path / "model") == wanted
        texts.add(wanted)
    assert len(texts) > 1, "another model gives another answer"


def test_a_form_that_a_few_lines_cannot_say_points_to_the_package(tmp_path: Path) -> None:
    make_reasoner("gpt2", thought="suppressed[-1]").save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / CARD_FILE).read_text(encoding="utf-8")
    said = " ".join(card.split())
    assert "By itself it does not feed thoughts back, and nor does a pipeline of `transformers`" in said
    assert "take the package for that." in said
    assert "pipeline_tag" not in yaml.safe_load(card.split("---")[1]), "a hub would offer a pipeline"


def test_a_folder_that_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years")
    with pytest.raises(ValueError, match="found something that is no checkpoint of ours; name a folder"):
        make_reasoner("gpt2").save_pretrained(tmp_path / "thesis")
    assert (tmp_path / "thesis/chapter.txt").read_text() == "years"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work tree with a checkpoint and metrics of `latent_1`, which came from nowhere."""
    monkeypatch.chdir(tmp_path)
    tree = default_tree(model="someone/small")
    Path("params.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    reasoner = make_reasoner("gpt2")
    write_entry(Path("outputs"), "latent_1", right="+++-", thoughts=1)
    save_checkpoint(checkpoint_dir("latent_1"), reasoner.model, reasoner.tokenizer, reasoner.meta)
    return tmp_path


@pytest.mark.usefixtures("project")
def test_the_card_that_is_uploaded_holds_lineage_settings_and_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coconut.publish.judge", lambda _root: SimpleNamespace(marks={}))
    files = collect(fake_params(model="someone/small"), "latent_1")
    card = files[CARD_FILE].decode()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "someone/small"
    assert "| curriculum | base > cot > latent_1 |" in card
    assert "| epochs | 2 |" in card
    assert re.search(r"\| accuracy on the test split.* \| 0\.75 \[0\.\d{3}, 0\.\d{3}\] \|", card)
    assert set(files) == {path.name for path in checkpoint_dir("latent_1").iterdir()} | {CARD_FILE}
    assert not any(name.startswith("optimizer") or name.endswith((".bin", ".pt")) for name in files)


@pytest.mark.usefixtures("project")
def test_figures_of_another_run_stay_out_of_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    """There is no dvc.lock, so that nothing says that the metrics are of these parameters."""
    Path("dvc.yaml").write_text((Path(__file__).parents[1] / "dvc.yaml").read_text(encoding="utf-8"))
    card = collect(fake_params(model="someone/small"), "latent_1")[CARD_FILE].decode()
    assert "What it reached" not in card
    assert "latent_1 is not scored with these parameters and code; the card has no figures" in capsys.readouterr().err


@pytest.mark.usefixtures("project")
def test_a_dry_run_shows_files_and_card_and_reaches_no_hub(capsys: pytest.CaptureFixture[str]) -> None:
    assert push("latent_1", "someone/new", dry_run=True) == 0
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed
    assert "for someone/new" in printed
    assert "# latent_1" in printed
    assert printed.endswith("Nothing was uploaded (--dry-run).\n")


class FakeHub:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def create_repo(self, hub_id: str, **options: Any) -> None:
        self.calls.append((hub_id, options))

    def create_commit(self, hub_id: str, operations: list[Any], commit_message: str) -> Any:
        self.calls.append((hub_id, {one.path_in_repo: one.path_or_fileobj for one in operations}, commit_message))
        return SimpleNamespace(commit_url="https://hub.example/commit")


def test_an_upload_is_one_commit_of_exactly_these_files() -> None:
    hub = FakeHub()
    files = {"config.json": b"{}", CARD_FILE: b"# card"}
    upload(hub, "someone/new", files, message="Checkpoint x", private=True)  # type: ignore[arg-type]
    assert hub.calls == [
        ("someone/new", {"private": True, "exist_ok": True}),
        ("someone/new", files, "Checkpoint x"),
    ]


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("entry", "hub_id", "message"),
    [
        ("latent1", "a/b", r"'latent1': no entry of the curriculum, .*; did you mean latent_1\?"),
        ("latent_1", "only-a-name", r"'only-a-name': no hub id, wanted owner/name"),
        ("latent_1", "a/b\n", "no hub id"),
        ("cot", "a/b", r"cot/checkpoint: found no checkpoint, wanted that of cot; run `dvc repro train@cot`"),
    ],
)
def test_what_cannot_be_pushed_is_said(entry: str, hub_id: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        push(entry, hub_id, dry_run=True)
