"""What a plan promises is what is attached, on every family of backbones, and what matches nothing
is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers_backbones import SWIN_V2
from helpers_cases import for_every

from pipeline.adaptation import AdaptedModel, PlannedTensor, SelectedIndex, attach, plan
from pipeline.adaptation.parts.connections import TunedLayer
from pipeline.adaptation.parts.smoa import ParallelToMlp
from pipeline.adaptation.values import FlatValues
from pipeline.backbones import LoadedBackbone, fingerprint, load_backbone
from pipeline.errors import BackboneError
from pipeline.specs import Backbone, Biases, Connections, Head, Input, Norms, Recipe, Smoa

CLASSES = 5
FAMILIES = ("vit", "swin", "convnext", "convnext_linear")
PARTS = {
    "connections": Recipe(connections=Connections(top_k=2, bits=8)),
    "biases": Recipe(biases=Biases(bits=16)),
    "norms": Recipe(norms=Norms(bits=8)),
    "smoa": Recipe(smoa=Smoa(experts=3, width=2, bits=4, dropout=0)),
    "single expert": Recipe(smoa=Smoa(experts=1, width=2, bits=1)),
    "head": Recipe(head=Head(bits=1)),
    "all": Recipe(
        connections=Connections(top_k=3, bits=1),
        biases=Biases(),
        norms=Norms(),
        smoa=Smoa(experts=2, width=3, dropout=0),
        head=Head(bits=32),
    ),
}
Select = Callable[..., SelectedIndex]
every_family = for_every("family", FAMILIES)
every_part = for_every("part", PARTS)


def load(spec: Backbone) -> LoadedBackbone:
    return load_backbone(spec, Input(size_px=32))


def images(count: int = 3) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def attached(
    backbone: LoadedBackbone, recipe: Recipe, select: Select, seed: int = 0
) -> AdaptedModel:
    top_k = recipe.connections.top_k + 1 if recipe.connections is not None else 1
    return attach(backbone, recipe, CLASSES, selected=select(backbone, top_k), seed=seed)


def by_tensor(
    model: AdaptedModel, flat: Callable[[FlatValues], torch.Tensor]
) -> dict[PlannedTensor, torch.Tensor]:
    """What `flat` gives for each group of values (the latent values, or their gradient), cut into
    the plan's tensors by their sizes alone.
    """
    found = {}
    for group in model.values.flat:
        assert isinstance(group, FlatValues)
        start = 0
        for tensor in (
            tensor
            for tensor in model.values.tensors
            if (tensor.bits, tensor.has_mean) == (group.bits, group.has_mean)
        ):
            found[tensor] = flat(group)[start : start + math.prod(tensor.shape)].reshape(
                tensor.shape
            )
            start += math.prod(tensor.shape)
        assert start == len(flat(group))
    return {tensor: found[tensor] for tensor in model.values.tensors}


def latent(model: AdaptedModel) -> dict[PlannedTensor, torch.Tensor]:
    return by_tensor(model, lambda group: group.latent_N.detach())


def expert_load(model: AdaptedModel) -> dict[str, list[int]]:
    """Tokens routed to each expert in training, by bank."""
    return {str(number): bank.expert_load.tolist() for number, bank in enumerate(model.banks)}


@every_family
@every_part
def test_planned_tensors_are_the_trained_ones(
    family: str, part: str, families: dict[str, Backbone], random_selection: Select
) -> None:
    backbone = load(families[family])
    planned, model = (
        plan(backbone, PARTS[part], CLASSES),
        attached(backbone, PARTS[part], random_selection),
    )
    assert model.values.tensors == tuple(latent(model)) == planned
    assert {tensor: tuple(value.shape) for tensor, value in model.values().items()} == {
        tensor: tensor.shape for tensor in planned
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trainable} == {
        id(parameter) for parameter in model.values.parameters()
    }
    widths = sorted({tensor.bits for tensor in planned})
    assert [parameter.numel() for parameter in trainable] == [
        sum(tensor.values for tensor in planned if tensor.bits == bits) for bits in widths
    ]
    assert model.trained_values() == sum(parameter.numel() for parameter in trainable)


@every_family
def test_a_plan_counts_what_the_backbone_has(family: str, families: dict[str, Backbone]) -> None:
    """Counted from the backbone's parameters by their names and shapes alone."""
    backbone = load(families[family])
    planned = plan(backbone, PARTS["all"], CLASSES)
    count = {
        part: sum(tensor.values for tensor in planned if tensor.part == part)
        for part in ("connections", "biases", "norms", "adapters", "head")
    }
    parameters = dict(backbone.model.named_parameters())
    layers = {
        name.removesuffix(".weight"): tensor
        for name, tensor in parameters.items()
        if name.endswith(".weight") and tensor.ndim in (2, 4)
    }
    second_norm = "norm2." if family in ("vit", "swin") else ".conv_dw"
    blocks = {name.rsplit(second_norm, 1)[0] for name in parameters if second_norm in name}
    widths = [tensor.shape[1] for name, tensor in layers.items() if name.endswith("mlp.fc1")]
    assert len(blocks) == len(widths) > 0
    assert count["connections"] == sum(
        tensor.shape[0] * min(3, tensor[0].numel()) for tensor in layers.values()
    )
    own = sum(parameters[f"{name}.bias"].numel() for name in layers if f"{name}.bias" in parameters)
    beside = [
        tensor.numel()
        for name, tensor in parameters.items()
        if name.endswith(("gamma", "bias_table"))
    ]
    assert count["biases"] == own + sum(beside)
    assert bool(beside) == (family != "vit")
    assert count["norms"] == sum(2 * width for width in widths)
    assert count["adapters"] == sum(
        2 * (2 * 3 * width) + 8 * width + 2 * 8 for width in set(widths)
    )
    assert count["head"] == CLASSES * (backbone.width + 1)


