"""What runs on which architecture: timm models of every family, in a recipe of every part.

    nice -n 10 python benchmarks/architectures.py [--only swin_tiny_patch4_window7_224,levit_128s]
    [--recipes default] [--page]

For each model, with random weights, at two blocks a stage and the smallest input where it can be
built so, and for each recipe: the planned size, training steps in bfloat16 (float32 where the
processor has no units for it), the pack as bytes and back, and the logits of the reloaded model.
The outcome is "runs", the one line that refuses the recipe, or a crash. Outcomes are kept after
every model, so the same command continues where it was stopped. `--recipes` measures these again,
on the models that were tried. `--page` only writes the page again. Writes
benchmarks/results/architectures.json and docs/architectures.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from machine import describe_machine
from pages import table
from timm.models import is_model_in_modules
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.adaptation import AdaptedModel, attach, recompute
from pipeline.adaptation.packing import SizePlanner, describe, from_pack, probe_logits, to_pack
from pipeline.backbones import LoadedBackbone, load_backbone
from pipeline.backbones.load import _load_cached as _loaded
from pipeline.errors import BackboneError, SpecError
from pipeline.inputs.preset import on_backbone
from pipeline.packs import pack_to_bytes, read_pack
from pipeline.specs import Backbone, Budget, DrawnData, Input, Recipe, Selection, Task
from pipeline.utils.devices import computing_dtype

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "architectures.json"
PAGE = HERE.parent / "docs" / "architectures.md"
CLASSES = ("one", "two", "three")
SIZES_PX = (64, 96, 128, 224, 256, 384)
"""The input sizes that are tried, in order, until the model takes one."""
SMALL: tuple[dict[str, Any], ...] = (
    {"depth": 2, "embed_dim": 192, "num_heads": 3},
    {"depth": 2},
    {"depths": [2, 2, 2, 2]},
    {"layers": [1, 1, 1, 1]},
    {},
)
"""Arguments that make a model small, tried in order."""
MOST_PARAMETERS = 90_000_000
MOST_SECONDS = 150
RUNS, CRASH = "runs", "crash"
MODELS = (
    "beit_base_patch16_224", "beitv2_base_patch16_224", "botnet26t_256", "halonet_h1",
    "mobileone_s1", "regnetz_b16", "cait_xxs24_224", "coat_lite_tiny", "coat_tiny", "convit_tiny",
    "convmixer_768_32", "convnext_atto", "convnext_zepto_rms", "convnextv2_atto", "cpubone_nano",
    "crossvit_tiny_240", "csatv2", "cs3darknet_focus_s", "cspnext_tiny", "davit_tiny",
    "deepseek_vit_412m", "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224",
    "deit_tiny_patch16_224", "densenet121", "dla46x_c", "dpn48b", "edgenext_xx_small",
    "efficientformer_l1", "efficientformerv2_s0", "efficientnet_b0", "mobilenetv2_035",
    "tf_efficientnet_lite0", "efficientvim_m1", "efficientvit_b0", "efficientvit_m0",
    "eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_tiny_patch16_dinov3_qkvb",
    "fasternet_t0", "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "gemma4_vit_167m",
    "ghostnet_050", "hardcorenas_b", "hgnetv2_b0", "hiera_tiny_224", "sam2_hiera_tiny",
    "hrnet_w18_small", "iformer_t", "inception_next_atto", "inception_resnet_v2", "inception_v3",
    "inception_v4", "lcnetv2_small", "levit_128s", "levit_conv_128s", "lowformer_b0",
    "mambaout_femto", "coatnet_nano_rw_224", "maxvit_pico_rw_256", "maxxvit_rmlp_nano_rw_256",
    "caformer_s18", "convformer_s18", "poolformerv2_s12", "gmlp_ti16_224", "mixer_s16_224",
    "resmlp_12_224", "lcnet_035", "mobilenetv3_small_050", "mobilenetv4_conv_small",
    "mobilenetv4_hybrid_medium", "tf_mobilenetv3_small_minimal_100", "mobilenetv5_base",
    "mobilevit_xxs", "mobilevitv2_050", "mvitv2_small_cls", "mvitv2_tiny",
    "naflexvit_base_patch16_parfac_gap", "nest_tiny", "nextvit_small", "nf_regnet_b0", "pit_ti_224",
    "pvt_v2_b0", "qwen3_vit_88m", "rdnet_tiny", "regnetx_002", "regnety_002", "repghostnet_050",
    "repvit_m1", "res2next50", "resnest14d", "resnet10t", "resnet18", "resnet50",
    "seresnext26d_32x4d", "resnetv2_18", "rexnet_100", "selecsls42", "legacy_seresnet18",
    "sequencer2d_s", "shvit_s1", "skresnet18", "starnet_s050", "swiftformer_xs",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window16_256", "swinv2_cr_tiny_224",
    "swinv2_cr_tiny_ns_224", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "tresnet_m",
    "twins_pcpvt_small", "twins_svt_small", "vgg11", "visformer_tiny", "flexivit_small",
    "vit_base_patch16_clip_224", "vit_base_patch16_siglip_224", "vit_small_patch14_reg4_dinov2",
    "vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224", "vit_relpos_small_patch16_rpn_224",
    "vit_srelpos_small_patch16_224", "samvit_base_patch16_224", "vitamin_small_224", "volo_d1_224",
    "ese_vovnet19b_slim_dw", "legacy_xception", "xception41p", "xcit_nano_12_p8_224",
    "nasnetalarge", "pnasnet5large",
)  # fmt: skip
"""The smallest model of each of timm's families, and those of families that hold several
architectures.
"""

RECIPES: dict[str, dict[str, Any]] = {
    "default": {"preset": "default"},
    "connections": {"connections": {}},
    "biases": {"biases": {}},
    "norms": {"norms": {"which": "all"}},
    "smoa": {"smoa": {"experts": 2, "width": 2}},
    "adapter parallel": {"adapter": {"width": 2}},
    "adapter after_mlp": {"adapter": {"width": 2, "placement": "after_mlp"}},
    "adapter after_attention": {"adapter": {"width": 2, "placement": "after_attention"}},
    "lora": {"lora": {"rank": 2}},
    "fact": {"fact": {"rank": 2}},
    "dtl": {"dtl": {"rank": 2}},
    "ssf": {"ssf": {}},
    "prompts": {"prompts": {"count": 2, "deep": True}},
    "class_token": {"class_token": {}},
    "full": {"full": {}},
    "head": {},
}


def outcome(
    spec: Backbone,
    backbone: LoadedBackbone,
    parts: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> str:
    """`RUNS`, or the line that refuses the recipe. Anything else that goes wrong is raised."""
    try:
        task, _ = on_backbone(_task(spec, backbone, parts), backbone, CLASSES)
        recipe = task.recipe
        selected = (
            recompute(backbone, task.selection, recipe.connections.top_k)
            if recipe.connections
            else None
        )
        planned_bytes = SizePlanner(task, backbone, CLASSES, selected).size_bytes(recipe)
    except (BackboneError, SpecError) as error:
        return str(error)
    model = attach(backbone, recipe, len(CLASSES), selected=selected)
    _train(
        model, backbone.size_px, dtype or computing_dtype(recipe.training.precision, "cpu"), steps=2
    )
    pack = to_pack(model, describe(task, recipe, backbone, CLASSES))
    data = pack_to_bytes(pack)
    assert len(data) == planned_bytes, (
        f"the pack has {len(data)} bytes, planned were {planned_bytes}"
    )
    expected, found = (
        torch.from_numpy(probe_logits(each))
        for each in (model, from_pack(read_pack(data), backbone))
    )
    torch.testing.assert_close(
        found, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.abs().max()))
    )
    return RUNS


def _task(spec: Backbone, backbone: LoadedBackbone, parts: dict[str, Any]) -> Task:
    return Task(
        name="tried",
        data=DrawnData(format="drawn", kind="orientation"),
        input=Input(size_px=backbone.size_px, mean=backbone.images.mean, std=backbone.images.std),
        backbone=spec,
        recipe=Recipe.model_validate(parts),
        budget=Budget(max_bytes=2**40),
        selection=Selection(criterion="magnitude"),  # which takes no selection pass
    )


def _train(model: AdaptedModel, size_px: int, dtype: torch.dtype, steps: int) -> None:
    """Some steps of the training loop on noise, each of which must give every value a finite
    gradient.
    """
    images = torch.randint(
        0,
        256,
        (2, 3, size_px, size_px),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(1),
    )
    model.compute_in(dtype)
    model.train()
    optimiser = torch.optim.AdamW(
        model.values.parameters(), lr=1e-5
    )  # a larger step makes deep networks without training diverge
    for _ in range(steps):
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            logits = model(images)
        (F.cross_entropy(logits.float(), torch.arange(2)) + model.auxiliary_loss()).backward()
        assert all(
            each.grad is not None and bool(each.grad.sum().isfinite())
            for each in model.values.parameters()
        ), "a gradient is not finite"
        optimiser.step()


def load_smallest(name: str) -> tuple[Backbone, LoadedBackbone]:
    """The model with random weights, as small as its arguments allow. Raises BackboneError with the
    last attempt's reason.
    """
    last = BackboneError(f"{name} cannot be built")
    for size_px, size, depth in itertools.product(SIZES_PX, ("img_size", None), SMALL):
        try:
            arguments = {**depth, **({size: size_px} if size else {})}
            spec = Backbone(model=name, arguments=arguments, weights="random")
            backbone = load_backbone(spec, Input(size_px=size_px))
            measure_batch_norms(backbone)
            return spec, backbone
        except BackboneError as error:
            last = error
    raise last


@torch.no_grad()
def measure_batch_norms(backbone: LoadedBackbone) -> None:
    """Give every batch norm the statistics of noise: with those of an untrained network, its
    features would grow beyond all bounds. So they would with variances far below 1, which untrained
    depthwise convolutions have: the smallest change of a parameter would be multiplied block by
    block.
    """
    norms = [module for module in backbone.model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        backbone.model(
            torch.randn(
                8, 3, backbone.size_px, backbone.size_px, generator=torch.Generator().manual_seed(2)
            )
        )
    for norm in norms:
        if norm.running_var is not None:
            norm.running_var.clamp_(min=1)
    backbone.model.eval()


def survey_of(name: str) -> dict[str, Any]:
    """What a model does in every recipe; `skipped` says why it was not tried."""
    start = time.process_time()
    with torch.device("meta"):
        whole = timm.create_model(name, num_classes=0)
    row: dict[str, Any] = {"class": type(whole).__name__, "parameters": _count(whole)}
    try:
        spec, backbone = load_smallest(name)
    except BackboneError as error:
        return {**row, "skipped": f"it cannot be loaded: {error}"}
    row |= {
        "arguments": spec.arguments,
        "size_px": backbone.size_px,
        "tried_parameters": _count(backbone.model),
    }
    if row["tried_parameters"] > MOST_PARAMETERS:
        return {
            **row,
            "skipped": (
                f"{row['tried_parameters'] / 1e6:.0f} M parameters at its smallest, more than the"
                f" {MOST_PARAMETERS / 1e6:.0f} M tried"
            ),
        }
    outcomes: dict[str, str] = {}
    for recipe, parts in RECIPES.items():
        if time.process_time() - start > MOST_SECONDS:
            outcomes[recipe] = (
                f"not tried: the recipes before took more than {MOST_SECONDS} s of one core"
            )
            continue
        outcomes[recipe] = _outcome_or_crash(spec, backbone, parts)
    row["default_without"] = _left_out(spec, backbone)
    return {**row, "outcomes": outcomes, "seconds": round(time.process_time() - start, 1)}


def measured_again(
    name: str, row: dict[str, Any], recipes: Sequence[str], commit: str
) -> dict[str, Any]:
    """A model's row with these recipes measured again; `again` has the commits."""
    if "skipped" in row:
        return row
    spec, backbone = load_smallest(name)
    again = {recipe: _outcome_or_crash(spec, backbone, RECIPES[recipe]) for recipe in recipes}
    return {
        **row,
        "outcomes": row["outcomes"] | again,
        "default_without": _left_out(spec, backbone),
        "again": row.get("again", {}) | dict.fromkeys(recipes, commit),
    }


