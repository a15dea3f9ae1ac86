"""Images that requests name by URL, from the places that the server's operator allows.

A request must not make the server read what only the server can reach. So a URL has to lie below
one of the allowed places, redirects are not followed, and neither a file nor another host is read.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import SpecError
from pipeline.server.guard import Refused
from pipeline.server.settings import Limits

_CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True)
class ImageUrl:
    """Where the image of a request is."""

    text: str


def check_place(place: str) -> str:
    """A place that images may come from, such as `https://images.example/cats/`. Raises
    SpecError.
    """
    try:
        parsed = urllib.parse.urlsplit(place)
        is_place = bool(parsed.hostname) and (parsed.port is None or parsed.port > 0)
    except ValueError:
        is_place = False
    if (
        not is_place
        or parsed.scheme not in ("http", "https")
        or not parsed.path.endswith("/")
        or parsed.username is not None
        or parsed.query
        or parsed.fragment
    ):
        raise SpecError(
            f"--images-from: given {place!r}; expected http:// or https://, a host and a folder"
            " that ends in /, such as https://images.example/cats/"
        )
    return place


class ImageUrls:
    """Reads images from below the allowed places; with none, every URL is refused."""

    def __init__(self, places: Sequence[str], limits: Limits) -> None:
        self._places = [urllib.parse.urlsplit(place) for place in places]
        self._limits = limits
        self._opener = urllib.request.build_opener(_NoRedirects)

    def read(self, url: ImageUrl, number: int, deadline: float) -> bytes:
        """The content of image `number` of a request, complete before `time.monotonic()` is
        `deadline`. Raises Refused.
        """
        self._check(url.text, number)
        try:
            left = max(deadline - time.monotonic(), 0.01)
            with self._opener.open(url.text, timeout=left) as response:
                return self._content(response, number, deadline)
        except urllib.error.HTTPError as error:
            error.close()
            what = "a redirect" if 300 <= error.code < 400 else f"status {error.code}"
            raise Refused(422, f"image {number}: its URL gave {what}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise Refused(
                422, f"image {number}: its URL cannot be read ({type(reason).__name__})"
            ) from None

    def _content(self, response: Any, number: int, deadline: float) -> bytes:
        content = bytearray()
        while chunk := response.read1(_CHUNK_BYTES):
            content += chunk
            if len(content) > self._limits.request_bytes:
                raise Refused(
                    413, f"image {number}: more than {self._limits.request_bytes} bytes at its URL"
                )
            if time.monotonic() > deadline:
                raise Refused(
                    408, f"image {number}: not read within {self._limits.body_seconds:g} s"
                )
        return bytes(content)

    def _check(self, text: str, number: int) -> None:
        """Raises Refused for a URL that lies nowhere where images may come from."""
        if not self._places:
            raise Refused(403, f"image {number}: this server reads no URLs; send the image itself")
        try:
            url = urllib.parse.urlsplit(text)
            where = (url.scheme, url.netloc.lower())
        except ValueError:
            raise Refused(400, f"image {number}: not a URL") from None
        steps = urllib.parse.unquote(url.path).replace("\\", "/").split("/")
        has_odd_characters = not text.isascii() or any(each <= " " for each in text)
        if has_odd_characters or ".." in steps or "." in steps:
            raise Refused(400, f"image {number}: not a plain URL")
        for place in self._places:
            if where == (place.scheme, place.netloc.lower()) and url.path.startswith(place.path):
                return
        raise Refused(403, f"image {number}: this server reads no images from there")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect as an error."""

    def redirect_request(self, *given: Any) -> None:
        return None
