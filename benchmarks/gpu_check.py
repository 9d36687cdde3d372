"""What a machine with GPUs can show in ten minutes: `python benchmarks/gpu_check.py`.

    python benchmarks/gpu_check.py                              # every part, on the GPU
    python benchmarks/gpu_check.py --only agreement,times       # some of them
    python benchmarks/gpu_check.py --device cpu --small         # minutes, on any machine: whether the parts run
    python benchmarks/gpu_check.py --backend tests/pretend_device.py --device pretend:0 --small

Each part is a process of its own with a limit of time, so that a failure costs that part alone. It writes
`results/gpu_check/<device>/<part>.json`: what it found, or how it ended; `results.md` beside it shows all of them.
Nothing of it was run on a GPU yet.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
SECONDS = {
    "agreement": 120,
    "synchronisations": 30,
    "times": 120,
    "profile": 40,
    "memory": 60,
    "resume": 30,
    "generation": 60,
    "graph": 30,
    "pipeline": 150,
    "processes": 150,
    "sharded": 150,
    "srun": 150,
}
"""The parts in their order, and the seconds that each may take."""
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to see whether the parts run")
    parser.add_argument(
        "--backend", type=Path, help="a Python file that adds the device to torch, run before each part"
    )
    parser.add_argument("--only", default="", help=f"parts, by commas, of {', '.join(SECONDS)}; all if empty")
    parser.add_argument("--small", action="store_true", help="models of 64 columns and one repeat")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "gpu_check", help="folder of the results")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        if arguments.backend:
            runpy.run_path(str(arguments.backend))
        import gpu_parts

        print(json.dumps(gpu_parts.PARTS[arguments.part](arguments.device, small=arguments.small)))
        return
    chosen = arguments.only.split(",") if arguments.only else list(SECONDS)
    if unknown := sorted(set(chosen) - SECONDS.keys()):
        sys.exit(f"--only: found {', '.join(unknown)}, wanted some of {', '.join(SECONDS)}")
    folder = arguments.results / arguments.device.partition(":")[0]
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in chosen:
        found = run_part(name, arguments.device, arguments.backend, small=arguments.small)
        (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {found['outcome']}, {found['seconds']:.0f} s", flush=True)
        if found["outcome"] not in ("ok", "skipped"):
            failed.append(name)
            print(f"    {found['message']}", flush=True)
    (arguments.results / "results.md").write_text(describe(arguments.results), encoding="utf-8")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def run_part(name: str, device: str, backend: Path | None, *, small: bool) -> dict[str, object]:
    """Run one part in a process of its own; say how it ended, and what it found."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--device", device]
    start = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *(["--backend", str(backend)] if backend else []), *(["--small"] if small else [])],
            capture_output=True,
            text=True,
            timeout=SECONDS[name],
            check=False,
        )
    except subprocess.TimeoutExpired:
        message = f"not done after {SECONDS[name]} s"
        return {"outcome": "timeout", "message": message, "seconds": time.monotonic() - start}
    seconds = time.monotonic() - start
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"outcome": "failed", "message": lines[-1], "log": lines[-40:], "seconds": seconds}
    found = json.loads(done.stdout.splitlines()[-1])
    outcome = "skipped" if "skipped" in found else "failed" if found.get("problems") else "ok"
    message = found.get("skipped") or "; ".join(found.get("problems", []))
    return {"outcome": outcome, "message": message, "seconds": seconds, "found": found}


def describe(results: Path) -> str:
    """Write what all parts found on every device as one page: a table of outcomes, and the numbers of each part."""
    lines = ["# Results of gpu_check.py", "", "Written by it; do not edit.", ""]
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        paths = {name: folder / f"{name}.json" for name in SECONDS}
        parts = {name: json.loads(path.read_text("utf-8")) for name, path in paths.items() if path.is_file()}
        lines += [f"## {folder.name}", "", "| part | outcome | seconds | |", "|:--|:--|--:|:--|"]
        lines += [
            f"| {name} | {one['outcome']} | {one['seconds']:.0f} | {one['message']} |" for name, one in parts.items()
        ]
        for name, one in parts.items():
            numbers = dict(_flatten(one.get("found", {})))
            if numbers:
                lines += ["", f"### {name}", "", "| what | value |", "|:--|--:|"]
                lines += [f"| {key} | {value} |" for key, value in numbers.items()]
        lines.append("")
    return "\n".join(lines)


def _flatten(tree: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}, {key}" if prefix else str(key))
    elif isinstance(tree, float):
        yield prefix, f"{tree:.4g}"
    elif not isinstance(tree, list):
        yield prefix, str(tree)


if __name__ == "__main__":
    main()
