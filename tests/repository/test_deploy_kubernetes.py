"""The Kubernetes files of deploy/ have the fields that KubeRay and Kubernetes declare, and fit each
other."""

from __future__ import annotations

import importlib
import re
from typing import Annotated, Any, Literal

import pytest
import yaml
from helpers_deploy import (
    DEPLOY,
    SHARED,
    cluster,
    command_lines,
    load,
    pods,
)
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    create_model,
)

from pipeline.errors import SpecError
from pipeline.server.front import SETTING


def quantity(text: str) -> str:
    """Kubernetes' number with a unit, parsed as Ray's autoscaler parses it."""
    from ray.autoscaler._private.kuberay.utils import parse_quantity

    assert parse_quantity(text) > 0
    return text


Quantity = Annotated[StrictStr, AfterValidator(quantity)]
Name = Annotated[StrictStr, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Port = Annotated[StrictInt, Field(ge=1, le=65535)]
Count = Annotated[StrictInt, Field(ge=0)]


class Strict(BaseModel):
    """An object whose fields are all known: the API server would drop or refuse the others."""

    model_config = ConfigDict(extra="forbid")


def record(title: str, /, **fields: Any) -> type[Strict]:
    """A strict object; a field given as (type, default) is optional."""
    return create_model(
        title,
        __base__=Strict,
        **{name: kind if isinstance(kind, tuple) else (kind, ...) for name, kind in fields.items()},
    )


Labels = dict[StrictStr, StrictStr]
Metadata = record("ObjectMeta", name=Name, labels=(Labels, {}))
Resources = record(
    "ResourceRequirements", requests=dict[StrictStr, Quantity], limits=dict[StrictStr, Quantity]
)
ContainerPort = record(
    "ContainerPort", name=Annotated[Name, Field(max_length=15)], containerPort=Port
)
EnvFrom = record("EnvFromSource", secretRef=record("SecretEnvSource", name=Name))
Env = record("EnvVar", name=StrictStr, value=StrictStr)
Mount = record("VolumeMount", name=Name, mountPath=Annotated[StrictStr, Field(pattern="^/")])
Container = record(
    "Container",
    name=Name,
    image=StrictStr,
    ports=(list[ContainerPort], []),  # type: ignore[valid-type]
    envFrom=(list[EnvFrom], []),  # type: ignore[valid-type]
    env=(list[Env], []),  # type: ignore[valid-type]
    resources=Resources,
    securityContext=record("SecurityContext", allowPrivilegeEscalation=StrictBool),
    volumeMounts=(list[Mount], []),  # type: ignore[valid-type]
)
Volume = record(
    "Volume",
    name=Name,
    persistentVolumeClaim=(
        record("PersistentVolumeClaimVolumeSource", claimName=Name) | None,
        None,
    ),
    emptyDir=(
        record("EmptyDirVolumeSource", medium=(Literal["", "Memory"], ""), sizeLimit=Quantity)
        | None,
        None,
    ),
)
PodSpec = record(
    "PodSpec",
    securityContext=record(
        "PodSecurityContext",
        runAsNonRoot=StrictBool,
        runAsUser=Count,
        runAsGroup=Count,
        fsGroup=Count,
    ),
    tolerations=(
        list[
            record(
                "Toleration", key=StrictStr, operator=Literal["Exists", "Equal"], effect=StrictStr
            )
        ],
        [],
    ),  # type: ignore[misc]
    containers=list[Container],  # type: ignore[valid-type]
    volumes=(list[Volume], []),  # type: ignore[valid-type]
)
PodTemplate = record("PodTemplateSpec", spec=PodSpec)
StartParams = dict[StrictStr, StrictStr]
ClusterSpec = record(
    "RayClusterSpec",
    rayVersion=StrictStr,
    authOptions=record("AuthOptions", mode=Literal["disabled", "token"], secretName=Name),
    enableInTreeAutoscaling=StrictBool,
    autoscalerOptions=record(
        "AutoscalerOptions",
        version=Literal["v1", "v2"],
        idleTimeoutSeconds=Count,
        resources=Resources,
    ),
    headGroupSpec=record("HeadGroupSpec", rayStartParams=StartParams, template=PodTemplate),
    workerGroupSpecs=list[
        record(  # type: ignore[misc]
            "WorkerGroupSpec",
            groupName=Name,
            replicas=Count,
            minReplicas=Count,
            maxReplicas=Count,
            rayStartParams=StartParams,
            template=PodTemplate,
        )
    ],
)
JobSpec = record(
    "RayJobSpec",
    entrypoint=StrictStr,
    submissionMode=Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"],
    backoffLimit=Count,
    shutdownAfterJobFinishes=StrictBool,
    ttlSecondsAfterFinished=Count,
    rayClusterSpec=ClusterSpec,
)
ServiceSpec = record("RayServiceSpec", serveConfigV2=StrictStr, rayClusterConfig=ClusterSpec)
ClaimSpec = record(
    "PersistentVolumeClaimSpec",
    accessModes=list[Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]],
    resources=record("VolumeResourceRequirements", requests=dict[StrictStr, Quantity]),
)
KINDS = {
    kind: record(
        kind, apiVersion=Literal[version], kind=Literal[kind], metadata=Metadata, spec=spec
    )  # type: ignore[valid-type]
    for kind, version, spec in (
        ("RayCluster", "ray.io/v1", ClusterSpec),
        ("RayJob", "ray.io/v1", JobSpec),
        ("RayService", "ray.io/v1", ServiceSpec),
        ("PersistentVolumeClaim", "v1", ClaimSpec),
    )
}
MANIFESTS = tuple(
    f"kubernetes/{name}.yaml" for name in ("raycluster", "rayjob", "rayservice", "storage")
)


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValidationError where a field is unknown, missing or of the wrong type."""
    KINDS[manifest["kind"]].model_validate(manifest)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_has_known_fields_of_the_right_types(name: str) -> None:
    check_manifest(load(name))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "enableInTreeAutoScaling"), True),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "workerGroupSpecs", 0, "minReplicas"), "0"),
        (
            (
                "spec",
                "workerGroupSpecs",
                0,
                "template",
                "spec",
                "containers",
                0,
                "resources",
                "limits",
                "memory",
            ),
            "16GB",
        ),
        (
            ("spec", "headGroupSpec", "template", "spec", "containers", 0, "ports", 0, "name"),
            "global-control-store",
        ),
        (("spec", "autoscalerOptions", "version"), "v3"),
        (("metadata", "name"), "Taskpack"),
    ],
)
def test_a_wrong_field_is_noticed(path: tuple[str | int, ...], value: object) -> None:
    manifest = load("kubernetes/raycluster.yaml")
    inner = manifest
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises((ValidationError, ValueError)):
        check_manifest(manifest)


def test_both_clusters_are_the_same() -> None:
    assert load("kubernetes/rayjob.yaml")["spec"]["rayClusterSpec"] == cluster()


def service() -> dict[str, Any]:
    return load("kubernetes/rayservice.yaml")["spec"]


def test_the_servers_cluster_is_the_same_but_for_what_serving_needs() -> None:
    plain, own = cluster(), service()["rayClusterConfig"]
    sources = [{"secretRef": {"name": name}} for name in ("taskpack-mlflow", "taskpack-serve")]
    for pod in pods(own):
        assert pod["containers"][0].pop("envFrom") == sources
        [setting] = (each for each in pod["containers"][0]["env"] if each["name"] in SETTING)
        pod["containers"][0]["env"].remove(setting)
        assert {setting["name"]: setting["value"]} == SETTING
    for pod in pods(plain):
        pod["containers"][0].pop("envFrom", None)
    head = own["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert head["ports"].pop() == {"name": "serve", "containerPort": 8000}
    [group] = own["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"]) == (1, 1)
    group["replicas"] = group["minReplicas"] = 0
    assert own == plain


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own fields
def test_ray_serve_builds_the_application_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grpc_reflection", reason="the extra serving (ray[serve]) is not installed")
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(service()["serveConfigV2"]))
    [given] = config.applications
    module, _, name = given.import_path.partition(":")
    build = getattr(importlib.import_module(module), name)
    monkeypatch.setenv("TASKPACK_TOKEN", "let me in")
    deployment = build(given.args)._bound_deployment
    assert [each.name for each in given.deployments] == [deployment.name]
    assert given.args["workdir"].startswith(f"{SHARED}/")
    [worker] = list(pods(service()["rayClusterConfig"]))[1:]
    limits = worker["containers"][0]["resources"]["limits"]
    needed = given.deployments[0].ray_actor_options
    assert needed.num_gpus == int(limits["nvidia.com/gpu"])
    assert needed.num_cpus <= int(limits["cpu"])
    for args, said in (
        ({}, "args: workdir: Field required"),
        ({**given.args, "task": "x"}, "args: task: Extra inputs"),
        ({**given.args, "memory_bytes": 0}, "args: memory_bytes: "),
    ):
        with pytest.raises(SpecError, match=said):
            build(args)
    monkeypatch.delenv("TASKPACK_TOKEN")
    with pytest.raises(SpecError, match="set TASKPACK_TOKEN for its replicas"):
        build(given.args)


def test_ray_reads_the_cluster_as_it_is_meant() -> None:
    """By the code with which the autoscaler in the head's pod reads it: a head that runs nothing,
    GPU nodes from none on.
    """
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )

    manifest = load("kubernetes/raycluster.yaml")
    manifest["metadata"]["namespace"] = "default"
    read = _derive_autoscaling_config_from_ray_cr(manifest)
    head = read["available_node_types"].pop("headgroup")
    assert (head["resources"]["CPU"], head["resources"]["GPU"]) == (0, 0)
    for group in read["available_node_types"].values():
        assert group["min_workers"] == 0 < group["max_workers"]
        assert group["resources"]["GPU"] == 1
        assert group["resources"]["CPU"] >= 1
    assert cluster()["enableInTreeAutoscaling"]
    assert cluster()["authOptions"]["mode"] == "token"


def test_requests_stay_below_limits_and_gpus_are_whole() -> None:
    from ray.autoscaler._private.kuberay.utils import parse_quantity

    for pod in pods(cluster()):
        for container in pod["containers"]:
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert requests.keys() == limits.keys()
            assert all(
                parse_quantity(requests[key]) <= parse_quantity(limits[key]) for key in requests
            )
            assert requests.get("nvidia.com/gpu") == limits.get(
                "nvidia.com/gpu"
            )  # Kubernetes knows no half GPU
            memory = [
                volume["emptyDir"]["sizeLimit"]
                for volume in pod["volumes"]
                if volume.get("emptyDir", {}).get("medium") == "Memory"
            ]
            assert sum(map(parse_quantity, memory)) < parse_quantity(
                requests["memory"]
            )  # what lies in /dev/shm counts


def test_every_pod_has_the_shared_folder_and_its_mounts() -> None:
    claim = load("kubernetes/storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(cluster()):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) == volumes.keys()
            assert (
                volumes[mounts[SHARED]]["persistentVolumeClaim"]["claimName"]
                == claim["metadata"]["name"]
            )
            environment = {each["name"]: each["value"] for each in container["env"]}
            assert environment["TASKPACK_DATA"] == f"{SHARED}/data"
            if "TASKPACK_SHARDS" in environment:  # of the node alone
                assert "emptyDir" in volumes[mounts[environment["TASKPACK_SHARDS"]]]


def test_secrets_are_made_by_the_readme_with_the_keys_that_are_used() -> None:
    """Secrets are in no file, so that none is applied with a value that somebody published."""
    made = {
        words[4]: {option.removeprefix("--from-literal=").split("=")[0] for option in words[5:]}
        for words in command_lines("kubectl")
        if words[1:4] == ["create", "secret", "generic"]
    }
    used = {
        source["secretRef"]["name"]
        for pod in pods(service()["rayClusterConfig"])
        for container in pod["containers"]
        for source in container.get("envFrom", [])
    }
    assert used | {cluster()["authOptions"]["secretName"]} == made.keys()
    assert made[cluster()["authOptions"]["secretName"]] == {
        "auth_token"
    }  # KubeRay asks for this key
    mlflow = {"MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"}
    assert {name: made[name] for name in used} == {
        "taskpack-mlflow": mlflow,
        "taskpack-serve": {"TASKPACK_TOKEN"},
    }
    assert not any(
        "kind: Secret" in (DEPLOY / name).read_text(encoding="utf-8") for name in MANIFESTS
    )


def test_what_the_readme_asks_kubernetes_for_is_there() -> None:
    names = {
        f"{load(name)['kind'].lower()}/{load(name)['metadata']['name']}" for name in MANIFESTS
    } | {"service/taskpack-head-svc", "service/taskpack-serve-serve-svc"}
    asked = {
        word
        for words in command_lines("kubectl")
        for word in words
        if re.fullmatch(r"(raycluster|rayjob|rayservice|service|persistentvolumeclaim)/.+", word)
    }
    assert asked
    assert asked <= names
    selectors = {
        word.split("=", 1)[1]
        for words in command_lines("kubectl")
        for word in words
        if word.startswith("--selector=")
    }
    values = {
        part.split("=")[1]
        for selector in selectors
        for part in selector.split(",")
        if part.startswith("ray.io/cluster=")
    }
    assert values == {load("kubernetes/raycluster.yaml")["metadata"]["name"]}
    groups = {
        part.split("=")[1]
        for selector in selectors
        for part in selector.split(",")
        if part.startswith("ray.io/group=")
    }
    assert groups <= {group["groupName"] for group in cluster()["workerGroupSpecs"]} | {"headgroup"}
