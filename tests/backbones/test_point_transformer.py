"""Point transformers against formulas written out, and the official checkpoints' layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_paths import PROJECT_ROOT
from helpers_points import ARGUMENTS, POINT_BACKBONE
from safetensors.torch import save_file

from pipeline.backbones import load_backbone
from pipeline.backbones.neighbours import farthest_points, nearest_points
from pipeline.data.drawn_solids import SOLIDS, draw_solid
from pipeline.errors import BackboneError
from pipeline.specs import Input
from pipeline.specs.task_files import load_task

State = dict[str, torch.Tensor]
D, HIDDEN, DEPTH, HEADS = 32, 8, 2, 2
GROUPS, SIZE = ARGUMENTS["num_groups"], ARGUMENTS["group_size"]


def clouds(count: int = 3, points: int = 64) -> torch.Tensor:
    return torch.randn(count, points, 3, generator=torch.Generator().manual_seed(1))


def official_state(tokens: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Random tensors under Point-MAE's own names, its convolutions as convolutions."""
    generator = torch.Generator().manual_seed(2)
    shapes: dict[str, tuple[int, ...]] = {}
    stages = {"first_conv": (3, HIDDEN, 2 * HIDDEN), "second_conv": (4 * HIDDEN, 4 * HIDDEN, D)}
    for name, (inputs, hidden, outputs) in stages.items():
        shapes |= {
            f"encoder.{name}.0.weight": (hidden, inputs, 1),
            f"encoder.{name}.3.weight": (outputs, hidden, 1),
            f"encoder.{name}.0.bias": (hidden,),
            f"encoder.{name}.3.bias": (outputs,),
        } | {
            f"encoder.{name}.1.{key}": (hidden,)
            for key in ("weight", "bias", "running_mean", "running_var")
        }
    shapes |= {"pos_embed.0.weight": (128, 3), "pos_embed.0.bias": (128,)}
    shapes |= {"pos_embed.2.weight": (D, 128), "pos_embed.2.bias": (D,)}
    for block in range(DEPTH):
        at = f"blocks.blocks.{block}"
        shapes |= {f"{at}.norm{n}.{key}": (D,) for n in (1, 2) for key in ("weight", "bias")}
        shapes |= {f"{at}.attn.qkv.weight": (3 * D, D), f"{at}.attn.proj.weight": (D, D)}
        shapes |= {f"{at}.attn.proj.bias": (D,), f"{at}.mlp.fc1.weight": (4 * D, D)}
        shapes |= {f"{at}.mlp.fc1.bias": (4 * D,), f"{at}.mlp.fc2.weight": (D, 4 * D)}
        shapes |= {f"{at}.mlp.fc2.bias": (D,)}
    shapes |= {"norm.weight": (D,), "norm.bias": (D,)}
    shapes |= {f"{name}_{what}": (1, 1, D) for name in tokens for what in ("token", "pos")}
    state = {}
    for name, shape in shapes.items():
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        state[name] = torch.randn(shape, generator=generator) / fan_in**0.5
        if name.endswith("running_var"):
            state[name] = state[name].abs() + 0.5
    return state


def reference(state: State, cloud: torch.Tensor, tokens: list[str]) -> torch.Tensor:
    """Compute the feature of one cloud [N, 3] step by step, one group at a time."""
    chosen = [0]
    while len(chosen) < GROUPS:
        gaps = [min(float((p - cloud[c]).square().sum()) for c in chosen) for p in cloud]
        chosen.append(int(np.argmax(gaps)))
    rows = [state[f"{name}_token"][0, 0] for name in tokens]
    positions = [state[f"{name}_pos"][0, 0] for name in tokens]
    for centre in cloud[chosen]:
        order = sorted(range(len(cloud)), key=lambda n: float((cloud[n] - centre).square().sum()))
        group = (cloud[order[:SIZE]] - centre).T[None]
        x = two_convolutions(state, "encoder.first_conv", group)
        x = torch.cat([x.max(dim=2, keepdim=True)[0].expand_as(x), x], dim=1)
        rows.append(two_convolutions(state, "encoder.second_conv", x).max(dim=2)[0][0])
        hidden = F.gelu(state["pos_embed.0.weight"] @ centre + state["pos_embed.0.bias"])
        positions.append(state["pos_embed.2.weight"] @ hidden + state["pos_embed.2.bias"])
    x, pos = torch.stack(rows), torch.stack(positions)
    for block in range(DEPTH):
        at = f"blocks.blocks.{block}"
        x = x + pos
        x = x + attention(state, f"{at}.attn", norm(state, f"{at}.norm1", x))
        h = norm(state, f"{at}.norm2", x) @ state[f"{at}.mlp.fc1.weight"].T
        h = F.gelu(h + state[f"{at}.mlp.fc1.bias"]) @ state[f"{at}.mlp.fc2.weight"].T
        x = x + h + state[f"{at}.mlp.fc2.bias"]
    x = norm(state, "norm", x)
    return torch.cat([x[0], x[len(tokens) :].max(dim=0)[0]])


def two_convolutions(state: State, at: str, x: torch.Tensor) -> torch.Tensor:
    x = F.conv1d(x, state[f"{at}.0.weight"], state[f"{at}.0.bias"])
    mean, var = state[f"{at}.1.running_mean"], state[f"{at}.1.running_var"]
    x = (x - mean[:, None]) / (var[:, None] + 1e-5).sqrt()
    x = (x * state[f"{at}.1.weight"][:, None] + state[f"{at}.1.bias"][:, None]).relu()
    return F.conv1d(x, state[f"{at}.3.weight"], state[f"{at}.3.bias"])


