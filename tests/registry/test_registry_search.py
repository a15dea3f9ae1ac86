"""Looking packs up by name and number, and every way to ask wrongly."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers_registry import FRONT, champion
from helpers_registry_faults import CrashingClient, counts

from pipeline.errors import RegistryError
from pipeline.registry.store import Registry, open_registry
from pipeline.registry.tracking import EXPERIMENT

# --- looking up -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stocked(template, tmp_path_factory) -> Registry:
    """A registry with four tasks, for tests that only read."""
    tmp_path = tmp_path_factory.mktemp("stocked")
    shutil.copyfile(template, tmp_path / "mlflow.db")
    registry = open_registry(None, tmp_path)
    for task, size_bytes, accuracy in [
        ("cars", 9000, 0.70),
        ("pets", 30000, 0.93),
        ("flowers", 9, 0.99),
        ("dtd", 10000, 0.70),
    ]:
        registry.register(champion(tmp_path, task, max(size_bytes, 31), accuracy))
    return registry


def test_numbers_are_compared_as_numbers(stocked) -> None:
    def names(**limits: Any) -> list[str]:
        return [pack.name for pack in stocked.search(**limits)]

    assert names() == ["flowers", "pets", "cars", "dtd"], "best first, of equals the smallest"
    assert names(max_bytes=9999) == [
        "flowers",
        "cars",
    ], "as text, '10000' and '30000' would come before '9999'"
    assert names(max_bytes=10000) == ["flowers", "cars", "dtd"]
    assert names(min_metric=0.93) == ["flowers", "pets"]
    assert names(min_metric=0.9, max_bytes=20000) == ["flowers"]
    assert names(min_metric=1e-9) == names()
    assert names(task="pets") == ["pets"]
    assert names(task="pets", max_bytes=100) == []
    assert names(limit=1) == ["flowers"]


def test_a_deleted_version_is_left_out_without_shortening_the_answer(registry, tmp_path) -> None:
    registry.register(champion(tmp_path, "flowers", accuracy=0.99))
    registry.register(champion(tmp_path, "pets", accuracy=0.93))
    registry.client.delete_registered_model("flowers")
    assert [pack.name for pack in registry.search(limit=1)] == ["pets"]


def test_pages_join_without_gap_or_repetition(registry, tmp_path) -> None:
    """Ties in accuracy and in size, a page that ends inside them, a version deleted, and a pack
    registered between two pages.
    """
    for seed, (size_bytes, accuracy) in enumerate(
        [(100, 0.5), (100, 0.7), (100, 0.7), (90, 0.7), (100, 0.7), (100, 1 / 3), (100, 0.0)]
    ):
        registry.register(champion(tmp_path, f"task{seed}", size_bytes, accuracy, seed))
    whole = registry.search()
    assert len(whole) == 7
    for limit in (1, 2, 3, 7):
        pages, after = [], None
        while page := registry.search(limit=limit, after=after):
            pages += page
            after = f"{page[-1].name}/{page[-1].version}"
        assert pages == whole
    registry.register(champion(tmp_path, "newest", accuracy=0.99))
    registry.client.delete_registered_model(whole[4].name)
    assert registry.search(limit=2, after=f"{whole[3].name}/1") == whole[5:7]
    with pytest.raises(RegistryError, match="no task of this name"):
        registry.search(after="nowhere/1")


def test_a_page_costs_three_requests(registry, tmp_path) -> None:
    for seed in range(5):
        registry.register(champion(tmp_path, f"task{seed}", seed=seed))
    registry.store.client = CrashingClient(registry.client, 3)
    assert len(registry.search()) == 5


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"limit": 0}, "limit"),
        ({"min_metric": 93.0}, "between 0 and 1"),
        ({"min_metric": float("nan")}, "between 0 and 1"),
        ({"task": "x' OR '1'='1"}, "quotes"),
    ],
)
def test_a_look_up_that_makes_no_sense_is_refused(registry, limits, message) -> None:
    with pytest.raises(RegistryError, match=message):
        registry.search(**limits)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("flowres", "did you mean flowers"),
        ("FLOWERS", "did you mean flowers"),
        ("zebra", "taskpack ls"),
        ("flowers/7", "newest version: 1"),
        (
            "flowers@best",
            (
                r"no version has the alias 'best'; give NAME/VERSION \(newest version: 1, aliases:"
                r" champion\)"
            ),
        ),
        ("flowers/0", "newest version: 1"),
        ("flowers/x", "NAME/VERSION"),
        ("", "NAME/VERSION"),
        ("a'b", "NAME/VERSION"),
        ("models:/flowers/1", "NAME/VERSION"),
        ("../flowers", "NAME/VERSION"),
    ],
)
def test_an_absent_pack_is_named_with_what_there_is(stocked, reference, message) -> None:
    with pytest.raises(RegistryError, match=message):
        stocked.get(reference)


def test_a_model_of_someone_else_is_refused(registry, tmp_path) -> None:
    registry.client.create_registered_model("theirs")
    registry.client.create_model_version("theirs", (tmp_path / "theirs").as_uri())
    with pytest.raises(RegistryError, match="did not register"):
        registry.get("theirs/1")
    with pytest.raises(
        RegistryError,
        match=(
            r"no version has the alias 'champion'; give NAME/VERSION \(newest version: 1, aliases:"
            r" none\)"
        ),
    ):
        registry.get("theirs")


# --- damage and bad input -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size_bytes": 99}, "size_bytes 99, the file has 100"),
        ({"ledger": {"head": 99}}, "ledger sums to 99"),
        ({"pack_path": Path("absent.bin")}, "no such pack"),
        ({"metrics": {"test_metric": float("nan")}}, "test_metric"),
        ({"tags": {"pack_digest": "x"}}, "pack_digest"),
    ],
)
def test_a_champion_that_contradicts_itself_is_refused_and_leaves_nothing(
    registry, tmp_path, change, message
) -> None:
    with pytest.raises(RegistryError, match=message):
        registry.register(replace(champion(tmp_path), **change))
    assert counts(registry) == {"runs": 0, "models": 0, "versions": 0}


def test_a_damaged_artifact_store_is_noticed(registry, workdir, tmp_path) -> None:
    registered = registry.register(champion(tmp_path))
    (stored,) = (workdir / "artifacts").rglob("pack.safetensors")
    stored.write_bytes(stored.read_bytes()[:-1])
    with pytest.raises(RegistryError, match="99 bytes, registered were 100"):
        registry.download(registered, tmp_path / "copies")
    assert not (tmp_path / "copies").exists()
    shutil.rmtree(workdir / "artifacts")
    with pytest.raises(RegistryError, match="artifact store"):
        registry.download(registered, tmp_path / "copies")
    with pytest.raises(RegistryError, match="artifact store"):
        registry.front(registered)


def test_a_deleted_experiment_is_explained(registry, workdir) -> None:
    registry.client.delete_experiment(
        registry.client.get_experiment_by_name(EXPERIMENT).experiment_id
    )
    with pytest.raises(RegistryError, match="mlflow experiments restore"):
        open_registry(None, workdir)


def test_front_json_is_deterministic(registry, workdir, tmp_path) -> None:
    registry.register(replace(champion(tmp_path), front=[dict(reversed(FRONT[0].items()))]))
    (stored,) = (workdir / "artifacts").rglob("front.json")
    assert stored.read_text() == json.dumps(FRONT, sort_keys=True, indent=1) + "\n"
