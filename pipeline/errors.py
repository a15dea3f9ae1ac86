"""Named errors for everything that a user can fix.

Each has one message: what was given, what was expected, what to do. The command line prints the
message and exits with `exit_code`; nothing else in the package prints or exits.
"""

from __future__ import annotations

import errno
import traceback


class TaskpackError(Exception):
    """Base class of all errors that a user can fix."""

    exit_code = 1


class SpecError(TaskpackError, ValueError):
    """A task file, recipe or option is invalid."""

    exit_code = 2


class DataError(TaskpackError):
    """A dataset is missing, damaged or unsuitable for its task."""

    exit_code = 3


class BackboneError(TaskpackError):
    """A backbone is unknown, its checkpoint does not fit, or a recipe attaches nothing to it."""

    exit_code = 4


class BudgetError(TaskpackError):
    """No configuration of the search space fits the byte budget."""

    exit_code = 5


class PackError(TaskpackError):
    """A pack cannot be used. Subclasses tell why."""

    exit_code = 6


class PackForeign(PackError):
    """The file is not a taskpack pack."""


class PackTruncated(PackError):
    """The file is shorter than its header says."""


class PackDamaged(PackError):
    """The content does not match the digest written with it, or contradicts itself."""


class PackVersionError(PackError):
    """The pack has a newer format version than this reader knows."""


class PackBackboneMismatch(PackError):
    """The pack was trained on another backbone."""


class ClusterError(TaskpackError):
    """A Ray cluster cannot be reached, or a stage died on it."""

    exit_code = 7


class WorkerDied(ClusterError):
    """A worker died in every try of a trial."""


class UnexpectedError(ClusterError):
    """Any other exception, of the code or a library: the message is its type and text, `details`
    its traceback.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class RegistryError(TaskpackError):
    """The MLflow server cannot be reached, or has no such model."""

    exit_code = 8


class RegistryUnreachable(RegistryError):
    """The MLflow server, its database or its artifact store is unreachable; the same call may
    succeed later.
    """


class RegistryRefused(RegistryError):
    """The MLflow server denies access to this user or this operation; trying again would not
    help.
    """


class StorageError(TaskpackError):
    """A disk is full or a folder cannot be written."""

    exit_code = 9


class TrainingError(TaskpackError):
    """A recipe cannot be trained. If it diverged, the message names the step and the learning
    rate.
    """

    exit_code = 10


class OutOfMemory(TrainingError):
    """A recipe needs more memory than its device has; the message names the batch, the model and
    the free memory.
    """


class TimeLimitError(TaskpackError):
    """The time limit of a run is too short for a trial and its fit, or was over before a task
    began.
    """

    exit_code = 12


class ServerError(TaskpackError):
    """A server of packs refuses a request, has ended, or cannot be reached."""

    exit_code = 13


class ExportError(TaskpackError):
    """A pack cannot be exported to the requested format, or the export does not compute the
    same.
    """

    exit_code = 11


def named(error: Exception) -> TaskpackError:
    """Convert an exception to a named error."""
    if isinstance(error, TaskpackError):
        return error
    first_line = (str(error).strip().splitlines() or [""])[0][:200]
    details = "".join(traceback.format_exception(error))
    return _full_disk(error) or UnexpectedError(f"{type(error).__name__}: {first_line}", details)


def _full_disk(error: Exception) -> StorageError | None:
    """The error of a full or read-only disk, in this process, in a worker (wrapped by Ray) or in
    safetensors' writer.
    """
    cause = getattr(error, "cause", error)
    if isinstance(cause, OSError) and cause.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
    ):
        return StorageError(
            f"{cause.filename or 'the work folder'}: {cause.strerror}; free space, or choose"
            " another --workdir"
        )
    if "No space left on device" in str(error):
        return StorageError(
            "the work folder, or a node's temporary folder: no space left on device; free space, or"
            " choose another --workdir"
        )
    return None
