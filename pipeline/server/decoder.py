"""The images of requests, decoded within the limits."""

from __future__ import annotations

import io
import threading
import time

from PIL import Image

from pipeline.data.images import Images
from pipeline.errors import DataError
from pipeline.server.bodies import Asked
from pipeline.server.guard import Refused
from pipeline.server.image_urls import ImageUrl, ImageUrls
from pipeline.server.settings import Limits
from pipeline.serving.samples import Decoded, decoded


class Decoder:
    """Decodes images to the size that the network takes, at most `limits.decodes` at the same time.
    Thread-safe.
    """

    def __init__(self, takes: Images, limits: Limits, urls: ImageUrls) -> None:
        self._takes, self._limits, self._urls = takes, limits, urls
        self._turns = threading.Semaphore(limits.decodes)

    def decode(self, asked: list[Asked]) -> list[Decoded]:
        """The images of one request; the same image is read and decoded once. Raises Refused."""
        known: dict[int | ImageUrl, Decoded] = {}
        deadline = time.monotonic() + self._limits.body_seconds
        pixels = 0
        for number, (_, content) in enumerate(asked):
            if _key(content) not in known:
                encoded = (
                    self._urls.read(content, number, deadline)
                    if isinstance(content, ImageUrl)
                    else content
                )
                pixels += self._pixels(encoded, number)
                if pixels > self._limits.request_pixels:
                    raise Refused(
                        413,
                        f"image {number}: with those before it more than"
                        f" {self._limits.request_pixels:,} pixels; send fewer at once",
                    )
                known[_key(content)] = self._decode(encoded, number)
        return [known[_key(content)] for _, content in asked]

    def _pixels(self, encoded: bytes, number: int) -> int:
        """The pixels that an image's header claims; 0 where it has none, which decoding says.
        Raises Refused for too many.
        """
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                pixels = image.width * image.height
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            pixels = self._limits.image_pixels + 1
        except Exception:
            return 0
        if pixels > self._limits.image_pixels:
            raise Refused(
                413,
                f"image {number}: more than {self._limits.image_pixels:,} pixels; scale it down",
            )
        return pixels

    def _decode(self, encoded: bytes, number: int) -> Decoded:
        try:
            with self._turns:
                return decoded(encoded, number, self._takes)
        except DataError as error:
            raise Refused(422, str(error)) from None


def _key(content: bytes | ImageUrl) -> int | ImageUrl:
    return content if isinstance(content, ImageUrl) else id(content)
