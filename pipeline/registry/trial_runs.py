"""Each trial of a study as a child run of its pack's run: parameters, the metric's curve, bytes,
state, seconds, speed, what it took of its device, and whether it is on the front and whether the
pack was made from it.

A child run carries the trial's id as a tag and is written in three requests. They are written
before the version is created, which is what commits a registration: what a killed process left is
deleted with its parent, so no trial is there twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pipeline.registry.pack_record import Champion
from pipeline.search.trial_record import USAGE_FIELDS

PARENT_TAG = "mlflow.parentRunId"
TRIAL_TAG = "trial_id"
STATE_TAG = "trial_state"
FRONT_TAG = "on_front"
CHAMPION_TAG = "champion"
SPEED_FIELD = "images_per_second"
"""In a trial's row and its run's metrics, as of `TrialRecord.images_per_second`."""
_MESSAGE_TAG = "message"
_LONGEST_TAG = 5000
_STATUS = {"complete": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def log_trials(client: Any, experiment_id: str, parent_run_id: str, champion: Champion) -> None:
    """Write every trial of the champion's study that ran; those rejected without being run have no
    run here either.
    """
    now_ms = int(
        datetime.now(UTC).timestamp() * 1000
    )  # for records that do not say when they ended
    for row in champion.front:
        if row["state"] in _STATUS:
            chosen = {
                FRONT_TAG: row["id"] in champion.on_front,
                CHAMPION_TAG: row["id"] == champion.tags.get("trial"),
            }
            tags = {
                PARENT_TAG: parent_run_id,
                **{tag: str(value).lower() for tag, value in chosen.items()},
            }
            _log_trial(client, experiment_id, tags, row, now_ms)


def delete_children(client: Any, experiment_id: str, parent_run_id: str) -> None:
    """Delete the child runs of a run that is about to be deleted itself."""
    # Always the first page: deleting a page's runs moves the later ones forward.
    while page := client.search_runs(
        [experiment_id], f"tags.`{PARENT_TAG}` = '{parent_run_id}'", max_results=1000
    ):
        for run in page:
            client.delete_run(run.info.run_id)


def _log_trial(
    client: Any, experiment_id: str, tags: Mapping[str, str], row: Mapping[str, Any], ended_ms: int
) -> None:
    from mlflow.entities import Metric, Param

    ended_ms = int(1000 * row["ended"]) if row.get("ended") else ended_ms
    seconds = row.get("seconds", 0.0)
    own = {
        TRIAL_TAG: row["id"],
        STATE_TAG: row["state"],
        _MESSAGE_TAG: row.get("message", "")[:_LONGEST_TAG],
    }
    name = ", ".join(f"{key} {value}" for key, value in row["point"].items()) or "the recipe"
    given = {**tags, **{key: value for key, value in own.items() if value}}
    run = client.create_run(
        experiment_id, start_time=ended_ms - int(1000 * seconds), run_name=name, tags=given
    )
    metrics = [
        Metric("val_metric", float(value), ended_ms, epoch)
        for epoch, value in enumerate(row.get("curve", ()), start=1)
    ]
    metrics += [
        Metric("pack_bytes", float(row["size_bytes"]), ended_ms, 0),
        Metric("seconds", float(seconds), ended_ms, 0),
    ]
    metrics += [
        Metric(name, float(row[name]), ended_ms, 0)
        for name in (SPEED_FIELD, *USAGE_FIELDS)
        if row.get(name) is not None
    ]
    client.log_batch(
        run.info.run_id,
        metrics=metrics,
        params=[Param(key, str(value)) for key, value in row["point"].items()],
    )
    client.set_terminated(run.info.run_id, _STATUS[row["state"]], ended_ms)
