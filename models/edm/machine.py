"""An interpreter of pickles that can build numbers, text and containers, and call nothing else.

Python's own unpickler hashes what a file names as keys, trusts the sizes that it states, and calls what
it finds. This one has no such instruction: the names in a file are looked up in a table of handlers,
keys are texts and small integers, and each instruction costs a bounded time and no more memory than it
has bytes, but for a constant. The number of instructions is limited as well.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, final

import numpy as np

from .checks import brief
from .stored import CheckpointError

OPERATIONS = 2**18
"""The most instructions in a file; the largest published one has about 75,000."""

LONG_TEXT = 2**20


@final
class UnknownName(CheckpointError):
    """Error for a file that asks for a name without a handler.

    Attributes:
        name: the beginning of the name, in printable characters.
    """

    def __init__(self, name: str) -> None:
        self.name = ascii(name[:100])[1:-1]
        super().__init__(
            f"refused: the file asks for {self.name}, which no EDM checkpoint needs; loading it could "
            "run code of its author's choice"
        )


@final
class Budget:
    """What the pickles of one file may still do.

    Args:
        size: the size of the file in bytes, which is as much as may be copied.
    """

    def __init__(self, size: int) -> None:
        self.operations, self.copies = OPERATIONS, size

    def copy(self, size: int) -> None:
        """Account for a copy of `size` bytes."""
        self.copies -= size
        if self.copies < 0:
            raise CheckpointError("refused: the file makes more copies of its content than it has")


class Handler:
    """A stand-in for what a file names; each method refuses what the stand-in does not support."""

    name = ""

    def call(self, *args: Any) -> Any:
        """The result of a call, in REDUCE."""
        raise CheckpointError(f"refused: the file calls {self.name}, which is no function")

    def new(self) -> Any:
        """A new object, in NEWOBJ."""
        raise CheckpointError(f"refused: the file constructs {self.name}, which is no class")


class Stateful:
    """An object whose state a file sets, in BUILD."""

    def build(self, state: Any) -> None:
        """Set the state."""
        raise NotImplementedError


Names: TypeAlias = Mapping[str, Handler]
_Mark = object()


@final
class Machine:
    """Runs the pickles that lie in `data` one after another.

    Args:
        data: the pickles.
        names: the handlers of the names that they may use.
        budget: what they may do.
        persistent: the meaning of references to objects outside; None refuses these.
    """

    def __init__(
        self,
        data: memoryview,
        names: Names,
        budget: Budget,
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        self._data, self._names, self._budget, self._persistent = data, names, budget, persistent
        self.position = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The object that the next pickle builds.

        Raises:
            CheckpointError: if the pickle is damaged, or does what EDM checkpoints do not.
        """
        self._stack, self._memo = [], {}
        while (code := self._byte()) != ord("."):
            self._budget.operations -= 1
            if self._budget.operations < 0:
                raise CheckpointError(f"refused: the file has more than {OPERATIONS} instructions")
            operation = _OPERATIONS.get(chr(code))
            if operation is None:
                raise CheckpointError(
                    f"the file is damaged or is not a pickle of protocol 2 to 5: instruction {code:#04x}"
                )
            operation(self)
        return self._pop()

    def _take(self, size: int) -> memoryview:
        end = self.position + size
        if size < 0 or end > len(self._data):
            raise CheckpointError(
                f"the file is damaged or is not a pickle: it ends at byte {len(self._data)}, in the "
                "middle of an instruction"
            )
        part = self._data[self.position : end]
        self.position = end
        return part

    def _byte(self) -> int:
        return self._take(1)[0]

    def _skip(self, size: int) -> None:
        self._take(size)

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return value

    def _line(self) -> str:
        window = bytes(self._data[self.position : self.position + 200])
        end = window.find(b"\n")
        if end < 0:
            raise CheckpointError("the file is damaged or is not a pickle: a name has no end")
        self.position += end + 1
        return window[:end].decode()

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _Mark:
            raise CheckpointError("the file is damaged or is not a pickle: an operand is missing")
        return self._stack.pop()

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise CheckpointError(f"the file is damaged: no {kind.__name__} where one should be")
        return self._stack[-1]

    def _marked(self) -> list[Any]:
        stack = self._stack
        items: list[Any] = []
        while stack and stack[-1] is not _Mark:
            items.append(stack.pop())
        if not stack:
            raise CheckpointError("the file is damaged or is not a pickle: a mark is missing")
        stack.pop()
        return items[::-1]

    def _drop(self) -> None:
        if not self._stack:
            self._pop()
        self._stack.pop()

    def _drop_marked(self) -> None:
        self._marked()

    def _extend(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def _dict(self, items: list[Any]) -> None:
        self._push({})
        self._set(items)

    def _text(self, size: int) -> None:
        part = self._take(size)
        # The storages of protocol 2 are such text; with other letters it would take four times the room.
        if size > LONG_TEXT and int(np.frombuffer(part, np.uint8).max()) > 0xC3:
            raise CheckpointError("refused: the file holds a very long text that is not Latin-1")
        self._push(str(part, "utf-8", "surrogatepass"))

    def _long(self, size: int) -> None:
        if size > 64:
            raise CheckpointError(f"refused: the file holds a number of {size} bytes")
        self._push(int.from_bytes(self._take(size), "little", signed=True))

    def _put(self, index: int) -> None:
        self._memo[index] = self._top(object)
        if self._memo[index] is _Mark:
            raise CheckpointError("the file is damaged: it stores a mark")

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise CheckpointError("the file is damaged: it uses what it has not stored")
        self._push(self._memo[index])

    def _set(self, items: list[Any]) -> None:
        target = self._top(dict)
        if len(items) % 2:
            raise CheckpointError("the file is damaged: a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Large and broken numbers can be chosen to hash alike, which takes quadratic time.
            small = isinstance(key, int) and abs(key) < 2**31
            if not (small or key is None or isinstance(key, str)):
                raise CheckpointError(f"refused: the file uses {brief(key)} as a key")
            target[key] = value

    def _find(self, module: Any, name: Any) -> None:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else ""
        handler = self._names.get(full) if len(full) < 200 else None
        if handler is None:
            raise UnknownName(full)
        self._push(handler)

    def _reduce(self) -> None:
        args, function = self._pop(), self._pop()
        if not isinstance(function, Handler) or not isinstance(args, tuple):
            raise CheckpointError("refused: the file calls what is no function")
        try:
            self._push(function.call(*args))
        except TypeError as error:
            raise CheckpointError(
                f"the file is damaged: a call has other arguments: {error}"
            ) from error

    def _new(self) -> None:
        args, cls = self._pop(), self._pop()
        if not isinstance(cls, Handler) or args != ():
            raise CheckpointError(
                "refused: the file constructs what is no class of EDM checkpoints"
            )
        self._push(cls.new())

    def _build(self) -> None:
        state = self._pop()
        target = self._top(object)
        if not isinstance(target, Stateful):
            raise CheckpointError("refused: the file tries to alter an object of the reader")
        target.build(state)

    def _refer(self) -> None:
        pid = self._pop()
        if self._persistent is None:
            raise CheckpointError(
                f"refused: the file refers to an object outside itself, {brief(pid)}"
            )
        self._push(self._persistent(pid))

    def _tuple(self, size: int) -> None:
        self._push(tuple([self._pop() for _ in range(size)][::-1]))


_OPERATIONS: Mapping[str, Callable[[Machine], None]] = {
    "\x80": lambda m: m._skip(1),  # PROTO
    "\x95": lambda m: m._skip(8),  # FRAME
    "(": lambda m: m._push(_Mark),
    "0": lambda m: m._drop(),
    "1": lambda m: m._drop_marked(),
    "N": lambda m: m._push(None),
    "\x88": lambda m: m._push(True),
    "\x89": lambda m: m._push(False),
    "K": lambda m: m._push(m._byte()),
    "M": lambda m: m._push(m._number("<H")),
    "J": lambda m: m._push(m._number("<i")),
    "\x8a": lambda m: m._long(m._byte()),
    "\x8b": lambda m: m._long(m._number("<i")),
    "G": lambda m: m._push(m._number(">d")),
    "\x8c": lambda m: m._text(m._byte()),
    "X": lambda m: m._text(m._number("<I")),
    "\x8d": lambda m: m._text(m._number("<Q")),
    "C": lambda m: m._push(m._take(m._byte())),
    "B": lambda m: m._push(m._take(m._number("<I"))),
    "\x8e": lambda m: m._push(m._take(m._number("<Q"))),
    "\x96": lambda m: m._push(m._take(m._number("<Q"))),
    ")": lambda m: m._push(()),
    "\x85": lambda m: m._tuple(1),
    "\x86": lambda m: m._tuple(2),
    "\x87": lambda m: m._tuple(3),
    "t": lambda m: m._push(tuple(m._marked())),
    "]": lambda m: m._push([]),
    "l": lambda m: m._push(m._marked()),
    "a": lambda m: m._extend([m._pop()]),
    "e": lambda m: m._extend(m._marked()),
    "}": lambda m: m._push({}),
    "d": lambda m: m._dict(m._marked()),
    "s": lambda m: m._set([m._pop(), m._pop()][::-1]),
    "u": lambda m: m._set(m._marked()),
    # Sets are of no use to the reader: their elements are listed, and not hashed.
    "\x8f": lambda m: m._push([]),
    "\x90": lambda m: m._extend(m._marked()),
    "\x91": lambda m: m._push(m._marked()),
    "q": lambda m: m._put(m._byte()),
    "r": lambda m: m._put(m._number("<I")),
    "\x94": lambda m: m._put(len(m._memo)),
    "h": lambda m: m._get(m._byte()),
    "j": lambda m: m._get(m._number("<I")),
    "c": lambda m: m._find(m._line(), m._line()),
    "\x93": lambda m: m._find(*[m._pop(), m._pop()][::-1]),
    "R": lambda m: m._reduce(),
    "\x81": lambda m: m._new(),
    "b": lambda m: m._build(),
    "Q": lambda m: m._refer(),
}
