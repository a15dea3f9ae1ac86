"""What the papers' released code does, held as values: our catalogue and our formulas against
theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers_cases import for_every
from helpers_paths import PROJECT_ROOT, TESTS
from torchvision.transforms import functional as torchvision_functional

from pipeline.adaptation import AdaptedModel, attach, plan
from pipeline.adaptation.drop_path import drop_rates
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.data import augment
from pipeline.data.augment import _change_colours, _Numbers, _rounds, turn_hue
from pipeline.errors import BackboneError
from pipeline.specs import Adapter, Backbone, Biases, Head, Input, Recipe, Selection, Ssf, Training
from pipeline.specs.catalogue import load_methods
from pipeline.specs.paths import DATA_ROOT
from pipeline.specs.task_files import load_task, load_tasks
from pipeline.training.averaging import MovingAverage
from pipeline.training.mixing import mix

CATALOGUE = PROJECT_ROOT / "tasks"

# Learning rate, batch size, K and drop path of the training scripts that GPS's authors released on
# 2024-10-17 (FightingFighting/GPS, train_scripts/vit); for FGVC also mixup, CutMix, label smoothing
# and the decay of the moving average, of which the first three are defaults of their args.py.
GPS_VTAB = {
    "caltech101": (0.002, 16, 1, 0),
    "cifar100": (0.01, 32, 1, 0),
    "clevr_count": (0.0003, 16, 1, 0.1),
    "clevr_dist": (0.002, 16, 1, 0.1),
    "diabetic_retinopathy": (0.002, 32, 1, 0.2),
    "dmlab": (0.0015, 16, 1, 0.1),
    "dsprites_loc": (0.007, 32, 1, 0),
    "dsprites_ori": (0.0005, 16, 1, 0.2),
    "dtd": (0.002, 16, 1, 0),
    "eurosat": (0.002, 16, 1, 0),
    "kitti": (0.001, 16, 1, 0),
    "oxford_flowers102": (0.002, 16, 1, 0),
    "oxford_iiit_pet": (0.003, 32, 1, 0),
    "patch_camelyon": (0.004, 32, 2, 0),
    "resisc45": (0.0015, 16, 1, 0.1),
    "smallnorb_azi": (0.003, 32, 1, 0.1),
    "smallnorb_ele": (0.0003, 32, 1, 0.2),
    "sun397": (0.0025, 16, 1, 0),
    "svhn": (0.005, 32, 1, 0),
}
GPS_FGVC = {
    "cub": (0.003, 32, 2, 0, 0.8, 1.0, 0.1, 0.9998),
    "nabirds": (0.0001, 32, 20, 0.1, 0.8, 1.0, 0.1, 0.9998),
    "flowers": (0.001, 32, 1, 0.1, 0.8, 1.0, 0.1, 0.99),
    "cars": (0.0005, 32, 15, 0, 0.8, 1.0, 0.1, 0.9998),
    "dogs": (0.0001, 64, 1, 0, 0.8, 1.0, 0.1, 0.9998),
}


SCALES = (0.01, 0.1, 1, 10, 100)
"""What Binary Adapter tunes per task."""
ADAPTER_METHODS = sorted(
    path.stem
    for path in (CATALOGUE / "methods").glob("*.yaml")
    if path.name.startswith(("adapt", "lora", "smoa", "fact", "dtl"))
)


@pytest.fixture(autouse=True)
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_ROOT, str(tmp_path / "datasets"))


@pytest.mark.parametrize(
    ("suite", "table"), [("vtab1k", GPS_VTAB), ("fgvc", GPS_FGVC)], ids=["vtab1k", "fgvc"]
)
def test_the_catalogue_trains_as_the_released_scripts_of_gps(
    suite: str, table: dict[str, tuple[float, ...]]
) -> None:
    tasks = {name: load_task(CATALOGUE / suite / f"{name}.yaml") for name in table}
    names = (
        ("drop_path",)
        if suite == "vtab1k"
        else ("drop_path", "mixup", "cutmix", "label_smoothing", "ema")
    )
    ours = {
        name: (
            training.learning_rate,
            training.batch_size,
            task.recipe.connections.top_k,
            *(getattr(training, each) for each in names),
        )
        for name, task in tasks.items()
        for training in [task.recipe.training]
        if task.recipe.connections is not None
    }
    assert ours == table
    assert {
        (
            task.recipe.training.epochs,
            task.recipe.training.warmup_epochs,
            task.recipe.training.weight_decay,
        )
        for task in tasks.values()
    } == {(100, 10, 0)}


# --- the setting of Binary Adapter ----------------------------------------------------------------


def test_the_catalogue_has_the_setting_of_binary_adapters_code() -> None:
    """Its main.py, vtab.py and train.sh, on the same 19 tasks as the suite of VTAB-1k."""
    vtab1k = {task.name.split("-")[1]: task for task in load_tasks([CATALOGUE / "vtab1k"])}
    tasks = {task.name.split("-")[1]: task for task in load_tasks([CATALOGUE / "binary_adapter"])}
    assert {name: task.data for name, task in tasks.items()} == {
        name: task.data for name, task in vtab1k.items()
    }
    for task in tasks.values():
        assert task.backbone == Backbone(
            model="vit_base_patch16_224.orig_in21k", mean=(0, 0, 0), std=(1, 1, 1)
        )
        assert (task.input.mean, task.input.std, task.input.size_px) == (None, None, 224)
        training = task.recipe.training
        assert (training.epochs, training.warmup_epochs, training.batch_size) == (100, 10, 64)
        assert (training.learning_rate, training.weight_decay) == (0.001, 0.0001)
        assert (training.drop_path, training.augment, training.mixup) == (0.1, "none", 0)
        assert task.recipe.adapter == Adapter(width=32, bits=1, placement="parallel", dropout=0.1)
        assert task.recipe.head == Head(bits=1, bias=False)
        assert task.recipe.connections is task.recipe.biases is None
        assert task.search.axes() == {"scale": SCALES}


@for_every("method", ADAPTER_METHODS)
def test_methods_with_adapters_try_all_scales_of_binary_adapter(method: str) -> None:
    (loaded,) = load_methods([CATALOGUE / "methods" / f"{method}.yaml"]).values()
    assert loaded.search.scale == SCALES


# --- SSF ------------------------------------------------------------------------------------------


def test_ssf_starts_as_in_its_code() -> None:
    """Scales normal about 1 and shifts about 0, of standard deviation 0.02; scales are changes."""
    recipe = Recipe(ssf=Ssf(bits=32))
    values = attach(small_backbone("vit"), recipe, 3).values()
    for key in ("scale", "shift"):
        parts = [value for tensor, value in values.items() if tensor.name.endswith(key)]
        drawn = torch.cat(parts).detach()
        assert len(drawn) > 1000
        assert float(drawn.mean()) == pytest.approx(0, abs=0.002)
        assert float(drawn.std()) == pytest.approx(0.02, rel=0.05)


# --- the budget of Adapter-X ----------------------------------------------------------------------


def trained_without_head(recipe: Recipe, depth: int) -> int:
    """On blocks as wide as those of ViT-B/16."""
    arguments: dict[str, Any] = {"img_size": 32, "depth": depth, "mlp_ratio": 0.25}
    spec = Backbone(model="vit_base_patch16_224", arguments=arguments, weights="random")
    planned = plan(load_backbone(spec, Input(size_px=32)), recipe, 2)
    return sum(tensor.values for tensor in planned if tensor.part != "head")


@pytest.mark.parametrize("method", ["adapter_x_1bit", "adapter_x_32bit", "adaptformer_x_1bit"])
def test_adapter_x_trains_its_papers_share_of_a_vit_b(method: str) -> None:
    """0.20 % of 86 million, whatever the head; each block adds as much as another."""
    recipe = load_methods([CATALOGUE / "methods" / f"{method}.yaml"])[method].recipe
    two, three = (trained_without_head(recipe, depth) for depth in (2, 3))
    with torch.device("meta"):
        whole = timm.create_model("vit_base_patch16_224", num_classes=0)
    share = (two + 10 * (three - two)) / sum(each.numel() for each in whole.parameters())
    assert f"{share:.2%}" == "0.20%"


# --- the two views of GPS -------------------------------------------------------------------------


def photographs(count: int = 8, size: int = 24) -> torch.Tensor:
    """Smooth coloured images [B, 3, S, S] in [0, 1], some of them grey, black or saturated."""
    small = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(small, size=size, mode="bicubic").clamp(0, 1)
    images[0] = images[0, :1]
    images[1] = 0
    images[2, 0] = 1
    return images


def test_hues_turn_as_in_torchvision() -> None:
    images, turns = photographs(), torch.tensor([0.1, -0.1, 0.07, 0.5, -0.5, 0.0, 0.03, -0.02])
    expected = torch.stack(
        [
            torchvision_functional.adjust_hue(image, float(turn))
            for image, turn in zip(images, turns, strict=True)
        ]
    )
    torch.testing.assert_close(turn_hue(images, turns), expected, atol=1e-5, rtol=0)


def test_the_selection_draws_the_views_of_gps_by_default() -> None:
    """Crops of 8 to 100 %, colour jitter of 80 % and grey of 20 % of all views; colours come out as
    torchvision's operators make them.
    """
    assert Selection().views == "strong"
    grey = torch.full((4000, 3, 2, 2), 0.5)
    colour = grey * torch.tensor([1.0, 0.6, 0.2]).view(1, 3, 1, 1)
    views = augment(colour, torch.Generator().manual_seed(0), True, "strong")[:, :, 0, 0]
    is_grey = (views - views.mean(dim=1, keepdim=True)).abs().amax(dim=1) < 1e-5
    is_unchanged = (views - colour[:, :, 0, 0]).abs().amax(dim=1) < 1e-5
    assert float(is_grey.float().mean()) == pytest.approx(0.2, abs=0.02)
    assert float(is_unchanged.float().mean()) == pytest.approx(0.2 * 0.8, abs=0.02)
    brightness_alone = (
        augment(grey, torch.Generator().manual_seed(0), True, "strong")[:, 0, 0, 0] / 0.5
    )
    assert 0.5999 <= float(brightness_alone.min()) < 0.65
    assert 1.35 < float(brightness_alone.max()) <= 1.4001


def test_one_image_through_the_colour_operators_is_what_torchvision_makes_of_it() -> None:
    """With the operators' order and factors read from the seed, view by view."""
    images = photographs()
    drawn: list[torch.Tensor] = []

    class Recording(_Numbers):
        def __call__(self, *shape: int) -> torch.Tensor:
            drawn.append(super().__call__(*shape))
            return drawn[-1]

    ours = images.clone()
    _change_colours(ours, *_rounds(Recording(torch.Generator().manual_seed(3), len(images))))
    order, factors, (hue,), (jittered,), (grey,) = drawn
    operators = [
        torchvision_functional.adjust_brightness,
        torchvision_functional.adjust_contrast,
        torchvision_functional.adjust_saturation,
        torchvision_functional.adjust_hue,
    ]
    for number, image in enumerate(images):
        amounts = [
            *(1 + 0.4 * (2 * factors[:, number] - 1)).tolist(),
            float(0.1 * (2 * hue[number] - 1)),
        ]
        for operator in order[:, number].argsort().tolist() if jittered[number] < 0.8 else []:
            image = operators[operator](image, amounts[operator])
        expected = (
            torchvision_functional.rgb_to_grayscale(image, 3) if grey[number] < 0.2 else image
        )
        torch.testing.assert_close(ours[number], expected, atol=2e-5, rtol=0)


