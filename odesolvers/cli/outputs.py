"""Lines that are results."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def say(text: str) -> None:
    """Prints a line of a result at once.

    Raises:
        OSError: if stdout takes it no more.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except OSError as error:
        with suppress(
            OSError, ValueError
        ):  # or Python prints the rest when it ends, and fails again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(f"printing failed ({error}); files that were finished are whole") from error
