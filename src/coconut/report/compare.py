"""`coconut compare [name ...]`: compares DVC experiments with each other.

Experiments whose params differ in nothing but the seed form a *group*: its accuracies get a mean and an
interval over seeds. Groups are then compared with the first one, by the paired differences over common
seeds and by McNemar's test over the examples of each seed.
"""

import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coconut.config.params import parse_params
from coconut.config.schema import BASE
from coconut.config.strict import parse_yaml
from coconut.evaluation.statistics import format_ratio, paired_seeds_interval, seeds_interval
from coconut.pipeline.repro_log import in_our_words
from coconut.pipeline.status import judge_revision
from coconut.report.provenance import judge
from coconut.report.reading import ReadText
from coconut.report.results import Result, evaluate_stage, read_results
from coconut.report.tables import Table, pair_examples, paired_p
from coconut.report.text import NOTHING, format_interval, format_p, visible
from coconut.tracking import flatten

WORKSPACE = "workspace"

_MAX_CHANGES_SHOWN = 4
_MAX_NAMES_SHOWN = 8


@dataclass(frozen=True)
class Experiment:
    """One run of the whole pipeline: a DVC experiment, a git revision or the workspace."""

    name: str
    seed: int
    params: Mapping[str, Any]
    """Dotted keys and values, without the seed and without `runtime`, which changes no result."""
    results: Sequence[Result]
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Entries whose numbers are not of these params, code and data, with the reasons."""

    def result(self, entry: str) -> Result | None:
        """Return what it has on one entry of its curriculum."""
        return next((result for result in self.results if result.name == entry), None)

    @property
    def is_scored(self) -> bool:
        """Say whether it has any figures of its own."""
        return any(result.metrics is not None for result in self.results)


@dataclass
class Group:
    """Experiments with equal params and different seeds."""

    letter: str
    experiments: list[Experiment] = field(default_factory=list)

    @property
    def params(self) -> Mapping[str, Any]:
        """Return what its experiments share."""
        return self.experiments[0].params

    def by_seed(self) -> dict[int, Experiment]:
        """Return its experiments by their seeds, smallest first."""
        return {experiment.seed: experiment for experiment in sorted(self.experiments, key=lambda one: one.seed)}


def read_experiment(
    name: str, read_text: Callable[[str], str | None], *, marks: Mapping[str, str] | None = None
) -> Experiment:
    """Read one experiment.

    Args:
        read_text: takes paths from the repository's top.
        marks: by stage that is not up to date, why; results of such stages are left out.

    Raises:
        ValueError: it has no params.yaml, or one that this version does not understand.
    """
    text = read_text("params.yaml")
    if text is None:
        raise ValueError(f"{name}: holds no params.yaml; name an experiment of this pipeline (`dvc exp list`)")
    tree = parse_yaml(text, f"{name}: params.yaml")
    try:
        params = parse_params(tree)
    except ValueError as error:
        raise ValueError(f"{name}: params.yaml: {error}") from None
    flat = flatten({key: value for key, value in tree.items() if key not in ("seed", "runtime")})
    everything = read_results(
        params.curriculum, lambda path: read_text(f"outputs/{path}"), marks=marks, reference=params.report.reference
    )
    results = [result for result in everything if result.mark is None]
    left_out = {one.name: one.mark for one in everything if one.mark is not None and one.metrics is not None}
    return Experiment(name, params.seed, flat, results, left_out)


def find_stale(name: str, read_text: ReadText) -> dict[str, str]:
    """Say by stage why what an experiment holds of it is not of its own params; see `judge_revision`.

    Raises:
        ValueError: it has no params.yaml, or one that is no YAML.
    """
    if name == WORKSPACE:
        provenance = judge(Path())
        marks = {row.stage: "not up to date" for row in provenance.unfinished}
        problem = provenance.problem
    else:
        try:
            marks, problem = judge_revision(lambda path: _encoded(read_text(path))), None
        except ValueError as error:
            marks, problem = {}, str(error)
    if problem is None:
        return marks
    tree = parse_yaml(read_text("params.yaml") or "", f"{name}: params.yaml")
    curriculum = tree.get("curriculum") if isinstance(tree, dict) else None
    return {evaluate_stage(entry): f"nothing is known of it: {problem}" for entry in (BASE, *(curriculum or {}))}


def _encoded(text: str | None) -> bytes | None:
    return None if text is None else text.encode()


def group_experiments(experiments: Sequence[Experiment]) -> list[Group]:
    """Put experiments together that differ only in the seed.

    The same run under two names (HEAD and the workspace, mostly) counts once, under the first. The
    same params and seed with other results (other code, other data) start a group of their own.
    """
    groups: list[Group] = []
    for experiment in experiments:
        alike = [group for group in groups if group.params == experiment.params]
        if any(_same_run(experiment, group.by_seed().get(experiment.seed)) for group in alike):
            continue
        free = [group for group in alike if experiment.seed not in group.by_seed()]
        if not free:
            groups.append(Group(_letter(len(groups))))
            free = groups[-1:]
        free[0].experiments.append(experiment)
    return groups


def seeds_table(groups: Sequence[Group]) -> Table:
    """Build a table with one row per entry and group: each seed's accuracy, their mean and its interval."""
    rows = []
    for entry in _entries(groups):
        for group in groups:
            found = {
                seed: (accuracy, int(result.metric("num_examples") or 0))
                for seed, experiment in group.by_seed().items()
                if (result := experiment.result(entry)) and (accuracy := result.metric("accuracy")) is not None
            }
            if found:
                each = "  ".join(f"{seed}: {format_ratio(accuracy)}" for seed, (accuracy, _) in found.items())
                rows.append([entry, group.letter, each, str(len(found)), _format_mean(list(found.values()))])
    return Table(["entry", "group", "accuracy by seed", "seeds", "mean [95 %]"], rows, num_text_columns=3)


