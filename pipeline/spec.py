"""What a user writes: tasks, backbones, recipes, search spaces and budgets, validated.

All models are frozen and refuse unknown keys. A section of a task file may be replaced by the path of a YAML file that holds it, relative to the
task file, so that a hundred tasks can share one backbone and one recipe. Errors name file, key, given value and what was expected.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import SpecError

BITS = (1, 2, 4, 8, 16, 32)
Bits = Literal[1, 2, 4, 8, 16, 32]

_BYTE_UNITS = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "KIB": 1024, "MIB": 1024**2}


def parse_bytes(text: str | int) -> int:
    """Read a size such as `65536`, `64KiB` or `1.5 MB` as bytes. Raises ValueError with the known units."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in _BYTE_UNITS:
        raise ValueError("expected a size in bytes such as 65536, 64KiB or 1.5MB")
    return int(float(match[1]) * _BYTE_UNITS[match[2].upper()])


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


class Spec(BaseModel):
    """A frozen section of configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


# --- data -----------------------------------------------------------------------------------------------------------------------------------


class ShardsData(Spec):
    """WebDataset tars (`key.jpg|png|webp`, `key.cls`), local or behind any fsspec URL; globs are expanded in sorted order."""

    format: Literal["shards"] = "shards"
    train: tuple[str, ...] | str
    val: tuple[str, ...] | str | None = None
    test: tuple[str, ...] | str
    classes: tuple[str, ...] | str | None = Field(None, description="names, or a file with one name a line; default: the labels' numbers")


class FolderData(Spec):
    """Image folders: one folder a class inside each split's folder."""

    format: Literal["folder"]
    train: str
    val: str | None = None
    test: str


class CsvData(Spec):
    """CSV manifests with the columns `path,label`; paths are relative to `root` (default: the manifest's folder)."""

    format: Literal["csv"]
    train: str
    val: str | None = None
    test: str
    root: str | None = None


class DigitsData(Spec):
    """scikit-learn's 1,797 handwritten digits (8x8), split by a seed."""

    format: Literal["digits"]
    train_samples: int = Field(800, ge=20)
    test_samples: int = Field(800, ge=20)
    seed: int = 0


class DrawnData(Spec):
    """A structured task drawn by a seeded generator: count the blobs, or tell a bar's orientation."""

    format: Literal["drawn"]
    kind: Literal["counting", "orientation"]
    train_samples: int = Field(800, ge=20)
    test_samples: int = Field(800, ge=20)
    size_px: int = Field(32, ge=16)
    seed: int = 0


Data = Annotated[ShardsData | FolderData | CsvData | DigitsData | DrawnData, Field(discriminator="format")]


class Input(Spec):
    """Preprocessing: images are resized to a square, scaled to [0, 1], normalised. mean/std default to the backbone's own."""

    size_px: int = Field(64, ge=8, le=1024)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    flip: bool = Field(True, description="whether a mirrored image keeps its label (false for digits); used by augmentation only")


# --- backbone -------------------------------------------------------------------------------------------------------------------------------


class Backbone(Spec):
    """A timm model by name. `weights`: `pretrained` (timm's own), `random` (seeded; for tests), or the path of a safetensors checkpoint."""

    model: str
    arguments: dict[str, int | float | str | bool | list[int]] = Field(default_factory=dict)
    weights: str = "pretrained"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


# --- recipe ---------------------------------------------------------------------------------------------------------------------------------


class Connections(Spec):
    """GPS: train the `top_k` input connections of each neuron that matter most (arXiv 2312.10136)."""

    top_k: int = Field(1, ge=1, le=64)
    bits: Bits = 8


class Biases(Spec):
    """Train the biases of the layers that carry connections."""

    bits: Bits = 8


class Norms(Spec):
    """Train each block's second norm (the one before the MLP)."""

    bits: Bits = 8


class Smoa(Spec):
    """One router and one set of bottleneck experts shared by all blocks, in parallel to the MLP (Adapter-X, arXiv 2406.03051)."""

    experts: int = Field(4, ge=1, le=64)
    width: int = Field(8, ge=1, le=1024)
    bits: Bits = 4
    router_width: int = Field(8, ge=1, le=256)
    temperature: float = Field(0.1, gt=0)
    balance_weight: float = Field(0.01, ge=0)
    scale: float = Field(1.0, gt=0)


class Head(Spec):
    """A linear classifier on the pooled feature; weights at `bits`, bias at 16."""

    bits: Bits = 8


