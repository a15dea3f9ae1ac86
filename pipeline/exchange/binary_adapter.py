"""Binary Adapter's published files (arXiv 2307.16867) as packs, and packs of those methods as such
files, byte for byte the same both ways.

NAME.bin comes with NAME.yaml, which holds the scale and the method. What the authors' code fixes
and no file states is written into the pack: images of 224 px resized bicubically, pixels
in [0, 1] without mean and deviation, the training settings, the order of classes by number.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import yaml

from pipeline.adaptation import attach, plan
from pipeline.adaptation.packing import probe_logits
from pipeline.backbones import LoadedBackbone
from pipeline.errors import ExportError, PackDamaged, PackError
from pipeline.packs import Pack, PackBackbone, PackInput, PackMetadata, TensorSpec
from pipeline.packs.binary_adapter_file import Description, read_parts, write_parts
from pipeline.specs import Adapter, Backbone, Head, Input, Lora, Recipe, Training
from pipeline.utils.files import whole

BACKBONE = Backbone(model="vit_base_patch16_224.orig_in21k")
"""timm's name of the network that Binary Adapter's code calls vit_base_patch16_224_in21k, with the
weights of ViT-B_16.npz.
"""
INPUT = Input(size_px=224, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
TRAINING = Training(
    epochs=100,
    batch_size=64,
    learning_rate=1e-3,
    warmup_epochs=10,
    weight_decay=1e-4,
    precision="fp32",
)
SEED = 42


def read_files(path: Path) -> tuple[bytes, Description]:
    """Read NAME.bin and the NAME.yaml next to it. Raises PackError if one is missing, PackDamaged
    if the description is invalid.
    """
    description = path.with_suffix(".yaml")
    try:
        return path.read_bytes(), Description.from_mapping(yaml.safe_load(description.read_bytes()))
    except OSError as error:
        raise PackError(
            f"{error.filename}: cannot be read ({error.strerror}); Binary Adapter's files are"
            " NAME.bin with NAME.yaml next to it"
        ) from None
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: text that is not UTF-8, or no date
        raise PackDamaged(
            f"{description}: not a YAML file ({str(error).splitlines()[0]})"
        ) from None


def import_binary_adapter(
    data: bytes,
    description: Description,
    backbone: LoadedBackbone,
    model_name: str = BACKBONE.model,
) -> Pack:
    """Convert a published file to a pack, on its backbone.

    Raises:
        PackError: the bytes are not those of this description on this backbone.
    """
    recipe = recipe_of(description)
    planned = plan(backbone, recipe, description.num_class)
    groups = [
        list(group)
        for _, group in itertools.groupby(planned, key=lambda tensor: (tensor.part, tensor.bits))
    ]
    parts = read_parts(
        data,
        [
            (
                group[0].part,
                group[0].bits,
                [TensorSpec(tensor.name, tensor.shape) for tensor in group],
            )
            for group in groups
        ],
    )
    metadata = PackMetadata(
        task=description.dataset,
        classes=[str(number) for number in range(description.num_class)],
        metric="accuracy",
        input=PackInput.model_validate(backbone.takes.facts()),
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        backbone=PackBackbone(
            model=model_name, arguments={}, fingerprint=backbone.fingerprint, trail=backbone.trail
        ),
        seed=SEED,
    )
    model = attach(backbone, recipe, description.num_class)
    values = {(part.name, name): array for part in parts for name, array in part.values().items()}
    model.values.load_stored(
        {tensor: torch.from_numpy(values[tensor.part, tensor.name]) for tensor in planned}
    )
    return Pack(metadata, parts, probe_logits(model))


def recipe_of(description: Description) -> Recipe:
    """The recipe that the authors' code trains for a description."""
    method, _, bihead = description.method.partition("-")
    head = Head(bits=1, bias=False) if bihead else Head(bits=32)
    if method == "lora":
        return Recipe(
            lora=Lora(rank=description.dim, targets=("q", "v"), bits=1, scale=description.scale),
            head=head,
            training=TRAINING,
        )
    adapter = Adapter(width=description.dim, placement="parallel", bits=1, scale=description.scale)
    return Recipe(adapter=adapter, head=head, training=TRAINING)


def description_of(metadata: PackMetadata) -> Description:
    """The description with which the authors' code reproduces a pack. Raises ExportError, naming
    what that code cannot do.
    """
    if metadata.backbone["model"] != BACKBONE.model or metadata.backbone["arguments"]:
        raise ExportError(
            f"Binary Adapter's files are for {BACKBONE.model}; this pack is for"
            f" {metadata.backbone['model']}; export to onnx instead"
        )
    if (metadata.images.size_px, metadata.images.mean, metadata.images.std) != (
        INPUT.size_px,
        INPUT.mean,
        INPUT.std,
    ):
        raise ExportError(
            "Binary Adapter's code takes images of 224 px without mean and deviation; this pack's"
            " input is another; export to onnx instead"
        )
    recipe = Recipe.model_validate(metadata.recipe)
    part = recipe.adapter or recipe.lora
    if part is not None:
        method, dim = (
            ("adaptformer", part.width) if isinstance(part, Adapter) else ("lora", part.rank)
        )
        description = Description(
            dataset=metadata.task,
            dim=dim,
            method=method if recipe.head.bias else f"{method}-bihead",  # type: ignore[arg-type]
            num_class=len(metadata.classes),
            scale=part.scale,
        )
        if recipe_of(description).model_copy(update={"training": recipe.training}) == recipe:
            return description
    raise ExportError(
        "Binary Adapter's files hold a parallel adapter, or lora on q and v, of 1 bit and with"
        " dropout 0.1, and a head of 1 bit without bias or of 32 bits on the whole feature; this"
        " pack has other parts; export to onnx instead"
    )


def export_binary_adapter(pack: Pack, path: Path) -> None:
    """Write NAME.bin and NAME.yaml. Raises ExportError for a pack of another method,
    StorageError where one cannot be written.
    """
    if path.suffix != ".bin":
        raise ExportError(
            f"{path}: Binary Adapter's files are NAME.bin with NAME.yaml next to it; give a name"
            " that ends in .bin"
        )
    description, data = description_of(pack.metadata), write_parts(pack.parts)
    with whole(path) as scratch, whole(path.with_suffix(".yaml")) as text:
        scratch.write_bytes(data)
        text.write_text(yaml.safe_dump(description.model_dump()), encoding="utf-8")