def norm(state: State, at: str, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (D,), state[f"{at}.weight"], state[f"{at}.bias"])


def attention(state: State, at: str, x: torch.Tensor) -> torch.Tensor:
    query, key, value = (x @ state[f"{at}.qkv.weight"].T).chunk(3, dim=1)
    width = D // HEADS
    heads = []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        weights = (query[:, part] @ key[:, part].T / width**0.5).softmax(dim=1)
        heads.append(weights @ value[:, part])
    return torch.cat(heads, dim=1) @ state[f"{at}.proj.weight"].T + state[f"{at}.proj.bias"]


@pytest.mark.parametrize(
    ("model", "tokens", "prefix"),
    [
        ("point_mae", ("cls",), ""),
        ("point_mae", ("cls",), "module."),
        ("point_mae", (), "module.MAE_encoder."),
        ("point_recon", ("cls", "img", "text"), "MAE_encoder."),
    ],
)
def test_official_checkpoints_give_the_features_of_the_formulas(
    tmp_path: Path, model: str, tokens: tuple[str, ...], prefix: str
) -> None:
    state, path = official_state(tokens), tmp_path / "official.safetensors"
    others = {"module.mask_token": torch.ones(1), "module.MAE_decoder.norm.weight": torch.ones(D)}
    save_file({f"{prefix}{name}": tensor for name, tensor in state.items()} | others, path)
    spec = POINT_BACKBONE.model_copy(update={"model": model, "weights": str(path)})
    backbone = load_backbone(spec, Input())
    assert backbone.width == 2 * D
    for name in ("cls_token", "cls_pos"):  # not in the pretrained file
        state.setdefault(name, torch.zeros(1, 1, D))
    with torch.no_grad():
        found = backbone.model(clouds())
        wanted = [reference(state, cloud, list(tokens or ("cls",))) for cloud in clouds()]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-4)


def test_farthest_and_nearest_points_are_those_of_their_definitions() -> None:
    points = clouds(2, 40)
    order = farthest_points(points, 12)
    for cloud, chosen in zip(points, order.tolist(), strict=True):
        assert chosen[0] == 0
        for number in range(1, 12):
            gaps = torch.cdist(cloud, cloud[chosen[:number]]).min(dim=1)[0]
            assert float(gaps[chosen[number]]) == pytest.approx(float(gaps.max()), rel=1e-4)
    centres = points[:, :5]
    found = nearest_points(points, centres, 7).sort(dim=-1)[0]
    wanted = torch.cdist(centres, points).topk(7, largest=False)[1].sort(dim=-1)[0]
    assert torch.equal(found, wanted)


def test_a_cloud_has_the_same_feature_alone_and_whatever_the_order_of_its_points() -> None:
    model = load_backbone(POINT_BACKBONE, Input()).model
    points = clouds()
    with torch.no_grad():
        together = model(points)
        alone = torch.cat([model(each[None]) for each in points])
        turned = model(torch.cat([points[:, :1], points[:, 1:].flip(1)], dim=1))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together, turned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [
        ({"channels": 4}, {}, "channels is 4; expected 3, or 6 with normals"),
        ({"wings": 2}, {}, "wings"),
        ({}, {"points": 16}, None),
        ({"num_groups": 32}, {"points": 16}, "input.points: given 16; expected at least 32"),
    ],
)
def test_misfits_are_refused(
    arguments: dict[str, int], given: dict[str, int], message: str | None
) -> None:
    spec = POINT_BACKBONE.model_copy(update={"arguments": {**ARGUMENTS, **arguments}})
    if message is None:
        assert load_backbone(spec, Input(**given)).takes.shape == (16, 3)  # type: ignore[arg-type]
        return
    with pytest.raises(BackboneError, match=message) as error:
        load_backbone(spec, Input(**given))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "pretrain.pth"
    torch.save({"base_model": official_state(())}, path)
    spec = POINT_BACKBONE.model_copy(update={"weights": str(path)})
    with pytest.raises(BackboneError, match=r"weights_only=True"):
        load_backbone(spec, Input())


def test_images_are_asked_of_a_point_backbone_in_vain() -> None:
    with pytest.raises(BackboneError, match="takes points, not images"):
        load_backbone(POINT_BACKBONE, Input()).images  # noqa: B018


def test_the_embedded_backbone_knows_more_of_solids_than_random_weights() -> None:
    """By the label of the cloud whose feature is nearest."""
    spec = load_task(PROJECT_ROOT / "tasks" / "points" / "solids.yaml").backbone
    takes = load_backbone(spec, Input()).takes
    labels = torch.arange(180) % len(SOLIDS)
    drawn = [draw_solid(SOLIDS[k], np.random.default_rng([7, n])) for n, k in enumerate(labels)]
    points = torch.from_numpy(np.stack([takes.decode(cloud) for cloud in drawn])).float()
    right = {}
    for weights in (spec.weights, "random"):
        model = load_backbone(spec.model_copy(update={"weights": weights}), Input()).model
        with torch.no_grad():
            features = torch.cat([model(each) for each in points.split(60)])
        features = (features - features.mean(dim=0)) / (features.std(dim=0) + 1e-6)
        nearest = torch.cdist(features[120:], features[:120]).argmin(dim=1)
        right[weights] = float((labels[nearest] == labels[120:]).float().mean())
    assert right[spec.weights] > right["random"] + 0.1, right
