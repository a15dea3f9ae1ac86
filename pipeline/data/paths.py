"""Reading a file that a user named."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import DataError


def read_path(path: str | os.PathLike[str], name: str, a_noun: str) -> bytes:
    """The content of a file. Raises DataError, which calls it `name`; it should be `a_noun`."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{name}: no such {a_noun.partition(' ')[2]}; check the path") from None
    except IsADirectoryError:
        raise DataError(f"{name}: is a folder; expected {a_noun}") from None
    except OSError as error:
        raise DataError(
            f"{name}: cannot be read ({error.strerror}); check the path and the permissions"
        ) from None
    except ValueError:  # NUL, or half a surrogate pair
        raise DataError(
            f"{name!r}: holds what no path can; expected the path of {a_noun}"
        ) from None
