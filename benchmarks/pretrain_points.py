"""Pretrain the small point transformer of `tasks/points`, without labels.

    python benchmarks/pretrain_points.py [--clouds FOLDER ...] [--steps 2400] [--drawn 24000]
                                         [--out FILE]

Clouds are drawn: one to four solids, stretched, turned and put together at random. With --clouds,
the files in folders join them. Of each cloud there are two views, augmented as in training, each
with 60 % of its groups masked, and two losses:

- a decoder of two blocks places the points of masked groups, by Chamfer distance, as in Point-MAE
  (arXiv 2203.06604);
- the feature of a view, projected, tells the other view of the same cloud from the rest of the
  batch (InfoNCE), as ReCon contrasts its tokens (arXiv 2302.02318). It trains the class token,
  which a masked autoencoder leaves as it is.

Writes the encoder in float16, and benchmarks/results/pretrain_points.json with the losses.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from safetensors.torch import save_file
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional

from pipeline.adaptation.working import fuse_attention, slow_fused_attention
from pipeline.backbones.neighbours import farthest_points, gather_points
from pipeline.backbones.point_transformer import PointTransformer
from pipeline.data.clouds import CLOUD_EXTENSIONS
from pipeline.data.drawn_solids import SOLIDS, draw_solid
from pipeline.data.points import Points
from pipeline.specs.catalogue import catalogue_folder

RESULTS = Path(__file__).parent / "results" / "pretrain_points.json"
NAME = "pt6_w192_g32_512.drawn.safetensors"
ARGUMENTS: dict[str, Any] = {
    "num_points": 512,
    "num_groups": 32,
    "group_size": 16,
    "embed_dim": 192,
    "depth": 6,
    "num_heads": 3,
    "hidden_dim": 32,
}
MASKED = 0.6
BATCH = 64
RATE, WEIGHT_DECAY, WARM_UP = 1e-3, 0.05, 100
TEMPERATURE = 0.1
CHAMFER_WEIGHT = 10.0
"""Brings both losses to about the same size."""
DECODER_WIDTH, DECODER_DEPTH, PROJECTED = 96, 2, 128
CANDIDATES = 1024
"""Points of a drawn cloud, of which the farthest are kept."""
REPEATS = 10
"""How often a file is in an epoch."""


class Pretrained(nn.Module):
    """An encoder with what it is pretrained by: a decoder of masked groups, and a projection.

    Legend: B clouds, G groups, V of them visible, M masked, S points per group, D width.
    """

    def __init__(self, encoder: PointTransformer) -> None:
        super().__init__()
        width = encoder.embed_dim
        self.encoder = encoder
        self.embed = nn.Linear(width, DECODER_WIDTH)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, DECODER_WIDTH))
        self.position = nn.Sequential(
            nn.Linear(3, DECODER_WIDTH), nn.GELU(), nn.Linear(DECODER_WIDTH, DECODER_WIDTH)
        )
        self.blocks = nn.ModuleList([Block(DECODER_WIDTH, 3) for _ in range(DECODER_DEPTH)])
        self.norm = nn.LayerNorm(DECODER_WIDTH)
        self.points = nn.Linear(DECODER_WIDTH, 3 * encoder.group_size)
        self.project = nn.Sequential(
            nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, PROJECTED)
        )

    def forward(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Projected features [B, P] of views; the points of their masked groups [B, M, S, 3] as
        the decoder places them, and as they are.
        """
        centres, groups = self.encoder.grouped(views)
        count = centres.shape[1]
        order = torch.rand(len(views), count).argsort(dim=1)
        visible, masked = order.tensor_split([round((1 - MASKED) * count)], dim=1)
        seen = gather_points(groups.flatten(2), visible).unflatten(2, groups.shape[2:])
        tokens = self._encoded(seen, gather_points(centres, visible))
        features = torch.cat([tokens[:, 0], tokens[:, 1:].amax(dim=1)], dim=-1)
        placed = self._decoded(
            tokens[:, 1:], gather_points(centres, torch.cat([visible, masked], 1))
        )
        wanted = gather_points(groups.flatten(2), masked).unflatten(2, groups.shape[2:])
        return self.project(features), placed, wanted[..., :3]

    def _encoded(self, groups: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
        """The class token and those of visible groups, [B, 1 + V, D]."""
        model = self.encoder
        token, place = (
            model.get_parameter(name).expand(len(groups), -1, -1)
            for name in ("cls_token", "cls_pos")
        )
        x = torch.cat([token, model.encoder(groups)], dim=1)
        position = torch.cat([place, model.pos_embed(centres)], dim=1)
        for block in model.blocks:
            x = block(x + position)
        encoded: torch.Tensor = model.norm(x)
        return encoded

    def _decoded(self, tokens: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
        """The points of the masked groups, whose centres come last, [B, M, S, 3]."""
        clouds, seen = tokens.shape[:2]
        masked = centres.shape[1] - seen
        x = torch.cat([self.embed(tokens), self.mask_token.expand(clouds, masked, -1)], dim=1)
        position = self.position(centres)
        for block in self.blocks:
            x = block(x + position)
        placed: torch.Tensor = self.points(self.norm(x[:, seen:])).unflatten(2, (-1, 3))
        return placed


def chamfer(placed: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean distance of each point [..., S, 3] to the nearest one of the other set, both ways."""
    apart = torch.cdist(placed.float().flatten(0, 1), wanted.float().flatten(0, 1))
    return (apart.amin(dim=1).mean() + apart.amin(dim=2).mean()) / 2


def contrast(projected: torch.Tensor) -> torch.Tensor:
    """InfoNCE of first views and second views, [2B, P]."""
    unit = functional.normalize(projected.float(), dim=-1)
    clouds = len(unit) // 2
    likeness = (unit @ unit.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return functional.cross_entropy(likeness, torch.arange(2 * clouds).roll(clouds))


def draw_cloud(rng: np.random.Generator) -> np.ndarray:
    """One to four solids put together, float32 [CANDIDATES, 3], z up."""
    count = int(rng.choice([1, 2, 3, 4], p=[0.4, 0.2, 0.2, 0.2]))
    parts = []
    for _ in range(count):
        part = draw_solid(str(rng.choice(SOLIDS)), rng)
        if rng.random() < 0.7:
            part = part * np.exp(rng.uniform(np.log(0.1), 0, 3))
        parts.append(part + (rng.uniform(-1, 1, 3) if count > 1 else 0.0))
    points = np.concatenate(parts)
    points = points[rng.choice(len(points), CANDIDATES, replace=len(points) < CANDIDATES)]
    points = points - points.mean(axis=0)
    farthest = int((points**2).sum(axis=1).argmax())
    points[[0, farthest]] = points[[farthest, 0]]
    return (points / np.linalg.norm(points[0])).astype(np.float32)


def drawn_clouds(count: int, points: int) -> torch.Tensor:
    """Clouds as a prepared dataset has them: float16 [count, points, 3] in farthest-point order."""
    rng, kept = np.random.default_rng([2203, 6604]), []
    for start in range(0, count, 250):
        some = [draw_cloud(rng) for _ in range(min(250, count - start))]
        clouds = torch.from_numpy(np.stack(some))
        kept.append(gather_points(clouds, farthest_points(clouds, points)).half())
    return torch.cat(kept)


def clouds_in(folders: Sequence[Path], takes: Points) -> torch.Tensor:
    """The clouds of all files in folders, float16 [files, points, 3]."""
    files = [
        path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix.removeprefix(".") in CLOUD_EXTENSIONS
    ]
    clouds = [torch.from_numpy(takes.decode(path)) for path in files]
    return torch.stack(clouds) if clouds else torch.empty(0, *takes.shape, dtype=torch.float16)


def batches(clouds: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """As many batches as steps, reshuffled after each pass."""
    generator, order = torch.Generator().manual_seed(0), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(clouds), generator=generator)
        chosen, order = order[:BATCH], order[BATCH:]
        yield clouds[chosen]


def pretrain(
    model: Pretrained, clouds: torch.Tensor, takes: Points, steps: int
) -> Iterator[dict[str, float]]:
    """Train; every hundred steps, the mean losses since the last time."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0}]
    optimiser = torch.optim.AdamW(groups, lr=RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    generator = torch.Generator().manual_seed(1)
    sums, started = np.zeros(2), time.perf_counter()
    for number, batch in enumerate(batches(clouds, steps), 1):
        labels = torch.zeros(len(batch))
        views, _ = takes.two_views(batch, labels, generator, flip=True)
        with torch.autocast("cpu", torch.bfloat16):
            projected, placed, wanted = model(views)
        losses = chamfer(placed, wanted), contrast(projected)
        optimiser.zero_grad()
        (CHAMFER_WEIGHT * losses[0] + losses[1]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        sums += [float(loss.detach()) for loss in losses]
        if number % 100 == 0 or number == steps:
            share = 100 if number % 100 == 0 else number % 100
            yield {
                "step": number,
                "chamfer": round(float(sums[0]) / share, 4),
                "contrast": round(float(sums[1]) / share, 4),
                "seconds": round(time.perf_counter() - started),
            }
            sums[:] = 0


def _rate(step: int, steps: int) -> float:
    """Of the learning rate: a linear warm-up, then half a cosine."""
    warm_up = min(WARM_UP, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def stored(encoder: PointTransformer) -> dict[str, torch.Tensor]:
    """Its tensors in float16."""
    return {
        name: tensor.half().contiguous()
        for name, tensor in encoder.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def main() -> None:
    """Draw, pretrain, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clouds", nargs="*", type=Path, default=[], help="folders of cloud files")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--drawn", type=int, default=24000, help="clouds to draw")
    parser.add_argument("--out", type=Path, default=catalogue_folder() / "points" / NAME)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    encoder = PointTransformer(**ARGUMENTS)
    model, takes = Pretrained(encoder), Points(encoder.num_points)
    fuse_attention(slow_fused_attention(model, torch.bfloat16), False)
    read = clouds_in(arguments.clouds, takes)
    clouds = torch.cat([drawn_clouds(arguments.drawn, takes.points), read.repeat(REPEATS, 1, 1)])
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe_machine(),
        "clouds": {"drawn": arguments.drawn, "files": len(read)},
        "losses": [],
    }
    for report in pretrain(model, clouds, takes, arguments.steps):
        print(report, flush=True)
        result["losses"].append(report)
        save_file(stored(encoder), arguments.out)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
