"""Tables in Markdown, as all scripts here print them."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def table(
    header: Sequence[str], lines: Sequence[Sequence[str]], words: Collection[int] = (0,)
) -> str:
    """The columns `words` to the left, numbers to the right."""
    rule = ["---" if k in words else "---:" for k in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))
