"""What a user can get wrong: each error is one sentence, and the command line ends with exit code 2 on it."""

INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended


class UserError(ValueError):
    """Base of the errors that a user, and not a bug, causes."""


class ConfigError(UserError):
    """A configuration that cannot be run."""


class DataError(UserError):
    """Data that is missing, malformed or cannot be split as asked."""


class DivergedError(UserError):
    """Training that has left the finite numbers."""


class CheckpointError(UserError):
    """A results directory that may not be written to, or a checkpoint that does not belong to the run."""


class WorkerError(UserError):
    """Processes or nodes that do clients' work and do not come back with it."""