def _left_out(spec: Backbone, backbone: LoadedBackbone) -> list[str]:
    """The parts of the default recipe that have no place."""
    task = _task(spec, backbone, RECIPES["default"])
    return list(on_backbone(task, backbone, CLASSES)[1])


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _outcome_or_crash(spec: Backbone, backbone: LoadedBackbone, parts: dict[str, Any]) -> str:
    try:
        found = outcome(spec, backbone, parts)
        return f"{CRASH}: a message of several lines: {found}" if "\n" in found else found
    except Exception as error:  # whatever it is, it is a finding
        traceback.print_exc()
        return f"{CRASH}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


# --- the page -------------------------------------------------------------------------------------


def page(result: dict[str, Any]) -> str:
    """docs/architectures.md."""
    tried = {name: row for name, row in result["models"].items() if "outcomes" in row}
    skipped = {name: row for name, row in result["models"].items() if "skipped" in row}
    family = {
        name: next(each for each in timm.list_modules() if is_model_in_modules(name, [each]))
        for name in result["models"]
    }
    reasons: dict[str, str] = {}
    rows = [
        _row(name, family[name], tried[name], reasons)
        for name in sorted(tried, key=lambda name: (family[name], name))
    ]
    untried = (
        f"- `{name}` ({family[name]}): {row['skipped']}" for name, row in sorted(skipped.items())
    )
    families = len({family[name] for name in tried})
    lines = [
        "# Architectures",
        "",
        _summary(tried, families),
        "",
        "A recipe runs where its pack has the planned size, training steps in bfloat16 give finite",
        (
            "gradients, and the pack, read back, gives the trained model's logits. Weights are"
            " random; models are tried"
        ),
        (
            "at two blocks a stage, narrower, and at a small input where timm can build them so."
            " `default` is the default recipe"
        ),
        "without the parts that have no place.",
        "",
        *_measured(result),
        *table(("family", "model", "runs", "does not (reason)"), rows),
        "",
        "## Reasons",
        "",
        "| | the message, without the names in it |",
        "|---|---|",
        *(f"| {label} | {reason} |" for reason, label in reasons.items()),
        "",
        "## Not tried",
        "",
        *untried,
        "",
    ]
    return "\n".join(lines)


