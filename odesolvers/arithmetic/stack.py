"""Exactly invertible multiplication of integers by fractions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from reprlib import repr as short
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ..typed import read, whole

_LARGEST: Final = 2**63 - 1
_LOW_WORD: Final = 2**32 - 1
_GROUP: Final = 32


def _dtype(name: Any) -> torch.dtype:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for dtype in dtypes:
        if f"torch.{name}" == str(dtype):
            return dtype
    raise ValueError(f"must be the name of one of {dtypes}, got {short(name)}")


_DESCRIBED: Final = {
    "dtype": _dtype,
    "words": whole(0),
    "done": [(whole(-1, 1), whole(1), whole(1), whole(0), whole(0, 2))],  # see `Done`
    "origin": whole(0),
    "bound": whole(0),
}


class Done(NamedTuple):
    """The record of a multiplication or division, from which it is undone."""

    move: int
    """1 for a multiplication, -1 for a division."""
    a: int
    b: int
    bound: int
    """An upper bound of the elements of W before it."""
    words: int
    """The number of words of W that were put aside for it."""


@dataclass(frozen=True, eq=False)
class SideInformation:
    """The bits that a fixed-point state carries beside its two tensors of integers, in 32-bit words.

    Each element of the state has a stack of bits. The stacks are equally high and are stored in
    slices: `words` are whole 32-bit slices, the lowest first, and `packed` is what lies above them,
    fewer than 32 bits an element, 32 elements at a time side by side without a gap.

    Attributes:
        dtype: of the states that the denoiser sees.
        words: int32 tensors of shape ``(n,)`` for a state of n elements.
        packed: int32 ``(m, ceil(n / 32))``, m bits for each element.
        done: the multiplications that are not undone, in order: see `Done`. The first of `words` are
            those that they put aside.
        origin: the index of the first pair of the run.
        checksum: of that first pair, int64 ``(B,)``.
        bound: an upper bound of the stacks of the working memory, by which a run that goes on stores
            what one run would have stored.
    """

    dtype: torch.dtype
    words: tuple[Tensor, ...]
    packed: Tensor
    done: tuple[Done, ...]
    origin: int
    checksum: Tensor
    bound: int = 0

    @property
    def bits_per_element(self) -> int:
        """The height of the stacks: the side information in bits for each element of the state."""
        return 32 * len(self.words) + self.packed.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the words take up."""
        return sum(word.nbytes for word in self.words) + self.packed.nbytes

    def fresh(self, current: Tensor, partner: Tensor, index: int) -> SideInformation:
        """The side information of a run that starts at this pair: empty, with a checksum."""
        total = checksum(current) + checksum(partner)
        return Stack(current.shape, index, total, self.dtype).pack()

    def check(self, shape: torch.Size) -> None:
        """Raises a ValueError if this is no side information of a state of that shape."""
        n, aside = shape.numel(), sum(done.words for done in self.done)
        tensors = (*self.words, self.packed)
        if not (
            aside <= len(self.words) <= aside + 1
            and all(word.shape == (n,) for word in self.words)
            and self.packed.shape == (min(31, len(self.packed)), -(-n // _GROUP))
            and self.checksum.shape == shape[:1]
            and {tensor.dtype for tensor in tensors} == {torch.int32}
            and self.checksum.dtype == torch.int64
        ):
            raise ValueError(
                f"the side information does not belong to a state of shape {tuple(shape)}: it has "
                f"{aside} words put aside, words and packed bits of shape "
                f"{[tuple(tensor.shape) for tensor in tensors]} in {self.packed.dtype}, and a "
                f"checksum of shape {tuple(self.checksum.shape)} in {self.checksum.dtype}"
            )

    def of_rows(self, rows: Any, shape: torch.Size) -> SideInformation:
        """The side information of the elements `rows` of the batch of a state of that shape."""

        def pick(z: Tensor) -> Tensor:
            return z.reshape(shape)[rows].flatten()

        bits = pack_bits(pick(unpack_bits(self.packed, shape.numel())), len(self.packed))
        words = tuple(map(pick, self.words))
        return replace(self, words=words, packed=bits, checksum=self.checksum[rows])

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A description that JSON can hold, and the tensors by name: see `of_parts`."""
        tensors = {f"side.word.{i}": word for i, word in enumerate(self.words)}
        tensors |= {"side.packed": self.packed, "side.checksum": self.checksum}
        described = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "words": len(self.words),
            "done": self.done,
            "origin": self.origin,
            "bound": self.bound,
        }
        return described, tensors

    @classmethod
    def of_parts(cls, described: Any, tensors: dict[str, Tensor]) -> SideInformation:
        """The side information that `parts` took apart; takes its tensors out of `tensors`.

        Raises:
            ValueError, KeyError: if the description has another form, or a tensor is not there.
        """
        fields = read(described, _DESCRIBED)
        words = tuple(tensors.pop(f"side.word.{i}") for i in range(fields.pop("words")))
        done = tuple(Done(*done) for done in fields.pop("done"))
        packed, total = tensors.pop("side.packed"), tensors.pop("side.checksum")
        return cls(words=words, packed=packed, done=done, checksum=total, **fields)

    def map(self, move: Callable[[Tensor], Tensor]) -> SideInformation:
        """The same with every tensor replaced by `move` of it."""
        return replace(
            self,
            words=tuple(move(word) for word in self.words),
            packed=move(self.packed),
            checksum=move(self.checksum),
        )


class Stack:
    """Multiplies integers by fractions a/b, keeping what is needed to divide again.

    With one integer W of side information for each integer z (Maclaurin, Duvenaud, Adams 2015,
    arXiv 1502.03492, algorithm 3):

        z = q b + r      W' = W b + r      W' = W'' a + t      result = q a + t

    The remainder of the division by b is pushed onto W, and the result takes the free place of a
    remainder from it. Done again with a and b exchanged it undoes itself. The result
    is z a/b up to less than a; W'' is larger than W by b/a. Both z and the result must be below 2^61
    in absolute value.

    W is an int64 tensor. Where a bound known on the host says that it might not hold the next
    remainder, the low 32 bits of all elements are put aside ("spilled"), and taken back when that
    multiplication is undone: a run that turns round undoes its multiplications in reverse order.
    Nothing here waits for a device.

    The working memory of one run, and changed by it.
    """

    def __init__(
        self, shape: torch.Size, origin: int, checksum: Tensor, dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        self.origin = origin
        self.checksum = checksum
        self.sigma = math.nan
        """The level of the step at hand, for messages."""
        self.overflows: list[Tensor] = []
        """Tensors that are True where side information overflowed: never in an exact run."""
        self.extents: list[tuple[float, Tensor, Tensor, float]] = []
        """Level, minimum, maximum and factor of values whose range is checked at the end of the run."""
        self._shape = shape
        self._top: Tensor | None = None  # W; None while the bound says that it is 0
        self._bound = 0  # no element of W is larger
        self._kept: Tensor | None = None  # the W of the last copy, which is not written to
        self._spare: Tensor | None = None
        self._scratch: tuple[Tensor, Tensor] | None = None
        self._done: list[Done] = []
        self._aside: list[Tensor] = []

    def multiply(self, z: Tensor, a: int, b: int, size: float = math.inf) -> Tensor:
        """About ``z a / b``, in storage that the next call overwrites; `divide` undoes it.

        `size` is an upper bound of ``|z|``, if one is known.
        """
        return self._scale(z, a, b, size, 1)

    def divide(self, z: Tensor, a: int, b: int, size: float = math.inf) -> Tensor:
        """About ``z b / a``, likewise: the z that `multiply` was given."""
        return self._scale(z, b, a, size, -1)

    def _scale(self, z: Tensor, a: int, b: int, size: float, move: int) -> Tensor:
        turned = bool(self._done) and self._done[-1][:3] == (-move, b, a)
        undone = self._done.pop() if turned else None
        if undone is None:
            bound = self._bound
            self._done.append(Done(move, a, b, bound, self._make_room(b)))
        # Undoing needs no room: it meets the numbers that were met on the way, and they had it.
        result = self._multiply(z, a, b, size)
        if undone is None:
            self._bound = (self._bound * b + b - 1) // a
        else:
            for _ in range(undone.words):
                self._take_back()
            self._bound = undone.bound
        if not self._bound:
            if undone is not None and self._top is not None:
                # W was 0 here on the way, unless this is no exact undoing.
                self.overflows.append(self._top.any())
            self._top = None
        return result

    def _multiply(self, z: Tensor, a: int, b: int, size: float) -> Tensor:
        """W'' in place of W, and the result.

        One of a and b is a power of two for every weight of `FixedPoint`, so that one of the two
        divisions is a shift. With V = W b + r the result ``q a + t`` is ``V + a (q - W'')``.
        """
        if self._scratch is None:  # new memory costs more than arithmetic
            self._scratch = torch.empty_like(z), torch.empty_like(z)
        (q, v), top = self._scratch, self._top
        new = torch.empty_like(z) if self._spare is None else self._spare
        if b & (b - 1) == 0:
            torch.bitwise_right_shift(z, b.bit_length() - 1, out=q)
            torch.bitwise_and(z, b - 1, out=v)
        else:
            torch.sub(z, _floor(z, b, size, q), alpha=b, out=v)
        if top is not None:
            v.add_(top, alpha=b)
        self._spare = None if top is self._kept else top
        self._top = new
        if a & (a - 1) == 0:
            k = a.bit_length() - 1
            torch.bitwise_right_shift(v, k, out=new)
            return q.bitwise_left_shift_(k).bitwise_or_(v.bitwise_and_(a - 1))
        _floor(v, a, self._bound * b + b - 1, new, signed=False)
        return v.add_(q.sub_(new), alpha=a)

    def _make_room(self, b: int) -> int:
        """Puts words aside until W b + b - 1 cannot overflow, and returns their number."""
        words = 0
        while self._top is not None and self._bound * b + b - 1 > _LARGEST:
            self._aside.append(low_word(self._top))
            self._bound >>= 32
            self._top = self._top >> 32 if self._bound else None
            words += 1
        return words

    def _take_back(self) -> None:
        """Takes back the word that was put aside last."""
        assert self._top is not None
        # What was put aside fits here again, unless the run was not undone exactly.
        self.overflows.append((self._top >> 31).any())
        self._top = from_word(self._aside.pop()) | self._top << 32

    def pack(self) -> SideInformation:
        """The side information needed to continue. Waits for the device."""
        words = [word.flatten() for word in self._aside]
        top = self._top
        if top is None:
            top = torch.zeros(self._shape, dtype=torch.int64, device=self.checksum.device)
        width = int(top.max()).bit_length() if self._bound else 0
        if width >= 32:
            words.append(low_word(top).flatten())
            top, width = top >> 32, width - 32
        return SideInformation(
            dtype=self.dtype,
            words=tuple(words),
            packed=pack_bits(top.flatten(), width),
            done=tuple(self._done),
            origin=self.origin,
            checksum=self.checksum,
            bound=self._bound,
        )

    def __copy__(self) -> Stack:
        """The memory as it is now, until the next copy: W is written to places that take turns."""
        if self._kept is not self._top:
            self._spare, self._kept = self._kept, self._top
        twin = Stack(self._shape, self.origin, self.checksum, self.dtype)
        twin.overflows, twin.extents = list(self.overflows), list(self.extents)
        twin._top, twin._kept = self._top, self._top
        twin._bound, twin._done, twin._aside = self._bound, list(self._done), list(self._aside)
        return twin

    @classmethod
    def unpack(cls, side: SideInformation, shape: torch.Size) -> Stack:
        """The stack that `pack` was called on, for a state of that shape."""
        side.check(shape)
        n, aside = shape.numel(), sum(done.words for done in side.done)
        stack = cls(shape, side.origin, side.checksum, side.dtype)
        words = [word.reshape(shape) for word in side.words]
        stack._done, stack._aside = list(side.done), words[:aside]
        top = unpack_bits(side.packed, n).reshape(shape) if len(side.packed) else None
        if len(words) > aside:
            low = from_word(words[-1])
            top = low if top is None else top << 32 | low
        stack._top, stack._bound = top, side.bound
        return stack


def _floor(z: Tensor, d: int, size: float, out: Tensor, *, signed: bool = True) -> Tensor:
    """``floor(z / d)`` for ``|z| <= size``, into `out`; a division of int64 takes long.

    Below 2^53 the quotient in float64 is less than 1 / d off, and so on the right side of an integer
    (on a CPU: a GPU multiplies by ``1 / d`` instead). Above, numbers that are not negative are divided
    in half the time of a division with floor.
    """
    if size < 2**53 and z.device.type == "cpu":
        return out.copy_(z.double().div_(d).floor_())
    steps = 2**62 // d if signed else 0
    torch.div(torch.add(z, d * steps, out=out) if signed else z, d, rounding_mode="trunc", out=out)
    return out.sub_(steps) if signed else out


def checksum(z: Tensor) -> Tensor:
    """Of each element of a batch a number, modulo 2^64, that is certain to change with any one integer.

    And all but certain to change with several: the sum of the int64 integers times odd numbers that
    depend on their places.

    Returns:
        int64 ``(B,)`` for `z` of shape ``(B, ...)``.
    """
    rows = z.reshape(z.shape[0], -1)
    place = torch.arange(1, 2 * rows.shape[1], 2, device=z.device).mul_(0x1E3779B97F4A7C15)
    return place.bitwise_xor_(place >> 29).bitwise_or_(1).mul(rows).sum(1)


def low_word(z: Tensor) -> Tensor:
    """The low 32 bits of int64 `z`, as int32."""
    return ((z & _LOW_WORD) - ((z & 2**31) << 1)).to(torch.int32)


def from_word(word: Tensor) -> Tensor:
    """The int64 between 0 and 2^32 - 1 that has the bits of int32 `word`."""
    return word.to(torch.int64).bitwise_and_(_LOW_WORD)


def pack_bits(z: Tensor, width: int) -> Tensor:
    """Integers from 0 to ``2**width - 1``, width 0 to 31, as ``width`` bits each.

    Args:
        z: int64 ``(n,)``.
        width: m.

    Returns:
        int32 ``(m, ceil(n / 32))``: column j holds elements j, j + c, j + 2c, ..., of c columns.
    """
    columns = -(-z.numel() // _GROUP)
    rows = torch.nn.functional.pad(z, (0, columns * _GROUP - z.numel())).reshape(_GROUP, columns)
    word, offset = _places(width, z.device)
    shifted = rows << offset.unsqueeze(1)
    words = z.new_zeros(width + 2, columns)
    words.index_add_(0, word, shifted & _LOW_WORD)  # no two have a bit in common
    words.index_add_(0, word + 1, shifted >> 32)
    return low_word(words[:width])


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The int64 ``(n,)`` that `pack_bits` was given."""
    width = packed.shape[0]
    words = torch.nn.functional.pad(from_word(packed), (0, 0, 0, 2))
    word, offset = _places(width, packed.device)
    low = words[word] >> offset.unsqueeze(1)
    high = words[word + 1] << (32 - offset).unsqueeze(1)
    return (low | high).bitwise_and_(2**width - 1).flatten()[:n]


def _places(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each integer of a group, the word in which it begins and the bit of it."""
    first = torch.arange(_GROUP, device=device) * width
    return first >> 5, first & 31
