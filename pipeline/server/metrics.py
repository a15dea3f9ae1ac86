"""What a server counts, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipeline.serving.residency import ResidentPacks

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The counters of one server. Only tasks that exist are counted by name, so that no one can
    fill the memory with names.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "taskpack_requests", "Answers by HTTP status.", ["status"], registry=self.registry
        )
        self._images = Counter(
            "taskpack_images", "Images predicted.", ["task"], registry=self.registry
        )
        self._seconds = Histogram(
            "taskpack_request_seconds",
            "Time from a request to its answer.",
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._batch_images = Histogram(
            "taskpack_batch_images",
            "Images of a batch.",
            registry=self.registry,
            buckets=_IMAGES,
        )
        self._batch_seconds = Histogram(
            "taskpack_batch_seconds",
            "Time of a batch.",
            registry=self.registry,
            buckets=_SECONDS,
        )
        names = {
            "waiting_images": "Images that wait for a batch.",
            "resident_packs": "Packs in memory.",
            "resident_bytes": "Memory of the packs.",
            "pack_loads": "Packs loaded since the start.",
            "pack_evictions": "Packs that made room for others since the start.",
        }
        self._gauges = {
            name: Gauge(f"taskpack_{name}", text, registry=self.registry)
            for name, text in names.items()
        }

    def observe_request(self, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def observe_images(self, task: str, images: int) -> None:
        """Count images of a task that exists."""
        self._images.labels(task).inc(images)

    def observe_batch(self, images: int, seconds: float) -> None:
        """Count a batch."""
        self._batch_images.observe(images)
        self._batch_seconds.observe(seconds)

    def text(self, waiting_images: int, packs: ResidentPacks) -> bytes:
        """All of it, now."""
        values = {
            "waiting_images": waiting_images,
            "resident_packs": len(packs.names()),
            "resident_bytes": packs.size_bytes,
            "pack_loads": packs.loads,
            "pack_evictions": packs.evictions,
        }
        for name, value in values.items():
            self._gauges[name].set(value)
        return generate_latest(self.registry)
