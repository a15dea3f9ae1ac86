"""Conditions that users of vision backbones report, kind by kind: what blocks, layers and norms of
other architectures do to a part.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers_backbones import SWIN
from helpers_cases import for_every
from torch import nn

from pipeline.adaptation import AdaptedModel, SelectedIndex, attach, plan
from pipeline.adaptation.blocks import mlp_slots
from pipeline.adaptation.channels import channel_dims
from pipeline.adaptation.fused import in_thirds
from pipeline.adaptation.packing import describe, to_pack
from pipeline.adaptation.parts.connections import TunedLayer
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.errors import BackboneError
from pipeline.exchange.merged_checkpoint import export_checkpoint
from pipeline.exchange.onnx import _reason
from pipeline.exchange.peft import export_peft
from pipeline.packs import Pack
from pipeline.specs import Backbone, Input, Recipe, Task

CLASSES = ("one", "two", "three")
VIT = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
Select = Callable[..., SelectedIndex]


def load(model: str, size_px: int = 32, **arguments: Any) -> LoadedBackbone:
    return load_backbone(
        Backbone(model=model, arguments=arguments, weights="random"), Input(size_px=size_px)
    )


def moved(
    backbone: LoadedBackbone, parts: dict[str, Any], selected: SelectedIndex | None = None
) -> tuple[AdaptedModel, dict[str, torch.Tensor]]:
    """A model whose values are all large enough to matter, and its tensors by name."""
    model = attach(backbone, Recipe.model_validate(parts), len(CLASSES), selected=selected)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.values.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    model(torch.zeros(1, 3, backbone.size_px, backbone.size_px))  # hands the values to the modules
    return model, {tensor.name: value.detach() for tensor, value in model.values().items()}


def packed(
    model: str,
    backbone: LoadedBackbone,
    adapted: AdaptedModel,
    parts: dict[str, Any],
    tiny_task: Task,
    **arguments: Any,
) -> Pack:
    task = tiny_task.model_copy(
        update={"backbone": Backbone(model=model, arguments=arguments, weights="random")}
    )
    return to_pack(adapted, describe(task, Recipe.model_validate(parts), backbone, CLASSES))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def bottleneck(values: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x @ values[f"{name}.down"].T) @ values[f"{name}.up"].T


# --- blocks ---------------------------------------------------------------------------------------


@for_every("placement", ["parallel", "after_mlp", "after_attention", "after_both"])
def test_a_drop_path_that_serves_two_branches_gets_an_adapter_for_the_right_one(
    placement: str,
) -> None:
    """CaiT, CoaT, ConViT, EdgeNeXt and XCiT have one drop path for attention and MLP."""
    backbone = load("cait_xxs24_224", depth_token_only=1, **VIT)
    model, values = moved(backbone, {"adapter": {"width": 4, "placement": placement, "bits": 32}})
    block, x = backbone.model.get_submodule("blocks.0"), draw(1, 4, 32)
    with torch.inference_mode():
        attended = block.gamma_1 * block.attn(block.norm1(x))
        if placement in ("after_attention", "after_both"):
            attended = attended + bottleneck(values, "adapter.blocks.0.attention", attended)
        stream = x + attended
        branch = block.gamma_2 * block.mlp(block.norm2(stream))
        if placement in ("after_mlp", "after_both"):
            branch = branch + bottleneck(values, "adapter.blocks.0.mlp", branch)
        if placement == "parallel":
            branch = branch + bottleneck(values, "adapter.blocks.0.mlp", stream)
        torch.testing.assert_close(
            model.backbone.get_submodule("blocks.0")(x), stream + branch, rtol=1e-4, atol=1e-4
        )


POST_NORM = {
    "SwinV2-CR": ("swinv2_cr_tiny_224", 32, SWIN, "stages.0.blocks.0"),
    "relative positions": ("vit_relpos_small_patch16_rpn_224", 32, VIT, "blocks.0"),
    "EVA": (
        "eva_giant_patch14_224",
        28,
        {**VIT, "img_size": 28, "mlp_ratio": 2.0, "use_post_norm": True},
        "blocks.0",
    ),
}


@pytest.mark.parametrize("kind", POST_NORM)
def test_a_parallel_adapter_reads_the_stream_wherever_the_norms_are(kind: str) -> None:
    name, size_px, arguments, block_name = POST_NORM[kind]
    backbone = load(name, size_px, **arguments)
    slot = next(slot for slot in mlp_slots(backbone) if slot.block == block_name)
    assert (slot.mlp.stream, slot.mlp.end) == ("mlp", "drop_path2")  # type: ignore[union-attr]
    model, values = moved(backbone, {"adapter": {"width": 4, "bits": 32}})
    block = model.backbone.get_submodule(block_name)
    read: list[torch.Tensor] = []
    block.mlp.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))  # type: ignore[union-attr, operator]
    x = {"SwinV2-CR": draw(1, 16, 16, 16), "EVA": draw(1, 5, 32)}.get(kind, draw(1, 4, 32))
    with torch.inference_mode():
        plain, adapted = backbone.model.get_submodule(block_name)(x), block(x)
        beside = bottleneck(values, f"adapter.{block_name}.mlp", read[0]).reshape(x.shape)
        torch.testing.assert_close(adapted, plain + beside, rtol=1e-4, atol=1e-4)


def test_a_branch_that_a_backbone_lacks_is_refused_with_those_it_has() -> None:
    resnet, convnext = (
        load("test_resnet", 64),
        load("convnext_tiny", depths=[1, 1, 1, 1], dims=[8, 16, 24, 32]),
    )
    message = (
        r"^recipe\.adapter\.placement: given 'after_attention'; ConvNeXt has no attention branch"
        r" .*; choose parallel or after_mlp$"
    )
    with pytest.raises(BackboneError, match=message):
        plan(convnext, Recipe.model_validate({"adapter": {"placement": "after_attention"}}), 3)
    with pytest.raises(
        BackboneError,
        match=r"^recipe\.adapter: nothing in ResNet matches it; .*; leave this part out$",
    ):
        plan(resnet, Recipe.model_validate({"adapter": {}}), 3)


def test_an_mlp_is_given_all_its_arguments() -> None:
    """PVTv2's MLP is told the size of its feature map."""
    backbone = load(
        "pvt_v2_b0", depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32], num_heads=[1, 2, 2, 4]
    )
    model, _ = moved(backbone, {"smoa": {"experts": 2, "width": 2}})
    assert model(draw(1, 3, 32, 32)).shape == (1, 3)


