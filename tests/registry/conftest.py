"""What the tests of the registry share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.registry.connection import initialise_sqlite
from pipeline.registry.store import Registry, open_registry


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty store: migrations take seconds, a copy none."""
    folder = tmp_path_factory.mktemp("template")
    initialise_sqlite(folder / "mlflow.db", folder / "artifacts")
    return folder / "mlflow.db"


@pytest.fixture
def workdir(template, tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    folder = tmp_path / "work"
    folder.mkdir()
    shutil.copyfile(template, folder / "mlflow.db")
    return folder


@pytest.fixture
def registry(workdir) -> Registry:
    return open_registry(None, workdir)
