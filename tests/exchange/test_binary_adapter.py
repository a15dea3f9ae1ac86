"""Binary Adapter's files: read into parts and written back byte for byte, computed as the paper's
formula says, damage refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers_cases import for_every
from helpers_cli import taskpack
from helpers_paths import PROJECT_ROOT

from pipeline.adaptation import plan
from pipeline.adaptation.packing import from_pack
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.errors import ExportError, PackDamaged, PackError, PackTruncated
from pipeline.exchange import binary_adapter
from pipeline.exchange.binary_adapter import (
    BACKBONE,
    INPUT,
    description_of,
    export_binary_adapter,
    import_binary_adapter,
    read_files,
    recipe_of,
)
from pipeline.packs import Pack, Part, TensorSpec, pack_to_bytes, read_pack
from pipeline.packs.binary_adapter_file import Description, Layout, read_parts, write_parts
from pipeline.specs import Backbone, Head, Input

METHODS = ("adaptformer", "adaptformer-bihead", "lora", "lora-bihead")
LEVEL = 0.6744898
DEPTH, WIDTH, CLASSES = 2, 64, 3
Matrix = tuple[np.ndarray, np.float32, np.float32]


def describe(method: str, **changes: Any) -> Description:
    return Description.from_mapping(
        {
            "dataset": "cifar",
            "method": method,
            "dim": 4,
            "num_class": CLASSES,
            "scale": 0.1,
            **changes,
        }
    )


@dataclasses.dataclass
class Written:
    """A file as the authors' code writes it: bit by bit, matrix by matrix."""

    matrices: list[Matrix]
    head: tuple[np.ndarray, np.ndarray] | None
    data: bytes


