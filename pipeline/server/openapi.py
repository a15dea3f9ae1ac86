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
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_BY_CLASS = {"type": "object", "additionalProperties": _SHARE}
_NAMES = {"type": "array", "items": {"type": "string"}}
_PREDICTION = {
    "type": "object",
    "description": (
        "Its task, and what the task's kind says. classification: label, probability and, of a"
        " calibrated pack, set and coverage; multilabel: labels and probabilities; segmentation:"
        " areas and mask."
    ),
    "properties": {
        "task": {"type": "string"},
        "label": {"type": "string"},
        "probability": _SHARE,
        "set": {**_NAMES, "description": "The classes that are probable enough."},
        "coverage": {**_SHARE, "description": "How probably the right class is in the set."},
        "labels": _NAMES,
        "probabilities": _BY_CLASS,
        "areas": {**_BY_CLASS, "description": "The share of pixels of each class, in order."},
        "mask": {
            "type": "string",
            "format": "byte",
            "description": "A PNG of class numbers in the image's own size, as base64.",
        },
    },
    "required": ["task"],
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
    413: "The body, its images or the masks asked for are too large.",
    422: "Something is no image.",
    429: "Too much is under way; Retry-After says when to come back.",
    503: "The server starts or ends, or its registry is unreachable.",
}
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "OK", "content": {"application/json": {"schema": _PREDICTIONS}}},
    **{
        status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
        for status, text in _REFUSALS.items()
    },
}
"""The answers of predictions."""
