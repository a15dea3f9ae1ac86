"""The stages of a run on the Ray that runs, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.driver.stages import Placement, Stages, no_progress
from pipeline.driver.workspace import Workspace


def make_stages(folder: Path, kind: type[Stages] = Stages, **options: Any) -> Stages:
    """Stages of a kind in a work folder, on a private Ray with nothing asked of it, unless the
    options say otherwise.
    """
    given = {
        "ray_is_private": True,
        "placement": Placement(),
        "on_progress": no_progress,
        **options,
    }
    return kind(workspace=Workspace(folder), start_ray=lambda: None, **given)
