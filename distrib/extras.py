"""The optional dependencies (extras of pyproject.toml), which only some commands and tasks need."""

from importlib import import_module

from distrib.errors import ConfigError
from distrib.targets import hidden_by

LIBRARIES = {  # extra -> import names
    "compare": ("jinja2", "plotly"),
    "examples": ("sklearn",),
    "huggingface": ("datasets", "peft", "tokenizers", "transformers"),
    "metrics": ("torchmetrics",),
    "streams": ("torchdata",),
}


def require(extra: str, needed_by: str, *libraries: str) -> None:
    """Import libraries of an extra, by default all. Raises ConfigError if one is missing, and names the command that
    installs it.

    `needed_by`: the beginning of the message, for example `task.target: this task`. Call this before work starts.
    """
    for library in libraries or LIBRARIES[extra]:
        if hidden := hidden_by(library):
            raise ConfigError(
                f"{needed_by} needs the library {library}, but {hidden} is imported in its place; rename that"
            )
        try:
            import_module(library)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{needed_by} needs {error.name}, which is not installed; pip install 'distrib[{extra}]'"
            ) from None
