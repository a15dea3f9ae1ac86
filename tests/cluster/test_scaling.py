"""A cluster that starts its nodes when they are asked for: the driver waits for one, and not for
ever.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from helpers_paths import PROJECT_ROOT
from ray.cluster_utils import Cluster

from pipeline.cluster import capacity as joined
from pipeline.cluster.capacity import wait_for_room
from pipeline.errors import ClusterError


@pytest.fixture
def scaling() -> Iterator[Cluster]:
    """A head without CPUs, which says of itself that an autoscaler is at work; the test is the
    autoscaler.
    """
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "_system_config": {"enable_autoscaler_v2": True}},
    )
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_the_driver_waits_for_a_node_and_not_for_ever(
    scaling: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined, "_NODE_SECONDS", 1)
    with pytest.raises(
        ClusterError,
        match=r"which no node has \(0 CPUs and 0 GPUs\), and the autoscaler brought none",
    ):
        wait_for_room(1, 2, 0, lambda: False)
    monkeypatch.setattr(joined, "_NODE_SECONDS", 60)
    for ranks, cpus in ((1, 2), (3, 1)):  # the second needs both nodes
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(wait_for_room, ranks, cpus, 0, lambda: False)
            time.sleep(2)
            assert not waiting.done()
            scaling.add_node(num_cpus=cpus)
            waiting.result()
    wait_for_room(1, 1.5, 0, lambda: False)


def test_the_documents_say_how_long_the_driver_waits() -> None:
    for name in ("docs/cluster.md", "deploy/README.md"):
        text = " ".join((PROJECT_ROOT / name).read_text(encoding="utf-8").split())
        assert f"at most {joined._NODE_SECONDS // 60} minutes" in text
