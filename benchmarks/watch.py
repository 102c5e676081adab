"""What a run does beside its denoiser, operation by operation."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Counts operations outside the denoiser, and the bytes of states that they leave alive.

    With `outputs`, those of the denoiser are counted among the states.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        start: Any,
        elements: int,
        *,
        outputs: bool = False,
    ) -> None:
        super().__init__()
        self._outputs = outputs
        self._theirs = start.untyped_storage().data_ptr() if isinstance(start, Tensor) else 0
        self.operations: Counter[str] = Counter()
        self.peak = 0
        self._denoiser, self._elements, self._inside = denoiser, elements, False
        self._made: list[weakref.ref[Tensor]] = []

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        self._inside = True
        try:
            return self._denoiser(x, sigma)
        finally:
            self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside:
            self.operations[".".join(str(func).split(".")[:2])] += 1
        if self._outputs or not self._inside:
            if isinstance(result, Tensor) and result.numel() >= self._elements:
                self._made.append(weakref.ref(result))
            alive = [x.untyped_storage() for ref in self._made if (x := ref()) is not None]
            sizes = {storage.data_ptr(): storage.nbytes() for storage in alive}
            sizes.pop(self._theirs, None)
            self.peak = max(self.peak, sum(sizes.values()))
        return result
