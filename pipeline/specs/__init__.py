"""What a user writes, validated: tasks, backbones, recipes, search spaces and budgets.

All models are frozen and refuse unknown keys; `task_files` reads them from YAML.

Imports: errors.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)
Bits = Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32]

_BYTE_UNITS = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "KIB": 1024, "MIB": 1024**2}


def parse_bytes(text: str | int) -> int:
    """Read a size such as `65536`, `64KiB` or `1.5 MB` as bytes. Raises ValueError with the known units."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in _BYTE_UNITS:
        raise ValueError("expected a size in bytes such as 65536, 64KiB or 1.5MB")
    return int(Fraction(match[1]) * _BYTE_UNITS[match[2].upper()])


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]


class Spec(BaseModel):
    """A frozen section of configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def changed(self, **fields: Any) -> Self:
        """The section as if these fields had been written in it. `model_copy` would not validate.

        Raises:
            ValidationError: the section is not valid with them.
        """
        return type(self).model_validate({name: getattr(self, name) for name in self.model_fields_set} | fields)


def first_fault(error: ValidationError) -> str:
    """The first thing that a validation complains about, in one line."""
    return error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")


def _of_unit_pixels(value: float) -> float:
    """A mean or deviation, if it can be one of pixels in [0, 1]. Raises ValueError."""
    if not 0 <= value <= 1:
        raise ValueError("expected a value for pixels in [0, 1], such as 0.485; divide those of the 0-255 scale by 255")
    return value


UnitPixels = Annotated[float, AfterValidator(_of_unit_pixels)]
Deviation = Annotated[UnitPixels, Field(gt=0)]
Channels = tuple[UnitPixels, UnitPixels, UnitPixels]
Deviations = tuple[Deviation, Deviation, Deviation]
Paths = Annotated[tuple[str, ...], Field(min_length=1)] | str


def _named_augmentation(value: Any) -> Any:
    """Earlier versions wrote `augment: true` or `false`, and so do their packs."""
    return {True: "light", False: "none"}[value] if isinstance(value, bool) else value


Augmentation = Literal["none", "light", "crop", "strong"]
"""How images are varied, see pipeline/data/augment.py."""


# --- data -----------------------------------------------------------------------------------------------------------------------------------


class ShardsData(Spec):
    """WebDataset tars or tar.gz (`key.jpg`, `key.cls` or `key.json`), local or behind any fsspec URL.

    Globs are expanded in sorted order, and braces as WebDataset does: `train-{000000..000012}.tar`.
    """

    format: Literal["shards"] = "shards"
    train: Paths
    val: Paths | None = None
    test: Paths
    classes: tuple[str, ...] | str | None = Field(None, description="names, or a file with one name a line; default: the labels' numbers")
    label_field: str | None = Field(None, description="field of key.json that holds the label; default: key.cls, or without one `label`")


class _ImagesData(Spec):
    """Splits of single images: the test set is given, or held out of train."""

    train: str
    val: str | None = None
    test: str | None = None
    test_fraction: float | None = Field(None, gt=0, lt=1, description="share of each class of train to hold out as the test set, instead of `test`")

    @model_validator(mode="before")
    @classmethod
    def _no_default_test(cls, content: Any) -> Any:
        """`test_fraction` replaces the name that a format gives its test list by default."""
        return {"test": None, **content} if isinstance(content, Mapping) and content.get("test_fraction") is not None else content

    @model_validator(mode="after")
    def _one_test_set(self) -> Self:
        if (self.test is None) == (self.test_fraction is None):
            raise ValueError("expected either `test`, or `test_fraction: 0.2` to hold a fifth of train out as the test set")
        return self


class FolderData(_ImagesData):
    """Image folders: one folder a class inside each split's folder."""

    format: Literal["folder"]


class CsvData(_ImagesData):
    """CSV manifests; paths are relative to `root` (default: the manifest's folder). Columns are separated by `,`, `;`, `|` or tabs."""

    format: Literal["csv"]
    root: str | None = None
    path_column: str = "path"
    label_column: str = "label"


