"""How much there is to read: lines, files, functions, helpers with one caller, and what a training imports.

    python benchmarks/house.py

Counts what git tracks, so that a clone and a working checkout print the same.
"""

import ast
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("src", "stages")
LAYERS = [
    "config",
    "data",
    "model",
    "fast",
    "methods",
    "training",
    "checkpoints",
    "evaluation",
    "probing",
    "pipeline",
    "planning",
    "report",
]


def tracked(*folders: str) -> list[Path]:
    """Return the tracked text files of these folders."""
    done = subprocess.run(["git", "ls-files", "--", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def num_lines(files: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def functions(files: list[Path]) -> list[tuple[str, int]]:
    """Return name and length in lines of every function and method."""
    return [
        (node.name, (node.end_lineno or 0) - node.lineno + 1)
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def helpers_with_one_caller(files: list[Path]) -> list[str]:
    """Return the private functions whose name stands in one other place only."""
    words = Counter(word for path in files for word in re.findall(r"\w+", path.read_text(encoding="utf-8")))
    names = Counter(name for name, _ in functions(files))
    is_private = re.compile(r"_(?!_)\w+")
    return [name for name, count in names.items() if is_private.fullmatch(name) and words[name] == 2 * count]


def imported_by_a_training() -> list[Path]:
    """Return the files of ours that a process has imported once it could train."""
    code = (
        "import sys, coconut.pipeline.stage, coconut.training.entry, coconut.config.methods as methods\n"
        "methods.find_method('coconut')\n"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'coconut' and m.__file__), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(name) for name in done.stdout.splitlines()]


def layer_of(path: Path) -> str:
    """Return the folder that a file of the package belongs to, the innermost that has a line of its own."""
    return next((name for name in reversed(path.relative_to(ROOT).parts[:-1]) if name in LAYERS), "the rest")


def main() -> None:
    files = tracked(*SOURCES)
    python = [path for path in files if path.suffix == ".py"]
    tests = [path for path in tracked("tests") if path.suffix == ".py"]
    lengths = [length for _, length in functions(python)]
    training = imported_by_a_training()
    for layer in [*LAYERS, "the rest"]:
        part = [path for path in files if layer_of(path) == layer]
        print(f"{layer:<40}{num_lines(part):>8,} lines{len(part):>6} files")
    print(f"{'src, stages and templates':<40}{num_lines(files):>8,} lines{len(files):>6} files")
    print(f"{'tests':<40}{num_lines(tests):>8,} lines{len(tests):>6} files")
    print(f"{'imported by a training':<40}{num_lines(training):>8,} lines{len(training):>6} files")
    print(f"{'private functions with one caller':<40}{len(helpers_with_one_caller(python)):>8,}")
    print(f"{'functions':<40}{len(lengths):>8,}")
    print(f"{'lines of a function, median and longest':<40}{statistics.median(lengths):>8,.0f}{max(lengths):>8,}")


if __name__ == "__main__":
    main()