def write_slowly(description: Description, seed: int = 0) -> Written:
    draw = np.random.default_rng(seed)
    many = 2 if description.method.startswith("adaptformer") else 4
    shapes = [(description.dim, WIDTH), (WIDTH, description.dim)] * (DEPTH * many // 2)
    is_bihead = description.method.endswith("bihead")
    if is_bihead:
        shapes.append((description.num_class, WIDTH))
    matrices, data = [], b""
    for shape in shapes:
        codes = draw.integers(0, 2, shape)
        mean, std = np.float32(draw.normal(0, 0.01)), np.float32(draw.uniform(0.05, 0.2))
        matrices.append((codes, mean, std))
        flat = codes.ravel().tolist()
        data += bytes(
            sum(bit << place for place, bit in enumerate(flat[start : start + 8]))
            for start in range(0, len(flat), 8)
        )
        data += mean.tobytes() + std.tobytes()
    head = None
    if not is_bihead:
        head = (
            draw.normal(0, 0.1, (description.num_class, WIDTH)).astype(np.float32),
            draw.normal(0, 0.1, description.num_class).astype(np.float32),
        )
        data += head[0].tobytes() + head[1].tobytes()
    return Written(matrices, head, data)


@pytest.fixture(scope="module")
def tiny(tiny_backbone: Backbone) -> LoadedBackbone:
    return load_backbone(
        tiny_backbone, Input(size_px=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    )


@pytest.fixture(scope="module")
def import_tiny(
    tiny: LoadedBackbone, tiny_backbone: Backbone
) -> Callable[[Description, bytes], Pack]:
    """As `import_binary_adapter`, on the tiny ViT."""

    def read(description: Description, data: bytes) -> Pack:
        return import_binary_adapter(data, description, tiny, tiny_backbone.model)

    return read


# --- the arithmetic -------------------------------------------------------------------------------


def weights_of(written: Written) -> list[torch.Tensor]:
    """Code 1 is the level above the mean."""
    return [
        torch.from_numpy((np.where(codes == 1, LEVEL, -LEVEL) * std + mean).astype(np.float32))
        for codes, mean, std in written.matrices
    ]


def attend(
    attention: Any, x: torch.Tensor, low_rank: list[torch.Tensor], scale: float
) -> torch.Tensor:
    """timm's attention with changes of q and v, projection by projection."""
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    if low_rank:
        down_q, up_q, down_v, up_v = low_rank
        q, v = q + scale * (x @ down_q.T) @ up_q.T, v + scale * (x @ down_v.T) @ up_v.T
    q, k, v = (each.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for each in (q, k, v))
    weights = torch.softmax(q @ k.transpose(-2, -1) * attention.scale, dim=-1)
    return attention.proj((weights @ v).transpose(1, 2).flatten(2))


@torch.inference_mode()
def slow_logits(
    network: Any, written: Written, description: Description, images: torch.Tensor
) -> torch.Tensor:
    """The authors' model, written out on timm's own blocks: x + attn(norm1 x), then x + mlp(norm2
    x) + s * adapter(x).
    """
    weights, scale = weights_of(written), description.scale
    is_lora = description.method.startswith("lora")
    x = network.norm_pre(network._pos_embed(network.patch_embed(images.float() / 255)))
    for number, block in enumerate(network.blocks):
        own = weights[number * 4 :][:4] if is_lora else weights[number * 2 :][:2]
        x = x + attend(block.attn, block.norm1(x), own if is_lora else [], scale)
        adapter = 0 if is_lora else scale * torch.relu(x @ own[0].T) @ own[1].T
        x = x + block.mlp(block.norm2(x)) + adapter
    features = network.forward_head(network.norm(x))
    if written.head is None:
        return features @ weights[-1].T
    return features @ torch.from_numpy(written.head[0]).T + torch.from_numpy(written.head[1])


@for_every("method", METHODS)
def test_a_pack_computes_what_the_authors_formula_says(
    method: str, tiny: LoadedBackbone, import_tiny: Callable[[Description, bytes], Pack]
) -> None:
    description = describe(method, scale=10.0)
    written = write_slowly(description)
    pack = read_pack(pack_to_bytes(import_tiny(description, written.data)))
    model = from_pack(pack, tiny)
    images = torch.randint(
        0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    expected = slow_logits(tiny.model, written, description, images)
    with torch.inference_mode():
        torch.testing.assert_close(
            model.eval()(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )
        tiny_logits = slow_logits(
            tiny.model, written, description.model_copy(update={"scale": 0.01}), images
        )
    assert not torch.allclose(tiny_logits, expected, rtol=1e-2)  # the scale matters


# --- bytes ----------------------------------------------------------------------------------------


@for_every("dim", [1, 2, 3, 32])
@for_every("method", METHODS)
def test_a_file_comes_back_byte_for_byte(
    method: str, dim: int, import_tiny: Callable[[Description, bytes], Pack]
) -> None:
    description = describe(method, dim=dim, num_class=5)
    data = write_slowly(description, seed=dim).data
    pack = read_pack(pack_to_bytes(import_tiny(description, data)))
    assert write_parts(pack.parts) == data


def test_numbers_keep_their_bits() -> None:
    """Zero with a sign, the smallest and the largest float32: parts keep them as they are."""
    layout: Layout = [
        ("adapters", 1, [TensorSpec("a", (1, 8)), TensorSpec("b", (8, 1))]),
        ("head", 32, [TensorSpec("w", (2, 2))]),
    ]
    scales = np.array([-0.0, 1e-45, 3.4e38, 0.0], "<f4")
    floats = np.array([-0.0, 1e-45, -3.4e38, 1.0], "<f4")
    data = b"\x01" + scales[:2].tobytes() + b"\x80" + scales[2:].tobytes() + floats.tobytes()
    parts = read_parts(data, layout)
    assert parts[0].codes.tolist() == [1, *[0] * 14, 1]
    assert write_parts(parts) == data


def skeleton(backbone: LoadedBackbone, description: Description) -> Layout:
    planned = plan(backbone, recipe_of(description), description.num_class)
    parts: dict[tuple[Any, int], list[TensorSpec]] = {}
    for tensor in planned:
        parts.setdefault((tensor.part, tensor.bits), []).append(
            TensorSpec(tensor.name, tensor.shape)
        )
    return [(name, bits, specs) for (name, bits), specs in parts.items()]


@for_every("method", METHODS)
def test_a_file_cut_off_anywhere_is_refused(method: str, tiny: LoadedBackbone) -> None:
    description = describe(method, dim=1)
    data, layout = write_slowly(description).data, skeleton(tiny, description)
    for size_bytes in range(len(data)):
        with pytest.raises(PackTruncated, match=f"takes {len(data)} bytes; found {size_bytes}"):
            read_parts(data[:size_bytes], layout)
    with pytest.raises(PackDamaged, match="are the two of one task"):
        read_parts(data + b"\0", layout)


@pytest.mark.parametrize("method", ["adaptformer", "lora-bihead"])
def test_mutated_files_are_read_or_refused_by_name(method: str, tiny: LoadedBackbone) -> None:
    """What is read is written back as it was: no damage passes unseen into other bytes."""
    description, draw = describe(method, dim=1), np.random.default_rng(0)
    data, layout = write_slowly(description).data, skeleton(tiny, description)
    refused = 0
    for _ in range(1000):
        mutated = bytearray(data)
        for place in draw.integers(0, len(data), draw.integers(1, 8)):
            mutated[place] = draw.integers(0, 256)
        try:
            assert write_parts(read_parts(bytes(mutated), layout)) == bytes(mutated)
        except PackError:
            refused += 1
    assert 0 < refused < 1000


# --- descriptions ---------------------------------------------------------------------------------

YAML = (
    "backbone: vit_base_patch16_224_in21k\nbit: 1\ndataset: cifar\ndim: 32\nmethod:"
    " adaptformer-bihead\nnum_class: 100\nscale: 0.1\n"
)


@for_every(
    ("old", "new", "message"),
    [
        ("bit: 1", "bit: 4", "bit"),
        ("dim: 32", "dim: 0", "dim"),
        ("scale: 0.1", "scale: .nan", "scale"),
        ("scale: 0.1", "", "scale"),
        ("method: adaptformer-bihead", "method: vpt", "method"),
        ("_in21k", "", "backbone"),
        (YAML, "- 1\n", "Binary Adapter's description"),
        (YAML, "a: [", "not a YAML file"),
        (YAML, "!!python/object/apply:os.system ['true']", "not a YAML file"),
    ],
)
def test_a_description_that_is_not_valid_is_refused(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.bin").write_bytes(b"")
    (tmp_path / "a.yaml").write_text(YAML.replace(old, new))
    with pytest.raises(PackDamaged, match=message):
        read_files(tmp_path / "a.bin")


def test_mutated_descriptions_are_read_or_refused_by_name(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    (tmp_path / "a.bin").write_bytes(b"")
    for _ in range(1000):
        mutated = bytearray(YAML.encode())
        for place in draw.integers(0, len(mutated), 3):
            mutated[place] = draw.integers(0, 256)
        (tmp_path / "a.yaml").write_bytes(mutated)
        try:
            read_files(tmp_path / "a.bin")
        except PackError:
            continue


def test_a_missing_description_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(PackError, match=r"a\.yaml: cannot be read.*NAME\.yaml next to it"):
        read_files(tmp_path / "a.bin")


def on_their_backbone(pack: Pack, **changes: Any) -> Pack:
    """The pack as if it had been imported on ViT-B/16, with another recipe."""
    their = {
        "backbone": {**pack.metadata.backbone, "model": BACKBONE.model},
        "input": pack.metadata.input.model_copy(update={"size_px": INPUT.size_px}),
    }
    return dataclasses.replace(pack, metadata=pack.metadata.model_copy(update={**their, **changes}))


@for_every("method", METHODS)
def test_a_description_comes_back(
    method: str, import_tiny: Callable[[Description, bytes], Pack], tmp_path: Path
) -> None:
    description = describe(method)
    written = write_slowly(description)
    export_binary_adapter(
        on_their_backbone(import_tiny(description, written.data)), tmp_path / "a.bin"
    )
    assert read_files(tmp_path / "a.bin") == (written.data, description)
    assert (
        (tmp_path / "a.yaml")
        .read_text()
        .startswith("backbone: vit_base_patch16_224_in21k\nbit: 1\ndataset: cifar\n")
    )


def test_other_packs_are_refused_in_words(
    import_tiny: Callable[[Description, bytes], Pack], tmp_path: Path
) -> None:
    description = describe("adaptformer-bihead")
    pack = import_tiny(description, write_slowly(description).data)
    recipe = recipe_of(description)
    for refused, message in (
        (pack, "files are for vit_base_patch16_224.orig_in21k"),
        (
            dataclasses.replace(
                pack,
                metadata=on_their_backbone(pack).metadata.model_copy(
                    update={"input": pack.metadata.input}
                ),
            ),
            "224 px",
        ),
        (
            on_their_backbone(
                pack,
                recipe=recipe.model_copy(update={"head": Head(bits=8)}).model_dump(
                    exclude_none=True
                ),
            ),
            "has other parts",
        ),
        (on_their_backbone(pack, recipe={"connections": {}}), "has other parts"),
    ):
        with pytest.raises(ExportError, match=message):
            export_binary_adapter(refused, tmp_path / "a.bin")
    with pytest.raises(ExportError, match=r"ends in \.bin"):
        export_binary_adapter(pack, tmp_path / "a.safetensors")
    eight = Part(
        "head", 8, (TensorSpec("w", (1, 8)),), np.zeros(8, np.uint8), np.ones((1, 2), np.float32)
    )
    with pytest.raises(ExportError, match="has 8 bits"):
        write_parts([eight])
    assert list(tmp_path.iterdir()) == []


# --- the published files --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> Path:
    folder = PROJECT_ROOT.parent / "shared" / "reference" / "binary_adapter"
    if not folder.is_dir():
        pytest.skip(
            "optional data is absent: no published Binary Adapter files in"
            " ../shared/reference/binary_adapter"
        )
    return folder


def test_the_published_files_come_back_byte_for_byte_with_their_descriptions(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the commands, on a random ViT-B/16, since its weights are not needed for the bytes."""
    monkeypatch.setattr(
        binary_adapter, "BACKBONE", BACKBONE.model_copy(update={"weights": "random"})
    )
    files = sorted(published.glob("*.bin"))
    assert len(files) == 4
    for file in files:
        pack, back = tmp_path / f"{file.stem}.safetensors", tmp_path / f"{file.stem}.bin"
        assert taskpack("import", file, "--out", pack).code == 0
        answer = taskpack("export", pack, "--to", "binary-adapter", "--out", back)
        assert answer.code == 0, answer.words
        assert back.read_bytes() == file.read_bytes()
        assert back.with_suffix(".yaml").read_bytes() == file.with_suffix(".yaml").read_bytes()
        scale = yaml.safe_load(file.with_suffix(".yaml").read_text())["scale"]
        recipe = read_pack(pack).metadata.recipe
        assert (recipe.get("adapter") or recipe["lora"])["scale"] == scale  # type: ignore[index, union-attr]
        assert (
            description_of(read_pack(pack).metadata).dataset
            == file.stem.split("--")[1].split("-bit")[0]
        )
