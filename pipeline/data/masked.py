"""Images with masks: in two folders per split, paired by their names, or listed in CSV files, or
in two folders for all splits with a list of stems for each.
"""

from __future__ import annotations

from collections.abc import Container
from functools import partial
from pathlib import Path

from pipeline.data.entries import located
from pipeline.data.faults import Faults
from pipeline.data.folders import images_below
from pipeline.data.index import SplitName
from pipeline.data.manifests import manifest_rows
from pipeline.data.masks import mask_png
from pipeline.data.names import class_names
from pipeline.data.quoting import listing
from pipeline.data.sources import Source, SourceSample, check_used_once, read_file, stamp_of
from pipeline.data.text import read_text
from pipeline.errors import DataError
from pipeline.kinds import IGNORED
from pipeline.specs import CsvData, MasksData

Pair = tuple[Path, Path]  # an image and its mask
_ANY_EXTENSION, _MANIFEST, _LIST = ".*", ".csv", ".txt"
_FOLDER_SETTINGS = ("root", "images", "masks", "mask_name")


def masks_source(data: MasksData) -> Source:
    """The pairs of each split. Raises DataError, which names files without their counterpart."""
    names = _names(data)
    folders: dict[SplitName, str | None] = {"train": data.train, "val": data.val, "test": data.test}
    faults = Faults()
    pairs = {
        split: _pairs_of(folder, data, faults)
        for split, folder in folders.items()
        if folder is not None
    }
    faults.check()
    check_used_once(pairs)
    return Source(
        names,
        {
            split: [_sample(image, mask, data, names) for image, mask in each]
            for split, each in pairs.items()
        },
    )


def _names(data: MasksData) -> list[str]:
    names = class_names(data.classes)
    if data.threshold is not None and len(names) != 2:
        raise DataError(
            f"classes: {len(names)} with a `threshold`, which tells two apart; expected two, the"
            " darker one first"
        )
    if len(names) > IGNORED:
        raise DataError(
            f"classes: {len(names)} of them; masks have one byte per pixel: expected at most"
            f" {IGNORED}"
        )
    unknown = sorted({each for each in (data.palette or {}).values() if each} - {*names})
    if unknown:
        raise DataError(
            f"palette: {listing(unknown)} not among the classes; expected {listing(names)}, or null"
        )
    return names


def _pairs_of(split: str, data: MasksData, faults: Faults) -> list[Pair]:
    """The pairs of a split, which is a folder, a table or a list."""
    if split.lower().endswith(_MANIFEST):
        return _listed(split, data, faults)
    if split.lower().endswith(_LIST):
        return _of_stems(split, data, faults)
    if data.root is not None:
        raise DataError(
            f"{split}: a folder with `root`, whose splits are lists; expected a .txt file with a"
            " stem per line, or leave out root"
        )
    return _pairs(Path(split), data, faults)


def _of_stems(path: str, data: MasksData, faults: Faults) -> list[Pair]:
    """The pairs whose stems are the lines of a file. Lines without an image, without a mask, or
    that occur twice, are added to `faults`.
    """
    if data.root is None:
        raise DataError(
            f"{path}: a list of stems; expected `root`, the folder that holds {data.images} and"
            f" {data.masks}"
        )
    images = Path(data.root) / data.images
    lines = [line.strip() for line in read_text(path, "a stem per line").splitlines()]
    line_of_stem: dict[str, int] = {}
    for number, stem in enumerate(lines, start=1):
        if stem and line_of_stem.setdefault(stem, number) != number:
            faults.add(f"{path}: line {number}: {stem} is in line {line_of_stem[stem]} as well")
    pairs = _pairs(Path(data.root), data, faults, line_of_stem)
    found = {
        str(image.relative_to(images).with_suffix("")) for image in images_below(images, faults)
    }
    for stem in line_of_stem.keys() - found:
        faults.add(f"{path}: line {line_of_stem[stem]}: {stem}: no such image in {images}")
    return pairs


def _pairs(
    folder: Path, data: MasksData, faults: Faults, stems: Container[str] | None = None
) -> list[Pair]:
    """The images of a folder, or those of some stems, with their masks. Images without one, masks
    without an image, and masks of two images are added to `faults`.
    """
    images, masks = folder / data.images, folder / data.masks
    masks_by_name: dict[str, list[Path]] = {}
    for path in images_below(masks, faults):
        masks_by_name.setdefault(_name_of(path, masks, data), []).append(path)
    image_of_name: dict[str, Path] = {}
    pairs = []
    for path in images_below(images, faults):
        if stems is not None and _stem(path, images) not in stems:
            continue
        name = str(path.relative_to(images).with_name(data.mask_name.format(stem=path.stem)))
        first, found = image_of_name.setdefault(name, path), masks_by_name.get(name, [])
        if not found:
            faults.add(f"{path}: no mask; expected {masks / name}")
        elif len(found) > 1:
            faults.add(f"{path}: two masks, {found[0]} and {found[1]}; keep one of them")
        elif first != path:
            faults.add(f"{path}: has the mask of {first}; give each image its own")
        else:
            pairs.append((path, found[0]))
    for name in () if stems is not None else masks_by_name.keys() - image_of_name.keys():
        faults.add(f"{masks_by_name[name][0]}: a mask without an image in {images}")
    faults.messages.sort()
    return pairs


def _stem(image: Path, images: Path) -> str:
    """An image's path in its folder, without its extension."""
    return str(image.relative_to(images).with_suffix(""))


def _listed(manifest: str, data: MasksData, faults: Faults) -> list[Pair]:
    """The pairs in the columns `image` and `mask` of a CSV file, relative to its folder. Files that
    are missing are added to `faults`.
    """
    fields = MasksData.model_fields
    idle = [name for name in _FOLDER_SETTINGS if getattr(data, name) != fields[name].default]
    if idle:
        raise DataError(
            f"{manifest}: names its masks, so {idle[0]} would change nothing; leave it out"
        )
    columns = {"path_column": "image", "label_column": "mask"}
    table = CsvData(format="csv", train=manifest, test=manifest, **columns)
    pairs = []
    for where, image, (mask,) in manifest_rows(manifest, table):
        pair = Path(image), Path(located(mask, str(Path(manifest).parent)))
        missing = [path for path in pair if not path.is_file()]
        for path in missing:
            faults.add(f"{where}: {path}: no such file; add it, or remove the line")
        if not missing:
            pairs.append(pair)
    return pairs


def _name_of(mask: Path, folder: Path, data: MasksData) -> str:
    """The name by which an image looks for a mask."""
    relative = mask.relative_to(folder)
    any_extension = data.mask_name.endswith(_ANY_EXTENSION)
    return str(relative.with_name(relative.stem + _ANY_EXTENSION) if any_extension else relative)


def _sample(image: Path, mask: Path, data: MasksData, classes: list[str]) -> SourceSample:
    def read_mask(content: bytes) -> bytes:
        return mask_png(read_file(mask), content, data, classes, str(mask))

    stamp = f"{stamp_of(image.stat())} {mask} {stamp_of(mask.stat())}"
    return SourceSample(str(image), stamp, (), partial(read_file, image), read_mask)
