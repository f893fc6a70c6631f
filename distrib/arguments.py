"""The text of `distrib --help`, and arguments and options of the commands."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

HELP = """Train PyTorch models on many processes. A run is a function of its config.

Start with:  distrib launch --processes 2 configs/digits.yaml

The same run in one process:  distrib train configs/digits.yaml --run-dir runs/alone

A task and a config for your own files:  distrib init --from csv table.csv

On a cluster:  distrib submit configs/digits.yaml --nodes 2 --gpus-per-node 2 --time 4:00:00

What the numbers come to, without running:  distrib explain configs/digits.yaml --processes 2

A finished run's metrics again:  distrib evaluate runs/digits

Whether it is the run that its config means:  distrib verify runs/digits

Its weights for plain torch:  distrib export runs/digits --out exported

A run that goes on, from another terminal:  distrib watch runs/digits

All runs in a folder:  distrib ls runs

Where runs differ, and why:  distrib compare runs/digits runs/other

Exit codes: 0 done, 1 failed, 2 the input is wrong (one line says what), 75 asked to stop: saved, start again."""


def _offer(what: str) -> Callable[[typer.Context, str], list[str]]:
    """Return that function of completion.py, which is imported when a user presses Tab, for an argument."""

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        from distrib import completion

        before = [word for name in ("overrides", "arguments") for word in ctx.params.get(name) or ()]
        found: list[str] = getattr(completion, what)(before, incomplete)
        return found

    return complete


ConfigFile = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.", autocompletion=_offer("configs")),
]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", help="The run folder.  [default: runs/NAME]", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides, for example optim.lr=0.01 train.epochs=2.",
        autocompletion=_offer("overrides"),
    ),
]
RunFolder = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run folder, for example runs/digits.", autocompletion=_offer("run_folders")),
]
RunFolders = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN RUN...",
        help="Run folders, or folders that wandb left offline.",
        autocompletion=_offer("run_folders"),
    ),
]
FolderOfRuns = Annotated[Path, typer.Argument(metavar="[DIR]", help="A folder of runs.")]
Checkpoint = Annotated[str, typer.Option("--checkpoint", metavar="newest|best|STEP", help="Which checkpoint.")]
WatchedCheckpoint = Annotated[
    str | None, typer.Option("--checkpoint", metavar="newest|best|STEP", help="Show this checkpoint's metrics too.")
]
Weights = Annotated[
    str, typer.Option("--weights", metavar="model|ema", help="The weights, or their average (train.ema).")
]
Merged = Annotated[
    bool, typer.Option("--merged", help="Of a run with an adapter: whole weights, with the adapter added to them.")
]
Moved = Annotated[
    list[str] | None,
    typer.Option(metavar="task.KEY=PATH", help="Resume with data at a new path, if they are the same data."),
]
TimeOption = Annotated[
    str | None, typer.Option(help="At most, as the scheduler writes it: 4:00:00.  [default: the scheduler's]")
]
SchedulerOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "--slurm", metavar="NAME=VALUE", help="Further options of the scheduler's own: partition=long."
    ),
]
SchedulerName = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="NAME",
        help="Which one takes the job.  [default: the only one that can, slurm]",
        envvar="DISTRIB_SCHEDULER",
        show_default=False,
        show_envvar=False,
    ),
]
InitFiles = Annotated[list[str] | None, typer.Argument(metavar="[FILE|NAME]...", help="Your files.")]
InitKind = Annotated[str | None, typer.Option("--from", metavar="csv|images|text|module", help="What they are.")]
InitColumn = Annotated[
    str | None, typer.Option("--column", help="Of a CSV file: what to predict.  [default: the last]")
]
InitName = Annotated[str | None, typer.Option("--name", help="Of the run and of the files.  [default: from your file]")]
LaunchArguments = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG [KEY=VALUE]... | SCRIPT.py [ARGUMENT]...",
        help="What `distrib train` takes, or a Python script of yours with its arguments.",
        autocompletion=_offer("configs_and_scripts"),
    ),
]
NodeRank = Annotated[int | None, typer.Option(help="Which of the machines this is, from 0.")]
ProcessesPerNode = Annotated[
    int | None, typer.Option(help="On each of them.  [default: one for each GPU, else 1]", show_default=False)
]
Processes = Annotated[
    int | None,
    typer.Option(help="How many to start.  [default: one for each accelerator, else 1]", show_default=False),
]
MaxRestarts = Annotated[
    int,
    typer.Option(help="After a crash start all again so many times, from the newest checkpoint.", min=0, max=10**6),
]
Grace = Annotated[
    float,
    typer.Option(
        metavar="SECONDS", help="To save, from being asked to stop.", min=0, max=10**8, envvar="DISTRIB_GRACE"
    ),
]
Port = Annotated[int | None, typer.Option(help="Where the processes meet.  [default: a free port]", show_default=False)]
Rendezvous = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Where machine 0 can be reached, the same on all.")
]
RendezvousKey = Annotated[
    str | None,
    typer.Option(
        metavar="SECRET",
        help="Several machines need one, the same on all. Better in the variable: command lines can be seen.",
        envvar="DISTRIB_RENDEZVOUS_KEY",
    ),
]
JoinTimeout = Annotated[
    float,
    typer.Option(
        metavar="SECONDS", help="Within which all must have come.", min=1, max=10**8, envvar="DISTRIB_JOIN_TIMEOUT"
    ),
]
