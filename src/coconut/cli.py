"""The command `coconut`: everything that `make` and a user run by hand.

The modules behind the subcommands are imported inside them, so that help texts and shell completion
do not wait for DVC, matplotlib or torch.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from coconut.files import explain
from coconut.report.text import visible

_ROOT = Path()
"""Every subcommand works in the repository's top folder, as `dvc` and `make` do."""

app = typer.Typer(
    name="coconut",
    help="Run the pipeline unattended, watch it, and read its results. Run it in the repository's top folder.",
    epilog="Exit code: 0 success, 1 an error or a failed stage, 2 wrong arguments, 128 + n ended by signal n.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        import coconut

        typer.echo(f"coconut {coconut.__version__}")
        raise typer.Exit


@app.command()
def status() -> None:
    """Show what runs, waits, failed or is done.

    For a training it says how far it is. It takes no lock and works while `dvc repro` runs. Of an output over 50 MB it
    compares the size alone, not the content, so that it answers at once; `dvc status` reads all of it.
    """
    from coconut.pipeline.forecast import run_status

    _end_with(lambda: run_status(_ROOT))


@app.command()
def plan(
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=0, help="Stages at once. 0: as many as the machine has room for.")
    ] = 0,
    measure: Annotated[bool, typer.Option(help="Measure a few updates and questions of each kind of stage.")] = True,
) -> None:
    """Say what would run, why, and how long it takes.

    It measures on this machine, names the hour of the end, and compares memory and disk with what is free. Exit code
    1 if something does not fit.
    """
    from coconut.planning.plan import run

    _end_with(lambda: run(_ROOT, jobs=jobs or None, measures=measure))


@app.command()
def repro(
    targets: Annotated[
        list[str] | None, typer.Argument(help="Stages to bring up to date, with all they need. Default: all stages.")
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=0, help="Stages at once. 0: as many as the machine has room for.")
    ] = 0,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", "-k", help="Run what does not depend on a failed stage.")
    ] = False,
) -> None:
    """Run `dvc repro`, branches side by side.

    Stages that do not wait for each other run at once, one on each GPU where there are several. With one job it is
    `dvc repro` itself.
    """
    from coconut.pipeline.repro import run

    _end_with(lambda: run(_ROOT, targets or [], jobs=jobs or None, keeps_going=keep_going))


@app.command()
def overnight(
    targets: Annotated[
        list[str] | None, typer.Argument(help="Stages to bring up to date, with all they need. Default: all stages.")
    ] = None,
    tries: Annotated[int, typer.Option(min=1, help="Tries in a row that may bring no progress.")] = 6,
    pause_s: Annotated[
        float, typer.Option(min=0, help="Seconds before the second try; doubled while tries bring no progress.")
    ] = 10.0,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=0, help="Stages at once. 0: as many as the machine has room for.")
    ] = 1,
) -> None:
    """Run `dvc repro -k` unattended, with retries.

    It ends when everything is up to date or cannot go on, and prints a summary. It repairs what a killed dvc left,
    goes on with what does not depend on a failed stage, and retries while retrying may help. SIGTERM, SIGINT and
    SIGHUP end it after the training's state is saved. Where something failed, a page of what there is goes to
    outputs/partial-report.
    """
    from coconut.pipeline.overnight import run

    _end_with(lambda: run(_ROOT, targets or [], num_tries=tries, pause_s=pause_s, jobs=jobs or None))


@app.command()
def recipe(
    name: Annotated[
        str | None, typer.Argument(help="A file of recipes/, without .yaml; default is the shipped set-up.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an edited params.yaml without asking.")] = False,
) -> None:
    """List the recipes, or write the params.yaml of one.

    It asks before it overwrites a params.yaml that is neither the committed one nor what a recipe gives.
    """
    from coconut.recipes import run

    _end_with(lambda: run(name, is_forced=force))


@app.command()
def model(
    name: Annotated[str, typer.Argument(help="smollm2: SmolLM2-135M-Instruct, Apache License 2.0.")],
    folder: Annotated[
        Path | None, typer.Argument(help="Where it is written, a new folder. Default: below models/.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Keep the first so many layers. Default: all.")] = None,
) -> None:
    """Write a pretrained model that a Python package carries.

    It needs no hub: the weights come from a package of the registry, and the message says which one where it is not
    installed, with its licence and size.
    """
    from coconut.checkpoints.packaged import run

    _end_with(lambda: run(name, folder, num_layers=layers))


@app.command()
def table() -> None:
    """Print the accuracy of every entry.

    Rows that are not of the present params, code and data are marked.
    """
    from coconut.report.terminal import run_table

    _end_with(run_table)


@app.command()
def compare(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Experiments, git revisions or 'workspace'. Default: all experiments of this commit."),
    ] = None,
) -> None:
    """Compare experiments over seeds and examples.

    Experiments that differ only in the seed form a group, which gets a mean and an interval; groups are then
    compared by paired tests. A page with their curves over each other is written too, and its path printed last.
    """
    from coconut.report.terminal import run_compare

    _end_with(lambda: run_compare(names or []))


