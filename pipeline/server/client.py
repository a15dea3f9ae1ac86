"""A client of the server, from the standard library alone."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ServerError

_TIMEOUT_SECONDS = 60


class Client:
    """Asks a server for predictions.

    Args:
        url: the server's address, such as `http://127.0.0.1:8000`.
        token: the server's token, if it has one.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        self._url, self._token = url.rstrip("/"), token

    def predict(
        self, tasks: str | Sequence[str], images: Sequence[Path | str | bytes]
    ) -> list[dict[str, Any]]:
        """Predictions of each image for each task, the tasks of the first image first, as
        `Predictor.predict` gives them, beside a `set` its `coverage`; images are paths, encoded
        bytes, or URLs that the server may read. Raises ServerError.
        """
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        content = {"tasks": names, "images": [_sent(image) for image in images]}
        predictions: list[dict[str, Any]] = self._ask("/v1/predict", content)["predictions"]
        for row in predictions:
            if "mask" in row:
                row["mask"] = base64.b64decode(row["mask"])
        return predictions

    def tasks(self, limit: int = 50, after: str | None = None) -> dict[str, Any]:
        """A page of the server's tasks: up to `limit` of them, and in `next` what the next page
        comes `after`, None on the last one. Raises ServerError.
        """
        query = {"limit": limit} | ({"after": after} if after else {})
        return self._ask(f"/v1/tasks?{urllib.parse.urlencode(query)}")

    def task(self, name: str) -> dict[str, Any]:
        """What the server knows of a task. Raises ServerError."""
        return self._ask(f"/v1/tasks/{urllib.parse.quote(name, safe='@')}")

    def _ask(self, path: str, content: Any = None) -> dict[str, Any]:
        body = None if content is None else json.dumps(content).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(self._url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except urllib.error.HTTPError as error:
            raise ServerError(f"{self._url}: {_message(error)} ({error.code})") from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise ServerError(
                f"{self._url}: no answer ({reason}); is the server running?"
            ) from None


def _sent(image: Path | str | bytes) -> str | dict[str, str]:
    """An image as a request has it."""
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return {"url": image}
    content = image if isinstance(image, bytes) else Path(image).read_bytes()
    return base64.b64encode(content).decode()


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)
