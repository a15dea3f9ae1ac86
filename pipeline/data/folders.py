"""Image folders: one folder per class inside each split's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.data.faults import Faults, printable
from pipeline.data.formats import EXPECTED, IMAGE_EXTENSIONS
from pipeline.errors import DataError

_LITTER = ("thumbs.db", "desktop.ini", "icon\r", "@eadir", "__macosx", "$recycle.bin")
"""Files that desktops and network storage leave behind, besides hidden files."""


def labelled_images(folder: Path, faults: Faults) -> list[tuple[Path, str]]:
    """The images below `folder` in a fixed order, each with the name of its class's folder.

    Links to folders are followed. Other files are added to `faults`. Raises DataError if a folder
    is missing, empty or cannot be read.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise DataError(
            f"{folder}: {found}; expected a folder that holds a folder of images for each class"
        )
    shown = [path for path in _entries(folder) if _is_shown(path.name)]
    class_folders = [path for path in shown if path.is_dir()]
    for path in shown:
        if not path.is_dir() and (_has_image_extension(path) or _is_broken_link(path)):
            faults.add(
                _why_not_a_file(path)
                or f"{path}: a file next to the class folders; move it into one of them, or"
                " elsewhere"
            )
    if not class_folders:
        raise DataError(f"{folder}: holds no folders; expected a folder of images for each class")
    for path in class_folders:
        if not _is_utf8(path.name):
            raise DataError(
                f"{printable(str(path))}: the name of this class is not UTF-8 text; rename the"
                " folder"
            )
    return [
        (path, class_folder.name)
        for class_folder in class_folders
        for path in _images_below(class_folder, faults)
    ]


def _images_below(class_folder: Path, faults: Faults) -> list[Path]:
    files = list(_files_below(class_folder))
    if not files:
        raise DataError(f"{class_folder}: this class has no images; add some, or remove the folder")
    for path in files:
        if fault := _why_not_a_file(path):
            faults.add(fault)
        elif not _has_image_extension(path):
            faults.add(
                f"{path}: not an image by its name; expected {EXPECTED}; convert it, or move it"
                " elsewhere"
            )
    return files


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


def _has_image_extension(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS


def _is_broken_link(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _why_not_a_file(path: Path) -> str | None:
    if _is_broken_link(path):
        return (
            f"{path}: a broken link to {os.readlink(path)}; restore what it leads to, or remove it"
        )
    return None if path.is_file() else f"{path}: not an ordinary file; expected an image"
