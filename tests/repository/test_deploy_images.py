"""The cluster launcher's file and the images of deploy/: what they copy exists, and the
versions fit."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import io
import itertools
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from helpers_deploy import (
    DEPLOY,
    SHARED,
    cluster,
    command_lines,
    deploy_files,
    dockerfile,
    load,
    pods,
    stage,
)
from helpers_paths import PROJECT_ROOT

PROJECT = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(
    line.split("==")
    for line in (PROJECT_ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line
)

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
    extras = PROJECT["optional-dependencies"]
    assert printed == [*PROJECT["dependencies"], *extras["cluster"], *extras["serving"]]


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
