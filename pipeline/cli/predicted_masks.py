"""Predicted masks as files of a folder: NAME.mask.png, a PNG of class numbers; NAME.overlay.png,
the image with its classes in colours; and areas.json, what each image holds and what each colour
means.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data import rgb_image
from pipeline.errors import SpecError
from pipeline.utils.files import write_json

AREAS_FILE = "areas.json"


def write_masks(rows: list[dict[str, Any]], classes: Sequence[str], folder: Path) -> None:
    """Write the masks of predictions, whose rows get the paths of the files: `mask` in place of the
    PNG, and `overlay`.

    Raises:
        SpecError: Two images have the same name.
        StorageError: The folder cannot be written.
    """
    from pipeline.reports.overlay_figure import colours_of, overlaid  # brings matplotlib

    _check_names_differ(rows)
    folder.mkdir(parents=True, exist_ok=True)
    colours_C3 = colours_of(len(classes))
    for row in rows:
        stem, png = Path(row["image"]).stem, row["mask"]
        mask_path, overlay_path = (folder / f"{stem}.{name}.png" for name in ("mask", "overlay"))
        mask_path.write_bytes(png)
        image = np.asarray(rgb_image(row["image"]))
        mask = np.asarray(Image.open(io.BytesIO(png)))
        Image.fromarray(overlaid(image, mask, colours_C3)).save(overlay_path)
        row |= {"mask": str(mask_path), "overlay": str(overlay_path)}
    colours = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in colours_C3.round().astype(int)]
    meaning = dict(zip(classes, [None, *colours[1:]], strict=True))
    write_json(folder / AREAS_FILE, {"colours": meaning, "images": rows})


def _check_names_differ(rows: Sequence[dict[str, Any]]) -> None:
    first: dict[str, str] = {}
    for row in rows:
        image = row["image"]
        if (other := first.setdefault(Path(image).stem, image)) is not image:
            raise SpecError(
                f"{image}: has the same name as {other}, and so would have its files; predict them"
                " one after the other, into two folders"
            )
