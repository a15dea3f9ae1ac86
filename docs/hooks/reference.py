"""Site hook: the references of commands and task files, generated from the code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

from pipeline.cli.app import app
from pipeline.specs import Method, Task
from pipeline.specs.section import BITS
from pipeline.specs.suite import Suite

Schema = dict[str, Any]


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Append what is generated to the pages that are about it."""
    generators = {"reference/cli.md": command_line, "reference/task-file.md": task_file}
    generate = generators.get(page.file.src_uri)
    return markdown if generate is None else f"{markdown}\n{generate()}"


def command_line() -> str:
    """Every command with its arguments and options, as `--help` prints them."""
    command = typer.main.get_command(app)
    context = typer.Context(command)  # type: ignore[arg-type]
    text = str(get_docs_for_click(obj=command, ctx=context, name="taskpack"))
    return text.removeprefix("# `taskpack`")


def task_file() -> str:
    """A table of keys for each section of task, method and suite files."""
    parts: list[str] = []
    for model in (Task, Method, Suite):
        schema = model.model_json_schema()
        definitions = schema.get("$defs", {})
        parts += section(schema, definitions, level=2)
        if model is Task:
            for name in dict.fromkeys(references(schema, definitions)):
                parts += section(definitions[name], definitions, level=3)
    return "\n".join(parts)


def references(schema: Schema, definitions: Schema) -> Iterator[str]:
    """The names of all sections below a schema, each before those inside it."""
    for name in re.findall(r'"#/\$defs/(\w+)"', json.dumps(schema.get("properties", {}))):
        yield name
        yield from references(definitions[name], definitions)


def section(schema: Schema, definitions: Schema, *, level: int) -> list[str]:
    """Heading, description and table of one section."""
    required = schema.get("required", [])
    lines = [f"\n{'#' * level} {schema['title']}\n", schema.get("description", ""), ""]
    lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, field in schema["properties"].items():
        default = "required" if key in required else default_of(field)
        meaning = field.get("description", "")
        lines.append(f"| `{key}` | {value_of(field)} | {default} | {meaning} |")
    return lines


def value_of(field: Schema) -> str:
    """What a key takes, in Markdown."""
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    choices = [choice for key in ("anyOf", "oneOf") for choice in field.get(key, ())]
    if choices:
        return " or ".join(dict.fromkeys(value_of(choice) for choice in choices))
    if field.get("enum") == list(BITS):
        return "bits: 1 to 8, 16 or 32"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {value_of(field.get('items', {}))}"
    if field.get("type") == "object":
        return "mapping"
    return str(field.get("type", "any")) + bounds(field)


def bounds(field: Schema) -> str:
    """The range of a number, as a suffix."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field]
    return f" {', '.join(limits)}" if limits else ""


def default_of(field: Schema) -> str:
    """The default of a key that may be left out; a section's is that of its own keys."""
    default = field.get("default")
    if default in (None, "", {}):
        return ""
    if "$ref" in field:
        return ""
    return f"`{json.dumps(default)}`"
