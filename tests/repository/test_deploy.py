"""The files of deploy/ fit together and fit the programs they are for, as far as that shows without
a container engine, a cluster or a cloud.

Ray's own code reads the launcher's file and the RayCluster; the rest of the Kubernetes files is
held against the fields of KubeRay 1.7's and Kubernetes' references that they use, listed below;
every command line is parsed by the command it calls.
"""

from __future__ import annotations

import configparser
import fnmatch
import importlib.metadata
import io
import itertools
import json
import re
import shlex
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
import yaml
from helpers_paths import PROJECT_ROOT
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

from pipeline.cli.app import app
from pipeline.driver.jobs import describe
from pipeline.specs.task_files import load_tasks

DEPLOY = PROJECT_ROOT / "deploy"
README = (DEPLOY / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(
    line.split("==")
    for line in (PROJECT_ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line
)
SHARED = "/mnt/taskpack"


def load(name: str) -> Any:
    """The only document of a YAML file of deploy/."""
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


# --- Kubernetes: the fields that these files use, as the references declare them ------------------


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
        record("EmptyDirVolumeSource", medium=Literal["", "Memory"], sizeLimit=Quantity) | None,
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
        ("PersistentVolumeClaim", "v1", ClaimSpec),
    )
}
MANIFESTS = ("kubernetes/raycluster.yaml", "kubernetes/rayjob.yaml", "kubernetes/storage.yaml")


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValidationError where a field is unknown, missing or of the wrong type."""
    KINDS[manifest["kind"]].model_validate(manifest)


def cluster() -> dict[str, Any]:
    return load("kubernetes/raycluster.yaml")["spec"]


def pods(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod specs of a cluster: the head's, then the workers'."""
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]["spec"]


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
                volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if "emptyDir" in volume
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
            assert {"name": "TASKPACK_DATA", "value": f"{SHARED}/data"} in container["env"]


def test_secrets_are_made_by_the_readme_with_the_keys_that_are_used() -> None:
    """Secrets are in no file, so that none is applied with a value that somebody published."""
    made = {
        words[4]: {option.removeprefix("--from-literal=").split("=")[0] for option in words[5:]}
        for words in command_lines("kubectl")
        if words[1:4] == ["create", "secret", "generic"]
    }
    used = {
        source["secretRef"]["name"]
        for pod in pods(cluster())
        for container in pod["containers"]
        for source in container.get("envFrom", [])
    }
    assert used | {cluster()["authOptions"]["secretName"]} == made.keys()
    assert made[cluster()["authOptions"]["secretName"]] == {
        "auth_token"
    }  # KubeRay asks for this key
    assert [made[name] for name in used] == [
        {"MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"}
    ]
    assert not any(
        "kind: Secret" in (DEPLOY / name).read_text(encoding="utf-8") for name in MANIFESTS
    )


