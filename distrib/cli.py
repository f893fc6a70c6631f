"""The command line: one function a verb, no logic. Imports wait until a verb needs them."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from distrib import __version__
from distrib import arguments as given
from distrib.launching.command_line import LaunchCommand, run_app, show_sign_of_life
from distrib.processes.exit import run_and_end, run_as_member
from distrib.processes.tuning import no_collection

app = typer.Typer(
    name="distrib",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=given.HELP,
)


def _as_member(verb: Callable[..., None]) -> Callable[..., None]:
    """Errors of the user's end in one line and exit code 2, crashes in the failing rank's traceback."""

    @functools.wraps(verb)
    def run(*args: object, **kwargs: object) -> None:
        run_as_member(lambda: verb(*args, **kwargs), verb.__name__)

    return run


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"distrib {__version__}")
        raise typer.Exit


@app.command()
@_as_member
def init(
    files: given.InitFiles = None,
    kind: given.InitKind = None,
    column: given.InitColumn = None,
    name: given.InitName = None,
) -> None:
    """Write a task and a config that train as they stand: on your files, or on made-up points.

    distrib init --from csv table.csv; --from images photos/; --from text book.txt; --from module net:Net data:Points
    """
    from distrib.init_command import write_start

    write_start(kind, files or (), column, name)


@app.command()
@_as_member
def train(
    config: given.ConfigFile,
    overrides: given.Overrides = None,
    run_dir: given.RunDirOption = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            help="auto: go on where the run in this folder was interrupted; never: refuse; PATH: from this checkpoint, "
            "or from the newest of this run folder.",
        ),
    ] = "auto",
    fork: Annotated[bool, typer.Option("--fork", help="Begin a new run from another run's --resume PATH.")] = False,
    moved: given.Moved = None,
    reset_optimizer: Annotated[
        bool,
        typer.Option("--reset-optimizer", help="With --fork: take the weights, and begin the optimizer's state anew."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and errors alone.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show each step, and where its time went.")] = False,
) -> None:
    """Train in this process, or as a member where a launcher (torchrun, accelerate, distrib) started it."""
    if not quiet:
        show_sign_of_life(f"loading {config}")
    from distrib.config import Config

    loaded = Config.load(config, [*(overrides or ()), *(moved or ())])  # before torch, which takes a second to import
    with no_collection():  # of what stays: a sixth of that second
        from distrib.monitor.progress import Verbosity
        from distrib.training import build
        from distrib.training.trainer import Trainer
    verbosity: Verbosity = "quiet" if quiet else "verbose" if verbose else "normal"
    Trainer(
        build.task(loaded),
        loaded,
        run_dir,
        resume=resume,
        fork=fork,
        reset_optimizer=reset_optimizer,
        moved=moved or (),
        verbosity=verbosity,
    ).fit()


class _Launch(LaunchCommand):
    train = staticmethod(train)


@app.command(cls=_Launch)
@_as_member
def launch(
    context: typer.Context,
    arguments: given.LaunchArguments,
    processes: given.Processes = None,
    module: Annotated[bool, typer.Option("-m", help="Run a module of yours: -m MODULE [ARGUMENT]...")] = False,
    max_restarts: given.MaxRestarts = 0,
    grace: given.Grace = 30.0,
    port: given.Port = None,
    nodes: Annotated[int, typer.Option(help="Machines; start this command on each.", min=1)] = 1,
    node_rank: given.NodeRank = None,
    rendezvous: given.Rendezvous = None,
    rendezvous_key: given.RendezvousKey = None,
    join_timeout: given.JoinTimeout = 300.0,
) -> None:
    """Start several training processes on this machine, and end them together.

    Options may stand before and after a config. What stands after a script, or after -m MODULE, is the script's.

    SIGTERM, SIGINT (Ctrl-C), SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU are passed on: the processes save, and all end with
    exit code 75.
    """
    if context.obj is None or not context.obj["quiet"]:
        show_sign_of_life(f"starting {arguments[0] if context.obj is None else context.obj['config']}")
    from distrib.config import Config

    config = None if context.obj is None else Config.load(context.obj["config"], context.obj["overrides"] or ())
    with no_collection():
        from distrib.launching import local
    processes = local.default_processes() if processes is None else processes
    options = local.Options(
        processes, port, nodes, node_rank, rendezvous, rendezvous_key, max_restarts, grace, join_timeout
    )
    if config is None:
        command = local.script_command(arguments, module)
    else:
        command = local.train_command(arguments, config, processes * nodes)
    sys.exit(local.launch(command, options))


@app.command()
@_as_member
def submit(
    config: given.ConfigFile,
    overrides: given.Overrides = None,
    nodes: Annotated[int, typer.Option(help="Machines.", min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="On each of them.", min=0)] = 0,
    processes_per_node: given.ProcessesPerNode = None,
    time: given.TimeOption = None,
    grace: Annotated[int, typer.Option(metavar="SECONDS", help="To save, before the time is over.", min=1)] = 120,
    option: given.SchedulerOptions = None,
    scheduler: given.SchedulerName = None,
    run_dir: given.RunDirOption = None,
    moved: given.Moved = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script, and submit nothing.")] = False,
) -> None:
    """Train as a batch job, for example of SLURM, which saves and is requeued when its time is over."""
    from distrib.config import Config
    from distrib.launching.submit import submit
    from distrib.processes.schedulers.base import Job
    from distrib.processes.schedulers.registry import for_submission

    taker = for_submission(scheduler)
    loaded = Config.load(config, [*(overrides or ()), *(moved or ())])
    job = Job(loaded.name, nodes, gpus_per_node, processes_per_node, time, grace, tuple(option or ()))
    submit(loaded, run_dir, taker, job, dry_run, moved or ())


@app.command()
@_as_member
def explain(
    config: given.ConfigFile,
    overrides: given.Overrides = None,
    processes: Annotated[int, typer.Option(help="For how many processes.", min=1)] = 1,
) -> None:
    """Print what a config comes to: batches, steps, learning rates, memory, DeepSpeed's JSON. Trains nothing."""
    from distrib.config import Config
    from distrib.training.commands import explain_run

    loaded, sources = Config.load_with_sources(config, overrides or ())
    explain_run(loaded, processes, sources)


