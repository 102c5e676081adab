"""The command line: `odesolvers roundtrip`, `sample`, `invert`, `edit`, `calibrate` and `list`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

EXTRA: Final = ("rich", "tqdm", "PIL", "matplotlib")
"""Packages of the extra `cli` that the commands import."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command `odesolvers`.

    Raises:
        SystemExit: with the code 2, after one line on stderr, if something cannot be done as asked;
            with the code 130 if interrupted.
    """
    try:
        from .app import run

        run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        message = str(error)
        package = (error.name or "").split(".")[0] if isinstance(error, ImportError) else ""
        if package in EXTRA:
            message = f"the command line needs {package}: pip install 'odesolvers[cli]'"
        print(f"Error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