@every_family
def test_changes_are_where_their_names_say(
    family: str, families: dict[str, Backbone], random_selection: Select
) -> None:
    recipe = PARTS["all"].model_copy(update={"smoa": None})
    model = attached(load(families[family]), recipe, random_selection)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.values.parameters():  # no two tensors alike
        parameter.data.normal_(0, 0.01, generator=generator)
    model(images(1))
    original = load(families[family]).model
    for tensor, value in model.values().items():
        owner, _, leaf = tensor.name.rpartition(".")
        if tensor.part == "norms":
            changed = original.get_parameter(tensor.name) + value
            assert torch.equal(model.backbone.get_submodule(owner).current[leaf], changed)
        elif leaf in ("gamma", "relative_position_bias_table"):
            frozen = original.get_parameter(tensor.name)
            assert torch.equal(getattr(model.backbone.get_submodule(owner), leaf), frozen + value)
        elif tensor.part in ("connections", "biases"):
            layer, frozen = (
                network.get_submodule(tensor.name) for network in (model.backbone, original)
            )
            if tensor.part == "connections":
                entries = frozen.weight.take(layer.index_N)
                assert torch.equal(layer.current["connections"], entries + value)
                assert torch.equal(layer.weight.take(layer.index_N), entries + value)
            else:
                assert torch.equal(layer.current["bias"], frozen.bias + value)
            assert torch.equal(model.positions()[tensor.name], layer.index_N)
        else:
            assert torch.equal(model.head.current[leaf], value)


@every_family
def test_every_block_of_a_width_shares_its_banks_tensors(
    family: str, families: dict[str, Backbone], random_selection: Select
) -> None:
    model = attached(load(families[family]), PARTS["smoa"], random_selection)
    model(images(1))
    blocks = [module for module in model.backbone.modules() if isinstance(module, ParallelToMlp)]
    assert len(blocks) >= len(model.banks) > 0
    for block in blocks:
        (bank,) = block.bank
        width = bank.current["down"].shape[-1]
        planned = {
            tensor.name.removeprefix(f"smoa.{width}."): value
            for tensor, value in model.values().items()
            if tensor.part == "adapters"
        }
        assert bank.current.keys() == {"down", "up", "router", "embeddings"}
        assert all(torch.equal(value, planned[name]) for name, value in bank.current.items())
    assert {id(block.bank[0]) for block in blocks} == {id(bank) for bank in model.banks}


def test_a_layer_without_bias_gets_none(tiny_backbone: Backbone) -> None:
    backbone = load(
        tiny_backbone.model_copy(
            update={"arguments": {**tiny_backbone.arguments, "qkv_bias": False}}
        )
    )
    names = {
        tensor.name
        for tensor in plan(backbone, PARTS["biases"], CLASSES)
        if tensor.part == "biases"
    }
    assert "blocks.0.attn.proj" in names
    assert "blocks.0.attn.qkv" not in names
    model = attach(backbone, PARTS["biases"], CLASSES)
    model(images(1))
    assert model.backbone.get_submodule("blocks.0.attn.qkv").current == {}


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["biases", "norms", "smoa"])
def test_a_part_that_matches_nothing_is_refused(part: str) -> None:
    resnet = load(Backbone(model="resnet18", weights="random"))
    with pytest.raises(
        BackboneError,
        match=rf"recipe\.{part}: nothing in ResNet matches it; it needs .*; leave this part out",
    ):
        plan(resnet, PARTS[part], CLASSES)
    with pytest.raises(BackboneError, match=rf"recipe\.{part}"):
        attach(resnet, PARTS[part], CLASSES)


