"""The code of a pipeline stage, and the file of digests by which it stands in `dvc.yaml`.

`outputs/code/train.txt` has a line for every file that `stages/train.py` may load and that can change a result: a
digest that ignores comments, docstrings and layout, and the path. The pipeline stage `code` writes it, and `train@...`
depends on it alone. So an edit runs those stages again that load what was edited, and an edited comment runs none,
which DVC by itself, with folders of code as dependencies, could not tell apart.

A training method is loaded by its name, so that no script's imports show it. It has a file of digests of its own,
`outputs/code/methods/<name>.txt`, on which the stages of its entries depend: an edited method runs those alone. Tasks,
presets and added probes are loaded by name too; they are in the digests of the stage that uses them.
"""

from collections.abc import Mapping
from pathlib import Path, PurePath

from coconut.files import files_below, replace_file, sha256_of, writing
from coconut.layout import CODE_DIR
from coconut.pipeline.code import digest_code, import_closure

_PACKAGE = "src/coconut"
_METHODS = f"{_PACKAGE}/methods"
_CANNOT_CHANGE_BYTES = tuple(
    f"{_PACKAGE}/{name}"
    for name in ("__init__.py", "pipeline", "devices.py", "files.py", "layout.py", "logs.py", "tracking.py")
)
"""How a stage is run, watched and stored, not what it computes."""


_LOADED_BY_NAME = {
    f"{_PACKAGE}/data/streams.py": f"{_PACKAGE}/data/generators",
    f"{_PACKAGE}/data/sources.py": f"{_PACKAGE}/data/presets",
    f"{_PACKAGE}/probing/entry.py": f"{_PACKAGE}/probing/added",
}
"""By the module that uses them, folders of modules that `coconut.config.extensions` finds, so that no import shows it.

Every stage reads their settings with params.yaml, but what only checks a value cannot change a result.
"""


def code_file(script: PurePath) -> PurePath:
    """Return the file of digests of a script, relative to the top folder.

    >>> code_file(PurePath("stages/train.py")).as_posix()
    'outputs/code/train.txt'
    >>> code_file(PurePath("src/coconut/methods/mine.py")).as_posix()
    'outputs/code/methods/mine.txt'
    """
    folder = CODE_DIR / "methods" if script.parent == PurePath(_METHODS) else CODE_DIR
    return PurePath(folder, f"{script.stem}.txt")


def method_scripts(root: Path) -> list[str]:
    """Return the files of all methods, relative to `root`."""
    folder = root / _METHODS
    return sorted(path.relative_to(root).as_posix() for path in folder.glob("*.py") if path.name[0] != "_")


def script_of(code_file: str) -> str | None:
    """Return the script that a file of digests is about, or None for any other file.

    >>> script_of("outputs/code/train.txt"), script_of("outputs/code/methods/mine.txt"), script_of("data/examples")
    ('stages/train.py', 'src/coconut/methods/mine.py', None)
    """
    path = PurePath(code_file)
    if path.suffix != ".txt" or path.parent not in (CODE_DIR, CODE_DIR / "methods"):
        return None
    return f"{'stages' if path.parent == CODE_DIR else _METHODS}/{path.stem}.py"


def stage_code(script: str, root: Path) -> dict[str, bytes]:
    """Return the files that a script may load and that can change a result, by path relative to `root`.

    What lies beside a module without being one, as a page's template, counts with it.
    """
    loaded = import_closure(script, root)
    for user, folder in _LOADED_BY_NAME.items():
        for path in sorted((root / folder).glob("*.py")) if user in loaded else ():
            loaded |= import_closure(path.relative_to(root).as_posix(), root)
    modules = {name: source for name, source in loaded.items() if _can_change_bytes(name)}
    folders = {Path(name).parent for name in modules} - {Path(_PACKAGE)}
    others = {
        (folder / name).as_posix()
        for folder in folders
        for name in files_below(root / folder)
        if Path(name).suffix != ".py"
    }
    return modules | {name: (root / name).read_bytes() for name in sorted(others)}


def digest_source(name: str, source: bytes) -> str:
    """Return the digest of a file: of what it does if it is Python, else of its bytes."""
    return digest_code(source) if name.endswith(".py") else sha256_of(source.hex())


def describe_code(sources: Mapping[str, bytes]) -> str:
    """Write the text of a file of digests."""
    return "".join(f"{digest_source(name, sources[name])}  {name}\n" for name in sorted(sources))


def write_code() -> None:
    """Write `outputs/code`: a file of digests for every method, and every script but the one that runs this."""
    scripts = [path.as_posix() for path in Path("stages").glob("*.py") if path.name != "digest_code.py"]
    with writing(CODE_DIR):
        for script in [*scripts, *method_scripts(Path())]:
            path = Path(code_file(PurePath(script)))
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, describe_code(stage_code(script, Path())))
        for path in (CODE_DIR / "methods").glob("*.txt"):
            if not Path(script_of(path.as_posix()) or "").is_file():
                path.unlink()


def find_newer(text: str, sources: Mapping[str, bytes]) -> list[str]:
    """Name the files that are other ones now than a file of digests says."""
    now = describe_code(sources).splitlines()
    return sorted({line.partition("  ")[2] for line in set(now) ^ set(text.splitlines())})


def _can_change_bytes(name: str) -> bool:
    return not any(Path(name).is_relative_to(other) for other in _CANNOT_CHANGE_BYTES)
