"""What a checkpoint made of one set of questions, and the sets that were scored before.

DVC deletes what a stage wrote before it runs the stage again, for whatever reason: one more test set, or a kill after
the first of six. So the scores of every set are also kept in `.resume`, under a fingerprint of all that they depend
on, and a set is scored once.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loguru import logger

from coconut.evaluation.outcomes import Outcome
from coconut.evaluation.samples import Samples
from coconut.files import digest_file, replace_file, sha256_of
from coconut.layout import ENCODED_DIR, EXAMPLES_DIR
from coconut.pipeline.inputs import StageInputs
from coconut.pipeline.resume import resume_dir
from coconut.ranks import Ranks


@dataclass(frozen=True)
class Scores:
    """One set of questions as one checkpoint answered them."""

    outcomes: list[Outcome]
    metrics: dict[str, Any]
    samples: list[Samples] = field(default_factory=list)

    def to_json(self) -> str:
        """Write the scores with a digest of themselves."""
        body = dataclasses.asdict(self)
        return json.dumps({"digest": sha256_of(body), "body": body}, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Scores":
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is damaged.
        """
        try:
            content = json.loads(text)
            body = content["body"]
            if content["digest"] != sha256_of(body):
                raise ValueError("the digest differs")
            outcomes = [Outcome(**outcome) for outcome in body["outcomes"]]
            return cls(outcomes, body["metrics"], [Samples(**samples) for samples in body["samples"]])
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not scores: {error!r}") from None


class ScoreStore:
    """The scores of an entry's sets, in `.resume/scores/ENTRY`, one file each."""

    def __init__(self, inputs: StageInputs, entry: str) -> None:
        """Open the store of an entry whose stage `evaluate` has these inputs.

        The code, the checkpoint and the parameters count; of the data, only the set itself does.
        """
        self.folder = resume_dir() / "scores" / entry
        self._inputs = inputs
        data = (EXAMPLES_DIR.as_posix(), ENCODED_DIR.as_posix(), f"outputs/{entry}/train.json")
        self._fingerprint = inputs.fingerprint_without(*data)
        self._used: set[Path] = set()

    def get(self, split: str, score: Callable[[], Scores], ranks: Ranks | None = None, *, by: str = "") -> Scores:
        """Return the scores of a set, computed if they are not there.

        Args:
            split: the name of the set's files.
            score: computes them, together with the ranks.
            ranks: the processes of the stage, which all ask for the same sets.
            by: what else they depend on.

        Raises:
            ValueError: an input of the stage changed meanwhile.
        """
        files = [EXAMPLES_DIR / f"{split}.jsonl", ENCODED_DIR / f"{split}.arrow"]
        key = sha256_of([self._fingerprint, by, *map(digest_file, files)])
        path = self.folder / f"{key[:32]}.json"
        self._used.add(path)
        ranks = ranks or Ranks()
        kept = _read(path)
        # What one of them cannot read, none of them takes: they must score it together.
        if all(ranks.gather(kept is not None)) and kept is not None:
            logger.info("{}: scored before, with the same checkpoint, questions and parameters", split)
            return kept
        scores = score()
        self._inputs.refuse_if_changed()
        if ranks.is_main:
            self._keep(path, scores)
        return scores

    def _keep(self, path: Path, scores: Scores) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, scores.to_json())
        except OSError as error:
            logger.warning("{}: not kept for the next run ({}), which will score it again", path, error)

    def drop_others(self) -> None:
        """Delete the scores of this entry that were not asked for, which are of other parameters or questions."""
        for path in set(self.folder.glob("*.json")) - self._used:
            path.unlink(missing_ok=True)


def _read(path: Path) -> Scores | None:
    try:
        return Scores.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # Not there, or damaged: nobody's result depends on it.
        return None