# --- biases ---------------------------------------------------------------------------------------

SMALL_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_base_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    "vit with LayerScale": (
        "deit3_small_patch16_224",
        {"embed_dim": 48, "depth": 2, "num_heads": 3},
    ),
    "swin": (
        "swin_base_patch4_window7_224",
        {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]},
    ),
    "beit": ("beit_base_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    "convnext": ("convnext_base", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}),
    "levit": ("levit_128s", {}),
}


def names_that_gps_trains(names: Iterable[str]) -> set[str]:
    """Whole parameters that train, by the rule of their utils/pruning.py, heads aside.

    Their ConvNeXt calls the norms of stem and downsampling `norm`, timm's goes by numbers.
    """

    def theirs(name: str) -> str:
        return re.sub(r"(stem\.1|downsample\.0)\.", "norm.", name)

    def is_frozen(name: str) -> bool:
        return "norm" in name or "pos_embed" in name or "cls_token" in name

    return {
        name
        for name in names
        if not is_frozen(theirs(name)) and ("bias" in theirs(name) or "gamma" in theirs(name))
    }


def small_backbone(family: str) -> LoadedBackbone:
    model, arguments = SMALL_MODELS[family]
    size_px = 64 if family == "vit" else 224
    spec = Backbone(model=model, arguments=arguments, weights="random")
    return load_backbone(spec, Input(size_px=size_px))


