"""A module in another's place: whoever looks at it sees the attributes of the one it stands for."""

from __future__ import annotations

from typing import Any

from torch import nn


class Wrapper(nn.Module):
    """Stands where `base` stood. Blocks that read an attribute of a layer (its kernel size, its
    number of inputs) find that of `base`.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)