def pairs_table(first: Group, other: Group) -> Table:
    """Build a table with one row per entry: how much better `other` is than `first` on the same seeds and examples.

    Entries with the same answers in both, as those that a change did not reach, share a row at the end.
    """
    rows = []
    same: dict[tuple[str, str], list[str]] = {}
    for entry in _entries([first, other]):
        by_seed, pairs = [], []
        for label, one, two in _pair_experiments(first, other):
            before, after = one.result(entry), two.result(entry)
            if before is None or after is None:
                continue
            if before.metric("accuracy") is not None and after.metric("accuracy") is not None:
                pairs.append((before, after))
            by_seed.append(f"{label}{format_p(paired_p(before, after))}")
        if not pairs:
            continue
        end = (str(len(pairs)), _format_difference(pairs))
        if all(before.predictions and before.predictions == after.predictions for before, after in pairs):
            same.setdefault(end, []).append(entry)
        else:
            rows.append([entry, "  ".join(by_seed), *end])
    rows += [[", ".join(entries), "the same answers", *end] for end, entries in same.items()]
    header = ["entry", "McNemar's p by seed", "seeds", f"{other.letter} - {first.letter} [95 %]"]
    return Table(header, rows, num_text_columns=2)


def describe(groups: Sequence[Group]) -> str:
    """Say which experiments a letter stands for, and what its params change."""
    lines = []
    for group in groups:
        names = ", ".join(f"{one.name} (seed {one.seed})" for one in group.by_seed().values())
        changes = describe_changes(groups[0].params, group.params) if group is not groups[0] else "the first"
        lines.append(visible(f"{group.letter}  {changes}: {names}"))
    return "\n".join([*lines, *describe_left_out([one for group in groups for one in group.experiments])])


def describe_left_out(experiments: Sequence[Experiment]) -> list[str]:
    """Say what is in no table and no mean, and why: one line for each reason of an experiment."""
    lines = []
    for one in experiments:
        reasons = dict.fromkeys(one.left_out.values())
        for reason in reasons:
            names = [entry for entry, other in one.left_out.items() if other == reason]
            what = ", ".join(names) if one.is_scored or len(reasons) > 1 else "all of it"
            lines.append(visible(f"left out: {one.name}: {what} ({reason})"))
        if not one.is_scored and not reasons:
            lines.append(visible(f"left out: {one.name}: all of it (no entry was evaluated)"))
    return lines


def group_to_compare(experiments: Sequence[Experiment]) -> list[Group]:
    """Put experiments together by their params; two that differ in the seed alone are compared, not averaged."""
    groups = group_experiments(experiments)
    if len(experiments) == 2 and len(groups) == 1 and len(groups[0].experiments) == 2:
        return [Group(_letter(order), [experiment]) for order, experiment in enumerate(experiments)]
    return groups


def compare(groups: Sequence[Group]) -> str:
    """Write the whole text for the terminal."""
    blocks = [describe(groups), _text_or_nothing(seeds_table(groups))]
    for other in groups[1:]:
        title = f"{other.letter} against {groups[0].letter}, paired by seed and by test example"
        blocks.append(f"{title}\n{_text_or_nothing(pairs_table(groups[0], other))}")
    return "\n\n".join(blocks) + "\n"


