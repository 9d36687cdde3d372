"""What a pipeline stage depends on, read from `dvc.yaml`, and a fingerprint of it.

A resume state may be continued only by a run whose command, code, parameters and input bytes
are those of the run that left it. DVC knows that list already, so it is read from `dvc.yaml`
rather than kept a second time: what is added there is in the fingerprint at once.

Code stands there as a file of digests (see `stage_code.py`). What counts here is the code itself, read again: the
modules that the stage's script may load, by what they do, so that an edited comment changes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coconut.files import digest_path, sha256_of
from coconut.pipeline.dvc_file import Stage, canonical, lookup, read_mapping, read_pipeline
from coconut.pipeline.stage_code import digest_source, find_newer, script_of, stage_code

CANNOT_CHANGE_BYTES = ("min_accuracy",)
"""Keys of a curriculum entry that decide whether a stage passes, never what it computes."""
_GATE_SUFFIXES = tuple(f".{key}" for key in CANNOT_CHANGE_BYTES)


@dataclass(frozen=True)
class StageInputs:
    """Everything one stage depends on, at the moment it was read.

    Read it before the parameters and the data: what is edited after that is noticed by
    `refuse_if_changed`, which is called before outputs are written.
    """

    stage: str
    root: Path
    digests: Mapping[str, str]
    """Of the command, the parameters and the files."""
    code: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    """By the file of digests that stands for it in `dvc.yaml`: the code, by path."""

    @classmethod
    def read(cls, stage: str, root: Path | str = ".") -> "StageInputs":
        """Read the command, dependencies and parameters of `stage` in the work tree `root`.

        Raises:
            ValueError: `dvc.yaml` or `params.yaml` lacks something the stage needs.
            FileNotFoundError: a dependency is missing.
        """
        root = Path(root)
        stages = read_pipeline(root)
        if stage not in stages:
            raise ValueError(f"{root / 'dvc.yaml'}: no stage {stage!r}; its stages are {', '.join(stages)}")
        return cls._of(stages[stage], root)

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
        return cls._of(stage, root)

    @classmethod
    def _of(cls, stage: Stage, root: Path) -> "StageInputs":
        scripts = {dep: script for dep in stage.deps if (script := script_of(dep)) is not None}
        digests = {"dvc.yaml: cmd": stage.cmd, **_digest_params(stage, root)}
        digests |= {dep: _digest_dep(root, dep) for dep in stage.deps if dep not in scripts}
        return cls(stage.name, root, digests, {dep: stage_code(script, root) for dep, script in scripts.items()})

    @property
    def sources(self) -> dict[str, bytes]:
        """The code, by path."""
        return {name: source for sources in self.code.values() for name, source in sources.items()}

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that stand for the stage's name and everything that can change its bytes."""
        of_bytes = {name: digest for name, digest in self.digests.items() if not name.endswith(_GATE_SUFFIXES)}
        return sha256_of([self.stage, sorted(of_bytes.items()), self._code])

    @property
    def _code(self) -> list[tuple[str, str]]:
        return sorted((name, digest_source(name, source)) for name, source in self.sources.items())

    def fingerprint_without(self, *names: str) -> str:
        """Return 64 hexadecimal digits that stand for all of it but the stage's name, its command and some files.

        Args:
            names: of dependencies that do not count.
        """
        of_bytes = {name: digest for name, digest in self.digests.items() if name not in (*names, "dvc.yaml: cmd")}
        return sha256_of([sorted(of_bytes.items()), self._code])

    def refuse_newer_code(self) -> None:
        """Raise when the code is not the one that DVC will record: it was edited since `dvc repro` began.

        Raises:
            ValueError: naming the files.
        """
        for code_file, sources in self.code.items():
            path = self.root / code_file
            if not path.is_file():
                raise ValueError(
                    f"{path}: no such file, wanted the digests of this stage's code; `dvc repro` writes it"
                )
            if newer := find_newer(path.read_text(encoding="utf-8", errors="replace"), sources):
                raise ValueError(
                    f"{path}: written for other code than there is now ({', '.join(newer[:5])}"
                    f"{', ...' if len(newer) > 5 else ''}), so DVC would record that for this stage; run `dvc repro`"
                    " again"
                )

    def refuse_if_changed(self) -> None:
        """Raise when an input is no longer what it was: DVC would record the new one for the old result.

        Raises:
            ValueError: naming what changed.
        """
        try:
            now = StageInputs.read(self.stage, self.root)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self._complaint('its inputs cannot be read any more')}: {error}") from None
        if changed := sorted(self._differences(now)):
            raise ValueError(self._complaint(", ".join(changed)))

    def _differences(self, now: "StageInputs") -> set[str]:
        """Names of the inputs whose value, or whose code in what it does, is another one."""
        values = {name for name, _ in self.digests.items() ^ now.digests.items()}
        edited = {name for name, _ in self.sources.items() ^ now.sources.items()}
        return values | {
            name
            for name in edited
            if not (name in self.sources and name in now.sources)
            or digest_source(name, self.sources[name]) != digest_source(name, now.sources[name])
        }

    def _complaint(self, what: str) -> str:
        return (
            f"{self.stage}: changed while it ran: {what}. Its outputs do not count, since DVC would record the new"
            " inputs for the old result; run `dvc repro` again, or undo the change first to keep a training"
        )


def fingerprint(stage: str, root: Path | str = ".") -> str:
    """Fingerprint of what `stage` depends on; see `StageInputs`."""
    return StageInputs.read(stage, root).fingerprint


def _digest_params(stage: Stage, root: Path) -> dict[str, str]:
    params = read_mapping(root / "params.yaml")
    digests: dict[str, str] = {}
    for key in stage.params:
        value = lookup(params, key)
        if key.startswith("curriculum.") and isinstance(value, dict):
            # Apart from the rest: an edit while the stage runs is refused like any other.
            digests |= {f"params.yaml: {key}.{name}": canonical(value.get(name)) for name in CANNOT_CHANGE_BYTES}
            value = {name: item for name, item in value.items() if name not in CANNOT_CHANGE_BYTES}
        digests[f"params.yaml: {key}"] = canonical(value)
    return digests


def _digest_dep(root: Path, dep: str) -> str:
    try:
        return digest_path(root / dep)
    except FileNotFoundError:
        raise FileNotFoundError(f"{root / dep}: a dependency in dvc.yaml, but no such file; run `dvc repro`") from None
