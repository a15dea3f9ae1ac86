"""The server without HTTP: a host of packs, the registry behind it, and the batches in front."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from typing import Any

import numpy as np

from pipeline.errors import BackboneError, RegistryError, RegistryUnreachable, TaskpackError, named
from pipeline.packs import read_pack
from pipeline.registry.pack_record import RegisteredPack
from pipeline.registry.store import open_registry
from pipeline.server.batcher import Batcher
from pipeline.server.catalogue import Catalogue
from pipeline.server.metrics import Metrics
from pipeline.server.settings import Settings
from pipeline.serving.host import PackHost
from pipeline.serving.predictor import load_backbone_of

_log = logging.getLogger(__name__)


class Engine:
    """Loads the backbone and the first packs, then serves any pack of the registry.

    Raises:
        RegistryError: there is no such pack, or no pack at all.
        PackError: a pack to load at the start cannot be used on the backbone.
        BackboneError: the backbone cannot be loaded, or takes no images.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.metrics = settings, Metrics()
        registry = open_registry(settings.registry, settings.workdir.resolve())
        self.catalogue = Catalogue(registry, settings.workdir.resolve() / "downloads")
        tasks = settings.tasks or tuple(pack.name for pack in registry.search(limit=1))
        if not tasks:
            raise RegistryError(
                "the registry has no pack whose backbone could be served; register one with"
                " `taskpack run`"
            )
        first = read_pack(self.catalogue.read(tasks[0]))
        if first.metadata.modality != "images":
            raise BackboneError(
                f"{tasks[0]}: its backbone takes {first.metadata.modality}, and the server takes"
                " images only; `taskpack predict` takes both"
            )
        backbone = load_backbone_of(first.metadata, settings.weights)
        self.images = backbone.images
        self.host = PackHost(
            backbone,
            self.catalogue.read,
            device=settings.device,
            capacity_bytes=settings.capacity_bytes,
        )
        for task in tasks:
            self.host.packs.get(task)
        self._batcher = Batcher(
            self.host,
            batch_images=settings.batch_images,
            wait_seconds=settings.wait_seconds,
            most_waiting=settings.limits.waiting_images,
            observe=self.metrics.observe_batch,
        )
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._watcher.start()

    def submit(self, requests: list[tuple[str, np.ndarray]]) -> list[Future[dict[str, Any]]]:
        """Queue decoded images, each with the reference of its pack, which is loaded if need be.

        Raises:
            RegistryError: there is no such pack.
            PackError: it cannot be used on this backbone.
            Busy: too many images wait.
            Closed: the engine is closed.
        """
        packs = {name: self.host.packs.get(name) for name in dict.fromkeys(n for n, _ in requests)}
        return self._batcher.submit([(packs[name], image) for name, image in requests])

    def describe(self) -> bytes:
        """The metrics, in Prometheus' text format."""
        return self.metrics.text(self._batcher.waiting, self.host.packs)

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
        self._watcher.join()

    def _watch(self) -> None:
        while not self._stopped.wait(self.settings.poll_seconds):
            try:
                for name in self.renew():
                    _log.info("%s: serving version %s", name, self.served(name).version)
            except Exception as error:  # the packs in memory go on being served
                _log.warning("aliases cannot be followed now: %s", named(error))
