"""The data section of a task, by format, and the preprocessing of its samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from pipeline.specs.section import Channels, Deviations, Spec

STORED_POINTS = 2048
"""Points of a point cloud that a prepared dataset keeps."""
Scale = Literal["unit", "metric"]
Paths = Annotated[tuple[str, ...], Field(min_length=1)] | str


class _DataSection(Spec):
    """The data of a task in one format."""

    def has_masks(self) -> bool | None:
        """Whether samples have masks rather than labels; None where they may have either."""
        return False


class ShardsData(_DataSection):
    """WebDataset tars or tar.gz (`key.jpg`, `key.cls` or `key.json`, of segmentation
    `key.mask.png`), local or behind an fsspec URL.

    Globs are expanded in sorted order, and braces as in WebDataset: `train-{000000..000012}.tar`.
    """

    format: Literal["shards"] = "shards"
    train: Paths
    val: Paths | None = None
    test: Paths
    classes: tuple[str, ...] | str | None = Field(
        None,
        description="names, or a file with one name per line; default: the numbers of the labels",
    )
    label_field: str | None = Field(
        None,
        description=(
            "field of key.json that holds the label; default: key.cls, or `label` if there is none"
        ),
    )

    def has_masks(self) -> bool | None:
        """Either, as the task's kind says."""
        return None


class _ImagesData(_DataSection):
    """Splits of single images; the test set is given, or held out of train."""

    train: str
    val: str | None = Field(None, description="default: a fraction of train, see `val_fraction`")
    test: str | None = None
    test_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="fraction of each class of train held out as the test set, not with `test`",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_default_test(cls, content: Any) -> Any:
        """Let `test_fraction` replace the default name of a format's test list."""
        return (
            {"test": None, **content}
            if isinstance(content, Mapping) and content.get("test_fraction") is not None
            else content
        )

    @model_validator(mode="after")
    def _one_test_set(self) -> Self:
        if (self.test is None) == (self.test_fraction is None):
            raise ValueError(
                "expected either `test`, or `test_fraction: 0.2` to hold a fifth of train out as"
                " the test set"
            )
        return self


class FolderData(_ImagesData):
    """Image folders: one folder per class inside the folder of each split."""

    format: Literal["folder"]


class CsvData(_ImagesData):
    """CSV manifests, with columns separated by commas, semicolons, vertical bars or tabs."""

    format: Literal["csv"]
    root: str | None = Field(
        None, description="folder that the listed paths start from; default: the manifest's"
    )
    path_column: str = Field("path", description="column with paths or URLs of images")
    label_column: str = Field("label", description="column with labels")
    label_separator: str = Field(
        "|", min_length=1, description="separates the labels of a multi-label image: `cat|dog`"
    )


ClassCount = Annotated[int, Field(ge=2, le=65536)]
ClassNames = Annotated[tuple[str, ...], Field(min_length=2)]


class _ListedData(_ImagesData):
    """Images in a folder, and one file per split that lists them with their labels."""

    root: str
    images: str = Field(
        "",
        description="folder inside `root` that the listed paths start from; default: `root` itself",
    )
    classes: ClassCount | ClassNames | str = Field(
        description="their number, their names, or a file with one name per line"
    )


class ListsData(_ListedData):
    """List files of `path label` lines inside `root`, as in VTAB-1k and few-shot FGVC. Labels are
    numbers from 0.
    """

    format: Literal["lists"]
    train: str = "train800.txt"
    val: str | None = "val200.txt"
    test: str | None = "test.txt"
    repeats: bool = Field(
        False, description="whether a list may name an image more than once; it is then read once"
    )


class JsonData(_ListedData):
    """JSON objects of `{"path": label}` inside `root`, as in VPT's splits of FGVC (arXiv
    2203.12119).

    Labels are integers, one per class, or names.
    """

    format: Literal["json"]
    train: str = "train.json"
    val: str | None = "val.json"
    test: str | None = "test.json"


Colour = Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")]


class MasksData(_ImagesData):
    """Images and masks in two folders inside the folder of each split, paired by their stems:
    `images/12.jpg` and `masks/12.png`; or in two folders inside `root`, with a list of stems per
    split; or a CSV file per split with the columns `image` and `mask`.

    A mask's values are class numbers. With `threshold`, a mask of two classes is black and white,
    which also JPEGs can be; with `palette`, a mask's colours are classes.
    """

    format: Literal["masks"]
    root: str | None = Field(
        None, description="folder of all splits, each of which is a .txt file with a stem per line"
    )
    images: str = Field(
        "images", description="folder of images inside the folder of a split, or inside `root`"
    )
    masks: str = Field(
        "masks", description="folder of masks inside the folder of a split, or inside `root`"
    )
    mask_name: str = Field(
        "{stem}.*", description="name of a mask by the stem of its image, such as `{stem}_mask.png`"
    )
    classes: ClassNames | str = Field(
        description="their names in the order of their numbers, or a file with one name per line"
    )
    threshold: int | None = Field(
        None,
        ge=0,
        le=254,
        description="a grey value; larger ones are the second of two classes, others the first",
    )
    ignore: int | None = Field(
        None, ge=0, le=65535, description="a value of masks that is not counted, often 255"
    )
    palette: dict[Colour, str | None] | None = Field(
        None,
        min_length=1,
        description="the class of each colour, such as `{'#804080': road}`; null is not counted",
    )

    @model_validator(mode="after")
    def _can_be_read(self) -> Self:
        if self.mask_name.count("{stem}") != 1 or "/" in self.mask_name:
            raise ValueError(
                f"mask_name: given {self.mask_name!r}; expected a file name with one {{stem}}, such"
                " as {stem}_mask.png"
            )
        ways = ("threshold", "palette", "ignore")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{given[0]} gives each pixel a class, so {given[1]} would change nothing; leave"
                " out one or the other"
            )
        return self

    def has_masks(self) -> bool | None:
        """Yes."""
        return True


