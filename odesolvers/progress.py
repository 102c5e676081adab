"""Progress bars, where they were asked for: the one place that needs tqdm."""

from __future__ import annotations

from typing import Any


def progress_bar(*args: Any, **settings: Any) -> Any:
    """A tqdm bar, by tqdm's own arguments.

    Raises:
        ImportError: where tqdm is not installed.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    return tqdm(*args, **settings)
