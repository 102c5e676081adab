"""Results that are measured once, in a file of JSON lines that several processes may add to."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import CACHE
from .files import append, claimed


class Kept:
    """A dictionary in a file: ``kept(key, make)`` is the value of a key, made where it is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, Any]:
        """All values; a line that a process could not finish is passed over."""
        found: dict[str, Any] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with suppress(ValueError, KeyError, TypeError):
                content = json.loads(line)
                found[content["key"]] = content["value"]
        return found

    def __call__(self, key: str, make: Callable[[], Any]) -> Any:
        """The value of `key`, or None while another process is at it."""
        with claimed(CACHE, f"{self.path.resolve()} {key}") as ours:
            content = self.read()
            if key in content or not ours:
                return content.get(key)
            value = make()
            append(self.path, json.dumps({"key": key, "value": value}) + "\n")
        return value
