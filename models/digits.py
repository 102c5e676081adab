"""The handwritten digits of scikit-learn: real images that need no download."""

from __future__ import annotations

import torch
from torch import Tensor


def load_digits() -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits of scikit-learn (UCI optical recognition of digits).

    Returns:
        Images, float32 ``(1797, 1, 8, 8)`` in [-1, 1], and labels from 0 to 9, int64 ``(1797,)``.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install scikit-learn") from error
    data = load()
    images = torch.as_tensor(data.images, dtype=torch.float32) / 8 - 1
    return images.unsqueeze(1), torch.as_tensor(data.target, dtype=torch.int64)
