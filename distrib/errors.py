"""What can go wrong for a reason the user can mend. Each is shown as one line, without a traceback."""


class DistribError(Exception):
    """Says what was given, what is wrong and what to do. The command line ends with `exit_code`."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        if "\nOriginal Traceback " in message:  # a DataLoader raises what its worker raised, with its traceback
            message = message.rstrip().rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(message)


class CommandLineError(DistribError):
    """An option or argument of a command is missing, unknown or has a wrong value."""


class ConfigError(DistribError):
    """The config, or the task it names, cannot be run as written."""


class LaunchError(DistribError):
    """The launcher's variables, the number of processes or the rendezvous do not fit."""


class RunDirError(DistribError):
    """A run folder, or one to write into, cannot be used: it is taken, missing or unreadable."""


class DamagedFileError(RunDirError):
    """A file of a run folder cannot be read, or does not hold what it must."""


class WriteError(DistribError):
    """A file of the run cannot be written, for example because the disk is full. The run can go on when it can."""

    exit_code = 1


class CheckpointError(DistribError):
    """A checkpoint is missing, incomplete or does not match its manifest."""

    exit_code = 1


class MismatchError(CheckpointError):
    """A checkpoint is whole, but of another model or optimizer than the config's."""

    exit_code = 2


class LedgerError(DistribError):
    """What a run folder holds is not what its config means."""

    exit_code = 1


class Preempted(DistribError):  # noqa: N818, it is an end, not an error
    """Asked to stop: a checkpoint is saved, and the run goes on when it is started again."""

    exit_code = 75


class TrainingError(DistribError):
    """Training cannot go on, for example because `train.on_nonfinite: stop` was asked for."""

    exit_code = 1