class Training(Spec):
    """One loop: AdamW, cosine decay after a linear warm-up, cross-entropy."""

    epochs: int = Field(12, ge=1)
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(3e-3, gt=0)
    warmup_epochs: float = Field(1.0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    augment: bool = False
    precision: Literal["fp32", "bf16"] = "bf16"


class Recipe(Spec):
    """How a task is adapted and trained. A part left out is off; the head is always there."""

    connections: Connections | None = None
    biases: Biases | None = None
    smoa: Smoa | None = None
    norms: Norms | None = None
    head: Head = Head()
    training: Training = Training()


HOUSE_RECIPE = Recipe(connections=Connections(), biases=Biases(), smoa=Smoa(), norms=Norms())


# --- search ---------------------------------------------------------------------------------------------------------------------------------


def _as_tuple(value: Any) -> Any:
    return value if value is None or isinstance(value, (list, tuple)) else (value,)


def _axis(kind: Any) -> Any:
    return Annotated[tuple[kind, ...] | None, BeforeValidator(_as_tuple), Field(min_length=1)]


Positive = Annotated[float, Field(gt=0)]


class SearchSpace(Spec):
    """The values to try for each part of the recipe; an axis left out keeps the recipe's value.

    `bits` sets connections and adapter together unless `connection_bits` or `adapter_bits` names them apart. `experts: 0` leaves the SMoA bank
    out, `top_k: 0` the connections.
    """

    bits: _axis(Bits) = None  # type: ignore[valid-type]
    connection_bits: _axis(Bits) = None  # type: ignore[valid-type]
    adapter_bits: _axis(Bits) = None  # type: ignore[valid-type]
    head_bits: _axis(Bits) = None  # type: ignore[valid-type]
    experts: _axis(Annotated[int, Field(ge=0, le=64)]) = None  # type: ignore[valid-type]
    top_k: _axis(Annotated[int, Field(ge=0, le=64)]) = None  # type: ignore[valid-type]
    width: _axis(Annotated[int, Field(ge=1, le=1024)]) = None  # type: ignore[valid-type]
    scale: _axis(Positive) = None  # type: ignore[valid-type]
    learning_rate: _axis(Positive) = None  # type: ignore[valid-type]
    trials: int = Field(12, ge=1, description="how many configurations to run; a space no larger than this is enumerated, a larger one sampled")

    def axes(self) -> dict[str, tuple[Any, ...]]:
        """The axes that are searched, in a fixed order."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "trials" and getattr(self, name) is not None}

    def size(self) -> int:
        """Number of points in the space."""
        count = 1
        for values in self.axes().values():
            count *= len(values)
        return count

    def points(self) -> Iterator[dict[str, Any]]:
        """Every point, in a fixed order."""
        axes = self.axes()
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values, strict=True))

    def recipe(self, base: Recipe, point: dict[str, Any]) -> Recipe:
        """The recipe at one point: `base` with the point's values written in."""
        connections, smoa = base.connections, base.smoa
        connection_bits = point.get("connection_bits", point.get("bits"))
        adapter_bits = point.get("adapter_bits", point.get("bits"))
        if "top_k" in point:
            connections = (connections or Connections()).model_copy(update={"top_k": point["top_k"]}) if point["top_k"] else None
        if "experts" in point:
            smoa = (smoa or Smoa()).model_copy(update={"experts": point["experts"]}) if point["experts"] else None
        if connections is not None and connection_bits is not None:
            connections = connections.model_copy(update={"bits": connection_bits})
        if smoa is not None:
            changes = {"bits": adapter_bits, "width": point.get("width"), "scale": point.get("scale")}
            smoa = smoa.model_copy(update={key: value for key, value in changes.items() if value is not None})
        head = base.head.model_copy(update={"bits": point["head_bits"]}) if "head_bits" in point else base.head
        training = base.training.model_copy(update={"learning_rate": point["learning_rate"]}) if "learning_rate" in point else base.training
        return base.model_copy(update={"connections": connections, "smoa": smoa, "head": head, "training": training})

    def max_top_k(self, base: Recipe) -> int:
        """The largest K any trial uses: one selection of this K serves the whole study. 0 where no trial trains connections."""
        if self.top_k is not None:
            return int(max(self.top_k))
        return base.connections.top_k if base.connections is not None else 0


HOUSE_SPACE = SearchSpace(bits=(1, 4), experts=(0, 4), top_k=(1, 3))


class Selection(Spec):
    """GPS selection: supervised contrastive loss over two views, signed gradient sum (arXiv 2312.10136)."""

    temperature: float = Field(0.07, gt=0)
    batch_size: int = Field(32, ge=2)


class Budget(Spec):
    """What a pack may cost, and how much accuracy may be given up for a smaller one."""

    max_bytes: Bytes = 64 * 1024
    within_points: float = Field(0.5, ge=0, description="champion: the smallest pack this close to the best validation metric, in points of 0.01")


class Task(Spec):
    """One labelled dataset and its metric, and how to adapt the backbone to it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    description: str = ""
    data: Data
    input: Input = Input()
    val_fraction: float = Field(0.2, gt=0, lt=1, description="share of train held out for validation where the task brings no val split")
    metric: Literal["accuracy"] = "accuracy"
    backbone: Backbone
    recipe: Recipe = HOUSE_RECIPE
    search: SearchSpace = HOUSE_SPACE
    selection: Selection = Selection()
    budget: Budget = Budget()
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _name_is_not_reserved(self) -> Task:
        if self.name == "latest" or re.fullmatch(r"v[0-9]+", self.name):
            raise ValueError(f"the name {self.name!r} is reserved by the MLflow registry; choose another")
        return self


# --- reading --------------------------------------------------------------------------------------------------------------------------------

_SHARED_SECTIONS = ("backbone", "recipe", "search", "budget", "selection")
_DATA_PATHS = ("train", "val", "test", "root")
SpecType = TypeVar("SpecType", bound=Spec)


def load_tasks(paths: list[Path], *, overrides: dict[str, Any] | None = None) -> list[Task]:
    """Read task files, or folders of them, as one batch. Names must differ.

    Relative paths inside a task file are resolved against its folder. `overrides` replaces whole sections (values: a mapping or a YAML path).
    """
    files = [file for path in paths for file in _task_files(path)]
    tasks: dict[str, tuple[Task, Path]] = {}
    for file in files:
        task = load_task(file, overrides=overrides)
        if task.name in tasks:
            raise SpecError(f"{file}: name: given {task.name!r}, which {tasks[task.name][1]} has too; give each task of a batch its own name")
        tasks[task.name] = (task, file)
    return [task for task, _ in tasks.values()]


def _task_files(path: Path) -> list[Path]:
    if not path.exists():
        raise SpecError(f"{path}: no such task file or folder; give a .yaml file or a folder that holds some")
    if path.is_file():
        return [path]
    files = [file for file in sorted(path.glob("*.y*ml")) if "data" in _read_mapping(file)]
    if not files:
        raise SpecError(f"{path}: this folder holds no task file (a .yaml with a `data` section)")
    return files


def load_task(path: Path, *, overrides: dict[str, Any] | None = None) -> Task:
    """Read one task file. Raises SpecError."""
    content = _read_mapping(path)
    for section in _SHARED_SECTIONS:
        if isinstance(content.get(section), str):
            shared = (path.parent / content[section]).resolve()
            content[section] = _resolve_paths(section, _read_mapping(shared), shared.parent)
        elif isinstance(content.get(section), dict):
            content[section] = _resolve_paths(section, content[section], path.parent)
    for section, value in (overrides or {}).items():
        if isinstance(value, (str, Path)):
            value = _resolve_paths(section, _read_mapping(Path(value)), Path(value).parent)
        base = content.get(section, {}) if section in ("search", "budget") else {}
        content[section] = {**base, **value}
    if isinstance(content.get("data"), dict):
        content["data"] = _resolve_paths("data", {"format": "shards", **content["data"]}, path.parent)
    return validate(Task, content, source=str(path))


def load_spec(kind: type[SpecType], path: Path) -> SpecType:
    """Read a YAML file as `kind`. Raises SpecError."""
    return validate(kind, _read_mapping(path), source=str(path))


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise SpecError(f"{path}: expected a mapping of keys to values, found {type(content).__name__}")
    return content


def _resolve_paths(section: str, content: dict[str, Any], folder: Path) -> dict[str, Any]:
    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in value]
        return value if not isinstance(value, str) or "://" in value else str((folder / value).resolve())

    keys: tuple[str, ...] = ()
    if section == "data":
        keys = _DATA_PATHS + (("classes",) if isinstance(content.get("classes"), str) else ())
    elif section == "backbone" and content.get("weights") not in (None, "pretrained", "random"):
        keys = ("weights",)
    return {key: resolve(value) if key in keys else value for key, value in content.items()}


def validate(kind: type[SpecType], content: dict[str, Any], *, source: str) -> SpecType:
    """Build `kind` from plain data. Raises SpecError with one line per fault: source, key, given, expected."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        lines = [_explain(kind, fault, source) for fault in error.errors()]
        raise SpecError("\n".join(lines)) from None


def _explain(kind: type[Spec], fault: Any, source: str) -> str:
    key = ".".join(str(part) for part in fault["loc"] if not (isinstance(part, str) and part.startswith("function-")))
    given = json.dumps(fault.get("input"), default=str)
    given = given if len(given) <= 80 else given[:77] + "..."
    if fault["type"] == "extra_forbidden":
        known = _known_keys(kind, fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{source}: {key}: unknown key, given {given}; {hint}"
    if fault["type"] == "missing":
        return f"{source}: {key}: missing; this key is required"
    return f"{source}: {key}: given {given}; {fault['msg']}"


def _known_keys(kind: type[Spec], location: tuple[Any, ...]) -> list[str]:
    kinds: list[Any] = [kind]
    for part in location:
        nested = [argument for known in kinds for name, field in known.model_fields.items() if name == part for argument in _specs_in(field.annotation)]
        tagged = [known for known in kinds if "format" in known.model_fields and part in _literal_values(known)]
        kinds = nested or tagged or kinds
    return sorted({name for known in kinds for name in known.model_fields})


def _literal_values(kind: type[Spec]) -> tuple[Any, ...]:
    return getattr(kind.model_fields["format"].annotation, "__args__", ())


def _specs_in(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [spec for argument in getattr(annotation, "__args__", ()) for spec in _specs_in(argument)]