@app.command()
@_as_member
def evaluate(
    run: given.RunFolder,
    processes: Annotated[int, typer.Option(help="How many share the work.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    checkpoint: given.Checkpoint = "newest",
    weights: given.Weights = "model",
) -> None:
    """Evaluate a checkpoint of a run on the whole evaluation sets. Changes nothing in its folder."""
    if processes > 1:
        from distrib.launching import local

        options = ["--checkpoint", checkpoint, "--weights", weights, *(["--json"] if as_json else [])]
        members = ["-m", "distrib", "evaluate", str(run), *options]
        sys.exit(local.launch(members, local.Options(processes)))
    from distrib.training.commands import evaluate_run

    evaluate_run(run, as_json, checkpoint, weights)


@app.command()
@_as_member
def watch(run: given.RunFolder, checkpoint: given.WatchedCheckpoint = None) -> None:
    """Show a run as it goes on, or went, from its folder: from another terminal, or a cluster's login node."""
    from distrib.monitor.watch import watch_run

    watch_run(run, checkpoint)


@app.command()
@_as_member
def ls(
    folder: given.FolderOfRuns = Path("runs"),
    sort: Annotated[str, typer.Option(metavar="KEY", help="A column, or a metric such as eval/loss.")] = "age",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List the runs in a folder, newest first: state, steps, metrics, speed."""
    from distrib.monitor.listing import list_runs

    list_runs(folder, sort, as_json)


@app.command()
@_as_member
def verify(run: given.RunFolder) -> None:
    """Check a run's ledger against the order that its config means, and its checkpoints against the ledger."""
    from distrib.training.commands import verify_run

    verify_run(run)


@app.command()
@_as_member
def compare(
    runs: given.RunFolders,
    out: Annotated[Path, typer.Option(help="The page; a .png is written beside it.")] = Path("comparison.html"),
    checkpoint: given.Checkpoint = "newest",
) -> None:
    """Compare runs with the first: what differs, where they part and why, final, best and speed figures, curves."""
    from distrib.monitor.compare.command import compare_runs

    compare_runs(runs, out, checkpoint)


@app.command()
@_as_member
def export(
    run: given.RunFolder,
    out: Annotated[Path, typer.Option(help="The folder to write them into.")],
    checkpoint: given.Checkpoint = "newest",
    weights: given.Weights = "model",
    merged: given.Merged = False,
) -> None:
    """Write the weights of a run's checkpoint: as model.safetensors, under the module's own names, for plain torch.

    A task may have a form of its own; those of Hugging Face's models become a folder that from_pretrained reads.
    An adapter becomes a folder of peft's.
    """
    from distrib.training.commands import export_run

    export_run(run, out, checkpoint, weights, merged)


def main() -> None:
    """The entry point of `distrib` and of `python -m distrib`."""
    run_and_end(lambda: run_app(app))
