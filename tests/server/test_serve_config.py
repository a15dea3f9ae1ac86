"""The Serve config of `deploy/`, deployed as KubeRay deploys it, on a Ray of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers_cli import free_port
from helpers_server import TOKEN, Shop, ask, png, wait_until

from pipeline.cluster.session import ray_session
from pipeline.server.client import Client
from pipeline.server.front import SETTING

pytest.importorskip("grpc_reflection", reason="the extra serving (ray[serve]) is not installed")
CONFIG = Path(__file__).parents[2] / "deploy" / "kubernetes" / "rayservice.yaml"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own fields
def test_the_application_of_the_config_answers(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(yaml.safe_load(CONFIG.read_text())["spec"]["serveConfigV2"])
    [application] = config["applications"]
    application["args"] |= {"workdir": str(shop.workdir), "tasks": ["birds"]}
    [deployment] = application["deployments"]
    deployment["ray_actor_options"] = {"num_cpus": 0.5, "num_gpus": 0}
    registry = f"sqlite:///{shop.workdir}/mlflow.db"
    given = {"MLFLOW_TRACKING_URI": registry, "TASKPACK_TOKEN": TOKEN}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    port = free_port()
    with ray_session(None, SETTING | given):
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        try:
            _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: ask(f"{url}/readyz", token=None)[0] == 200)
            [row] = Client(url, TOKEN).predict("birds", [png()])
            assert row["label"] in shop.packs["birds"].metadata.classes
            assert ask(f"{url}/v1/tasks", token="guess")[0] == 401
        finally:
            serve.shutdown()