@for_every("family", [family for family in SMALL_MODELS if family != "levit"])
def test_the_biases_that_train_are_those_of_gps(family: str) -> None:
    backbone = small_backbone(family)
    parameters = dict(backbone.model.named_parameters())
    planned = {
        tensor.name if tensor.name in parameters else f"{tensor.name}.bias": tensor.shape
        for tensor in plan(backbone, Recipe(biases=Biases()), 3)
        if tensor.part == "biases"
    }
    expected = names_that_gps_trains(parameters)
    assert planned == {name: tuple(parameters[name].shape) for name in expected}
    marks = {
        "vit with LayerScale": "ls1.gamma",
        "swin": "relative_position_bias_table",
        "beit": "q_bias",
        "convnext": ".gamma",
    }
    assert any(marks[family] in name for name in expected) if family in marks else expected


@for_every("family", SMALL_MODELS)
def test_a_network_on_changed_biases_computes_what_timm_does_on_the_sums(family: str) -> None:
    """LeViT keeps its table of biases from pass to pass, unless told otherwise."""
    backbone = small_backbone(family)
    model = attach(backbone, Recipe(biases=Biases(bits=32), head=Head(bits=32)), 3)
    by_hand, images = backbone.fresh_model(), torch.rand(1, 3, backbone.size_px, backbone.size_px)
    for seed in (0, 1):
        with torch.no_grad():
            for parameter in model.values.parameters():
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(seed))
        changed: dict[str, torch.Tensor] = dict(by_hand.named_parameters())
        for tensor, change in model.values().items():
            name = tensor.name if tensor.name in changed else f"{tensor.name}.bias"
            if tensor.part == "biases":
                changed[name] = changed[name] + change
        by_hand.train(False)
        model(images)
        ours = model.backbone(model.normalise(images))
        theirs = torch.func.functional_call(by_hand, changed, (model.normalise(images),))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        latent = list(model.values.parameters())
        (expected,) = torch.autograd.grad(theirs.square().mean(), latent)
        (gradient,) = torch.autograd.grad(ours.square().mean(), latent)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


