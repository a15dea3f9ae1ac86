"""What the generated OpenAPI page cannot know: bodies that are read as they arrive."""

from __future__ import annotations

from typing import Any

_BASE64 = {"type": "string", "format": "byte", "description": "An image file as base64."}
_URL = {
    "type": "object",
    "description": "Where the image is, if the server reads images from there.",
    "properties": {"url": {"type": "string", "format": "uri"}},
    "required": ["url"],
}
_IMAGE = {"oneOf": [_BASE64, _URL]}
_IMAGES = {"type": "array", "items": _IMAGE}
_TASKS = {"type": "array", "items": {"type": "string"}, "description": "NAME or NAME@ALIAS."}
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
_REQUEST = {"type": "object", "properties": {"task": {"type": "string"}, "image": _IMAGE}}


def _body(json: dict[str, Any], form: dict[str, Any]) -> dict[str, Any]:
    contents = {"application/json": json, "multipart/form-data": form}
    return {
        "requestBody": {
            "required": True,
            "content": {
                kind: {"schema": {"type": "object", "properties": properties}}
                for kind, properties in contents.items()
            },
        }
    }


ONE_BODY = _body({"image": _IMAGE, "images": _IMAGES}, {"image": _FILES})
"""Images of one task."""
MANY_BODY = _body(
    {
        "image": _IMAGE,
        "images": _IMAGES,
        "tasks": _TASKS,
        "requests": {"type": "array", "items": _REQUEST},
    },
    {"image": _FILES, "task": _TASKS},
)
"""Images of several tasks: each image for each of `tasks`, or image by image."""
_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}}
_PREDICTION = {
    "type": "object",
    "description": "Its task, and what the task's kind says: label and probability, or labels.",
    "properties": {"task": {"type": "string"}},
    "additionalProperties": True,
}
_PREDICTIONS = {
    "type": "object",
    "properties": {
        "predictions": {"type": "array", "items": _PREDICTION},
        "seconds": {"type": "number"},
    },
}
_REFUSALS = {
    400: "The request is malformed.",
    401: "The token is missing or wrong.",
    403: "The server reads no images from this URL.",
    404: "There is no such pack.",
    409: "The pack cannot be used on this server's backbone.",
    413: "The body or an image is too large.",
    422: "Something is no image.",
    429: "Too much is under way; Retry-After says when to come back.",
    503: "The server ends, or its registry is unreachable.",
}
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "OK", "content": {"application/json": {"schema": _PREDICTIONS}}},
    **{
        status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
        for status, text in _REFUSALS.items()
    },
}
"""The answers of predictions."""
