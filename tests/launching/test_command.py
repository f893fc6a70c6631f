"""What is typed behind `distrib`: options on either side of the config, and one line for what is wrong."""

from typing import Any

import pytest
import typer
from conftest import Run, check, refused
from hypothesis import given
from hypothesis import strategies as st

from distrib import __version__, cli
from distrib.errors import CommandLineError
from distrib.launching.command_line import UsageError, refuse

LAUNCH = typer.main.get_command(cli.app).commands["launch"]  # type: ignore[attr-defined]


def read(*arguments: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Launch's own parameters, and train's, if it is a config that is launched."""
    context = LAUNCH.make_context("distrib launch", list(arguments))
    return context.params, context.obj


OPTIONS = [
    ("--processes", "2"),
    ("--run-dir", "x=y"),
    ("--resume", "never"),
    ("-q",),
    ("--max-restarts=3",),
    ("--fork",),
]


@given(st.permutations([*OPTIONS, ("my.yaml", "seed=1")]))
def test_options_stand_on_either_side_of_the_config(groups: list[tuple[str, ...]]) -> None:
    tokens = [token for group in groups for token in group]
    launch, train = read(*tokens, "train.steps=5")
    assert (launch["processes"], launch["max_restarts"], launch["module"]) == (2, 3, False)
    assert train is not None
    assert (str(train["config"]), train["overrides"]) == ("my.yaml", ["seed=1", "train.steps=5"])
    assert (str(train["run_dir"]), train["resume"], train["quiet"], train["fork"]) == ("x=y", "never", True, True)
    # what each process gets says the same as what was typed
    context = LAUNCH.train_command.make_context("distrib train", list(launch["arguments"]))
    assert context.params == train


@pytest.mark.parametrize("script", [["my_script.py"], ["-m", "my_module"]])
def test_what_stands_behind_a_script_is_the_scripts(script: list[str]) -> None:
    own = ["--processes", "8", "-q", "--run-dir", "x", "--help", "a.yaml", "--", "-m"]
    launch, train = read("--processes", "2", *script, *own)
    assert train is None
    assert launch["processes"] == 2
    assert launch["module"] == ("-m" in script)
    assert launch["arguments"] == [script[-1], *own]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "missing argument"),
        ("my.yaml --procesess 2", "no such option: --procesess (Possible options: --processes"),
        ("my.yaml --processes two", "'--processes'"),
        ("my.yaml --processes", "'--processes' requires an argument"),
        ("my.yaml --max-restarts -1", "'--max-restarts'"),
        ("my.yaml --grace nan", "'--grace'"),
        ("my.yaml --join-timeout inf", "'--join-timeout'"),
        ("--optim.lr=1 my.yaml", "written without dashes"),
        ("my.yaml -m", "-m: give it before the module"),
        ("--run-dir x my.py", "--run-dir: an option of distrib train, which my.py does not read"),
        ("-m --quiet", "missing argument"),
        ("--quiet", "missing argument"),
    ],
)
def test_what_launch_refuses(arguments: str, said: str) -> None:
    with pytest.raises(UsageError) as wrong:
        cli.app(["launch", *arguments.split()], standalone_mode=False)
    with pytest.raises(CommandLineError) as error:
        refuse(wrong.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_commands_and_options_that_are_not_there(run: Run) -> None:
    assert "no such command 'trian'. Did you mean 'train'?" in refused(run("distrib", "trian", "my.yaml"))
    assert "no such option: --resum (Possible options: --resume)" in refused(run("distrib", "train", "--resum", "x"))
    assert check(run("distrib", "--version")) == f"distrib {__version__}\n"
    both = check(run("distrib", "launch", "--help", COLUMNS="120"))
    assert "--max-restarts" in both
    assert "--run-dir" in both