ClassCount = Annotated[int, Field(ge=2, le=65536)]
ClassNames = Annotated[tuple[str, ...], Field(min_length=2)]


class _ListedData(_ImagesData):
    """Images in a folder, and a file a split that lists them with their labels."""

    root: str
    images: str = Field("", description="folder inside `root` that the listed paths start from; default: `root` itself")
    classes: ClassCount | ClassNames | str = Field(description="how many; or their names, or a file with one name a line")


class ListsData(_ListedData):
    """List files of `path label` lines inside `root`: VTAB-1k's layout, and that of few-shot FGVC. Labels are numbers from 0."""

    format: Literal["lists"]
    train: str = "train800.txt"
    val: str | None = "val200.txt"
    test: str | None = "test.txt"
    repeats: bool = Field(False, description="whether a list may name an image more than once; it is read once")


class JsonData(_ListedData):
    """JSON objects of `{"path": label}` inside `root`: the FGVC splits of VPT (arXiv 2203.12119).

    Labels are any whole numbers, one per class, or names.
    """

    format: Literal["json"]
    train: str = "train.json"
    val: str | None = "val.json"
    test: str | None = "test.json"


class DigitsData(Spec):
    """scikit-learn's 1,797 handwritten digits (8x8), split by a seed."""

    format: Literal["digits"]
    train_samples: int = Field(800, ge=20)
    test_samples: int = Field(800, ge=20)
    seed: int = Field(0, ge=0)


class DrawnData(Spec):
    """A structured task drawn by a seeded generator: count the blobs, or tell a bar's orientation."""

    format: Literal["drawn"]
    kind: Literal["counting", "orientation"]
    train_samples: int = Field(800, ge=20)
    test_samples: int = Field(800, ge=20)
    size_px: int = Field(32, ge=16)
    seed: int = Field(0, ge=0)


def _as_shards(data: Any) -> Any:
    """Data without a format is shards: a union's discriminator has no default of its own."""
    return {"format": "shards", **data} if isinstance(data, Mapping) else data


_AnyFormat = Annotated[ShardsData | FolderData | CsvData | ListsData | JsonData | DigitsData | DrawnData, Field(discriminator="format")]
Data = Annotated[_AnyFormat, BeforeValidator(_as_shards)]


class Input(Spec):
    """Preprocessing: images are resized to a square, scaled to [0, 1], normalised. mean/std default to the backbone's own."""

    size_px: int | None = Field(None, ge=8, le=1024, description="default: the size that the backbone is built for")
    mean: Channels | None = None
    std: Deviations | None = None
    flip: bool = Field(True, description="whether a mirrored image keeps its label (false for digits); used by augmentation only")


# --- backbone -------------------------------------------------------------------------------------------------------------------------------


class Backbone(Spec):
    """A timm model by name, or one that timm saved (`local-dir:FOLDER`, `hf-hub:OWNER/NAME`).

    `weights`: `pretrained` (its own), `random` (seeded; for tests), or the path of a safetensors checkpoint or of a folder with one.
    """

    model: str
    arguments: dict[str, int | float | str | bool | list[int]] = Field(default_factory=dict)
    weights: str = "pretrained"
    mean: Channels | None = None
    std: Deviations | None = None


# --- recipe ---------------------------------------------------------------------------------------------------------------------------------


class Connections(Spec):
    """GPS: train the `top_k` input connections of each neuron that matter most (arXiv 2312.10136)."""

    top_k: int = Field(1, ge=1, le=64)
    bits: Bits = 8


class Biases(Spec):
    """Train the biases of the layers that carry connections."""

    bits: Bits = 8


class Norms(Spec):
    """Train norms: each block's second one, before the MLP, or all of the backbone's; scale and shift, or the shift alone (BitFit)."""

    which: Literal["mlp", "all"] = "mlp"
    parameters: Literal["all", "bias"] = "all"
    bits: Bits = 8


