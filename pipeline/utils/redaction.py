"""Texts without secrets: what is logged, shown or raised may come from a server's answer, an
address or the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_SECRET_NAME = re.compile(
    r"TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIAL|(?:API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE
)
_SECRET_CHARACTERS = 6
_USER_OF_URL = re.compile(r"(?<=://)[^/\s@]+@")
_QUERY_OF_URL = re.compile(r"(://[^\s?'\"]+\?)[^\s'\")]+")


def without_secrets(text: str, variables: Mapping[str, str] = os.environ) -> str:
    """The text without users, passwords and queries of URLs, and without the values of environment
    variables whose names speak of secrets.
    """
    for name, value in variables.items():
        if _SECRET_NAME.search(name) and len(value) >= _SECRET_CHARACTERS:
            text = text.replace(value, "***")
    return _QUERY_OF_URL.sub(r"\1***", _USER_OF_URL.sub("***@", text))
