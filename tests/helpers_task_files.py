"""Task files for the tests of reading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings

from pipeline.errors import SpecError
from pipeline.specs.task_files import load_task

few_examples = settings(max_examples=60, derandomize=True, deadline=None)


MINIMAL: dict[str, Any] = {
    "name": "digits",
    "data": {"format": "digits"},
    "backbone": {"model": "vit_tiny_patch16_224", "weights": "random"},
}


def write(folder: Path, content: Any, name: str = "task.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8"
    )
    return path


def refusal(path: Path, **options: Any) -> str:
    """The message with which `path` is refused."""
    with pytest.raises(SpecError) as caught:
        load_task(path, **options)
    return str(caught.value)