# --- layers ---------------------------------------------------------------------------------------


def test_a_wrapper_shows_the_attributes_of_the_layer_in_it() -> None:
    """DaViT's position encoding reads its convolution's kernel size."""
    layer = TunedLayer(nn.Conv2d(3, 4, 5, stride=2), None)
    assert (layer.kernel_size, layer.stride, layer.out_channels) == ((5, 5), (2, 2), 4)
    with pytest.raises(AttributeError, match="no_such"):
        _ = layer.no_such


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (
            "davit_tiny",
            {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "num_heads": [1, 2, 2, 2]},
        ),
        ("convit_tiny", {**VIT, "num_heads": 4, "local_up_to_layer": 1}),
    ],
)
def test_connections_train_where_a_block_looks_at_its_layers_or_keeps_tensors(
    name: str, arguments: dict[str, Any], random_selection: Select
) -> None:
    """ConViT keeps the distances between patches that it made in its first pass."""
    backbone = load(name, **arguments)
    model, _ = moved(backbone, {"connections": {}, "biases": {}}, random_selection(backbone, 1))
    model.train()(draw(2, 3, 32, 32)).square().sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.values.parameters())  # type: ignore[union-attr]


def test_what_a_network_keeps_of_its_parameters_trains_with_them() -> None:
    """LeViT keeps its attention biases from pass to pass in evaluation, which is how a frozen
    network runs.
    """
    backbone = load(
        "levit_128s",
        64,
        img_size=64,
        embed_dim=[16, 24, 32],
        key_dim=8,
        num_heads=[1, 2, 2],
        depth=[1, 1, 1],
    )
    model, x = moved(backbone, {"full": {}})[0].train(), draw(2, 3, 64, 64)
    for _ in range(2):
        model(x).square().sum().backward()
    gradients = [
        gradient for name, gradient in _gradients(model) if name.endswith("attention_biases")
    ]
    assert float(gradients[0].abs().max()) > 0
    with torch.no_grad():
        before = model.eval()(x)
        for parameter in model.values.parameters():
            parameter.add_(0.1)
        changed = model(x)
        assert not torch.equal(changed, before)
        torch.testing.assert_close(attach_like(backbone, model)(x), changed)


def _gradients(model: AdaptedModel) -> list[tuple[str, torch.Tensor]]:
    """The gradient of each tensor, with its name."""
    return [
        (tensor.name, gradient)
        for group in model.values.flat
        for tensor, gradient in zip(
            group.tensors,
            group.latent_N.grad.split([tensor.values for tensor in group.tensors]),
            strict=True,
        )  # type: ignore[union-attr, operator, arg-type]
    ]


def attach_like(backbone: LoadedBackbone, model: AdaptedModel) -> AdaptedModel:
    """Another model with the values of `model`, which has seen no pass yet."""
    other = attach(backbone, Recipe.model_validate({"full": {}}), 3)
    other.values.load_state_dict(model.values.state_dict())
    return other


@pytest.mark.parametrize(("name", "size_px", "arguments"), [("test_coatnet", 64, {"img_size": 64})])
def test_q_k_and_v_are_refused_where_a_fused_layer_goes_head_by_head(
    name: str, size_px: int, arguments: dict[str, Any]
) -> None:
    backbone = load(name, size_px, **arguments)
    mixed = [layer for layer, is_in_thirds in in_thirds(backbone).items() if not is_in_thirds]
    assert mixed
    with pytest.raises(
        BackboneError,
        match=(
            rf"^recipe\.lora\.targets: given 'q'; the rows of '{mixed[0]}' .*; name the whole"
            r" layer, qkv$"
        ),
    ):
        plan(backbone, Recipe.model_validate({"lora": {}}), 3)
    assert plan(backbone, Recipe.model_validate({"lora": {"targets": ["qkv"]}}), 3)