class Smoa(Spec):
    """One router and one set of bottleneck experts shared by all blocks (Adapter-X, arXiv 2406.03051).

    parallel: beside the MLP, on its normalised input (AdaptFormer-X). after_mlp: on the MLP's output (Adapter-X). A token is split into `heads`
    sub-tokens, each sent to its own `top_k` experts. `prompt_generator` appends one token a block, made of the bank's mean output (ViT).
    """

    experts: int = Field(4, ge=1, le=64)
    width: int = Field(8, ge=1, le=1024)
    bits: Bits = 4
    placement: Literal["parallel", "after_mlp"] = "parallel"
    heads: int = Field(1, ge=1, le=64)
    top_k: int = Field(1, ge=1, le=64)
    router_width: int = Field(8, ge=1, le=256)
    temperature: float = Field(0.1, gt=0)
    balance_weight: float = Field(0.01, ge=0)
    scale: float = Field(1.0, gt=0)
    prompt_generator: bool = False

    @model_validator(mode="after")
    def _has_enough_experts(self) -> Smoa:
        if self.top_k > self.experts:
            raise ValueError(f"given {self.top_k} experts a sub-token (top_k) of a bank of {self.experts}; expected at most as many as there are")
        return self


class Adapter(Spec):
    """A bottleneck `scale * up(dropout(relu(down(x))))`, without biases, in every block.

    parallel: beside the MLP, on the un-normalised residual stream (AdaptFormer, arXiv 2205.13535). after_mlp, after_attention, after_both: on the
    output of the sublayer, before it is added to the stream (Pfeiffer, arXiv 2005.00247; Houlsby, arXiv 1902.00751).
    """

    width: int = Field(8, ge=1, le=1024)
    placement: Literal["parallel", "after_mlp", "after_attention", "after_both"] = "parallel"
    bits: Bits = 4
    scale: float = Field(1.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)


class Lora(Spec):
    """A low-rank change `scale * up(dropout(down(x)))` of chosen projections (LoRA, arXiv 2106.09685).

    A target is the last name of a Linear or 1x1 convolution (qkv, proj, fc1, fc2); q, k and v are the thirds of a fused qkv.
    """

    rank: int = Field(8, ge=1, le=1024)
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("q", "v")
    bits: Bits = 4
    scale: float = Field(1.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)

    @field_validator("targets")
    @classmethod
    def _name_rows_once(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(targets)) < len(targets):
            raise ValueError("a target is written twice; each is changed once")
        if "qkv" in targets and {"q", "k", "v"} & set(targets):
            raise ValueError("qkv holds q, k and v; name either the whole or its thirds")
        return targets


class Ssf(Spec):
    """Scale and shift the output of every layer and norm (SSF, arXiv 2210.08823)."""

    bits: Bits = 8


class Prompts(Spec):
    """Extra tokens, appended before the first block or, where `deep`, replaced before every block (VPT, arXiv 2203.12119); ViT only."""

    count: int = Field(8, ge=1, le=1024)
    deep: bool = False
    bits: Bits = 8


class ClassToken(Spec):
    """Train the class token, as a change (ViT)."""

    bits: Bits = 8


class Full(Spec):
    """Train every parameter of the backbone, as changes: full fine-tuning, for comparison."""

    bits: Bits = 32


class Quantiser(Spec):
    """How values below 16 bits are rounded (Binary Adapter, arXiv 2307.16867).

    codebook: levels that minimise the L1 error, each the median of its bin, or the squared error (lloyd_max). scales: a mean and a standard deviation
    for each matrix, or for each of its rows.
    """

    codebook: Literal["median", "lloyd_max"] = "median"
    scales: Literal["matrix", "row"] = "matrix"


class Head(Spec):
    """A linear classifier on the pooled feature; weights at `bits`, bias at 16, or at 32 beside weights of 32.

    `bits: 1, bias: false` is Binary Adapter's Bi-Head.
    """

    bits: Bits = 8
    bias: bool = True


