"""MLflow's look-ups, runs and versions over its REST API, without MLflow: importing that takes
longer than the server's answer, and its requests take twice as much processor time, because each
finds out whether it comes from a Databricks notebook.

The methods are those of `MlflowClient`, as far as looking packs up and registering them needs them,
and give objects with the same attributes. Where the user's settings ask for more than a name and
password or a token, `plain_rest` gives None and MLflow's own client does the work.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_CONNECT_SECONDS, _ANSWER_SECONDS, _MAX_RETRIES = 4, "60", "4"
_RETRIED = (429, 500, 502, 503, 504)
_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 900, 100  # of the 1,000 entries that MLflow takes at once
# What MLflow's client knows and this one does not.
_BEYOND = ("AUTH", "AWS_SIGV4", "INSECURE_TLS", "SERVER_CERT_PATH", "CLIENT_CERT_PATH")


def plain_rest(tracking_uri: str) -> Rest | None:
    """A client of the server at `tracking_uri`; None where it is no server, or where logging in
    takes more than MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or
    MLFLOW_TRACKING_TOKEN."""
    needs_more = any(
        os.environ.get(f"MLFLOW_TRACKING_{name}") for name in _BEYOND
    ) or os.environ.get("MLFLOW_WORKSPACE")
    if (
        not tracking_uri.startswith(("http://", "https://"))
        or needs_more
        or Path("~/.mlflow/credentials").expanduser().exists()
    ):
        return None
    return Rest(tracking_uri)


class Page(list[Any]):
    """Rows of an answer and where the next page begins."""

    token: str | None = None


class Rest:
    """The server's look-ups, and writing runs and versions. What it raises reads like MLflow's own
    errors; `error_code` says what the server called it.
    """

    def __init__(self, tracking_uri: str) -> None:
        import requests
        from requests.adapters import HTTPAdapter
        from requests.utils import get_netrc_auth
        from urllib3.util import Retry

        self._uri = tracking_uri.rstrip("/")
        self._session = requests.Session()
        self._retries = Retry(backoff_factor=1, status_forcelist=_RETRIED, allowed_methods=None)
        self._adapter = HTTPAdapter()
        self._session.mount(self._uri, self._adapter)
        user, password = (
            os.environ.get("MLFLOW_TRACKING_USERNAME"),
            os.environ.get("MLFLOW_TRACKING_PASSWORD"),
        )
        if user and password:
            self._session.auth = (user, password)
        elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
            self._session.headers["Authorization"] = f"Bearer {token}"
        else:
            self._session.auth = get_netrc_auth(self._uri)
        self._read_environment_once()

    def _read_environment_once(self) -> None:
        """Find proxies and certificates, for which a session otherwise looks at every request."""
        found = self._session.merge_environment_settings(self._uri, {}, None, None, None)
        self._session.proxies, self._session.verify = found["proxies"], found["verify"]
        self._session.trust_env = False

    def get_experiment_by_name(self, name: str) -> Any:
        """The experiment, or None."""
        try:
            return SimpleNamespace(
                **self._ask("GET", "experiments/get-by-name", {"experiment_name": name})[
                    "experiment"
                ]
            )
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def search_runs(
        self,
        experiment_ids: list[str],
        filter_string: str,
        *,
        max_results: int,
        order_by: list[str],
        page_token: str | None,
    ) -> Page:
        """As MLflow's."""
        content = {
            "experiment_ids": experiment_ids,
            "filter": filter_string,
            "max_results": max_results,
            "order_by": order_by,
        }
        answer = self._ask(
            "POST", "runs/search", content | ({"page_token": page_token} if page_token else {})
        )
        page = Page(_run(run) for run in answer.get("runs", ()))
        page.token = answer.get("next_page_token")
        return page

    def get_run(self, run_id: str) -> Any:
        """As MLflow's."""
        return _run(self._ask("GET", "runs/get", {"run_id": run_id})["run"])

    def create_run(
        self, experiment_id: str, *, start_time: int, run_name: str, tags: Mapping[str, str]
    ) -> Any:
        """As MLflow's."""
        content = {
            "experiment_id": experiment_id,
            "user_id": "unknown",
            "start_time": start_time,
            "run_name": run_name,
            "tags": _rows(tags),
        }
        return _run(self._ask("POST", "runs/create", content)["run"])

    def log_batch(self, run_id: str, *, metrics: Sequence[Any], params: Sequence[Any]) -> None:
        """As MLflow's."""
        values = [
            {
                "key": each.key,
                "value": _as_json(each.value),
                "timestamp": each.timestamp,
                "step": each.step,
                **({"model_id": each.model_id} if each.model_id else {}),
            }
            for each in metrics
        ]
        given = [{"key": each.key, "value": each.value} for each in params]
        pieces: Iterable[tuple[list[Any], list[Any]]] = itertools.zip_longest(
            _pieces(values, _METRICS_AT_ONCE), _pieces(given, _PARAMS_AT_ONCE), fillvalue=[]
        )
        for some, few in pieces:
            content = {"run_id": run_id, "metrics": some, "params": few}
            self._ask("POST", "runs/log-batch", content)

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        """As MLflow's."""
        content = {"run_id": run_id, "status": status, "end_time": end_time}
        self._ask("POST", "runs/update", content)

    def search_model_versions(
        self, filter_string: str, max_results: int, order_by: list[str] | None = None
    ) -> list[Any]:
        """As MLflow's; versions come without aliases."""
        answer = self._ask(
            "GET",
            "model-versions/search",
            {"filter": filter_string, "max_results": max_results, "order_by": order_by or []},
        )
        return [_version(version) for version in answer.get("model_versions", ())]

    def get_model_version(self, name: str, version: str) -> Any:
        """As MLflow's."""
        return _version(
            self._ask("GET", "model-versions/get", {"name": name, "version": version})[
                "model_version"
            ]
        )

    def search_registered_models(self, filter_string: str, max_results: int) -> list[Any]:
        """As MLflow's."""
        answer = self._ask(
            "GET", "registered-models/search", {"filter": filter_string, "max_results": max_results}
        )
        return [_registered_model(model) for model in answer.get("registered_models", ())]

    def get_registered_model(self, name: str) -> Any:
        """As MLflow's."""
        return _registered_model(
            self._ask("GET", "registered-models/get", {"name": name})["registered_model"]
        )

    def create_registered_model(self, name: str, description: str | None) -> None:
        """As MLflow's."""
        content = {"name": name} | ({"description": description} if description else {})
        self._ask("POST", "registered-models/create", content)

    def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
        """As MLflow's."""
        content = {"name": name, "key": key, "value": value}
        self._ask("POST", "registered-models/set-tag", content)

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        """As MLflow's."""
        content = {"name": name, "alias": alias, "version": version}
        self._ask("POST", "registered-models/alias", content)

    def create_model_version(
        self, name: str, source: str, run_id: str, *, tags: Mapping[str, str], model_id: str
    ) -> Any:
        """As MLflow's, but does not wait for stores that copy files."""
        content = {"name": name, "source": source, "run_id": run_id, "model_id": model_id}
        answer = self._ask("POST", "model-versions/create", content | {"tags": _rows(tags)})
        return _version(answer["model_version"])

    def update_model_version(self, name: str, version: str, description: str) -> None:
        """As MLflow's."""
        content = {"name": name, "version": version, "description": description}
        self._ask("PATCH", "model-versions/update", content)

    def _ask(self, method: str, path: str, content: dict[str, Any]) -> dict[str, Any]:
        from requests import HTTPError, JSONDecodeError

        seconds = (
            _CONNECT_SECONDS,
            float(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", _ANSWER_SECONDS)),
        )
        retries = int(os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES", _MAX_RETRIES))
        self._adapter.max_retries = self._retries.new(total=retries)
        given: dict[str, Any] = {"params": content} if method == "GET" else {"json": content}
        response = self._session.request(
            method, f"{self._uri}/api/2.0/mlflow/{path}", timeout=seconds, **given
        )
        try:
            answer = response.json()
        except JSONDecodeError:
            answer = None
        if response.ok and isinstance(answer, dict):
            return answer
        if isinstance(answer, dict) and "error_code" in answer:
            error = HTTPError(f"{answer['error_code']}: {answer.get('message', '')}")
            error.error_code = answer["error_code"]  # type: ignore[attr-defined]
            raise error
        status = (
            404 if response.ok else response.status_code
        )  # a page, but not an answer: some other server
        raise HTTPError(
            f"API request to endpoint {path} failed with error code {status} != 200. Response body:"
            f" '{response.text}'"
        )


def _as_json(value: float) -> float | str:
    """A number as protocol buffers write it in JSON, which has no NaN and no infinity."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _pieces(rows: list[Any], size: int) -> list[list[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _rows(pairs: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in pairs.items()]


def _pairs(rows: list[dict[str, Any]] | None) -> dict[str, Any]:
    return {row["key"]: row.get("value", "") for row in rows or ()}


def _run(content: dict[str, Any]) -> Any:
    info, data = content["info"], content["data"]
    return SimpleNamespace(
        info=SimpleNamespace(
            run_id=info["run_id"], start_time=int(info["start_time"]), status=info["status"]
        ),
        data=SimpleNamespace(
            metrics={row["key"]: float(row.get("value", 0.0)) for row in data.get("metrics", ())},
            params=_pairs(data.get("params")),
            tags=_pairs(data.get("tags")),
        ),
    )


def _version(content: dict[str, Any]) -> Any:
    return SimpleNamespace(
        name=content["name"],
        version=content["version"],
        run_id=content.get("run_id", ""),
        description=content.get("description", ""),
        creation_timestamp=int(content["creation_timestamp"]),
        tags=_pairs(content.get("tags")),
        aliases=content.get("aliases", []),
    )


def _registered_model(content: dict[str, Any]) -> Any:
    return SimpleNamespace(
        name=content["name"],
        aliases={row["alias"]: row["version"] for row in content.get("aliases", ())},
    )
