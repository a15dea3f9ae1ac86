"""What training computes with and evaluation does not: low-precision copies, and values merged into
the layers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pipeline.adaptation import AdaptedModel, SelectedIndex, attach
from pipeline.adaptation.working import WorkingCopies
from pipeline.backbones import LoadedBackbone, fingerprint, load_backbone
from pipeline.specs import Backbone, Biases, Connections, Input, Norms, Recipe, Smoa

RECIPE = Recipe(
    connections=Connections(top_k=2, bits=4),
    biases=Biases(bits=32),
    norms=Norms(bits=8),
    smoa=Smoa(experts=2, width=4, bits=1),
)
every_family = pytest.mark.parametrize("family", ["vit", "swin", "convnext", "convnext_linear"])


def build(backbone: LoadedBackbone, random_selection: Callable[..., SelectedIndex]) -> AdaptedModel:
    """An adapted model whose values are all large enough to show."""
    model = attach(backbone, RECIPE, 5, selected=random_selection(backbone, 2))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.values.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    return model


def pixels(size_px: int) -> torch.Tensor:
    return torch.rand(3, 3, size_px, size_px, generator=torch.Generator().manual_seed(1))


@every_family
def test_merged_it_computes_the_same(
    family: str, families: dict[str, Backbone], random_selection: Callable[..., SelectedIndex]
) -> None:
    backbone = load_backbone(families[family], Input(size_px=32))
    model = build(backbone, random_selection)
    with torch.no_grad():
        expected = model(pixels(32))
        with model.merged():
            merged = model(pixels(32))
            for parameter in model.values.parameters():
                parameter.data.zero_()
            assert torch.equal(model(pixels(32)), merged), (
                "values are read once, when they are merged"
            )
        assert not torch.allclose(model(pixels(32)), merged)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


@every_family
def test_training_in_bfloat16_keeps_the_stream_low_and_the_backbone_untouched(
    family: str, families: dict[str, Backbone], random_selection: Callable[..., SelectedIndex]
) -> None:
    backbone = load_backbone(families[family], Input(size_px=32))
    before = fingerprint(backbone.model.state_dict())
    model = build(backbone, random_selection)
    seen: list[torch.dtype] = []
    for module in model.backbone.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    model.compute_in(torch.bfloat16)
    optimiser = torch.optim.AdamW(model.values.parameters(), lr=0.01)
    for _ in range(2):
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(pixels(32)).float().square().mean()
        loss.backward()
        optimiser.step()
    assert set(seen) == {torch.bfloat16}
    assert fingerprint(backbone.model.state_dict()) == before
    model.eval()
    shared = {parameter.data_ptr() for parameter in backbone.model.parameters()}
    assert {parameter.data_ptr() for parameter in model.backbone.parameters()} == shared, (
        "evaluation uses the backbone's own numbers"
    )


def test_batch_norm_and_what_changes_are_added_to_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 4))
    before = [parameter.data_ptr() for parameter in model.parameters()]
    copies = WorkingCopies(model, torch.bfloat16, kept=[model[2].bias])
    copies.use(True)
    assert [parameter.dtype for parameter in model.parameters()] == [torch.bfloat16] * 2 + [
        torch.float32
    ] * 2 + [torch.bfloat16, torch.float32]
    copies.use(False)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


def test_a_model_that_moves_after_training_is_wholly_where_it_moved(
    families: dict[str, Backbone], random_selection: Callable[..., SelectedIndex]
) -> None:
    model = build(load_backbone(families["vit"], Input(size_px=32)), random_selection)
    model.compute_in(torch.bfloat16)
    model.train()
    model.eval()
    # As on another device, the parameters keep their objects and change their data.
    model.to(torch.float64)
    model.eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    model.train()
    assert torch.bfloat16 in {parameter.dtype for parameter in model.backbone.parameters()}
    model.to(torch.float32)
    assert torch.bfloat16 in {parameter.dtype for parameter in model.backbone.parameters()}, (
        "the mode survives the move"
    )
    model.eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@every_family
def test_a_merged_model_takes_its_merged_weights_along(
    family: str, families: dict[str, Backbone], random_selection: Callable[..., SelectedIndex]
) -> None:
    model = build(load_backbone(families[family], Input(size_px=32)), random_selection)
    model.merge()
    with torch.no_grad():
        expected = model(pixels(32))
        moved = model.to(torch.float64)(pixels(32).double())
    assert moved.dtype == torch.float64
    torch.testing.assert_close(moved.float(), expected, rtol=1e-4, atol=1e-5)
