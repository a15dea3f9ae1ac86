"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.serving.capacity import CAPACITY_BYTES
from pipeline.utils.precision import Precision


@dataclass(frozen=True)
class Limits:
    """What a server accepts, so that no request, and no number of requests, exhausts it.

    request_bytes: of one request's body; waiting_bytes: of the bodies of all requests under way.
    json_values: of a body, which take up to 25 times their bytes once they are read.
    request_pixels: of all images of a request; mask_pixels: of all masks that one asks for.
    decodes: images that are decoded at the same time. waiting_images: decoded and not yet
    predicted. body_seconds: for a body to arrive.
    """

    request_bytes: int = 16 * 1024**2
    waiting_bytes: int = 256 * 1024**2
    json_values: int = 4096
    image_pixels: int = 25_000_000
    request_pixels: int = 100_000_000
    mask_pixels: int = 50_000_000
    images: int = 256
    decodes: int = 4
    waiting_images: int = 1024
    header_bytes: int = 16 * 1024
    body_seconds: float = 30.0


@dataclass(frozen=True)
class Settings:
    """A server on one backbone and one registry.

    Args:
        tasks: references of packs to load at the start; the backbone is that of the first. None
            given takes the best pack of the registry.
        registry: MLflow's URI; None for MLFLOW_TRACKING_URI or the work folder's.
        weights: the backbone's checkpoint, where this machine does not know it.
        precision: of the products of a pass; packs are checked in float32.
        token: what requests must carry; None for no check.
        images_from: the places below which requests may name images by URL.
        wait_seconds: how long a batch waits for more images.
        poll_seconds: how often the registry is asked where its aliases are.
    """

    workdir: Path
    tasks: tuple[str, ...] = ()
    registry: str | None = None
    weights: str | None = None
    device: str | None = None
    precision: Precision = "fp32"
    token: str | None = None
    images_from: tuple[str, ...] = ()
    capacity_bytes: int = CAPACITY_BYTES
    batch_images: int = 64
    wait_seconds: float = 0.005
    poll_seconds: float = 2.0
    limits: Limits = Limits()