RESTLESS: dict[str, Backbone] = {
    "standardised convolutions": Backbone(model="test_nfnet", weights="random"),
    "padding by input": Backbone(model="tf_mobilenetv3_small_minimal_100", weights="random"),
    "weights read by the block": SWIN_V2,
}


@pytest.mark.parametrize("kind", RESTLESS)
def test_layers_that_are_more_than_their_weight_are_left_alone_or_refused(
    kind: str, random_selection: Select
) -> None:
    """Weight standardisation, padding that depends on the input, blocks that use a layer's weight
    themselves: never a silently other network.
    """
    backbone, x = load(RESTLESS[kind]), images(2)
    try:
        model = attach(
            backbone,
            Recipe(connections=Connections(bits=32)),
            CLASSES,
            selected=random_selection(backbone, 1),
        )
    except BackboneError:
        return
    with torch.inference_mode():
        model(x)  # hands the changes to the layers
        x = model.normalise(x)
        torch.testing.assert_close(model.backbone(x), backbone.model(x), rtol=1e-4, atol=1e-4)


# --- how it starts --------------------------------------------------------------------------------


@every_family
@for_every("bits", [16, 32])
def test_changes_start_without_effect(
    family: str, bits: int, families: dict[str, Backbone], random_selection: Select
) -> None:
    backbone = load(families[family])
    recipe = Recipe.model_validate(
        {part: {"bits": bits} for part in ("connections", "biases", "norms")}
    )
    model, x = attached(backbone, recipe, random_selection), images()
    with torch.inference_mode():
        model(x)  # hands the changes to the layers
        torch.testing.assert_close(
            model.backbone(model.normalise(x)),
            backbone.model(model.normalise(x)),
            rtol=1e-5,
            atol=1e-5,
        )


@every_family
def test_images_are_normalised_once(family: str, families: dict[str, Backbone]) -> None:
    backbone = load(families[family])
    model, x = attach(backbone, PARTS["head"], CLASSES), images()
    by_hand = torch.stack(
        [
            (x[:, c].float() / 255 - backbone.images.mean[c]) / backbone.images.std[c]
            for c in range(3)
        ],
        dim=1,
    )
    with torch.inference_mode():
        head = {tensor.name: value for tensor, value in model.values().items()}
        expected = backbone.model(by_hand) @ head["head.weight"].T + head["head.bias"]
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x.float() / 255), expected, rtol=1e-4, atol=1e-5)