def list_experiments() -> list[str]:
    """Ask DVC for the names of the experiments of the current commit."""
    command = [sys.executable, "-m", "dvc", "exp", "list", "--name-only"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        said = " ".join(filter(None, map(in_our_words, answer.stderr.split("\n")))).removeprefix("ERROR: ")
        raise ValueError(f"`dvc exp list` failed: {said}; run it in the repository's top folder")
    return answer.stdout.split()


def describe_queue(names: Sequence[str]) -> list[str]:
    """Name the experiments of the current commit that are in DVC's queue, and neither ended well nor are in `names`."""
    if not Path(".dvc/tmp/exps/celery").is_dir():
        return []
    from dvc.repo import Repo  # type: ignore[import-untyped]

    with Repo() as repo:
        queue, commit = repo.experiments.celery_queue, repo.scm.get_rev()
        states = {
            "failed": [done.entry for done in queue.iter_failed()],
            "has not ended": [*queue.iter_active(), *queue.iter_queued()],
        }
    lines = []
    for state, entries in states.items():
        found = [entry.name or entry.stash_rev[:7] for entry in entries if entry.baseline_rev == commit]
        if missing := [name for name in dict.fromkeys(found) if name not in names]:
            verb = state if len(missing) == 1 else state.replace("has", "have")
            is_not = "is not" if len(missing) == 1 else "are not"
            lines.append(visible(f"{len(missing)} of the queue {verb} and {is_not} in the table: {', '.join(missing)}"))
    return lines


def describe_elsewhere() -> list[str]:
    """Name the experiments of other commits than the current one: they are compared where they are named."""
    from dvc.repo import Repo

    with Repo() as repo:
        here = repo.scm.get_rev()
        found = repo.experiments.ls(all_commits=True)
    lines = []
    for commit, experiments in sorted(found.items()):
        if commit != here:
            names = [name for name, _ in experiments]
            shown = ", ".join(names[:_MAX_NAMES_SHOWN]) + (", ..." if len(names) > _MAX_NAMES_SHOWN else "")
            many = "experiments" if len(names) > 1 else "experiment"
            lines.append(visible(f"not compared unless named: {len(names)} {many} of commit {commit[:7]}: {shown}"))
    return lines


def open_revision(name: str) -> ReadText:
    """Read files of an experiment, a git revision or the workspace, through DVC's cache.

    Raises:
        ValueError: DVC knows no such name.
    """
    if name == WORKSPACE:
        return _read_here
    # Imported here, so that readers of files need no DVC.
    from dvc.api import DVCFileSystem  # type: ignore[import-untyped]
    from dvc.exceptions import DvcException  # type: ignore[import-untyped]

    try:
        files = DVCFileSystem(rev=None if name == WORKSPACE else name)
        assert files.repo is not None  # It opens lazily, so an unknown name raises only here.
    except DvcException as error:
        raise ValueError(f"{name}: {error}; `dvc exp list` and `git log` show what there is") from None

    def read_text(path: str) -> str | None:
        try:
            return str(files.read_text(path, encoding="utf-8", newline=""))  # As it is, for its digest.
        except FileNotFoundError:
            return None
        except DvcException as error:
            raise ValueError(f"{name}: {path}: {error}; the revision's dvc.yaml or dvc.lock cannot be read") from None

    return read_text


def _read_here(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _same_run(one: Experiment, other: Experiment | None) -> bool:
    """Tell whether two experiments have the same results; times do not count."""

    def essence(experiment: Experiment) -> list[Any]:
        return [(result.name, result.metric("accuracy"), result.predictions) for result in experiment.results]

    return other is not None and essence(one) == essence(other)


def _letter(order: int) -> str:
    return chr(ord("A") + order) if order < 26 else f"A{order}"


def _entries(groups: Sequence[Group]) -> list[str]:
    """Name every entry of any of them, in the order of the first that has it."""
    names = (result.name for group in groups for experiment in group.experiments for result in experiment.results)
    return list(dict.fromkeys(names))


def _pair_experiments(first: Group, other: Group) -> list[tuple[str, Experiment, Experiment]]:
    ones, twos = first.by_seed(), other.by_seed()
    common = [(f"{seed}: ", ones[seed], twos[seed]) for seed in ones if seed in twos]
    if not common and len(ones) == len(twos) == 1:
        return [("", first.experiments[0], other.experiments[0])]
    return common


def describe_changes(first: Mapping[str, Any], params: Mapping[str, Any]) -> str:
    """Say in which values some params differ from the first ones."""
    absent = object()
    changed = [key for key in {**first, **params} if first.get(key, absent) != params.get(key, absent)]
    if not changed:
        return "the same params"
    shown = [f"{key}={params[key]}" if key in params else f"no {key}" for key in changed[:_MAX_CHANGES_SHOWN]]
    more = len(changed) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _format_mean(found: Sequence[tuple[float, int]]) -> str:
    """Write the mean over seeds; with its interval where there is more than one, and the examples were counted."""
    accuracies, counts = zip(*found, strict=True)
    mean, low, high = seeds_interval(accuracies, min(counts))
    if len(found) == 1 or not min(counts):
        return format_ratio(mean)
    return format_interval(mean, low, high)


def _format_difference(pairs: Sequence[tuple[Result, Result]]) -> str:
    """Write the mean difference over seeds; with its interval where there is more than one, and examples are paired."""
    differences = [(after.metric("accuracy") or 0) - (before.metric("accuracy") or 0) for before, after in pairs]
    mean = f"{math.fsum(differences) / len(differences):+.3f}"
    examples = [pair_examples(before, after) for before, after in pairs]
    rights = [right for right in examples if right is not None]
    if len(pairs) == 1 or len(rights) < len(pairs):
        return mean
    only_first = [sum(a and not b for a, b in right) / len(right) for right in rights]
    only_second = [sum(b and not a for a, b in right) / len(right) for right in rights]
    _, low, high = paired_seeds_interval(only_first, only_second, min(map(len, rights)))
    return f"{mean} [{low:+.3f}, {high:+.3f}]"


def _text_or_nothing(table: Table) -> str:
    return table.to_text() if table.rows else NOTHING
