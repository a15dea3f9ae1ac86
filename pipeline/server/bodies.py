"""Request bodies: which image is for which task.

Images come as multipart files or as base64 in JSON, or JSON has their URLs. No path is read.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from pipeline.server.guard import Refused
from pipeline.server.image_urls import ImageUrl
from pipeline.server.settings import Limits

Asked = tuple[str, bytes | ImageUrl]
"""A task's reference and an encoded image."""
_JSON_FORMS = (
    'expected {"image": IMAGE}, {"images": [IMAGE, ...]}, each with "tasks": [NAME, ...] if the'
    ' address names no task, or {"requests": [{"task": NAME, "image": IMAGE}, ...]}; IMAGE is'
    ' base64 or {"url": URL}'
)
_MOST_FIELDS = 16


async def read_requests(request: Request, task: str | None, limits: Limits) -> list[Asked]:
    """Every image of a request with the task it is for. Raises Refused."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "multipart/form-data":
        asked = await _from_form(request, task, limits)
    elif kind == "application/json":
        asked = _from_json(await _json(request, limits), task)
    else:
        raise Refused(
            415,
            f"Content-Type: given {kind[:80]!r}; expected application/json or multipart/form-data",
        )
    if not asked:
        raise Refused(400, "no image; send one or more")
    if len(asked) > limits.images:
        raise Refused(413, f"{len(asked)} predictions asked for; at most {limits.images} at once")
    return asked


async def _from_form(request: Request, task: str | None, limits: Limits) -> list[Asked]:
    """The files named `image`, for each of the fields named `task`."""
    try:
        async with request.form(
            max_files=limits.images, max_fields=_MOST_FIELDS, max_part_size=limits.request_bytes
        ) as form:
            files = form.getlist("image")
            tasks = [task] if task is not None else [str(each) for each in form.getlist("task")]
            images = [await each.read() for each in files if isinstance(each, UploadFile)]
    except HTTPException as error:
        raise Refused(400, f"the form cannot be read: {error.detail}") from None
    if len(images) < len(files):
        raise Refused(400, "the field image: expected a file")
    return _products(tasks, images)


async def _json(request: Request, limits: Limits) -> Any:
    body = await request.body()
    if sum(map(body.count, (b",", b"[", b"{"))) > limits.json_values:  # base64 has none of them
        raise Refused(413, f"the JSON has more than {limits.json_values} values; send less at once")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, f"the body is not JSON; {_JSON_FORMS}") from None


def _from_json(content: Any, task: str | None) -> list[Asked]:
    match content:
        case {"requests": [*requests], **rest} if task is None and not rest:
            return [_one(each) for each in requests]
        case {"image": image, **rest}:
            images = [image]
        case {"images": [*images], **rest}:
            pass
        case _:
            raise Refused(400, _JSON_FORMS)
    tasks = [task] if task is not None else rest.pop("tasks", None)
    if rest or not isinstance(tasks, list) or not all(isinstance(each, str) for each in tasks):
        raise Refused(400, _JSON_FORMS)
    return _products(tasks, [_image(image) for image in images])


def _one(content: Any) -> Asked:
    match content:
        case {"task": str(task), "image": image, **rest} if not rest:
            return task, _image(image)
    raise Refused(400, _JSON_FORMS)


def _products(tasks: list[str], images: Sequence[bytes | ImageUrl]) -> list[Asked]:
    if not tasks:
        raise Refused(400, "no task; name one or more")
    return [(task, image) for image in images for task in tasks]


def _image(content: Any) -> bytes | ImageUrl:
    match content:
        case {"url": str(url), **rest} if not rest:
            return ImageUrl(url)
        case str(text):
            return _decoded_base64(text)
    raise Refused(400, f"an image is not text but {type(content).__name__}; {_JSON_FORMS}")


def _decoded_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(400, "an image is not base64 (RFC 4648, without line breaks)") from None