@every_family
def test_a_seed_gives_the_same_model(
    family: str, families: dict[str, Backbone], random_selection: Select
) -> None:
    backbone = load(families[family])
    first, again, other = (
        latent(attached(backbone, PARTS["all"], random_selection, seed=seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first.values(), again.values(), strict=True))
    head = next(tensor for tensor in first if tensor.name == "head.weight")
    assert not torch.equal(first[head], other[head])


def test_the_global_generator_and_the_backbone_are_left_alone(
    tiny_backbone: Backbone, random_selection: Select
) -> None:
    backbone = load(tiny_backbone)
    modules, before = list(backbone.model.modules()), fingerprint(backbone.model.state_dict())
    state = torch.get_rng_state()
    model = attached(backbone, PARTS["all"], random_selection)
    model.train()
    (model(images()).square().mean() + model.auxiliary_loss()).backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert [id(module) for module in backbone.model.modules()] == [id(module) for module in modules]
    assert fingerprint(backbone.model.state_dict()) == before
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


@every_family
@for_every("bits", [1, 4, 32])
def test_every_trained_tensor_learns(
    family: str, bits: int, families: dict[str, Backbone], random_selection: Select
) -> None:
    recipe = Recipe.model_validate(
        {part: {"bits": bits} for part in ("connections", "biases", "norms", "smoa", "head")}
    )
    model = attached(load(families[family]), recipe, random_selection).train()
    logits = model(images(8))
    (logits.square().mean() + logits[:, 0].mean() + model.auxiliary_loss()).backward()
    assert all(parameter.grad is not None for parameter in model.values.parameters())
    gradients = by_tensor(model, lambda group: group.latent_N.grad)  # type: ignore[arg-type, return-value]
    assert [
        tensor.name for tensor, gradient in gradients.items() if not bool(gradient.isfinite().all())
    ] == []
    still = [tensor for tensor, gradient in gradients.items() if float(gradient.abs().max()) == 0]
    # Attention does not see a change of all keys alike, so a key's bias alone may have no gradient;
    # every tensor here holds more than that.
    assert [tensor.name for tensor in still] == []


# --- modes and devices ----------------------------------------------------------------------------


def test_only_the_banks_know_a_training_mode(
    tiny_backbone: Backbone, random_selection: Select
) -> None:
    spec = tiny_backbone.model_copy(
        update={
            "arguments": {**tiny_backbone.arguments, "drop_path_rate": 0.9, "proj_drop_rate": 0.5}
        }
    )
    model, x = attached(load(spec), PARTS["all"], random_selection), images()
    with torch.no_grad():
        quiet = model(x)
        assert torch.equal(model.train()(x), quiet)
    assert model.training
    assert all(bank.training for bank in model.banks)
    assert not any(module.training for module in model.backbone.modules())
    assert not model.eval().training
    assert not any(bank.training for bank in model.banks)


def test_everything_moves_with_the_model(tiny_backbone: Backbone, random_selection: Select) -> None:
    """`to(device)` reaches every tensor that a forward pass needs."""
    recipe = PARTS["all"].model_copy(update={"smoa": None})
    model = attached(load(tiny_backbone), recipe, random_selection).to("meta")
    held = (
        (name, key, value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    )
    assert [(name, key) for name, key, value in held if value.device.type != "meta"] == []


def test_converting_the_model_leaves_the_shared_backbone_as_it_was(
    tiny_backbone: Backbone, random_selection: Select
) -> None:
    """PyTorch moves and converts parameters in place, so a shared one would take the cached
    backbone with it.
    """
    backbone = load(tiny_backbone)
    model = attached(backbone, PARTS["all"], random_selection)
    try:
        model.double()
        assert {tensor.dtype for tensor in backbone.model.state_dict().values()} == {torch.float32}
    finally:
        backbone.model.float()


def test_the_auxiliary_loss_is_the_weighted_balance_of_the_banks(
    families: dict[str, Backbone], random_selection: Select
) -> None:
    recipe = Recipe(smoa=Smoa(experts=2, width=2, balance_weight=0.5))
    model = attached(load(families["swin"]), recipe, random_selection).train()
    assert len(model.banks) == 2, "Swin's stages have two widths"
    model(images())
    expected = sum(float(bank.loss().detach()) for bank in model.banks)
    assert float(model.auxiliary_loss().detach()) == pytest.approx(expected, rel=1e-5)
    assert expected > 0


def test_a_forward_pass_forgets_the_balance_of_the_last_and_adds_to_the_load(
    families: dict[str, Backbone], random_selection: Select
) -> None:
    model = attached(load(families["swin"]), PARTS["smoa"], random_selection).train()
    model(images(2))
    first, terms, load_once = (
        model.auxiliary_loss().detach(),
        [len(bank.routed) for bank in model.banks],
        expert_load(model),
    )
    assert all(count > 0 for count in terms)
    assert len(load_once) == len(model.banks)
    model(images(2))
    assert [len(bank.routed) for bank in model.banks] == terms
    assert torch.equal(model.auxiliary_loss().detach(), first)
    assert expert_load(model) == {
        name: [2 * tokens for tokens in counts] for name, counts in load_once.items()
    }
    assert all(sum(counts) > 0 for counts in load_once.values())
    model.eval()(images(2))
    assert float(model.auxiliary_loss()) == 0


def test_experts_without_a_single_token_are_named_with_the_load(
    families: dict[str, Backbone], random_selection: Select
) -> None:
    model = attached(load(families["swin"]), PARTS["smoa"], random_selection).train()
    assert model.idle_experts() == "", "nothing was trained yet"
    first, second = model.banks
    first.expert_load.copy_(torch.tensor([5, 0, 7]))
    second.expert_load.copy_(torch.tensor([1, 2, 3]))
    assert model.idle_experts().startswith(
        "bank 0: 1 of 3 experts were never used (tokens: 5, 0, 7); try fewer experts, or"
    )
    assert "bank 1" not in model.idle_experts()


@every_family
@for_every("low", [False, True])
def test_a_training_pass_multiplies_with_the_frozen_weights_and_the_connections(
    family: str, low: bool, families: dict[str, Backbone], random_selection: Select
) -> None:
    model = attached(load(families[family]), PARTS["connections"], random_selection)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):  # what the second writes is in the place of what the first wrote
        for parameter in model.values.parameters():
            parameter.data.normal_(0, 0.1, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            model(images(1))
    layers = [
        layer
        for layer in model.backbone.modules()
        if isinstance(layer, TunedLayer) and layer.index_N is not None
    ]
    assert layers
    for layer in layers:
        assert layer.written is not None
        assert layer.written.dtype == (torch.bfloat16 if low else torch.float32)
        assert torch.equal(layer.written, layer.weight.to(layer.written.dtype))
        assert not torch.equal(layer.weight, layer.base.weight)
