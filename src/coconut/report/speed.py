"""What an update costs in each entry: by the clock, and in CPU seconds, which other programs do not lengthen."""

import math
from collections.abc import Callable, Mapping, Sequence

from coconut.report.results import Result
from coconut.report.tables import Table
from coconut.report.text import format_number, format_significant

Means = Mapping[str, float | None]
"""Averages over the epochs of one entry, by column."""

_CLEAR_RATIO = 1.25
"""From this ratio on, the clock and the CPU seconds disagree by more than they do on an idle machine."""


def speed_table(results: Sequence[Result]) -> Table:
    """Build a table with one row per trained entry: what an update costs, and what it holds."""
    header = ["entry", "latents", "tokens/update", "padding share", "tokens/s", "ms/update", "in first epoch"]
    header += ["in last epoch", "CPU ms/update", "load"]
    rows = []
    for result in results:
        if not result.history:
            continue
        speed = epoch_means(result)
        per_epoch = [row.get("ms_per_update") for row in (result.history[0], result.history[-1])]
        row = [result.training_label, format_number(speed["num_latents"], 1)]
        row += [format_number(speed["tokens_per_update"], 0), format_number(speed["padding_share"], 3)]
        row += [format_number(speed["tokens_per_s"], 0)]
        row += [format_significant(ms) for ms in (speed["ms_per_update"], *per_epoch, speed["cpu_ms_per_update"])]
        row += [format_number(speed["load"], 1)]
        rows.append(row)
    return Table(header, rows)


def epoch_means(result: Result) -> Means:
    """Average over an entry's epochs what decides the speed."""
    columns = ("num_latents", "padding_share", "tokens_per_s", "ms_per_update", "load")
    means = {column: _mean([row.get(column) for row in result.history]) for column in columns}
    rate, ms = means["tokens_per_s"], means["ms_per_update"]
    # Not from the column `tokens`: so defined, the two factors of `explain_speed` multiply exactly.
    means["tokens_per_update"] = None if rate is None or ms is None else rate * ms / 1000
    cpu_share = _cpu_share(result)
    means["cpu_ms_per_update"] = None if ms is None or cpu_share is None else ms * cpu_share
    return means


def _cpu_share(result: Result) -> float | None:
    """Return CPU seconds per second of the clock over the whole training; both columns count from its beginning."""
    cpu_s, clock_s = (result.history[-1].get(column) for column in ("cpu_seconds", "seconds"))
    return cpu_s / clock_s if cpu_s and clock_s else None


def explain_speed(results: Sequence[Result]) -> str:
    """Say how much longer the slowest entry's updates take than the fastest one's, and from what.

    Where CPU seconds are known, they decide: the clock also counts what else the machine did.
    """
    speeds = {result.name: epoch_means(result) for result in results if result.history}
    timed = {name: speed for name, speed in speeds.items() if speed["ms_per_update"] and speed["tokens_per_s"]}
    if len(timed) < 2:
        return ""
    cost = "cpu_ms_per_update" if all(speed["cpu_ms_per_update"] for speed in timed.values()) else "ms_per_update"
    fast, slow = (choose(timed, key=lambda name: timed[name][cost] or 0) for choose in (min, max))
    return _compare(slow, fast, timed) if cost == "cpu_ms_per_update" else _compare_clocks(slow, fast, timed)


def _compare(slow: str, fast: str, speeds: Mapping[str, Means]) -> str:
    ratio, pair = _readers(slow, fast, speeds)
    clock, cpu, tokens = (ratio(column) for column in ("ms_per_update", "cpu_ms_per_update", "tokens_per_update"))
    doubt = ""
    if max(clock / cpu, cpu / clock) > _CLEAR_RATIO:
        doubt = (
            " The two differ: the clock also counts waiting for other programs"
            f" (load average per core {pair('load', 1)}), for a disk or for a GPU."
        )
    return (
        f"An update of {slow} takes {cpu:.2f} times the CPU seconds of one of {fast}, and {clock:.2f} times as long by"
        f" the clock.{doubt} It holds {tokens:.2f} times the tokens, and a token takes {cpu / tokens:.2f} times the CPU"
        f" seconds (latents {pair('num_latents', 1)}, padding share {pair('padding_share', 3)})."
    )


def _compare_clocks(slow: str, fast: str, speeds: Mapping[str, Means]) -> str:
    ratio, _ = _readers(slow, fast, speeds)
    return (
        f"An update of {slow} takes {ratio('ms_per_update'):.2f} times as long as one of {fast} by the clock, and holds"
        f" {ratio('tokens_per_update'):.2f} times the tokens. How much of that is due to other programs on the machine"
        " is not known, because the histories hold no CPU seconds."
    )


def _readers(
    slow: str, fast: str, speeds: Mapping[str, Means]
) -> tuple[Callable[[str], float], Callable[[str, int], str]]:
    def ratio(column: str) -> float:
        return (speeds[slow][column] or math.nan) / (speeds[fast][column] or math.nan)

    def pair(column: str, digits: int) -> str:
        return " against ".join(format_number(speeds[name][column], digits) for name in (slow, fast))

    return ratio, pair


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None
