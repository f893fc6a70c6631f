"""The command line of `distrib launch`: its own options and train's, on either side of the config."""

import copy
from typing import Any

import typer
from typer.core import TyperCommand


class LaunchCommand(TyperCommand):
    """Takes the options of `train`, a Typer command's function, beside its own: one added there is known here.

    Behind a script, or behind -m MODULE, everything belongs to the script.
    """

    train: Any  # the function; set by a subclass

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        alone = typer.Typer(add_completion=False)
        alone.command()(type(self).train)
        self.train_command = typer.main.get_command(alone)
        self.train_options = [
            copy.copy(param) for param in self.train_command.params if param.param_type_name == "option"
        ]
        for option in self.train_options:
            option.expose_value = False  # launch hands them on, as they were given
            option.rich_help_panel = "Options of distrib train"  # type: ignore[attr-defined]
        self.params += self.train_options

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Sort what is given: own options, then what the processes get. `ctx.obj`: train's arguments, if it trains."""
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
    """An option as it is given on a command line; `value`: as the parser read it."""
    name = max(option.opts, key=len)
    if option.is_flag:
        return [name if value else max(option.secondary_opts, key=len)]
    values = value if option.multiple else [value]
    return [token for one in values for token in (name, one)]