class CocoData(_ImagesData):
    """JSON files in COCO's layout, one per split, whose annotations outline regions of images by
    polygons or run lengths.

    Pixels of no annotation are the first class. Where annotations overlap, the smaller one counts;
    those of crowds (`iscrowd`) are not counted.
    """

    format: Literal["coco"]
    images: str | dict[Literal["train", "val", "test"], str] | None = Field(
        None,
        description=(
            "folder that `file_name` starts from, or one for each split; default: that of the JSON"
            " file"
        ),
    )
    classes: ClassNames | str | None = Field(
        None,
        description=(
            "name of the first class, then those of categories, or a file with one name per line;"
            " other categories are of the first class; default: `background` and all categories of"
            " train by their ids"
        ),
    )

    def has_masks(self) -> bool | None:
        """Yes."""
        return True


class Hdf5Data(_DataSection):
    """HDF5 files that hold many point clouds each, in the layout of ModelNet40 and ScanObjectNN:
    `data` [clouds, points, 3], `label` [clouds] or [clouds, 1] and, if the files have it, `normal`
    like `data`.

    Globs and braces are expanded as those of shards are.
    """

    format: Literal["hdf5"]
    train: Paths
    val: Paths | None = Field(None, description="default: a fraction of train, see `val_fraction`")
    test: Paths
    classes: ClassNames | str | None = Field(
        None,
        description="names, or a file with one name per line; default: the numbers of the labels",
    )


class DigitsData(_DataSection):
    """scikit-learn's 1,797 handwritten digits (8x8), split by `seed`."""

    format: Literal["digits"]
    train_samples: int = Field(800, ge=20)
    test_samples: int = Field(800, ge=20)
    seed: int = Field(0, ge=0)


class DrawnData(_DataSection):
    """A synthetic task drawn by a seeded generator: count blobs, tell the orientation of a bar,
    find the pixels of shapes, or name a solid by points on its surface.
    """

    format: Literal["drawn"]
    kind: Literal["counting", "orientation", "shapes", "solids"]
    train_samples: int = Field(800, ge=20)
    test_samples: int = Field(800, ge=20)
    size_px: int = Field(32, ge=16)
    seed: int = Field(0, ge=0)

    def has_masks(self) -> bool | None:
        """Those of shapes."""
        return self.kind == "shapes"


def _as_shards(data: Any) -> Any:
    """Set the default format, shards: a union's discriminator cannot have a default."""
    return {"format": "shards", **data} if isinstance(data, Mapping) else data


_AnyFormat = Annotated[
    ShardsData
    | FolderData
    | CsvData
    | ListsData
    | JsonData
    | MasksData
    | CocoData
    | Hdf5Data
    | DigitsData
    | DrawnData,
    Field(discriminator="format"),
]
Data = Annotated[_AnyFormat, BeforeValidator(_as_shards)]


class Input(Spec):
    """Preprocessing. Images are resized to a square, scaled to [0, 1] and normalised; point clouds
    are centred, reduced to a number of points and scaled.
    """

    size_px: int | None = Field(
        None,
        ge=8,
        le=1024,
        description="side of the square; default: the size that the backbone is built for",
    )
    mean: Channels | None = Field(
        None, description="per channel, of pixels in [0, 1]; default: the backbone's"
    )
    std: Deviations | None = Field(
        None, description="per channel, of pixels in [0, 1]; default: the backbone's"
    )
    flip: bool = Field(
        True,
        description=(
            "whether a mirrored sample keeps its label (false for digits); only for augmentation"
        ),
    )
    points: int | None = Field(
        None,
        ge=16,
        le=STORED_POINTS,
        description=(
            "number of points per cloud; default: the number that the backbone was built for"
        ),
    )
    scale: Scale = Field(
        "unit",
        description=(
            "of point clouds: `unit` scales each to the unit sphere, `metric` keeps the units of"
            " the files"
        ),
    )
    up: Literal["x", "y", "z"] = Field("z", description="the vertical axis of point clouds")
    turn: bool = Field(
        True,
        description=(
            "whether a point cloud that is turned about the vertical axis keeps its label; only for"
            " augmentation"
        ),
    )
