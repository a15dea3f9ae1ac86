"""Everything that can go wrong through no fault of taskpack, as named errors.

Each carries one message a user can act on: what was given, what was expected, what to do. The command line prints the message and exits with
`exit_code`; nothing else in the package prints or exits.
"""


class TaskpackError(Exception):
    """Base of all errors that a user can mend."""

    exit_code = 1


class SpecError(TaskpackError, ValueError):
    """A task file, recipe or option is not valid."""

    exit_code = 2


class DataError(TaskpackError):
    """A dataset is missing, damaged or unfit for its task."""

    exit_code = 3


class BackboneError(TaskpackError):
    """A backbone is unknown, its checkpoint does not fit, or a recipe attaches nothing to it."""

    exit_code = 4


class BudgetError(TaskpackError):
    """No configuration of the search space fits the byte budget."""

    exit_code = 5


class PackError(TaskpackError):
    """A pack cannot be used. Subclasses name each way."""

    exit_code = 6


class PackForeign(PackError):
    """The file is not a taskpack pack."""


class PackTruncated(PackError):
    """The file ends before its header says so."""


class PackDamaged(PackError):
    """The content does not match the digest written with it, or contradicts itself."""


class PackVersionError(PackError):
    """The pack was written by a newer format version than this reader knows."""


class PackBackboneMismatch(PackError):
    """The pack was trained on another backbone."""


class ClusterError(TaskpackError):
    """A Ray cluster cannot be reached or a stage died on it."""

    exit_code = 7


class RegistryError(TaskpackError):
    """The MLflow server cannot be reached, or holds no such model."""

    exit_code = 8


class RegistryAway(RegistryError):
    """The MLflow server, its database or its artifact store does not answer now; the same call may succeed later."""


class RegistryRefused(RegistryError):
    """The MLflow server answers and does not let this user in, or not do this; trying again changes nothing."""


class StorageError(TaskpackError):
    """A disk is full or a folder cannot be written."""

    exit_code = 9


class TrainingError(TaskpackError):
    """Training diverged; the message names the step and the learning rate."""

    exit_code = 10


class ExportError(TaskpackError):
    """A pack cannot be written in the format asked for, or what was written does not compute the same."""

    exit_code = 11