def _summary(tried: dict[str, dict[str, Any]], families: int) -> str:
    counts = Counter(_kind(text) for row in tried.values() for text in row["outcomes"].values())
    too_slow = f", {counts['not tried']} were not tried for time" if counts["not tried"] else ""
    return (
        f"{len(tried)} timm models of {families} families, each in {len(RECIPES)} recipes"
        f" (the adapter in its three placements): {counts['runs']} run,"
        f" {counts['refused']} are refused in one line that says why, {counts[CRASH]}"
        f" crash{too_slow}."
    )


def _measured(result: dict[str, Any]) -> list[str]:
    machine = result["machine"]
    commits = sorted({row["commit"] for row in result["models"].values()})
    again = sorted(
        {each for row in result["models"].values() for each in row.get("again", {}).items()}
    )
    return [
        f"Measured on {machine['cpu']}, Python {machine['python']}, torch {machine['torch']},",
        f"timm {machine['timm']}, at commit {' and '.join(commits)}:",
        "",
        "```sh",
        "nice -n 10 python benchmarks/architectures.py",
        "```",
        "",
        *(f"`{recipe}` was measured again at commit {commit}.\n" for recipe, commit in again),
    ]


def _kind(text: str) -> str:
    return (
        "runs"
        if text == RUNS
        else (
            CRASH
            if text.startswith(CRASH)
            else "not tried"
            if text.startswith("not tried")
            else "refused"
        )
    )


