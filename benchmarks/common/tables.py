"""Tables in Markdown, and the folders of the docs that they are written to."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from .files import save

DOCS = Path(__file__).resolve().parents[2] / "docs"
TABLES, IMAGES = DOCS / "tables", DOCS / "images"


def table(
    header: Sequence[str], lines: Sequence[Sequence[str]], words: Collection[int] = (0,)
) -> str:
    """A Markdown table; the columns `words` are aligned to the left, the others to the right."""
    rule = ["---" if k in words else "---:" for k in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def write(path: Path, text: str) -> None:
    """Writes `text` to `path`, and prints it."""
    save(path, text)
    print(text)


def shown(value: object) -> str:
    """The `repr` of a solver or a rule, with the power of `StepRatio` written out."""
    return re.sub(r"\bStepRatio\(\)", "StepRatio(1)", repr(value))