class Training(Spec):
    """One loop: AdamW, cosine decay after a linear warm-up, cross-entropy.

    ema: decay of a moving average of the trained values, which is what the pack gets; 0 takes the last values. mixup, cutmix: the alpha of their Beta
    distributions, 0 for off.

    learning_rate: its peak; where it is left out, the backbone's own, see pipeline/inputs/learning_rate.py.

    precision: of the passes; `bf16` is float32 on a processor without units for it, which would be slower.
    """

    epochs: int = Field(12, ge=1)
    batch_size: int = Field(32, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    warmup_epochs: float = Field(default_factory=lambda validated: min(1.0, validated.get("epochs", 1) / 2), ge=0)
    weight_decay: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth: the last block's rate")
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    ema: float = Field(0.0, ge=0, lt=1)
    augment: Annotated[Augmentation, BeforeValidator(_named_augmentation)] = "none"
    precision: Literal["fp32", "bf16"] = "bf16"


class Recipe(Spec):
    """How a task is adapted and trained. A part left out is off; the head is always there.

    `preset: default` starts from the default recipe's parts, which the other keys replace or, with null, switch off; `preset: linear` trains the
    head alone.
    """

    preset: tuple[str, ...] | None = Field(
        None, description="`default` or `linear`; kept as the parts that it brought, which a backbone without a place for them goes without"
    )
    connections: Connections | None = None
    biases: Biases | None = None
    smoa: Smoa | None = None
    norms: Norms | None = None
    adapter: Adapter | None = None
    lora: Lora | None = None
    ssf: Ssf | None = None
    prompts: Prompts | None = None
    class_token: ClassToken | None = None
    full: Full | None = None
    quantiser: Quantiser | None = Field(None, description="default: as the paper, median and matrix")
    head: Head = Head()
    training: Training = Training()

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, content: Any) -> Any:
        """The content with the parts of the preset that it names, where these are not written in it."""
        if not isinstance(content, Mapping) or not isinstance(content.get("preset"), str):
            return content
        named = [part for part in PARTS if content.get(part) is not None]
        if content["preset"] == "default":
            brought = {part: spec for part, spec in DEFAULT_PARTS.items() if part not in content}
            return {**content, **brought, "preset": tuple(brought)}
        if content["preset"] != "linear":
            raise ValueError(f"preset: given {content['preset']!r}; expected default or linear")
        if named:
            raise ValueError(f"preset: linear trains the head alone, given {' and '.join(named)} too; leave out one or the other")
        return {**content, "preset": None}

    @model_validator(mode="after")
    def _goes_together(self) -> Recipe:
        conflict = slot_conflict(self)
        if conflict is not None:
            raise ValueError(conflict)
        trained = [getattr(self, name) for name in (*PARTS, "head")]
        if self.quantiser is not None and all(part.bits >= 16 for part in trained if part is not None):
            raise ValueError("quantiser would change nothing: no part has fewer than 16 bits; leave it out, or lower some bits")
        return self


def slot_conflict(recipe: Recipe) -> str | None:
    """What two parts of a recipe both want, in words; None where they go together."""
    smoa, adapter = recipe.smoa, recipe.adapter
    others = [name for name in PARTS if name != "full" and getattr(recipe, name) is not None]
    if recipe.full is not None and others:
        return f"full trains everything that {' and '.join(others)} would change; leave out one or the other"
    if smoa is not None and adapter is not None and smoa.placement in _PLACES[adapter.placement]:
        where = "in parallel to the MLP" if smoa.placement == "parallel" else "after the MLP"
        return f"smoa and adapter are both {where}; leave one out, or place one elsewhere"
    if recipe.ssf is not None and (recipe.biases is not None or recipe.norms is not None):
        return "ssf scales and shifts what biases and norms would change; leave out one or the other"
    if recipe.prompts is not None and smoa is not None and smoa.prompt_generator:
        return "prompts and smoa.prompt_generator both append tokens; leave out one or the other"
    return None


_PLACES = {"parallel": ("parallel",), "after_mlp": ("after_mlp",), "after_attention": (), "after_both": ("after_mlp",)}
PARTS = tuple(name for name in Recipe.model_fields if name not in ("preset", "head", "training", "quantiser"))
"""The parts that a recipe may leave out."""
ADAPTERS = ("smoa", "adapter", "lora")
"""The parts that the axes adapter_bits, width and scale are about."""

