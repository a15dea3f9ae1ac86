"""Reading YAML files: duplicate keys are errors, and nothing in a file is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import SpecError
from pipeline.specs.faults import SpecType, validate


def load_spec(kind: type[SpecType], path: Path) -> SpecType:
    """Read a YAML file as `kind`. Raises SpecError."""
    return validate(kind, read_mapping(path), source=str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Raises SpecError."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not valid YAML: {error}") from None
    except RecursionError:
        raise SpecError(f"{path}: nested too deeply to be a task file") from None
    if not isinstance(content, dict):
        raise SpecError(
            f"{path}: expected a mapping of keys to values, found {type(content).__name__}"
        )
    return content


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that constructs no objects and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        if repeated:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {repeated[0]!r} is written twice", node.start_mark
            )
        return super().construct_mapping(node, deep)
