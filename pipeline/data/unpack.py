"""A shard's tar as it is stored: plain, or compressed with gzip."""

from __future__ import annotations

import gzip
import io
import zlib

from pipeline.errors import DataError

UNPACKED_BYTES_MAX = 2 * 1024**3
"""Maximum size after unpacking: a few kilobytes of gzip may unpack to any size."""
_GZIP = b"\x1f\x8b"


def unpacked(content: bytes, url: str) -> bytes:
    """Unpack `content` if it is compressed with gzip, else return it; `url` is used in error
    messages. Raises DataError.
    """
    if not content.startswith(_GZIP):
        return content
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            tar = stream.read(UNPACKED_BYTES_MAX + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{url}: truncated or damaged gzip ({error}); copy it again") from None
    if len(tar) > UNPACKED_BYTES_MAX:
        raise DataError(
            f"{url}: unpacks to more than {UNPACKED_BYTES_MAX // 1024**3} GiB; write smaller shards"
        )
    return tar