@for_every(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", VIT),
        ("swin_tiny_patch4_window7_224", SWIN),
        ("beit_base_patch16_224", VIT),
        ("xcit_nano_12_p16_224", VIT),
    ],
)
def test_thirds_are_known_as_thirds(name: str, arguments: dict[str, Any]) -> None:
    backbone = load(name, **arguments)
    assert set(in_thirds(backbone).values()) == {True}
    assert len(in_thirds(backbone)) >= 2


# --- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size_px"),
    [("test_resnet", 64), ("test_efficientnet", 64), ("test_efficientnet_gn", 64)],
)
def test_norms_of_convolutional_networks_train_in_bfloat16(name: str, size_px: int) -> None:
    model, _ = moved(load(name, size_px), {"norms": {"which": "all"}})
    model.compute_in(torch.bfloat16)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(draw(2, 3, size_px, size_px)).float(), torch.arange(2))
    loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.values.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["test_efficientnet", "test_efficientnet_gn"])
def test_norms_with_an_activation_inside_are_exported(
    name: str, random_selection: Select, tiny_task: Task, tmp_path: Path
) -> None:
    """BatchNormAct2d and GroupNormAct hold a dropout and an activation."""
    backbone, parts = load(name, 64), {"connections": {"top_k": 2}, "norms": {"which": "all"}}
    selected = random_selection(backbone, 2)
    model, _ = moved(backbone, parts, selected)
    pack = packed(name, backbone, model, parts, tiny_task)
    assert export_checkpoint(pack, backbone, tmp_path / "timm") < 1e-3
    plain = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    x = draw(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(plain(model.normalise(x)), model.eval()(x), rtol=1e-3, atol=1e-3)


def test_ssf_scales_the_channels_of_outputs_in_every_layout() -> None:
    """LeViT's batch norms are over tokens [tokens, channels]; a layer's type does not tell."""
    backbone = load(
        "levit_128s",
        64,
        img_size=64,
        embed_dim=[16, 24, 32],
        key_dim=8,
        num_heads=[1, 2, 2],
        depth=[1, 1, 1],
    )
    dims = channel_dims(backbone)
    assert dims["stages.0.blocks.0.attn.qkv.bn"] == -1
    assert dims["stem.conv1.linear"] == -3
    model, _ = moved(backbone, {"ssf": {}})
    assert model(draw(2, 3, 64, 64)).shape == (2, 3)


def test_ssf_is_right_where_a_width_equals_the_channels() -> None:
    backbone = load(
        "convnext_tiny", depths=[1, 1, 1, 1], dims=[8, 16, 24, 32]
    )  # 8 channels of 8x8 after the stem
    dims = channel_dims(backbone)
    assert dims["stem.0"] == dims["stem.1"] == dims["stages.0.blocks.0.conv_dw"] == -3
    assert dims["stages.0.blocks.0.norm"] == dims["stages.0.blocks.0.mlp.fc1"] == -1
    model, values = moved(backbone, {"ssf": {"bits": 32}})
    x = draw(1, 3, 32, 32)
    with torch.inference_mode():
        plain = backbone.model.get_submodule("stem.0")(x)
        scale, shift = (values[f"ssf.stem.0.{key}"].view(1, -1, 1, 1) for key in ("scale", "shift"))
        torch.testing.assert_close(
            model.backbone.get_submodule("stem.0")(x), (1 + scale) * plain + shift
        )


# --- exports --------------------------------------------------------------------------------------


def test_a_class_token_before_clips_first_norm_is_exported(tiny_task: Task, tmp_path: Path) -> None:
    name, parts = "vit_base_patch16_clip_224", {"class_token": {"bits": 32}}
    backbone = load(name, **VIT)
    assert not isinstance(backbone.model.norm_pre, nn.Identity)
    model, _ = moved(backbone, parts)
    assert (
        export_checkpoint(
            packed(name, backbone, model, parts, tiny_task, **VIT), backbone, tmp_path / "timm"
        )
        < 1e-4
    )


def test_peft_files_hold_norms_with_an_activation_inside(
    random_selection: Select, tiny_task: Task, tmp_path: Path
) -> None:
    name, parts = "convnext_tiny", {"connections": {"top_k": 2}, "norms": {"which": "all"}}
    arguments = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
    backbone = load(name, **arguments)
    model, _ = moved(backbone, parts, random_selection(backbone, 2))
    export_peft(
        packed(name, backbone, model, parts, tiny_task, **arguments), backbone, tmp_path / "peft"
    )
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()


def test_why_torch_cannot_write_onnx_is_one_line_without_colours() -> None:
    """Torch's own message begins with how to debug its exporter."""
    error = RuntimeError(
        "Failed to convert. \x1b[96mThis is step 3/3\x1b[0m of exporting. Next steps:\n- If there"
        " is a missing function"
    )
    error.__cause__ = AssertionError("only 4D query,\n\x1b[96mkey and value\x1b[0m are supported")
    assert _reason(error) == "only 4D query, key and value are supported"
