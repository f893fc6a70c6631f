"""Runs the command line: prints usage errors as one line, and lets `distrib launch` accept train's options too."""

import copy
import functools
import io
import os
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from distrib.errors import CommandLineError
from distrib.processes.exit import run_as_member, without_local_rank

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # Typer uses click, or its own copy of click


def run_app(app: typer.Typer) -> NoReturn:
    """Run the command that sys.argv names, and exit with its code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # so that printing never raises, whatever the locale
    try:
        code = app(args=without_local_rank(sys.argv[1:]) or ["--help"], prog_name="distrib", standalone_mode=False)
    except UsageError as error:
        code = run_as_member(functools.partial(refuse, error))
    sys.exit(code)


def show_sign_of_life(what: str) -> None:
    """Print a line at once if stderr is a terminal, because importing the libraries takes seconds."""
    if sys.stderr.isatty() and "RANK" not in os.environ:
        print(f"distrib: {what}", file=sys.stderr, flush=True)


def refuse(error: Any) -> NoReturn:
    """Turn a usage error into an error of one line. Raises CommandLineError."""
    message = " ".join(error.format_message().split()).rstrip(".")
    if "." in getattr(error, "option_name", ""):
        message += ". A config key is written without dashes, key=value"
    command = "distrib" if error.ctx is None else error.ctx.command_path
    raise CommandLineError(f"{message[0].lower()}{message[1:]}; see {command} --help")


class LaunchCommand(TyperCommand):
    """A command that also accepts the options of `train`, which it reads from that command's function.

    All arguments after a script, or after -m MODULE, are passed to it unchanged.
    """

    train: Any  # the Typer command's function; set by a subclass

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        alone = typer.Typer(add_completion=False)
        alone.command()(type(self).train)
        self.train_command = typer.main.get_command(alone)
        self.train_options = [
            copy.copy(param) for param in self.train_command.params if param.param_type_name == "option"
        ]
        for option in self.train_options:
            option.expose_value = False  # launch passes them on as they were given
            option.rich_help_panel = "Options of distrib train"  # type: ignore[attr-defined]
        self.params += self.train_options

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Split the arguments into launch's options and those of the processes. Set `ctx.obj` to train's parameters, if
        the processes run `distrib train`."""
        parser = self.make_parser(ctx)
        parser.allow_interspersed_args = False
        values, _, order = parser.parse_args(list(args))
        command = list(values["arguments"] or ())
        runs_script = values.get("module", False) or (bool(command) and command[0].endswith(".py"))
        if not runs_script:
            parser.allow_interspersed_args = True
            values, _, order = parser.parse_args(list(args))
            command = list(values["arguments"] or ())
            if values.get("module", False):
                ctx.fail(f"-m: give it before the module; {command[0]} is read as a config")
        own: list[str] = []
        trains: list[str] = []
        for param in dict.fromkeys(order):
            if param.param_type_name == "option":
                (trains if param in self.train_options else own).extend(_tokens(param, values[param.name]))
        if command and runs_script and trains:
            ctx.fail(f"{trains[0]}: an option of distrib train, which {command[0]} does not read")
        if command and not runs_script:
            command = [*trains, *command]
            with self.train_command.make_context("distrib train", list(command), parent=ctx.parent) as train:
                ctx.obj = train.params
        return super().parse_args(ctx, [*own, "--", *command])


def _tokens(option: Any, value: Any) -> list[str]:
    """Return an option as it is written on a command line. `value`: as the parser read it."""
    name = max(option.opts, key=len)
    if option.is_flag:
        return [name if value else max(option.secondary_opts, key=len)]
    values = value if option.multiple else [value]
    return [token for one in values for token in (name, one)]
