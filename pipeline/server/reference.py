"""The page at `/docs`: the HTTP interface, from its OpenAPI description, as plain HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

_PAGE = """<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <title>taskpack: HTTP interface</title>
  <link rel="icon" href="data:,">
  <link rel="stylesheet" href="page.css">
</head>
<body>
  <main>
    <h1>HTTP interface</h1>
    <p>If the server has a token, requests carry it as <code>Authorization: Bearer TOKEN</code>.
    <code>GET /openapi.json</code> describes the same for programs.</p>
    {operations}
  </main>
</body>
</html>
"""


def reference_page(described: dict[str, Any]) -> str:
    """The page of an OpenAPI description."""
    operations = (
        _section(f"{method.upper()} {path}", operation)
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    )
    return _PAGE.format(operations="\n".join(operations))


def _section(title: str, operation: dict[str, Any]) -> str:
    contents = operation.get("requestBody", {}).get("content", {})
    rows = [(each["name"], each["schema"], each["in"]) for each in operation.get("parameters", [])]
    rows += [
        (name, schema, kind)
        for kind, content in contents.items()
        for name, schema in content["schema"]["properties"].items()
    ]
    given = [(name, where, _said(schema)) for name, schema, where in rows]
    answered = [
        (status, answer["description"]) for status, answer in operation["responses"].items()
    ]
    return "\n".join(
        (
            f"<section><h2><code>{escape(title)}</code></h2>",
            f"<p>{escape(operation['description'])}</p>",
            _table("Request", ("Name", "Where", "What"), given) if given else "",
            _table("Answers", ("Status", "What"), answered),
            "</section>",
        )
    )


def _said(schema: dict[str, Any]) -> str:
    """Describe the values that a schema accepts."""
    choices = schema.get("oneOf", schema.get("anyOf"))
    if choices:
        return " or ".join(map(_said, choices))
    kind = str(schema.get("type", "anything"))
    if kind == "array":
        return f"list of: {_said(schema['items'])}"
    if kind == "object":
        fields = (f"{name}: {_said(each)}" for name, each in schema["properties"].items())
        kind = f"{{{', '.join(fields)}}}"
    return f"{kind} ({schema['description'].rstrip('.')})" if "description" in schema else kind


def _table(caption: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    heads = "".join(f'<th scope="col">{escape(each)}</th>' for each in head)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f"<table><caption>{caption}</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )
