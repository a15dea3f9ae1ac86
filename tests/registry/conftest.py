"""What the tests of the registry share."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.registry.connection import initialise_sqlite


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty store: migrations take seconds, a copy none."""
    folder = tmp_path_factory.mktemp("template")
    initialise_sqlite(folder / "mlflow.db", folder / "artifacts")
    return folder / "mlflow.db"
