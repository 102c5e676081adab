"""The command line: `odesolvers roundtrip`, `sample`, `invert`, `edit` and `list`.

The one place in the package that knows both the solvers and `odesolvers.models`.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the command `odesolvers`."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(
            f"The command line needs {error.name}: pip install 'odesolvers[cli]'", file=sys.stderr
        )
        raise SystemExit(2) from None
    app()
