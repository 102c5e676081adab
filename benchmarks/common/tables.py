"""Tables in Markdown, and the folders of the docs that they are written to."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
TABLES, IMAGES = DOCS / "tables", DOCS / "images"


def table(
    header: Sequence[str], lines: Sequence[Sequence[str]], words: Collection[int] = (0,)
) -> str:
    """A Markdown table; the columns `words` are aligned to the left, the others to the right."""
    rule = ["---" if k in words else "---:" for k in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def write(path: Path, text: str) -> None:
    """Prints `text` and writes it to `path`."""
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def shown(value: object) -> str:
    """The `repr` of a solver or a rule, with the power of `StepRatio` written out."""
    return re.sub(r"\bStepRatio\(\)", "StepRatio(1)", repr(value))
