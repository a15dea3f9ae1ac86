"""Point clouds: stored once in farthest-point order, so that any number of points is a prefix.

A stored cloud is float16 [N, 3 or 6] in NumPy's format, centred, in the units of its file. The
first point is the farthest from the centre, and each further one is the farthest from all before
it: the first P points are spread over the whole cloud, for every P. A cloud with fewer points than
asked for begins again from its first.
Legend: B clouds, N points, C channels.
"""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from pipeline.data.clouds import CLOUD_EXTENSIONS, read_cloud
from pipeline.data.modality import Modality
from pipeline.data.paths import read_path
from pipeline.errors import DataError
from pipeline.specs import Augmentation
from pipeline.specs.data import STORED_POINTS, Scale
from pipeline.utils.devices import all_to_device

_CANDIDATES = 8192
"""Points among which the farthest are sought; of more, as many are drawn."""
_LARGEST, _SMALLEST = 30_000.0, 0.01
"""Radii that float16 holds to a thousandth."""
JITTER, JITTER_MOST = 0.01, 0.05
DROPPED = 0.5
SCALES = (2 / 3, 3 / 2)
SHIFT = 0.2


@dataclass(frozen=True)
class Points(Modality):
    """Clouds float16 [`points`, `channels`], on the unit sphere or, with scale `metric`, in the
    units of their files.

    Args:
        up: the vertical axis.
        turn: whether augmentation turns clouds about it.
    """

    name: ClassVar[str] = "points"
    noun: ClassVar[str] = "point cloud"
    a_noun: ClassVar[str] = "a point cloud"
    extensions: ClassVar[tuple[str, ...]] = CLOUD_EXTENSIONS
    expected: ClassVar[str] = ", ".join(CLOUD_EXTENSIONS)
    column: ClassVar[str] = "cloud"
    arrays: ClassVar[str] = "an array [N, points, 3 or 6]"
    example_file: ClassVar[str] = "cloud.ply"

    points: int
    channels: int = 3
    scale: Scale = "unit"
    up: str = "z"
    turn: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Points and channels."""
        return self.points, self.channels

    @property
    def dtype(self) -> np.dtype[Any]:
        """Half precision."""
        return np.dtype(np.float16)

    @staticmethod
    def stored(content: bytes, name: str) -> bytes:
        """A cloud's file in the form that shards keep. Raises DataError naming `name`."""
        return _saved(ordered(read_cloud(content, name), name))

    @staticmethod
    def is_batch(array: np.ndarray) -> bool:
        """Whether it is [N, points, 3 or 6]."""
        return array.ndim == 3 and array.shape[-1] in (3, 6)

    @staticmethod
    def example() -> bytes:
        """The corners of a cube, as text."""
        return "\n".join(" ".join(corner) for corner in itertools.product("01", repeat=3)).encode()

    def decode(self, source: Any, name: str = "") -> np.ndarray:
        """A cloud from a file's path or content, or from an array [N, 3 or 6]."""
        if isinstance(source, np.ndarray):
            source = _saved(source)
        name = name or (str(source) if isinstance(source, str | Path) else self.noun)
        content = source if isinstance(source, bytes) else read_path(source, name, self.a_noun)
        return self.decode_stored(self.stored(content, name), name)

    def decode_stored(self, content: bytes, name: str) -> np.ndarray:
        """A cloud as shards keep it. Raises DataError naming `name`."""
        cloud = np.load(io.BytesIO(content), allow_pickle=False)
        if cloud.shape[1] < self.channels:
            raise DataError(
                f"{name}: a point has {cloud.shape[1]} numbers, the backbone takes"
                f" {self.channels}; give clouds with normals, or a backbone with `channels: 3`"
            )
        cloud = cloud[np.arange(self.points) % len(cloud), : self.channels].astype(np.float32)
        if self.scale == "unit":
            cloud[:, :3] /= np.linalg.norm(cloud[0, :3])
        return cloud.astype(np.float16)

    def normaliser(self) -> nn.Module:
        """See `ToFloat`."""
        return ToFloat()

    def augment(
        self,
        samples: torch.Tensor,
        targets: torch.Tensor,
        generator: torch.Generator,
        flip: bool,
        kind: Augmentation,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """light: turned about the vertical, mirrored, scaled along each axis by 2/3 to 3/2, moved
        by up to a fifth of the radius. strong: also jittered, and without up to half of its points.
        """
        clouds = samples.float()
        if kind == "none" or not len(clouds):
            return clouds, targets
        draw, is_strong = _Numbers(generator, len(clouds)), kind == "strong"
        points = clouds.shape[1] if is_strong else 0
        is_dropped_BN = draw(points) < DROPPED * draw(1 if is_strong else 0)
        turned_B33 = self._turns(draw, flip)
        low, high = SCALES
        scale_B13, shift_B13 = low + (high - low) * draw(1, 3), 2 * draw(1, 3) - 1
        is_dropped_BN, turned_B33, scale_B13, shift_B13, noise_BN3 = all_to_device(
            [is_dropped_BN.float(), turned_B33, scale_B13, shift_B13, draw.normal(points, 3)],
            clouds.device,
        )
        radius = clouds[..., :3].norm(dim=-1).amax(dim=1).view(-1, 1, 1)
        if is_strong:
            clouds = _without_some(clouds, is_dropped_BN.bool())
        xyz, normals = clouds[..., :3], clouds[..., 3:]
        xyz = xyz @ turned_B33 * scale_B13 + SHIFT * radius * shift_B13
        if is_strong:
            xyz = xyz + radius * (noise_BN3 * JITTER).clamp(-JITTER_MOST, JITTER_MOST)
        if normals.shape[-1]:
            normals = nn.functional.normalize(normals @ turned_B33 / scale_B13, dim=-1)
        return torch.cat([xyz, normals], dim=-1), targets

    def _turns(self, draw: _Numbers, flip: bool) -> torch.Tensor:
        """Matrices [B, 3, 3] that turn about the vertical, and mirror every other cloud."""
        vertical = "xyz".index(self.up)
        one, other = [axis for axis in range(3) if axis != vertical]
        angle = 2 * math.pi * draw(1).squeeze(1) * self.turn
        mirror = torch.where((draw(1).squeeze(1) < 0.5) | (not flip), 1.0, -1.0)
        turned = torch.zeros(len(angle), 3, 3)
        turned[:, vertical, vertical] = 1
        turned[:, one, one], turned[:, one, other] = mirror * angle.cos(), mirror * angle.sin()
        turned[:, other, one], turned[:, other, other] = -angle.sin(), angle.cos()
        return turned

    def probe(self, count: int) -> np.ndarray:
        """Clouds of noise inside the unit sphere, float16 [count, N, C]."""
        noise = np.random.default_rng(0).normal(size=(count, *self.shape))
        length = np.linalg.norm(noise, axis=-1, keepdims=True)
        return (noise / np.maximum(length, 1.0)).astype(np.float16)

    def facts(self) -> dict[str, Any]:
        """Points, channels and scale."""
        return {"points": self.points, "channels": self.channels, "scale": self.scale}

    @property
    def key(self) -> str:
        """Points, channels and scale."""
        return f"points-{self.points}-{self.channels}-{self.scale}"

    @property
    def identity(self) -> list[Any]:
        """All settings."""
        return [self.points, self.channels, self.scale, self.up, self.turn]

    def misfit(self, facts: dict[str, Any]) -> str | None:
        """Other points."""
        own = self.facts()
        given = {key: facts.get(key) for key in own}
        return None if given == own else f"takes clouds of {given}, given a backbone set to {own}"


class ToFloat(nn.Module):
    """Clouds of any precision [B, N, C] in float32."""

    def forward(self, clouds: torch.Tensor) -> torch.Tensor:
        return clouds.float()


@dataclass(frozen=True)
class _Numbers:
    """Random numbers of each cloud, on the CPU."""

    generator: torch.Generator
    clouds: int

    def __call__(self, *shape: int) -> torch.Tensor:
        """Uniform in [0, 1), [B, *shape]."""
        return torch.rand(self.clouds, *shape, generator=self.generator)

    def normal(self, *shape: int) -> torch.Tensor:
        """Of deviation 1, [B, *shape]."""
        return torch.randn(self.clouds, *shape, generator=self.generator)


def _without_some(clouds: torch.Tensor, is_dropped: torch.Tensor) -> torch.Tensor:
    """Each cloud without its dropped points [B, N], but for its first; those that stay keep their
    order and begin again.
    """
    points = clouds.shape[1]
    is_dropped[:, 0] = False
    order = is_dropped.to(torch.uint8).argsort(dim=1, stable=True)
    kept_B1 = (~is_dropped).sum(dim=1, keepdim=True)
    index = order.gather(1, torch.arange(points, device=clouds.device)[None] % kept_B1)
    return clouds.gather(1, index[:, :, None].expand_as(clouds))


def ordered(points: np.ndarray, name: str) -> np.ndarray:
    """A cloud as shards keep it, float16 [at most STORED_POINTS, C], from float64 [N, C]. Raises
    DataError naming `name` where its size cannot be kept.
    """
    centred = points - np.pad(points[:, :3].mean(axis=0), (0, points.shape[1] - 3))
    lengths = np.linalg.norm(centred[:, :3], axis=1)
    radius, farthest = float(lengths.max()), int(lengths.argmax())
    if not _SMALLEST <= radius <= _LARGEST:
        fault = "all points are the same" if radius == 0 else f"its radius is {radius:.3g}"
        raise DataError(
            f"{name}: {fault}; expected a radius of {_SMALLEST} to {_LARGEST:,.0f}: give its"
            " coordinates in other units"
        )
    if len(centred) > _CANDIDATES:
        others = np.delete(np.arange(len(centred)), farthest)
        drawn = np.random.default_rng(0).choice(others, _CANDIDATES - 1, replace=False)
        centred, farthest = centred[np.concatenate([[farthest], np.sort(drawn)])], 0
    order = farthest_order(centred[:, :3], farthest, min(len(centred), STORED_POINTS))
    return centred[order].astype(np.float16)


def farthest_order(points_N3: np.ndarray, first: int, count: int) -> np.ndarray:
    """Indices [count] of farthest-point sampling from `first` on."""
    planes = np.ascontiguousarray(points_N3.T, dtype=np.float32)
    order = np.empty(count, np.int64)
    nearest_N = np.full(planes.shape[1], np.inf, np.float32)
    for number in range(count):
        order[number] = first
        offsets = planes - planes[:, first, None]
        np.minimum(nearest_N, np.einsum("an,an->n", offsets, offsets), out=nearest_N)
        first = int(nearest_N.argmax())
    return order


def _saved(cloud: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, cloud, allow_pickle=False)
    return stream.getvalue()