def _row(
    name: str, family: str, row: dict[str, Any], reasons: dict[str, str]
) -> tuple[str, str, str, str]:
    outcomes = row["outcomes"]
    without = (
        f" (without {', '.join(row['default_without'])})" if row.get("default_without") else ""
    )
    runs = [
        f"default{without}" if recipe == "default" else recipe
        for recipe, text in outcomes.items()
        if text == RUNS
    ]
    refused = [
        f"{recipe} ({reasons.setdefault(_plain(text, row['class']), f'r{len(reasons) + 1}')})"
        for recipe, text in outcomes.items()
        if text != RUNS
    ]
    return family, name, ", ".join(runs), ", ".join(refused)


def _plain(text: str, model_class: str) -> str:
    """A message without the names in it, so that equal reasons are one."""
    text = re.sub(r"'[\w.]*\.[\w.]*'", "'BLOCK'", text.replace(model_class, "NAME"))
    return re.sub(r"; it has .*", "; it has other layers", text).replace("|", "\\|")


def main() -> None:
    """Survey, write, and write again after every model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=" ".join(MODELS), help="names, separated by commas")
    parser.add_argument(
        "--recipes", nargs="+", choices=RECIPES, help="measure these again on models tried before"
    )
    parser.add_argument(
        "--page", action="store_true", help="write the page from the results that are there"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"models": {}}
    if not arguments.page:
        found["machine"] = {**describe_machine(), "timm": timm.__version__}
        for name in arguments.only.replace(",", " ").split():
            known, commit = found["models"].get(name), found["machine"]["commit"]
            if known is None:
                row = {**survey_of(name), "commit": commit}
            elif arguments.recipes:
                row = measured_again(name, known, arguments.recipes, commit)
            else:
                continue
            found["models"][name] = row
            _loaded.cache_clear()
            print(name, row.get("skipped") or row["seconds"], flush=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))


if __name__ == "__main__":
    main()
