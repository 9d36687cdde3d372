"""The results as one Markdown page."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def write(results_dir: Path) -> None:
    """Write `results.md` from all parts that were ever measured."""
    lines = ["# Results", "", "Written by `make bench`; do not edit. Ratios are of medians taken in turns.", ""]
    for device in ("cpu", "cuda"):
        paths = (path for path in (results_dir / device).glob("*.json") if path.stem in SECTIONS)
        parts = {path.stem: json.loads(path.read_text("utf-8")) for path in paths}
        lines.append(f"## {device}")
        lines.append("")
        if not parts:
            lines += ["Not run: no GPU was at hand. `python benchmarks/bench.py --device cuda` runs it.", ""]
            continue
        lines += _machine(parts)
        for name, part in SECTIONS.items():
            if name in parts:
                lines += [f"### {name}", "", *part(parts[name], device), ""]
    (results_dir / "results.md").write_text("\n".join(lines), encoding="utf-8")


def _machine(parts: Mapping[str, Json]) -> list[str]:
    one = next(iter(parts.values()))["machine"]
    loads = [(name, part["machine"]["load"]) for name, part in sorted(parts.items())]
    busy = ", ".join(f"{name} {load:.1f}" for name, load in loads)
    return [
        f"{one['device']}, {one['cores']} cores, {one['threads']} threads, {', '.join(one['instructions'])};"
        f" torch {one['torch']}, transformers {one['transformers']}.",
        f"Load average when each part began (shared machine): {busy}.",
        "",
    ]


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return lines + ["| " + " | ".join(_shown(cell) for cell in row) + " |" for row in rows]


def _shown(cell: Any) -> str:
    return (
        f"{cell:.3g}"
        if isinstance(cell, float) and abs(cell) < 1000
        else f"{cell:.0f}"
        if isinstance(cell, float)
        else str(cell)
    )


def _verdict(value: float, limit: float, *, at_least: bool = False) -> str:
    return "reached" if (value >= limit if at_least else value <= limit) else "**not reached**"


def _judged(value: float, limit: float, *, at_least: bool = False) -> tuple[float, float, str]:
    """Return the cells found, wanted and verdict of a row."""
    return value, limit, _verdict(value, limit, at_least=at_least)


def _updates(part: Json, device: str) -> list[str]:
    limits = {"B=8": 1.25, "B=32": 1.10} if device == "cpu" else {"B=8": float("inf"), "B=32": 1.3}
    limits_of_thoughts = {"B=8": 1.10, "B=32": 1.05}
    rows = []
    for size, limit in limits.items():
        found = part[size]
        seconds = found["seconds"]
        own = seconds["latent, torch's products"] / seconds["plain"]
        rows += [
            (size, "latent / plain", *_judged(found["latent / plain"], limit)),
            (size, "the same without oneDNN", *_judged(own, limit)),
            (
                size,
                "latent / no thoughts, all our speed-ups in both",
                *_judged(found["latent / ours, no thoughts"], limits_of_thoughts[size]),
            ),
            (size, "its floor: the products of the passes alone", found["floor of that"], "", ""),
        ]
    lines = _table(["", "ratio", "found", "wanted at most", ""], rows)
    seconds = {size: part[size]["seconds"] for size in limits}
    lines += [
        "",
        *_table(["seconds per update", *seconds], ([n, *(seconds[s][n] for s in seconds)] for n in seconds["B=8"])),
    ]
    return lines


def _ideas(part: Json, _device: str) -> list[str]:
    base = part["seconds"]["plain"]
    rows = (
        (name, value, value / base, part["peak_mb"][name], part["peak_mb"][name] / part["peak_mb"]["plain"])
        for name, value in part["seconds"].items()
    )
    return _table(["B = 8", "s per update", "/ plain", "peak MB above weights", "/ plain"], rows)


def _thoughts(part: Json, _device: str) -> list[str]:
    found = part["per thought / plain"]
    own = part["plain's own cost of a column / plain"]
    return [
        f"One further thought at B = 32 adds {found:.2%} of a plain update (wanted at most 1.5 %:"
        f" {_verdict(found, 0.015)}); one further column of ordinary tokens adds {own:.2%} to a plain one."
    ]


def _memory(part: Json, _device: str) -> list[str]:
    rows = []
    for size in ("B=8", "B=32"):
        found = part[size]
        for name, peak in found["peak_mb"].items():
            rows.append((size, name, peak, peak / found["peak_mb"]["plain"]))
    lines = _table(["", "kind", "peak MB above weights, gradients, Adam", "/ plain (latent: at most 1.15)"], rows)
    worst = max(part[size]["latent / plain"] for size in ("B=8", "B=32"))
    return [*lines, "", f"Largest latent / plain: {worst:.2f}, {_verdict(worst, 1.15)}."]


def _bf16(part: Json, device: str) -> list[str]:
    rates = part["operations_per_s"]
    rows = [(size, part[size]["latent bf16 / fp32"], part[size]["latent / plain, bf16"]) for size in ("B=8", "B=32")]
    has_amx = "amx_tile" in part["machine"]["instructions"]
    note = "" if has_amx or device != "cpu" else " The row of the issue for a CPU with AMX is **not run: no AMX here**."
    return [
        *_table(["", "latent: bf16 autocast / fp32", "latent / plain, both bf16"], rows),
        "",
        f"Matrix rate: {rates['float32'] / 1e9:.0f} GFLOP/s in fp32, {rates['bfloat16'] / 1e9:.0f} in bf16.{note}",
    ]


def _checkpointing(part: Json, _device: str) -> list[str]:
    seconds, peaks = part["seconds"], part["peak_mb"]
    return [
        *_table(["B = 8", "s per update", "peak MB"], ((name, seconds[name], peaks[name]) for name in seconds)),
        "",
        f"It saves {1 - peaks['checkpointed'] / peaks['kept']:.0%} of the memory above weights, gradients and Adam,"
        f" for {seconds['checkpointed'] / seconds['kept'] - 1:.0%} more time.",
    ]


def _vocabulary(part: Json, _device: str) -> list[str]:
    rows = []
    for size, found in part.items():
        if size.startswith("B="):
            columns = f"{size}, {found['columns']} columns, {found['supervised']} supervised"
            rows += [(columns, name, peak, found["seconds"][name]) for name, peak in found["peak_mb"].items()]
    return _table(["151,936 entries, 2 layers", "logits of", "peak MB above weights and gradients", "s"], rows)


def _profile(_part: Json, device: str) -> list[str]:
    return [f"[{device}/profile.txt]({device}/profile.txt): the operations of one plain and one latent update."]


def _small(part: Json, _device: str) -> list[str]:
    rows = (
        (name, *(1e3 * found["seconds"][kind] for kind in ("plain", "straightforward", "latent")))
        for name, found in part.items()
        if name.endswith("thoughts")
    )
    return _table(["64 wide, 64 rows, 1 thread", "plain ms", "straightforward ms", "latent ms"], rows)


def _launches(part: Json, _device: str) -> list[str]:
    counted = ((name, *found["thought"], *found["token"]) for name, found in part["operations"].items())
    header = ["operations on a device", "a thought, a layer", "all layers", "a token, a layer", "all layers"]
    host = ((name, value) for name, value in part["host"].items() if name != "seconds")
    return [*_table(header, counted), "", *_table(["time of the host", "ratio"], host)]


def _generation(part: Json, device: str) -> list[str]:
    has_amx = "amx_tile" in part["machine"]["instructions"]
    bf16_name = "bf16 autocast / uncached fp32" + (" (with AMX)" if has_amx else " (no AMX here)")
    rows = [
        ("fp32 / uncached, one row", *_judged(part["fp32 / uncached"], 28, at_least=True)),
        (
            bf16_name,
            part["bf16 / uncached"],
            50,
            _verdict(part["bf16 / uncached"], 50, at_least=True) if has_amx or device != "cpu" else "not run: no AMX",
        ),
        (
            "time / arithmetic floor, fp32, at torch's own matrix rate",
            *_judged(part["fp32 / floor at torch rate"], 1.5),
        ),
        (
            "the same at the rate of the library that we take (oneDNN)",
            *_judged(part["fp32 / floor at ours rate"], 1.5),
        ),
        ("time / arithmetic floor, bf16", part["bf16 / floor at ours rate"], "", ""),
    ]
    rates, products = part["rows_per_s"], part["operations_per_s"]["fp32"]
    return [
        *_table(["64 questions, 6 thoughts + 32 tokens", "found", "wanted", ""], rows),
        "",
        f"Rows per second: {', '.join(f'{name} {rate:.2f}' for name, rate in rates.items())}."
        f" {part['operations'] / 1e9:.0f} GFLOP; matrix rate in float32"
        f" {products['torch'] / 1e9:.0f} GFLOP/s by torch, {products['ours'] / 1e9:.0f} by oneDNN.",
    ]


def _growth(part: Json, device: str) -> list[str]:
    rows = (
        (
            row["size"],
            row["seconds"]["plain"],
            row["seconds"]["latent"],
            row["seconds"]["latent"] / row["seconds"]["plain"],
            row["peak_mb"]["plain"],
            row["peak_mb"]["latent"],
            row["peak_mb"]["latent"] / row["peak_mb"]["plain"],
        )
        for row in part["rows"]
    )
    header = [part["label"], "plain s", "latent s", "ratio", "plain MB", "latent MB", "ratio"]
    return [*_table(header, rows), "", f"![{part['label']}]({device}/{part['figure']})"]


def _data_path(part: Json, _device: str) -> list[str]:
    start, memory = part["epoch_start_s"], part["peak_resident_mb_above"]
    return [
        *_table(
            ["a million rows", "found", "wanted"],
            [
                ("seconds to start an epoch", start, f"under 2: {_verdict(start, 2)}"),
                ("resident MB at most above what was there before", memory, f"under 300: {_verdict(memory, 300)}"),
                ("of it not pages of the mapped file", max(part["of_it_not_the_file's_pages_mb"]), ""),
                ("ms to read and lay out an update of 128 rows", part["ms_per_update_of_128_rows"], ""),
                (f"seconds to encode (from {part['rows_encoded']} rows)", part["encode_s_per_million"], ""),
                ("MB of the file", part["file_mb"], ""),
            ],
        ),
        "",
        "Resident MB every 250 updates: " + ", ".join(f"{value:.0f}" for value in part["resident_mb_above"]) + ".",
    ]


def _pipeline(part: Json, _device: str) -> list[str]:
    wall = part["wall_s"]
    rows = ((name, value, f"{value / wall:.1%}") for name, value in part["parts_s"].items())
    share = part["overhead_share"]
    return [
        f"`dvc repro` of the embedded default from nothing: {wall:.0f} s, of which {share:.1%} is neither an update nor"
        f" decoding or scoring (wanted under 20 %: {_verdict(share, 0.2)}).",
        "",
        *_table(["part", "s", "share"], rows),
    ]


SECTIONS = {
    "updates": _updates,
    "thoughts": _thoughts,
    "memory": _memory,
    "ideas": _ideas,
    "generation": _generation,
    "bf16": _bf16,
    "checkpointing": _checkpointing,
    "vocabulary": _vocabulary,
    "growth_thoughts": _growth,
    "growth_batch": _growth,
    "growth_columns": _growth,
    "small": _small,
    "launches": _launches,
    "data_path": _data_path,
    "pipeline": _pipeline,
    "profile": _profile,
}