DEFAULT_PARTS: dict[str, Spec] = {"connections": Connections(), "biases": Biases(), "smoa": Smoa(), "norms": Norms()}
DEFAULT_RECIPE = Recipe.model_validate({"preset": "default"})


def _names_what_trains(recipe: Any) -> Any:
    """A recipe as it is written: it says what trains, so that nothing is trained, or left out, unasked."""
    if isinstance(recipe, Mapping) and not recipe.keys() & {"preset", *PARTS}:
        raise ValueError(
            "this does not say what trains; add `preset: default` for the default parts or `preset: linear` for the head alone, or name parts"
        )
    return recipe


WrittenRecipe = Annotated[Recipe, BeforeValidator(_names_what_trains)]


def _cools_down(recipe: Recipe) -> Recipe:
    """A check of tasks, not of recipes: a pack that was trained otherwise can still be read."""
    training = recipe.training
    if training.warmup_epochs >= training.epochs:
        raise ValueError(
            f"training.warmup_epochs is {training.warmup_epochs:g} and training.epochs is {training.epochs}; the learning rate would only rise: "
            "expected fewer epochs of warm-up than epochs"
        )
    return recipe


# --- search ---------------------------------------------------------------------------------------------------------------------------------


def _as_tuple(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and not value:
        raise ValueError("expected at least one value to try; leave the key out to keep the recipe's value")
    if isinstance(value, (list, tuple)) and any(value.count(item) > 1 for item in value):
        raise ValueError("a value is written twice; each is tried once")
    return value if value is None or isinstance(value, (list, tuple)) else (value,)


def _axis(kind: Any) -> Any:
    return Annotated[tuple[kind, ...] | None, BeforeValidator(_as_tuple)]


Positive = Annotated[float, Field(gt=0)]


class SearchSpace(Spec):
    """The values to try for each part of the recipe; an axis left out keeps the recipe's value.

    `bits` sets connections and adapters together unless `connection_bits` or `adapter_bits` names them apart. Adapters are `smoa`, `adapter` and
    `lora`, whose rank counts as `width`. `experts: 0` leaves the SMoA bank out, `top_k: 0` the connections.
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
        """The recipe at one point: `base` with the point's values written in.

        Raises:
            ValidationError: there is none, as `fault` says.
        """
        parts: dict[str, Spec | None] = {name: getattr(base, name) for name in Recipe.model_fields}
        if "top_k" in point:
            parts["connections"] = (base.connections or Connections()).changed(top_k=point["top_k"]) if point["top_k"] else None
        if "experts" in point:
            parts["smoa"] = (base.smoa or Smoa()).changed(experts=point["experts"]) if point["experts"] else None
        connection_bits = point.get("connection_bits", point.get("bits"))
        adapter_bits = point.get("adapter_bits", point.get("bits"))
        changes: dict[str, dict[str, Any]] = {
            "connections": {"bits": connection_bits},
            **{name: {"bits": adapter_bits, "width": point.get("width"), "scale": point.get("scale")} for name in ADAPTERS},
            "lora": {"bits": adapter_bits, "rank": point.get("width"), "scale": point.get("scale")},
            "head": {"bits": point.get("head_bits")},
            "training": {"learning_rate": point.get("learning_rate")},
        }
        for name, part in parts.items():
            given = {key: value for key, value in changes.get(name, {}).items() if value is not None}
            parts[name] = part.changed(**given) if part is not None and given else part
        return base.changed(**parts)

    def fullest(self, base: Recipe) -> Recipe:
        """The recipe of the space with all parts that any has, at the fewest bits."""
        return self.recipe(base, {axis: max(values) if axis in ("experts", "top_k") else min(values) for axis, values in self.axes().items()})

    def max_top_k(self, base: Recipe) -> int:
        """The largest K any trial uses: one selection of this K serves the whole study. 0 where no trial trains connections."""
        if self.top_k is not None:
            return int(max(self.top_k))
        return base.connections.top_k if base.connections is not None else 0

    def idle_axes(self, base: Recipe) -> list[str]:
        """Axes that change nothing, because no recipe of the space has the part they belong to."""
        has_smoa = any(self.experts) if self.experts is not None else base.smoa is not None
        has_adapter = has_smoa or any(getattr(base, name) is not None for name in ADAPTERS if name != "smoa")
        has_connections = self.max_top_k(base) > 0
        needed = {
            "bits": (has_connections and self.connection_bits is None) or (has_adapter and self.adapter_bits is None),
            "connection_bits": has_connections,
            "adapter_bits": has_adapter,
            "width": has_adapter,
            "scale": has_adapter,
        }
        return [name for name in self.axes() if not needed.get(name, True)]

    def fault(self, base: Recipe) -> str | None:
        """Why this space cannot be searched around `base`, in words; None where it can."""
        if idle := self.idle_axes(base):
            return f"{', '.join(idle)} would change nothing: no recipe of this space has the part; leave it out, or add the part to `recipe`"
        for point in self._deciding_points():
            try:
                self.recipe(base, point)
            except ValidationError as error:
                return f"at {', '.join(f'{axis} {value}' for axis, value in point.items())}: {first_fault(error)}"
        return None

    def _deciding_points(self) -> Iterator[dict[str, Any]]:
        """A point for each combination of values that the checks of a recipe tell apart: a space may have millions of points, these are few."""
        axes: dict[str, dict[Any, Any]] = {}
        for axis, values in self.axes().items():
            axes[axis] = {_kind(axis, value): value for value in reversed(values)}  # of each kind, the first
        for values in itertools.product(*(kinds.values() for kinds in axes.values())):
            yield dict(zip(axes, values, strict=True))


def _kind(axis: str, value: Any) -> Any:
    """What the checks of a recipe see of an axis's value: whether it is rounded, or which parts there are."""
    if axis.endswith("bits"):
        return value < 16
    return value if axis == "experts" else value > 0


def default_space(recipe: Recipe) -> SearchSpace:
    """What is searched where a task does not say: bits, experts and K, of the parts its recipe has."""
    axes: dict[str, Any] = {}
    if any(getattr(recipe, name) is not None for name in ("connections", *ADAPTERS)):
        axes["bits"] = (1, 4)
    if recipe.smoa is not None:
        axes["experts"] = (0, max(4, recipe.smoa.top_k))
    if recipe.connections is not None:
        axes["top_k"] = (1, 3)
    return SearchSpace(**axes)


Level = Literal["neuron", "layer", "network"]
Criterion = Literal["gradient", "magnitude", "activation", "random"]


class Selection(Spec):
    """Which connections `top_k` keeps (GPS, arXiv 2312.10136): what makes one important, and which of them compete with each other.

    gradient: the loss's gradient, summed with its sign over the training set. magnitude: the weight. activation: the weight times its input's mean
    size, without a backward pass (FPS, arXiv 2510.27359). random: a number drawn by `seed`.
    """

    criterion: Criterion = "gradient"
    level: Level = "neuron"
    loss: Literal["contrastive", "cross_entropy"] = Field("contrastive", description="of two views, without a head; or of a head that is not trained")
    views: Augmentation = Field("strong", description="of each image, two; strong is what GPS draws")
    temperature: float = Field(0.07, gt=0, description="of the contrastive loss")
    batch_size: int = Field(32, ge=2)
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the passes; what they give is summed in float64 either way")
    seed: int = Field(0, ge=0, description="of criterion random")

    @model_validator(mode="after")
    def _has_no_idle_setting(self) -> Selection:
        uses = {
            "gradient": ("loss", "views", "temperature", "batch_size", "precision"),
            "activation": ("batch_size", "precision"),
            "random": ("seed",),
        }.get(self.criterion, ())
        used = {"criterion", "level", *uses} - ({"temperature"} if self.loss == "cross_entropy" else set())
        idle = [name for name, field in type(self).model_fields.items() if name not in used and getattr(self, name) != field.default]
        if idle:
            by = f"criterion {self.criterion}" + (f" with loss {self.loss}" if self.criterion == "gradient" else "")
            raise ValueError(f"{', '.join(idle)} would change nothing: {by} does not use it; leave it out")
        return self


class Budget(Spec):
    """What a pack may cost, and how much accuracy may be given up for a smaller one."""

    max_bytes: Bytes = 64 * 1024
    within_points: float = Field(0.5, ge=0, description="champion: the smallest pack this close to the best validation metric, in points of 0.01")


Percent = Annotated[float, Field(ge=0, le=100)]


class About(Spec):
    """Where a task's data comes from, and what others reached on it. For people: nothing is computed from it."""

    source: str = Field("", description="where to get the data")
    licence: str = Field("", description="of the data")
    paper: str = Field("", description="that introduced the data")
    published_percent: dict[str, Percent] = Field(default_factory=dict, description="test accuracies by method, each with its paper")


class Task(Spec):
    """One labelled dataset and its metric, and how to adapt the backbone to it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    description: str = ""
    about: About = About()
    data: Data
    input: Input = Input()
    val_fraction: float = Field(0.2, gt=0, lt=1, description="share of train held out for validation where the task brings no val split")
    metric: Literal["accuracy"] = "accuracy"
    backbone: Backbone
    recipe: Annotated[WrittenRecipe, AfterValidator(_cools_down)] = DEFAULT_RECIPE
    search: SearchSpace = Field(default_factory=lambda validated: default_space(validated.get("recipe", DEFAULT_RECIPE)))
    selection: Selection = Selection()
    budget: Budget = Budget()
    seed: int = Field(0, ge=0)

    @field_validator("name")
    @classmethod
    def _is_not_reserved(cls, name: str) -> str:
        if name == "latest" or re.fullmatch(r"v[0-9]+", name):
            raise ValueError(f"the name {name!r} is reserved by the MLflow registry; choose another")
        return name

    @field_validator("search", mode="before")
    @classmethod
    def _with_default_axes(cls, search: Any, info: ValidationInfo) -> Any:
        """A search section that names no axis (only `trials`, say) keeps the default axes."""
        axes = SearchSpace.model_fields.keys() - {"trials"}
        if isinstance(search, Mapping) and not search.keys() & axes:
            return {**default_space(info.data.get("recipe", DEFAULT_RECIPE)).axes(), **search}
        return search

    @field_validator("search")
    @classmethod
    def _changes_something(cls, search: SearchSpace, info: ValidationInfo) -> SearchSpace:
        fault = search.fault(info.data["recipe"]) if "recipe" in info.data else None  # a recipe that is not valid is reported as such
        if fault is not None:
            raise ValueError(fault)
        return search


# --- suite ----------------------------------------------------------------------------------------------------------------------------------


class Suite(Spec):
    """The tasks of one benchmark, by name, in groups: what an average over it is taken of."""

    name: str
    description: str = ""
    groups: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] = Field(min_length=1)

    @field_validator("groups")
    @classmethod
    def _names_each_task_once(cls, groups: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        names = [name for group in groups.values() for name in group]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)}: named more than once; each task counts once")
        return groups

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks, group by group."""
        return tuple(name for group in self.groups.values() for name in group)


# --- comparison -----------------------------------------------------------------------------------------------------------------------------


class Method(Spec):
    """One way to adapt a backbone, to be compared with others: a recipe, the values it is tuned over, and how its connections are selected. Training
    settings that the recipe does not name are the task's, and so is the selection."""

    description: str = ""
    recipe: WrittenRecipe
    search: SearchSpace
    selection: Selection | None = None

    @model_validator(mode="after")
    def _can_be_tuned(self) -> Method:
        if fault := self.search.fault(self.recipe):
            raise ValueError(fault)
        if self.selection is not None and not self.search.max_top_k(self.recipe):
            raise ValueError("selection would change nothing: the method trains no connections; leave it out, or add `connections` to `recipe`")
        return self

    def on(self, task: Task) -> Task:
        """The task with this method in place of its own recipe, search space and, where the method has one, selection.

        Raises:
            ValidationError: the method's training settings do not go with the task's.
        """
        own = self.recipe.training
        training = task.recipe.training.changed(**{key: getattr(own, key) for key in own.model_fields_set})
        recipe = self.recipe.changed(training=training)
        return task.changed(recipe=recipe, search=self.search, selection=self.selection or task.selection)
