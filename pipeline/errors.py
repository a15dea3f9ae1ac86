"""Everything that can go wrong through no fault of taskpack, as named errors.

Each carries one message a user can act on: what was given, what was expected, what to do. The command line prints the message and exits with
`exit_code`; nothing else in the package prints or exits.
"""

from __future__ import annotations

import errno
import traceback


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


class WorkerDied(ClusterError):
    """A worker died at a trial, however often it was tried."""


class UnexpectedError(ClusterError):
    """An exception that has no name here, of the code or a library. The message is its type and text, `details` its traceback."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


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
    """A recipe cannot be trained, now or later. Where it diverged, the message names the step and the learning rate."""

    exit_code = 10


class OutOfMemory(TrainingError):
    """A recipe needs more memory than its device has; the message names the batch, the model and what was free."""


class ExportError(TaskpackError):
    """A pack cannot be written in the format asked for, or what was written does not compute the same."""

    exit_code = 11


def named(error: Exception) -> TaskpackError:
    """The named error that an exception is or amounts to."""
    if isinstance(error, TaskpackError):
        return error
    first_line = (str(error).strip().splitlines() or [""])[0][:200]
    details = "".join(traceback.format_exception(error))
    return _full_disk(error) or UnexpectedError(f"{type(error).__name__}: {first_line}", details)


def _full_disk(error: Exception) -> StorageError | None:
    """What an error says of the disk: one of this process, of a worker (Ray wraps it), or of safetensors' writer."""
    cause = getattr(error, "cause", error)
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return StorageError(f"{cause.filename or 'the work folder'}: {cause.strerror}; free space, or choose another --workdir")
    if "No space left on device" in str(error):
        return StorageError("the work folder, or a node's temporary folder: no space left on device; free space, or choose another --workdir")
    return None
