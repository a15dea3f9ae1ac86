"""Clients of a registry that fail at a chosen call."""

from __future__ import annotations

from typing import Any

from pipeline.registry.store import Registry
from pipeline.registry.tracking import EXPERIMENT
from pipeline.registry.trial_runs import PARENT_TAG


def counts(registry: Registry) -> dict[str, int]:
    experiment_id = registry.client.get_experiment_by_name(EXPERIMENT).experiment_id
    return {
        "runs": sum(
            PARENT_TAG not in run.data.tags for run in registry.client.search_runs([experiment_id])
        ),
        "models": len(registry.client.search_logged_models([experiment_id])),
        "versions": len(registry.client.search_model_versions("")),
    }


class Crash(Exception):
    pass


class CrashingClient:
    """Lets `calls` calls through and dies before the next."""

    def __init__(self, client: Any, calls: int) -> None:
        self._client, self._left = client, calls

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                raise Crash(name)
            return method(*arguments, **options)

        return call
