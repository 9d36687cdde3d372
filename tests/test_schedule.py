"""The order of stages on several places: every stage once and after its parents, and no training behind a probe."""

import random
from pathlib import Path

from coconut.pipeline.dvc_file import Stage, read_pipeline
from coconut.pipeline.forecast import simulate
from coconut.pipeline.schedule import Schedule
from coconut.pipeline.status import parents_of


def random_stages(draw: random.Random) -> dict[str, Stage]:
    stages = {}
    for number in range(draw.randint(1, 14)):
        parents = draw.sample(range(number), min(number, draw.choice([0, 1, 1, 1, 2, 5])))
        deps = tuple(f"out{parent}" for parent in parents)
        stages[f"s{number}"] = Stage(f"s{number}", "true", deps, (), (f"out{number}",))
    return stages


def test_every_stage_is_given_out_once_and_after_all_that_it_needs():
    for seed in range(300):
        give_out_random_stages(seed)


def give_out_random_stages(seed):
    draw = random.Random(seed)
    stages = random_stages(draw)
    left = {name for name in stages if draw.random() < 0.8}
    # What is left pulls in what depends on it, as a changed stage does.
    while more := {name for name in stages if parents_of(stages[name], stages) & left} - left:
        left |= more
    schedule, num_places = Schedule(stages, left), draw.randint(1, 4)
    running, done, failed, order = [], set(stages) - left, set(), []
    while True:
        while len(running) < num_places and (bundle := schedule.next_bundle(num_places)):
            before = set(done)
            for name in bundle:
                assert parents_of(stages[name], stages) <= before, "in a bundle every stage comes after its parents"
                before.add(name)
            running.append(bundle)
        if not running:
            break
        bundle = draw.choice(running)
        if (event := draw.random()) < 0.8:
            # What waits for this stage need not wait for the rest of its process.
            name = bundle.pop(0)
            schedule.finish([name])
            done.add(name)
            order.append(name)
        elif event < 0.9:
            failed.add(bundle[0])
            schedule.fail(bundle[0])
        if event >= 0.8 or not bundle:
            running.remove(bundle)
            schedule.take_back(set(bundle) - schedule.blocked)
    assert sorted(order) == sorted(set(order))
    hit = set(failed)
    while more := {name for name in stages if parents_of(stages[name], stages) & hit} - hit:
        hit |= more
    assert set(order) | hit >= left
    assert not set(order) & hit
    assert not schedule.left
    assert schedule.blocked == hit


PARENTS = {"cot": "", "latent_1": "cot", "latent_2": "latent_1", "latent_3": "latent_2", "no_cot": "cot"}
KINDS = {"train": 10.0, "evaluate": 3.0, "probe": 5.0}


def curriculum() -> dict[str, Stage]:
    """Return a curriculum with a control, an evaluation and a probe of every entry, and a report."""
    stages = {}
    for kind in KINDS:
        for entry, parent in PARENTS.items():
            above = parent if kind == "train" else entry
            outs = (entry,) if kind == "train" else (f"{kind}d/{entry}",)
            stages[f"{kind}@{entry}"] = Stage(f"{kind}@{entry}", "true", (above,) if above else (), (), outs)
    stages["report"] = Stage("report", "true", ("evaluated", "probed"), (), ("page",))
    return stages


def test_the_longest_chain_of_trainings_never_waits_for_an_evaluation():
    stages = curriculum()
    seconds = {name: KINDS.get(name.partition("@")[0], 1.0) for name in stages}
    assert simulate(stages, seconds, 1) == 5 * 10 + 5 * 3 + 5 * 5 + 1
    assert simulate(stages, seconds, 3) == 4 * 10 + 5 + 1, "four trainings in a row, the last probe, the report"
    # Two places: all of it takes 90 seconds, and no place may stand still for long.
    assert simulate(stages, seconds, 2) <= (5 * 10 + 5 * 3 + 5 * 5) / 2 + 10 / 2 + 5 + 1


def test_a_control_starts_before_the_evaluation_of_a_chain_that_has_ended():
    schedule = Schedule(stages := curriculum(), stages)
    assert schedule.next_bundle(1) == ["train@cot", "train@latent_1", "train@latent_2", "train@latent_3"]
    schedule.finish(["train@cot", "train@latent_1", "train@latent_2", "train@latent_3"])
    assert schedule.next_bundle(1)[0] == "train@no_cot"


def test_stages_are_free_once_their_own_parents_are_done():
    schedule = Schedule(stages := curriculum(), stages)
    assert schedule.next_bundle(2)[:2] == ["train@cot", "train@latent_1"]
    assert schedule.next_bundle(2) == [], "all else waits for the first training"
    schedule.finish(["train@cot"])
    assert schedule.next_bundle(2)[0] == "train@no_cot", "the process that trains has not ended yet"
    assert schedule.ready() == ["evaluate@cot", "probe@cot"]


def test_the_default_trains_its_longest_chains_first():
    stages = read_pipeline(Path(__file__).parents[1])
    left = [name for name in stages if name.partition("@")[0] in ("train", "evaluate", "probe", "report")]
    schedule = Schedule(stages, left)
    latent = schedule.next_bundle(2)
    assert latent == ["train@cot", "train@latent_1", "train@latent_2", "train@latent_3"]
    assert schedule.next_bundle(2) == [], "all else waits for it"
    schedule.finish(["train@cot"])
    assert schedule.next_bundle(2)[0] in ("train@no_thoughts_1", "train@pause_1"), "the shortest chain waits"
