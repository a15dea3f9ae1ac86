"""The server without HTTP: a host of packs, the registry behind it, and the batches in front."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from prometheus_client import Metric

from pipeline.errors import (
    BackboneError,
    RegistryError,
    RegistryUnreachable,
    ServerError,
    TaskpackError,
    named,
)
from pipeline.packs import PackMetadata, read_pack
from pipeline.registry.pack_record import RegisteredPack
from pipeline.registry.store import open_registry
from pipeline.server.batcher import Batcher
from pipeline.server.catalogue import Catalogue
from pipeline.server.metrics import Metrics
from pipeline.server.settings import Settings
from pipeline.serving.host import PackHost
from pipeline.serving.predictor import load_backbone_of
from pipeline.serving.samples import Decoded

_log = logging.getLogger(__name__)
_MASKS_AT_ONCE = 8
"""Images whose masks are answered together: they pass one by one, so that more gain little."""


class TooManyPixels(ServerError):
    """The masks that a request asks for are too large."""


class Engine:
    """Loads the backbone and the first packs, then serves any pack of the registry.

    Raises:
        RegistryError: there is no such pack, or no pack at all.
        PackError: a pack to load at the start cannot be used on the backbone.
        BackboneError: the backbone cannot be loaded, or takes no images.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.catalogue, tasks, first = open_catalogue(settings)
        backbone = load_backbone_of(first, settings.weights)
        self.images = backbone.images
        self.host = PackHost(
            backbone,
            self.catalogue.read,
            device=settings.device,
            capacity_bytes=settings.capacity_bytes,
            precision=settings.precision,
        )
        for task in tasks:
            self.host.packs.get(task)
        self._batcher = self._open_batcher(settings.batch_images)
        # Of their own, because the mask of a large image takes as long as many labels.
        self._masks = self._open_batcher(min(settings.batch_images, _MASKS_AT_ONCE))
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._watcher.start()

    def _open_batcher(self, batch_images: int) -> Batcher:
        return Batcher(
            self.host,
            batch_images=batch_images,
            wait_seconds=self.settings.wait_seconds,
            most_waiting=self.settings.limits.waiting_images,
            observe=self.metrics.observe_batch,
        )

    def submit(self, requests: list[tuple[str, Decoded]]) -> list[Future[dict[str, Any]]]:
        """Queue decoded images, each with the reference of its pack, which is loaded if need be.

        Raises:
            RegistryError: there is no such pack.
            PackError: it cannot be used on this backbone.
            TooManyPixels: the masks would be too large.
            Busy: too many images wait.
            Closed: the engine is closed.
        """
        packs = {name: self.host.packs.get(name) for name in dict.fromkeys(n for n, _ in requests)}
        asked = [(packs[name], image) for name, image in requests]
        self._check_masks([image for pack, image in asked if pack.is_dense])
        found: dict[int, Future[dict[str, Any]]] = {}
        try:
            for batcher, are_dense in ((self._batcher, False), (self._masks, True)):
                numbers = [n for n, (pack, _) in enumerate(asked) if pack.is_dense == are_dense]
                futures = batcher.submit([asked[number] for number in numbers])
                found |= zip(numbers, futures, strict=True)
        except ServerError:
            for future in found.values():
                future.cancel()
            raise
        return [found[number] for number in range(len(asked))]

    def _check_masks(self, images: list[Decoded]) -> None:
        most = self.settings.limits.mask_pixels
        pixels = sum(height * width for height, width in (image.size for image in images))
        if pixels > most:
            raise TooManyPixels(
                f"masks of {pixels:,} pixels asked for; at most {most:,} at once: scale the images"
                " down, or send fewer"
            )

    def counted(self) -> list[Metric]:
        """The metrics now."""
        return self.metrics.now(self._batcher.waiting + self._masks.waiting, self.host.packs)

    @contextmanager
    def counting(self, names: list[str]) -> Iterator[None]:
        """A context in which a request is answered, with the name of a pack for each image."""
        began, images = time.monotonic(), Counter(names)
        try:
            yield
        except BaseException:
            for name in images.keys() & {*self.host.packs.names()}:
                self.metrics.observe_error(name)
            raise
        for name, count in images.items():
            self.metrics.observe_task(name, count, time.monotonic() - began)

    def served(self, name: str) -> RegisteredPack:
        """The version that requests for a name get. Raises RegistryError."""
        pack = self.host.packs.resident(name)
        return self.catalogue.registered(name, None if pack is None else pack.digest)

    def renew(self) -> list[str]:
        """Load the packs whose alias has moved, and return those that are served now. Until then,
        or if the new version cannot be used, requests get the one before.
        """
        renewed = []
        for name in self.catalogue.moved(self.host.packs.names()):
            try:
                pack = self.host.packs.renew(name)
            except RegistryUnreachable:
                raise
            except TaskpackError as error:
                _log.warning("%s: the version before stays: %s", name, error)
            else:
                self.catalogue.keep(name, pack.digest)
                renewed.append(name)
        return renewed

    def close(self) -> None:
        """Predict what waits, and stop."""
        self._stopped.set()
        self._batcher.close()
        self._masks.close()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._stopped.wait(self.settings.poll_seconds):
            try:
                for name in self.renew():
                    _log.info("%s: serving version %s", name, self.served(name).version)
            except Exception as error:  # the packs in memory go on being served
                _log.warning("aliases cannot be followed now: %s", named(error))


def open_catalogue(settings: Settings) -> tuple[Catalogue, tuple[str, ...], PackMetadata]:
    """The packs of a server's registry, the references of those to load at the start, and what the
    first of them says, whose backbone is served.

    Raises:
        RegistryError: there is no such pack, or no pack at all.
        BackboneError: the backbone takes no images.
    """
    registry = open_registry(settings.registry, settings.workdir.resolve())
    catalogue = Catalogue(registry, settings.workdir.resolve() / "downloads")
    tasks = settings.tasks or tuple(pack.name for pack in registry.search(limit=1))
    if not tasks:
        raise RegistryError(
            "the registry has no pack whose backbone could be served; register one with"
            " `taskpack run`"
        )
    first = read_pack(catalogue.read(tasks[0])).metadata
    if first.modality != "images":
        raise BackboneError(
            f"{tasks[0]}: its backbone takes {first.modality}, and the server takes images only;"
            " `taskpack predict` takes both"
        )
    return catalogue, tasks, first