# --- drop path ------------------------------------------------------------------------------------


def outputs_of(model: AdaptedModel, name: str, images: torch.Tensor) -> torch.Tensor:
    """What a module of the backbone gives in one forward pass [B, T, D], after all changes of a
    branch's end.
    """
    seen: list[torch.Tensor] = []
    handle = model.backbone.get_submodule(name).register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    model(images)
    handle.remove()
    return seen[0].detach()


def test_drop_path_leaves_out_branches_of_whole_samples_and_scales_the_others() -> None:
    spec = Backbone(
        model="vit_tiny_patch16_224",
        arguments={"img_size": 32, "depth": 3, "embed_dim": 48, "num_heads": 3},
        weights="random",
    )
    backbone = load_backbone(spec, Input(size_px=32))
    images = photographs(64, 32)
    plain = attach(backbone, Recipe(), 3)
    dropping = attach(backbone, Recipe(training=Training(drop_path=0.5)), 3)
    assert torch.equal(plain.eval()(images), dropping.eval()(images))
    dropping.train()
    branch, without = (
        outputs_of(dropping, "blocks.0.drop_path2", images),
        outputs_of(plain, "blocks.0.drop_path2", images),
    )
    assert torch.equal(branch, without), "the first block keeps everything"
    stream = outputs_of(dropping, "blocks.0", images)
    branch, without = (
        outputs_of(dropping, "blocks.1.drop_path1", images),
        outputs_of(plain, "blocks.1.drop_path1", images),
    )
    assert torch.equal(stream, outputs_of(plain, "blocks.0", images))
    is_dropped = (branch == 0).flatten(1).all(dim=1)
    assert 4 <= int(is_dropped.sum()) <= 28, "a quarter of 64"
    torch.testing.assert_close(branch[~is_dropped], without[~is_dropped] / 0.75)


