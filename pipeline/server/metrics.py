"""What a server counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from pipeline.serving.residency import ResidentPacks


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_TASK_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5)
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
        self._task_errors = Counter(
            "taskpack_task_errors",
            "Requests that failed, of tasks in memory.",
            ["task"],
            registry=self.registry,
        )
        self._task_seconds = Histogram(
            "taskpack_task_seconds",
            "Time of requests that were answered, without the arrival of their bodies.",
            ["task"],
            registry=self.registry,
            buckets=_TASK_SECONDS,
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

    def observe_task(self, task: str, images: int, seconds: float) -> None:
        """Count what was answered of a task that exists."""
        self._images.labels(task).inc(images)
        self._task_seconds.labels(task).observe(seconds)

    def observe_error(self, task: str) -> None:
        """Count a request that failed, of a task that exists."""
        self._task_errors.labels(task).inc()

    def observe_batch(self, images: int, seconds: float) -> None:
        """Count a batch."""
        self._batch_images.observe(images)
        self._batch_seconds.observe(seconds)

    def now(self, waiting_images: int, packs: ResidentPacks) -> list[Metric]:
        """All of it."""
        values = {
            "waiting_images": waiting_images,
            "resident_packs": len(packs.names()),
            "resident_bytes": packs.size_bytes,
            "pack_loads": packs.loads,
            "pack_evictions": packs.evictions,
        }
        for name, value in values.items():
            self._gauges[name].set(value)
        return list(self.registry.collect())


def as_text(replicas: Mapping[str, Sequence[Metric]]) -> bytes:
    """The counts of all replicas by their names, which are the label `replica`."""
    families: dict[str, Metric] = {}
    for replica, counted in replicas.items():
        for metric in counted:
            family = families.setdefault(
                metric.name, Metric(metric.name, metric.documentation, metric.type, metric.unit)
            )
            family.samples += [
                sample._replace(labels={**sample.labels, "replica": replica})
                for sample in metric.samples
            ]
    registry = CollectorRegistry()
    registry.register(_Collected(families))
    return generate_latest(registry)


class _Collected(Collector):
    def __init__(self, families: dict[str, Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """The families, as they are."""
        yield from self._families.values()
