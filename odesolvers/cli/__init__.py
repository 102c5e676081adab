"""The command line: `odesolvers sample`, `invert`, `edit` and others; see docs/command_line.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from signal import SIGINT
from typing import Any, Final, cast

from ..values import shown

EXTRA: Final = {"tqdm": "tqdm", "PIL": "pillow", "safetensors": "safetensors", "shtab": "shtab"}
"""What the commands import of the extra `cli`, and the names that pip knows."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command `odesolvers`.

    Files are written whole or not at all. An error of any kind is one line; Python's development mode
    (``python -X dev``) shows where it comes from.

    Raises:
        SystemExit: after one line on stderr, with the code 2 if something cannot be done as asked, and
            with 128 and the number of the signal, 130 for Ctrl-C, if interrupted.
    """
    with redirect_stderr(cast(Any, _Aside(sys.stderr))):
        try:
            from .parser import run

            run(sys.argv[1:] if argv is None else argv)
            return
        except KeyboardInterrupt as stop:
            code = 128 + (*stop.args, SIGINT)[0]
            line = "Interrupted. Finished files stay; the same command goes on from them."
        except Exception as error:
            if sys.flags.dev_mode:
                raise
            code, line = 2, f"Error: {_message(error)}"
        print(line, file=sys.stderr)
    raise SystemExit(code)


class _Aside:
    """Stderr, for progress and warnings: a run goes on when nobody listens to them any more."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, AttributeError):  # a closed pipe, a closed file, None
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _message(error: Exception) -> str:
    """What an error says, in one line of printable characters."""
    package = (error.name or "").split(".")[0] if isinstance(error, ImportError) else ""
    if package in EXTRA:
        return f"the command line needs {package}: pip install {' '.join(EXTRA.values())}"
    text, kind = " ".join(str(error).split()), type(error).__name__
    if isinstance(error, KeyError | IndexError | AttributeError | AssertionError) or not text:
        text = f"{kind}: {text}" if text else kind  # a fault of a program, which says little
    return shown(text, 1000)
