"""None"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_tables import (
    image_of,
)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with eight images."""
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(image_of(number))
    (tmp_path / "a,b.png").write_bytes(image_of(8))
    return tmp_path