def test_the_rates_of_drop_path_rise_as_timms() -> None:
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=48, num_heads=3, drop_path_rate=0.3
    )
    assert drop_rates(0.3, 4) == pytest.approx(
        [getattr(block.drop_path1, "drop_prob", 0.0) for block in theirs.blocks]
    )


def test_a_backbone_without_blocks_has_no_path_to_drop() -> None:
    backbone = load_backbone(
        Backbone(model="test_efficientnet", weights="random"), Input(size_px=32)
    )
    with pytest.raises(BackboneError, match=r"recipe\.training\.drop_path: given 0\.1"):
        attach(backbone, Recipe(training=Training(drop_path=0.1)), 3)


# --- mixup, CutMix and the moving average ---------------------------------------------------------


def mixed(
    count: int = 6, **changes: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    images, labels = photographs(count), torch.arange(count) % 3
    pixels, targets = mix(
        images,
        torch.nn.functional.one_hot(labels, 3).float(),
        Training(**changes),
        torch.Generator().manual_seed(1),
    )
    return images, torch.nn.functional.one_hot(labels, 3).float(), pixels, targets


def test_mixup_mixes_images_and_labels_by_one_share_as_timm_does() -> None:
    images, labels, pixels, targets = mixed(mixup=0.8)
    share = float(targets[0, 0])  # image 0 has class 0, its partner class 2
    assert 0 < share < 1
    torch.testing.assert_close(pixels, share * images + (1 - share) * images.flip(0))
    torch.testing.assert_close(targets, share * labels + (1 - share) * labels.flip(0))


def test_cutmix_states_the_share_of_pixels_that_it_kept() -> None:
    images, labels, pixels, targets = mixed(cutmix=1.0)
    is_own = (pixels == images).all(dim=1)[3]
    share = float(is_own.float().mean())
    assert 0 < share < 1
    torch.testing.assert_close(targets, share * labels + (1 - share) * labels.flip(0))
    assert torch.equal(pixels[3][:, ~is_own], images.flip(0)[3][:, ~is_own])


def test_smoothed_mixed_labels_are_those_of_timm() -> None:
    """timm smooths each label, then mixes; torch smooths the mixture: the same numbers."""
    _, labels, _, targets = mixed(mixup=0.8)
    logits, share = (
        torch.randn(6, 3, generator=torch.Generator().manual_seed(0)),
        float(targets[0, 0]),
    )
    smooth = 0.9 * labels + 0.1 / 3
    expected = (
        -((share * smooth + (1 - share) * smooth.flip(0)) * logits.log_softmax(1)).sum(1).mean()
    )
    torch.testing.assert_close(
        torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1), expected
    )


@pytest.mark.parametrize("decay", [0.9, 0.9998])
def test_the_moving_average_is_that_of_its_formula(decay: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimiser = torch.optim.SGD([parameter], lr=1.0)
    average, expected = MovingAverage(optimiser, decay), None
    for step in range(40):
        with torch.no_grad():
            parameter.copy_(torch.tensor([step, step**0.5, 1.0]))
        rate = min(decay, (1 + step) / (10 + step))
        expected = (
            parameter.detach().clone()
            if expected is None
            else rate * expected + (1 - rate) * parameter.detach()
        )
        average.update(step)
    average.swap()
    torch.testing.assert_close(parameter.detach(), expected)
    average.swap()
    assert parameter.tolist() == pytest.approx([39, 39**0.5, 1])


# --- the table ------------------------------------------------------------------------------------


def test_every_row_of_the_table_names_a_test_that_exists() -> None:
    text = (PROJECT_ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.search(r"\| (same|choice|open) \|", line)]
    named = [re.fullmatch(r".*\| `([a-z_]+\.py)::(test_[a-z0-9_]+)` \|", line) for line in rows]
    assert len(rows) > 25
    for line, match in zip(rows, named, strict=True):
        assert match is not None, line
        assert re.search(
            rf"^def {match[2]}\(",
            next(TESTS.rglob(match[1])).read_text(encoding="utf-8"),
            re.MULTILINE,
        ), line
