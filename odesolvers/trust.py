"""What is said when a result cannot be trusted."""


class InversionWarning(UserWarning):
    """An inversion whose result cannot be trusted."""