def test_what_the_readme_asks_kubernetes_for_is_there() -> None:
    names = {
        f"{load(name)['kind'].lower()}/{load(name)['metadata']['name']}" for name in MANIFESTS
    } | {"service/taskpack-head-svc"}
    asked = {
        word
        for words in command_lines("kubectl")
        for word in words
        if re.fullmatch(r"(raycluster|rayjob|service|persistentvolumeclaim)/.+", word)
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


# --- the cluster launcher -------------------------------------------------------------------------


def launcher() -> dict[str, Any]:
    """deploy/aws.yaml as `ray up` completes it from Ray's defaults for the cloud."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(load("aws.yaml"))


def test_the_launchers_file_passes_rays_validation() -> None:
    from ray.autoscaler._private.util import validate_config

    config = launcher()
    validate_config(config)
    head = config["available_node_types"].pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert [
        (kind["min_workers"], kind["resources"]["GPU"])
        for kind in config["available_node_types"].values()
    ] == [(0, 1)]
    assert config["max_workers"] == sum(
        kind["max_workers"] for kind in config["available_node_types"].values()
    )
    assert not any(
        "which ray" in command for command in config["setup_commands"]
    )  # Ray's default installs a Ray of its own


def test_the_launchers_wrong_field_is_noticed() -> None:
    import jsonschema
    from ray.autoscaler._private.util import validate_config

    config = launcher()
    config["available_node_types"]["gpu"]["min_worker"] = 0
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config)


def test_the_launchers_nodes_share_token_folder_and_ports() -> None:
    config = launcher()
    options = shlex.split(" ".join(config["docker"]["run_options"]))
    environment = dict(
        value.split("=", 1) for name, value in itertools.pairwise(options) if name == "--env"
    )
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] in config["file_mounts"]
    assert environment["TASKPACK_DATA"] == f"{SHARED}/data"
    assert f"{SHARED}:{SHARED}" in options
    assert any(
        SHARED in command and "mount -t nfs4" in command
        for command in config["initialization_commands"]
    )
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--num-cpus=0" in head
    assert {"--port=6379", "--address=$RAY_HEAD_IP:6379"} <= {*head.split(), *worker.split()}
    sourced = re.search(r"\. ~/(\S+);", head)
    assert sourced is not None
    assert f"/home/ray/{sourced[1]}" in config["file_mounts"]


# --- the images -----------------------------------------------------------------------------------

INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENV", "EXPOSE", "FROM", "RUN", "USER", "WORKDIR"}


def dockerfile() -> list[tuple[str, str]]:
    """Instruction and arguments of every line, continuations joined, comments left out."""
    lines = [
        line
        for line in (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
        if not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1])
        for line in joined.splitlines()
        if line.strip()
    ]


def stage(name: str) -> list[tuple[str, str]]:
    """The instructions of one stage, those of the stage it starts from included."""
    stages: dict[str, list[tuple[str, str]]] = {}
    for instruction, rest in dockerfile():
        if instruction == "FROM":
            base, _, current = rest.split()
            stages[current] = list(stages.get(base, []))
        stages[current].append((instruction, rest))
    return stages[name]


def ignored(path: str) -> bool:
    """Whether the build context leaves `path` out: the last pattern that matches it or a folder it
    lies in decides.
    """
    verdict = False
    for line in (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        parents = [path, *(str(parent) for parent in Path(path).parents)]
        if (
            line
            and not line.startswith("#")
            and any(fnmatch.fnmatch(each, pattern) for each in parents)
        ):
            verdict = not line.startswith("!")
    return verdict


def copied() -> list[str]:
    return [
        source
        for instruction, rest in dockerfile()
        if instruction == "COPY"
        for source in rest.split()[:-1]
    ]


def test_the_dockerfile_has_known_instructions_and_the_stages_that_are_named() -> None:
    assert {instruction for instruction, _ in dockerfile()} == INSTRUCTIONS
    bases = [rest for instruction, rest in dockerfile() if instruction == "FROM"]
    assert bases == ["python:3.11-slim-bookworm AS base", "base AS mlflow", "base AS taskpack"]
    named = {
        words[words.index("--target") + 1]
        for words in command_lines("docker")
        if "--target" in words
    }
    assert named | {load("mlflow/compose.yaml")["x-mlflow"]["build"]["target"]} == {"mlflow"}
    arguments = {
        words[words.index("--build-arg") + 1].split("=")[0]
        for words in command_lines("docker")
        if "--build-arg" in words
    }
    assert arguments == {
        rest.split("=")[0] for instruction, rest in dockerfile() if instruction == "ARG"
    }


def test_what_is_copied_exists_and_reaches_the_build() -> None:
    assert {"constraints.txt", "pyproject.toml", "pipeline", "tasks"} <= set(copied())
    assert [source for source in copied() if not (PROJECT_ROOT / source).exists()] == []
    assert [source for source in copied() if ignored(source)] == []
    assert all(
        ignored(secret)
        for secret in (".git", "runs", "deploy/mlflow/.env", ".venv", "deploy/mlflow/compose.yaml")
    )


def test_what_the_package_is_built_from_is_copied() -> None:
    needed = {PROJECT["readme"], *PROJECT["license-files"], "pipeline", "tasks", "pyproject.toml"}
    assert needed <= set(copied())


def test_the_image_has_the_python_that_the_project_is_tested_with() -> None:
    image = re.search(r"python:(\d+\.\d+)-", dockerfile()[0][1])
    config = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert image is not None
    assert (
        image[1]
        == config["tool"]["mypy"]["python_version"]
        == PROJECT["requires-python"].removeprefix(">=")
    )


@pytest.mark.parametrize("name", ["taskpack", "mlflow"])
def test_an_image_runs_as_a_user_and_installs_pinned_versions(name: str) -> None:
    instructions = stage(name)
    assert [rest for instruction, rest in instructions if instruction == "USER"] == ["1000"]
    assert [rest.split()[0] for instruction, rest in instructions if instruction == "CMD"]
    environment = " ".join(rest for instruction, rest in instructions if instruction == "ENV")
    assert "HOME=/home/ray" in environment  # where Ray's launcher puts its files: it asks the image
    installs = [
        part
        for instruction, rest in instructions
        if instruction == "RUN"
        for part in re.findall(r"pip install [^;&]+", rest)
    ]
    assert installs
    assert all(
        "--constraint constraints.txt" in install or install.strip() == "pip install --no-deps ."
        for install in installs
    )


def test_the_images_user_is_the_pods_user() -> None:
    (user,) = {rest for instruction, rest in dockerfile() if instruction == "USER"}
    assert {pod["securityContext"]["runAsUser"] for pod in pods(cluster())} == {int(user)}


def test_the_images_requirements_are_the_projects() -> None:
    """The one line of Python that lists what the image installs, run as the build runs it."""
    script = next(
        re.search(r'python -c "([^"]+)"', rest)[1]
        for _, rest in stage("taskpack")
        if "tomllib" in rest
    )  # type: ignore[index]
    printed: list[str] = []
    exec(
        script,
        {
            "open": lambda name, mode: io.BytesIO((PROJECT_ROOT / name).read_bytes()),
            "print": lambda *words, sep: printed.extend(words),
        },
    )
    assert printed == [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cluster"]]


def test_the_servers_requirements_are_pinned_once() -> None:
    lines = [
        line
        for line in (DEPLOY / "mlflow/requirements.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    names = [re.split(r"[=\[]", line)[0].lower() for line in lines]
    pinned = {name.lower() for name in PINS}
    assert "mlflow" in pinned
    assert [
        line for line, name in zip(lines, names, strict=True) if name in pinned and "==" in line
    ] == []
    assert [
        line
        for line, name in zip(lines, names, strict=True)
        if name not in pinned and "==" not in line
    ] == []
    extra = {
        re.split(r"[<>=;\s]", need)[0].lower()
        for need in importlib.metadata.requires("mlflow") or []
        if 'extra == "auth"' in need
    }
    assert extra
    assert extra <= pinned | set(names)  # what basic auth needs
    assert {"psycopg", "psycopg-binary", "boto3"} <= set(names)


def test_versions_agree() -> None:
    assert cluster()["rayVersion"] == PINS["ray"]
    tags = set(
        re.findall(
            r"taskpack(?:-mlflow)?:([0-9.]+[0-9])",
            "".join(path.read_text(encoding="utf-8") for path in deploy_files()),
        )
    )
    assert tags == {PROJECT["version"]}
    clients = {
        pin
        for path in deploy_files()
        for pin in re.findall(r"boto3==([0-9.]+)", path.read_text(encoding="utf-8"))
    }
    assert len(clients) == 1


def test_one_image_is_named_everywhere() -> None:
    images = {container["image"] for pod in pods(cluster()) for container in pod["containers"]} | {
        load("aws.yaml")["docker"]["image"]
    }
    (image,) = images
    assert ["docker", "push", image] in command_lines("docker")


def deploy_files() -> list[Path]:
    return [path for path in DEPLOY.rglob("*") if path.is_file() and path.name != ".env"]


# --- the MLflow server ----------------------------------------------------------------------------

REFERENCE = re.compile(r"\$\{(\w+)(:\?[^}]+)?\}")


def compose() -> dict[str, Any]:
    return load("mlflow/compose.yaml")


def example() -> dict[str, str]:
    """The variables of the example env file."""
    lines = (DEPLOY / "mlflow/env.example").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_the_server_asks_for_every_variable_and_knows_no_password() -> None:
    references = REFERENCE.findall((DEPLOY / "mlflow/compose.yaml").read_text(encoding="utf-8"))
    assert {name for name, _ in references} == example().keys()
    assert [
        name for name, refusal in references if not refusal
    ] == []  # an empty variable stops the start, each by its name
    secret = {name for name in example() if re.search("PASSWORD|KEY|SECRET", name)}
    assert len(secret) == 4
    assert {name: example()[name] for name in secret} == dict.fromkeys(secret, "")
    given = [
        value
        for service in compose()["services"].values()
        for name, value in service.get("environment", {}).items()
        if "PASSWORD" in name
    ]
    assert len(given) == 3
    assert all(REFERENCE.fullmatch(value) for value in given)
    assert ".env" in (PROJECT_ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_services_wait_for_services_that_are_there_and_can_tell() -> None:
    services = compose()["services"]
    for service in services.values():
        for name, condition in service.get("depends_on", {}).items():
            assert name in services
            assert condition["condition"] in ("service_healthy", "service_completed_successfully")
            if condition["condition"] == "service_healthy":
                assert services[name]["healthcheck"]["test"][0] == "CMD"
    assert all(
        "healthcheck" in service for name, service in services.items() if service.get("restart")
    )


def test_mounts_and_hosts_of_the_services_are_there() -> None:
    services, volumes, configs = compose()["services"], compose()["volumes"], compose()["configs"]
    for service in services.values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert (
                (DEPLOY / "mlflow" / source).is_file()
                if source.startswith(".")
                else source in volumes
            )
        assert {each["source"] for each in service.get("configs", [])} <= configs.keys()
    text = "".join(
        (DEPLOY / "mlflow" / name).read_text(encoding="utf-8")
        for name in ("compose.yaml", "basic_auth.ini")
    )
    hosts = set(re.findall(r"postgresql://\w+@(\w+)/|http://(\w+):8333", text))
    assert (
        {host for pair in hosts for host in pair if host} == {"postgres", "s3"} <= services.keys()
    )
    build = compose()["x-mlflow"]["build"]
    assert (
        DEPLOY / "mlflow" / build["context"] / build["dockerfile"]
    ).resolve() == DEPLOY / "Dockerfile"


def test_what_the_readme_saves_is_there() -> None:
    volumes = {f"{compose()['name']}_{name}" for name in compose()["volumes"]}
    saved = {
        word.split(":")[0]
        for words in command_lines("docker")
        for word in words
        if re.match("taskpack-mlflow_", word)
    }
    assert saved
    assert saved <= volumes
    services = {
        words[words.index("exec") + 2] for words in command_lines("docker") if "exec" in words
    }
    services |= {
        name
        for words in command_lines("docker")
        if "logs" in words
        for name in words[words.index("logs") + 1 :]
    }
    assert services
    assert services <= compose()["services"].keys()


def test_the_stores_key_is_the_servers_key() -> None:
    identity = json.loads(compose()["configs"]["s3"]["content"])["identities"][0]
    environment = compose()["services"]["mlflow"]["environment"]
    (key,) = identity["credentials"]
    assert key == {
        "accessKey": environment["AWS_ACCESS_KEY_ID"],
        "secretKey": environment["AWS_SECRET_ACCESS_KEY"],
    }


def test_the_server_has_two_databases_that_are_made() -> None:
    services = compose()["services"]
    stores = re.findall(r"--backend-store-uri=(\S+)", " ".join(services["mlflow"]["command"]))
    users = configparser.ConfigParser()
    users.read(DEPLOY / "mlflow/basic_auth.ini")
    uris = [*stores, users["mlflow"]["database_uri"]]
    assert [uri.split("@")[0] for uri in uris] == [
        f"postgresql://{services['postgres']['environment']['POSTGRES_USER']}"
    ] * 2  # no password in them
    made = re.findall(
        r"CREATE DATABASE (\w+)",
        (DEPLOY / "mlflow/create_auth_database.sql").read_text(encoding="utf-8"),
    )
    assert [uri.rsplit("/", 1)[1] for uri in uris] == [
        services["postgres"]["environment"]["POSTGRES_DB"],
        *made,
    ]


def test_mlflow_knows_the_settings_it_is_given() -> None:
    from mlflow import environment_variables

    given = {
        name
        for name in compose()["services"]["mlflow"]["environment"]
        if name.startswith("MLFLOW_")
    }
    known = {
        variable.name
        for variable in vars(environment_variables).values()
        if hasattr(variable, "name")
    }
    assert given - {"MLFLOW_DISABLE_TELEMETRY"} <= known
    keys = configparser.ConfigParser()
    keys.read(DEPLOY / "mlflow/basic_auth.ini")
    settings = (
        Path(environment_variables.__file__).with_name("server") / "auth/config.py"
    )  # read, not imported: that would set up its database
    assert set(keys["mlflow"]) <= set(
        re.findall(r"^    (\w+): ", settings.read_text(encoding="utf-8"), re.MULTILINE)
    )


def test_the_server_listens_where_it_is_reached() -> None:
    service = compose()["services"]["mlflow"]
    (port,) = re.findall(r"--port=(\d+)", " ".join(service["command"]))
    assert service["ports"] == [f"${{MLFLOW_BIND:?fill it in in .env}}:{port}:{port}"]
    assert f"http://127.0.0.1:{port}/health" in service["healthcheck"]["test"][-1]
    assert f"127.0.0.1:{port}" in example()["MLFLOW_HOSTS"].split(",")
    assert example()["MLFLOW_BIND"] == "127.0.0.1"  # open to others only once somebody says so
    assert ("EXPOSE", port) in stage("mlflow")


# --- command lines --------------------------------------------------------------------------------


PROGRAMS = (
    "aws",
    "cat",
    "chmod",
    "cp",
    "curl",
    "docker",
    "export",
    "helm",
    "kubectl",
    "mkdir",
    "mlflow",
    "pip",
    "python3",
    "ray",
    "taskpack",
)


def readme_lines() -> list[str]:
    """The commands of the README: those of its shell blocks, continuations joined, and those in its
    text that are more than a command's name.
    """
    blocks = re.findall(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    inline = [
        span
        for span in re.findall(r"`([^`\n]+)`", text)
        if span.split()[0] in PROGRAMS and len(span.split()) > 2
    ]
    return [
        line.strip()
        for block in blocks
        for line in re.sub(r"\\\n\s*", "", block).splitlines()
        if line
    ] + inline


def command_lines(program: str) -> list[list[str]]:
    """The words of every command line of a program, in the README and in the files themselves."""
    found = [shlex.split(line, comments=True) for line in readme_lines()]
    inner = [[word for word in words if word] for words in found]
    for words in list(
        inner
    ):  # what `kubectl exec ... -- taskpack ls` and `docker run IMAGE taskpack ls` run inside
        for name in ("taskpack", "ray"):
            if name in words[1:] and words[0] in ("docker", "kubectl"):
                inner.append(words[words.index(name) :])
    inner += [
        shlex.split(quoted)
        for line in readme_lines()
        for quoted in re.findall(r"\$\(([^)]*)\)", line)
    ]
    inner += [shlex.split(words[-1]) for words in inner if words[:2] == ["ray", "exec"]]
    inner.append(shlex.split(load("kubernetes/rayjob.yaml")["spec"]["entrypoint"]))
    inner.append(list(compose()["services"]["mlflow"]["command"]))
    inner += [json.loads(rest) for instruction, rest in dockerfile() if instruction == "CMD"]
    for command in (
        *load("aws.yaml")["head_start_ray_commands"],
        *load("aws.yaml")["worker_start_ray_commands"],
    ):
        inner += [
            shlex.split(part) for part in command.split(";") if part.strip().startswith("ray ")
        ]
    return [words for words in inner if words and words[0] == program]


def parse(command: Any, words: list[str]) -> None:
    """Parse the words as a command would: an error where an option does not exist, or an argument
    is missing. Typer and click are alike in this.
    """
    if words[-1] == "--help":
        return
    context = command.make_context(words[0], words[1:])
    if hasattr(command, "resolve_command"):
        name, inner, rest = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        parse(inner, [name, *rest])


def command(program: str) -> Any:
    if program == "taskpack":
        return typer.main.get_command(app)
    if program == "ray":
        from ray.scripts.scripts import cli

        return cli
    with warnings.catch_warnings(
        action="ignore"
    ):  # of MLflow's own tables, as in pipeline/registry/connection.py
        from mlflow.cli import cli

    return cli


@pytest.mark.parametrize("program", ["taskpack", "ray", "mlflow"])
def test_command_lines_parse(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT_ROOT)  # the files they name are looked for from here
    lines = command_lines(program)
    assert len(lines) >= 2
    for words in lines:
        parse(command(program), words)


@pytest.mark.parametrize(
    "line",
    [
        "taskpack run tasks/demo --adress auto",
        "taskpack sumbit tasks/demo",
        "ray up --no-such deploy/aws.yaml",
        "mlflow server --prot=1",
    ],
)
def test_a_wrong_command_line_is_noticed(line: str) -> None:
    words = shlex.split(line)
    with pytest.raises(Exception, match=r"No such (option|command)"):
        parse(command(words[0]), words)


def test_programs_named_in_the_readme_are_known() -> None:
    assert {line.split()[0] for line in readme_lines()} <= set(PROGRAMS)


def test_the_jobs_tasks_are_in_the_image() -> None:
    words = shlex.split(load("kubernetes/rayjob.yaml")["spec"]["entrypoint"])
    folder = Path(words[2]).relative_to("/usr/local/share/taskpack")
    data_files = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
        "tool"
    ]["setuptools"]["data-files"]
    assert data_files[f"share/taskpack/{folder}"] == [f"tasks/{folder}/*"]
    assert load_tasks([PROJECT_ROOT / "tasks" / folder])
    workdir = Path(words[words.index("--workdir") + 1])
    assert workdir.is_relative_to(SHARED)


def test_the_first_batch_is_the_demos_on_the_image_and_can_be_submitted() -> None:
    (first,) = load_tasks([DEPLOY / "first.yaml"], expand=False)
    (demo,) = load_tasks([PROJECT_ROOT / "tasks/demo/digits.yaml"])
    apart = {"backbone": {"weights"}}
    assert first.model_dump(exclude=apart) == demo.model_dump(exclude=apart)
    assert Path(first.backbone.weights) == Path(
        "/usr/local/share/taskpack/demo", Path(demo.backbone.weights).name
    )
    submits = [words for words in command_lines("taskpack") if words[1] == "submit"]
    assert len(submits) == 2
    for words in submits:
        options = dict(zip(words[3::2], words[4::2], strict=True))
        assert words[2] == "deploy/first.yaml"
        assert options["--workdir"].startswith(f"{SHARED}/")
        assert describe(
            [first], workdir=options["--workdir"], shared=[Path(options["--shared"])]
        ).files.keys() == {"digits.yaml"}


def test_files_and_links_of_the_readme_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("http")]
    assert [link for link in links if not (DEPLOY / link).exists()] == []
    named = set(re.findall(r"deploy/[\w./-]*\w", README)) - {"deploy/mlflow/.env"}
    assert [name for name in named if not (PROJECT_ROOT / name).exists()] == []
    shown = {str(path.relative_to(DEPLOY)) for path in deploy_files()} - {"README.md"}
    assert {
        re.sub(r"[`*]", "", cell)
        for cell in re.findall(r"^\| `([^|]+)` \|", README, flags=re.MULTILINE)
    } >= shown


def test_the_readme_says_that_no_engine_has_run_it() -> None:
    assert "No container engine, Kubernetes cluster or AWS account" in " ".join(README.split())