@app.command()
def report() -> None:
    """Print the path of the page with all results.

    Where the stage `report` is not up to date, as after a failed night, it first writes a page of what there is to
    outputs/partial-report.
    """
    from coconut.report.terminal import run_report

    _end_with(run_report)


_QUESTIONS = Annotated[list[str], typer.Argument(help="Questions, each in quotes.")]
_ENTRY = Annotated[
    str, typer.Option(help="Entry of the curriculum, or folder of a checkpoint. Default: the last latent entry.")
]
_THOUGHTS = Annotated[
    int | None, typer.Option(min=0, help="Thoughts before the answer; with fewer than in training the rest is said.")
]


@app.command()
def solve(
    questions: _QUESTIONS,
    entry: _ENTRY = "",
    thoughts: _THOUGHTS = None,
    samples: Annotated[int, typer.Option(min=0, help="Answers that are drawn beside the most probable one.")] = 0,
    temperature: Annotated[float, typer.Option(min=0, help="Of the samples' tokens.")] = 0.7,
) -> None:
    """Answer questions with a trained entry.

    With samples it also shows how often each answer was drawn.
    """
    from coconut.terminal import run

    ask = partial(run, questions, entry=entry, num_thoughts=thoughts, shows_thoughts=False)
    _end_with(lambda: ask(num_samples=samples, temperature=temperature))


@app.command()
def think(questions: _QUESTIONS, entry: _ENTRY = "", thoughts: _THOUGHTS = None) -> None:
    """Answer questions and show the thoughts.

    A line stands for a thought: the tokens that the output head reads in it, with bars for their probabilities.
    """
    from coconut.terminal import run

    _end_with(lambda: run(questions, entry=entry, num_thoughts=thoughts, shows_thoughts=True))


@app.command()
def chat(entry: _ENTRY = "") -> None:
    """Answer questions in one process, one a line.

    It loads the model once. /thoughts shows what each thought about the last question says, /replace 1 node 7 puts a
    word in place of a thought, /help lists the commands, /quit or the end of the input ends. Without a terminal it
    reads the standard input.
    """
    from coconut.terminal import chat as run

    _end_with(lambda: run(entry))


@app.command()
def push(
    entry: Annotated[str, typer.Argument(help="Entry of the curriculum whose checkpoint is uploaded.")],
    hub_id: Annotated[str, typer.Argument(help="Repository on the hub, owner/name; it is made if it is not there.")],
    dry_run: Annotated[bool, typer.Option(help="Print the files and the model card, and upload nothing.")] = False,
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
) -> None:
    """Upload an entry's checkpoint to a model hub.

    It goes with a model card that holds how it was trained, its results with their intervals, and how to load it.
    """
    from coconut.publish import push as run

    _end_with(lambda: run(entry, hub_id, dry_run=dry_run, private=private))


@app.command()
def prune() -> None:
    """Delete resume states that nothing would use.

    These are states of finished stages, and of other parameters, code or data.
    """
    from coconut.pipeline.overnight import run_prune

    _end_with(lambda: run_prune(_ROOT))


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def submit(
    words: Annotated[
        list[str], typer.Argument(metavar="OPTIONS -- COMMAND", help="Options of sbatch, and a stage's command.")
    ],
) -> None:
    """Run a stage as a job of Slurm and wait for it.

    It is meant as `runtime.launcher: coconut submit --nodes=1 --gpus-per-node=8 --`. Where a job of the stage runs
    already, it waits for that one. See docs/slurm.md.
    """
    from coconut.pipeline.submit import run

    _end_with(lambda: run(words))


@app.command("check-method")
def check_method(
    name: Annotated[str, typer.Argument(metavar="METHOD", help="A file of src/coconut/methods, without .py.")],
    keys: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A key of the method; may be repeated.")
    ] = None,
) -> None:
    """Prove what the pipeline relies on in a method.

    On tiny weights: the same gradient for every cut of an update and for two processes, the same bytes after a
    resume, labels only where a target is, no chance but the row's own, and the fast path like the plain one. It takes
    seconds.
    """
    from coconut.training.method_check import run

    _end_with(lambda: run(name, keys or []))


@app.command()
def repair() -> None:
    """Repair what a killed dvc left behind.

    These are stale locks, a torn rwlock and a torn dvc.lock. What a living dvc holds stays as it is. It prints what
    it did, or nothing.
    """
    from coconut.pipeline.dvc_lock import run

    _end_with(lambda: run(_ROOT))


def _end_with(run: Callable[[], int]) -> None:
    """Exit with what `run` returns; a user's mistake becomes one message and exit code 1."""
    try:
        exit_code = run()
    except BrokenPipeError:
        raise  # The reader of our output has gone, as in `coconut table | head`; typer ends silently.
    except (ValueError, OSError) as error:
        # Line by line: a message may quote a name or a value that holds what a terminal obeys.
        lines = map(visible, explain(error).split("\n"))
        typer.echo("coconut: " + "\n".join(lines), err=True)
        exit_code = 1
    raise typer.Exit(exit_code)


def main() -> None:
    """Run the command line."""
    app(prog_name="coconut")
