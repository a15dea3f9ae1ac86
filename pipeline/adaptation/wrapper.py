"""A module that replaces another and forwards attribute access to it."""

from __future__ import annotations

from typing import Any

from torch import nn


class Wrapper(nn.Module):
    """Replaces `base`. Blocks that read an attribute of a layer, such as its kernel size, get that
    of `base`.
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
