"""The data section of a task, by format, and the preprocessing of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from pipeline.specs.section import Channels, Deviations, Spec

Paths = Annotated[tuple[str, ...], Field(min_length=1)] | str


class ShardsData(Spec):
    """WebDataset tars or tar.gz (`key.jpg`, `key.cls` or `key.json`), local or behind an fsspec
    URL.

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


class _ImagesData(Spec):
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


class DigitsData(Spec):
    """scikit-learn's 1,797 handwritten digits (8x8), split by `seed`."""

    format: Literal["digits"]
    train_samples: int = Field(800, ge=20)
    test_samples: int = Field(800, ge=20)
    seed: int = Field(0, ge=0)


class DrawnData(Spec):
    """A synthetic task drawn by a seeded generator: count blobs, or tell the orientation of a
    bar.
    """

    format: Literal["drawn"]
    kind: Literal["counting", "orientation"]
    train_samples: int = Field(800, ge=20)
    test_samples: int = Field(800, ge=20)
    size_px: int = Field(32, ge=16)
    seed: int = Field(0, ge=0)


def _as_shards(data: Any) -> Any:
    """Set the default format, shards: a union's discriminator cannot have a default."""
    return {"format": "shards", **data} if isinstance(data, Mapping) else data


_AnyFormat = Annotated[
    ShardsData | FolderData | CsvData | ListsData | JsonData | DigitsData | DrawnData,
    Field(discriminator="format"),
]
Data = Annotated[_AnyFormat, BeforeValidator(_as_shards)]


class Input(Spec):
    """Preprocessing: images are resized to a square, scaled to [0, 1] and normalised."""

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
            "whether a mirrored image keeps its label (false for digits); only for augmentation"
        ),
    )
