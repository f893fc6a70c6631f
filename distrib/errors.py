"""Errors that the user can fix. The command line prints each as one line, without a traceback."""

from collections.abc import Callable, Iterable, Sequence


class DistribError(Exception):
    """Base class. The message names what was given, what is wrong and what to do. `exit_code`: of the command."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        if "\nOriginal Traceback " in message:  # a DataLoader puts its worker's traceback into the message
            message = message.rstrip().rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(message)


class CommandLineError(DistribError):
    """An option or argument of a command is missing, unknown or has a wrong value."""


class ConfigError(DistribError):
    """The config, or the task it names, is wrong."""


class LaunchError(DistribError):
    """The launcher's environment variables, the number of processes or the rendezvous are wrong."""


class RunDirError(DistribError):
    """A folder cannot be used as run folder or output folder: it is taken, missing or unreadable."""


class DamagedFileError(RunDirError):
    """A file of a run folder cannot be read, or its content is not valid."""


class WriteError(DistribError):
    """A file of the run cannot be written, for example because the disk is full. Start the run again to resume."""

    exit_code = 1


class CheckpointError(DistribError):
    """A checkpoint is missing, incomplete or does not match its manifest."""

    exit_code = 1


class MismatchError(CheckpointError):
    """A checkpoint is intact, but it was saved with another model or optimizer than the config's."""

    exit_code = 2


class LedgerError(DistribError):
    """The files of a run folder contradict its config."""

    exit_code = 1


class Preempted(DistribError):  # noqa: N818, an orderly end, not an error
    """The run was asked to stop, and saved a checkpoint. It resumes when it is started again."""

    exit_code = 75


class TrainingError(DistribError):
    """Training cannot continue, for example because a loss is not finite and the config has `on_nonfinite: stop`."""

    exit_code = 1


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", shown: Callable[[str], str] = str) -> str:
    """Return `, did you mean NAME?` with the nearest of the `known` names as it is `shown`, or `otherwise`."""
    import difflib  # a run without mistakes does not need it

    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {shown(close[0])}?" if close else otherwise


def and_more(texts: Sequence[str], most: int, between: str = ", ", last: str = " and") -> str:
    """Join the first `most` texts and the number of the others: `a, b and 3 more`."""
    more = len(texts) - most
    return between.join(texts[:most]) + (f"{last} {more} more" if more > 0 else "")
