"""What a pipeline stage depends on, read from `dvc.yaml`, and a fingerprint of it.

A resume state may be continued only by a run whose command, code, parameters and input bytes
are those of the run that left it. DVC knows that list already, so it is read from `dvc.yaml`
rather than kept a second time: what is added there is in the fingerprint at once.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coconut.files import digest_path, sha256_of_text
from coconut.pipeline.dvc_file import Stage, canonical, lookup, read_pipeline, read_yaml

CANNOT_CHANGE_BYTES = ("min_accuracy",)
"""Keys of a curriculum entry that decide whether a stage passes, never what it computes."""
_GATE_SUFFIXES = tuple(f".{key}" for key in CANNOT_CHANGE_BYTES)


@dataclass(frozen=True)
class StageInputs:
    """The digests of everything one stage depends on, at the moment they were read.

    Read them before the parameters and the data: what is edited after that is noticed by
    `refuse_if_changed`, which is called before outputs are written.
    """

    stage: str
    root: Path
    digests: Mapping[str, str]

    @classmethod
    def read(cls, stage: str, root: Path | str = ".") -> "StageInputs":
        """Digest the command, dependencies and parameters of `stage` in the work tree `root`.

        Raises:
            ValueError: `dvc.yaml` or `params.yaml` lacks something the stage needs.
            FileNotFoundError: a dependency is missing.
        """
        root = Path(root)
        return cls(stage, root, _digest(_find(stage, root), root))

    @classmethod
    def of_command(cls, words: Sequence[str], root: Path | str = ".") -> "StageInputs":
        """`read` for the stage that runs this command, `python stages/train.py cot`; the same errors.

        An `exec` before it in `dvc.yaml` is the shell's.
        """
        command = " ".join(words)
        root = Path(root)
        stages = read_pipeline(root).values()
        stage = next((stage for stage in stages if stage.cmd.removeprefix("exec ") == command), None)
        if stage is None:
            raise ValueError(f"{root / 'dvc.yaml'}: no stage whose cmd is {command!r}")
        return cls(stage.name, root, _digest(stage, root))

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that stand for the stage's name and everything that can change its bytes."""
        return sha256_of_text(json.dumps([self.stage, sorted(self._of_bytes().items())]))

    def _of_bytes(self) -> dict[str, str]:
        return {name: digest for name, digest in self.digests.items() if not name.endswith(_GATE_SUFFIXES)}

    def refuse_if_changed(self) -> None:
        """Raise when an input is no longer what it was: DVC would record the new one for the old result.

        Raises:
            ValueError: naming what changed.
        """
        try:
            now = _digest(_find(self.stage, self.root), self.root)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self._complaint('its inputs cannot be read any more')}: {error}") from None
        changed = sorted(name for name in {*now, *self.digests} if now.get(name) != self.digests.get(name))
        if changed:
            raise ValueError(self._complaint(", ".join(changed)))

    def _complaint(self, what: str) -> str:
        return (
            f"{self.stage}: changed while it ran: {what}. Its outputs do not count, since DVC would record the new"
            " inputs for the old result; run `dvc repro` again, or undo the change first to keep a training"
        )


def fingerprint(stage: str, root: Path | str = ".") -> str:
    """Fingerprint of what `stage` depends on; see `StageInputs`."""
    return StageInputs.read(stage, root).fingerprint


def _find(stage: str, root: Path) -> Stage:
    stages = read_pipeline(root)
    if stage not in stages:
        raise ValueError(f"{root / 'dvc.yaml'}: no stage {stage!r}; its stages are {', '.join(stages)}")
    return stages[stage]


def _digest(stage: Stage, root: Path) -> dict[str, str]:
    params = read_yaml(root / "params.yaml")
    digests = {"dvc.yaml: cmd": stage.cmd}
    for key in stage.params:
        value = lookup(params, key)
        if key.startswith("curriculum.") and isinstance(value, dict):
            # Apart from the rest: an edit while the stage runs is refused like any other.
            digests |= {f"params.yaml: {key}.{name}": canonical(value.get(name)) for name in CANNOT_CHANGE_BYTES}
            value = {name: item for name, item in value.items() if name not in CANNOT_CHANGE_BYTES}
        digests[f"params.yaml: {key}"] = canonical(value)
    for dep in stage.deps:
        digests[dep] = digest_path(root / dep)
    return digests
