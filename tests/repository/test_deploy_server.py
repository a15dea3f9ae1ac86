"""The MLflow server of deploy/mlflow, as far as that shows without a container engine."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path

from helpers_deploy import (
    DEPLOY,
    command_lines,
    compose,
    stage,
)
from helpers_paths import PROJECT_ROOT

REFERENCE = re.compile(r"\$\{(\w+)(:\?[^}]+)?\}")


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
