"""The extras of pyproject.toml: libraries that only some commands and tasks need."""

from importlib import import_module

from distrib.errors import ConfigError
from distrib.targets import hidden_by

LIBRARIES = {  # by the names that Python imports
    "compare": ("jinja2", "plotly"),
    "examples": ("sklearn",),
    "huggingface": ("datasets", "tokenizers", "transformers"),
    "metrics": ("torchmetrics",),
    "streams": ("torchdata",),
}


def require(extra: str, needed_by: str) -> None:
    """Import the libraries of an extra. Raises ConfigError with the command that installs it if one is missing.

    `needed_by`: what the message begins with, for example `task.target: this task`. Call it before work starts.
    """
    for library in LIBRARIES[extra]:
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
