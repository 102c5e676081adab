"""The command `odesolvers`.

It is outside of the package because that takes seconds to import, in which Ctrl-C is heard too.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn


def hear_early() -> None:
    """Lets SIGINT and SIGTERM end the process with one line while modules are imported."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if _is_heard(number):
            signal.signal(number, _leave)


def main() -> None:
    """Runs `odesolvers.cli.main` so that SIGINT and SIGTERM end it with one line at any time."""
    hear_early()
    signals = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is _leave]
    from odesolvers import cli

    with suppress(Exception):  # the command meets it again, and says what it is
        importlib.import_module("odesolvers.cli.parser")
    for number in signals:
        signal.signal(number, _interrupt)
    try:
        cli.main()
    finally:
        for number in signals:  # the work is done, and Python is about to end
            signal.signal(number, signal.SIG_IGN)


def _is_heard(number: int) -> bool:
    """Whether the caller left a signal to us: `nohup` and shells ignore some for what they start."""
    return signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Ends at once: during imports there is nothing to clean, and some would swallow an exception."""
    del frame
    sys.stderr.write("Interrupted before the start; nothing is written.\n")
    sys.stderr.flush()
    os._exit(128 + number)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    for other in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # one is enough: the next ones would stop the tidying up
        signal.signal(other, signal.SIG_IGN)
    del frame
    raise KeyboardInterrupt(number)
