"""Nothing is pickled, unpickled or evaluated: neither in the sources nor in any file that a run leaves."""

import ast
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from inprocess import canonical_splits, make_folder, succeed, sums, write_rows
from project import ROOT, TINY

SOURCES = sorted(path for folder in ("src", "stages", "benchmarks") for path in (ROOT / folder).rglob("*.py"))

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "execfile"}
FORBIDDEN_CALLS = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.package", "torch.hub.load"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "yaml.unsafe_load_all"),
    *("os.system", "os.popen", "os.execv", "os.execvp", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle"),
}
FORBIDDEN_METHODS = ("to_pickle", "read_pickle", "accelerator.save_state", "accelerator.load_state")
"""Ends of dotted names; accelerate's states pickle the random generators."""
FORBIDDEN_KEYWORDS = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "use_safetensors": False}
SAFE_KEYWORDS = {"weights_only": True, "safe_serialization": True}
PICKLED_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".dill")


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain; the attribute alone where it hangs on something else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else node.attr
    return ""


def offences(source: str) -> Iterator[str]:
    """What a source must not do, one sentence each."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"imports {name}" for name in modules if name.split(".")[0] in FORBIDDEN_MODULES)
            imported = [f"{module}.{name}" for module in modules for name in names]
            yield from (f"imports {name}" for name in imported if name in FORBIDDEN_CALLS)
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            yield f"names {node.id}"
        elif isinstance(node, ast.Attribute):
            if dotted(node) in FORBIDDEN_CALLS or dotted(node).endswith(FORBIDDEN_METHODS):
                yield f"names {dotted(node)}"
        elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            if node.arg in FORBIDDEN_KEYWORDS and node.value.value == FORBIDDEN_KEYWORDS[node.arg]:
                yield f"passes {node.arg}={node.value.value}"
            if node.arg in SAFE_KEYWORDS and node.value.value != SAFE_KEYWORDS[node.arg]:
                yield f"passes {node.arg}={node.value.value}"


def test_no_source_pickles_or_evaluates() -> None:
    found = {path.relative_to(ROOT): list(offences(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert len(found) > 100
    assert {path: sentences for path, sentences in found.items() if sentences} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.save(model, path)",
        "from torch import load",
        "import pickle",
        "from joblib import dump",
        "eval(text)",
        "run = exec",
        "subprocess.run(text, shell=True)",
        "yaml.load(text)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "self.accelerator.save_state(path)",
        "load(path, weights_only=False)",
    ],
)
def test_the_scan_finds(source: str) -> None:
    assert list(offences(source))


def test_only_the_refusal_of_pickled_weights_names_their_files() -> None:
    naming = {
        path.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(PICKLED_SUFFIXES)
    }
    assert naming <= {"origin.py"}


# --- what a run leaves ----------------------------------------------------------------------


def is_pickled(path: Path) -> bool:
    """Whether the file is a pickle of any protocol, an archive that may hold one (torch's), or named like one."""
    if path.suffix in PICKLED_SUFFIXES or zipfile.is_zipfile(path):
        return True
    content = path.read_bytes()
    try:
        # Reads the opcodes without doing what they say; `.` ends a pickle, and need not end the file.
        operations = list(pickletools.genops(content))
    except (ValueError, UnicodeDecodeError, IndexError, OverflowError):
        return content[:1] == b"\x80" and content[1:2] <= bytes([pickle.HIGHEST_PROTOCOL])
    return len(operations) > 1


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_scan_recognises_a_pickle_of_each_protocol(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(pickle.dumps({"weights": [1.0, 2.0]}, protocol) + b"\n")
    assert is_pickled(tmp_path / "state")


def test_the_scan_recognises_what_torch_saves(tmp_path: Path) -> None:
    import torch

    for is_zip in (True, False):
        torch.save({"a": torch.ones(2)}, tmp_path / "state", _use_new_zipfile_serialization=is_zip)
        assert is_pickled(tmp_path / "state")


@pytest.mark.slow
def test_no_artifact_of_a_run_is_pickled(tmp_path: Path) -> None:
    curriculum = {
        "cot": TINY["curriculum"]["cot"] | {"epochs": 1, "select": "best"},
        "latent_1": TINY["curriculum"]["latent_1"] | {"thought": "projection"},
    }
    project = make_folder(tmp_path / "project", canonical_splits() | {"curriculum": curriculum})
    write_rows(project, sums(80))
    succeed(project, "params", "preprocess", "base", "encode", "train@cot", "evaluate@cot", "train@latent_1", "report")
    files = [path for top in ("data", "outputs", ".resume") for path in (project / top).rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files}
    assert {".safetensors", ".json", ".arrow", ".jsonl", ".csv", ".svg", ".html", ".md", ".log"} <= kinds
    assert any(".resume" in path.parts and path.suffix == ".safetensors" for path in files)
    assert [path for path in files if is_pickled(path)] == []
