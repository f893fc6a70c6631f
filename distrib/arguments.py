"""Command-line arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.")]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", help="The run folder.  [default: runs/NAME]", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, for example optim.lr=0.01 train.epochs=2."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, for example runs/digits.")]
Moved = Annotated[
    list[str] | None,
    typer.Option(metavar="task.KEY=PATH", help="Resume with data at a new path, if they are the same data."),
]
