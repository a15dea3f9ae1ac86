"""Images of concurrent requests, predicted in common batches."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from pipeline.errors import ServerError
from pipeline.serving.host import PackHost
from pipeline.serving.residency import ResidentPack
from pipeline.serving.samples import Decoded

_Waiting = tuple[ResidentPack, Decoded, Future[dict[str, Any]]]


class Busy(ServerError):
    """Too many images are waiting; the same request may succeed later."""


class Closed(ServerError):
    """The server is shutting down."""


class Batcher:
    """One thread that predicts what waits, up to `batch_images` at a time.

    Args:
        wait_seconds: how long a batch that is not full waits for more, from its first image.
        most_waiting: images that may wait; more are refused.
        observe: told the images of each batch and the seconds it took.
    """

    def __init__(
        self,
        host: PackHost,
        *,
        batch_images: int,
        wait_seconds: float,
        most_waiting: int,
        observe: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:
        self._host, self._batch_images, self._wait_seconds = host, batch_images, wait_seconds
        self._most_waiting, self._observe = most_waiting, observe
        self._waiting: deque[_Waiting] = deque()
        self._changed, self._is_closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images that wait."""
        return len(self._waiting)

    def submit(self, requests: list[tuple[ResidentPack, Decoded]]) -> list[Future[dict[str, Any]]]:
        """Queue decoded images, all or none. Raises Busy or Closed."""
        with self._changed:
            if self._is_closed:
                raise Closed("the server is shutting down; send the request again")
            if len(self._waiting) + len(requests) > self._most_waiting:
                raise Busy(
                    f"{len(self._waiting)} images are waiting; at most {self._most_waiting} may:"
                    " send the request again later"
                )
            added = [(pack, image, Future[dict[str, Any]]()) for pack, image in requests]
            self._waiting += added
            self._changed.notify_all()
        return [future for *_, future in added]

    def close(self) -> None:
        """Accept nothing more, predict what waits, and end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            began = time.monotonic()
            try:
                rows = self._host.predict_decoded(
                    [pack for pack, *_ in batch], [image for _, image, _ in batch]
                )
            except Exception as error:  # the thread goes on, the requests are told
                for *_, future in batch:
                    future.set_exception(error)
            else:
                for (pack, _, future), row in zip(batch, rows, strict=True):
                    future.set_result(row | pack.guarantee)
            self._observe(len(batch), time.monotonic() - began)

    def _next(self) -> list[_Waiting]:
        """The next batch, empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            self._changed.wait_for(
                lambda: len(self._waiting) >= self._batch_images or self._is_closed,
                timeout=self._wait_seconds,
            )
            count = min(len(self._waiting), self._batch_images)
            taken = [self._waiting.popleft() for _ in range(count)]
        return [each for each in taken if each[2].set_running_or_notify_cancel()] or (
            self._next() if taken else []
        )
