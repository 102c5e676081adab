"""What a solver says where its result is not to be trusted."""

from __future__ import annotations


class InversionWarning(UserWarning):
    """An inversion did not reach what it was asked for; the message says where and by how much."""
