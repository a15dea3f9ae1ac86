"""Image folders: one folder per class inside each split's folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.data.faults import Faults, printable
from pipeline.data.images import Images
from pipeline.data.modality import Modality
from pipeline.errors import DataError

_LITTER = ("thumbs.db", "desktop.ini", "icon\r", "@eadir", "__macosx", "$recycle.bin")
"""Files that desktops and network storage leave behind, besides hidden files."""


def labelled_files(
    folder: Path, faults: Faults, modality: type[Modality] = Images
) -> list[tuple[Path, str]]:
    """The files below `folder` in a fixed order, each with the name of its class's folder.

    Links to folders are followed. Other files are added to `faults`. Raises DataError if a folder
    is missing, empty or cannot be read.
    """
    noun = f"{modality.noun}s"
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise DataError(
            f"{folder}: {found}; expected a folder that holds a folder of {noun} for each class"
        )
    shown = [path for path in _entries(folder) if _is_shown(path.name)]
    class_folders = [path for path in shown if path.is_dir()]
    for path in shown:
        if not path.is_dir() and (_has_extension(path, modality) or _is_broken_link(path)):
            faults.add(
                _why_not_a_file(path)
                or f"{path}: a file next to the class folders; move it into one of them, or"
                " elsewhere"
            )
    if not class_folders:
        raise DataError(f"{folder}: holds no folders; expected a folder of {noun} for each class")
    for path in class_folders:
        if not _is_utf8(path.name):
            raise DataError(
                f"{printable(str(path))}: the name of this class is not UTF-8 text; rename the"
                " folder"
            )
    return [
        (path, class_folder.name)
        for class_folder in class_folders
        for path in _files_of_class(class_folder, faults, modality)
    ]


def images_below(folder: Path, faults: Faults) -> list[Path]:
    """The images below `folder` in a fixed order. Other files are added to `faults`. Raises
    DataError if the folder is missing, empty or cannot be read.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {found}; expected a folder of images")
    files = list(_files_below(folder))
    if not files:
        raise DataError(f"{folder}: this folder has no images; add some, or name another folder")
    _check_files(files, faults, Images)
    return files


def _files_of_class(class_folder: Path, faults: Faults, modality: type[Modality]) -> list[Path]:
    files = list(_files_below(class_folder))
    if not files:
        raise DataError(
            f"{class_folder}: this class has no {modality.noun}s; add some, or remove the folder"
        )
    _check_files(files, faults, modality)
    return files


def _check_files(files: Iterable[Path], faults: Faults, modality: type[Modality]) -> None:
    """Add the files that are no samples by their names to `faults`."""
    for path in files:
        if fault := _why_not_a_file(path):
            faults.add(fault)
        elif not _has_extension(path, modality):
            faults.add(
                f"{path}: not {modality.a_noun} by its name; expected {modality.expected}; convert"
                " it, or move it"
                " elsewhere"
            )


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file that is not hidden, including those in subfolders.

    A folder that is reached by several links is read once.
    """
    seen = {_identity(parent) for parent in folder.resolve().parents}
    for path, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        if (identity := _identity(Path(path))) in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(filter(_is_shown, folders))
        yield from (Path(path) / name for name in sorted(filter(_is_shown, files)))


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        _refuse(error)
        raise


def _refuse(error: OSError) -> None:
    raise DataError(
        f"{error.filename}: cannot be read ({error.strerror}); check the permissions"
    ) from None


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _LITTER


def _is_utf8(name: str) -> bool:
    return name.encode(errors="ignore").decode() == name


def _has_extension(path: Path, modality: type[Modality]) -> bool:
    return path.suffix.lower().lstrip(".") in modality.extensions


def _is_broken_link(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _why_not_a_file(path: Path) -> str | None:
    if _is_broken_link(path):
        return (
            f"{path}: a broken link to {os.readlink(path)}; restore what it leads to, or remove it"
        )
    return None if path.is_file() else f"{path}: not an ordinary file; expected an image"
