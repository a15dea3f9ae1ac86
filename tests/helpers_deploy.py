"""The files of deploy/ as tests read them."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml
from helpers_paths import PROJECT_ROOT

from pipeline.cli.app import app

DEPLOY = PROJECT_ROOT / "deploy"


README = (DEPLOY / "README.md").read_text(encoding="utf-8")


SHARED = "/mnt/taskpack"


def load(name: str) -> Any:
    """The only document of a YAML file of deploy/."""
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def cluster() -> dict[str, Any]:
    return load("kubernetes/raycluster.yaml")["spec"]


def pods(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod specs of a cluster: the head's, then the workers'."""
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]["spec"]


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


def deploy_files() -> list[Path]:
    return [path for path in DEPLOY.rglob("*") if path.is_file() and path.name != ".env"]


def compose() -> dict[str, Any]:
    return load("mlflow/compose.yaml")


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
